"""Kept sets: every policy on both backends against the reference's decisions, replayed and running freely."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, ClassVar

import numpy as np
import pytest

from framework.backend import Model
from framework.cache import Decision
from framework.compare import SWAPS, TOLERANCE, drift, kept_agreement
from framework.errors import KvtwinError
from framework.policy import Needs, Policy, View, policies
from tests.twins import LENGTHS, TWINS, WINDOW, column, hybrid, prompts, snapshot_drift, texts, unchecked

EXACT = TOLERANCE["float64"]
STEPS = 200
MARKS = (0, 1, 7, 61, 140, STEPS)
SHORT = 25
CHECKED = 6  # steps that run under the type checker; the same code then runs without

# Fields are spelled so that the same text makes the policy on every backend.
# Long runs are of these; in `make test-slow` also of one example of each other, replayed or free in turns.
CORE = ("full", "h2o", "keep_it_odd", "key_norm", "random", "snapkv", "tova", "window")
EXAMPLES = [policies.spelling(one) for name in CORE for one in policies.get(name).examples()]
FIRST = [policies.spelling(policies.get(name).examples()[0]) for name in CORE]
OTHERS = [
    policies.spelling(policies.get(name).examples()[0]) for name in policies.names() if name not in CORE
]
# These look at nothing but positions: what the others show of the compiled step, they show again.
PLAIN = [one for one in EXAMPLES if one.startswith(("random", "window")) and "reposition" not in one]
BLIND = [*PLAIN, "full()", "keep_it_odd(budget=9)"]  # scores without rounding


def _cases(chosen: Sequence[str], later: Callable[[str, str], bool]) -> list[Any]:
    """(backend, policy) of these policies; `later` says which of them wait for make test-slow."""
    return [
        pytest.param(
            backend,
            policy,
            marks=[pytest.mark.slow]
            if later(backend, policy) or policy.partition("(")[0] not in CORE
            else [],
        )
        for backend in TWINS
        for policy in chosen
    ]


@dataclass(frozen=True)
class Recorded:
    """A run of the reference: decisions after the prompt and after each step, and at `MARKS` logits and snapshots."""

    decisions: list[list[Decision]]
    logits: dict[int, np.ndarray]
    caches: dict[int, Any]


@cache
def recorded(policy: str) -> Recorded:
    with unchecked():
        return _record(hybrid("reference"), policy)


def _record(model: Model, policy: str) -> Recorded:
    run = Recorded([[]], {}, {})
    run.logits[0], cached = model.step(
        prompts(), model.cache(policy, batch=len(LENGTHS)), decisions=run.decisions[0]
    )
    for step in range(STEPS + 1):
        if step in MARKS:
            run.caches[step] = cached.fork()
        if step == STEPS:
            return run
        run.decisions.append([])
        logits, cached = model.step(column(step), cached, decisions=run.decisions[-1])
        if step + 1 in MARKS:
            run.logits[step + 1] = logits
    raise AssertionError


@pytest.mark.parametrize(
    ("backend", "policy"), _cases([*EXAMPLES, *OTHERS[::2]], lambda backend, policy: False)
)
def test_replay_in_float64(backend: str, policy: str) -> None:
    """The reference's decisions are forced, so that each of the backend's own is taken over the same tokens."""
    _replay(backend, "float64", policy)


@pytest.mark.parametrize(
    ("backend", "policy"),
    _cases(EXAMPLES, lambda backend, policy: policy not in FIRST or (backend == "flax" and policy in BLIND)),
)
def test_replay_in_float32(backend: str, policy: str) -> None:
    """The same, against float64 decisions with the same weights: rounding may swap near ties."""
    _replay(backend, "float32", policy)


def _replay(backend: str, dtype: str, policy: str) -> None:
    expected = recorded(policy).decisions
    model, found = hybrid(backend, dtype), []
    cached = model.cache(policy, batch=len(LENGTHS))
    cached.expect(STEPS)
    for step, right in enumerate(expected, start=-1):
        found.append([])
        tokens = prompts() if step < 0 else column(step)
        forced = [one.kept for one in right] if right else None
        with unchecked() if step > CHECKED else nullcontext():
            _, cached = model.step(tokens, cached, logits=None, forced=forced, decisions=found[-1])
    agreement = kept_agreement(found, expected, TOLERANCE[dtype])
    assert agreement.decisions >= (STEPS // 5) * len(LENGTHS) * 2
    assert agreement.within(SWAPS[dtype]), agreement
    assert agreement.score_drift <= TOLERANCE[dtype]
    assert snapshot_drift(cached, recorded(policy).caches[STEPS]) <= TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("backend", "policy"),
    _cases([*EXAMPLES, *OTHERS[1::2]], lambda backend, policy: backend == "flax" and policy in PLAIN),
)
def test_free_run(backend: str, policy: str) -> None:
    """Decode as it is used, with each backend's own decisions: positions, keys, values, memory, logits."""
    run, model = recorded(policy), hybrid(backend)
    cached = model.cache(policy, batch=len(LENGTHS))
    cached.expect(STEPS)
    logits, cached = model.step(prompts(), cached)
    for step in range(STEPS + 1):
        if step in MARKS:
            assert drift(logits, run.logits[step]) <= EXACT
            assert snapshot_drift(cached, run.caches[step]) <= EXACT
        if step < STEPS:
            with unchecked() if step > CHECKED else nullcontext():
                logits, cached = model.step(column(step), cached)


