"""framework/policy.py against plain loops: who survives, what a query sees, and each policy's published formula."""

from dataclasses import dataclass, replace
from typing import Any

import array_api_compat.numpy
import array_api_compat.torch
import array_api_strict
import jax.numpy
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from framework.arrays import FAR, by_position, pool, softmax
from framework.errors import KvtwinError
from framework.eviction import alive, judge, layer_budgets, limit, noted, overwrites, survivors, weakest
from framework.policy import Policy, View, attends, policies
from framework.spec import Layer, ModelSpec

LIBRARIES = {
    "numpy": array_api_compat.numpy,
    "torch": array_api_compat.torch,
    "jax": jax.numpy,
    "strict": array_api_strict,
}
every_library = pytest.mark.parametrize("xp", LIBRARIES.values(), ids=LIBRARIES)
NUMPY = array_api_compat.numpy

BATCH, HEADS, SLOTS = 2, 3, 9
SHAPE = (BATCH, HEADS, SLOTS)
SCORES = [-np.inf, -1.5, -0.0, 0.0, 0.25, 0.25, 3.0, np.inf]  # few values: most draws have ties

scores_drawn = arrays(np.float32, SHAPE, elements=st.sampled_from(SCORES))
marks_drawn = arrays(bool, SHAPE, elements=st.booleans())
budgets_drawn = arrays(np.int32, (BATCH, HEADS), elements=st.integers(1, SLOTS + 2))
counts_drawn = arrays(np.int32, (BATCH, HEADS), elements=st.integers(1, SLOTS))


def rank(slot, scores, protected, living, positions):
    """The sort key of the contract; among protected slots only age counts."""
    score = 0.0 if protected[slot] else float(scores[slot])
    return bool(living[slot]), bool(protected[slot]), score, int(positions[slot])


def heads():
    return np.ndindex(BATCH, HEADS)


@every_library
@pytest.mark.parametrize("capacity", [4, SLOTS, SLOTS + 5])
@settings(max_examples=40, deadline=None)
@given(scores_drawn, marks_drawn, marks_drawn, budgets_drawn)
def test_survivors_are_the_best_by_living_protected_score_and_age(
    xp, capacity, scores, protected, living, budget
):
    got = np.asarray(survivors(xp, *map(xp.asarray, (scores, protected, living, budget)), capacity))
    assert got.shape == (BATCH, HEADS, capacity)
    assert got.dtype == np.int32
    for place in heads():
        age = np.arange(SLOTS)
        slots = [slot for slot in age if living[place][slot]]
        slots.sort(key=lambda slot: rank(slot, scores[place], protected[place], living[place], age))
        best = sorted(slots[::-1][: min(budget[place], capacity)])
        assert got[place].tolist() == best + [-1] * (capacity - len(best))


@every_library
@settings(max_examples=60, deadline=None)
@given(scores_drawn, marks_drawn, marks_drawn, counts_drawn, st.randoms(use_true_random=False))
def test_weakest_is_the_first_to_go_in_any_order(xp, scores, protected, dead, count, random):
    positions = np.full(SHAPE, -1, np.int32)
    for place in heads():
        held = random.sample(range(40), int(count[place])) + [-1] * (SLOTS - int(count[place]))
        random.shuffle(held)
        positions[place] = held
    living = ~dead & (positions >= 0)
    got = np.asarray(weakest(xp, *map(xp.asarray, (scores, positions, protected, living))))
    for place in heads():
        filled = [slot for slot in range(SLOTS) if positions[place][slot] >= 0]
        marks = protected[place] & living[place]  # a dead slot is dead, protected or not
        value = np.where(living[place], scores[place], 0)  # the oldest of the dead goes first
        ranks = [rank(slot, value, marks, living[place], positions[place]) for slot in filled]
        assert got[place] == filled[ranks.index(min(ranks))]


@every_library
@pytest.mark.parametrize("dtype", ["int32", "float32", "bool"])
def test_scores_may_be_of_any_kind_and_nothing_protected(xp, dtype):
    scores = np.array([[[1, 0, 1, 0, 0]]]).astype(dtype)
    ones = np.ones((1, 1, 5), bool)
    got = survivors(xp, xp.asarray(scores), None, xp.asarray(ones), xp.asarray(np.array([[3]], np.int32)), 3)
    assert np.asarray(got).tolist() == [[[0, 2, 4]]]


