"""Keys and values in bfloat16, to nearest: the range of float32 with 8 significant bits.

A code is the upper half of a float32, rounded to the nearest, ties to even; it is stored as an int16, since NumPy has
no bfloat16 of its own. Deviations: what would round to infinity is the largest number.
"""

from dataclasses import dataclass

from jaxtyping import Float

from framework.arrays import Array, Namespace
from framework.codec import Codec, Parts, Side

INFINITE = 0x7F80


@dataclass(frozen=True, kw_only=True)
class Bf16(Codec):
    """8 significant bits, up to 3.39e38."""

    def encode(self, xp: Namespace, x: Float[Array, "*axes width"], side: Side) -> dict[str, Array]:
        finite, word = xp.isfinite(x), x.view(xp.int32)
        word = word + xp.where(
            finite, ((word >> 16) & 1) + 0x7FFF, 0
        )  # half a unit, less where the last bit is even
        code = word >> 16
        code = code - xp.where(finite & ((code & 0x7FFF) == INFINITE), 1, 0)
        return {"codes": xp.astype(code, xp.int16)}

    def read(self, xp: Namespace, parts: Parts, side: Side) -> Float[Array, "*axes width"]:
        return (xp.astype(parts["codes"], xp.int32) << 16).view(xp.float32)

    def bits_of(self, width: int, side: Side, itemsize: int) -> tuple[float, float]:
        return 16.0 * width, 0.0