def compacting(policy: Policy) -> Policy:
    """The same policy without the promise that lets decode overwrite the weakest slot."""
    kind = type(policy)
    made = dataclass(frozen=True, kw_only=True)(
        type(f"Compacting{kind.__name__}", (kind,), {"order_free": False, "__module__": __name__})
    )
    return made(**{one.name: getattr(policy, one.name) for one in fields(policy)})


OVERWRITING = [
    policies.spelling(one)
    for one in map(policies.make, EXAMPLES)
    if one.order_free and one.interval == 1 and one.evicts and not one.repositions
]


@pytest.mark.parametrize(
    ("backend", "policy"), _cases(OVERWRITING, lambda backend, policy: backend == "flax" and policy in PLAIN)
)
def test_overwrite_equals_compaction(backend: str, policy: str) -> None:
    """Decode by compaction ends in the state that the free runs above reach by overwriting."""
    model, twin = hybrid(backend), compacting(policies.make(policy))
    assert not twin.order_free
    _, cached = model.step(prompts(), model.cache(twin, batch=len(LENGTHS)))
    for step in range(max(MARKS[:4])):
        if step in MARKS:
            assert snapshot_drift(cached, recorded(policy).caches[step]) <= EXACT
        _, cached = model.step(column(step), cached)
    assert snapshot_drift(cached, recorded(policy).caches[max(MARKS[:4])]) <= EXACT


def _run(backend: str, policy: str | Policy, calls: list[tuple[np.ndarray, dict[str, Any]]]) -> Any:
    model = hybrid(backend)
    cached = model.cache(policy, batch=len(calls[0][0]))
    for tokens, options in calls:
        _, cached = model.step(tokens, cached, logits=None, **options)
    return cached


def _same(policy: str | Policy, backend: str, calls: list[tuple[np.ndarray, dict[str, Any]]]) -> Any:
    """The caches of backend and reference agree after these calls; returns the backend's."""
    found, expected = _run(backend, policy, calls), _run("reference", policy, calls)
    assert snapshot_drift(found, expected) <= EXACT
    return found


LEAST = {"h2o": 1, "key_norm": 1, "snapkv": 4, "window": 4}
SPELT = {"snapkv": "snapkv(budget={}, window=4, kernel=3)"}
PROMPT = WINDOW + 3  # so that the budgets about it are above the window
BUDGETS = [
    pytest.param(
        backend,
        name,
        budget,
        marks=[pytest.mark.slow] if backend == "flax" and name in ("key_norm", "window") else [],
    )
    for backend in TWINS
    for name, least in LEAST.items()
    for budget in (least, least + 1, PROMPT - 1, PROMPT, PROMPT + 1)
]


@pytest.mark.parametrize(("backend", "name", "budget"), BUDGETS)
def test_budgets_at_their_edges(backend: str, name: str, budget: int) -> None:
    """p, p + 1, and T - 1, T and T + 1 for a prompt of T tokens, which lie above the sliding window; some steps."""
    policy = SPELT.get(name, name + "(budget={})").format(budget)
    lengths = (PROMPT, 7)
    for steps in (0, 4):
        calls = [(prompts(lengths), {})] + [(column(step, lengths), {}) for step in range(steps)]
        cached = _same(policy, backend, calls)
        for kept, limit in zip(cached.kept, (budget, min(budget, WINDOW - 1)), strict=True):
            counts = (kept >= 0).sum(-1)
            seen = np.array(lengths)[:, None] + steps
            assert (counts == np.minimum(limit, seen)).all()


@pytest.mark.parametrize("backend", ["reference", *TWINS])
@pytest.mark.parametrize(("name", "least"), LEAST.items())
def test_a_budget_below_what_is_protected_is_refused(backend: str, name: str, least: int) -> None:
    policy = SPELT.get(name, name + "(budget={})").format(least - 1)
    with pytest.raises(KvtwinError, match=f"expected at least {least}"):
        hybrid(backend).cache(policy)


@pytest.mark.parametrize("policy", ["h2o(budget=(13, 6))", "window(budget=(5, 9), sinks=2, interval=3)"])
@pytest.mark.parametrize("backend", TWINS)
def test_budgets_per_layer(backend: str, policy: str) -> None:
    calls = [(prompts(), {})] + [(column(step), {}) for step in range(6)]
    cached = _same(policy, backend, calls)
    assert [kept.shape[-1] for kept in cached.kept] == list(policies.make(policy).budget)