@every_library
@pytest.mark.parametrize("window", [None, 1, 2, 5, 30])
def test_attends_and_alive_count_the_query_itself(xp, window):
    keys = np.arange(-1, 8, dtype=np.int32)
    queries = np.arange(-1, 8, dtype=np.int32)
    got = np.asarray(attends(xp.asarray(queries[:, None]), xp.asarray(keys[None]), window))
    living = [
        np.asarray(alive(xp.asarray(keys[None, None]), xp.asarray(np.array([seen], np.int32)), window))[0, 0]
        for seen in queries
    ]
    for row, query in enumerate(queries):
        for column, key in enumerate(keys):
            # A window of w: the query and the w - 1 tokens before it.
            inside = 0 <= key and (window is None or query - key < window)
            assert got[row, column] == (inside and key <= query)
            assert living[row][column] == inside


@pytest.mark.parametrize(
    ("budget", "window", "most"), [(None, None, None), (7, None, 7), (None, 5, 4), (7, 5, 4), (3, 5, 3)]
)
def test_limit_is_the_smaller_of_budget_and_what_a_later_query_sees(budget, window, most):
    assert limit(budget, window) == most


@pytest.mark.parametrize(
    ("spelling", "bounded", "does"),
    [
        ("h2o(budget=4)", True, True),
        ("h2o(budget=4, interval=2)", True, False),
        ("snapkv(budget=4)", True, False),
        ("window(budget=4)", True, True),
        ("window(budget=4, reposition=True)", True, False),
        ("full", True, True),
        ("full", False, False),
    ],
)
def test_overwriting_is_for_order_free_policies_in_bounded_layers(spelling, bounded, does):
    assert overwrites(policies.make(spelling), bounded) is does


def random_view(xp=NUMPY, seed=0, slots=17, asked=4, dtype=np.float64, **changes):
    """A view of random numbers, position order, ragged heads; batch 2, 3 kv heads, group 5, head_dim 6."""
    random = np.random.default_rng(seed)
    seen = np.array([slots, slots - 3], np.int32)
    positions = np.full((2, 3, slots), -1, np.int32)
    for row, head in np.ndindex(2, 3):
        held = np.arange(seen[row])[head:]  # every head holds other tokens
        positions[row, head, : len(held)] = held
    ring = seen[:, None] - asked + np.arange(asked, dtype=np.int32)
    positions = changes.pop("positions", positions)
    batch, kv_heads, slots = positions.shape
    seen = changes.pop("seen", seen[:batch])
    ring = changes.pop("query_positions", ring[:batch])
    numbers = {
        "keys": random.standard_normal((batch, kv_heads, slots, 6)),
        "values": random.standard_normal((batch, kv_heads, slots, 6)),
        "queries": random.standard_normal((batch, kv_heads, 5, asked, 6)),
        "sums": random.uniform(0, 3, (batch, kv_heads, slots)),
    }
    view = {
        "positions": positions,
        "budget": np.full((batch, kv_heads), 9, np.int32),
        "seen": seen,
        "question": changes.pop("question", np.full(batch, FAR, np.int32)),
        "query_positions": ring.astype(np.int32),
        **{key: value.astype(dtype) for key, value in numbers.items()},
        **changes,
    }
    arrays = {
        key: xp.asarray(value) if isinstance(value, np.ndarray) else value for key, value in view.items()
    }
    rest = {"xp": xp, "phase": "decode", "layer": 1, "layers": 2, "memory": {}, "scale": 0.7}
    return View(**{**rest, **arrays})


def looped_attention(view, softcap=None, window=None):
    """`View.attention` number by number, in float64."""
    queries, keys, positions, asked = (
        np.asarray(x) for x in (view.queries, view.keys, view.positions, view.query_positions)
    )
    out = np.zeros((*queries.shape[:-1], keys.shape[2]))
    for row, head, query_head, query in np.ndindex(queries.shape[:4]):
        at, weights = asked[row, query], {}
        for slot, position in enumerate(positions[row, head]):
            if 0 <= position <= at and (window is None or at - position < window):
                logit = float(queries[row, head, query_head, query] @ keys[row, head, slot]) * view.scale
                weights[slot] = np.exp(logit if softcap is None else softcap * np.tanh(logit / softcap))
        for slot, weight in weights.items():
            out[row, head, query_head, query, slot] = weight / sum(weights.values())
    return out


