"""One layer of the fixed-size cache: buffers, and what the policy does with them inside a compiled function."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int, Shaped

from backends.flax.convert import to_jax, wide, widened
from backends.flax.pages import PagedState
from backends.flax.rope import rotate
from backends.flax.sharding import by_head, own_part
from framework.arrays import Array, by_position, keep, take_slots
from framework.codec import Codec, Side
from framework.coding import layout, payload, shown
from framework.eviction import (
    alive,
    heads_budgets,
    judge,
    merged,
    ordered,
    overwrites,
    repositioned,
    slot_memory,
    survivors,
    weakest,
)
from framework.groups import (
    Call,
    asked,
    exact_of,
    fixed_rows,
    most_rows,
    of_groups,
    recoded,
    tables_layout,
)
from framework.policy import Policy, View
from framework.shapes import EMPTY
from framework.spec import Layer, ModelSpec, Rope
from framework.wrapper import seen_by

jax.tree_util.register_dataclass(
    Call, data_fields=["new", "positions", "before", "after", "queries"], meta_fields=["due"]
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerState:
    """Buffers of one layer. `fill` is the slot that the next token goes to where tokens are appended.

    `memory` is what the policy remembers per slot, `heads` per head; `tables` are a codec's, beside the slots.
    """

    streams: dict[str, Shaped[jax.Array, "batch heads slots width"]]
    positions: Int[jax.Array, "batch kv_heads slots"]
    memory: dict[str, Float[jax.Array, "batch kv_heads slots"]]
    heads: dict[str, Float[jax.Array, "batch kv_heads *rest"]]
    queries: Float[jax.Array, "batch kv_heads group window head_dim"] | None
    query_positions: Int[jax.Array, "batch window"] | None
    fill: Int[jax.Array, ""]
    tables: dict[str, Shaped[jax.Array, "batch kv_heads rows _"]]

    @property
    def slots(self) -> int:
        return self.positions.shape[-1]

    @property
    def stored(self) -> dict[str, list[jax.Array]]:
        """The buffers, by what they hold."""
        return {
            "payload": [value for key, value in self.streams.items() if payload(key)],
            "scales": [value for key, value in self.streams.items() if not payload(key)],
            "positions": [self.positions],
            "memory": list(self.memory.values()),
        }

    def put(self, streams: Mapping[str, jax.Array] | None = None, **rest: Any) -> "LayerState":
        """The layer with these in the place of its own."""
        return replace(self, streams={**self.streams, **(streams or {})}, **rest)

    def gathered(self, source: Int[jax.Array, "batch kv_heads slots"]) -> "LayerState":
        """The layer with the slots that `source` names, -1 giving an empty one."""
        return replace(
            self,
            streams={
                key: keep(jnp, value, source[:, : value.shape[1]], 0) for key, value in self.streams.items()
            },
            positions=keep(jnp, self.positions, source, EMPTY),
            memory={key: keep(jnp, value, source, 0) for key, value in self.memory.items()},
            fill=jnp.max(jnp.sum(source >= 0, axis=-1)).astype(jnp.int32),
        )


Held = LayerState | PagedState


def opened(layer: Held) -> LayerState:
    """The layer with all its heads as wide as the longest."""
    if isinstance(layer, LayerState):
        return layer
    return LayerState(
        layer.streams, layer.positions, layer.memory, layer.heads, layer.queries, layer.query_positions, layer.fill,
        layer.tables,
    )  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What a compiled step is specialised to beside shapes: spec, policy without its budget, codec, which layers evict,
    and the devices, if there are several."""

    spec: ModelSpec
    policy: Policy
    codec: Codec
    bounded: tuple[bool, ...]
    mesh: Mesh | None = None

    def overwrites(self, index: int) -> bool:
        """True where decode puts a token into an emptied slot of this layer."""
        return overwrites(self.policy, self.bounded[index])

    @property
    def own(self) -> "Plan":
        """The plan as one device has it inside `by_head`."""
        return replace(self, spec=own_part(self.mesh, self.spec), mesh=None)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Given:
    """What a compiled step is given beside the state: rope tables, budgets, the policy's constants, where questions
    begin; and, inside, the key biases of the layers [kv_heads head_dim] where a codec leaves them out."""

    tables: dict[Rope, Any]
    budgets: Int[Array, "layers batch most_heads"]
    constants: dict[str, Any]
    question: Int[Array, "batch"]
    biases: list[Float[Array, "kv_heads head_dim"]] | None = None

    def budget(self, index: int, heads: int) -> Int[Array, "batch kv_heads"]:
        """Tokens that each head of a layer keeps."""
        return self.budgets[index, :, :heads]


