"""Budgets that a policy divides among heads, on the three implementations."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from framework.cache import Decision
from framework.errors import KvtwinError
from framework.policy import Needs, Policy, View
from framework.spec import ModelSpec
from tests.hooked import BACKENDS, KV_HEADS, LENGTHS, Calls, assert_same, begun, every_backend, fed, held, run
from tests.twins import WINDOW, column, hybrid, prompts


@dataclass(frozen=True, kw_only=True)
class Dividing(Policy):
    """The head with the larger summed score gets 3 tokens more, the other 3 fewer."""

    @property
    def needs(self) -> Needs:
        return Needs(keys=True, values=True)

    @property
    def divides(self) -> bool:
        return True

    def score(self, view: View) -> Any:
        return view.xp.sum(view.keys * view.values, axis=-1)

    def budgets(self, view: View, scores: Any) -> Any:
        xp = view.xp
        total = xp.sum(xp.where(view.filled, scores, 0.0), axis=-1)
        richest = total == xp.max(total, axis=-1, keepdims=True)
        return view.budget + xp.astype(xp.where(richest, 3, -3), xp.int32)

    def most(self, budget: int, layer: int, spec: ModelSpec) -> int:
        return budget + 3


def chosen(decision: Decision, seen: Sequence[int], row: int, head: int, budget: int) -> list[int]:
    """The positions that the scores of a decision keep, by the rule, one head at a time."""
    window = (None, WINDOW)[decision.layer]
    positions, scores = decision.positions[row, head], decision.scores[row, head]
    living = [
        (scores[slot], position)
        for slot, position in enumerate(positions)
        if position >= 0 and (window is None or position > seen[row] - window)
    ]
    return sorted(int(position) for _, position in sorted(living)[-budget:])


def stepped(steps: int, lengths: Sequence[int] = LENGTHS) -> Calls:
    """The prompts and then single tokens."""
    return [(prompts(lengths), {})] + [(column(step, lengths), {}) for step in range(steps)]


@every_backend
def test_heads_keep_what_budgets_divides(backend: str) -> None:
    policy, model = Dividing(budget=6), hybrid(backend)
    cache, decisions = run(model, model.cache(policy, batch=3), stepped(3))
    given = set()
    for step, taken in enumerate(decisions):
        seen = [length + step for length in LENGTHS]
        for decision in taken:
            for row in range(3):
                total = [0.0, 0.0]
                for head, slot in np.ndindex(KV_HEADS, decision.positions.shape[-1]):
                    if decision.positions[row, head, slot] >= 0:
                        total[head] += decision.scores[row, head, slot]
                expected = [9, 3] if total[0] > total[1] else [3, 9]
                assert decision.budget[row].tolist() == expected
                given.add(tuple(expected))
                for head in range(KV_HEADS):
                    kept = chosen(decision, seen, row, head, expected[head])
                    assert held(decision.kept[row, head]) == kept
    assert given == {(9, 3), (3, 9)}
    assert [held(one) for one in cache.kept[0][0]] == [held(one) for one in decisions[-1][0].kept[0]]
    free = begun(backend, policy, 3)  # without decisions: the compiled step
    assert_same(free, begun("reference", policy, 3))
    assert_same(free, cache)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_forced_sets_of_other_sizes_per_head(backend: str) -> None:
    """What replay forces is kept, whatever the policy's own division, which is recorded."""
    policy = Dividing(budget=6)
    expected, right = run(hybrid("reference"), hybrid("reference").cache(policy, batch=3), stepped(3))
    calls = [
        (tokens, {"forced": [one.kept for one in taken]})
        for (tokens, _), taken in zip(stepped(3), right, strict=True)
    ]
    found, own = run(hybrid(backend), hybrid(backend).cache(policy, batch=3), calls)
    assert_same(found, expected)
    for ours, theirs in zip(own, right, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert (one.budget == other.budget).all()
    # The other head's sets are forced: the cache takes them, and the decision says what the policy itself chose.
    swapped = [one.kept[:, ::-1] for one in right[0]]
    model, taken = hybrid(backend), []
    _, cache = model.step(prompts(LENGTHS), model.cache(policy, batch=3), forced=swapped, decisions=taken)
    for kept, wanted, own_choice, decision in zip(cache.kept, swapped, taken, right[0], strict=True):
        for row, head in np.ndindex(3, KV_HEADS):
            assert held(kept[row, head]) == held(wanted[row, head])
            assert held(own_choice.kept[row, head]) == held(decision.kept[row, head])


@every_backend
def test_static_budgets_differ_by_head(backend: str, tmp_path: Any) -> None:
    policy = "h2o(budget=((3, 6), (5, 4)))"
    cache = begun(backend, policy, 3)
    for kept, budgets in zip(cache.kept, ((3, 6), (5, 4)), strict=True):
        assert ((kept >= 0).sum(-1) == np.array(budgets)).all()
    assert_same(cache, begun("reference", policy, 3))
    cache.save(tmp_path / "cache")
    again = hybrid(backend).restore(tmp_path / "cache")
    assert [one[0].tolist() for one in again.budgets] == [[3, 6], [5, 4]]
    assert_same(fed(backend, again.rows([2, 1, 0]).rows([2, 1, 0]), (3, 4)), begun("reference", policy, 5))
    with pytest.raises(
        KvtwinError, match="h2o.* has 3 budgets in layer 1; expected one, or one for each of 2"
    ):
        hybrid(backend).cache("h2o(budget=((3, 6), (5, 4, 4)))")


@dataclass(frozen=True, kw_only=True)
class Wrong(Policy):
    """`budgets` gives what this names."""

    gives: str = "float"

    @property
    def divides(self) -> bool:
        return True

    def score(self, view: View) -> Any:
        return view.positions

    def budgets(self, view: View, scores: Any) -> Any:
        xp = view.xp
        return {
            "float": lambda: xp.astype(view.budget, xp.float32),
            "number": lambda: 5,
            "raises": lambda: view.keys[0],
        }[self.gives]()


@every_backend
@pytest.mark.parametrize("gives", ["float", "number", "raises"])
def test_budgets_of_another_kind_are_refused(backend: str, gives: str) -> None:
    shape = r"\(1, 2\)" if backend == "reference" else r"\(3, 2\)"
    words = (
        "failed in budgets on"
        if gives == "raises"
        else f"budgets returned .*; expected int32 of shape {shape}"
    )
    with pytest.raises(KvtwinError, match=words):
        begun(backend, Wrong(budget=5, gives=gives))
