"""Budgets that a policy shares among layers, on the three implementations."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from framework.decode import Sampling
from framework.errors import KvtwinError
from framework.policy import Needs, Policy, View
from tests.hooked import KV_HEADS, LENGTHS, assert_same, begun, every_backend, fed, flax_later, held, tapped
from tests.twins import WINDOW, column, hybrid, prompts


@dataclass(frozen=True, kw_only=True)
class Allocating(Policy):
    """Layers share the budget by the mean length of their values, each at least 2; scores by position alone."""

    sinks: int = 1

    @property
    def allocates(self) -> bool:
        return True

    @property
    def order_free(self) -> bool:
        return True

    @property
    def needs(self) -> Needs:
        return Needs(values=True)

    def score(self, view: View) -> Any:
        return view.positions * 7 % 11

    def protected(self, view: View) -> Any:
        return view.filled & (view.positions < self.sinks)

    def protects(self, budget: int) -> int:
        return self.sinks

    def statistic(self, view: View) -> Any:
        xp = view.xp
        length = xp.sum(view.values * view.values, axis=-1)
        count = xp.sum(xp.astype(view.filled, length.dtype), axis=(1, 2))
        return xp.sum(xp.where(view.filled, length, 0.0), axis=(1, 2)) / count * (1 + view.layer)

    def allocate(self, statistics: np.ndarray, budgets: np.ndarray, seen: np.ndarray) -> np.ndarray:
        assert statistics.dtype == np.float64
        assert statistics.shape == budgets.shape == (2, len(seen))
        first = np.floor(budgets.sum(0) * statistics[0] / statistics.sum(0)).astype(np.int64)
        first = np.clip(first + seen % 3, 2, budgets.sum(0) - 2)
        return np.stack([first, budgets.sum(0) - first])


def shares(tokens: np.ndarray, budget: int) -> list[list[int]]:
    """The budgets of the two layers for each row, from the taps of one prefill."""
    taps, result = tapped(tokens), []
    for row in range(len(tokens)):
        columns = [column for column in range(tokens.shape[1]) if tokens[row, column] >= 0]
        means = []
        for layer in range(2):
            values = taps[f"layers.{layer}.attention.value"][row]
            lengths = [
                float(values[column, head] @ values[column, head]) for column in columns for head in range(2)
            ]
            means.append(sum(lengths) / len(lengths) * (1 + layer))
        first = int(2 * budget * means[0] / (means[0] + means[1])) + len(columns) % 3
        first = min(max(first, 2), 2 * budget - 2)
        result.append([first, 2 * budget - first])
    return result


@every_backend
def test_layers_get_what_allocate_gives_them(backend: str, tmp_path: Any) -> None:
    """Rows differ and equal each alone; decode, save and restore go on under the same budgets."""
    policy, model = Allocating(budget=5), hybrid(backend)
    expected = shares(prompts(LENGTHS), 5)
    assert len({tuple(row) for row in expected}) > 1
    cache = begun(backend, policy)
    assert_same(cache, begun("reference", policy))
    for step in (0, 1, 2, 4):
        cache = fed(backend, cache, range(int(cache.seen[0]) - LENGTHS[0], step))
        for index, kept in enumerate(cache.kept):
            assert cache.budgets[index].tolist() == [[row[index]] * KV_HEADS for row in expected]
            for row, length in enumerate(LENGTHS):
                most = min(expected[row][index], length + step, (10**6, WINDOW - 1)[index])
                assert [len(held(one)) for one in kept[row]] == [most] * KV_HEADS
        if step == 1:
            cache.save(tmp_path / "cache")
    assert_same(cache, begun("reference", policy, 4))
    assert_same(fed(backend, model.restore(tmp_path / "cache"), (1, 2, 3)), cache)
    for row in range(3):
        _, alone = model.step(prompts(LENGTHS)[row : row + 1], model.cache(policy), logits=None)
        assert_same(alone, begun(backend, policy).rows([row]))


@dataclass(frozen=True, kw_only=True)
class Plain(Policy):
    """The newest; promises what `flags` name and says nothing of how."""

    flags: tuple[str, ...] = ()

    allocates = property(lambda self: "allocates" in self.flags)
    merges = property(lambda self: "merges" in self.flags)
    needs = Needs(keys=True, values=True)

    def score(self, view: View) -> Any:
        return view.positions


@every_backend
def test_what_a_policy_leaves_out_changes_nothing(backend: str) -> None:
    """By default layers are alike and keep their own budget, and what stays is not blended with anything."""
    plain = Plain(budget=(5, 9), interval=2)
    for flag in ("allocates", "merges"):
        assert_same(
            begun(backend, Plain(budget=plain.budget, interval=2, flags=(flag,)), 3), begun(backend, plain, 3)
        )


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_forced_sets_may_be_as_large_as_what_is_allocated(backend: str) -> None:
    """Which is more than the policy's own budget; nothing above it."""
    policy, model, tokens = Allocating(budget=5), hybrid(backend), prompts(LENGTHS)
    largest = max(max(row) for row in shares(tokens, 5))
    newest = np.array([[range(length - largest, length)] * KV_HEADS for length in LENGTHS], np.int32)
    share = np.array(shares(tokens, 5))
    forced = [
        np.where(np.arange(largest) >= largest - share[:, index, None, None], newest, -1) for index in (0, 1)
    ]
    forced[1] = np.where(newest >= np.array(LENGTHS)[:, None, None] - WINDOW + 1, forced[1], -1)
    _, cache = model.step(tokens, model.cache(policy, batch=3), logits=None, forced=forced)
    for kept, wanted in zip(cache.kept, forced, strict=True):
        for ours, right in zip(kept.reshape(-1, kept.shape[-1]), wanted.reshape(-1, largest), strict=True):
            assert held(ours) == held(right)
    assert largest > 5
    forced[0] = np.array([[range(13)] * KV_HEADS] * 3, np.int32)
    with pytest.raises(KvtwinError, match=f"13 tokens; expected at most {share[:, 0].max()}"):
        model.step(tokens, model.cache(policy, batch=3), logits=None, forced=forced)