@every_library
@pytest.mark.parametrize(
    ("softcap", "window"), [(None, None), (1.5, None), (None, 3)], ids=["plain", "softcap", "window"]
)
def test_attention_is_the_softmax_of_every_query(xp, softcap, window):
    ring = np.array([[-1, -1, 15, 16], [-1, 11, 12, 13]], np.int32)  # -1: a query that does not exist
    view = random_view(xp, query_positions=ring, softcap=softcap, window=window, dtype=np.float32)
    expected, got = looped_attention(view, softcap, window), np.asarray(view.attention())
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-7)
    assert (got[0, :, :, :2] == 0).all()
    assert (got[1, :, :, 0] == 0).all()
    total = got.sum(-1)[np.broadcast_to((ring >= 0)[:, None, None], got.shape[:-1])]
    np.testing.assert_allclose(total[total > 0], 1, rtol=1e-5)


@every_library
def test_softmax_of_a_masked_row_is_0_and_of_a_large_one_finite(xp):
    x = np.array([[5e4, 1.0, 5e4], [1.0, 2.0, 3.0]], np.float32)
    mask = np.array([[True, True, True], [False, False, False]])
    got = np.asarray(softmax(xp, xp.asarray(x), xp.asarray(mask)))
    assert got.tolist() == [[0.5, 0, 0.5], [0, 0, 0]]


@every_library
@pytest.mark.parametrize("maximum", [False, True])
@pytest.mark.parametrize("kernel", [1, 3, 5, 7, 15])
def test_pool_is_over_neighbours_with_zeros_outside(xp, kernel, maximum):
    x = np.random.default_rng(kernel).standard_normal((2, 3, 6)).astype(np.float32)
    got = np.asarray(pool(xp, xp.asarray(x), kernel, maximum))
    for row, head, slot in np.ndindex(x.shape):
        near = [
            x[row, head, other] if 0 <= other < 6 else 0.0
            for other in range(slot - kernel // 2, slot + kernel // 2 + 1)
        ]
        expected = max(near) if maximum else sum(near) / kernel
        assert got[row, head, slot] == pytest.approx(expected, rel=1e-5, abs=1e-6)


@every_library
def test_by_position_puts_empty_slots_last(xp):
    positions = np.array([[[3, -1, 0, 7, -1]]], np.int32)
    order = np.asarray(by_position(xp, xp.asarray(positions)))[0, 0]
    assert positions[0, 0][order].tolist() == [0, 3, 7, -1, -1]


@every_library
def test_newest_counts_positions_and_not_slots(xp):
    positions = np.array([[[0, 4, 6, -1], [3, 5, -1, -1]]], np.int32)
    view = random_view(xp, positions=positions, seen=np.array([7], np.int32))
    assert np.asarray(view.newest(3)).tolist() == [[[False, True, True, False], [False, True, False, False]]]
    counts = xp.asarray(np.array([[1, 4]], np.int32))
    assert np.asarray(view.newest(counts)).tolist() == [
        [[False, False, True, False], [True, True, False, False]]
    ]


# Budgets.

LAYER = Layer(heads=4, kv_heads=2, head_dim=4, scale=0.5, rope=None)
LAYERS = ModelSpec(family="llama", vocab=7, dim=8, ffn=9, norm_eps=1e-6, positions=64, layers=(LAYER,) * 3)


@pytest.mark.parametrize(
    ("spelling", "expected"),
    [
        ("tova(budget=5)", ((5, 5), (5, 5), (5, 5))),
        ("tova(budget=(4, 5, 6))", ((4, 4), (5, 5), (6, 6))),
        ("tova(budget=(4, (5, 5), 6))", ((4, 4), (5, 5), (6, 6))),
        ("h2o(budget=(4, (7, 5), (1, 2)))", ((4, 4), (7, 5), (1, 2))),
        ("window(budget=4)", ((4, 4), (4, 4), (4, 4))),
        ("h2o(budget=1)", ((1, 1), (1, 1), (1, 1))),
        ("full", (None, None, None)),
    ],
)
def test_budgets_are_one_number_for_each_head(spelling, expected):
    assert layer_budgets(policies.make(spelling), LAYERS) == expected


@pytest.mark.parametrize(
    ("spelling", "words"),
    [
        ("full(budget=4)", "keeps every token; expected no budget"),
        ("tova", "has no budget; expected the tokens to keep, as in budget=64"),
        ("tova(budget=0)", "budget 0 in layer 0; expected at least 1"),
        ("tova(budget=-3)", "expected at least 1"),
        ("tova(budget=(4, 5))", "has 2 budgets; expected one, or one for each of 3 layers"),
        ("tova(budget=())", "has 0 budgets"),
        ("tova(budget=(4, 5, 0))", "budget 0 in layer 2; expected at least 1"),
        (
            "h2o(budget=(4, (5, 6, 7), 4))",
            "has 3 budgets in layer 1; expected one, or one for each of 2 kv heads",
        ),
        ("h2o(budget=(4, (5, 0), 4))", "budget 0 in layer 1; expected at least 1"),
        (
            "tova(budget=(4, (5, 6), 4))",
            "keeps one set for all heads of a layer; expected one budget in layer 1",
        ),
        ("window(budget=3)", "budget 3 in layer 0; expected at least 4: what it protects"),
        ("snapkv(budget=(40, 31, 40))", "budget 31 in layer 1; expected at least 32"),
    ],
)
def test_budgets_that_cannot_be_met_are_refused(spelling, words):
    with pytest.raises(KvtwinError) as error:
        layer_budgets(policies.make(spelling), LAYERS)
    assert words in str(error.value)


@dataclass(frozen=True, kw_only=True)
class Bare(Policy):
    """Its fields take any type: nobody checks those of a policy outside the repository."""

    budget: Any = None
    interval: Any = 1

    def score(self, view):
        return view.positions


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"budget": 2.5}, "budget 2.5 in layer 0; expected an integer"),
        ({"budget": True}, "budget True in layer 0; expected an integer"),
        ({"budget": "8"}, "budget '8' in layer 0; expected an integer"),
        ({"budget": 4, "interval": 0}, "interval is 0; expected an integer >= 1"),
        ({"budget": 4, "interval": 1.5}, "interval is 1.5; expected an integer >= 1"),
        ({"budget": 4, "interval": True}, "interval is True; expected an integer >= 1"),
    ],
)
def test_budgets_and_intervals_of_another_type_are_refused(fields, words):
    with pytest.raises(KvtwinError) as error:
        layer_budgets(Bare(**fields), LAYERS)
    assert words in str(error.value)