def _fresh(
    policy: Policy, layer: Held, positions: Int[jax.Array, "batch tokens"], tokens: Int[jax.Array, "batch tokens"]
) -> tuple[Int[jax.Array, "batch kv_heads tokens"], dict[str, Float[jax.Array, "batch kv_heads tokens"]]]:  # fmt: skip
    """The positions of new tokens with these ids and their per-slot memory, for every head."""
    shape = (positions.shape[0], layer.positions.shape[1], positions.shape[1])
    start = {key: tokens[:, None] if key == "tokens" else value for key, value in slot_memory(policy).items()}
    memory = {key: jnp.broadcast_to(start[key], shape).astype(old.dtype) for key, old in layer.memory.items()}
    return jnp.broadcast_to(positions[:, None], shape), memory


def append(
    layer: LayerState,
    new: dict[str, jax.Array],
    positions: Int[jax.Array, "batch tokens"],
    tokens: Int[jax.Array, "batch tokens"],
    policy: Policy,
) -> LayerState:
    """The layer with the tokens behind its slots; the buffers grow, so this is for prefill."""
    spread, fresh = _fresh(policy, layer, positions, tokens)
    return replace(
        layer,
        streams={key: jnp.concatenate([layer.streams[key], value], axis=2) for key, value in new.items()},
        positions=jnp.concatenate([layer.positions, spread], axis=2),
        memory={key: jnp.concatenate([old, fresh[key]], axis=2) for key, old in layer.memory.items()},
    )


