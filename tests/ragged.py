"""Caches of one small model after a ragged prompt and some tokens, and how two of them differ."""

import dataclasses
import functools

import numpy as np

from backends import backends
from framework.backend import Model
from framework.cache import Cache
from framework.compare import drift
from framework.snapshot import Snapshot
from framework.spec import Layer, ModelSpec, Rope
from framework.weights import random_weights

BACKENDS = ("reference", "torch", "flax")
EXACT = 1e-12

# Every axis has another size: 3 kv heads, group 2, head_dim 4, 20 wide, 2 layers, 31 tokens, 5 queries.
LAYER = Layer(heads=6, kv_heads=3, head_dim=4, scale=0.5, rope=Rope(theta=500.0, dim=4))
SPEC = ModelSpec(
    family="llama", vocab=31, dim=20, ffn=22, layers=(LAYER, LAYER), norm_eps=1e-5, positions=512
)
SLIDING = dataclasses.replace(SPEC, family="mistral", layers=(LAYER, dataclasses.replace(LAYER, window=10)))

PROMPT = np.random.default_rng(3).integers(0, SPEC.vocab, (2, 11), dtype=np.int32)
PROMPT[0, 8:] = -1  # a ragged batch
FEED = np.random.default_rng(4).integers(0, SPEC.vocab, (2, 12), dtype=np.int32)
FIRST = np.stack([np.eye(SPEC.vocab)[7], np.eye(SPEC.vocab)[12]])  # logits of what each row says first

WINDOW, TAIL = "window(budget=7, sinks=2)", "window(budget=6, sinks=2, interval=4)"
H2O, SNAPKV = "h2o(budget=8)", "snapkv(budget=9, window=5, kernel=3, interval=3)"
REPOSITION = "window(budget=8, sinks=2, reposition=True)"
POLICIES = ("full()", WINDOW, TAIL, H2O, SNAPKV, REPOSITION)


@functools.cache
def model(backend: str, spec: ModelSpec = SPEC, dtype: str = "float64") -> Model:
    return backends.get(backend).build(spec, random_weights(spec, 5), dtype)


def begun(backend: str, policy: str = "full()", steps: int = 0, spec: ModelSpec = SPEC) -> Cache:
    """A cache that has seen the prompt and then `steps` tokens, one a step."""
    made = model(backend, spec)
    _, cache = made.step(PROMPT, made.cache(policy, batch=2), logits=None)
    return fed(backend, cache, FEED[:, :steps], spec)


def fed(backend: str, cache: Cache, tokens: np.ndarray, spec: ModelSpec = SPEC) -> Cache:
    for column in range(tokens.shape[1]):
        _, cache = model(backend, spec).step(tokens[:, column : column + 1], cache)
    return cache


def arrays(shot: Snapshot) -> dict[str, np.ndarray]:
    """Every array of a snapshot by name."""
    named = {"seen": shot.seen, "dropped": shot.dropped}
    for index, layer in enumerate(shot.layers):
        named |= {f"{index}.stream.{key}": value for key, value in layer.streams.items()}
        named |= {f"{index}.memory.{key}": value for key, value in layer.memory.items()}
        named |= {f"{index}.heads.{key}": value for key, value in layer.heads.items()}
        named[f"{index}.positions"] = layer.positions
        if layer.queries is not None and layer.query_positions is not None:
            named |= {f"{index}.queries": layer.queries, f"{index}.query_positions": layer.query_positions}
    return named


def differing(found: Snapshot, expected: Snapshot, tolerance: float = 0.0) -> list[str]:
    """Names of what differs between two snapshots: arrays bit for bit, or floats within a tolerance."""
    ours, theirs = arrays(found), arrays(expected)
    wrong = sorted(ours.keys() ^ theirs.keys())
    for key in ours.keys() & theirs.keys():
        left, right = ours[key], theirs[key]
        if left.shape != right.shape or left.dtype != right.dtype:
            wrong.append(f"{key}: {left.dtype}{left.shape} and {right.dtype}{right.shape}")
        elif left.dtype.kind == "f" and tolerance:
            wrong += [key] if drift(left, right) > tolerance else []
        elif left.tobytes() != right.tobytes():
            wrong.append(key)
    facts = ("policy", "codec", "steps", "pending", "capacity", "length")
    return wrong + [key for key in facts if getattr(found, key) != getattr(expected, key)]


def row_of(shot: Snapshot, row: int) -> list[tuple[np.ndarray, ...]]:
    """What one row holds, head by head, without padding."""
    held = []
    for layer in shot.layers:
        for head in range(layer.positions.shape[1]):
            filled = layer.positions[row, head] >= 0
            slots = [layer.positions, *layer.streams.values(), *layer.memory.values()]
            held.append(tuple(x[row, head][filled] for x in slots))
    return held


def assert_same_row(found: Snapshot, row: int, expected: Snapshot, other: int) -> None:
    assert found.seen[row] == expected.seen[other]
    for left, right in zip(row_of(found, row), row_of(expected, other), strict=True):
        for ours, theirs in zip(left, right, strict=True):
            assert ours.shape == theirs.shape
            assert drift(ours, theirs) <= EXACT