# The published formulas, written again in NumPy from the papers.


def chosen(policy, view):
    """Positions that the policy keeps of each row and head."""
    scores, protected = judge(policy, view)
    living = alive(view.positions, view.seen, view.window)
    index = survivors(view.xp, scores, protected, living, view.budget, view.positions.shape[-1])
    return {
        place: [int(view.positions[place][slot]) for slot in index[place] if slot >= 0]
        for place in np.ndindex(2, 3)
    }


def held(view, row, head):
    return [int(position) for position in view.positions[row, head] if position >= 0]


def top(positions, score, count):
    """The `count` positions of the highest score."""
    return sorted(sorted(positions, key=lambda position: -score[position])[:count])


def paper_window(view, row, head, sinks=4):
    """Sinks from the start of the text, then the newest."""
    own = held(view, row, head)
    first = [position for position in own if position < sinks]
    rest = [position for position in own if position >= sinks]
    return first + rest[len(rest) - (9 - len(first)) :]


def paper_key_norm(view, row, head):
    own = held(view, row, head)
    norm = {position: -np.linalg.norm(view.keys[row, head, slot]) for slot, position in enumerate(own)}
    return top(own, norm, 9)


def paper_keep_it_odd(view, row, head):
    own = held(view, row, head)
    order = [p for p in own[::-1] if p % 2] + [p for p in own[::-1] if p % 2 == 0]
    return sorted(order[:9])


def paper_tova(view, row, head):
    """The last query's attention, mean over all query heads; one set for all kv heads."""
    own = held(view, row, head)
    weights = looped_attention(view)[row, :, :, -1].reshape(-1, view.positions.shape[-1]).mean(0)
    return top(own, {position: weights[slot] for slot, position in enumerate(own)}, 9)


def paper_snapkv(view, row, head, kernel, pooling):
    """The window stays; before it: mean over the window's queries, pooled, mean over the group."""
    own, window = held(view, row, head), view.queries.shape[3]
    prefix = len(own) - window
    observed = looped_attention(view)[row, head, :, :, :prefix].mean(1)
    side = kernel // 2
    if pooling == "max":
        wide = np.pad(observed, ((0, 0), (side, side)), constant_values=-np.inf)
        pooled = [wide[:, slot : slot + kernel].max(1) for slot in range(prefix)]
    else:
        wide = np.pad(observed, ((0, 0), (side, side)))
        pooled = [wide[:, slot : slot + kernel].sum(1) / kernel for slot in range(prefix)]
    score = {position: pooled[slot].mean() for slot, position in enumerate(own[:prefix])}
    # The maximum gives neighbours equal scores: the newer one stays.
    best = sorted(own[:prefix], key=lambda position: (score[position], position))[-(9 - window) :]
    return sorted(best) + own[prefix:]


