"""What a call's queries mix of a layer's values: exact or coded, rotated by position or rank, in slots or pages."""

from typing import Any

import jax
import jax.numpy as jnp

from backends.flax.attention import attention, coded_attention, cut, paged_attention
from backends.flax.convert import widened
from backends.flax.layer import Given, LayerState, Plan, finished
from backends.flax.pages import PagedState
from backends.flax.rope import rotate
from framework.arrays import spread
from framework.codec import Side, decoded
from framework.coding import SIDES, Coded, paged_parts
from framework.groups import Call, exact_of


def mixed(
    plan: Plan,
    index: int,
    held: LayerState,
    q: jax.Array,
    new: dict[Side, jax.Array],
    call: Call,
    first: Any,
    given: Given,
) -> tuple[jax.Array, jax.Array | None]:
    """What the queries, whose tokens stand from slot `first` on, mix of the values, and the sums if asked for."""
    layer, codec, sums = plan.spec.layers[index], plan.codec, plan.policy.needs.sums
    rope = layer.rope if plan.policy.repositions else None
    rank = jnp.cumsum(held.positions >= 0, axis=-1, dtype=jnp.int32) - 1
    own = jax.lax.dynamic_slice_in_dim(rank, first, call.positions.shape[1], axis=2)
    used = None if plan.overwrites(index) else held.fill
    q = q if rope is None else rotate(q, own[:, :, None], given.tables[rope])
    if codec.exact:
        keys = held.streams["keys"]
        keys = keys if rope is None else rotate(keys, rank, given.tables[rope])
        return attention(q, keys, held.streams["values"], call.positions, held.positions, layer, sums, used)
    exact, ring, keys = exact_of(jnp, codec, held.tables, held.positions, call), codec.recent, new["keys"]
    if ring:
        old = finished(plan, index, given, exact.vectors["keys"][:, :, :ring], exact.positions[:, :, :ring])
        keys = jnp.concatenate([old, keys], axis=2)
        place = jnp.where(exact.place < ring, exact.place, -1)
        own = jnp.concatenate([spread(jnp, ring, place, rank, 0), own], axis=2)
    keys = keys if rope is None else rotate(keys, own, given.tables[rope])

    def read(block: jax.Array, span: Any) -> jax.Array:
        block = finished(plan, index, given, block, cut(held.positions, span))
        return block if rope is None else rotate(block, cut(rank, span), given.tables[rope])

    plain = rope is None and given.biases is None and not codec.unrotated
    coded = Coded(codec, jnp, layer, held.streams, None if plain else read, cut, held.tables)
    slots = first if isinstance(first, int) else held.slots
    return coded_attention(
        q, keys, exact.vectors["values"], coded, call.positions, exact.positions, held.positions, layer, slots,
        call.before - ring, exact.place if sums else None, used,
    )  # fmt: skip


def mixed_in_pages(
    plan: Plan,
    index: int,
    held: PagedState,
    q: jax.Array,
    new: dict[Side, jax.Array],
    call: Call,
    given: Given,
) -> tuple[jax.Array, jax.Array | None]:
    """`mixed` for one token per row and heads of different lengths."""
    layer, policy, codec, position = plan.spec.layers[index], plan.policy, plan.codec, call.positions
    streams, positions, owner = held.paged()
    if not codec.exact:
        # What is exact is taken as it is; of the token of the call also the key, which needs no `finished`.
        exact, ring, kind = (
            exact_of(jnp, codec, held.tables, held.positions, call),
            codec.recent,
            widened(q[:0]).dtype,
        )
        place = held.put(positions=exact.place).marks.reshape(positions.shape)
        for side in SIDES:
            x = decoded(codec, jnp, paged_parts(codec, jnp, streams, held.tables, owner, side), side, kind)
            own = exact.vectors[side].reshape(-1, *exact.vectors[side].shape[2:])
            own = own[owner[:, None], jnp.maximum(place, 0)]
            x = jnp.where((place >= 0)[..., None], own.astype(kind), x)
            if side == "keys" and (given.biases is not None or codec.unrotated):
                heads = layer.kv_heads
                every = (
                    jnp.broadcast_to(one[:, None], (len(owner), heads, *one.shape[1:]))
                    for one in (x, positions)
                )
                x = finished(plan, index, given, *every)[jnp.arange(len(owner)), owner % heads]
                fresh = new["keys"].reshape(-1, 1, layer.head_dim)[owner].astype(kind)
                x = jnp.where((place >= ring)[..., None], fresh, x)
            streams[side] = x
    keys = streams["keys"]
    if layer.rope is not None and policy.repositions:
        rank = jnp.cumsum(held.positions >= 0, axis=-1, dtype=jnp.int32) - 1
        keys = rotate(keys, held.put(positions=rank).marks.reshape(positions.shape), given.tables[layer.rope])
        q = rotate(q, rank[:, :, None, -1:], given.tables[layer.rope])
    out, sums = paged_attention(
        q, keys, streams["values"], position, positions, owner, layer, policy.needs.sums
    )
    return out, None if sums is None else held.shown(sums)
