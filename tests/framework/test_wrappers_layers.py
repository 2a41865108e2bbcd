"""Wrappers that divide the budget of all layers, against plain loops: cake, d2o_layers."""

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from framework.policy import View
from tests.trajectories import (
    four_layers,
    living,
    made,
    noted_view,
    ragged,
    refused,
    steps,
)

# cake


def cake_preference(view: View, row: int, window: int) -> float:
    """H^(1 / 1.6) V^(1 / 0.4) of one layer of a row, query by query; 0 where there is nothing to judge by."""
    entropy = variance = 0.0
    first = int(view.seen[row]) - window
    asked = [number for number, at in enumerate(view.query_positions[row, -window:]) if at >= 0]
    queries = view.queries[row, :, :, -window:]
    for head, query_head in np.ndindex(queries.shape[:2]):
        own = living(view, row, head)
        given = []
        for number in asked:
            at = int(view.query_positions[row, -window:][number])
            seen = [slot for slot in own if view.positions[row, head, slot] <= at]
            logits = {
                slot: np.exp(
                    float(queries[head, query_head, number] @ view.keys[row, head, slot]) * view.scale
                )
                for slot in seen
            }
            total = sum(logits.values())
            given.append([logits[slot] / total for slot in seen if view.positions[row, head, slot] < first])
        entropy -= sum(weight * math.log(weight + 1e-10) for one in given for weight in one)
        for column in zip(*given, strict=True):
            mean = sum(column) / len(column)
            if len(column) > 1:
                variance += sum((weight - mean) ** 2 for weight in column) / (len(column) - 1)
    return entropy ** (1 / 1.6) * variance ** (1 / 0.4)


@pytest.mark.parametrize("window", [2, 4, 9])
@pytest.mark.parametrize("inner", ["snapkv(window=3, kernel=3)", "h2o()", "key_norm()"])
def test_cake_prefers_layers_whose_attention_is_spread_and_changes(inner, window):
    policy = made(f"cake(window={window}, policy={inner})")
    for step in steps(policy, budget=40):
        view = noted_view(policy, step)
        got = np.asarray(policy.statistic(view))
        for row, seen in enumerate(view.seen.tolist()):
            expected = cake_preference(view, row, window)
            if seen <= window:
                assert expected == 0
                assert got[row] == -1e9
            else:
                assert math.exp(got[row]) == pytest.approx(expected, rel=1e-9)


def proportional(weights: list[Fraction], total: int, low: int, high: int) -> list[Fraction]:
    """The factor between whose neighbouring breakpoints the sum is linear, solved exactly."""

    def bounded(factor: Fraction) -> list[Fraction]:
        return [min(max(factor * weight, Fraction(low)), Fraction(high)) for weight in weights]

    breaks = sorted({Fraction(bound) / weight for weight in weights for bound in (low, high)})
    for left, right in zip(breaks, breaks[1:], strict=False):
        a, b = sum(bounded(left)), sum(bounded(right))
        if a <= total <= b and a < b:
            return bounded(left + (right - left) * (total - a) / (b - a))
    return [Fraction(total, len(weights))] * len(weights)


@pytest.mark.parametrize("seed", range(40))
def test_cake_shares_out_the_whole_budget_in_proportion_between_the_bounds(seed):
    random = np.random.default_rng(seed)
    layers, budget, tokens = (
        int(random.integers(1, 7)),
        int(random.integers(3, 40)),
        int(random.integers(1, 90)),
    )
    policy = made("cake(policy=snapkv(window=3))")
    logs = random.normal(0, 2, (layers, 2))
    logs[:, 1] = -1e9  # a row without any preference
    given = policy.allocate(logs, np.full((layers, 2), budget), np.array([tokens, tokens]))
    weights = [Fraction(math.exp(one - logs[:, 0].max())) for one in logs[:, 0]]
    expected = proportional(weights, layers * budget, 3, max(3, tokens))
    assert given.dtype.kind == "i"
    assert given[:, 0].sum() == given[:, 1].sum() == layers * budget
    assert given.min() >= 3
    assert given[:, 1].max() - given[:, 1].min() <= 1
    assert all(abs(one - other) < 1 for one, other in zip(given[:, 0].tolist(), expected, strict=True))
    if layers * budget <= layers * max(3, tokens):
        assert given.max() <= max(3, tokens)


