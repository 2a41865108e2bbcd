"""experiments/pages/summary.py: rows to numbers, against loops that are plain enough to be believed."""

import math
from collections import Counter
from itertools import permutations
from statistics import fmean

import numpy as np
import pandas as pd
import pytest

from experiments.interval import interval, paired
from experiments.pages.palette import COLOURS, MARKERS, bounds, looks
from experiments.pages.summary import (
    CELL,
    Main,
    agreement,
    budget_label,
    cells,
    every_measure,
    failures,
    flagged,
    front,
    mains,
    pairs,
    pareto,
    provenance,
    slug,
    told_apart,
)
from experiments.question import Measure
from tests.results_frame import HOSTILE, POLICIES, PROVENANCE, QUESTIONS, SEEDS, results

SCORE = {question: Main("score", "higher") for question in (*QUESTIONS, "q()")}


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    return results()


def keyed(row):
    """The cell of a row, with None for NaN, so that it can be compared."""
    return tuple(
        None if isinstance(row[name], float) and math.isnan(row[name]) else row[name] for name in CELL
    )


def by_cell(frame):
    """The rows of each cell, gathered by hand."""
    found = {}
    for row in frame.to_dict("records"):
        found.setdefault(keyed(row), []).append(row)
    return found


def row(policy="a()", seed=0, score=0.5, budget=0.5, backend="torch", **more):
    """One row of a frame made by hand."""
    base = {
        "question": "q()",
        "task": "q",
        "model": "m",
        "weights": "w",
        "policy": policy,
        "method": policy.partition("(")[0],
        "budget": budget,
        "codec": "full()",
        "backend": backend,
        "dtype": "float32",
        "seed": seed,
        "measure.score": score,
        "context": 100,
        "requested": 50.0,
        "kept_min": 50,
        "kept_max": 50,
        "kept": 50.0,
        "payload": 10,
        "allocated": 20,
        "full": 30,
        "flags": (),
        "said": "x",
        "error": "",
    }
    return base | more


# Main measures


def test_the_main_measure_is_the_first_of_the_questions_own(frame):
    found = mains(frame)
    assert found["passkey(length=256)"] == Main("score", "higher", "share of answers", known=True)
    assert found["gone(length=9)"] == Main("score", "higher", "", known=False)


@pytest.mark.parametrize(("better", "sign"), [("higher", 1), ("lower", -1), (None, 0)])
def test_the_direction_comes_from_the_question(better, sign, monkeypatch):
    known = (Measure("absent", "higher"), Measure("loss", better, "nats"), Measure("score", "higher"))
    monkeypatch.setattr("experiments.pages.summary.declared", lambda question: known)
    main = mains(results(questions=QUESTIONS[:1], codecs=("full()",)))[QUESTIONS[0]]
    assert (main.name, main.better, main.sign, main.unit) == ("loss", better, sign, "nats")


def test_a_question_that_only_failed_still_has_a_main_measure():
    found = mains(results(questions=("passkey()", "gone()"), failures=1.0))
    assert found["passkey()"].name == "score"
    assert not found["gone()"].known


# Cells


def test_every_cell_is_there_once_with_the_mean_of_its_seeds(frame):
    by_hand, found = by_cell(frame), cells(frame, SCORE)
    assert [keyed(each) for each in found.to_dict("records")] == list(by_hand)
    assert len(found) == len(QUESTIONS) * 2 * 2 * (1 + 4 * (len(POLICIES) - 1))
    for one in found.to_dict("records"):
        rows = by_hand[keyed(one)]
        scores = [each["measure.score"] for each in rows if not each["error"]]
        assert one["n"] == len(scores)
        assert one["seeds"] == len(rows) == SEEDS
        assert one["failed"] == len(rows) - len(scores)
        assert one["mean"] == pytest.approx(fmean(scores))
        assert (one["low"], one["high"]) == pytest.approx(interval(scores)[1:])
        kept = [each["kept"] / each["context"] for each in rows if not each["error"]]
        assert one["share"] == pytest.approx(fmean(kept))
        assert one["kept_min"] == min(each["kept_min"] for each in rows if not each["error"])
        assert one["kept_max"] == max(each["kept_max"] for each in rows if not each["error"])
        assert one["allocated"] == pytest.approx(fmean(e["allocated"] for e in rows if not e["error"]))


