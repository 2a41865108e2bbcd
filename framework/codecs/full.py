"""K and V in the model's own dtype."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float

from framework.arrays import Array, Namespace
from framework.codec import Codec, Parts, Side


@dataclass(frozen=True, kw_only=True)
class Full(Codec):
    """No coding."""

    exact: ClassVar[bool] = True

    def encode(self, xp: Namespace, x: Float[Array, "*axes width"], side: Side) -> dict[str, Array]:
        return {"codes": x}

    def read(self, xp: Namespace, parts: Parts, side: Side) -> Float[Array, "*axes width"]:
        return parts["codes"]

    def bits_of(self, width: int, side: Side, itemsize: int) -> tuple[float, float]:
        return 8.0 * itemsize * width, 0.0
