"""What a codec costs: decode steps behind 8,192 tokens, beside the same cache uncoded, and the bytes of both.

Interleaved A B A B in one process, medians; the ratios are in `--benchmark-json` and printed. Nothing is asserted.
"""

import statistics
import time
from collections.abc import Callable

import numpy as np
import pytest

from backends import backends
from framework.decode import Sampling
from framework.spec import Layer, ModelSpec, Rope
from framework.weights import random_weights

LAYER = Layer(heads=8, kv_heads=2, head_dim=64, scale=0.125, rope=Rope(theta=10000.0, dim=64))
SPEC = ModelSpec(
    family="llama", vocab=8192, dim=512, ffn=1408, layers=(LAYER,) * 4, norm_eps=1e-6, positions=16384
)
TOKENS, STEPS, ROUNDS = 8192, 16, 7
CODECS = ("int8()", "fp8()", "exl2_q4()", "exl2_q8()", "exl3()", "kivi(bits=4)", "kvquant()")


@pytest.fixture(scope="module", params=["torch", "flax"])
def model(request):
    return backends.get(request.param).build(SPEC, random_weights(SPEC, 0, np.float32))


def decoding(model, codec: str) -> tuple[Callable[[], object], int]:
    """A run of decode steps behind the tokens, each call from a copy of the same cache; and its bytes."""
    text = np.random.default_rng(0).integers(0, SPEC.vocab, (1, TOKENS), dtype=np.int32)
    cache = model.cache("full()", codec)
    cache.expect(STEPS)
    logits, cache = model.step(text, cache)
    held = cache.bytes.payload + cache.bytes.scales
    return lambda: model.decode(cache.fork(), logits[:, 0], Sampling(), (), STEPS), held


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.benchmark(group=f"{STEPS} decode steps behind {TOKENS} tokens")
def test_decode(benchmark, model, codec):
    (plain, whole), (coded, held) = decoding(model, "full()"), decoding(model, codec)
    base: list[float] = []

    def before() -> None:
        start = time.perf_counter()
        plain()
        base.append(time.perf_counter() - start)

    benchmark.pedantic(coded, setup=before, rounds=ROUNDS, warmup_rounds=1)
    ratio = statistics.median(benchmark.stats.stats.data) / statistics.median(base[1:])
    benchmark.extra_info |= {"over_full": round(ratio, 3), "bytes": round(held / whole, 4)}
    per_step = 1e3 * statistics.median(benchmark.stats.stats.data) / STEPS
    print(
        f"\n{benchmark.name}: {ratio:.2f} of the full cache, {per_step:.1f} ms a step, {held / whole:.4f} of its bytes"
    )