def test_one_seed_has_no_interval_and_no_seed_no_mean():
    found = cells(pd.DataFrame([row("a()"), row("b()", score=math.nan)]), SCORE)
    one, none = found.to_dict("records")
    assert one["mean"] == 0.5
    assert math.isnan(one["low"])
    assert math.isnan(one["high"])
    assert none["n"] == 0
    assert math.isnan(none["mean"])


def test_a_failed_cell_stays_with_its_error():
    made = pd.DataFrame([row("a()", 0), row("a()", 1, math.nan, error="first"), row("b()", 0, error=HOSTILE)])
    found = cells(made, SCORE).set_index("policy")
    assert (found.loc["a()", "failed"], found.loc["a()", "error"]) == (1, "first")
    assert (found.loc["b()", "failed"], found.loc["b()", "error"]) == (1, HOSTILE)
    told = failures(made).set_index("policy")
    assert (told.loc["a()", "count"], told.loc["a()", "seeds"]) == (1, 2)
    assert told.loc["b()", "error"] == HOSTILE


def test_all_measures_are_listed_with_their_own_intervals(frame):
    by_hand, found = by_cell(frame), every_measure(frame)
    measured = {key for key, rows in by_hand.items() if any(not each["error"] for each in rows)}
    assert {(keyed(e), e["measure"]) for e in found.to_dict("records")} == {
        (key, name) for key in measured for name in ("score", "loss")
    }
    for one in found[found["measure"] == "loss"].to_dict("records"):
        losses = [each["measure.loss"] for each in by_hand[keyed(one)] if not each["error"]]
        assert (one["mean"], one["low"], one["high"]) == pytest.approx(interval(losses))


# Flags


@pytest.mark.parametrize("share", [0.0, 0.05, 0.9])
def test_flags_are_never_lost(share):
    made = results(flags=share, seed=5)
    by_hand, found, told = by_cell(made), cells(made, SCORE), flagged(made)
    for one in found.to_dict("records"):
        counted = Counter(flag for each in by_hand[keyed(one)] for flag in each["flags"])
        assert one["flags"] == tuple(sorted(counted))
        assert one["flagged"] == "; ".join(f"{flag} {counted[flag]}/{SEEDS}" for flag in sorted(counted))
    every = Counter(flag for flags in made["flags"] for flag in flags)
    assert told.groupby("flag")["count"].sum().to_dict() == dict(every)
    assert bool(len(told)) == bool(share)


def test_a_flagged_row_is_told_with_what_it_held_and_not_with_what_others_did():
    made = pd.DataFrame(
        [row(seed=0, kept=50.0), row(seed=1, kept=60.0, kept_max=61, flags=("missed_budget", "odd"))]
    )
    one, other = flagged(made).to_dict("records")
    assert (one["flag"], one["count"], one["seeds"], one["kept"]) == ("missed_budget", 1, 2, 60.0)
    assert (other["flag"], other["kept_max"]) == ("odd", 61)


# Pairs


def test_paired_differences_by_hand():
    """Seed 3 is missing on one side, seed 4 has no measure on the other: neither counts."""
    a = [row("a()", seed, score) for seed, score in ((0, 0.9), (1, 0.5), (2, 0.7), (3, 0.0), (4, 0.8))]
    b = [row("b()", seed, score) for seed, score in ((2, 0.1), (0, 0.5), (1, 0.3), (4, math.nan))]
    found = pairs(pd.DataFrame([*a, *b]), SCORE).set_index(["a", "b"])
    one = found.loc[("a()", "b()")]
    assert one["n"] == 3
    assert one["mean"] == pytest.approx((0.4 + 0.2 + 0.6) / 3)
    assert (one["low"], one["high"]) == pytest.approx(paired([0.9, 0.5, 0.7], [0.5, 0.3, 0.1])[1:])
    assert one["low"] >= 0.2
    assert one["excludes"]
    other = found.loc[("b()", "a()")]
    assert (other["mean"], other["low"], other["high"]) == (-one["mean"], -one["high"], -one["low"])
    assert other["excludes"]


