"""Wrappers that divide budgets by scores, against plain loops: adakv, critical, pyramid, threshold."""

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from experiments.checks.case import tiny_spec
from framework.eviction import judge
from framework.policy import View, policies
from tests.trajectories import (
    BUDGET,
    INNER,
    best,
    four_layers,
    inner_judgement,
    kept,
    living,
    made,
    noted_view,
    places,
    positions_of,
    ragged,
    refused,
    steps,
)

# adakv


def adakv_budgets(
    view: View, scores: np.ndarray, protected: np.ndarray, floor: str, budgets: np.ndarray, row: int
) -> list[int]:
    """Every head's safe tokens, then the best of all heads, until the layer's budget is spent."""
    heads = range(view.positions.shape[1])
    own = {head: living(view, row, head) for head in heads}
    safe = set()
    for head in heads:
        count = max(1, math.floor(Fraction(floor) * int(budgets[row, head])))
        first = best(own[head], scores[row, head], protected[row, head], count)
        safe |= {(head, slot) for slot in first}
        safe |= {(head, slot) for slot in own[head] if protected[row, head, slot]}
    total = int(budgets[row].sum())
    rest = [(head, slot) for head in heads for slot in own[head] if (head, slot) not in safe]
    rest.sort(key=lambda one: (float(scores[row, one[0], one[1]]), one), reverse=True)
    chosen = [*safe, *rest[: max(0, total - len(safe))]]
    return [sum(head == other for other, _ in chosen) for head in heads]


@pytest.mark.parametrize("floor", ["0", "0.2", "0.5", "0.7", "1"])
@pytest.mark.parametrize("inner", INNER)
def test_adakv_divides_the_layer_among_its_heads(inner, floor):
    policy = made(f"adakv(floor={floor}, policy={inner})")
    uneven = 0
    for step in steps(policy):
        view = noted_view(policy, step)
        scores, protected = inner_judgement(policy.policy, view)
        for row in range(len(view.positions)):
            expected = adakv_budgets(view, scores, protected, floor, view.budget, row)
            assert step.outcome.budget[row].tolist() == expected
            held = sum(len(living(view, row, head)) for head in range(2))
            assert sum(expected) == min(held, 2 * BUDGET)
            uneven += len(set(expected)) > 1
            for head, count in enumerate(expected):
                own = living(view, row, head)
                assert kept(step, row, head) == positions_of(
                    view, row, head, best(own, scores[row, head], protected[row, head], count)
                )
                assert count >= min(len(own), max(1, math.floor(Fraction(floor) * BUDGET)))
    assert uneven or floor == "1"


def test_adakv_gives_equal_scores_to_the_newer_token_and_the_later_head():
    """keep_it_odd has two scores only: 11 odd tokens in each head, 22 in both."""
    policy = made("adakv(floor=0.2, policy=keep_it_odd())")
    assert not policy.shared
    for step in steps(policy, budget=8):
        view = noted_view(policy, step)
        scores, protected = inner_judgement(policy.policy, view)
        for row in range(len(view.positions)):
            expected = adakv_budgets(view, scores, protected, "0.2", view.budget, row)
            assert step.outcome.budget[row].tolist() == expected
    first = steps(policy, budget=8)[0].outcome.budget[0].tolist()
    assert first == [5, 11]


@pytest.mark.parametrize(
    ("spelling", "words"),
    [
        ("adakv(floor=1.5, policy=h2o())", "floor=1.5; expected a share from 0 to 1"),
        (
            "adakv(policy=tova())",
            "keeps one set for all heads of a layer, and adakv gives each head a budget",
        ),
        ("adakv(policy=adakv(policy=h2o()))", "both divide the budget"),
        (
            "adakv(policy=h2o(budget=4))",
            "h2o(budget=4) inside adakv has its own budget; expected it on adakv",
        ),
        ("adakv(policy=h2o(interval=4))", "has its own interval"),
        ("adakv(policy=h2o(fraction=0.5))", "has its own fraction"),
        ("adakv(policy=full())", "full() inside adakv keeps every token"),
        ("adakv(budget=9)", "adakv needs policy"),
    ],
)
def test_adakv_refuses(spelling, words):
    assert words in refused(spelling)


