"""Prompts and some tokens more under a policy, and the rule in loops: what the tests of wrappers share."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from backends import backends
from experiments.checks.case import Case, Step, tiny_spec
from experiments.checks.outcome import remembered
from framework.errors import KvtwinError
from framework.eviction import check_policy, judge
from framework.policy import Policy, View, policies
from framework.weights import random_weights

# Five query heads share one of two kv heads; rows see 23, 20 and 7 tokens, heads hold others from the first step on.
CASE = Case(tokens=23, group=5, kv_heads=2, head_dim=4, steps=3)
INNER = ["snapkv(window=3, kernel=3)", "h2o", "key_norm", "expected_attention(sinks=2, future=7)"]
BUDGET = 11


def made(spelling: str) -> Any:
    """The policy, read back from its own spelling."""
    policy = policies.make(spelling)
    assert policies.make(policies.spelling(policy)) == policy
    return policy


def steps(policy: Policy, budget: int = BUDGET, window: int | None = None, case: Case = CASE) -> list[Step]:
    """A prompt and some tokens more: what the policy saw and decided."""
    return list(case.trajectory(replace(policy, budget=None, interval=1), budget, window))


def noted_view(policy: Policy, step: Step) -> View:
    """What `score` saw."""
    return remembered(policy, step.view, step.block)


def inner_judgement(inner: Policy, view: View) -> tuple[np.ndarray, np.ndarray]:
    """Scores and protected slots of the policy inside."""
    scores, protected = judge(inner, view)
    filled = view.positions >= 0
    return np.asarray(scores, np.float64), filled & (False if protected is None else np.asarray(protected))


def living(view: View, row: int, head: int) -> list[int]:
    """Slots that hold a token which later queries can see, oldest first."""
    seen, window = int(view.seen[row]), view.window
    return [
        slot
        for slot, position in enumerate(view.positions[row, head].tolist())
        if position >= 0 and (window is None or position > seen - window)
    ]


def best(slots: list[int], scores: np.ndarray, protected: np.ndarray, count: int) -> list[int]:
    """The slots that stay: the protected, then the higher score, then the newer token."""

    def key(slot: int) -> tuple[bool, float, int]:
        marked = bool(protected[slot])
        return marked, 0.0 if marked else float(scores[slot]), slot

    return sorted(slots, key=key, reverse=True)[:count]


def kept(step: Step, row: int, head: int) -> list[int]:
    return [position for position in step.outcome.kept[row, head].tolist() if position >= 0]


def positions_of(view: View, row: int, head: int, slots: list[int]) -> list[int]:
    return sorted(view.positions[row, head, slots].tolist())


def places(view: View) -> list[tuple[int, int]]:
    return list(np.ndindex(view.positions.shape[:2]))


def refused(spelling: str) -> str:
    """Why a policy cannot be made, or cannot be run."""
    with pytest.raises(KvtwinError) as error:
        check_policy(policies.make(spelling), tiny_spec())
    return str(error.value)


def four_layers(backend: str = "reference"):
    """A random model of four layers without windows."""
    spec = tiny_spec(4)
    spec = replace(spec, layers=tuple(replace(layer, window=None) for layer in spec.layers))
    return backends.get(backend).build(spec, random_weights(spec, seed=3), "float64")


def ragged(*lengths: int) -> np.ndarray:
    tokens = np.random.default_rng(11).integers(0, 29, (len(lengths), max(lengths)), dtype=np.int32)
    for row, length in enumerate(lengths):
        tokens[row, length:] = -1
    return tokens