@pytest.mark.parametrize(
    ("backend", "policy"),
    _cases([*EXAMPLES, *OTHERS[1::2]], lambda backend, policy: backend == "flax" and policy in PLAIN),
)
def test_a_finished_row_stays_as_it_is(backend: str, policy: str) -> None:
    """Bit for bit, memory and queries included, while others decode; then it goes on as if nothing had been."""
    going = np.array([True, False, True])[:, None]
    model = hybrid(backend)
    cached = model.cache(policy, batch=len(LENGTHS))
    cached.expect(STEPS)
    _, cached = model.step(prompts(), cached)
    calls = [(prompts(), {})] + [(column(step), {}) for step in range(2)]
    for tokens, _ in calls[1:]:
        _, cached = model.step(tokens, cached)
    before = cached.rows([1])
    for step in range(2, SHORT):
        calls.append((np.where(going, column(step), -1), {}))
        _, cached = model.step(calls[-1][0], cached)
    assert snapshot_drift(cached.rows([1]), before) == 0
    late = np.where(going, column(SHORT), texts()[1, LENGTHS[1] + 2])
    for tokens in (late, np.where(going, column(SHORT + 1), -1)):
        calls.append((tokens, {}))
        _, cached = model.step(tokens, cached)
    assert snapshot_drift(cached, _run("reference", policy, calls)) <= EXACT


@dataclass(frozen=True, kw_only=True)
class Fading(Policy):
    """Memory that changes at every call, also where a slot receives nothing."""

    memory: ClassVar[Mapping[str, float]] = {"mass": 0.25}
    order_free: ClassVar[bool] = True

    @property
    def needs(self) -> Needs:
        return Needs(sums=True)

    def note(self, view: View) -> Mapping[str, Any]:
        return {"mass": view.memory["mass"] * 0.5 + view.sums - 0.1}

    def score(self, view: View) -> Any:
        return view.memory["mass"] * view.memory["mass"]


@pytest.mark.parametrize("backend", TWINS)
def test_memory_of_a_row_without_tokens_does_not_change(backend: str) -> None:
    """The second chunk has none for the last row, which is evicted in that call by the memory it had."""
    tokens = prompts()
    calls = [(tokens[:, :25], {"phase": "prefill", "evict": False}), (tokens[:, 25:], {"phase": "prefill"})]
    calls += [(np.where([[True], [False], [step > 4]], column(step), -1), {}) for step in range(9)]
    _same(Fading(budget=9), backend, calls)


# Calls of decode that are not one token with an eviction


@pytest.mark.parametrize(
    ("backend", "policy"),
    _cases(
        ["h2o(budget=9)", "window(budget=8, interval=3)", "key_norm(budget=9)"],
        lambda backend, policy: backend == "flax" and "key_norm" in policy,
    ),
)
def test_decode_that_holds_back_evictions(backend: str, policy: str) -> None:
    """After several steps with evict=False, the next one evicts all that is too many."""
    calls = [(prompts(), {})] + [(column(step), {"evict": step not in (1, 2, 3)}) for step in range(8)]
    for count in (5, 6, len(calls)):
        _same(policy, backend, calls[:count])


@pytest.mark.parametrize(
    ("backend", "policy"),
    _cases(
        ["h2o(budget=9)", "h2o(budget=8, interval=4)", "window(budget=8, interval=3)"],
        lambda backend, policy: backend == "flax" and "window" in policy,
    ),
)
def test_decode_calls_of_many_tokens(backend: str, policy: str) -> None:
    """A second turn whose tokens come in one call, after which one row is silent while evictions fall due."""
    rows = texts()
    turn = np.stack([row[length : length + 11] for row, length in zip(rows, LENGTHS, strict=True)])
    calls = [(prompts(), {}), (turn, {})]
    calls += [(np.where([[True], [True], [False]], column(11 + step), -1), {}) for step in range(7)]
    many = np.stack([np.append(row[60:69], -1) for row in rows])
    many[2] = -1
    calls += [(many, {}), (np.where([[True], [True], [False]], column(40), -1), {}), (column(41), {})]
    for count in (2, 4, 6, len(calls)):
        _same(policy, backend, calls[:count])


@pytest.mark.parametrize("backend", TWINS)
def test_many_tokens_beside_a_silent_row_when_an_eviction_falls_due(backend: str) -> None:
    """The silent row holds more than the buffers usually have room for, and keeps it until its own next eviction."""
    rows = texts()
    turn = np.stack([row[length : length + 11] for row, length in zip(rows, LENGTHS, strict=True)])
    pair = np.stack([row[60:62] for row in rows])
    silent = np.array([[True], [True], [False]])
    calls = [(prompts(), {}), (turn, {})] + [(np.where(silent, pair, -1), {}) for _ in range(3)]
    found = _same("h2o(budget=8, interval=4)", backend, calls)
    assert (found.kept[0][2] >= 0).sum(-1).tolist() == [19, 19]
    assert (found.kept[0][0] >= 0).sum(-1).tolist() == [8, 8]
    _same("h2o(budget=8, interval=4)", backend, [*calls, *[(column(20 + step), {}) for step in range(4)]])
