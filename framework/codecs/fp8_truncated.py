"""The upper byte of float16, which is e5m2 rounded towards 0: ExLlamaV2's first 8-bit cache.

Source: ExLlamaV2, `Cache_8bit`. Deviations: what is read is float32 and not float16, with the same numbers; a number
beyond float16, which is infinite there, is rounded towards 0 like any other.
"""

from dataclasses import dataclass

from jaxtyping import Float

from framework.arrays import Array, Namespace
from framework.codec import Codec, Parts, Side
from framework.rounding import half, upper_half

MOST = 65504.0


@dataclass(frozen=True, kw_only=True)
class Fp8Truncated(Codec):
    """Up to 57344."""

    def encode(self, xp: Namespace, x: Float[Array, "*axes width"], side: Side) -> dict[str, Array]:
        x = xp.where(xp.isfinite(x), xp.clip(x, -MOST, MOST), x)
        return {"codes": xp.astype((half(xp, x).view(xp.int16) >> 8) & 0xFF, xp.uint8)}

    def read(self, xp: Namespace, parts: Parts, side: Side) -> Float[Array, "*axes width"]:
        return upper_half(xp, parts["codes"])

    def bits_of(self, width: int, side: Side, itemsize: int) -> tuple[float, float]:
        return 8.0 * width, 0.0
