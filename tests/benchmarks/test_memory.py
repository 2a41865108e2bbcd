"""The largest memory of a process that reads a prompt of 16k tokens under a policy, beside one that keeps all.

Each run is a process of its own; its resident size before the prompt is taken off. The ratio is in `--benchmark-json`
and printed. Nothing is asserted.
"""

import subprocess
import sys

import pytest

LONG = 16_384
PROMPT = """
import resource, sys
import numpy as np
from backends import backends
from framework.spec import Layer, ModelSpec, Rope
from framework.weights import random_weights

layer = Layer(heads=8, kv_heads=2, head_dim=64, scale=0.125, rope=Rope(theta=10000.0, dim=64))
spec = ModelSpec(family="llama", vocab=8192, dim=512, ffn=1408, layers=(layer,) * 4, norm_eps=1e-6, positions=32768)
model = backends.get(sys.argv[1]).build(spec, random_weights(spec, 0, np.float32))
tokens = np.random.default_rng(0).integers(0, spec.vocab, (1, int(sys.argv[3])), dtype=np.int32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model.step(tokens, model.cache(sys.argv[2]), logits="last")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def peak(backend: str, policy: str) -> float:
    """Mebibytes."""
    done = subprocess.run(
        [sys.executable, "-c", PROMPT, backend, policy, str(LONG)], capture_output=True, text=True, check=True
    )
    return int(done.stdout) / 1024


@pytest.mark.parametrize("policy", ["h2o(budget=1024)", "snapkv(budget=1024)"])
@pytest.mark.parametrize("backend", ["torch", "flax"])
@pytest.mark.benchmark(group=f"a process that reads {LONG} tokens")
def test_peak(benchmark, backend, policy):
    full = peak(backend, "full()")
    mine = benchmark.pedantic(peak, args=(backend, policy), rounds=1)
    benchmark.extra_info["over_full"] = round(mine / full, 3)
    print(f"\n{benchmark.name}: {mine:.0f} MiB, {mine / full:.2f} of the full cache")