# critical


def looped_norms(view: View, row: int, head: int) -> np.ndarray:
    """|W_o v|_1 per slot, the mean over the query heads of the group, number by number."""
    group, dim = view.output.shape[1], view.output.shape[3]
    norms = np.zeros(view.positions.shape[-1])
    for slot in range(len(norms)):
        total = 0.0
        for query_head in range(group):
            for channel in range(dim):
                total += abs(float(view.values[row, head, slot] @ view.output[head, query_head, :, channel]))
        norms[slot] = total / group
    return norms


def critical_kept(
    view: View,
    scores: np.ndarray,
    protected: np.ndarray,
    budget: int,
    share: int,
    row: int,
    head: int,
    epsilon: float = 1e-4,
) -> list[int]:
    """Positions that stay after both stages."""
    own = living(view, row, head)
    stage = set(best(own, scores[row, head], protected[row, head], share))
    norms = looped_norms(view, row, head)
    weighted = (scores[row, head] + epsilon) * norms
    forced = protected[row, head].copy()
    forced[list(stage)] = True
    rest = [slot for slot in own if not forced[slot]]
    chosen = [slot for slot in own if forced[slot]]
    return positions_of(
        view,
        row,
        head,
        chosen + best(rest, weighted, np.zeros_like(forced), max(0, budget - len(chosen))),
    )


@pytest.mark.parametrize(
    ("first", "epsilon"), [("0", 1e-4), ("0.25", 1e-4), ("0.5", 1e-4), ("1", 1e-4), ("0.25", 1.0)]
)
@pytest.mark.parametrize("inner", [*INNER, "random(seed=3)"])
def test_critical_has_two_stages(inner, first, epsilon):
    policy = made(f"critical(first={first}, epsilon={epsilon}, policy={inner})")
    share = max(1, math.floor(Fraction(first) * BUDGET)) if first != "0" else 0
    plain = 0
    for step in steps(policy):
        view = noted_view(policy, step)
        scores, protected = inner_judgement(policy.policy, view)
        for row, head in places(view):
            expected = critical_kept(view, scores, protected, BUDGET, share, row, head, epsilon)
            assert kept(step, row, head) == expected
            own = living(view, row, head)
            alone = best(own, scores[row, head], protected[row, head], BUDGET)
            plain += expected != positions_of(view, row, head, alone)
    assert (plain > 0) == (first != "1")


