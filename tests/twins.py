"""What the tests of equivalence share: one small model with a windowed layer, built once per backend and dtype."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import jax
import jaxtyping
import numpy as np

from backends import backends
from framework.backend import Model
from framework.cache import Cache
from framework.compare import drift
from framework.spec import Layer, ModelSpec, Rope
from framework.weights import Weights, random_weights

VOCAB = 701  # enough that no token repeats within a row: equal tokens have equal key norms in the first layer
WINDOW = 12
LENGTHS = (31, 40, 23)
TWINS = ("torch", "flax")


def hybrid_spec(**changes: Any) -> ModelSpec:
    """Two layers of grouped queries; the second one has a sliding window."""
    rope = Rope(theta=500.0, dim=8)
    full, sliding = (
        Layer(heads=6, kv_heads=2, head_dim=8, scale=8**-0.5, rope=rope, window=window)
        for window in (None, WINDOW)
    )
    numbers = {"vocab": VOCAB, "dim": 20, "ffn": 28, "norm_eps": 1e-5, "positions": 4096}
    return ModelSpec(family="llama", layers=(full, sliding), **(numbers | changes))


def hybrid_weights(seed: int = 3) -> Weights:
    """Weights that float32 holds exactly, so that one reference judges every dtype."""
    return random_weights(hybrid_spec(), seed, np.float32)


@cache
def hybrid(backend: str, dtype: str = "float64") -> Model:
    """The model on one backend. The same object each time, so that what it has compiled serves every test."""
    return backends.get(backend).build(hybrid_spec(), hybrid_weights(), dtype)


@cache
def texts(rows: int = 3, seed: int = 0) -> np.ndarray:
    """Token ids [rows, vocab], each row a permutation of the vocabulary."""
    random = np.random.default_rng(seed)
    return np.stack([random.permutation(VOCAB) for _ in range(rows)]).astype(np.int32)


def prompts(lengths: Sequence[int] = LENGTHS) -> np.ndarray:
    """The first tokens of each row, padded on the right."""
    rows = texts(len(lengths))
    return np.where(np.arange(max(lengths)) < np.array(lengths)[:, None], rows[:, : max(lengths)], -1)


def column(step: int, lengths: Sequence[int] = LENGTHS) -> np.ndarray:
    """The tokens [rows, 1] of the decode step after the prompts."""
    return texts(len(lengths))[np.arange(len(lengths)), np.array(lengths) + step][:, None]


def snapshot_drift(found: Cache, expected: Cache) -> float:
    """Largest drift of streams, memory, tables and queries; infinite where positions or counts differ."""
    ours, theirs = found.snapshot(), expected.snapshot()
    worst = 0.0 if (ours.seen == theirs.seen).all() and (ours.dropped == theirs.dropped).all() else np.inf
    for one, other in zip(ours.layers, theirs.layers, strict=True):
        if one.positions.shape != other.positions.shape or (one.positions != other.positions).any():
            return np.inf
        pairs = [(one.streams[key], value) for key, value in other.streams.items()]
        pairs += [(one.memory[key], value) for key, value in other.memory.items()]
        pairs += [(one.heads[key], value) for key, value in other.heads.items()]
        pairs += [(one.tables[key], value) for key, value in other.tables.items()]
        if other.queries is not None:
            pairs.append((one.queries, other.queries))
            worst = worst if (one.query_positions == other.query_positions).all() else np.inf
        worst = max([worst] + [drift(left, right) for left, right in pairs])
    return worst


@contextmanager
def unchecked() -> Iterator[None]:
    """No type checks inside: for long runs of what short ones have checked, and for arguments of a wrong type."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


@contextmanager
def compilations() -> Iterator[list[str]]:
    """The list receives the name of every event of XLA compiling something."""
    seen: list[str] = []
    _LISTENING.append(seen)
    try:
        yield seen
    finally:
        _LISTENING.remove(seen)


_LISTENING: list[list[str]] = []


def _hear(event: str, seconds: float, **facts: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        for seen in _LISTENING:
            seen.append(str(facts.get("fun_name", event)))


jax.monitoring.register_event_duration_secs_listener(_hear)
