"""What every cache does with a codec: the names of its arrays, what attention reads of them, and what is refused.

The tokens of a call attend to each other exactly. They are coded as they are appended, and from the next call on, and
for the policy at once, they are what the codec gives back. Under a codec that keeps the newest tokens exact
(`framework/groups.py`) the policy sees what is exact in the call as well.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import array_api_compat.numpy
import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from framework.arrays import Array, Namespace, device, take_slots
from framework.codec import Codec, Side, codecs, decoded
from framework.errors import KvtwinError
from framework.groups import EXACT, Exact, Tables, rows_of, unfilled, with_rows
from framework.policy import Policy, policies
from framework.spec import Layer, ModelSpec, Stream

SIDES: tuple[Side, Side] = ("keys", "values")
Streams = Mapping[str, Shaped[Array, "batch heads slots _"]]


def check_codec(codec: Codec, policy: Policy, spec: ModelSpec) -> None:
    """Raises where a codec cannot store what a model makes, or not under this policy."""
    named, called = codecs.spelling(codec), policies.spelling(policy)
    if codec.exact:
        return
    if policy.merges:
        raise KvtwinError(
            f"policy {called} blends what it evicts into stored slots, and codec {named} would have to code them "
            "again; expected an exact one, as full()"
        )
    for index, layer in enumerate(spec.layers):
        if layer.latent is not None:
            raise KvtwinError(f"layer {index} has one latent stream; codec {named} expects keys and values")
        if reason := codec.unfit(layer):
            raise KvtwinError(f"codec {named} cannot code layer {index}: {reason}")
        if codec.unbiased and (not spec.qkv_bias or spec.query_key_norm):
            raise KvtwinError(
                f"codec {named} takes the bias out of the keys, and the keys of this {spec.family} have "
                f"{'a norm behind it' if spec.query_key_norm else 'none'}; expected the codec inside alone"
            )
        if codec.joint(layer) and policy.evicts and not policy.shared:
            raise KvtwinError(
                f"codec {named} codes the heads of layer {index} together, and policy {called} chooses for each head; "
                "expected a policy that keeps one set for all heads, or another codec"
            )


def stored(
    codec: Codec, xp: Namespace, layer: Layer, new: Mapping[Any, Float[Array, "batch kv_heads slots width"]]
) -> dict[str, Shaped[Array, "batch heads slots _"]]:
    """Keys and values as a cache holds them: `keys.codes` and so on; one head for all where they are coded as one."""
    if codec.exact:
        return dict(new)
    result: dict[str, Array] = {}
    for side in SIDES:
        if side == "keys" and codec.together:
            result |= unfilled(xp, codec, layer, new["keys"])
            continue
        x = xp.astype(new[side], xp.float32)
        none = x.shape[2] == 0  # a codec need not know that
        if none:
            x = xp.zeros((*x.shape[:2], 1, x.shape[3]), dtype=x.dtype, device=device(x))
        x = beside(xp, x) if codec.joint(layer) else x
        parts = codec.encode(xp, x, side)
        result |= {f"{side}.{part}": value[:, :, :0] if none else value for part, value in parts.items()}
    return result


def layout(codec: Codec, layer: Layer) -> dict[str, tuple[Stream, np.dtype]]:
    """The arrays of `stored`: their heads and width, and their dtype (of an exact codec, the model's own)."""
    if codec.exact:
        return {key: (one, np.dtype(np.float32)) for key, one in layer.streams.items()}
    empty = np.zeros((1, layer.kv_heads, 1, layer.head_dim), np.float32)
    made = stored(codec, array_api_compat.numpy, layer, dict.fromkeys(SIDES, empty))
    return {key: (Stream(value.shape[1], value.shape[3]), value.dtype) for key, value in made.items()}


def payload(key: str) -> bool:
    """True for what is counted as payload; the other arrays of a codec count as scales."""
    return "." not in key or key.endswith((".codes", EXACT))


def parts_of(streams: Mapping[str, Array], side: Side) -> dict[str, Array]:
    """The parts of one side."""
    start = f"{side}."
    return {key.removeprefix(start): value for key, value in streams.items() if key.startswith(start)}


def shown(
    codec: Codec,
    xp: Namespace,
    layer: Layer,
    streams: Streams,
    side: Side,
    dtype: Any,
    tables: Tables | None = None,
    exact: Exact | None = None,
) -> Float[Array, "batch kv_heads slots width"]:
    """Keys or values of all these slots, as they are stored; of this dtype where they are coded.

    `tables` and `exact` are those of a layer under a codec that keeps the newest tokens exact.
    """
    if codec.exact:
        return streams[side]
    codes = streams[f"{side}.codes"]
    if codes.shape[2] == 0:
        shape = (codes.shape[0], layer.kv_heads, 0, layer.head_dim)
        return xp.zeros(shape, dtype=dtype, device=device(codes))
    x = decoded(codec, xp, parts_at(codec, xp, streams, tables or {}, side), side, dtype)
    x = apart(xp, x, layer.kv_heads) if codec.joint(layer) else x
    if exact is None or not codec.recent:
        return x
    newest = xp.astype(take_slots(xp, exact.vectors[side], exact.place), dtype)
    return xp.where((exact.place >= 0)[..., None], newest, x)


def parts_at(
    codec: Codec, xp: Namespace, streams: Streams, tables: Tables, side: Side
) -> dict[str, Shaped[Array, "batch heads slots _"]]:
    """What `Codec.read` is given of these slots."""
    parts = parts_of(streams, side)
    return with_rows(xp, parts, tables) if side == "keys" and codec.together else parts


def paged_parts(
    codec: Codec,
    xp: Namespace,
    streams: Mapping[str, Shaped[Array, "pages size _"]],
    tables: Tables,
    owner: Int[Array, "pages"],
    side: Side,
) -> dict[str, Shaped[Array, "pages size _"]]:
    """`parts_at` of streams in pages; `owner` is the head of each page, rows first."""
    parts = parts_of(streams, side)
    if side == "values" or not codec.together:
        return parts
    row = xp.astype(parts.pop("row")[..., 0], xp.int32)
    return parts | rows_of(xp, tables, row, owner[:, None])


def uncoded(
    xp: Namespace, layer: Layer, positions: Int[Array, "batch slots"], new: Mapping[Any, Array], made: Streams
) -> Bool[Array, "kv_heads"]:
    """True for the heads of which something is not finite, as it came or as it was coded; padding does not count."""
    whole = (xp.int8, xp.uint8, xp.int16, xp.int32)  # NumPy's isdtype does not know bfloat16
    heads = xp.zeros(layer.kv_heads, dtype=xp.bool, device=device(new["keys"]))
    padding = (positions < 0)[:, None, :, None]
    for x in (*new.values(), *made.values()):
        if x.dtype not in whole:
            heads = heads | ~xp.all(xp.isfinite(x) | padding, axis=(0, 2, 3))
    return heads


def by_slot(
    xp: Namespace,
    sums: Float[Array, "batch kv_heads both"],
    first: int,
    place: Int[Array, "batch kv_heads slots"],
) -> Float[Array, "batch kv_heads slots"]:
    """What each slot received, from what the first slots and then the exact tokens did; `place` is that of `Exact`."""
    rest = xp.zeros((*place.shape[:2], place.shape[2] - first), dtype=sums.dtype, device=device(sums))
    own = take_slots(xp, sums[..., first:], place)
    return xp.where(place >= 0, own, xp.concat([sums[..., :first], rest], axis=-1))


def refused(codec: Codec, unfit: Sequence[Bool[Array, "kv_heads"]], spent: bool = False) -> KvtwinError:
    """What is raised where `uncoded` is true for some head of some layer; `spent`: the cache cannot be used again."""
    layer, head = next(
        (index, heads.index(True)) for index, heads in enumerate(x.tolist() for x in unfit) if any(heads)
    )
    left = (
        "its cache is spent: fork() before such calls" if spent else "its cache is as it was before the call"
    )
    return KvtwinError(
        f"codec {codecs.spelling(codec)} cannot code what layer {layer}, head {head} made: a key or value is not "
        f"finite, or too large for its scales; the call has no result, and {left}"
    )


def beside(xp: Namespace, x: Float[Array, "batch kv_heads slots width"]) -> Float[Array, "batch 1 slots all"]:
    """The vectors of a token's heads as one."""
    x = xp.moveaxis(x, 1, 2)
    return xp.reshape(x, (x.shape[0], 1, x.shape[1], -1))


def apart(
    xp: Namespace, x: Float[Array, "batch 1 slots all"], heads: int
) -> Float[Array, "batch kv_heads slots width"]:
    """`beside` undone."""
    return xp.moveaxis(xp.reshape(x, (x.shape[0], x.shape[2], heads, -1)), 2, 1)


@dataclass(frozen=True)
class Coded:
    """Coded keys and values of a layer, for attention to read block by block without an array of all of them.

    What `block` gives is in a basis of the codec's own: queries come into it by `turned`, outputs out of it by
    `returned`. `take` cuts a span of slots out of an array. `finish` (keys of a block, and its span) is for keys that
    get their bias back, or are rotated, only when they are read.
    """

    codec: Codec
    xp: Namespace
    layer: Layer
    streams: Streams
    finish: Callable[[Array, Any], Array] | None = None
    take: Callable[[Array, Any], Array] = lambda x, span: x[:, :, span]
    tables: Tables = field(default_factory=dict)

    def block(self, side: Side, span: Any, dtype: Any) -> tuple[list[tuple[slice, Array]], Array | None]:
        """Vectors of these slots, in pieces [batch kv_heads slots n], each with the columns that it is; and their
        factors [batch kv_heads slots] (None: 1)."""
        streams = {key: self.take(value, span) for key, value in self.streams.items() if key.startswith(side)}
        parts = parts_at(self.codec, self.xp, streams, self.tables, side)
        if not self._whole(side):
            pieces, first = [], 0
            for x in self.codec.pieces(self.xp, parts, side):
                pieces.append((slice(first, first + x.shape[-1]), self.xp.astype(x, dtype, copy=False)))
                first += x.shape[-1]
            scale = self.codec.scale(self.xp, parts, side)
            return pieces, None if scale is None else self.xp.astype(scale, dtype)
        x = decoded(self.codec, self.xp, parts, side, dtype)
        x = apart(self.xp, x, self.layer.kv_heads) if self._joint else x
        x = x if self.finish is None or side == "values" else self.finish(x, span)
        return [(slice(None), x)], None

    def turned(self, queries: Float[Array, "*axes head_dim"]) -> Float[Array, "*axes head_dim"]:
        """Queries in the basis of the keys' blocks."""
        turn = self._turn("keys", queries)
        return queries if turn is None else self.xp.matmul(queries, turn)

    def returned(self, mixed: Float[Array, "*axes width"]) -> Float[Array, "*axes width"]:
        """Mixed values in the model's own basis."""
        turn = self._turn("values", mixed)
        return mixed if turn is None else self.xp.matmul(mixed, turn)

    @property
    def _joint(self) -> bool:
        return self.codec.joint(self.layer)

    def _whole(self, side: Side) -> bool:
        """True: a block is decoded before it is used, since queries cannot take the turn over."""
        return self._joint or (side == "keys" and self.finish is not None)

    def _turn(self, side: Side, like: Array) -> Array | None:
        """What brings queries into the basis of the keys, or mixed values out of theirs."""
        turn = None if self._whole(side) else _turn(self.codec, self.layer.head_dim, side)
        return None if turn is None else self.xp.asarray(turn, dtype=like.dtype, device=device(like))


@lru_cache(maxsize=64)
def _turn(codec: Codec, width: int, side: Side) -> np.ndarray | None:
    """The turn of the values; of the keys that of the queries, its transpose."""
    turn = codec.turn(width, side)
    return turn if turn is None or side == "values" else np.ascontiguousarray(turn.T)