@pytest.mark.parametrize("inner", INNER)
def test_critical_around_adakv_gives_each_head_its_own_stages(inner):
    """The paper's form: the plain scores divide the budget."""
    policy = made(f"critical(policy=adakv(policy={inner}))")
    for step in steps(policy):
        view = noted_view(policy, step)
        scores, protected = inner_judgement(policies.make(inner), view)
        for row in range(len(view.positions)):
            budgets = adakv_budgets(view, scores, protected, "0.2", view.budget, row)
            assert step.outcome.budget[row].tolist() == budgets
            for head, budget in enumerate(budgets):
                share = max(1, budget // 2)
                expected = critical_kept(view, scores, protected, budget, share, row, head)
                assert kept(step, row, head) == expected


@pytest.mark.parametrize("inner", INNER)
def test_adakv_around_critical_keeps_the_first_stage_of_every_head(inner):
    policy = made(f"adakv(policy=critical(policy={inner}))")
    for step in steps(policy):
        view = noted_view(policy, step)
        scores, protected = inner_judgement(policies.make(inner), view)
        for row in range(len(view.positions)):
            held = sum(len(living(view, row, head)) for head in range(2))
            assert step.outcome.budget[row].sum() == min(held, 2 * BUDGET)
            for head in range(2):
                own = living(view, row, head)
                stage = best(own, scores[row, head], protected[row, head], BUDGET // 2)
                assert set(positions_of(view, row, head, stage)) <= set(kept(step, row, head))


@pytest.mark.parametrize(
    ("spelling", "words"),
    [
        ("critical(first=2, policy=h2o())", "first=2, epsilon=0.0001; expected a share from 0 to 1"),
        ("critical(epsilon=-1.0, policy=h2o())", "epsilon=-1.0"),
        ("critical(policy=tova())", "keeps one set for all heads"),
        ("critical(policy=chunked(policy=h2o()))", "keeps one set for all heads"),
    ],
)
def test_critical_refuses(spelling, words):
    assert words in refused(spelling)


# pyramid


def pyramid_budget(budget: int, prompt: int, beta: int, window: int, layer: int, layers: int) -> int:
    """The published line through exact fractions."""
    low = Fraction(budget, beta)
    high = 2 * budget - low
    if high >= prompt - window:
        high = Fraction(prompt - window)
        low = 2 * budget - high
    if not (prompt >= high >= low >= window) or layers == 1:
        return budget
    return math.floor(high - layer * (high - low) / (layers - 1) + Fraction(1, 2))


@pytest.mark.parametrize("beta", [1, 2, 7, 20])
@pytest.mark.parametrize(("inner", "window"), [("snapkv(window=3)", 3), ("h2o()", 1), ("window(sinks=2)", 2)])
def test_pyramid_gives_layers_what_lies_on_the_line(inner, window, beta):
    policy = made(f"pyramid(beta={beta}, policy={inner})")
    view = noted_view(policy, steps(policy)[0])
    lines = 0
    for layers in (1, 2, 3, 5, 32):
        spec = tiny_spec(layers)
        for layer in range(layers):
            for budget in range(window, 90, 7):
                for prompt in (0, 1, 9, 40, 77, 150, 400):
                    case = replace(
                        view,
                        layer=layer,
                        layers=layers,
                        budget=np.full((3, 2), budget, np.int32),
                        memory={**view.memory, "prompt": np.full((3, 2), float(prompt))},
                    )
                    expected = pyramid_budget(budget, prompt, beta, window, layer, layers)
                    given = policy.budgets(case, view.positions)
                    assert given.dtype == np.int32
                    assert given.tolist() == [[expected] * 2] * 3
                    assert expected <= policy.most(budget, layer, spec)
                    lines += expected != budget
    assert (lines > 100) == (beta > 1)  # with beta 1 the line is flat


def test_pyramid_keeps_the_mean_and_no_more_room_than_the_line_needs():
    policy = made("pyramid(beta=20, policy=snapkv(window=3))")
    for layers in (2, 5, 32):
        each = [pyramid_budget(128, 4000, 20, 3, layer, layers) for layer in range(layers)]
        assert each == sorted(each, reverse=True)
        assert abs(sum(each) - 128 * layers) <= layers / 2
        most = [policy.most(128, layer, tiny_spec(layers)) for layer in range(layers)]
        assert most == [max(128, one) for one in each]


@pytest.mark.parametrize(
    "inner", ["snapkv(window=2, kernel=3)", "h2o()", "expected_attention(sinks=2, future=7)"]
)
def test_pyramid_decodes_with_the_budgets_of_the_prompt(inner):
    """Four layers, rows of 30 and 12 tokens, one too short for the full line: kept then and six tokens later."""
    window = {"s": 2, "h": 1, "e": 2}[inner[0]]
    policy = made(f"pyramid(budget=8, beta=4, policy={inner})")
    model, tokens = four_layers(), ragged(30, 12)
    _, cache = model.step(tokens, model.cache(policy, batch=2))
    for step in range(7):
        for layer, positions in enumerate(cache.kept):
            for row, prompt in enumerate((30, 12)):
                expected = pyramid_budget(8, prompt, 4, window, layer, 4)
                assert ((positions[row] >= 0).sum(-1) == expected).all()
        _, cache = model.step(np.array([[step], [step + 3]], np.int32), cache)
    assert len({pyramid_budget(8, 30, 4, window, layer, 4) for layer in range(4)}) == 4


def test_pyramid_scores_and_protects_under_the_budget_of_the_layer():
    """h2o protects half of the layer's budget, not half of the mean."""
    policy = made("pyramid(beta=4, policy=h2o())")
    view = replace(noted_view(policy, steps(policy)[0]), layer=0)
    own = policy.budgets(view, view.positions)
    assert own[0].tolist() == [pyramid_budget(BUDGET, 23, 4, 1, 0, 2)] * 2
    assert own[0, 0] > BUDGET
    assert np.asarray(policy.protected(view)).sum(-1)[0].tolist() == [int(own[0, 0]) // 2] * 2


def test_adakv_divides_what_pyramid_gives_a_layer():
    policy = made("adakv(policy=pyramid(beta=4, policy=snapkv(window=2, kernel=3)))")
    assert policy.most(8, 0, tiny_spec(4)) == 2 * policy.policy.most(8, 0, tiny_spec(4))
    model = four_layers()
    _, cache = model.step(ragged(30, 17), model.cache(replace(policy, budget=8), batch=2))
    uneven = 0
    for layer, positions in enumerate(cache.kept):
        for row, prompt in enumerate((30, 17)):
            held = (positions[row] >= 0).sum(-1)
            assert held.sum() == 2 * pyramid_budget(8, prompt, 4, 2, layer, 4)
            uneven += held[0] != held[1]
    assert uneven


@pytest.mark.parametrize(
    ("spelling", "words"),
    [
        ("pyramid(beta=0, policy=h2o())", "beta=0; expected an integer >= 1"),
        (
            "pyramid(window=2, policy=snapkv(window=8))",
            "window=2; expected at least 8, what the policy inside",
        ),
        ("pyramid(policy=pyramid(policy=h2o()))", "both divide the budget"),
        ("pyramid(policy=adakv(policy=h2o()))", "both divide the budget"),
        ("pyramid(policy=tova())", "keeps one set for all heads of a layer, and pyramid gives each head"),
        ("protect(policy=pyramid(policy=h2o()))", "expected protect inside of it"),
    ],
)
def test_pyramid_refuses(spelling, words):
    assert words in refused(spelling)


# threshold


@pytest.mark.parametrize("least", [-2.0, 0.02, 0.3, 1e9])
@pytest.mark.parametrize("inner", INNER)
def test_threshold_keeps_what_reaches_it(inner, least):
    policy = made(f"threshold(least={least}, policy={inner})")
    for step in steps(policy):
        view = noted_view(policy, step)
        scores, protected = inner_judgement(policy.policy, view)
        for row, head in places(view):
            own = living(view, row, head)
            reach = [slot for slot in own if protected[row, head, slot] or scores[row, head, slot] >= least]
            chosen = best(reach, scores[row, head], protected[row, head], BUDGET)
            chosen = chosen or best(own, scores[row, head], protected[row, head], 1)
            assert kept(step, row, head) == positions_of(view, row, head, chosen)


def test_threshold_stays_within_the_budget_that_pyramid_gives():
    policy = made("threshold(least=-9.0, policy=pyramid(beta=4, policy=key_norm()))")
    view = noted_view(policy, steps(policy)[0])
    scores, _ = judge(policy, view)
    own, given = policy.policy.budgets(view, scores), policy.budgets(view, scores)
    for row, head in places(view):
        assert given[row, head] == min(own[row, head], len(living(view, row, head)))
    assert own.min() < BUDGET


@pytest.mark.parametrize(
    ("spelling", "words"),
    [
        ("threshold(policy=h2o())", "threshold needs least"),
        ("threshold(least=1, policy=adakv(policy=h2o()))", "both divide the budget"),
        ("threshold(least=1, policy=tova())", "threshold gives each head a budget of its own"),
    ],
)
def test_threshold_refuses(spelling, words):
    assert words in refused(spelling)
