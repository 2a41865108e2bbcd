"""Keys and values in float16, to nearest; what lies beyond 65504 becomes infinite and is refused."""

from dataclasses import dataclass

from jaxtyping import Float

from framework.arrays import Array, Namespace
from framework.codec import Codec, Parts, Side
from framework.rounding import half


@dataclass(frozen=True, kw_only=True)
class Fp16(Codec):
    """11 significant bits, from 6e-8 to 65504."""

    def encode(self, xp: Namespace, x: Float[Array, "*axes width"], side: Side) -> dict[str, Array]:
        return {"codes": half(xp, x)}

    def read(self, xp: Namespace, parts: Parts, side: Side) -> Float[Array, "*axes width"]:
        return xp.astype(parts["codes"], xp.float32)

    def bits_of(self, width: int, side: Side, itemsize: int) -> tuple[float, float]:
        return 16.0 * width, 0.0