def test_an_interval_around_zero_excludes_nothing():
    scores = [0.2, -0.2, 0.1, -0.1, 0.3, -0.3]
    made = [row("a()", seed, 0.5 + each) for seed, each in enumerate(scores)]
    made += [row("b()", seed, 0.5) for seed in range(6)]
    assert not pairs(pd.DataFrame(made), SCORE)["excludes"].any()


def test_equal_seeds_are_compared_and_never_other_budgets_or_setups(frame):
    """All pairs, by hand: same question, codec, backend and budget, a policy without a budget with each."""
    found = pairs(frame, SCORE)
    assert found["n"].min() >= 2
    lookup = {
        (
            e["question"],
            e["codec"],
            e["backend"],
            e["policy"],
            None if math.isnan(e["budget"]) else e["budget"],
        ): {}
        for e in frame.to_dict("records")
    }
    for e in frame.to_dict("records"):
        if not e["error"]:
            budget = None if math.isnan(e["budget"]) else e["budget"]
            lookup[e["question"], e["codec"], e["backend"], e["policy"], budget][e["seed"]] = e[
                "measure.score"
            ]
    for one in found.to_dict("records"):
        sides = [
            lookup[
                one["question"],
                one["codec"],
                one["backend"],
                one[side],
                None if one[side] == "full()" else one["budget"],
            ]
            for side in "ab"
        ]
        seeds = sorted(set(sides[0]) & set(sides[1]))
        assert one["n"] == len(seeds)
        assert one["mean"] == pytest.approx(fmean(sides[0][s] - sides[1][s] for s in seeds))
    combinations = len(QUESTIONS) * 2 * 2 * 4 * len(list(permutations(POLICIES, 2)))
    assert len(found) == combinations


@pytest.mark.parametrize(("better", "gain"), [("higher", 0.25), ("lower", -0.25), (None, 0.0)])
def test_a_gain_is_a_difference_for_the_better(better, gain):
    made = [row("a()", seed, 0.75) for seed in range(3)] + [row("b()", seed, 0.5) for seed in range(3)]
    found = pairs(pd.DataFrame(made), {"q()": Main("score", better)}).set_index("a")
    assert found.loc["a()", "gain"] == gain
    assert found.loc["a()", "mean"] == 0.25


def test_policies_without_budgets_alone_are_one_group():
    made = [row(policy, seed, budget=math.nan) for policy in ("a()", "b()") for seed in range(3)]
    found = pairs(pd.DataFrame(made), SCORE)
    assert len(found) == 2
    assert found["budget"].isna().all()


# Fronts


def brute_front(cost, value, sign):
    """A point is on the front if no other one is at least as good in both and better in one."""

    def beaten(i):
        return any(
            cost[j] <= cost[i]
            and sign * value[j] >= sign * value[i]
            and (cost[j] < cost[i] or sign * value[j] > sign * value[i])
            for j in range(len(cost))
            if not math.isnan(cost[j] + value[j])
        )

    return [not math.isnan(cost[i] + value[i]) and not beaten(i) for i in range(len(cost))]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("seed", range(40))
def test_the_front_is_that_of_brute_force(seed, sign):
    """Few different values, so that there are many ties, and some that are no numbers."""
    random = np.random.default_rng(seed)
    cost, value = (random.integers(0, 6, 23).astype(float) for _ in range(2))
    cost[random.integers(23)] = value[random.integers(23)] = math.nan
    found = pareto(cost, value, sign)
    assert found.tolist() == brute_front(cost.tolist(), value.tolist(), sign)
    assert found.any()


def test_no_front_without_a_better_side():
    assert not pareto([1.0, 2.0], [1.0, 2.0], 0).any()


