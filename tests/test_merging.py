"""What merging wrappers make of keys, values and their thresholds in a model, each eviction counted again by loops."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from framework.cache import Cache, Decision
from framework.compare import TOLERANCE, drift
from framework.errors import KvtwinError
from framework.snapshot import LayerSnapshot
from tests.twins import WINDOW, column, hybrid, prompts, snapshot_drift

LENGTHS = (13, 16, 9)  # one compiled shape: flax lays prompts out in steps of 16 tokens
EXACT = TOLERANCE["float64"]
PLACES = [(layer, row, head) for layer in range(2) for row in range(3) for head in range(2)]
each_backend = pytest.mark.parametrize(
    "backend", ["reference", "torch", pytest.param("flax", marks=pytest.mark.slow)]
)

# Keys and values by position; who stays; what each has received; what was remembered. New keys and values, memory.
Rule = Callable[[dict, dict, list[int], list[int], dict, float | None], tuple[dict, dict, float | None]]


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other) / float(np.linalg.norm(one) * np.linalg.norm(other))


def averaged(source: dict[int, Any], weights: dict[int, dict[int, float]]) -> dict[int, Any]:
    return {
        at: sum(weight * source[other] for other, weight in own.items()) / sum(own.values())
        for at, own in weights.items()
    }


def d2o(beta: float) -> Rule:
    """Merged from a threshold on, with e for who stays and exp(cosine) for who goes."""

    def rule(
        keys: dict, values: dict, stays: list[int], goes: list[int], received: dict, old: float | None
    ) -> tuple[dict, dict, float | None]:
        weights = {at: {at: math.e} for at in stays}
        every = {at: {other: cosine(keys[at], keys[other]) for other in stays} for at in goes}
        if goes:
            mean = sum(max(one.values()) for one in every.values()) / len(goes)
            old = mean if old is None else beta * mean + (1 - beta) * old
            for at, own in every.items():
                target = max(own, key=lambda other: own[other])
                if own[target] >= old - 1e-6:
                    weights[target][at] = math.exp(own[target])
        return averaged(keys, weights), averaged(values, weights), old

    return rule


def kvmerger(threshold: float, sigma: float) -> Rule:
    """Each run of like neighbours goes into the most attended of it that stays."""

    def rule(
        keys: dict, values: dict, stays: list[int], goes: list[int], received: dict, old: float | None
    ) -> tuple[dict, dict, float | None]:
        weights = {at: {at: 1.0} for at in stays}
        run: list[int] = []
        runs = [run]
        for at in sorted([*stays, *goes]):
            if run and cosine(keys[at], keys[run[-1]]) <= threshold:
                run = []
                runs.append(run)
            run.append(at)
        for run in runs:
            pivots = [at for at in run if at in stays]
            for at in [at for at in run if at in goes and pivots]:
                pivot = max(pivots, key=lambda other: received[other])
                square = float(((keys[at] - keys[pivot]) ** 2).sum())
                weights[pivot][at] = math.exp(-square / 2 / sigma / sigma)
        return averaged(keys, weights), averaged(values, weights), None

    return rule


def tokens_of(layer: LayerSnapshot, row: int, head: int) -> dict[int, int]:
    """The place of each position that a head holds."""
    return {int(at): slot for slot, at in enumerate(layer.positions[row, head]) if at >= 0}


def check_layer(
    rule: Rule, before: LayerSnapshot, after: LayerSnapshot, place: tuple, seen: int, old: float | None
) -> tuple[float | None, int]:
    """What one head of one layer became at one eviction; returns what it is to remember, and how many tokens left."""
    layer, row, head = place
    was, now = tokens_of(before, row, head), tokens_of(after, row, head)
    streams = [before.streams[key][row, head] for key in ("keys", "values")]
    keys, values = ({at: x[slot] for at, slot in was.items()} for x in streams)
    living = [at for at in was if layer == 0 or at > seen - WINDOW]
    received = {
        at: float(x[row, head, slot])
        for key, x in before.memory.items()
        if key == "kvmerger_received"
        for at, slot in was.items()
    }
    goes = [at for at in living if at not in now]
    new_keys, new_values, new = rule(keys, values, list(now), goes, received, old)
    for key, expected in (("keys", new_keys), ("values", new_values)):
        for at, slot in now.items():
            assert drift(after.streams[key][row, head, slot], np.asarray(expected[at])) <= EXACT
    if "d2o_threshold" in after.heads:
        assert after.heads["d2o_begun"][row, head] == (new is not None)
        assert after.heads["d2o_threshold"][row, head] == pytest.approx(new or 0.0, abs=1e-9)
    return new, len(goes)


CASES = {
    "d2o(budget=5)": d2o(0.7),
    "d2o(budget=5, interval=2, beta=0.4, policy=adakv(policy=snapkv(window=2, kernel=3)))": d2o(0.4),
    "d2o(budget=12, beta=0.2, policy=key_norm())": d2o(0.2),  # one row is whole until it grows
    "kvmerger(budget=5, threshold=0.1, sigma=1.5)": kvmerger(0.1, 1.5),
    "kvmerger(budget=5, interval=2, threshold=-0.2, sigma=3, policy=pyramid(beta=3, policy=h2o()))": kvmerger(
        -0.2, 3
    ),
}


@each_backend
@pytest.mark.parametrize("policy", CASES)
def test_each_eviction_of_a_run_merges_by_the_rule(backend: str, policy: str) -> None:
    """Ragged prompts, then decode steps in some of which a row is silent; the second layer has a window."""
    model, remembered = hybrid(backend), dict.fromkeys(PLACES)
    cache, left = model.cache(policy, batch=3), 0
    for step in range(-1, 6):
        tokens = prompts(LENGTHS) if step < 0 else column(step, LENGTHS)
        if step == 3:
            tokens[1] = -1
        _, held = model.step(tokens, cache.fork(), evict=False)
        before, seen = held.snapshot().layers, held.seen
        _, cache = model.step(tokens, cache)
        after = cache.snapshot().layers
        for place in PLACES:
            remembered[place], count = check_layer(
                CASES[policy],
                before[place[0]],
                after[place[0]],
                place,
                int(seen[place[1]]),
                remembered[place],
            )
            left += count
    assert left > 30


KVMERGER = "kvmerger(budget=5, threshold=0.1, sigma=1.5, policy={})"


@pytest.mark.parametrize(
    ("backend", "policy"),
    [
        ("torch", "d2o(budget=5)"),
        ("torch", KVMERGER.format("h2o()")),
        ("flax", "d2o(budget=5, policy=h2o())"),
        pytest.param("flax", "d2o(budget=5)", marks=pytest.mark.slow),
        pytest.param("flax", KVMERGER.format("h2o()"), marks=pytest.mark.slow),
    ],
)
def test_merging_backends_agree_with_the_reference(backend: str, policy: str) -> None:
    """Thresholds and what was received too, after the decode steps and after another turn."""
    caches = []
    for name in ("reference", backend):
        model = hybrid(name)
        _, cache = model.step(prompts(LENGTHS), model.cache(policy, batch=3))
        for step in range(4):
            tokens = column(step, LENGTHS)
            tokens[2] = -1 if step == 1 else tokens[2]
            _, cache = model.step(tokens, cache)
        _, cache = model.step(prompts((7, 16, 3)), cache, phase="prefill")
        caches.append(cache)
    assert snapshot_drift(caches[1], caches[0]) <= EXACT


def replayed(backend: str, policy: str, sets: Sequence[Any] = ()) -> tuple[Cache, list[list[np.ndarray]]]:
    """A run with these kept sets, or with those that the policy chooses; and the sets."""
    model = hybrid(backend)
    cache, taken = model.cache(policy, batch=3), []
    for step in range(-1, 4):
        tokens = prompts(LENGTHS) if step < 0 else column(step, LENGTHS)
        decisions: list[Decision] = []
        forced = sets[step + 1] if sets else None
        _, cache = model.step(tokens, cache, decisions=decisions, forced=forced)
        taken.append([one.kept for one in decisions])
    return cache, taken


@each_backend
@pytest.mark.parametrize(
    "outer", ["d2o(budget=5, policy={})", KVMERGER, "merge(budget=5, policy={})", "cam(budget=5, policy={})"]
)
def test_a_recorded_run_replays_to_the_same_keys_and_values(backend: str, outer: str) -> None:
    """On another backend, and around a policy that would keep others: what merges follows from who stays."""
    record, sets = replayed("torch" if backend == "reference" else "reference", outer.format("h2o()"))
    cache, own = replayed(backend, outer.format("key_norm()"), sets)
    assert any(
        not np.array_equal(a, b) for x, y in zip(sets, own, strict=True) for a, b in zip(x, y, strict=True)
    )
    for one, other in zip(cache.snapshot().layers, record.snapshot().layers, strict=True):
        assert np.array_equal(one.positions, other.positions)
        for key, value in [*other.streams.items(), *other.heads.items()]:
            assert drift((one.streams | one.heads)[key], value) <= EXACT
        for key, value in one.memory.items():
            assert drift(value, other.memory[key]) <= EXACT
    plain, _ = replayed(backend, "h2o(budget=5)", sets)
    assert any(
        drift(one.streams["values"], other.streams["values"]) > 1e-3
        for one, other in zip(cache.snapshot().layers, plain.snapshot().layers, strict=True)
    )


@each_backend
def test_the_layers_of_d2o_get_what_their_attention_says(backend: str) -> None:
    """exp(-F) of the two layers, from what tokens received; the chunks of a prompt make no difference."""
    model = hybrid(backend)
    _, held = model.step(prompts(LENGTHS), model.cache("d2o(budget=7)", batch=3), evict=False)
    factors = np.zeros((2, 3))
    for layer, row in np.ndindex(2, 3):
        own = held.snapshot().layers[layer]
        variances = []
        for head in range(2):
            given = [
                own.memory["d2o_attended"][row, head, slot] for slot in tokens_of(own, row, head).values()
            ]
            assert len(given) == LENGTHS[row]
            variances.append(np.var(given, ddof=1))
        least, most = min(variances), max(variances)
        factors[layer, row] = sum((one - least) / (most - least + 1e-6) for one in variances) / 2
    _, cache = model.step(prompts(LENGTHS), model.cache("d2o(budget=7)", batch=3))
    budgets = np.array([each[:, 0] for each in cache.budgets])
    share = np.exp(-factors) / np.exp(-factors).sum(0) * 14
    assert (budgets.sum(0) == 14).all()
    assert (np.abs(budgets - share) < 1).all()
    _, parts = model.step(prompts(LENGTHS)[:, :6], model.cache("d2o(budget=7)", batch=3), evict=False)
    _, parts = model.step(prompts(LENGTHS)[:, 6:], parts, phase="prefill")
    assert snapshot_drift(parts, cache) <= EXACT


@pytest.mark.parametrize("backend", ["reference", "torch", "flax"])
@pytest.mark.parametrize("policy", ["merge(budget=9, policy=h2o())", "d2o(budget=9)", "kvmerger(budget=9)"])
def test_merging_into_quantised_slots_is_refused(backend: str, policy: str) -> None:
    with pytest.raises(
        KvtwinError, match=r"blends .* stored slots, and codec int8\(\) .* expected an exact one"
    ):
        hybrid(backend).cache(policy, "int8()")
    assert hybrid(backend).cache("h2o(budget=9)", "int8()").batch == 1
