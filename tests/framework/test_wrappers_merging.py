"""Wrappers that merge what goes into what stays, against plain loops: merge, cam, d2o, kvmerger."""

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from experiments.checks.case import Step
from framework.policy import View, policies
from framework.random import hash32
from tests.trajectories import (
    BUDGET,
    INNER,
    kept,
    living,
    made,
    noted_view,
    places,
    refused,
    steps,
)

# merge


def looped_merge(step: Step, view: View, row: int, head: int, threshold: float, share: str) -> np.ndarray:
    """Values of the kept slots, oldest first, after the evicted ones were blended in one by one."""
    stays = set(kept(step, row, head))
    own = living(view, row, head)
    place = {int(view.positions[row, head, slot]): slot for slot in own}
    inside = [place[position] for position in sorted(stays)]
    outside = [slot for slot in own if slot not in inside]
    keys, values = view.keys[row, head], view.values[row, head]
    cosine, target = {}, {}
    for slot in outside:
        every = {
            other: float(keys[slot] @ keys[other] / np.linalg.norm(keys[slot]) / np.linalg.norm(keys[other]))
            for other in inside
        }
        target[slot] = max(every, key=lambda other: every[other])
        cosine[slot] = every[target[slot]]
    if outside:
        count = 1 + math.floor(Fraction(share) * (len(outside) - 1))
        outside = sorted(outside, key=lambda slot: cosine[slot], reverse=True)[:count]
    blended = {slot: values[slot].copy() for slot in inside}
    total = dict.fromkeys(inside, 1.0)
    for slot in outside:
        if cosine[slot] < threshold:
            continue
        mine, its = np.linalg.norm(values[slot]), np.linalg.norm(values[target[slot]])
        weight = float(max(cosine[slot], 0.0) * mine / (mine + its + 1e-6))
        blended[target[slot]] += weight * values[slot]
        total[target[slot]] += weight
    return np.array([blended[slot] / total[slot] for slot in inside])


@pytest.mark.parametrize(("threshold", "share"), [(0.0, "1"), (0.6, "1"), (0.0, "0.5"), (0.3, "0.25")])
@pytest.mark.parametrize("inner", [*INNER, "adakv(policy=h2o())"])
def test_merge_blends_each_evicted_value_into_the_most_similar(inner, threshold, share):
    policy = made(f"merge(threshold={threshold}, share={share}, policy={inner})")
    plain = steps(policies.make(inner))
    changed = 0
    for step, alone in zip(steps(policy), plain, strict=True):
        view = noted_view(policy, step)
        assert step.number or (step.outcome.kept == alone.outcome.kept).all()
        keys, values = step.outcome.merged
        for row, head in places(view):
            stays = kept(step, row, head)
            slots = [view.positions[row, head].tolist().index(position) for position in stays]
            expected = looped_merge(step, view, row, head, threshold, share)
            np.testing.assert_allclose(values[row, head, : len(stays)], expected, rtol=1e-12, atol=1e-14)
            assert (keys[row, head, : len(stays)] == view.keys[row, head, slots]).all()
            assert (values[row, head, len(stays) :] == 0).all()
            changed += np.abs(expected - view.values[row, head, slots]).max() > 1e-3
    assert changed > 3


def test_merge_takes_nothing_from_tokens_that_a_window_has_left():
    policy = made("merge(policy=key_norm())")
    for step in steps(policy, budget=4, window=6):
        view = noted_view(policy, step)
        for row, head in places(view):
            expected = looped_merge(step, view, row, head, 0.0, "1")
            values = step.outcome.merged[1][row, head, : len(expected)]
            np.testing.assert_allclose(values, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("spelling", "words"),
    [
        (
            "merge(share=0, policy=h2o())",
            "threshold=0.0, share=0; expected a cosine from 0 to 1, and a share above 0",
        ),
        ("merge(threshold=-0.5, policy=h2o())", "threshold=-0.5"),
        ("merge(policy=merge(policy=h2o()))", "both merge; expected one of them"),
        ("merge(policy=window(reposition=True))", "repositions and merges keys"),
    ],
)
def test_merge_refuses(spelling, words):
    assert words in refused(spelling)


# cam


