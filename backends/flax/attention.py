"""Attention over a cache: masks from positions, grouped queries without repeating keys, blocks of queries."""

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from backends.flax.convert import wide
from framework.coding import Coded, by_slot
from framework.policy import attends
from framework.shapes import EMPTY
from framework.spec import Layer

SPAN = 1024  # coded slots that are read at a time
STEP = 256  # exact slots that one query reads at a time
RUNG = 256  # of more tokens than this, only a part reads all keys
RUNGS = 8  # such parts, at most


@dataclass(frozen=True)
class Way:
    """How attention is cut up: `block` queries at a time, so that no tokens x tokens array is ever made; and where
    `in_turn`, one query reads exact slots part by part, instead of all that the buffers have room for."""

    block: int
    in_turn: bool


ON_CPU = Way(64, True)  # what is made stays near the cores
ON_GPU = Way(512, False)  # few large operations: each begins late, and a loop asks the host at every turn


def usual() -> Way:
    """The way of the device that jax computes on."""
    return ON_CPU if jax.default_backend() == "cpu" else ON_GPU


Span = tuple[Any, int]  # where some slots begin, which may be traced, and how many they are
Block = Callable[[jax.Array, jax.Array, int], tuple[jax.Array, jax.Array | None]]


def attention(
    queries: Float[jax.Array, "batch kv_heads group tokens head_dim"],
    keys: Float[jax.Array, "batch kv_heads slots head_dim"],
    values: Float[jax.Array, "batch kv_heads slots width"],
    query_positions: Int[jax.Array, "batch tokens"],
    key_positions: Int[jax.Array, "batch kv_heads slots"],
    layer: Layer,
    with_sums: bool,
    used: Int[jax.Array, ""] | None = None,
    way: Way | None = None,
) -> tuple[
    Float[jax.Array, "batch kv_heads group tokens width"], Float[jax.Array, "batch kv_heads slots"] | None
]:
    """The mixed values of each query and, if asked, what each slot received (mean over the group, sum over queries).

    A query at position -1 gives 0. Products add up in at least float32. Where there are more queries than a block has,
    the last slots are their own, in order. `used`: of the slots from here on one query alone need not know. `way`: that
    of the device where none is given.
    """
    slots, way = keys.shape[2], way or usual()
    if queries.shape[3] == 1 and slots >= 2 * STEP and way.in_turn:
        return _one_query(queries, keys, values, query_positions, key_positions, layer, with_sums, used)

    def block(q: jax.Array, at: jax.Array, reach: int) -> tuple[jax.Array, jax.Array | None]:
        k, v, held = keys[:, :, :reach], values[:, :, :reach], key_positions[:, :, :reach]
        return _block(q, k, v, at, held, layer, with_sums)

    nothing = jnp.zeros(key_positions.shape, wide(keys.dtype)) if with_sums else None
    return _in_blocks(block, queries, query_positions, slots, nothing, way.block)


