"""What a policy costs: decode at capacity 1024 and a prompt of 4096 tokens, beside the same cache without a policy.

Interleaved A B A B in one process, medians; the ratio is in the column `over_full` of `--benchmark-json` and printed.
`make bench` runs this; nothing is asserted.
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
    family="llama", vocab=8192, dim=512, ffn=1408, layers=(LAYER,) * 4, norm_eps=1e-6, positions=8192
)
BUDGET, LONG, STEPS, ROUNDS = 1024, 4096, 32, 7
FROM_STATE = ("window", "h2o", "tova", "key_norm", "keydiff", "scissorhands")
OTHERS = ("snapkv", "expected_attention", "leverage", "lagkv")
DECODE = [f"{name}(budget={BUDGET})" for name in FROM_STATE] + [
    f"{name}(budget={BUDGET}, interval=64)" for name in OTHERS
]
PREFILL = [f"{name}(budget={BUDGET})" for name in ("snapkv", "expected_attention", "keydiff", "h2o")]


@pytest.fixture(scope="module", params=["torch", "flax"])
def model(request):
    return backends.get(request.param).build(SPEC, random_weights(SPEC, 0, np.float32))


def tokens(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, SPEC.vocab, (1, count), dtype=np.int32)


def over(benchmark, measured: Callable[[], object], baseline: Callable[[], object], calls: int = 1) -> None:
    """Time both in turn; the baseline runs in the set-up of each round."""
    base: list[float] = []

    def before() -> None:
        start = time.perf_counter()
        baseline()
        base.append(time.perf_counter() - start)

    benchmark.pedantic(measured, setup=before, rounds=ROUNDS, warmup_rounds=1)
    if benchmark.stats is not None:
        ratio = statistics.median(benchmark.stats.stats.data) / statistics.median(base[1:])
        benchmark.extra_info["over_full"] = round(ratio, 3)
        benchmark.extra_info["milliseconds_a_call"] = round(
            1e3 * statistics.median(benchmark.stats.stats.data) / calls, 3
        )
        print(f"\n{benchmark.name}: {ratio:.2f} of the full cache")


def decoding(model, policy: str, prompt: int) -> Callable[[], object]:
    """A run of decode steps behind a prompt; every call goes on from a copy of the same cache."""
    cache = model.cache(policy, capacity=BUDGET)  # which holds for the full cache only
    cache.expect(STEPS)
    logits, cache = model.step(tokens(prompt), cache)
    return lambda: model.decode(cache.fork(), logits[:, 0], Sampling(), (), STEPS)


@pytest.mark.parametrize("policy", DECODE)
@pytest.mark.benchmark(group=f"{STEPS} decode steps over {BUDGET} tokens")
def test_decode(benchmark, model, policy):
    full = decoding(model, "full()", BUDGET - STEPS)
    over(benchmark, decoding(model, policy, BUDGET + 64), full, STEPS)


@pytest.mark.parametrize("policy", PREFILL)
@pytest.mark.benchmark(group=f"a prompt of {LONG} tokens")
def test_prefill(benchmark, model, policy):
    def prompt(one: str) -> Callable[[], object]:
        return lambda: model.step(tokens(LONG), model.cache(one))

    over(benchmark, prompt(policy), prompt("full()"))
