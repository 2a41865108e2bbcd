"""Keys and values as 8-bit floats: e4m3 (no infinities, up to 448) or e5m2 (up to 57344), with one scale for each side.

A code is x / scale, clipped to the largest number of the format and rounded to the nearest, ties to even; what is read
is code * scale. This is vLLM's convention, and its scale of 1 where nothing was calibrated.

Deviations: infinity is not clipped but coded as NaN, so that it is refused.
"""

from dataclasses import dataclass

from jaxtyping import Float

from framework.arrays import Array, Namespace
from framework.codec import Codec, Parts, Side
from framework.errors import KvtwinError
from framework.rounding import byte_float, quotient, upper_half

KINDS = ("e4m3", "e5m2")


@dataclass(frozen=True, kw_only=True)
class Fp8(Codec):
    """`k_scale` and `v_scale`: what the codes of keys and of values are multiplied by."""

    kind: str = "e4m3"
    k_scale: float = 1.0
    v_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise KvtwinError(f"fp8 has kind={self.kind!r}; expected one of {', '.join(KINDS)}")
        for name in ("k_scale", "v_scale"):
            scale = getattr(self, name)
            if not (type(scale) in (int, float) and 1e-20 <= scale <= 1e20):
                raise KvtwinError(f"fp8 has {name}={scale!r}; expected a number from 1e-20 to 1e20")

    def encode(self, xp: Namespace, x: Float[Array, "*axes width"], side: Side) -> dict[str, Array]:
        wide = self.kind == "e5m2"
        most = 57344.0 if wide else 448.0
        y = quotient(xp, x, xp.full_like(x, self._scale(side)))
        y = xp.where(xp.isfinite(x), xp.clip(y, -most, most), xp.nan)
        return {"codes": byte_float(xp, y, mantissa=2 if wide else 3, bias=15 if wide else 7, nan=0x7F)}

    def read(self, xp: Namespace, parts: Parts, side: Side) -> Float[Array, "*axes width"]:
        codes, scale = parts["codes"], self._scale(side)
        if self.kind == "e5m2":
            return upper_half(xp, codes) * scale
        # The exponent of e4m3 in the place of float16's, whose bias is larger by 8.
        word = xp.astype(codes, xp.int16)
        half = (((word & 0x80) << 8) | ((word & 0x7F) << 7)).view(xp.float16)
        return xp.where((word & 0x7F) == 0x7F, xp.nan, xp.astype(half, xp.float32) * (256.0 * scale))

    def bits_of(self, width: int, side: Side, itemsize: int) -> tuple[float, float]:
        return 8.0 * width, 0.0

    def _scale(self, side: Side) -> float:
        return self.k_scale if side == "keys" else self.v_scale

    @classmethod
    def examples(cls) -> list[Codec]:
        return [cls(), cls(kind="e5m2"), cls(k_scale=0.3, v_scale=2.5), cls(kind="e5m2", k_scale=3e-4)]
