"""Policies made of policies, against plain loops: what each adds to the scores, budgets and values of those inside."""

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from backends import backends
from experiments.check_case import Case, Step, remembered, tiny_spec
from framework.errors import KvtwinError
from framework.eviction import check_policy, judge
from framework.policy import Policy, View, policies
from framework.random import hash32
from framework.weights import random_weights

# Five query heads share one of two kv heads; rows see 23, 20 and 7 tokens, heads hold others from the first step on.
CASE = Case(tokens=23, group=5, kv_heads=2, head_dim=4, steps=3)
INNER = ["snapkv(window=3, kernel=3)", "h2o", "key_norm", "expected_attention(sinks=2, future=7)"]
BUDGET = 11


def made(spelling: str) -> Any:
    """The policy, read back from its own spelling."""
    policy = policies.make(spelling)
    assert policies.make(policies.spelling(policy)) == policy
    return policy


def steps(policy: Policy, budget: int = BUDGET, window: int | None = None, case: Case = CASE) -> list[Step]:
    """A prompt and some tokens more: what the policy saw and decided."""
    return list(case.trajectory(replace(policy, budget=None, interval=1), budget, window))


def noted_view(policy: Policy, step: Step) -> View:
    """What `score` saw."""
    return remembered(policy, step.view, step.block)


def inner_judgement(inner: Policy, view: View) -> tuple[np.ndarray, np.ndarray]:
    """Scores and protected slots of the policy inside."""
    scores, protected = judge(inner, view)
    filled = view.positions >= 0
    return np.asarray(scores, np.float64), filled & (False if protected is None else np.asarray(protected))


def living(view: View, row: int, head: int) -> list[int]:
    """Slots that hold a token which later queries can see, oldest first."""
    seen, window = int(view.seen[row]), view.window
    return [
        slot
        for slot, position in enumerate(view.positions[row, head].tolist())
        if position >= 0 and (window is None or position > seen - window)
    ]


def best(slots: list[int], scores: np.ndarray, protected: np.ndarray, count: int) -> list[int]:
    """The slots that stay: the protected, then the higher score, then the newer token."""

    def key(slot: int) -> tuple[bool, float, int]:
        marked = bool(protected[slot])
        return marked, 0.0 if marked else float(scores[slot]), slot

    return sorted(slots, key=key, reverse=True)[:count]


def kept(step: Step, row: int, head: int) -> list[int]:
    return [position for position in step.outcome.kept[row, head].tolist() if position >= 0]


def positions_of(view: View, row: int, head: int, slots: list[int]) -> list[int]:
    return sorted(view.positions[row, head, slots].tolist())


def places(view: View) -> list[tuple[int, int]]:
    return list(np.ndindex(view.positions.shape[:2]))


def refused(spelling: str) -> str:
    """Why a policy cannot be made, or cannot be run."""
    with pytest.raises(KvtwinError) as error:
        check_policy(policies.make(spelling), tiny_spec())
    return str(error.value)


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


def four_layers(backend: str = "reference"):
    """A random model of four layers without windows."""
    spec = tiny_spec(4)
    spec = replace(spec, layers=tuple(replace(layer, window=None) for layer in spec.layers))
    return backends.get(backend).build(spec, random_weights(spec, seed=3), "float64")


def ragged(*lengths: int) -> np.ndarray:
    tokens = np.random.default_rng(11).integers(0, 29, (len(lengths), max(lengths)), dtype=np.int32)
    for row, length in enumerate(lengths):
        tokens[row, length:] = -1
    return tokens


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


# prefill_decode and per_layer


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
