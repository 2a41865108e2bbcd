"""Unbias: keys are stored without the bias of their projection; another codec codes the rest.

The bias, rotated with the keys, is the same in every key at a position, and known from the weights: what is coded is
the key less it, and reading adds it again. Where it is many times larger than what varies, as in some layers of Qwen2,
codes of 4 bits would hold little else; `kvtwin collapse` measures it.

No paper. Others subtract the mean of each channel, measured on the way, and do not add it again, since the softmax does
not see it. The bias at a position is exact, also in channels that rotate fast, and needs no state.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from framework.arrays import Array, Namespace
from framework.codec import Codec, Parts, Side
from framework.codecs.int8 import Int8
from framework.errors import KvtwinError
from framework.spec import Layer


@dataclass(frozen=True, kw_only=True)
class Unbias(Codec):
    """Another codec, with the key bias taken out before and put back after."""

    codec: Codec

    def __post_init__(self) -> None:
        if self.codec.exact or self.codec.unbiased:
            raise KvtwinError(
                f"unbias has codec={self.codec}; expected one that loses something, without unbias"
            )

    @property
    def unbiased(self) -> bool:
        return True

    def encode(self, xp: Namespace, x: Float[Array, "*axes width"], side: Side) -> dict[str, Array]:
        return self.codec.encode(xp, x, side)

    def read(self, xp: Namespace, parts: Parts, side: Side) -> Float[Array, "*axes width"]:
        return self.codec.read(xp, parts, side)

    def pieces(self, xp: Namespace, parts: Parts, side: Side) -> list[Float[Array, "*axes n"]]:
        return self.codec.pieces(xp, parts, side)

    def scale(self, xp: Namespace, parts: Parts, side: Side) -> Float[Array, "*axes"] | None:
        return self.codec.scale(xp, parts, side)

    def turn(self, width: int, side: Side) -> Float[np.ndarray, "width width"] | None:
        return self.codec.turn(width, side)

    def bits_of(self, width: int, side: Side, itemsize: int) -> tuple[float, float]:
        return self.codec.bits_of(width, side, itemsize)

    def joint(self, layer: Layer) -> bool:
        return self.codec.joint(layer)

    @property
    def recent(self) -> int:
        return self.codec.recent

    @property
    def together(self) -> int:
        return self.codec.together

    @property
    def regroups(self) -> bool:
        return self.codec.regroups

    @property
    def unrotated(self) -> bool:
        return self.codec.unrotated

    @property
    def queries(self) -> int:
        return self.codec.queries

    def encode_group(
        self,
        xp: Namespace,
        x: Float[Array, "*axes tokens width"],
        filled: Bool[Array, "*axes tokens"],
        queries: Float[Array, "*#axes newest width"] | None,
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        return self.codec.encode_group(xp, x, filled, queries)

    def group_bits(self, width: int, itemsize: int) -> float:
        return self.codec.group_bits(width, itemsize)

    def unfit(self, layer: Layer) -> str | None:
        return self.codec.unfit(layer)

    @classmethod
    def examples(cls) -> list[Codec]:
        return [cls(codec=Int8())]
