"""The largest memory of a process: that reads a prompt of 16k tokens under a policy, beside one that keeps all; and
that decodes behind 64k coded tokens, beside what the same keys and values take as floats.

Each run is a process of its own; its resident size before is taken off. The ratio is in `--benchmark-json` and printed.
Nothing is asserted.
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


CODED = 65_536
STEPS = """
import re, sys
from dataclasses import replace
from pathlib import Path
import array_api_compat.numpy as xp
import numpy as np
from backends import backends
from framework.coding import stored
from framework.spec import Layer, ModelSpec, Rope
from framework.weights import random_weights

def now(key):
    return int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

layer = Layer(heads=8, kv_heads=2, head_dim=64, scale=0.125, rope=Rope(theta=10000.0, dim=64))
spec = ModelSpec(family="llama", vocab=8192, dim=512, ffn=1408, layers=(layer,) * 4, norm_eps=1e-6, positions=131072)
model = backends.get(sys.argv[1]).build(spec, random_weights(spec, 0, np.float32))
cache, tokens = model.cache("full()", sys.argv[2]), int(sys.argv[3])
held = cache.snapshot()
new = np.random.default_rng(0).standard_normal((1, 2, tokens, 64)).astype(np.float32)
streams = stored(cache.codec, xp, layer, {"keys": new, "values": new})
del new
positions = np.broadcast_to(np.arange(tokens, dtype=np.int32), (1, 2, tokens))
layers = tuple(replace(each, streams=streams, positions=positions) for each in held.layers)
cache = model.restore(replace(held, layers=layers, seen=np.array([tokens], np.int32)))
cache.expect(512)
step = np.array([[1]], np.int32)
_, cache = model.step(step, cache)  # makes room, and compiles
_, cache = model.step(step, cache)
del held, layers, streams
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = now("VmRSS")
for _ in range(5):
    _, cache = model.step(step, cache)
print(now("VmHWM") - before, cache.bytes.payload + cache.bytes.scales)
"""


@pytest.mark.parametrize("codec", ["full()", "int8()", "exl2_q4()"])
@pytest.mark.parametrize("backend", ["torch", "flax"])
@pytest.mark.benchmark(group=f"a process that decodes behind {CODED} coded tokens")
def test_decode_peak(benchmark, backend, codec):
    floats = 4 * 2 * 2 * 64 * 4 * CODED / 2**20  # of four layers

    def run() -> tuple[float, float]:
        words = [sys.executable, "-c", STEPS, backend, codec, str(CODED)]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        peak, held = map(int, done.stdout.split())
        return peak / 1024, held / 2**20

    peak, held = benchmark.pedantic(run, rounds=1)
    benchmark.extra_info |= {"peak": round(peak, 1), "cache": round(held, 1), "floats": floats}
    print(
        f"\n{benchmark.name}: {peak:.1f} MiB above a cache of {held:.1f}; as float32 it would be {floats:.0f}, "
        f"a layer of it {floats / 4:.0f}"
    )