def append_one(
    layer: Held,
    new: dict[str, jax.Array],
    position: Int[jax.Array, "batch 1"],
    token: Int[jax.Array, "batch 1"],
    policy: Policy,
) -> Held:
    """The layer with one token per row behind its last slot."""
    spread, fresh = _fresh(policy, layer, position, token)
    if isinstance(layer, PagedState):
        return layer.append_one(new, spread, fresh)

    def write(buffer: jax.Array, value: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(buffer, value.astype(buffer.dtype), layer.fill, axis=2)

    return replace(
        layer,
        streams={key: write(layer.streams[key], value) for key, value in new.items()},
        positions=write(layer.positions, spread),
        memory={key: write(layer.memory[key], value) for key, value in fresh.items()},
        fill=layer.fill + 1,
    )


def overwrite(
    layer: Held,
    new: dict[str, jax.Array],
    position: Int[jax.Array, "batch 1"],
    token: Int[jax.Array, "batch 1"],
    policy: Policy,
    mesh: Mesh | None = None,
) -> Held:
    """The layer with one token per row in an empty slot of each head."""
    spread, fresh = _fresh(policy, layer, position, token)
    if isinstance(layer, PagedState):
        return layer.overwrite(new, spread, fresh)
    slots = layer.streams, layer.positions, layer.memory
    streams, positions, memory = by_head(mesh, _overwritten, layer.positions, slots, (new, spread, fresh))
    return replace(layer, streams=streams, positions=positions, memory=memory)


def _overwritten(positions: Int[jax.Array, "batch kv_heads slots"], buffers: Any, values: Any) -> Any:
    """The buffers with these values, one per row and head, where a slot is empty."""
    slot = jnp.argmin(positions, axis=-1)
    row = jnp.arange(slot.shape[0])[:, None]
    head = jnp.arange(slot.shape[1])[None, :]

    def write(buffer: jax.Array, value: jax.Array) -> jax.Array:
        heads = slice(0, value.shape[1])
        return buffer.at[row, head[:, heads], slot[:, heads]].set(value[:, :, 0])

    return jax.tree.map(write, buffers, values)


def observe(
    layer: Held,
    queries: Float[jax.Array, "batch kv_heads group tokens head_dim"],
    positions: Int[jax.Array, "batch tokens"],
) -> Held:
    """The layer with the newest queries of each row; padding does not push older ones out."""
    if layer.queries is None:
        return layer
    assert layer.query_positions is not None
    asked = layer.query_positions.shape[1]
    every = jnp.concatenate([layer.query_positions, positions], axis=1)
    both = jnp.concatenate([layer.queries, queries], axis=3)
    order = jnp.argsort(every, axis=1, stable=True)[:, -asked:]
    return replace(
        layer,
        queries=jnp.take_along_axis(both, order[:, None, None, :, None], axis=3),
        query_positions=jnp.take_along_axis(every, order, axis=1),
    )


def bias_at(
    plan: Plan, index: int, given: Given, positions: Int[jax.Array, "batch kv_heads slots"]
) -> Float[jax.Array, "batch kv_heads slots head_dim"]:
    """The key bias that a codec leaves out, at these positions, rotated where keys are stored rotated."""
    assert given.biases is not None
    own, rope = given.biases[index][None, :, None], plan.spec.layers[index].rope
    every = jnp.broadcast_to(own, (*positions.shape, own.shape[-1]))
    if rope is None or plan.policy.repositions or plan.codec.unrotated:
        return every
    return rotate(every, positions, given.tables[rope])


def finished(
    plan: Plan, index: int, given: Given, keys: jax.Array, positions: jax.Array
) -> Float[jax.Array, "batch kv_heads slots head_dim"]:
    """Keys as the cache shows them, from keys as they are stored and their positions."""
    rope = plan.spec.layers[index].rope
    if given.biases is not None:
        keys = keys + bias_at(plan, index, given, positions)
    if rope is not None and plan.codec.unrotated and not plan.policy.repositions:
        keys = rotate(keys, positions, given.tables[rope])
    return keys


def read(
    layer: Held, plan: Plan, index: int, given: Given, side: Side, dtype: Any, call: Call
) -> Float[jax.Array, "batch kv_heads slots width"]:
    """Keys or values of all slots, as the policy sees them at the end of a call; coded ones in this dtype."""
    return by_head(plan.mesh, partial(_read, plan.own, index, side, dtype), layer, given, call)


def _read(
    plan: Plan, index: int, side: Side, dtype: Any, layer: Held, given: Given, call: Call
) -> Float[jax.Array, "batch kv_heads slots width"]:
    codec, spec = plan.codec, plan.spec.layers[index]
    exact = exact_of(jnp, codec, layer.tables, layer.positions, call) if codec.recent else None
    x = widened(shown(codec, jnp, spec, layer.streams, side, dtype, layer.tables, exact))
    return x if side == "values" else finished(plan, index, given, x, layer.positions)


def recoded_layer(
    layer: Held, plan: Plan, index: int, call: Call, due: Bool[jax.Array, ""] | None
) -> tuple[Held, jax.Array]:
    """The layer with what the call made complete coded, and the heads of which something could not be.

    `due`: whether keys may be complete, where the buffers keep their shapes; None: they may, and the tables get the
    size that suits the slots.
    """

    rows = most_rows(plan.codec, layer.slots, plan.bounded[index])

    def own(streams: Any, tables: Any, positions: jax.Array, call: Call) -> tuple:
        streams, tables, wrong = recoded(jnp, plan.codec, streams, tables, positions, call, rows)
        return streams, tables, wrong[None]

    def code(complete: bool) -> tuple[Held, Bool[jax.Array, "kv_heads"]]:
        streams, tables, wrong = by_head(
            plan.mesh, own, layer.streams, layer.tables, layer.positions, replace(call, due=complete)
        )
        return layer.put(streams if complete else None, tables=tables), wrong.any(axis=0)

    if due is None:
        return code(True)
    return jax.lax.cond(due, lambda: code(True), lambda: code(False))


def view_of(layer: Held, plan: Plan, index: int, given: Given, dtype: Any, call: Call, **rest: Any) -> View:
    """What the policy sees of a layer, in physical slot order; coded vectors are read in `dtype`."""
    spec, needs = plan.spec.layers[index], plan.policy.needs
    cos, sin = (None, None) if spec.rope is None else given.tables[spec.rope]
    view = View(
        xp=jnp,
        layer=index,
        layers=len(plan.spec.layers),
        positions=layer.positions,
        budget=given.budget(index, spec.kv_heads),
        memory={key: layer.memory[key] for key in plan.policy.memory} | layer.heads,
        keys=read(layer, plan, index, given, "keys", dtype, call) if needs.keys or needs.queries else None,
        values=read(layer, plan, index, given, "values", dtype, call) if needs.values else None,
        queries=None if layer.queries is None else widened(layer.queries),
        query_positions=layer.query_positions,
        tokens=layer.memory["tokens"].astype(jnp.int32) if needs.tokens else None,
        cos=cos,
        sin=sin,
        constants=given.constants,
        question=given.question,
        scale=spec.scale,
        softcap=spec.softcap,
        window=spec.window,
        repositions=plan.policy.repositions,
        **rest,
    )
    view = seen_by(plan.policy, view)
    return repositioned(view) if plan.policy.repositions else view


def remembered(layer: Held, memory: Mapping[str, jax.Array], active: jax.Array) -> Held:
    """The layer with what the policy noted, in the rows that are active."""

    def chosen(key: str, old: jax.Array) -> jax.Array:
        return jnp.where(active.reshape(-1, *(1,) * (old.ndim - 1)), memory[key], old)

    return layer.put(
        memory={key: chosen(key, old) if key in memory else old for key, old in layer.memory.items()},
        heads={key: chosen(key, old) for key, old in layer.heads.items()},
    )


def nan(scores: jax.Array, filled: jax.Array) -> Bool[jax.Array, ""]:
    """True if the score of some token is NaN."""
    return (
        jnp.any(jnp.isnan(scores) & filled)
        if jnp.issubdtype(scores.dtype, jnp.floating)
        else jnp.asarray(False)
    )


def packed(layer: LayerState, slots: int) -> LayerState:
    """The layer with all its tokens in position order in buffers of `slots` slots."""
    order = by_position(jnp, layer.positions).astype(jnp.int32)
    source = jnp.where(take_slots(jnp, layer.positions, order) >= 0, order, -1)
    return layer.gathered(_sized(source, slots))


def with_rows_for_groups(layer: Held, codec: Codec, bounded: bool) -> Held:
    """The layer with tables that have room for all groups that its slots can come to."""
    rows = most_rows(codec, layer.slots, bounded)
    tables = {
        key: jnp.pad(x, ((0, 0), (0, 0), (0, rows - x.shape[2]), (0, 0)))
        for key, x in of_groups(layer.tables).items()
        if x.shape[2] < rows
    }
    return replace(layer, tables={**layer.tables, **tables}) if tables else layer


def _sized(index: jax.Array, slots: int) -> jax.Array:
    more = slots - index.shape[-1]
    return (
        index[..., :slots] if more <= 0 else jnp.pad(index, ((0, 0), (0, 0), (0, more)), constant_values=-1)
    )


def compacted(
    layer: Held,
    view: View,
    policy: Policy,
    active: Bool[jax.Array, "batch"],
    slots: int,
    forced: jax.Array | None = None,
) -> tuple[Held, Bool[jax.Array, "batch"], Bool[jax.Array, ""], tuple]:
    """The survivors in position order in buffers of `slots` slots; which rows lost a token; NaN; and the decision.

    A row that is not active keeps all its tokens.
    """
    order = by_position(jnp, layer.positions).astype(jnp.int32)
    seen = ordered(policy, view, order, lambda x, index: take_slots(jnp, x, index))
    scores, protected = judge(policy, seen)
    budget = heads_budgets(policy, seen, scores)
    filled = seen.filled
    living = alive(seen.positions, seen.seen, view.window)
    index = survivors(jnp, scores, protected, living, budget, slots)
    index = jnp.where(active[:, None, None], index, _slots_where(filled, slots))
    marked = jnp.zeros_like(filled) if protected is None else protected & filled
    kept = keep(jnp, seen.positions, index, EMPTY)
    decision = (seen.positions, jnp.where(filled, scores, 0), marked, kept, budget)
    if forced is not None:
        wanted = filled & (seen.positions[..., None] == forced[..., None, :]).any(-1)
        index = jnp.where(active[:, None, None], _slots_where(wanted, slots), index)
    lost = (jnp.sum(index >= 0, axis=-1) < jnp.sum(filled, axis=-1)).any(axis=1)
    source = jnp.where(index < 0, index, take_slots(jnp, order, index))
    result = layer.gathered(source)
    if policy.merges:
        *pair, heads = merged(policy, seen, index, active)
        named = zip(("keys", "values"), pair, strict=True)
        streams = {key: value.astype(layer.streams[key].dtype) for key, value in named}
        result = result.put(streams, heads=result.heads | heads)
    wrong = nan(scores, filled)
    return result, lost, wrong | result.overflows if isinstance(result, PagedState) else wrong, decision


def _slots_where(
    wanted: Bool[jax.Array, "batch kv_heads all"], slots: int
) -> Int[jax.Array, "batch kv_heads slots"]:
    """Index of the True entries, in order, -1 beyond their count."""
    total = wanted.shape[-1]
    here = jnp.sort(jnp.where(wanted, jnp.arange(total, dtype=jnp.int32), total), axis=-1)
    return _sized(jnp.where(here == total, -1, here), slots)


def without_weakest(
    layer: Held, view: View, policy: Policy, active: Bool[jax.Array, "batch"]
) -> tuple[Held, Bool[jax.Array, "batch"], Bool[jax.Array, ""]]:
    """The layer with the weakest slot emptied in each head that holds too many; which rows lost a token; NaN."""
    scores, protected = judge(policy, view)
    filled = view.filled
    living = alive(layer.positions, view.seen, view.window)
    slot = weakest(jnp, scores, layer.positions, protected, living)
    over = (jnp.sum(filled, axis=-1) > view.budget) | jnp.any(filled & ~living, axis=-1)
    over = over & active[:, None]
    here = jnp.arange(layer.slots)[None, None] == slot[..., None]
    positions = jnp.where(here & over[..., None], EMPTY, layer.positions)
    return layer.put(positions=positions), over.any(axis=1), nan(scores, filled)


def without(layer: LayerState, seen: jax.Array) -> LayerState:
    """The layer without tokens at positions from `seen` on."""
    gone = layer.positions >= seen[:, None, None]
    positions = jnp.where(gone, EMPTY, layer.positions)
    last = (
        jnp.max(jnp.where(positions >= 0, jnp.arange(1, layer.slots + 1), 0))
        if layer.slots
        else jnp.asarray(0)
    )
    return replace(
        layer,
        streams={
            key: jnp.where(gone[:, : value.shape[1], :, None], 0, value).astype(value.dtype)
            for key, value in layer.streams.items()
        },
        positions=positions,
        fill=last.astype(jnp.int32),
    )


def empty_layer(layer: Layer, policy: Policy, codec: Codec, batch: int, slots: int, dtype: Any) -> LayerState:
    """Zeroed buffers on the host: zero, never uninitialised, since 0 x NaN leaks through a mask."""
    newest = asked(policy, codec)
    grouped = (batch, layer.kv_heads, layer.group, newest, layer.head_dim)
    return LayerState(
        streams={
            key: to_jax(np.zeros((batch, one.heads, slots, one.width)), dtype if codec.exact else kind)
            for key, (one, kind) in layout(codec, layer).items()
        },
        positions=to_jax(np.full((batch, layer.kv_heads, slots), EMPTY), np.int32),
        memory={
            key: to_jax(np.zeros((batch, layer.kv_heads, slots)), wide(dtype)) for key in slot_memory(policy)
        },
        heads={
            key: to_jax(np.zeros((batch, layer.kv_heads, *shape)), wide(dtype))
            for key, shape in policy.head_memory(layer).items()
        },
        queries=to_jax(np.zeros(grouped), dtype) if newest else None,
        query_positions=to_jax(np.full((batch, newest), EMPTY), np.int32) if newest else None,
        fill=to_jax(np.array(0), np.int32),
        tables={
            key: to_jax(np.zeros((batch, one.heads, fixed_rows(codec, key) or 0, one.width)), kind or dtype)
            for key, (one, kind) in tables_layout(codec, layer).items()
        },
    )
