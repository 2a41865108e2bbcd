"""Keys and values in bfloat16, to nearest: the range of float32 with 8 significant bits."""

from dataclasses import dataclass

from jaxtyping import Float

from framework.arrays import Array, Namespace
from framework.codec import Codec, Parts, Side
from framework.rounding import narrow


@dataclass(frozen=True, kw_only=True)
class Bf16(Codec):
    """8 significant bits; nothing but the last half unit of float32 overflows."""

    def encode(self, xp: Namespace, x: Float[Array, "*axes width"], side: Side) -> dict[str, Array]:
        return {"codes": narrow(xp, x, "bfloat16")}

    def read(self, xp: Namespace, parts: Parts, side: Side) -> Float[Array, "*axes width"]:
        return xp.astype(parts["codes"], xp.float32)

    def bits(self, width: int, side: Side, itemsize: int) -> tuple[float, float]:
        return 16.0 * width, 0.0
