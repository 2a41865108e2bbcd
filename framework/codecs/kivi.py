"""KIVI: keys in 2 or 4 bits by channel, values by token, the newest tokens exact (arXiv 2402.02750).

A channel of `group` keys in a row shares a minimum and a scale, so that a channel that is large in every key costs the
others nothing. Of a value, `group` channels do. The codes and the numbers beside them are those of
`framework/min_max.py`. The newest `residual` tokens are exact; keys are coded when `residual` of them, beginning at a
multiple of it, are complete, a value when it is no longer among the newest. A call attends exactly to its own tokens.

Under an eviction policy a group is made of what is left of its tokens when it is coded, and its minima and scales stay
until the last of them is evicted. `regroup`: the keys of a head are coded again, from what they read as, when they lie
in more than twice the groups they need; `cache.groups` counts how often.

Deviations: a head_dim that is no multiple of `group` leaves a shorter last group. The codes of a token lie together,
not those of a channel, so that a token can be moved, and it has two bytes that name its group.
"""

from dataclasses import dataclass

from jaxtyping import Bool, Float

from framework.arrays import Array, Namespace, device
from framework.codec import Codec, Parts, Side
from framework.errors import KvtwinError
from framework.min_max import encode, read
from framework.packing import pack, unpack
from framework.spec import Layer


@dataclass(frozen=True, kw_only=True)
class Kivi(Codec):
    """`bits` a code; groups of `group` tokens or channels; `residual` newest tokens exact."""

    bits: int = 2
    group: int = 32
    residual: int = 128
    regroup: bool = False

    def __post_init__(self) -> None:
        name = type(self).__name__.lower()
        if self.bits not in (2, 4):
            raise KvtwinError(f"{name} has bits={self.bits!r}; expected 2 or 4")
        if isinstance(self.group, bool) or not isinstance(self.group, int) or self.group < 1:
            raise KvtwinError(f"{name} has group={self.group!r}; expected at least 1")
        if not isinstance(self.residual, int) or self.residual < 1 or self.residual % self.group:
            raise KvtwinError(
                f"{name} has residual={self.residual!r}; expected a positive multiple of group={self.group}"
            )

    @property
    def recent(self) -> int:
        return self.residual

    @property
    def together(self) -> int:
        return self.group

    @property
    def regroups(self) -> bool:
        return self.regroup

    def encode_group(
        self,
        xp: Namespace,
        x: Float[Array, "*axes tokens width"],
        filled: Bool[Array, "*axes tokens"],
        queries: Float[Array, "*#axes newest width"] | None,
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        codes, scale, low = encode(xp, x, self.bits, -2)
        return {"codes": pack(xp, codes, self.bits)}, {
            "scales": scale[..., 0, :],
            "minima": low[..., 0, :],
        }

    def encode(self, xp: Namespace, x: Float[Array, "*axes width"], side: Side) -> dict[str, Array]:
        axes, width = x.shape[:-1], x.shape[-1]
        last = xp.broadcast_to(x[..., -1:], (*axes, -width % self.group))
        x = xp.reshape(xp.concat([x, last], axis=-1), (*axes, -1, self.group))
        codes, scale, low = encode(xp, x, self.bits, -1)
        codes = xp.reshape(codes, (*axes, -1))[..., :width]
        return {"codes": pack(xp, codes, self.bits), "scales": scale[..., 0], "minima": low[..., 0]}

    def read(self, xp: Namespace, parts: Parts, side: Side) -> Float[Array, "*axes width"]:
        codes = unpack(xp, parts["codes"], self.bits)
        scale, low = parts["scales"], parts["minima"]
        if side == "values":
            index = xp.arange(codes.shape[-1], device=device(codes)) // self.group
            scale, low = (xp.take(x, index, axis=-1) for x in (scale, low))
        return read(xp, codes, scale, low)

    def bits_of(self, width: int, side: Side, itemsize: int) -> tuple[float, float]:
        return float(self.bits * width), 16.0 if side == "keys" else 32.0 * -(-width // self.group)

    def group_bits(self, width: int, itemsize: int) -> float:
        return 32.0 * width

    def unfit(self, layer: Layer) -> str | None:
        if layer.head_dim * self.bits % 8:
            return f"head_dim {layer.head_dim}; expected codes of {self.bits} bits to fill whole bytes"
        return None

    @classmethod
    def examples(cls) -> list[Codec]:
        return [cls(group=2, residual=4), cls(bits=4, group=8, residual=8, regroup=True)]

    @classmethod
    def listed(cls) -> list[Codec]:
        return [cls(bits=bits) for bits in (2, 4)]
