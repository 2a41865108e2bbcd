"""Centred: keys less their mean, which another codec codes.

The mean is that of each channel over the keys of a head that are coded together: at most `group` in a row, when
`residual` of them, beginning at a multiple of it, are complete. It is stored once for them, in float16, and added again
when they are read, so that it may be any, and an exact key needs none. Where a few channels are large in all keys, what
is left is small; but a channel that turns fast with the position has no mean to speak of: there `unbias`, which knows
the bias at each position, is better. The newest `residual` tokens are exact. Values are coded by the other codec.

Others subtract one mean of the prompt and do not add it again, since the softmax does not see what is the same in every
key (PrismML's llama.cpp); a mean for each group has to be added.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from framework.arrays import Array, Namespace
from framework.codec import Codec, Parts, Side, decoded
from framework.codecs.int8 import Int8
from framework.errors import KvtwinError
from framework.rounding import half, quotient, rounded, total
from framework.spec import Layer


@dataclass(frozen=True, kw_only=True)
class Centred(Codec):
    """Another codec, for keys less the mean of `group` of them; `residual` newest tokens are exact."""

    codec: Codec
    group: int = 128
    residual: int = 128

    def __post_init__(self) -> None:
        if self.codec.exact or self.codec.recent or self.codec.unbiased:
            raise KvtwinError(
                f"centred has codec={self.codec}; expected one that codes each token by itself, without unbias"
            )
        for what in ("group", "residual"):
            value = getattr(self, what)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise KvtwinError(f"centred has {what}={value!r}; expected at least 1")

    @property
    def recent(self) -> int:
        return self.residual

    @property
    def together(self) -> int:
        return self.group

    def encode_group(
        self,
        xp: Namespace,
        x: Float[Array, "*axes tokens width"],
        filled: Bool[Array, "*axes tokens"],
        queries: Float[Array, "*#axes newest width"] | None,
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        count = xp.sum(xp.astype(filled, xp.float32), axis=-1)[..., None]
        whole = total(xp, xp.where(filled[..., None], x, 0.0))
        mean = half(xp, quotient(xp, whole, xp.broadcast_to(xp.where(count == 0, 1.0, count), whole.shape)))
        rest = rounded(xp, x - xp.astype(mean, xp.float32)[..., None, :])
        return self.codec.encode(xp, rest, "keys"), {"mean": mean}

    def encode(self, xp: Namespace, x: Float[Array, "*axes width"], side: Side) -> dict[str, Array]:
        return self.codec.encode(xp, x, side)

    def read(self, xp: Namespace, parts: Parts, side: Side) -> Float[Array, "*axes width"]:
        if side == "values":
            return self.codec.read(xp, parts, side)
        x = decoded(self.codec, xp, parts, side, xp.float32)
        return rounded(xp, x) + xp.astype(parts["mean"], xp.float32)

    def scale(self, xp: Namespace, parts: Parts, side: Side) -> Float[Array, "*axes"] | None:
        return self.codec.scale(xp, parts, side) if side == "values" else None

    def turn(self, width: int, side: Side) -> Float[np.ndarray, "width width"] | None:
        return self.codec.turn(width, side) if side == "values" else None

    def bits_of(self, width: int, side: Side, itemsize: int) -> tuple[float, float]:
        codes, beside = self.codec.bits_of(width, side, itemsize)
        return codes, beside + (16.0 if side == "keys" else 0.0)

    def group_bits(self, width: int, itemsize: int) -> float:
        return 16.0 * width

    def unfit(self, layer: Layer) -> str | None:
        if self.codec.joint(layer):
            return f"head_dim {layer.head_dim}, whose heads {self.codec} codes as one; expected them coded one by one"
        return self.codec.unfit(layer)

    @classmethod
    def examples(cls) -> list[Codec]:
        return [cls(codec=Int8(), group=4, residual=4)]

    @classmethod
    def listed(cls) -> list[Codec]:
        return [cls(codec=Int8())]
