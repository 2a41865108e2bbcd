"""Keys and values in 8 bits with one scale per vector, which multiplies logits and probabilities instead of codes.

The scale is the largest absolute value over 127, in float32: float16 would save 16 bits of 544 (head_dim 64) and lose
vectors beyond 127 * 65504 and the precision of those below 1e-2. A code is x / scale, rounded to the nearest integer,
ties to even. A vector below 2^-100 is one of zeros. No vector is ever multiplied by its scale, so that reading makes no
array of the cache's size but the codes as floats. The usual symmetric quantisation; no source has a claim to it.

Deviations: x is divided by the scale as stored, and the largest value over 127 is a product with 1/127 in float32.
"""

from dataclasses import dataclass

from jaxtyping import Float

from framework.arrays import Array, Namespace
from framework.codec import Codec, Parts, Side
from framework.rounding import largest, quotient

LEAST = 2.0**-100  # far above what XLA takes for 0


@dataclass(frozen=True, kw_only=True)
class Int8(Codec):
    """Codes from -127 to 127."""

    def encode(self, xp: Namespace, x: Float[Array, "*axes width"], side: Side) -> dict[str, Array]:
        most = largest(xp, x)
        scales = xp.where(most < LEAST, 0.0, most) * (1 / 127)
        usable = (scales > 0) & xp.isfinite(scales)
        codes = xp.round(quotient(xp, xp.where(usable, x, 0.0), scales))
        return {"codes": xp.astype(xp.clip(codes, -127.0, 127.0), xp.int8), "scales": scales}

    def read(self, xp: Namespace, parts: Parts, side: Side) -> Float[Array, "*axes width"]:
        return xp.astype(parts["codes"], xp.float32)

    def scale(self, xp: Namespace, parts: Parts, side: Side) -> Float[Array, "*axes"]:
        return parts["scales"][..., 0]

    def bits_of(self, width: int, side: Side, itemsize: int) -> tuple[float, float]:
        return 8.0 * width, 32.0
