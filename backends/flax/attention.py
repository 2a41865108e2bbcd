"""Attention over a cache: masks from positions, grouped queries without repeating keys, blocks of queries."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from backends.flax.convert import wide
from framework.arrays import softmax
from framework.policy import attends
from framework.shapes import EMPTY
from framework.spec import Layer

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
    tokens = queries.shape[3]
    if tokens <= BLOCK:
        return _block(queries, keys, values, query_positions, key_positions, layer, with_sums)
    blocks = -(-tokens // BLOCK)
    short = blocks * BLOCK - tokens
    queries = jnp.pad(queries, ((0, 0),) * 3 + ((0, short), (0, 0)))
    query_positions = jnp.pad(query_positions, ((0, 0), (0, short)), constant_values=EMPTY)
    cut_queries = jnp.moveaxis(queries.reshape(*queries.shape[:3], blocks, BLOCK, -1), 3, 0)
    cut_positions = jnp.moveaxis(query_positions.reshape(-1, blocks, BLOCK), 1, 0)

    @jax.checkpoint  # the probabilities of a block are made again when its gradient is due
    def one(total: Any, block: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
        mixed, sums = _block(block[0], keys, values, block[1], key_positions, layer, with_sums)
        return (total + sums if with_sums else None), mixed

    nothing = jnp.zeros(key_positions.shape, wide(keys.dtype)) if with_sums else None
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
    logits = jnp.einsum(
        "lqd,lsd->lqs",
        queries.reshape(*flat, head_dim),
        keys.reshape(flat[0], slots, head_dim),
        preferred_element_type=total,
    )
    logits = logits * layer.scale
    if layer.softcap is not None:
        logits = jnp.tanh(logits / layer.softcap) * layer.softcap
    mask = attends(query_positions[:, None, :, None], key_positions[:, :, None, :], layer.window)
    mask = jnp.broadcast_to(mask[:, :, None], (batch, heads, group, tokens, slots)).reshape(*flat, slots)
    weights = softmax(jnp, logits, mask)
    mixed = jnp.einsum(
        "lqs,lsd->lqd",
        weights.astype(values.dtype),
        values.reshape(flat[0], slots, -1),
        preferred_element_type=total,
    )
    sums = weights.reshape(batch, heads, -1, slots).sum(2) / group if with_sums else None
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
    return mixed.astype(values.dtype).reshape(batch, heads, group, 1, -1), sums
