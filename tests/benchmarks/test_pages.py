"""Attention over heads in pages, beside heads of one length: at equal budgets, and with one head of three times that.

Interleaved A B A B in one process, medians; the ratio is in `--benchmark-json` and printed. Nothing is asserted.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from backends.flax import attention as flax_attention
from backends.torch import attention as torch_attention
from framework.spec import Layer

HEADS, GROUP, HEAD_DIM, BUDGET, SIZE, ROUNDS = 8, 4, 64, 1024, 128, 200
LAYER = Layer(heads=HEADS * GROUP, kv_heads=HEADS, head_dim=HEAD_DIM, scale=0.125, rope=None)
EQUAL = [BUDGET] * HEADS
UNEQUAL = [3 * BUDGET] + [(HEADS - 3) * BUDGET // (HEADS - 1) // SIZE * SIZE] * (HEADS - 1)


def padded(backend: str, counts: list[int]):
    """One query over heads as long as the longest."""
    random, slots = np.random.default_rng(0), max(counts)
    arrays = [
        random.normal(size=(1, HEADS, GROUP, 1, HEAD_DIM)).astype(np.float32),
        random.normal(size=(1, HEADS, slots, HEAD_DIM)).astype(np.float32),
        random.normal(size=(1, HEADS, slots, HEAD_DIM)).astype(np.float32),
        np.full((1, 1), slots, np.int32),
        np.where(np.arange(slots) < np.array(counts)[:, None], np.arange(slots), -1).astype(np.int32)[None],
    ]
    if backend == "torch":
        given = [torch.as_tensor(x) for x in arrays]
        return lambda: torch_attention.attention(*given, LAYER, slots - 1, False)[0]
    compiled = jax.jit(lambda *x: flax_attention.attention(*x, LAYER, False)[0])
    arrays = [jnp.asarray(x) for x in arrays]
    return lambda: compiled(*arrays).block_until_ready()


def paged(backend: str, counts: list[int]):
    """One query over the same heads in pages."""
    random, pages = np.random.default_rng(0), sum(counts) // SIZE
    arrays = [
        random.normal(size=(1, HEADS, GROUP, 1, HEAD_DIM)).astype(np.float32),
        random.normal(size=(pages, SIZE, HEAD_DIM)).astype(np.float32),
        random.normal(size=(pages, SIZE, HEAD_DIM)).astype(np.float32),
        np.full((1, 1), max(counts), np.int32),
        np.concatenate([np.arange(count) for count in counts]).reshape(pages, SIZE).astype(np.int32),
        np.repeat(np.arange(HEADS), np.array(counts) // SIZE).astype(np.int32),
    ]
    if backend == "torch":
        given = [torch.as_tensor(x) for x in arrays]
        return lambda: torch_attention.paged_attention(*given, LAYER, False)[0]
    compiled = jax.jit(lambda *x: flax_attention.paged_attention(*x, LAYER, False)[0])
    arrays = [jnp.asarray(x) for x in arrays]
    return lambda: compiled(*arrays).block_until_ready()


@pytest.mark.parametrize("counts", [EQUAL, UNEQUAL], ids=["equal", "one_long_head"])
@pytest.mark.parametrize("backend", ["torch", "flax"])
@pytest.mark.benchmark(group="attention of one query over 8 heads of 1024 tokens on average")
def test_pages(benchmark, backend, counts):
    base: list[float] = []
    one_length = padded(backend, counts)

    def before() -> None:
        start = time.perf_counter()
        one_length()
        base.append(time.perf_counter() - start)

    benchmark.pedantic(paged(backend, counts), setup=before, rounds=ROUNDS, warmup_rounds=3)
    if benchmark.stats is not None:
        ratio = statistics.median(benchmark.stats.stats.data) / statistics.median(base[3:])
        benchmark.extra_info["over_padded"] = round(ratio, 3)
        print(f"\n{benchmark.name}: {ratio:.2f} of heads of one length")
