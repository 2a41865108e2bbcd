"""What `kvtwin bench` times, on a small shape: decode and prefill of each engine, to notice what became slower.

The engines' own programs, in this process and not in turns: compare runs of one engine with one another, and engines
with `kvtwin bench`. Nothing is asserted. torch takes the threads that OMP_NUM_THREADS gives it, jax its own.
"""

import pytest

from experiments.benches.case import Case
from experiments.benches.model import SHAPES, subject
from experiments.engines.huggingface import HuggingFace
from experiments.engines.kvtwin import Kvtwin

SHAPE = SHAPES["qwen2.5-0.5b"] | {"vocab_size": 8192, "num_hidden_layers": 4, "intermediate_size": 2432}
ENGINES = {
    "torch": lambda: Kvtwin("torch"),
    "flax": lambda: Kvtwin("flax"),
    "hf-dynamic": lambda: HuggingFace("dynamic"),
    "hf-static": lambda: HuggingFace("static"),
}
CASES = [Case("decode", "small", 512), Case("decode", "small", 128, batch=8), Case("prefill", "small", 512)]
OURS = [
    Case("decode", "small", 512, policy="h2o(budget=128)"),
    Case("decode", "small", 512, codec="int8()"),
    Case("prefill", "small", 512, policy="snapkv(fraction=0.25)"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, "small", SHAPE)
        yield subject("small", tmp_path_factory.mktemp("models")).folder


@pytest.fixture(scope="module", params=ENGINES)
def program(request, folder):
    made = ENGINES[request.param]()
    made.load(str(folder))
    return made


def timed(benchmark, program, case: Case) -> None:
    """The case's block, each time on a fresh state."""
    block = program.prepare(case)
    block.seconds()
    benchmark.pedantic(block.work, setup=lambda: ((block.fresh(),), {}), rounds=7)
    if benchmark.stats is not None and case.tokens:
        rate = case.tokens * case.units / benchmark.stats.stats.median
        benchmark.extra_info["tokens_per_second"] = round(rate, 1)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.benchmark(group="kvtwin bench, full caches")
def test_full(benchmark, program, case):
    timed(benchmark, program, case)


@pytest.mark.parametrize("case", OURS, ids=str)
@pytest.mark.parametrize("name", ["torch", "flax"])
@pytest.mark.benchmark(group="kvtwin bench, policies and codecs")
def test_compressed(benchmark, folder, name, case):
    made = ENGINES[name]()
    made.load(str(folder))
    timed(benchmark, made, case)