PAPERS = {
    "window": paper_window,
    "window(sinks=0)": lambda *a: paper_window(*a, sinks=0),
    "window(sinks=2, reposition=True)": lambda *a: paper_window(*a, sinks=2),
    "key_norm": paper_key_norm,
    "keep_it_odd": paper_keep_it_odd,
    "snapkv(window=4, kernel=3)": lambda *a: paper_snapkv(*a, 3, "max"),
    "snapkv(window=4, kernel=7)": lambda *a: paper_snapkv(*a, 7, "max"),
    "snapkv(window=4, kernel=5, pooling='mean')": lambda *a: paper_snapkv(*a, 5, "mean"),
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("spelling", PAPERS)
def test_kept_sets_are_those_of_the_paper(spelling, seed):
    view = random_view(seed=seed)
    kept = chosen(policies.make(spelling), view)
    for place in np.ndindex(2, 3):
        assert kept[place] == PAPERS[spelling](view, *place)
        assert len(kept[place]) == 9


@pytest.mark.parametrize("seed", range(4))
def test_tova_keeps_what_the_last_query_looks_at(seed):
    view = random_view(seed=seed, asked=1)
    view = replace(view, positions=np.repeat(view.positions[:, :1], 3, axis=1))  # one set for all heads
    kept = chosen(policies.make("tova"), view)
    for place in np.ndindex(2, 3):
        assert kept[place] == paper_tova(view, *place)
        assert kept[place] == kept[place[0], 0]


@pytest.mark.parametrize("budget", [8, 9])
def test_h2o_keeps_heavy_hitters_and_the_newer_half(budget):
    """A prompt of 12 and 9 decode steps of one head, the mass of each token summed by hand."""
    policy, random = policies.make("h2o"), np.random.default_rng(budget)
    own, mass, memory = list(range(12)), dict.fromkeys(range(12), 0.0), np.zeros((1, 1, 12))
    for seen in range(12, 22):
        received = random.dirichlet(np.ones(len(own))) * (12 if seen == 12 else 1)
        for position, weight in zip(own, received, strict=True):
            mass[position] += weight
        view = random_view(
            positions=np.array([[own]], np.int32),
            seen=np.array([seen], np.int32),
            budget=np.array([[budget]], np.int32),
            sums=received[None, None],
            memory={"mass": memory},
        )
        view = noted(policy, view)
        scores, protected = judge(policy, view)
        index = survivors(NUMPY, scores, protected, view.filled, view.budget, budget)[0, 0]
        newest = [position for position in own if position >= seen - budget // 2]
        older = [position for position in own if position < seen - budget // 2]
        expected = top(older, mass, budget - len(newest)) + newest
        assert [own[slot] for slot in index] == expected
        memory = np.concatenate([view.memory["mass"][..., index], np.zeros((1, 1, 1))], axis=-1)
        own = [*expected, seen]
        mass[seen] = 0.0


def random_kept(seed, layer, heads=50, slots=20, budget=5, order=None):
    order = np.arange(slots, dtype=np.int32) if order is None else order
    positions = np.broadcast_to(order, (1, heads, slots)).astype(np.int32)
    view = random_view(positions=positions, budget=np.full((1, heads), budget, np.int32), layer=layer)
    scores, _ = judge(policies.make(f"random(seed={seed})"), view)
    best = np.argsort(-np.asarray(scores, np.float64)[0], axis=-1, kind="stable")[:, :budget]
    return [frozenset(order[slots].tolist()) for slots in best]


def test_random_is_uniform_over_positions():
    counts = np.zeros(20)
    for layer in range(20):
        for kept in random_kept(seed=0, layer=layer):
            counts[list(kept)] += 1
    # 1000 draws of 5 out of 20: 250 each, standard deviation 13.7.
    assert np.abs(counts - 250).max() < 5 * 13.7


def test_random_differs_between_heads_layers_and_seeds_and_repeats_in_any_slot_order():
    first = random_kept(seed=1, layer=0)
    assert len(set(first)) > 45
    for other in (random_kept(seed=1, layer=1), random_kept(seed=2, layer=0)):
        assert sum(a == b for a, b in zip(first, other, strict=True)) < 5
    shuffled = np.random.default_rng(3).permutation(20).astype(np.int32)
    assert random_kept(seed=1, layer=0, order=shuffled) == first


@pytest.mark.parametrize("wrong", ["window=0", "kernel=0", "kernel=4"])
def test_snapkv_refuses_fields_without_a_meaning(wrong):
    with pytest.raises(KvtwinError, match="expected window >= 1, an odd kernel"):
        policies.make(f"snapkv(budget=64, {wrong})")
