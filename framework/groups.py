"""The newest tokens, which stay exact, and older ones whose keys are coded in groups: for codecs with `recent`.

Beside its slots a layer then has tables, [batch kv_heads rows n]:

- `keys.exact`, `values.exact`: the newest `recent` tokens of a row as the model sees them, the one at position p in
  row p % recent; where a head has evicted it, what stands there means nothing.
- `keys.scales` and so on: what a group of keys has once, a row for each group. The slot of a coded key names its row in
  `keys.row`; -1: not coded yet. Groups are numbered in the order of their positions.
- `keys.again`: how often the keys of a head were coded again (codecs that regroup).

A group is made of the survivors among the tokens that are coded at one time, in the order of their positions. Since
each token keeps its own codes and the number of its group, eviction moves tokens as it does under any other codec; a
group without tokens gives its row back. A value is coded when it comes, by itself, and read from its codes when it
is no longer among the newest.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import array_api_compat.numpy
import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from framework.arrays import FAR, Array, Namespace, device, keep, spread, take_slots
from framework.codec import Codec, Parts, Side, decoded
from framework.errors import KvtwinError
from framework.policy import Policy
from framework.shapes import EMPTY
from framework.spec import Layer, Stream

MOST_ROWS = 2**15 - 1  # `keys.row` has 16 bits
ROW, EXACT, AGAIN = "keys.row", ".exact", "keys.again"
Tables = Mapping[str, Shaped[Array, "batch kv_heads _ _"]]


@cache
def group_layout(
    codec: Codec, layer: Layer
) -> tuple[dict[str, tuple[int, np.dtype]], dict[str, tuple[int, np.dtype]]]:
    """Width and dtype of the parts that `encode_group` gives for each key, and once for a group."""
    x = np.zeros((1, codec.together, layer.head_dim), np.float32)
    queries = np.zeros((1, codec.queries, layer.head_dim), np.float32) if codec.queries else None
    both = codec.encode_group(array_api_compat.numpy, x, np.ones(x.shape[:2], bool), queries)
    own, shared = ({key: (x.shape[-1], x.dtype) for key, x in parts.items()} for parts in both)
    return own, shared


def tables_layout(codec: Codec, layer: Layer) -> dict[str, tuple[Stream, np.dtype | None]]:
    """The tables of a layer: their heads and width, and their dtype (None: the model's own)."""
    if not codec.recent:
        return {}
    one = Stream(layer.kv_heads, layer.head_dim)
    found: dict[str, tuple[Stream, np.dtype | None]] = {
        f"{side}{EXACT}": (one, None) for side in ("keys", "values")
    }
    if codec.together:
        for key, (width, kind) in group_layout(codec, layer)[1].items():
            found[f"keys.{key}"] = (Stream(layer.kv_heads, width), kind)
    if codec.regroups:
        found[AGAIN] = (Stream(layer.kv_heads, 1), np.dtype(np.int32))
    return found


def fixed_rows(codec: Codec, key: str) -> int | None:
    """Rows of a table; None for one with a row for each group."""
    return codec.recent if key.endswith(EXACT) else 1 if key == AGAIN else None


def most_rows(codec: Codec, slots: int, evicts: bool) -> int:
    """Rows that the groups of a head with this many slots cannot exceed once keys of it are coded; until then it may
    have as many as before."""
    if not codec.together:
        return 0
    if codec.regroups:
        return min(slots, 2 * _groups(slots, codec.together))
    # Where tokens are evicted, each may be the last of its group.
    return slots if evicts else slots // codec.recent * _groups(codec.recent, codec.together)


def unfilled(
    xp: Namespace, codec: Codec, layer: Layer, like: Float[Array, "batch kv_heads tokens width"]
) -> dict[str, Array]:
    """The slots of keys that are not coded yet."""
    shape = like.shape[:3]
    made = {
        f"keys.{key}": xp.zeros((*shape, width), dtype=getattr(xp, kind.name), device=device(like))
        for key, (width, kind) in group_layout(codec, layer)[0].items()
    }
    return made | {ROW: xp.full((*shape, 1), -1, dtype=xp.int16, device=device(like))}


@dataclass(frozen=True)
class Call:
    """What a call brought to a layer, as it is stored: keys and values, their positions, what the rows had seen before
    and have seen after, and the newest queries where the codec asks for them. `due`: False where no key can be complete
    now."""

    new: Mapping[Any, Float[Array, "batch kv_heads tokens width"]]
    positions: Int[Array, "batch tokens"]
    before: Int[Array, "batch"]
    after: Int[Array, "batch"]
    queries: Float[Array, "batch kv_heads group newest width"] | None = None
    due: bool = True


@dataclass(frozen=True)
class Exact:
    """What a call finds exact in a layer: the newest tokens from before it, and then its own, as they are stored.

    `positions` are -1 at padding and where a token of the newest was evicted. `place` says which of them the token of a
    slot is, -1 one that is read from its codes.
    """

    vectors: dict[Side, Float[Array, "batch kv_heads exact width"]]
    positions: Int[Array, "batch kv_heads exact"]
    place: Int[Array, "batch kv_heads slots"]


def exact_of(
    xp: Namespace, codec: Codec, tables: Tables, positions: Int[Array, "batch kv_heads slots"], call: Call
) -> Exact:
    """What is exact in a layer with these slots, among which are those of the call."""
    ring, before = codec.recent, call.before[:, None, None]
    own = ring + _column(xp, positions, call)
    place = xp.where(positions >= before, own, -1)
    fresh = xp.broadcast_to(call.positions[:, None], (*positions.shape[:2], call.positions.shape[1]))
    if not ring:
        return Exact(dict(call.new), fresh, xp.astype(place, xp.int32))
    recent = (positions >= 0) & (positions >= before - ring)
    place = xp.astype(xp.where((place < 0) & recent, positions % ring, place), xp.int32)
    left = spread(xp, ring, xp.where(place < ring, place, -1), positions, EMPTY)
    vectors: dict[Side, Array] = {}
    for side, new in call.new.items():
        old = tables[f"{side}{EXACT}"]
        vectors[side] = xp.concat([old, xp.astype(new, old.dtype)], axis=2)
    return Exact(vectors, xp.concat([left, fresh], axis=2), place)


def _column(
    xp: Namespace, positions: Int[Array, "batch heads slots"], call: Call
) -> Int[Array, "batch heads slots"]:
    """The column of a call's tokens in which the token of a position stands; anything for older ones."""
    if call.positions.shape[1] == 1:
        return xp.zeros_like(positions)
    order = xp.argsort(xp.where(call.positions < 0, FAR, call.positions), axis=-1)
    order = xp.broadcast_to(order[:, None], (*positions.shape[:2], order.shape[1]))
    return take_slots(xp, order, xp.clip(positions - call.before[:, None, None], 0, order.shape[-1] - 1))


def parts_of_keys(streams: Mapping[str, Array]) -> dict[str, Array]:
    """What the streams hold of the keys, without `keys.`."""
    return {key.removeprefix("keys."): x for key, x in streams.items() if key.startswith("keys.")}


def with_rows(xp: Namespace, parts: Parts, tables: Tables) -> dict[str, Array]:
    """The parts of keys [batch kv_heads slots n] with those that their groups have once; `row` is left out."""
    row = xp.astype(parts["row"][..., 0], xp.int32)
    owner = xp.reshape(
        xp.arange(row.shape[0] * row.shape[1], dtype=xp.int32, device=device(row)), (*row.shape[:2], 1)
    )
    return {key: x for key, x in parts.items() if key != "row"} | rows_of(xp, tables, row, owner)


def rows_of(
    xp: Namespace, tables: Tables, row: Int[Array, "*axes"], owner: Int[Array, "*#axes"]
) -> dict[str, Shaped[Array, "*axes _"]]:
    """Of the tables with a row for each group those that `row` names, the first one where it is -1.

    `owner` numbers the heads of all rows of the batch.
    """
    found = {}
    for key, x in of_groups(tables).items():
        count, width = max(1, x.shape[2]), x.shape[3]
        if not x.shape[2]:  # nothing is coded yet
            x = xp.zeros((*x.shape[:2], 1, width), dtype=x.dtype, device=device(x))
        index = xp.reshape(owner * count + xp.where(row < 0, 0, row), (-1,))
        # Whole rows of one long table: a gather of numbers would be many times slower.
        taken = xp.take(xp.reshape(x, (-1, width)), index, axis=0)
        found[key.removeprefix("keys.")] = xp.reshape(taken, (*row.shape, width))
    return found


def of_groups(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Of the tables, or of their layout, those with a row for each group."""
    return {key: x for key, x in tables.items() if not key.endswith(EXACT) and key != AGAIN}


def newest(xp: Namespace, seen: Int[Array, "batch"], count: int) -> Int[Array, "batch count"]:
    """The positions that the rows of a table of the newest tokens are for, -1 where there is none yet."""
    row = xp.arange(count, dtype=seen.dtype, device=device(seen))
    last = seen[:, None] - 1
    found = last - (last - row) % count
    return xp.where(found < 0, EMPTY, found)


def recoded(
    xp: Namespace,
    codec: Codec,
    streams: Mapping[str, Array],
    tables: Tables,
    positions: Int[Array, "batch kv_heads slots"],
    call: Call,
    rows: int | None,
) -> tuple[dict[str, Array], dict[str, Array], Bool[Array, "kv_heads"]]:
    """What a call leaves of a layer after its eviction: the streams of the keys, all tables, and the heads of which
    something could not be coded.

    `rows`: at least so many in the tables that have one for each group; None: as many as there are groups.
    """
    exact = exact_of(xp, codec, tables, positions, call)
    count, here = codec.recent, newest(xp, call.after, codec.recent)
    column = _column(xp, here[:, None], call)
    own = xp.arange(count, dtype=here.dtype, device=device(here))
    index = xp.where(here[:, None] >= call.before[:, None, None], count + column, own)
    index = xp.broadcast_to(index, (*positions.shape[:2], count))
    rest = {f"{side}{EXACT}": take_slots(xp, x, index) for side, x in exact.vectors.items()}
    keys = {key: x for key, x in streams.items() if key.startswith("keys.")}
    state = keys, {**tables, **rest}, xp.zeros(positions.shape[1], dtype=xp.bool, device=device(positions))
    if not codec.together or not call.due or not positions.shape[2]:
        return state
    return _coded(xp, codec, *state[:2], positions, exact, call, rows)


def _coded(
    xp: Namespace, codec: Codec, keys: dict[str, Array], tables: dict[str, Array], positions: Array, exact: Exact,
    call: Call, rows: int | None,
) -> tuple[dict[str, Array], dict[str, Array], Array]:  # fmt: skip
    """`recoded` for the keys that are complete, or that are coded again."""
    slots, filled, row = positions.shape[-1], positions >= 0, xp.astype(keys[ROW][..., 0], xp.int32)
    end = (call.after - call.after % codec.recent)[:, None, None]
    old = filled & (row >= 0)
    due = filled & (row < 0) & (positions < end)
    row, origin, living = _numbered(xp, row, old)
    if codec.regroups:
        came = xp.sum(due, axis=-1, dtype=xp.int32)
        needed = _groups(came + xp.sum(old, axis=-1, dtype=xp.int32), codec.together)
        again = (came > 0) & (living + _groups(came, codec.together) > 2 * needed)
        due = due | (old & again[..., None])
        living = xp.where(again, 0, living)
        tables = tables | {AGAIN: tables[AGAIN] + xp.astype(again, xp.int32)[..., None, None]}

    # The keys that are due in the order of their positions; beyond the last one, the last one again.
    order, count = xp.argsort(xp.where(due, positions, FAR), axis=-1), xp.sum(due, axis=-1, dtype=xp.int32)
    most = slots if codec.regroups else min(slots, exact.positions.shape[-1])
    size = min(codec.together, most)
    places = xp.arange(_groups(most, size) * size, dtype=xp.int32, device=device(positions))
    chosen = take_slots(xp, order, xp.clip(xp.minimum(places, count[..., None] - 1), 0, None))
    x = xp.astype(take_slots(xp, exact.vectors["keys"], take_slots(xp, exact.place, chosen)), xp.float32)
    if codec.regroups:
        read = decoded(codec, xp, with_rows(xp, parts_of_keys(keys), tables), "keys", xp.float32)
        x = xp.where(take_slots(xp, old, chosen)[..., None], take_slots(xp, read, chosen), x)
    own, shared = _encoded(xp, codec, x, places < count[..., None], size, call)

    nth = inverse(xp, order)
    index = xp.clip(nth, 0, places.shape[0] - 1)
    made = {
        f"keys.{key}": xp.where(due[..., None], take_slots(xp, part, index), keys[f"keys.{key}"])
        for key, part in own.items()
    }
    row = xp.where(due, living[..., None] + nth // size, xp.where(old, row, -1))
    made[ROW] = xp.astype(row, xp.int16)[..., None]
    added = _groups(count, size)
    tables, full = _with_groups(xp, tables, shared, origin, living, added, slots, rows)
    tables[f"keys{EXACT}"] = _ring(xp, codec, tables, own, shared, positions, order, count, size, call)
    return made, tables, full | _unfit(xp, own, count) | _unfit(xp, shared, added)


def _encoded(
    xp: Namespace, codec: Codec, x: Array, filled: Array, size: int, call: Call
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The parts of keys [batch kv_heads n width], and of each `size` of them."""
    queries, shape = None, (*x.shape[:2], -1, size)
    if codec.queries and call.queries is not None:
        queries = call.queries[..., -codec.queries :, :]
        queries = xp.astype(xp.reshape(queries, (*queries.shape[:2], 1, -1, queries.shape[-1])), xp.float32)
    own, shared = codec.encode_group(
        xp, xp.reshape(x, (*shape, x.shape[-1])), xp.reshape(filled, shape), queries
    )
    return {key: xp.reshape(part, (*x.shape[:3], part.shape[-1])) for key, part in own.items()}, shared


def _with_groups(
    xp: Namespace, tables: dict[str, Array], shared: dict[str, Array], origin: Array, living: Array, added: Array,
    slots: int, rows: int | None,
) -> tuple[dict[str, Array], Bool[Array, "kv_heads"]]:  # fmt: skip
    """The tables with the groups that live, then the first `added` of the new ones; and heads with too many of them."""
    total = living + added
    held = max((x.shape[2] for x in of_groups(tables).values()), default=0)
    # A head of which nothing is coded now may have kept more groups than `most_rows`, but not more than tokens.
    rows = int(xp.max(total)) if rows is None else min(MOST_ROWS, max(rows, min(slots, held)))
    if rows > MOST_ROWS:
        raise KvtwinError(
            f"the keys of a head lie in {rows} groups; expected at most {MOST_ROWS}: take larger groups"
        )
    here = xp.broadcast_to(xp.arange(rows, dtype=xp.int32, device=device(total)), (*total.shape, rows))
    result = dict(tables)
    for key, part in shared.items():
        table = tables[f"keys.{key}"]
        first = table.shape[2]
        source = first + xp.clip(here - living[..., None], 0, part.shape[2] - 1)
        if first:
            kept = take_slots(xp, origin, xp.clip(here, 0, slots - 1))
            source = xp.where(here < living[..., None], kept, source)
        source = xp.where(here < total[..., None], source, -1)
        result[f"keys.{key}"] = keep(xp, xp.concat([table, part], axis=2), source, 0)
    return result, xp.any(total > rows, axis=0)


def _ring(
    xp: Namespace, codec: Codec, tables: Tables, own: dict[str, Array], shared: dict[str, Array], positions: Array,
    order: Array, count: Array, size: int, call: Call,
) -> Float[Array, "batch kv_heads recent width"]:  # fmt: skip
    """The newest keys, of which those that are coded now read as their codes do: the last `recent` of them at most."""
    table, recent = tables[f"keys{EXACT}"], codec.recent
    nth = count[..., None] - recent + xp.arange(recent, dtype=xp.int32, device=device(positions))
    at = xp.clip(nth, 0, None)
    parts = {key: take_slots(xp, part, at) for key, part in own.items()}
    parts |= {key: take_slots(xp, part, at // size) for key, part in shared.items()}
    read = decoded(codec, xp, parts, "keys", table.dtype)
    last = positions.shape[-1] - 1
    position = take_slots(xp, positions, take_slots(xp, order, xp.clip(nth, 0, last)))
    inside = (nth >= 0) & (position >= call.after[:, None, None] - recent)
    here = xp.broadcast_to(xp.arange(recent, dtype=xp.int32, device=device(positions)), inside.shape)
    which = spread(xp, recent, xp.where(inside, position % recent, -1), here, -1)
    return xp.where((which >= 0)[..., None], take_slots(xp, read, which), table)


def _unfit(xp: Namespace, parts: dict[str, Array], count: Array) -> Bool[Array, "kv_heads"]:
    """The heads of which one of the first `count` vectors of some part is not finite."""
    heads = xp.zeros(count.shape[1], dtype=xp.bool, device=device(count))
    for part in parts.values():
        if part.dtype not in (xp.int8, xp.uint8, xp.int16, xp.int32):
            beyond = xp.arange(part.shape[2], dtype=xp.int32, device=device(count)) >= count[..., None]
            heads = heads | ~xp.all(xp.isfinite(part) | beyond[..., None], axis=(0, 2, 3))
    return heads


def _groups(count: Any, size: int) -> Any:
    """Groups of this many tokens."""
    return (count + size - 1) // size


def _numbered(xp: Namespace, row: Array, coded: Array) -> tuple[Array, Array, Array]:
    """The rows of the groups that are alive, from 0 on without gaps; which rows they had; and how many they are."""
    row = xp.where(coded, row, FAR)
    order = xp.argsort(row, axis=-1)
    ranked = take_slots(xp, row, order)
    before = xp.concat([xp.full_like(ranked[..., :1], -1), ranked[..., :-1]], axis=-1)
    first = (ranked != before) & (ranked < FAR)
    number = xp.cumulative_sum(xp.astype(first, xp.int32), axis=-1, dtype=xp.int32)
    living = number[..., -1] if number.shape[-1] else xp.sum(number, axis=-1, dtype=xp.int32)
    origin = spread(xp, row.shape[-1], xp.where(first, number - 1, -1), ranked, FAR)
    return take_slots(xp, number - 1, inverse(xp, order)), origin, living


def inverse(xp: Namespace, order: Int[Array, "batch kv_heads n"]) -> Int[Array, "batch kv_heads n"]:
    """Where each index stands in a permutation."""
    here = xp.arange(order.shape[-1], dtype=xp.int32, device=device(order))
    return spread(xp, order.shape[-1], order, xp.broadcast_to(here, order.shape), -1)


def asked(policy: Policy, codec: Codec) -> int:
    """The number of newest queries that a cache keeps."""
    return max(policy.needs.queries, codec.queries)


def canonical_tables(
    codec: Codec,
    streams: dict[str, np.ndarray],
    positions: Int[np.ndarray, "batch kv_heads slots"],
    tables: Mapping[str, np.ndarray],
    seen: Int[np.ndarray, "batch"],
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Streams in the order of positions, and tables, with groups numbered from 0 and 0 where nothing lives."""
    result = {key: x.copy() for key, x in tables.items()}
    if not codec.recent:
        return streams, result
    where = np.where((positions >= 0) & (positions >= seen[:, None, None] - codec.recent), positions, -1)
    for side in ("keys", "values"):
        held = (where[..., None, :] % codec.recent == np.arange(codec.recent)[:, None]) & (where >= 0)[
            ..., None, :
        ]
        result[f"{side}{EXACT}"][~held.any(-1)] = 0
    if not codec.together:
        return streams, result
    old = streams[ROW][..., 0]
    row = np.where(positions >= 0, old, 0)
    living = (positions >= 0) & (old >= 0)
    count = 0
    groups = {key: np.zeros_like(x) for key, x in of_groups(result).items()}
    for place in np.ndindex(*positions.shape[:2]):
        alive, index = np.unique(old[place][living[place]], return_inverse=True)
        row[place][living[place]] = index
        count = max(count, len(alive))
        for key, x in groups.items():
            x[place][: len(alive)] = tables[key][place][alive]
    result |= {key: x[:, :, :count] for key, x in groups.items()}
    return streams | {ROW: row[..., None].astype(np.int16)}, result


@dataclass(frozen=True)
class Groups:
    """The groups in which the keys of a layer are coded, over all rows and heads. `tokens` of at most `places` live in
    them: what a group has once is wasted on the rest. `again`: how often heads were coded again."""

    groups: int
    tokens: int
    places: int
    again: int


def counted(
    codec: Codec,
    streams: Mapping[str, np.ndarray],
    positions: Int[np.ndarray, "batch kv_heads slots"],
    tables: Mapping[str, np.ndarray],
) -> Groups:
    """The groups of a layer as it stands in a snapshot."""
    row = np.where(positions >= 0, streams[ROW][..., 0], -1)
    groups = sum(len(np.unique(each[each >= 0])) for each in row.reshape(-1, row.shape[-1]))
    again = int(tables[AGAIN].sum()) if AGAIN in tables else 0
    return Groups(groups, int((row >= 0).sum()), groups * codec.together, again)


def table_bytes(
    codec: Codec, streams: Mapping[str, Array], positions: Array, tables: Mapping[str, Any], seen: np.ndarray
) -> Iterator[tuple[str, int, int]]:
    """For each table its name, the bytes of the tokens and groups that live, and all of its bytes."""
    if not codec.recent:
        return
    held = np.array(np.asarray(positions))
    newest = int(((held >= 0) & (held >= seen[:, None, None] - codec.recent)).sum())
    groups = 0
    if codec.together:
        row = np.asarray(streams[ROW])[..., 0]
        row = np.where(held >= 0, row, -1)
        groups = sum(len(np.unique(each[each >= 0])) for each in row.reshape(-1, row.shape[-1]))
    for key, x in tables.items():
        rows = max(1, int(np.prod(x.shape[:3])))
        used = newest if key.endswith(EXACT) else rows if key == AGAIN else groups
        yield key, x.nbytes * used // rows, x.nbytes