@pytest.mark.parametrize(("span", "seed"), [(1, 0), (3, 5), (32, 1)])
@pytest.mark.parametrize("inner", [*INNER, "adakv(policy=key_norm())", "random(seed=2)"])
def test_cam_shares_an_evicted_value_out_among_those_that_follow(inner, span, seed):
    policy = made(f"cam(span={span}, seed={seed}, policy={inner})")
    received: dict[tuple[int, int, int], float] = {}
    merged = dropped = 0
    # Budgets of 5 and 11, and a step without any eviction before: several tokens leave at once.
    for step in [*steps(policy), *steps(policy, budget=5)]:
        if step.number == 0:
            received = {}
        view = noted_view(policy, step)
        for row, head in places(view):
            positions = view.positions[row, head].tolist()
            own = living(view, row, head)
            for slot in own:
                place = (row, head, positions[slot])
                received[place] = received.get(place, 0.0) + float(step.view.sums[row, head, slot])
                assert view.memory["cam_received"][row, head, slot] == pytest.approx(
                    received[place], rel=1e-12
                )
            inside = [positions.index(position) for position in kept(step, row, head)]
            values = {slot: view.values[row, head, slot].copy() for slot in inside}
            for slot in own:
                if slot in inside or step.number == 0:
                    continue
                after = [other for other in inside if other > slot][:span]
                dropped += 1
                if not after:
                    continue
                mean = sum(received[row, head, positions[other]] for other in after) / len(after)
                draw = int(hash32(np, seed, 1, head, np.array([positions[slot]], np.int32))[0]) / 2**24
                if draw < min(1.0, received[row, head, positions[slot]] / mean):
                    merged += 1
                    for other in after:
                        values[other] += view.values[row, head, slot] / len(after)
            got_keys, got = (one[row, head, : len(inside)] for one in step.outcome.merged)
            np.testing.assert_allclose(got, [values[slot] for slot in inside], rtol=1e-12, atol=1e-14)
            assert (got_keys == view.keys[row, head, inside]).all()
    assert 0 < merged <= dropped


def test_cam_merges_with_the_chance_that_the_attention_gives():
    """Of 300 tokens with half the attention of what follows them, half are merged; with more than it, all."""
    policy = made("cam(span=2, policy=h2o())")
    base = noted_view(policy, steps(policy)[1])
    shape = (1, 300, 4)
    random = np.random.default_rng(1)
    view = replace(
        base,
        positions=np.broadcast_to(np.array([3, 5, 8, 9], np.int32), shape),
        seen=np.array([10], np.int32),
        question=base.question[:1],
        budget=np.full((1, 300), 2, np.int32),
        sums=np.zeros(shape),
        keys=random.standard_normal((*shape, 4)),
        values=np.ones((*shape, 4)),
        memory={
            "cam_received": np.broadcast_to(np.array([0.5, 2.0, 1.0, 1.0]), shape),
            "mass": np.zeros(shape),
        },
    )
    index = np.broadcast_to(np.array([2, 3, -1], np.int32), (1, 300, 3))
    _, values, _ = policy.merge(view, index)
    # 1 + 1 / 2 from position 5, and for half of the heads 1 / 2 from position 3.
    assert set(np.unique(values[0, :, :2]).tolist()) == {1.5, 2.0}
    assert abs((values[0, :, 0, 0] == 2.0).mean() - 0.5) < 5 * 0.5 / 300**0.5


@pytest.mark.parametrize(
    ("spelling", "words"),
    [
        ("cam(span=0, policy=h2o())", "span=0; expected at least 1 token"),
        ("cam(policy=merge(policy=h2o()))", "both merge; expected one of them"),
        ("reposition(policy=cam(policy=h2o()))", "repositions and merges keys"),
    ],
)
def test_cam_refuses(spelling, words):
    assert words in refused(spelling)


# d2o


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other) / float(np.linalg.norm(one) * np.linalg.norm(other))


def slots_of(step: Step, view: View, row: int, head: int) -> tuple[list[int], list[int]]:
    """Slots that stay, and living slots that do not, oldest first."""
    stays, own = set(kept(step, row, head)), living(view, row, head)
    inside = [slot for slot in own if int(view.positions[row, head, slot]) in stays]
    return inside, [slot for slot in own if slot not in inside]


def looped_d2o(
    keys: np.ndarray,
    values: np.ndarray,
    inside: list[int],
    outside: list[int],
    old: float | None,
    beta: float,
) -> tuple[list[Any], list[Any], float | None, int]:
    """Keys and values of those inside after each of the others was merged or dropped, the threshold, and the drops."""
    closest = {slot: max((cosine(keys[slot], keys[other]), -other) for other in inside) for slot in outside}
    if not outside:
        return [keys[slot] for slot in inside], [values[slot] for slot in inside], old, 0
    mean = sum(one for one, _ in closest.values()) / len(outside)
    threshold = mean if old is None else beta * mean + (1 - beta) * old
    merged = {slot for slot, (one, _) in closest.items() if one >= threshold - 1e-6}
    new: tuple[list[Any], list[Any]] = ([], [])
    for slot in inside:
        weights = {slot: math.e} | {
            other: math.exp(closest[other][0]) for other in merged if -closest[other][1] == slot
        }
        total = sum(weights.values())
        for source, result in zip((keys, values), new, strict=True):
            result.append(sum(weight / total * source[other] for other, weight in weights.items()))
    return *new, threshold, len(outside) - len(merged)


