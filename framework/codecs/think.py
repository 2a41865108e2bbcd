"""ThinK: of older keys only the channels that recent queries read (arXiv 2407.21018).

Of the keys of a head that are coded together, `channels` are kept: those with the largest product of two sums of
squares, of the channel in these keys and in the newest `window` queries of the head's group, which orders them as the
Frobenius norm of the products of queries and keys in that channel does. Until there are queries, the keys alone decide.
The other channels are not stored, and read as 0. The newest `residual` tokens are exact; keys are chosen from when
`residual` of them, beginning at a multiple of it, are complete. Values keep all channels.

Deviations: the paper chooses once, for the prompt without its last tokens; here each run of `residual` decoded tokens
is chosen from as well. Kept channels and values are float16.
"""

from dataclasses import dataclass

from jaxtyping import Bool, Float

from framework.arrays import Array, Namespace, device
from framework.codec import Codec, Parts, Side
from framework.errors import KvtwinError
from framework.rounding import half, total
from framework.spec import Layer

ALL = 2**15  # keys that are coded at one time share their channels, however many they are


@dataclass(frozen=True, kw_only=True)
class Think(Codec):
    """`channels` of a key are kept, as the newest `window` queries say; `residual` newest tokens are exact."""

    channels: int = 64
    window: int = 32
    residual: int = 32

    def __post_init__(self) -> None:
        for what in ("channels", "window", "residual"):
            value = getattr(self, what)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise KvtwinError(f"think has {what}={value!r}; expected at least 1")

    @property
    def recent(self) -> int:
        return self.residual

    @property
    def together(self) -> int:
        return ALL

    @property
    def queries(self) -> int:
        return self.window

    def encode_group(
        self,
        xp: Namespace,
        x: Float[Array, "*axes tokens width"],
        filled: Bool[Array, "*axes tokens"],
        queries: Float[Array, "*#axes newest width"] | None,
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        assert queries is not None
        score = total(xp, xp.where(filled[..., None], x * x, 0.0))
        asked = total(xp, queries * queries)
        asked = xp.where(xp.max(asked, axis=-1, keepdims=True) > 0, asked, 1.0)
        score = score * asked
        score = xp.where(xp.isnan(score), xp.inf, score)  # kept, so that it shows
        place = xp.argsort(xp.argsort(-score, axis=-1, stable=True), axis=-1)
        kept = place < self.channels
        width = x.shape[-1]
        here = xp.arange(width, device=device(x))
        index = xp.sort(xp.where(kept, here, width), axis=-1)[..., None, : self.channels]
        index = xp.broadcast_to(index, (*x.shape[:-1], self.channels))
        number = xp.cumulative_sum(xp.astype(kept, xp.int32), axis=-1) - 1
        channels = xp.astype(xp.where(kept, number, -1), xp.int16)
        return {"codes": half(xp, xp.take_along_axis(x, index, axis=-1))}, {"channels": channels}

    def encode(self, xp: Namespace, x: Float[Array, "*axes width"], side: Side) -> dict[str, Array]:
        return {"codes": half(xp, x)}

    def read(self, xp: Namespace, parts: Parts, side: Side) -> Float[Array, "*axes width"]:
        codes = xp.astype(parts["codes"], xp.float32)
        if side == "values":
            return codes
        index = xp.astype(parts["channels"], xp.int64 if hasattr(xp, "gather") else xp.int32)
        return xp.where(index < 0, 0.0, xp.take_along_axis(codes, xp.where(index < 0, 0, index), axis=-1))

    def bits_of(self, width: int, side: Side, itemsize: int) -> tuple[float, float]:
        return (16.0 * self.channels, 16.0) if side == "keys" else (16.0 * width, 0.0)

    def group_bits(self, width: int, itemsize: int) -> float:
        return 16.0 * width

    def unfit(self, layer: Layer) -> str | None:
        if self.channels > layer.head_dim:
            return f"head_dim {layer.head_dim}; expected at least channels={self.channels}"
        return None

    @classmethod
    def examples(cls) -> list[Codec]:
        return [cls(channels=24, window=3, residual=4)]

    @classmethod
    def listed(cls) -> list[Codec]:
        return [cls()]
