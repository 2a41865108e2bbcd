"""What the tests of hooks share: caches of the hybrid model that policies have filled, compared in all they hold."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from framework.backend import Model
from framework.cache import Cache, Decision
from framework.compare import TOLERANCE, drift
from framework.policy import Policy
from tests.twins import column, hybrid, prompts, snapshot_drift

BACKENDS = ("reference", "torch", "flax")
EXACT = TOLERANCE["float64"]
LENGTHS = (13, 16, 9)  # one compiled shape: flax lays prompts out in steps of 16 tokens
KV_HEADS, GROUP, DIM = 2, 3, 20
every_backend = pytest.mark.parametrize("backend", BACKENDS)
# Where what is compiled shows nothing new, it waits for make test-slow.
flax_later = pytest.mark.parametrize(
    "backend", ["reference", "torch", pytest.param("flax", marks=pytest.mark.slow)]
)

Calls = Sequence[tuple[np.ndarray, dict[str, Any]]]


def run(model: Model, cache: Cache, calls: Calls) -> tuple[Cache, list[list[Decision]]]:
    """The cache after these calls, and the decisions of each."""
    decisions: list[list[Decision]] = []
    for tokens, options in calls:
        decisions.append([])
        _, cache = model.step(tokens, cache, logits=None, **(options | {"decisions": decisions[-1]}))
    return cache, decisions


def begun(
    backend: str, policy: str | Policy, steps: int = 0, lengths: Sequence[int] = LENGTHS, **options: Any
) -> Cache:
    """A cache that has seen the prompts, and then a token a step."""
    model = hybrid(backend)
    cache = model.cache(policy, batch=len(lengths))
    _, cache = model.step(prompts(lengths), cache, logits=None, **options)
    return fed(backend, cache, range(steps), lengths)


def fed(
    backend: str, cache: Cache, steps: Sequence[int], lengths: Sequence[int] = LENGTHS, silent: Any = ()
) -> Cache:
    """The cache after these decode steps; `silent` rows get no token."""
    for step in steps:
        tokens = column(step, lengths)
        tokens[list(silent)] = -1
        _, cache = hybrid(backend).step(tokens, cache, logits=None)
    return cache


def assert_same(found: Cache, expected: Cache, tolerance: float = EXACT) -> None:
    """The caches hold the same: tokens, streams, queries, memory per slot and per head, budgets, counters."""
    assert snapshot_drift(found, expected) <= tolerance
    ours, theirs = found.snapshot(), expected.snapshot()
    for one, other in zip(ours.layers, theirs.layers, strict=True):
        assert one.memory.keys() == other.memory.keys()
        assert one.heads.keys() == other.heads.keys()
        for key in other.heads:
            assert drift(one.heads[key], other.heads[key]) <= tolerance, key
    for mine, right in zip(ours.budgets, theirs.budgets, strict=True):
        assert (mine is None and right is None) or np.array_equal(mine, right)
    assert (ours.steps, ours.pending) == (theirs.steps, theirs.pending)


def held(kept: np.ndarray) -> list[int]:
    """The positions of one head without the empty places."""
    return [int(position) for position in kept if position >= 0]


def tapped(tokens: np.ndarray) -> dict[str, np.ndarray]:
    """The named values of one prefill of these tokens on the reference."""
    taps: dict[str, np.ndarray] = {}
    hybrid("reference").step(tokens, logits=None, taps=taps)
    return taps


def evicting(backend: str, cache: Cache, step: int) -> tuple[Any, Cache, Any]:
    """Each layer after a decode step that held its eviction back, the cache after the same step, and its decisions."""
    model, decisions = hybrid(backend), []
    _, before = model.step(column(step, LENGTHS), cache.fork(), evict=False)
    _, after = model.step(column(step, LENGTHS), cache, decisions=decisions)
    return before.snapshot().layers, after, decisions
