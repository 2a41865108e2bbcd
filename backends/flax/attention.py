"""Attention over a cache: masks from positions, grouped queries without repeating keys, blocks of queries."""

import operator
from collections.abc import Callable
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from backends.flax.convert import wide
from framework.arrays import softmax
from framework.coding import Coded, by_slot
from framework.policy import attends
from framework.shapes import EMPTY
from framework.spec import Layer

SPAN = 1024  # coded slots that are read at a time
STEP = 256  # exact slots that one token's queries read at a time
BLOCK = 256  # queries at a time, so that no tokens x tokens array is ever made


def attention(
    queries: Float[jax.Array, "batch kv_heads group tokens head_dim"],
    keys: Float[jax.Array, "batch kv_heads slots head_dim"],
    values: Float[jax.Array, "batch kv_heads slots width"],
    query_positions: Int[jax.Array, "batch tokens"],
    key_positions: Int[jax.Array, "batch kv_heads slots"],
    layer: Layer,
    with_sums: bool,
) -> tuple[
    Float[jax.Array, "batch kv_heads group tokens width"], Float[jax.Array, "batch kv_heads slots"] | None
]:
    """The mixed values of each query and, if asked, what each slot received (mean over the group, sum over queries).

    A query at position -1 gives 0. Products add up in at least float32.
    """

    def block(q: jax.Array, at: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        return _block(q, keys, values, at, key_positions, layer, with_sums)

    nothing = jnp.zeros(key_positions.shape, wide(keys.dtype)) if with_sums else None
    return _in_blocks(block, queries, query_positions, nothing)


def _in_blocks(
    block: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array | None]],
    queries: Float[jax.Array, "batch kv_heads group tokens head_dim"],
    query_positions: Int[jax.Array, "batch tokens"],
    nothing: Float[jax.Array, "batch kv_heads slots"] | None,
) -> tuple[
    Float[jax.Array, "batch kv_heads group tokens width"], Float[jax.Array, "batch kv_heads slots"] | None
]:
    """What `block` gives for some queries and their positions, for all queries; its sums add up from `nothing`."""
    tokens = queries.shape[3]
    if tokens <= BLOCK:
        return block(queries, query_positions)
    blocks = -(-tokens // BLOCK)
    short = blocks * BLOCK - tokens
    queries = jnp.pad(queries, ((0, 0),) * 3 + ((0, short), (0, 0)))
    query_positions = jnp.pad(query_positions, ((0, 0), (0, short)), constant_values=EMPTY)
    cut_queries = jnp.moveaxis(queries.reshape(*queries.shape[:3], blocks, BLOCK, -1), 3, 0)
    cut_positions = jnp.moveaxis(query_positions.reshape(-1, blocks, BLOCK), 1, 0)

    @jax.checkpoint  # the probabilities of a block are made again when its gradient is due
    def one(total: Any, part: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
        mixed, sums = block(*part)
        return (None if total is None else total + sums), mixed

    sums, mixed = jax.lax.scan(one, nothing, (cut_queries, cut_positions))
    mixed = jnp.moveaxis(mixed, 0, 3).reshape(*queries.shape[:3], blocks * BLOCK, -1)
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
    # Products over three axes: XLA has no fast one over five on CPUs (1.6 times slower at decode, 1.3 in a prompt).
    flat = (batch * heads, group * tokens)
    q = queries.reshape(*flat, head_dim)

    def logits_of(span: tuple[Any, int]) -> jax.Array:
        k = cut(keys, span).reshape(flat[0], -1, head_dim)
        return jnp.einsum("lqd,lsd->lqs", q, k, preferred_element_type=total)

    def mixed_of(weights: jax.Array, span: tuple[Any, int]) -> jax.Array:
        w = jax.lax.dynamic_slice_in_dim(weights, *span, axis=2).astype(values.dtype)
        v = cut(values, span).reshape(flat[0], -1, values.shape[-1])
        return jnp.einsum("lqs,lsd->lqd", w, v, preferred_element_type=total)

    # A loop over the slots reads the buffers where they are; one product of them all has XLA copy them four times.
    size = STEP if tokens == 1 and slots >= 2 * STEP else slots
    logits = _logits_in_spans(logits_of, slots, size) * layer.scale
    if layer.softcap is not None:
        logits = jnp.tanh(logits / layer.softcap) * layer.softcap
    mask = attends(query_positions[:, None, :, None], key_positions[:, :, None, :], layer.window)
    mask = jnp.broadcast_to(mask[:, :, None], (batch, heads, group, tokens, slots)).reshape(*flat, slots)
    weights = softmax(jnp, logits, mask)
    mixed = _mixed_in_spans(mixed_of, weights, slots, size)
    sums = weights.reshape(batch, heads, -1, slots).sum(2) / group if with_sums else None
    return mixed.astype(values.dtype).reshape(batch, heads, group, tokens, -1), sums


def cut(x: jax.Array, span: tuple[Any, int]) -> jax.Array:
    """The slots of a span: where it begins, which may be traced, and how many they are."""
    return jax.lax.dynamic_slice_in_dim(x, *span, axis=2)


def _logits_in_spans(
    logits_of: Callable[[tuple[Any, int]], jax.Array], slots: int, size: int
) -> Float[jax.Array, "*axes slots"]:
    """The logits of all slots, `size` at a time; the last span may be shorter."""
    whole, rest = divmod(slots, size) if size else (0, 0)
    pieces = [logits_of((whole * size, rest))] if rest or not whole else []
    if whole == 1:
        pieces.insert(0, logits_of((0, size)))
    elif whole:
        each = jnp.moveaxis(
            jax.lax.map(lambda index: logits_of((index * size, size)), jnp.arange(whole)), 0, -2
        )
        pieces.insert(0, each.reshape(*each.shape[:-2], whole * size))
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=-1)


def _mixed_in_spans(
    mixed_of: Callable[[jax.Array, tuple[Any, int]], jax.Array], weights: jax.Array, slots: int, size: int
) -> Float[jax.Array, "*axes queries width"]:
    """What these weights mix of the values of all slots, `size` at a time."""
    whole, rest = divmod(slots, size) if size else (0, 0)
    mixed = mixed_of(weights, (whole * size, rest)) if rest or not whole else None
    if whole == 1:
        first = mixed_of(weights, (0, size))
        return first if mixed is None else first + mixed
    if whole == 0:
        return mixed

    def more(so_far: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
        return so_far + mixed_of(weights, (index * size, size)), None

    start = jnp.zeros_like(mixed_of(weights, (0, size))) if mixed is None else mixed
    return jax.lax.scan(more, start, jnp.arange(whole))[0]


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
) -> tuple[
    Float[jax.Array, "batch kv_heads group tokens width"], Float[jax.Array, "batch kv_heads slots"] | None
]:
    """`attention` over slots that are coded, but for some tokens, among them the new ones, whose keys and values are
    given exactly.

    These are the tokens from position `start` on, the new ones last among them. The new ones stand at slots `first`,
    `first + 1`, ..., or where `first` is the number of slots anywhere among them. `place` says which of the exact ones
    stands in a slot, -1 none; None where the sums are not wanted.
    """
    tokens, with_sums = queries.shape[3], place is not None
    if first == 0:  # only the new tokens are there
        k, v, at = keys[:, :, -tokens:], values[:, :, -tokens:], exact_positions[:, :, -tokens:]
        return attention(queries, k, v, query_positions, at, layer, with_sums)
    old = key_positions[:, :, :first]
    old = jnp.where(old < start[:, None, None], old, EMPTY)  # what is given exactly is not read from codes
    both = jnp.concatenate([old, exact_positions], axis=2)

    def block(q: jax.Array, at: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        return _coded_block(q, keys, values, coded, at, both, layer, first, with_sums)

    nothing = jnp.zeros(both.shape, wide(keys.dtype)) if with_sums else None
    mixed, sums = _in_blocks(block, queries, query_positions, nothing)
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
) -> tuple[jax.Array, jax.Array | None]:
    batch, heads, group, tokens, head_dim = queries.shape
    total = wide(keys.dtype)
    q = queries.astype(total).reshape(batch, heads, group * tokens, head_dim)
    turned = coded.turned(q)

    def logits_of(span: tuple[Any, int]) -> jax.Array:
        blocks, scale = coded.block("keys", span, total)
        logits = reduce(
            operator.add, [jnp.einsum("bhqd,bhsd->bhqs", turned[..., columns], k) for columns, k in blocks]
        )
        return logits if scale is None else logits * scale[:, :, None]

    def mixed_of(weights: jax.Array, span: tuple[Any, int]) -> jax.Array:
        blocks, scale = coded.block("values", span, total)
        part = cut(jnp.swapaxes(weights, 2, 3), span)
        part = part if scale is None else part * scale[..., None]
        return jnp.concatenate([jnp.einsum("bhsq,bhsd->bhqd", part, v) for _, v in blocks], axis=3)

    exact = jnp.einsum("bhqd,bhtd->bhqt", q, keys.astype(total))
    logits = jnp.concatenate([_logits_in_spans(logits_of, first, SPAN), exact], axis=3) * layer.scale
    if layer.softcap is not None:
        logits = jnp.tanh(logits / layer.softcap) * layer.softcap
    mask = attends(query_positions[:, None, :, None], key_positions[:, :, None, :], layer.window)
    mask = jnp.broadcast_to(mask[:, :, None], (batch, heads, group, *mask.shape[2:])).reshape(logits.shape)
    weights = softmax(jnp, logits, mask)

    mixed = _mixed_in_spans(mixed_of, weights, first, SPAN)
    mixed = coded.returned(mixed) + jnp.einsum("bhqt,bhtd->bhqd", weights[..., first:], values.astype(total))
    sums = weights.reshape(batch, heads, group * tokens, -1).sum(2) / group if with_sums else None
    return mixed.astype(values.dtype).reshape(batch, heads, group, tokens, -1), sums


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