def test_cake_in_a_model_keeps_as_many_tokens_as_the_same_budget_for_all_layers():
    policy = made("cake(budget=8, window=4, policy=h2o())")
    for backend in ("reference", "torch"):
        model = four_layers(backend)
        _, cache = model.step(ragged(30, 17), model.cache(policy, batch=2))
        held = np.array([(positions >= 0).sum(-1) for positions in cache.kept])
        assert (held.sum(0) == 4 * 8).all()
        assert (held[:, :, 0] == held[:, :, 1]).all()
        assert len(set(held[:, 0, 0].tolist())) > 1
        for step in range(3):
            _, cache = model.step(np.array([[step], [step + 3]], np.int32), cache)
        after = np.array([(positions >= 0).sum(-1) for positions in cache.kept])
        assert (after == held).all()


@pytest.mark.parametrize(
    ("spelling", "words"),
    [
        ("cake(window=1, policy=h2o())", "window=1, tau1=1.6, tau2=0.4; expected at least 2 queries"),
        ("cake(tau2=0, policy=h2o())", "tau2=0"),
        (
            "cake(policy=adakv(policy=h2o()))",
            "cake shares the budget among layers, and adakv(policy=h2o()) divides",
        ),
        ("cake(policy=cake(policy=h2o()))", "divides it too; expected one of them"),
        ("adakv(policy=cake(policy=h2o()))", "allocates budgets to layers and divides them among heads"),
        ("per_layer(policies=(cake(policy=h2o()), h2o()))", "expected it around per_layer"),
    ],
)
def test_cake_refuses(spelling, words):
    assert words in refused(spelling)


# d2o_layers


@pytest.mark.parametrize("inner", ["snapkv(window=3, kernel=3)", "h2o()", "d2o(policy=key_norm())"])
def test_d2o_layers_measures_how_unevenly_tokens_are_attended_to(inner):
    policy = made(f"d2o_layers(policy={inner})")
    received: dict[tuple[int, int, int], float] = {}
    apart = 0
    for step in steps(policy, budget=40):
        view = noted_view(policy, step)
        got = np.asarray(policy.statistic(view))
        for row in range(3):
            variances = []
            for head in range(2):
                given = []
                for slot in living(view, row, head):
                    place = row, head, int(view.positions[row, head, slot])
                    received[place] = received.get(place, 0.0) + float(step.view.sums[row, head, slot])
                    given.append(received[place])
                mean = sum(given) / len(given)
                variances.append(sum((one - mean) ** 2 for one in given) / (len(given) - 1))
            least, most = min(variances), max(variances)
            scaled = [(one - least) / (most - least + 1e-6) for one in variances]
            assert got[row] == pytest.approx(sum(scaled) / 2, rel=1e-9)
            apart += abs(got[row] - 0.5) > 1e-5
    assert apart or len(received)


def test_d2o_layers_takes_no_pass_for_the_prompt():
    policy = made("d2o_layers(policy=kvzip(sinks=2))")
    view = replace(steps(policy)[1].view, phase="pass")
    assert (policy.note(view)["d2o_attended"] == view.memory["d2o_attended"]).all()
    assert (policy.note(replace(view, phase="decode"))["d2o_attended"] != view.memory["d2o_attended"]).any()


@pytest.mark.parametrize("seed", range(20))
def test_d2o_layers_shares_out_the_whole_budget_in_proportion(seed):
    random = np.random.default_rng(seed)
    layers, budget, tokens = (int(random.integers(*ends)) for ends in ((1, 7), (3, 40), (1, 90)))
    policy = made("d2o_layers(policy=snapkv(window=3))")
    factors = random.uniform(0, 1, (layers, 2))
    given = policy.allocate(factors, np.full((layers, 2), budget), np.array([tokens, 500]))
    for row, most in enumerate((max(3, tokens), 500)):
        weights = [Fraction(math.exp(-one)) for one in factors[:, row]]
        expected = proportional(weights, layers * budget, 3, most)
        assert given[:, row].sum() == layers * budget
        assert all(abs(one - other) < 1 for one, other in zip(given[:, row].tolist(), expected, strict=True))
        assert given[:, row].min() >= 3


@pytest.mark.parametrize(
    ("spelling", "words"),
    [
        (
            "d2o_layers(policy=adakv(policy=h2o()))",
            "d2o_layers shares the budget among layers, and adakv(policy=h2o()) divides",
        ),
        ("d2o_layers(policy=pyramid(policy=h2o()))", "divides it too; expected one of them"),
        ("d2o_layers(policy=cake(policy=h2o()))", "divides it too; expected one of them"),
        (
            "adakv(policy=d2o_layers(policy=h2o()))",
            "allocates budgets to layers and divides them among heads",
        ),
    ],
)
def test_d2o_layers_refuses(spelling, words):
    assert words in refused(spelling)