def _in_blocks(
    block: Block,
    queries: Float[jax.Array, "batch kv_heads group tokens head_dim"],
    query_positions: Int[jax.Array, "batch tokens"],
    slots: int,
    nothing: Float[jax.Array, "batch kv_heads slots"] | None,
    size: int,
) -> tuple[
    Float[jax.Array, "batch kv_heads group tokens width"], Float[jax.Array, "batch kv_heads slots"] | None
]:
    """What `block` gives for `size` queries and their positions, for all queries; its sums add up from `nothing`.

    `block` is told how many slots its queries may reach. These are the slots up to the end of the rung that the block
    is on: one rung for all blocks would read twice what is needed, one for each would be compiled one by one.
    """
    tokens = queries.shape[3]
    if tokens <= size:
        return block(queries, query_positions, slots)
    blocks, rungs = -(-tokens // size), min(RUNGS, -(-tokens // max(RUNG, size)))
    mixed, sums = [], nothing
    edges = [min(size * (blocks * rung // rungs), tokens) for rung in range(rungs + 1)]
    for start, end in zip(edges, edges[1:], strict=False):
        reach = slots - tokens + end
        some, more = _on_rung(
            block,
            reach,
            queries[:, :, :, start:end],
            query_positions[:, start:end],
            None if sums is None else jnp.zeros_like(sums[:, :, :reach]),
            size,
        )
        mixed.append(some)
        if sums is not None:
            sums = sums.at[:, :, :reach].add(more)
    return jnp.concatenate(mixed, axis=3), sums


def _on_rung(
    block: Block,
    reach: int,
    queries: jax.Array,
    query_positions: jax.Array,
    nothing: jax.Array | None,
    size: int,
) -> tuple[jax.Array, jax.Array | None]:
    tokens = queries.shape[3]
    blocks = -(-tokens // size)
    short = blocks * size - tokens
    queries = jnp.pad(queries, ((0, 0),) * 3 + ((0, short), (0, 0)))
    query_positions = jnp.pad(query_positions, ((0, 0), (0, short)), constant_values=EMPTY)
    cut_queries = jnp.moveaxis(queries.reshape(*queries.shape[:3], blocks, size, -1), 3, 0)
    cut_positions = jnp.moveaxis(query_positions.reshape(-1, blocks, size), 1, 0)

    @jax.checkpoint  # the probabilities of a block are made again when its gradient is due
    def one(total: Any, part: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
        mixed, sums = block(*part, reach)
        return (None if total is None else total + sums), mixed

    sums, mixed = jax.lax.scan(one, nothing, (cut_queries, cut_positions))
    mixed = jnp.moveaxis(mixed, 0, 3).reshape(*queries.shape[:3], blocks * size, -1)
    return mixed[:, :, :, :tokens], sums


def _block(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    query_positions: jax.Array,
    key_positions: jax.Array,
    layer: Layer,
    with_sums: bool,
) -> tuple[jax.Array, jax.Array | None]:
    batch, heads, group, tokens, head_dim = queries.shape
    slots, total = keys.shape[2], wide(keys.dtype)
    # Products over three axes: XLA has no fast one over five on CPUs (1.3 times slower in a prompt).
    flat = (batch * heads, group * tokens)
    q, k, v = queries.reshape(*flat, head_dim), *(x.reshape(flat[0], slots, -1) for x in (keys, values))
    logits = jnp.einsum("lqd,lsd->lqs", q, k, preferred_element_type=total)
    mask = attends(query_positions[:, None, :, None], key_positions[:, :, None, :], layer.window)
    mask = jnp.broadcast_to(mask[:, :, None], (batch, heads, group, tokens, slots)).reshape(logits.shape)
    weights, whole = _weights(_capped(logits, layer), mask)
    mixed = jnp.einsum("lqs,lsd->lqd", weights.astype(values.dtype), v, preferred_element_type=total) / whole
    sums = (weights / whole).reshape(batch, heads, -1, slots).sum(2) / group if with_sums else None
    return mixed.astype(values.dtype).reshape(batch, heads, group, tokens, -1), sums


def _capped(logits: Float[jax.Array, "*axes"], layer: Layer) -> Float[jax.Array, "*axes"]:
    """Products of queries and keys, scaled and bounded as the layer has it."""
    logits = logits * layer.scale
    return logits if layer.softcap is None else jnp.tanh(logits / layer.softcap) * layer.softcap


def _weights(
    logits: Float[jax.Array, "*axes slots"], mask: Bool[jax.Array, "*axes slots"]
) -> tuple[Float[jax.Array, "*axes slots"], Float[jax.Array, "*axes 1"]]:
    """A softmax over the entries where `mask` is True before it is divided by its total, and the total.

    What is mixed is smaller than the weights, so that dividing it saves a pass over them.
    """
    logits = jnp.where(mask, logits, -jnp.inf)
    top = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - jnp.where(jnp.isfinite(top), top, 0.0))
    return weights, _divisor(jnp.sum(weights, axis=-1, keepdims=True))


def _divisor(total: Float[jax.Array, "*axes"]) -> Float[jax.Array, "*axes"]:
    """Totals of weights; 1 where there are none, so that what nothing adds up to is 0."""
    return jnp.where(total == 0, 1.0, total)


def _one_query(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    query_positions: jax.Array,
    key_positions: jax.Array,
    layer: Layer,
    with_sums: bool,
    used: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
    """`_block` for one query, in a loop that reads the buffers where they are: one product has XLA copy them."""
    batch, heads, group, _, head_dim = queries.shape
    slots, total = keys.shape[2], wide(keys.dtype)
    q = queries.reshape(batch * heads, group, head_dim)

    def flat(x: jax.Array, span: Span) -> jax.Array:
        return cut(x, span).reshape(batch * heads, span[1], -1)

    def logits_of(span: Span) -> jax.Array:
        logits = jnp.einsum("lqd,lsd->lqs", q, flat(keys, span), preferred_element_type=total)
        mask = attends(query_positions[:, None], cut(key_positions, span), layer.window)
        return jnp.where(mask.reshape(batch * heads, 1, -1), _capped(logits, layer), -jnp.inf)

    def mixed_of(weights: jax.Array, span: Span) -> jax.Array:
        weights = weights.astype(values.dtype)
        return jnp.einsum("lqs,lsd->lqd", weights, flat(values, span), preferred_element_type=total)

    start = Mixed.nothing((batch * heads, group), values.shape[-1], slots if with_sums else 0, total)
    found = _in_turn(logits_of, mixed_of, start, slots, STEP, used)
    mixed, sums = found.mixed / _divisor(found.whole), None
    if with_sums:
        sums = (jnp.exp(found.logits - found.top) / _divisor(found.whole)).reshape(batch, heads, group, slots)
        sums = sums.sum(2) / group
    return mixed.astype(values.dtype).reshape(batch, heads, group, 1, -1), sums


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mixed:
    """What queries have mixed of some slots: `mixed` and `whole`, the total of their weights, both relative to the
    largest logit `top`; and the logits of all slots where they are asked for."""

    mixed: Float[jax.Array, "*axes queries width"]
    whole: Float[jax.Array, "*axes queries 1"]
    top: Float[jax.Array, "*axes queries 1"]
    logits: Float[jax.Array, "*axes queries slots"]

    @staticmethod
    def nothing(shape: tuple[int, ...], width: int, slots: int, dtype: Any) -> "Mixed":
        """Of no slot; with room for the logits of this many."""
        none = jnp.zeros((*shape, 1), dtype)
        return Mixed(
            jnp.zeros((*shape, width), dtype),
            none,
            none + jnp.finfo(dtype).min,
            jnp.full((*shape, slots), -jnp.inf, dtype),
        )

    def more(self, logits: jax.Array, mixed_of: Callable[[jax.Array], jax.Array]) -> "Mixed":
        """And of these slots, whose logits are -inf where they are not seen (arXiv 1805.02867)."""
        top = jnp.maximum(self.top, jnp.max(logits, axis=-1, keepdims=True))
        weights, less = jnp.exp(logits - top), jnp.exp(self.top - top)
        whole = self.whole * less + jnp.sum(weights, axis=-1, keepdims=True)
        return replace(self, mixed=self.mixed * less + mixed_of(weights), whole=whole, top=top)


def _in_turn(
    logits_of: Callable[[Span], jax.Array],
    mixed_of: Callable[[jax.Array, Span], jax.Array],
    start: Mixed,
    slots: int,
    size: int,
    used: jax.Array | None,
) -> Mixed:
    """`start` and all slots, or the first `used`, `size` at a time; so many slots there are at least."""

    def one(index: jax.Array, so_far: Mixed) -> Mixed:
        first = jnp.minimum(index * size, slots - size)
        logits = logits_of((first, size))
        fresh = (
            first + jnp.arange(size) >= index * size
        )  # the last span begins before the end of the one before it
        logits = jnp.where(fresh, logits, -jnp.inf)
        result = so_far.more(logits, lambda weights: mixed_of(weights, (first, size)))
        if not so_far.logits.shape[-1]:
            return result
        old = jax.lax.dynamic_slice_in_dim(so_far.logits, first, size, axis=-1)
        logits = jnp.where(fresh, logits, old)
        return replace(
            result, logits=jax.lax.dynamic_update_slice_in_dim(so_far.logits, logits, first, axis=-1)
        )

    count = -(-slots // size) if used is None else (used + size - 1) // size
    return jax.lax.fori_loop(0, count, one, start)


def cut(x: jax.Array, span: Span) -> jax.Array:
    """The slots of a span."""
    return jax.lax.dynamic_slice_in_dim(x, *span, axis=2)


def coded_attention(
    queries: Float[jax.Array, "batch kv_heads group tokens head_dim"],
    keys: Float[jax.Array, "batch kv_heads exact head_dim"],
    values: Float[jax.Array, "batch kv_heads exact width"],
    coded: Coded,
    query_positions: Int[jax.Array, "batch tokens"],
    exact_positions: Int[jax.Array, "batch kv_heads exact"],
    key_positions: Int[jax.Array, "batch kv_heads slots"],
    layer: Layer,
    first: int,
    start: Int[jax.Array, "batch"],
    place: Int[jax.Array, "batch kv_heads slots"] | None,
    used: Int[jax.Array, ""] | None = None,
) -> tuple[
    Float[jax.Array, "batch kv_heads group tokens width"], Float[jax.Array, "batch kv_heads slots"] | None
]:
    """`attention` over slots that are coded, but for some tokens, among them the new ones, whose keys and values are
    given exactly.

    These are the tokens from position `start` on, the new ones last among them. The new ones stand at slots `first`,
    `first + 1`, ..., or where `first` is the number of slots anywhere among them. `place` says which of the exact ones
    stands in a slot, -1 none; None where the sums are not wanted. `used`: as in `attention`.
    """
    tokens, with_sums = queries.shape[3], place is not None
    if first == 0:  # only the new tokens are there
        k, v, at = keys[:, :, -tokens:], values[:, :, -tokens:], exact_positions[:, :, -tokens:]
        return attention(queries, k, v, query_positions, at, layer, with_sums)
    old = key_positions[:, :, :first]
    old = jnp.where(old < start[:, None, None], old, EMPTY)  # what is given exactly is not read from codes
    both = jnp.concatenate([old, exact_positions], axis=2)
    used = used if tokens == 1 and first > SPAN else None

    def block(q: jax.Array, at: jax.Array, reach: int) -> tuple[jax.Array, jax.Array | None]:
        k, v, held = keys[:, :, : reach - first], values[:, :, : reach - first], both[:, :, :reach]
        return _coded_block(q, k, v, coded, at, held, layer, first, with_sums, used)

    nothing = jnp.zeros(both.shape, wide(keys.dtype)) if with_sums else None
    mixed, sums = _in_blocks(block, queries, query_positions, both.shape[2], nothing, usual().block)
    return mixed, None if sums is None or place is None else by_slot(jnp, sums, first, place)


def _coded_block(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    coded: Coded,
    query_positions: jax.Array,
    key_positions: jax.Array,
    layer: Layer,
    first: int,
    with_sums: bool,
    used: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
    batch, heads, group, tokens, head_dim = queries.shape
    total = wide(keys.dtype)
    q = queries.astype(total).reshape(batch, heads, group * tokens, head_dim)
    turned = coded.turned(q)

    def seen(logits: jax.Array, positions: jax.Array) -> jax.Array:
        mask = attends(query_positions[:, None, :, None], positions[:, :, None, :], layer.window)
        mask = jnp.broadcast_to(mask[:, :, None], (batch, heads, group, *mask.shape[2:]))
        return jnp.where(mask.reshape(logits.shape), _capped(logits, layer), -jnp.inf)

    def logits_of(span: Span) -> jax.Array:
        blocks, scale = coded.block("keys", span, total)
        parts = [jnp.einsum("bhqd,bhsd->bhqs", turned[..., columns], k) for columns, k in blocks]
        logits = reduce(operator.add, parts)
        return seen(logits if scale is None else logits * scale[:, :, None], cut(key_positions, span))

    def mixed_of(weights: jax.Array, span: Span) -> jax.Array:
        blocks, scale = coded.block("values", span, total)
        part = jnp.swapaxes(weights, 2, 3)
        part = part if scale is None else part * scale[..., None]
        return jnp.concatenate([jnp.einsum("bhsq,bhsd->bhqd", part, v) for _, v in blocks], axis=3)

    exact = seen(jnp.einsum("bhqd,bhtd->bhqt", q, keys.astype(total)), key_positions[:, :, first:])
    own = Mixed.nothing(q.shape[:3], values.shape[-1], 0, total)
    own = own.more(exact, lambda weights: jnp.einsum("bhqt,bhtd->bhqd", weights, values.astype(total)))
    # What is mixed of codes is in a basis of its own until all of it is there.
    room = jnp.full((*q.shape[:3], first if with_sums else 0), -jnp.inf, total)
    start = replace(own, mixed=jnp.zeros_like(own.mixed), logits=room)
    found = _in_turn(logits_of, mixed_of, start, first, min(SPAN, first), used)
    whole = _divisor(found.whole)
    mixed = (coded.returned(found.mixed) + own.mixed * jnp.exp(own.top - found.top)) / whole
    mixed = mixed.astype(values.dtype).reshape(batch, heads, group, tokens, -1)
    if not with_sums:
        return mixed, None
    weights = jnp.exp(jnp.concatenate([found.logits, exact], axis=3) - found.top) / whole
    return mixed, weights.reshape(batch, heads, group * tokens, -1).sum(2) / group


def paged_attention(
    queries: Float[jax.Array, "batch kv_heads group 1 head_dim"],
    keys: Float[jax.Array, "pages size head_dim"],
    values: Float[jax.Array, "pages size width"],
    query_position: Int[jax.Array, "batch 1"],
    key_positions: Int[jax.Array, "pages size"],
    owner: Int[jax.Array, "pages"],
    layer: Layer,
    with_sums: bool,
) -> tuple[Float[jax.Array, "batch kv_heads group 1 width"], Float[jax.Array, "places"] | None]:
    """`attention` of one query per row over heads in pages; `owner` is the head of each page, rows first.

    A softmax over all pages of a head: each page by itself, joined by the head's largest logit and its total.
    """
    batch, heads, group, _, head_dim = queries.shape
    total, lanes = wide(keys.dtype), batch * heads
    own = queries.reshape(lanes, group, head_dim)[owner]
    logits = jnp.einsum("pgd,psd->pgs", own, keys, preferred_element_type=total) * layer.scale
    if layer.softcap is not None:
        logits = jnp.tanh(logits / layer.softcap) * layer.softcap
    mask = attends(query_position[owner // heads], key_positions, layer.window)[:, None]
    logits = jnp.where(mask, logits, -jnp.inf)

    # Few heads, each of many pages: a product with a table of who owns what is faster than a scatter.
    mine = owner == jnp.arange(lanes)[:, None]
    top = jnp.max(jnp.where(mine[..., None], logits.max(axis=-1), -jnp.inf), axis=1)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    e = jnp.exp(logits - top[owner][..., None])

    def summed(x: Float[jax.Array, "pages group *rest"]) -> Float[jax.Array, "lanes group *rest"]:
        return (mine.astype(x.dtype) @ x.reshape(x.shape[0], -1)).reshape(lanes, *x.shape[1:])

    whole = summed(e.sum(axis=-1))
    whole = jnp.where(whole == 0, 1.0, whole)
    mixed = jnp.einsum("pgs,psd->pgd", e.astype(values.dtype), values, preferred_element_type=total)
    mixed = summed(mixed) / whole[..., None]
    sums = (e / whole[owner][..., None]).mean(axis=1).reshape(-1) if with_sums else None
    return mixed.astype(queries.dtype).reshape(batch, heads, group, 1, -1), sums