AROUND = [*INNER, "adakv(policy=h2o())", "pyramid(beta=3, policy=h2o())", "threshold(least=1, policy=h2o())"]


@pytest.mark.parametrize("beta", [0.7, 0.25])
@pytest.mark.parametrize("inner", [*AROUND, "d2o_layers(policy=h2o())"])
def test_d2o_merges_what_reaches_a_moving_threshold(inner, beta):
    policy = made(f"d2o(beta={beta}, policy={inner})")
    moved = changed = dropped = 0
    # A budget that leaves a row whole until it grows; several tokens at once only at the prompt.
    for budget, window in ((BUDGET, None), (7, None), (6, 9)):
        plain = steps(policies.make(inner), budget, window)
        thresholds: dict[tuple[int, int], float | None] = {}
        for step, alone in zip(steps(policy, budget, window), plain, strict=True):
            assert (step.outcome.kept == alone.outcome.kept).all()
            view = noted_view(policy, step)
            for row, head in places(view):
                inside, outside = slots_of(step, view, row, head)
                before = thresholds.get((row, head))
                keys, values, after, lost = looped_d2o(
                    view.keys[row, head], view.values[row, head], inside, outside, before, beta
                )
                thresholds[row, head] = after
                for got, expected in zip(step.outcome.merged, (keys, values), strict=True):
                    np.testing.assert_allclose(
                        got[row, head, : len(inside)], expected, rtol=1e-12, atol=1e-14
                    )
                    assert (got[row, head, len(inside) :] == 0).all()
                assert step.outcome.heads["d2o_begun"][row, head] == (after is not None)
                assert step.outcome.heads["d2o_threshold"][row, head] == pytest.approx(
                    after or 0.0, rel=1e-12
                )
                moved += before is not None and before != after
                dropped += lost
                changed += np.abs(np.array(values) - view.values[row, head, inside]).max() > 1e-3
    assert min(moved, changed, dropped) > 3


def test_d2o_merges_all_where_all_keys_are_alike():
    """Rounding of their mean leaves none below the threshold."""
    policy = made("d2o(policy=h2o())")
    base = noted_view(policy, steps(policy)[0])
    random = np.random.default_rng(4)
    slots, heads = 57, 40
    shape = (1, heads, slots)
    keys = np.broadcast_to(random.standard_normal((1, heads, 1, 4)), (*shape, 4)).astype(np.float32)
    memory = {"d2o_threshold": np.ones(shape[:2], np.float32), "d2o_begun": np.ones(shape[:2], np.float32)}
    view = replace(
        base, positions=np.broadcast_to(np.arange(slots, dtype=np.int32), shape), seen=np.array([slots], np.int32),
        question=base.question[:1],
        keys=keys, values=np.ones((*shape, 4), np.float32) * np.arange(slots, dtype=np.float32)[:, None],
        memory=memory, budget=np.ones(shape[:2], np.int32), sums=None,
    )  # fmt: skip
    for number in range(3):
        begun = np.full(shape[:2], number % 2, np.float32)
        index = np.broadcast_to(np.array([3, -1], np.int32), (1, heads, 2))
        _, values, heads_memory = policy.merge(replace(view, memory=memory | {"d2o_begun": begun}), index)
        np.testing.assert_allclose(values[:, :, 0], (slots - 1) / 2, rtol=1e-5)
        np.testing.assert_allclose(heads_memory["d2o_threshold"], 1, rtol=1e-6)


def test_d2o_is_the_whole_method_by_default():
    policy = made("d2o(budget=64)")
    assert policies.spelling(replace(policy, policy=made("d2o_layers(policy=h2o())"))) == "d2o(budget=64)"
    assert policy.allocates
    assert policy.merges
    assert not policy.order_free


@pytest.mark.parametrize(
    ("spelling", "words"),
    [
        ("d2o(beta=-0.1)", "d2o has beta=-0.1; expected a share from 0 to 1"),
        ("d2o(beta=1.5, policy=h2o())", "beta=1.5"),
        ("d2o(policy=kvmerger())", "both merge; expected one of them"),
        ("d2o(policy=window(reposition=True))", "repositions and merges keys"),
        ("adakv(policy=d2o())", "allocates budgets to layers and divides them among heads"),
        ("pyramid(policy=d2o())", "allocates budgets to layers and divides them among heads"),
        ("per_layer(policies=(d2o(), h2o()))", "expected it around per_layer"),
    ],
)
def test_d2o_refuses(spelling, words):
    assert words in refused(spelling)


