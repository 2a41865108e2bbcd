"""Wrappers that change scores, promises or rotations, against plain loops: protect, chunked, reposition."""

from dataclasses import replace

import numpy as np
import pytest

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

# protect


@pytest.mark.parametrize(("sinks", "recent"), [(2, 0), (0, 3), (1, 2)])
@pytest.mark.parametrize("inner", INNER)
def test_protect_adds_sinks_and_the_newest_to_what_is_protected(inner, sinks, recent):
    policy = made(f"protect(sinks={sinks}, recent={recent}, policy={inner})")
    assert policy.protects(BUDGET) == policy.policy.protects(BUDGET) + sinks + recent
    for step in steps(policy):
        view = noted_view(policy, step)
        scores, protected = inner_judgement(policy.policy, view)
        for row, head in places(view):
            own = living(view, row, head)
            for slot in own:
                position, seen = int(view.positions[row, head, slot]), int(view.seen[row])
                protected[row, head, slot] |= position < sinks or position >= seen - recent
            chosen = best(own, scores[row, head], protected[row, head], BUDGET)
            assert kept(step, row, head) == positions_of(view, row, head, chosen)


def test_protect_keeps_a_promise_of_its_inner_policy():
    assert made("protect(policy=h2o())").order_free
    assert not made("protect(policy=snapkv())").order_free
    assert made("protect(policy=tova())").shared
    assert made("adakv(policy=protect(sinks=1, policy=h2o()))").divides


@pytest.mark.parametrize(
    ("spelling", "words"),
    [
        ("protect(sinks=0, policy=h2o())", "sinks=0, recent=0; expected no negative number, and one above 0"),
        ("protect(sinks=-1, recent=3, policy=h2o())", "sinks=-1"),
        (
            "protect(policy=adakv(policy=h2o()))",
            "without knowing what protect protects; expected protect inside",
        ),
    ],
)
def test_protect_refuses(spelling, words):
    assert words in refused(spelling)


# chunked


@pytest.mark.parametrize("chunk", [1, 4, 5, 40])
@pytest.mark.parametrize("inner", [*INNER, "tova"])
def test_chunked_ranks_chunks_by_their_mean(inner, chunk):
    policy = made(f"chunked(chunk={chunk}, policy={inner})")
    assert policy.shared
    for step in steps(policy):
        view = noted_view(policy, step)
        scores, protected = inner_judgement(policy.policy, view)
        for row, head in places(view):
            own = living(view, row, head)
            chunks: dict[int, list[int]] = {}
            for slot in own:
                if not protected[row, 0, slot]:
                    chunks.setdefault(int(view.positions[row, head, slot]) // chunk, []).append(slot)
            mean = np.zeros(view.positions.shape[-1])
            for slots in chunks.values():
                mean[slots] = sum(scores[row, :, slot].sum() for slot in slots) / len(slots)
            chosen = best(own, mean, protected[row, 0], BUDGET)
            assert kept(step, row, head) == positions_of(view, row, head, chosen)
            # Whole chunks, but for one, of which the newer part stays.
            cut = [
                slots for slots in chunks.values() if 0 < sum(slot in chosen for slot in slots) < len(slots)
            ]
            assert len(cut) <= 1
            for slots in cut:
                held = [slot for slot in slots if slot in chosen]
                assert held == slots[-len(held) :]


@pytest.mark.parametrize(
    ("spelling", "words"),
    [
        ("chunked(chunk=0, policy=h2o())", "chunk=0; expected at least 1 position"),
        (
            "chunked(policy=adakv(policy=h2o()))",
            "chunked keeps one set for all heads of a layer, and adakv(policy=h2o()) divides budgets",
        ),
        ("adakv(policy=chunked(policy=h2o()))", "and adakv gives each head a budget of its own"),
    ],
)
def test_chunked_refuses(spelling, words):
    assert words in refused(spelling)


# reposition


def test_reposition_of_a_window_is_a_window_that_repositions():
    model = four_layers()
    moments: list[list] = []
    for spelling in (
        "reposition(budget=9, policy=window(sinks=2))",
        "window(budget=9, sinks=2, reposition=True)",
    ):
        policy = made(spelling)
        logits, cache = model.step(ragged(30, 17), model.cache(policy, batch=2))
        moments.append([logits])
        for step in range(5):
            logits, cache = model.step(np.array([[step], [step + 3]], np.int32), cache)
            moments[-1] += [logits, *cache.kept]
    for one, other in zip(*moments, strict=True):
        assert (one == other).all()


@pytest.mark.parametrize(
    "inner", ["snapkv(window=3, kernel=3)", "h2o()", "key_norm()", "adakv(policy=h2o())"]
)
def test_reposition_keeps_what_is_inside_and_changes_the_logits_of_later_tokens(inner):
    """No token is evicted before the first eviction: ranks are positions, and both keep the same."""
    model, runs = four_layers(), []
    for spelling in (inner, f"reposition(policy={inner})"):
        policy = replace(made(spelling), budget=9)
        first, cache = model.step(ragged(30, 17), model.cache(policy, batch=2))
        kept_first = cache.kept
        later, _ = model.step(np.array([[1], [2]], np.int32), cache)
        runs.append((first, kept_first, later))
    assert np.abs(runs[0][0] - runs[1][0]).max() < 1e-12
    assert all((one == other).all() for one, other in zip(runs[0][1], runs[1][1], strict=True))
    assert np.abs(runs[0][2] - runs[1][2]).max() > 1e-3


@pytest.mark.parametrize(
    ("spelling", "words"),
    [
        ("reposition(policy=window(reposition=True))", "both reposition; expected one of them"),
        ("reposition(policy=expected_attention())", "repositions and looks ahead"),
    ],
)
def test_reposition_refuses(spelling, words):
    assert words in refused(spelling)
