"""Attention over a cache: masks from positions, grouped queries without repeating keys, blocks of queries."""

import operator
from contextlib import nullcontext
from functools import reduce
from itertools import pairwise

import array_api_compat.torch as xp
import torch
from jaxtyping import Bool, Float, Int
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from backends.torch.convert import widened
from framework.arrays import softmax
from framework.coding import Coded, by_slot
from framework.policy import attends
from framework.shapes import EMPTY
from framework.spec import Layer

SPAN = 1024  # coded slots that are read at a time
BLOCK = 256  # queries at a time, so that no tokens x tokens array is ever made
# Those of CUDA that give 0 to a query that sees no slot, as one on a CPU does.
ZERO_SAFE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
LARGER = 4  # times as many on a GPU, which small products leave idle


def attention(
    queries: Float[torch.Tensor, "batch kv_heads group tokens head_dim"],
    keys: Float[torch.Tensor, "batch kv_heads slots head_dim"],
    values: Float[torch.Tensor, "batch kv_heads slots width"],
    query_positions: Int[torch.Tensor, "batch tokens"],
    key_positions: Int[torch.Tensor, "batch kv_heads slots"],
    layer: Layer,
    first: int,
    with_sums: bool,
    whole: bool = False,
) -> tuple[
    Float[torch.Tensor, "batch kv_heads group tokens width"],
    Float[torch.Tensor, "batch kv_heads slots"] | None,
]:
    """The mixed values of each query and, if asked, what each slot received (mean over the group, sum over queries).

    The new tokens stand at slots `first`, `first + 1`, ...: a block of queries needs no slot beyond its own.
    A query at position -1 gives 0. Fused unless a soft-cap, the sums or a gradient need the probabilities. `whole`: the
    slots up to the last new token hold the positions from 0 on, in order, and the layer's window hides none of them.
    """
    tokens = queries.shape[3]
    backward = torch.is_grad_enabled() and queries.requires_grad
    if backward and tokens > BLOCK:  # the probabilities of a block are made again when its gradient is due
        spans = [slice(start, start + BLOCK) for start in range(0, tokens, BLOCK)]
        pieces = [
            checkpoint(
                attention, queries[..., span, :], keys, values, query_positions[:, span], key_positions,
                layer, first + span.start, False, use_reentrant=False, preserve_rng_state=False,
            )
            for span in spans
        ]  # fmt: skip
        return torch.cat([mixed for mixed, _ in pieces], dim=3), None
    fused = layer.softcap is None and not with_sums and not backward
    if fused and whole and (first == 0 or tokens == 1):
        end = first + tokens
        return _fused(queries, keys[:, :, :end], values[:, :, :end], None, layer.scale), None
    if fused and tokens == 1:
        end = first + 1
        mask = attends(query_positions[:, None, :, None], key_positions[:, :, None, :end], layer.window)
        return _fused(queries, keys[:, :, :end], values[:, :, :end], mask, layer.scale), None
    mixed = queries.new_empty((*queries.shape[:-1], values.shape[-1]))
    sums = widened(keys.new_zeros(key_positions.shape)) if with_sums else None
    # Where the probabilities are made, a few arrays of their size live at once.
    block = (BLOCK if fused else BLOCK // 8) * (LARGER if queries.is_cuda else 1)
    for start in range(0, tokens, block):
        stop = min(start + block, tokens)
        end = first + stop
        q, k, v = queries[..., start:stop, :], keys[:, :, :end], values[:, :, :end]
        mask = attends(
            query_positions[:, None, start:stop, None], key_positions[:, :, None, :end], layer.window
        )
        if fused:
            mixed[..., start:stop, :] = _fused(q, k, v, mask, layer.scale)
            continue
        mixed[..., start:stop, :], weights = _weighted(q, k, v, mask, layer)
        if sums is not None:
            sums[..., :end] += weights.sum(dim=2) / layer.group
    return mixed, sums


def _fused(
    q: Float[torch.Tensor, "batch kv_heads group tokens head_dim"],
    k: Float[torch.Tensor, "batch kv_heads slots head_dim"],
    v: Float[torch.Tensor, "batch kv_heads slots width"],
    mask: Bool[torch.Tensor, "batch kv_heads tokens slots"] | None,
    scale: float,
) -> Float[torch.Tensor, "batch kv_heads group tokens width"]:
    """What the queries mix. Without a mask: one token over all slots, or as many as slots, each up to its own."""
    with sdpa_kernel(ZERO_SAFE) if q.is_cuda and mask is not None else nullcontext():
        return _sdpa(q, k, v, mask, scale)


def _sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> Float[torch.Tensor, "batch kv_heads group tokens width"]:
    fused = functional.scaled_dot_product_attention
    if q.shape[3] == 1:
        return fused(q[..., 0, :], k, v, attn_mask=mask, scale=scale)[..., None, :]
    # By kv head, so that the group shares keys that lie in memory once.
    k, v, every = (
        None if x is None else x.flatten(0, 1)[:, None].expand(-1, q.shape[2], -1, -1) for x in (k, v, mask)
    )
    out = fused(q.flatten(0, 1), k, v, attn_mask=every, is_causal=mask is None, scale=scale)
    return out.view(*q.shape[:-1], -1)


def _weighted(
    q: Float[torch.Tensor, "batch kv_heads group tokens head_dim"],
    k: Float[torch.Tensor, "batch kv_heads slots head_dim"],
    v: Float[torch.Tensor, "batch kv_heads slots width"],
    mask: Bool[torch.Tensor, "batch kv_heads tokens slots"],
    layer: Layer,
) -> tuple[torch.Tensor, Float[torch.Tensor, "batch kv_heads rows slots"]]:
    """What the queries mix, and by which weights; the queries of a group stand one behind the other in `rows`."""
    logits = widened(q.flatten(2, 3)) @ widened(k).transpose(-1, -2) * layer.scale
    if layer.softcap is not None:
        logits = torch.tanh(logits / layer.softcap) * layer.softcap
    every = mask[:, :, None].expand(-1, -1, layer.group, -1, -1).flatten(2, 3)
    weights = softmax(xp, logits, every)
    return (weights @ widened(v)).to(q.dtype).view(*q.shape[:-1], -1), weights


def coded_attention(
    queries: Float[torch.Tensor, "batch kv_heads group tokens head_dim"],
    keys: Float[torch.Tensor, "batch kv_heads exact head_dim"],
    values: Float[torch.Tensor, "batch kv_heads exact width"],
    coded: Coded,
    query_positions: Int[torch.Tensor, "batch tokens"],
    exact_positions: Int[torch.Tensor, "batch kv_heads exact"],
    key_positions: Int[torch.Tensor, "batch kv_heads slots"],
    layer: Layer,
    first: int,
    start: Int[torch.Tensor, "batch"],
    place: Int[torch.Tensor, "batch kv_heads slots"] | None,
) -> tuple[
    Float[torch.Tensor, "batch kv_heads group tokens width"],
    Float[torch.Tensor, "batch kv_heads slots"] | None,
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
        mixed, sums = attention(queries, k, v, query_positions, at, layer, 0, with_sums)
        beyond = key_positions.shape[-1] - tokens
        return mixed, None if sums is None else functional.pad(sums, (0, beyond))
    old = key_positions[:, :, :first]
    old = torch.where(old < start[:, None, None], old, EMPTY)  # what is given exactly is not read from codes
    both = torch.cat([old, exact_positions], dim=2)
    backward = torch.is_grad_enabled() and queries.requires_grad
    mixed = queries.new_empty((*queries.shape[:-1], values.shape[-1]))
    sums = widened(keys.new_zeros(both.shape)) if with_sums else None
    for begin in range(0, tokens, BLOCK // 8):
        span = slice(begin, begin + BLOCK // 8)
        given = (queries[..., span, :], keys, values, coded, query_positions[:, span], both, layer, first)
        if backward:  # the probabilities of a block are made again when its gradient is due
            out, received = checkpoint(_coded_block, *given, use_reentrant=False, preserve_rng_state=False)
        else:
            out, received = _coded_block(*given)
        mixed[..., span, :] = out
        if sums is not None:
            sums += received
    if sums is None or place is None:
        return mixed, None
    return mixed, by_slot(xp, sums, first, place)


def _coded_block(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    coded: Coded,
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    layer: Layer,
    first: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`coded_attention` of a few queries; `key_positions` are those of the coded slots and then of the exact tokens."""
    batch, kv_heads, group, tokens, head_dim = queries.shape
    exact, wide = widened(values), widened(values[:0]).dtype
    count = max(1, round(first / SPAN))  # of about equal length
    bounds = [first * each // count for each in range(count + 1)]
    spans = [slice(*each) for each in pairwise(bounds)]
    q = widened(queries).reshape(batch, kv_heads, -1, head_dim)
    turned, pieces = coded.turned(q), []
    for span in spans:
        blocks, scale = coded.block("keys", span, wide)
        piece = reduce(operator.add, [turned[..., columns] @ k.transpose(-1, -2) for columns, k in blocks])
        pieces.append(piece if scale is None else piece * scale[:, :, None])
    logits = torch.cat([*pieces, q @ widened(keys).transpose(-1, -2)], dim=3) * layer.scale
    if layer.softcap is not None:
        logits = torch.tanh(logits / layer.softcap) * layer.softcap
    mask = attends(query_positions[:, None, :, None], key_positions[:, :, None], layer.window)
    mask = mask if tokens == 1 else mask[:, :, None].expand(-1, -1, group, -1, -1).reshape(logits.shape)
    # Fewer operations than `softmax`: a row without any slot is uniform, and then 0.
    weights = torch.where(mask, logits, torch.finfo(wide).min).softmax(-1) * mask
    totals = []
    for span in spans:
        blocks, scale = coded.block("values", span, wide)
        part = weights[..., span]
        part = part if scale is None else part * scale[:, :, None]
        totals.append(torch.cat([part @ v for _, v in blocks], dim=3))
    mixed = coded.returned(reduce(operator.add, totals)) + weights[..., first:] @ exact
    shape = (batch, kv_heads, group, tokens, exact.shape[-1])
    return mixed.to(queries.dtype).reshape(shape), weights.sum(dim=2) / group


def paged_attention(
    queries: Float[torch.Tensor, "batch kv_heads group 1 head_dim"],
    keys: Float[torch.Tensor, "pages size head_dim"],
    values: Float[torch.Tensor, "pages size width"],
    query_position: Int[torch.Tensor, "batch 1"],
    key_positions: Int[torch.Tensor, "pages size"],
    owner: Int[torch.Tensor, "pages"],
    layer: Layer,
    with_sums: bool,
) -> tuple[Float[torch.Tensor, "batch kv_heads group 1 width"], Float[torch.Tensor, "places"] | None]:
    """`attention` of one query per row over heads in pages; `owner` is the head of each page, rows first.

    A softmax over all pages of a head: each page by itself, joined by the head's largest logit and its total.
    """
    batch, heads, group, _, head_dim = queries.shape
    lanes, owner = batch * heads, owner.to(torch.int64)
    own = (widened(queries) * layer.scale).reshape(lanes, group, head_dim)[owner]
    logits = own @ widened(keys).transpose(-1, -2)
    if layer.softcap is not None:
        logits = torch.tanh(logits / layer.softcap) * layer.softcap
    mask = attends(query_position[owner // heads], key_positions, layer.window)[:, None]
    logits.masked_fill_(~mask, -torch.inf)
    most = logits.amax(-1)
    index = owner[:, None].expand(most.shape)
    top = most.new_full((lanes, group), -torch.inf).scatter_reduce_(0, index, most, "amax")
    e = logits.sub_(top.masked_fill_(top == -torch.inf, 0.0)[owner][..., None]).exp_()
    whole = e.new_zeros(lanes, group).index_add_(0, owner, e.sum(-1))
    whole = whole.masked_fill_(whole == 0, 1.0)
    part = e @ widened(values)
    mixed = part.new_zeros(lanes, group, part.shape[-1]).index_add_(0, owner, part) / whole[..., None]
    sums = (e / whole[owner][..., None]).mean(1).flatten() if with_sums else None
    return mixed.to(queries.dtype).view(batch, heads, group, 1, -1), sums
