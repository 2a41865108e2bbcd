"""Every hook of the policy contract on the three implementations: toys whose values are counted again by plain loops."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from framework.backend import Cache, Decision, Model
from framework.compare import TOLERANCE, drift
from framework.policy import Needs, Policy, View
from tests.twins import WINDOW, column, hybrid, prompts, snapshot_drift, texts

BACKENDS = ("reference", "torch", "flax")
EXACT = TOLERANCE["float64"]
LENGTHS = (13, 16, 9)  # one compiled shape: flax lays prompts out in steps of 16 tokens
KV_HEADS, GROUP, DIM = 2, 3, 20
every_backend = pytest.mark.parametrize("backend", BACKENDS)

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


# Token ids.


def worth(token: int) -> int:
    """A number per token id that has nothing to do with its position."""
    return token * 37 % 101


@dataclass(frozen=True, kw_only=True)
class ByToken(Policy):
    """Scores by token id alone."""

    free: bool = True

    @property
    def order_free(self) -> bool:
        return self.free

    @property
    def needs(self) -> Needs:
        return Needs(tokens=True)

    def score(self, view: View) -> Any:
        assert view.tokens.dtype == view.xp.int32
        return view.tokens * 37 % 101


def best_by(
    worths: Callable[[int, int], float], budget: int, steps: int, window: int | None, interval: int = 1
) -> list[list[int]]:
    """What each row keeps of a score that never changes, one token at a time after the prompts."""
    result = []
    for row, length in enumerate(LENGTHS):
        own = list(range(length))
        for step in range(steps + 1):
            if step:
                own.append(length + step - 1)
            if step % interval == 0:
                living = [p for p in own if window is None or p > length + step - window]
                living.sort(key=lambda p: (worths(row, p), p))
                own = sorted(living[-budget:])
        result.append(own)
    return result


@every_backend
@pytest.mark.parametrize(
    "policy",
    [ByToken(budget=6), ByToken(budget=6, free=False, interval=3)],
    ids=["overwriting", "compacting"],
)
def test_token_ids_follow_their_slots(backend: str, policy: ByToken) -> None:
    rows = texts(len(LENGTHS))
    cache = begun(backend, policy)
    for steps in (0, 1, 8):
        cache = fed(backend, cache, range(cache.seen[0] - LENGTHS[0], steps))
        for layer, window in zip(cache.snapshot().layers, (None, WINDOW), strict=True):
            expected = best_by(lambda r, p: worth(int(rows[r, p])), 6, steps, window, policy.interval)
            for row, head in np.ndindex(len(LENGTHS), KV_HEADS):
                assert held(layer.positions[row, head]) == expected[row]
                count = len(expected[row])
                assert layer.memory["tokens"][row, head, :count].tolist() == rows[row, expected[row]].tolist()


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_token_ids_are_saved_and_the_reference_agrees(backend: str, tmp_path: Any) -> None:
    policy = ByToken(budget=6)
    cache = begun(backend, policy, 3)
    assert_same(cache, begun("reference", policy, 3))
    cache.save(tmp_path / "cache")
    again = hybrid(backend).restore(tmp_path / "cache")
    assert_same(again, cache, 0)
    assert_same(fed(backend, again, (3, 4)), begun("reference", policy, 5))
