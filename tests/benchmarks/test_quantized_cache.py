"""A decode step behind a 4-bit cache: transformers' QuantizedCache by optimum-quanto, and kvtwin with the same weights.

Both run the whole model in float32, one token a step, logits to NumPy. Hugging Face's cache is as it comes (4 bits,
groups of 64, up to 128 tokens exact), its attention sdpa; that it codes all anew once in 128 steps is not in a median.
Interleaved in one process; medians of a step and their ratios to Hugging Face's are printed and in `--benchmark-json`.
Nothing is asserted. torch takes the threads that OMP_NUM_THREADS gives it, jax its own.

Needs optimum-quanto, of the group `judges`, which compiles C++ when it first reads a cache; without it this file is
passed over. By itself, with the lines that it prints:

    export OMP_NUM_THREADS=1 JAX_DISABLE_MOST_OPTIMIZATIONS=0
    python -m pytest tests/benchmarks/test_quantized_cache.py -s -o addopts=--import-mode=importlib
"""

import statistics
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, QuantizedCache

from backends import backends
from framework.family import family
from framework.weights import random_weights

pytest.importorskip("optimum.quanto")

CONFIG = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "pad_token_id": None,
    "eos_token_id": None,
}
SPEC = family(CONFIG).spec(CONFIG)
CODECS = ("exl2_q4()", "quanto(bits=4)")
ROUNDS, WARM = 41, 5
Step = Callable[[], object]


@pytest.fixture(scope="module")
def weights():
    return random_weights(SPEC, 0, np.float32)


def theirs(weights, text: np.ndarray) -> Step:
    """One step more of Hugging Face's model at each call."""
    names = family(CONFIG).names(SPEC)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**CONFIG), attn_implementation="sdpa", dtype=torch.float32
    )
    model.load_state_dict({names[name]: torch.from_numpy(value) for name, value in weights.items()})
    model.eval()
    cache = QuantizedCache("quanto", model.config, nbits=4)

    def step(tokens: np.ndarray = text[:, :1]) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(tokens), past_key_values=cache, logits_to_keep=1).logits.numpy()

    step(text)
    return step


def ours(weights, backend: str, codec: str, text: np.ndarray) -> Step:
    """One step more of kvtwin's model at each call."""
    model = backends.get(backend).build(SPEC, weights)
    cache = model.cache("full()", codec)
    cache.expect(ROUNDS + WARM)
    held = [model.step(text, cache)[1]]

    def step() -> np.ndarray:
        logits, held[0] = model.step(text[:, :1], held[0])
        return logits

    return step


@pytest.mark.parametrize("tokens", [512, 2048, 8192])
@pytest.mark.benchmark(group="one decode step, 4-bit caches")
def test_decode_step(benchmark, weights, tokens):
    text = np.random.default_rng(0).integers(0, SPEC.vocab, (1, tokens), dtype=np.int64)
    runs = {
        f"{backend} {codec}": ours(weights, backend, codec, text)
        for backend in ("torch", "flax")
        for codec in CODECS
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}

    def before() -> None:
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)

    benchmark.pedantic(theirs(weights, text), setup=before, rounds=ROUNDS, warmup_rounds=WARM)
    base = statistics.median(benchmark.stats.stats.data)
    print(f"\n{tokens} tokens: Hugging Face QuantizedCache {1e3 * base:.2f} ms a step")
    for name, each in seconds.items():
        own = statistics.median(each[WARM:])
        benchmark.extra_info[name] = round(own / base, 3)
        print(f"  kvtwin {name}: {1e3 * own:.2f} ms, {own / base:.3f} of it, {base / own:.2f} times as fast")