def test_oracles_and_masked_cells_are_kept_off_the_front():
    made = [
        row("a()", payload=10, allocated=50, score=0.5),
        row("oracle_future()", payload=5, allocated=5, score=0.9),
        row("masked()", payload=6, allocated=90, score=0.8, flags=("masked",)),
        row("late()", payload=20, allocated=60, score=0.8, flags=("missed_budget",)),
    ]
    found = cells(pd.DataFrame(made), SCORE)
    assert found["method"][front(found, "payload", 1)].tolist() == ["a", "late"]
    assert found["method"][front(found, "allocated", 1)].tolist() == ["a", "late"]
    wide = found.assign(allocated=[50, 5, 40, 60])
    assert wide["method"][front(wide, "allocated", 1)].tolist() == ["masked"]


# Agreement


def test_agreement_by_hand():
    made = [row(seed=seed, score=0.5) for seed in range(4)]
    made += [
        row(seed=0, score=0.5, backend="flax"),
        row(seed=1, score=0.75, backend="flax", kept_max=51),
        row(seed=2, score=0.25, backend="flax", said="y"),
        row(seed=9, score=9.0, backend="flax", said="y"),
        row(seed=3, score=5.0, backend="flax", error="broke"),
        row("alone()", backend="flax"),
    ]
    (one,) = agreement(pd.DataFrame(made), SCORE).to_dict("records")
    assert (one["policy"], one["first"], one["second"], one["n"]) == ("a()", "flax", "torch", 3)
    assert (one["same_kept"], one["same_said"]) == pytest.approx((2 / 3, 2 / 3))
    assert one["largest"] == 0.25


def test_agreement_needs_no_cache_and_no_measure():
    nothing = {"kept": math.nan, "kept_min": math.nan, "kept_max": math.nan, "score": math.nan}
    made = [row(backend=backend, **nothing) for backend in ("torch", "flax")]
    (one,) = agreement(pd.DataFrame(made), SCORE).to_dict("records")
    assert one["same_kept"] == 1
    assert math.isnan(one["largest"])


# Words and looks


@pytest.mark.parametrize(
    ("budget", "label"),
    [(0.25, "25%"), (0.125, "12.5%"), (64.0, "64 tokens"), (1.0, "1 tokens"), (math.nan, "")],
)
def test_budgets_in_words(budget, label):
    assert budget_label(budget) == label


def test_provenance_is_gathered(frame):
    assert provenance(frame) == {name: [value] for name, value in PROVENANCE.items()}


def test_a_model_of_several_weights_is_told_apart():
    made = pd.DataFrame(
        [
            row(model="a", weights="123456789"),
            row(model="a", weights="abcdefghi"),
            row(model="b", weights="123456789"),
        ]
    )
    assert told_apart(made)["model"].tolist() == ["a 12345678", "a abcdefgh", "b"]


def test_file_names_are_plain():
    assert slug("niah(haystack='text') · ../x") == "niah-haystack-text-x"


def test_a_policy_looks_the_same_whatever_stands_beside_it_but_for_its_number():
    names = [f"p{number:02}()" for number in range(len(COLOURS) + 5)]
    found = looks([*names, "full()", "oracle_future()", *names])
    assert len({(each.colour, each.marker) for each in found.values()}) == len(found)
    assert {found[name].colour for name in names} == set(COLOURS)
    assert {each.marker for each in found.values()} <= set(MARKERS)
    assert not {found["full()"].colour, found["oracle_future()"].colour} & set(COLOURS)
    assert looks(reversed(names)) == {name: looks(names)[name] for name in names}


@pytest.mark.parametrize(
    ("values", "scale"),
    [([0.1, 0.9], "linear"), ([1e-4, 3.0], "log"), ([-2.0, 5.0], "linear"), ([7.0, 7.0], "linear")],
)
def test_axes_hold_their_values(values, scale):
    start, end, found = bounds([*values, math.nan])
    assert start < min(values)
    assert end > max(values)
    assert found == scale
    assert bounds([]) == (0.0, 1.0, "linear")
    assert bounds([0.0, 0.0]) == bounds([0.0, 1.0])
