"""Several policies in one, by phase or by layer, against each of them alone."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from experiments.checks.case import Step
from experiments.checks.outcome import remembered
from framework.errors import KvtwinError
from framework.policy import Policy, View, policies
from tests.trajectories import (
    BUDGET,
    CASE,
    INNER,
    best,
    four_layers,
    inner_judgement,
    kept,
    living,
    made,
    places,
    positions_of,
    ragged,
    refused,
    steps,
)

PAIRS = [(one, other) for one in INNER for other in INNER if one != other]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_prefill_decode_is_the_first_policy_until_the_prompt_ends(one, other):
    """The second one decides from then on as if it had been there from the start."""
    policy = made(f"prefill_decode(prefill={one}, decode={other})")
    first = steps(policies.make(one))[0]
    mine = steps(policy)
    assert (mine[0].outcome.kept == first.outcome.kept).all()
    inner = policies.make(other)
    memory: dict[str, Any] = {}
    for step in mine:
        alone = own_view(inner, step, memory)
        memory = by_place(inner, alone)
        if step.number:
            scores, protected = inner_judgement(inner, alone)
            for row, head in places(alone):
                own = living(alone, row, head)
                chosen = best(own, scores[row, head], protected[row, head], BUDGET)
                assert kept(step, row, head) == positions_of(alone, row, head, chosen)


def own_view(inner: Policy, step: Step, memory: dict[str, Any]) -> View:
    """The view of one policy alone, with what it remembers kept by hand: per position, or per head."""
    view, slots = step.view, {}
    for key, start in inner.memory.items():
        slots[key] = np.full(view.positions.shape, start)
        for place in np.argwhere(view.positions >= 0):
            row, head, slot = place.tolist()
            slots[key][row, head, slot] = memory.get(key, {}).get(
                (row, head, view.positions[row, head, slot]), start
            )
    heads = {
        key: memory.get(key, np.zeros((*view.positions.shape[:2], *shape)))
        for key, shape in inner.head_memory(CASE.layer).items()
    }
    asked = inner.needs.queries
    view = replace(
        view,
        memory=slots | heads,
        queries=view.queries[:, :, :, -asked:] if asked else None,
        query_positions=view.query_positions[:, -asked:] if asked else None,
    )
    return remembered(inner, view, step.block if inner.needs.stream else None)


def by_place(inner: Policy, view: View) -> dict[str, Any]:
    """The memory after a call: by row, head and position where it has a number per slot."""
    memory: dict[str, Any] = dict(view.memory)
    for key in inner.memory:
        memory[key] = {
            (row, head, view.positions[row, head, slot]): view.memory[key][row, head, slot]
            for row, head, slot in np.argwhere(view.positions >= 0).tolist()
        }
    return memory


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_per_layer_is_each_policy_in_its_own_layers(one, other):
    """The layer of the case is the second of two."""
    policy = made(f"per_layer(policies=({one}, {other}))")
    alone = steps(policies.make(other))
    for mine, its in zip(steps(policy), alone, strict=True):
        assert (mine.outcome.kept == its.outcome.kept).all()
    swapped = made(f"per_layer(policies=({other}, {one}))")
    for mine, its in zip(steps(swapped), steps(policies.make(one)), strict=True):
        assert (mine.outcome.kept == its.outcome.kept).all()


def test_per_layer_in_a_model():
    """Each layer keeps what a model under its policy alone would keep there, as long as the layers below agree."""
    model = four_layers()
    names = ["window(sinks=2)", "key_norm()", "window(sinks=2)", "h2o()"]
    policy = made(f"per_layer(budget=7, policies=({', '.join(names)}))")
    _, cache = model.step(ragged(30, 17), model.cache(policy, batch=2))
    for layer, spelling in enumerate(names):
        alone = replace(policies.make(spelling), budget=7)
        _, other = model.step(ragged(30, 17), model.cache(alone, batch=2))
        assert (cache.kept[layer] == other.kept[layer]).all()
    assert set(policy.head_memory(CASE.layer)) == set()
    assert set(policy.memory) == {"p2_mass"}


@pytest.mark.parametrize(
    ("spelling", "promises"),
    [
        ("prefill_decode(prefill=h2o(), decode=window())", {"order_free"}),
        ("prefill_decode(prefill=h2o(), decode=snapkv())", set()),
        ("prefill_decode(prefill=tova(), decode=tova())", {"order_free", "shared"}),
        ("prefill_decode(prefill=adakv(policy=h2o()), decode=h2o())", {"divides"}),
        ("per_layer(policies=(tova(), h2o()))", {"order_free"}),
        ("per_layer(policies=(tova(), chunked(policy=h2o())))", {"shared"}),
        (
            "per_layer(policies=(window(reposition=True), reposition(policy=h2o())))",
            {"repositions", "order_free"},
        ),
    ],
)
def test_several_promise_what_all_of_them_do(spelling, promises):
    policy = made(spelling)
    every = ("order_free", "shared", "divides", "repositions", "merges", "allocates")
    assert {each for each in every if getattr(policy, each)} == promises


def test_several_protect_the_most_of_any():
    policy = made("prefill_decode(prefill=snapkv(window=8), decode=h2o())")
    assert [policy.protects(budget) for budget in (8, 20)] == [8, 10]


@pytest.mark.parametrize(
    ("spelling", "words"),
    [
        ("prefill_decode(prefill=tova(), decode=h2o())", "it would find heads with different tokens"),
        ("prefill_decode(prefill=h2o(budget=3), decode=h2o())", "has its own budget"),
        ("prefill_decode(prefill=h2o(), decode=full())", "keeps every token"),
        (
            "prefill_decode(prefill=window(reposition=True), decode=h2o())",
            "some of its policies reposition and some do not",
        ),
        ("per_layer(policies=())", "policies=(); expected a tuple, one for each layer"),
    ],
)
def test_several_refuse(spelling, words):
    assert words in refused(spelling)


def test_per_layer_refuses_another_number_of_layers():
    policy = made("per_layer(budget=7, policies=(h2o(), h2o(), h2o()))")
    with pytest.raises(KvtwinError, match="per_layer has 3 policies; expected one for each of 4 layers"):
        four_layers().cache(policy)