@every_backend
def test_a_chunked_prompt_is_allocated_at_its_end(backend: str) -> None:
    """Also where the decode loop, or a decode step, ends the prompt; and again where a second prompt follows."""
    policy, model, tokens = Allocating(budget=5), hybrid(backend), prompts(LENGTHS)
    waiting = begun(backend, policy, evict=False)
    assert waiting.pending
    assert all((budget == 5).all() for budget in waiting.budgets)
    right = begun("reference", policy)
    new, _, looped = model.decode(waiting.fork(), np.zeros((3, 701)), Sampling(), [], 2)
    for step in range(2):
        _, right = hybrid("reference").step(new[:, step : step + 1], right)
    assert_same(looped, right)
    more = np.concatenate([column(step, LENGTHS) for step in range(3)], axis=1)
    _, found = model.step(more, waiting.fork(), logits=None)
    _, right = hybrid("reference").step(more, begun("reference", policy, evict=False), logits=None)
    assert_same(found, right)
    both = np.concatenate([tokens, more], axis=1)
    assert [one[:, 0].tolist() for one in found.budgets] == np.transpose(shares(both, 5)).tolist()


@flax_later
def test_a_second_prompt_is_allocated_from_the_policys_own_budget(backend: str) -> None:
    model, policy = hybrid(backend), Growing(budget=5)
    cache = begun(backend, policy)
    for _ in range(2):
        assert [one.tolist() for one in cache.budgets] == [[[6, 6]] * 3, [[4, 4]] * 3]
        _, cache = model.step(column(0, LENGTHS), cache, logits=None, phase="prefill")


@dataclass(frozen=True, kw_only=True)
class Growing(Policy):
    """Moves one token from the second layer to the first, at each prompt."""

    @property
    def allocates(self) -> bool:
        return True

    def score(self, view: View) -> Any:
        return view.positions

    def statistic(self, view: View) -> Any:
        return view.xp.astype(view.seen, view.xp.float32)

    def allocate(self, statistics: np.ndarray, budgets: np.ndarray, seen: np.ndarray) -> np.ndarray:
        return budgets + np.array([[1], [-1]])


@dataclass(frozen=True, kw_only=True)
class Misallocating(Growing):
    """`allocate` or `statistic` gives what this names."""

    gives: str = "float"

    def protects(self, budget: int) -> int:
        return 3

    def statistic(self, view: View) -> Any:
        if self.gives == "statistic":
            return view.positions
        return view.seen

    def allocate(self, statistics: np.ndarray, budgets: np.ndarray, seen: np.ndarray) -> Any:
        return {
            "float": lambda: budgets * 1.0,
            "rows": lambda: budgets[:, :1],
            "list": lambda: [4, 4],
            "zero": lambda: budgets * 0,
            "few": lambda: np.full_like(budgets, 2),
            "raises": lambda: budgets[7],
        }[self.gives]()


@pytest.mark.parametrize(
    ("gives", "words"),
    [
        ("float", r"allocate returned float64 of shape \(2, 3\).*expected integers of shape \(2, 3\)"),
        ("rows", r"allocate returned int\d+ of shape \(2, 1\).*expected integers of shape \(2, 3\)"),
        ("list", r"allocate returned int\d+ of shape \(2,\).*expected integers of shape \(2, 3\)"),
        ("zero", r"allocate gave a head of layer 0 0 tokens; expected at least 3"),
        ("few", r"allocate gave a head of layer 0 2 tokens; expected at least 3: what it protects"),
        ("raises", r"failed in allocate.*IndexError"),
        ("statistic", r"statistic returned .*expected shape \(\d,\): one number per row"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_what_allocate_may_not_give_is_refused(backend: str, gives: str, words: str) -> None:
    with pytest.raises(KvtwinError, match=rf"policy tests.test_hooks_layer_budgets:Misallocating\(.*{words}"):
        begun(backend, Misallocating(budget=5, gives=gives))


@pytest.mark.parametrize(
    ("gives", "words"), [("statistic", "statistic returned .*one number per row"), ("zero", "allocate gave")]
)
def test_the_same_where_it_is_compiled(gives: str, words: str) -> None:
    with pytest.raises(KvtwinError, match=words):
        begun("flax", Misallocating(budget=5, gives=gives))


def test_a_budget_for_each_head_is_not_shared_among_layers() -> None:
    with pytest.raises(KvtwinError, match="allocates budgets to layers and has a budget for each head"):
        hybrid("reference").cache(Growing(budget=((3, 4), 5)))
