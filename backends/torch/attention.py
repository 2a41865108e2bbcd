"""Attention over a cache: masks from positions, grouped queries without repeating keys, blocks of queries."""

import array_api_compat.torch as xp
import torch
from jaxtyping import Float, Int
from torch.nn.functional import scaled_dot_product_attention

from backends.torch.convert import widened
from framework.arrays import softmax
from framework.policy import attends
from framework.spec import Layer

BLOCK = 256  # queries at a time, so that no tokens x tokens array is ever made


def attention(
    queries: Float[torch.Tensor, "batch kv_heads group tokens head_dim"],
    keys: Float[torch.Tensor, "batch kv_heads slots head_dim"],
    values: Float[torch.Tensor, "batch kv_heads slots width"],
    query_positions: Int[torch.Tensor, "batch tokens"],
    key_positions: Int[torch.Tensor, "batch kv_heads slots"],
    layer: Layer,
    first: int,
    with_sums: bool,
) -> tuple[
    Float[torch.Tensor, "batch kv_heads group tokens width"],
    Float[torch.Tensor, "batch kv_heads slots"] | None,
]:
    """The mixed values of each query and, if asked, what each slot received (mean over the group, sum over queries).

    The new tokens stand at slots `first`, `first + 1`, ...: a block of queries needs no slot beyond its own.
    A query at position -1 gives 0. Fused unless a soft-cap or the sums need the probabilities.
    """
    batch, kv_heads, group, tokens, head_dim = queries.shape
    mixed = queries.new_empty((*queries.shape[:-1], values.shape[-1]))
    sums = widened(keys.new_zeros(key_positions.shape)) if with_sums else None
    for start in range(0, tokens, BLOCK):
        stop = min(start + BLOCK, tokens)
        end = first + stop
        q = queries[..., start:stop, :].reshape(batch, kv_heads, group * (stop - start), head_dim)
        k, v = keys[..., :end, :], values[..., :end, :]
        mask = attends(
            query_positions[:, None, start:stop, None], key_positions[:, :, None, :end], layer.window
        )
        mask = mask[:, :, None].expand(-1, -1, group, -1, -1).reshape(batch, kv_heads, -1, end)
        if layer.softcap is None and sums is None:
            out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=layer.scale)
        else:
            logits = widened(q) @ widened(k).transpose(-1, -2) * layer.scale
            if layer.softcap is not None:
                logits = torch.tanh(logits / layer.softcap) * layer.softcap
            weights = softmax(xp, logits, mask)
            out = (weights @ widened(v)).to(q.dtype)
            if sums is not None:
                sums[..., :end] += weights.sum(dim=2) / group
        mixed[..., start:stop, :] = out.reshape(batch, kv_heads, group, stop - start, -1)
    return mixed, sums