# kvmerger


def looped_kvmerger(
    keys: np.ndarray, values: np.ndarray, inside: list[int], outside: list[int], received: dict[int, float],
    threshold: float, sigma: float,
) -> tuple[list[Any], list[Any], int]:  # fmt: skip
    """Keys and values of those inside after each of the others went into its set's pivot, and how many did."""
    own = sorted([*inside, *outside])
    sets: list[list[int]] = []
    for slot in own:
        near = sets and sets[-1][-1] == slot - 1 and cosine(keys[slot], keys[slot - 1]) > threshold
        if near:
            sets[-1].append(slot)
        else:
            sets.append([slot])
    weights = {slot: {slot: 1.0} for slot in inside}
    for each in sets:
        staying = [slot for slot in each if slot in inside]
        if staying:
            pivot = max(staying, key=lambda slot: (received[slot], -slot))
            for slot in each:
                if slot in outside:
                    far = float(np.linalg.norm(keys[slot] - keys[pivot]))
                    weights[pivot][slot] = math.exp(-(far**2) / (2 * sigma**2))
    new: tuple[list[Any], list[Any]] = ([], [])
    for slot in inside:
        total = sum(weights[slot].values())
        for source, result in zip((keys, values), new, strict=True):
            result.append(sum(weight / total * source[other] for other, weight in weights[slot].items()))
    return *new, sum(len(one) for one in weights.values()) - len(inside)


@pytest.mark.parametrize(("threshold", "sigma"), [(-0.3, 2), (0.2, 0.7), (0.6, 5.0)])
@pytest.mark.parametrize("inner", [*AROUND, "noncausal_attention()", "d2o_layers(policy=h2o())"])
def test_kvmerger_merges_a_run_of_like_keys_into_its_most_attended(inner, threshold, sigma):
    policy = made(f"kvmerger(threshold={threshold}, sigma={sigma}, policy={inner})")
    merged = dropped = 0
    for budget, window in ((BUDGET, None), (5, None), (6, 9)):
        received: dict[tuple[int, int, int], float] = {}
        plain = steps(policies.make(inner), budget, window)
        for step, alone in zip(steps(policy, budget, window), plain, strict=True):
            assert (step.outcome.kept == alone.outcome.kept).all()
            assert not step.outcome.heads
            view = noted_view(policy, step)
            for row, head in places(view):
                inside, outside = slots_of(step, view, row, head)
                own = {}
                for slot, position in enumerate(view.positions[row, head].tolist()):
                    if position >= 0:
                        place = row, head, position
                        received[place] = received.get(place, 0.0) + float(step.view.sums[row, head, slot])
                        own[slot] = received[place]
                keys, values, count = looped_kvmerger(
                    view.keys[row, head], view.values[row, head], inside, outside, own, threshold, sigma
                )
                for got, expected in zip(step.outcome.merged, (keys, values), strict=True):
                    np.testing.assert_allclose(
                        got[row, head, : len(inside)], expected, rtol=1e-12, atol=1e-14
                    )
                    assert (got[row, head, len(inside) :] == 0).all()
                merged, dropped = merged + count, dropped + len(outside) - count
    assert merged > 3
    assert dropped > 3


def test_kvmerger_leaves_the_scorer_its_own_memory():
    """`noncausal_attention` remembers under the name that `cam` once used for what a token received."""
    for outer in ("cam", "kvmerger"):
        policy = made(f"{outer}(policy=noncausal_attention())")
        assert set(policy.memory) == {"received", f"{outer}_received"}


def test_kvmerger_takes_no_pass_for_attention():
    policy = made("kvmerger(policy=kvzip(sinks=2))")
    view = replace(steps(policy)[1].view, phase="pass")
    key = "kvmerger_received"
    assert (policy.note(view)[key] == view.memory[key]).all()
    assert (policy.note(replace(view, phase="decode"))[key] != view.memory[key]).any()


@pytest.mark.parametrize(
    ("spelling", "words"),
    [
        (
            "kvmerger(threshold=1)",
            "threshold=1, sigma=5.0; expected a cosine from -1 to below 1, and a finite sigma above 0",
        ),
        ("kvmerger(threshold=-1.5)", "threshold=-1.5"),
        ("kvmerger(sigma=0)", "sigma=0"),
        ("kvmerger(policy=merge(policy=h2o()))", "both merge; expected one of them"),
        ("kvmerger(policy=window(reposition=True))", "repositions and merges keys"),
    ],
)
def test_kvmerger_refuses(spelling, words):
    assert words in refused(spelling)
