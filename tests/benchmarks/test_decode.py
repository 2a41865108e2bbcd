"""Seconds of a decode step and of a prompt, per backend and policy. `make bench` runs this; nothing is asserted."""

import numpy as np
import pytest

from backends import backends
from framework.spec import Layer, ModelSpec, Rope
from framework.weights import random_weights

LAYER = Layer(heads=8, kv_heads=4, head_dim=32, scale=32**-0.5, rope=Rope(theta=10000.0, dim=32))
SPEC = ModelSpec(
    family="llama", vocab=256, dim=256, ffn=704, layers=(LAYER,) * 4, norm_eps=1e-6, positions=4096
)
PROMPT, BUDGET = 512, 256
POLICIES = ("full()", *(f"{name}(budget={BUDGET})" for name in ("window", "h2o", "snapkv")))
ROUNDS = 50


@pytest.fixture(scope="module", params=["torch", "flax"])
def model(request):
    return backends.get(request.param).build(SPEC, random_weights(SPEC, 0, np.float32))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, SPEC.vocab, (1, PROMPT), dtype=np.int32)


def prompted(model, policy, tokens):
    """The cache after the prompt."""
    # Logits come as NumPy, so the call ends when the work does: jax alone would return before.
    return model.step(tokens, model.cache(policy, capacity=PROMPT + 2 * ROUNDS))[1]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.benchmark(group="one decode step after 512 tokens")
def test_decode_step(benchmark, model, policy, tokens):
    held = [prompted(model, policy, tokens)]

    def step():
        _, held[0] = model.step(tokens[:, :1], held[0])

    benchmark.pedantic(step, rounds=ROUNDS, warmup_rounds=5)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.benchmark(group="a prompt of 512 tokens, compressed")
def test_prefill(benchmark, model, policy, tokens):
    benchmark.pedantic(prompted, args=(model, policy, tokens), rounds=5, warmup_rounds=1)
