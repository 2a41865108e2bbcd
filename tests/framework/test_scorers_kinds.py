"""Policies for which heads or layers are of several kinds, against plain loops from the papers."""

from dataclasses import replace

import numpy as np
import pytest

from framework.errors import KvtwinError
from framework.policy import policies
from framework.spec import ModelSpec
from tests.scored import (
    BATCH,
    GROUP,
    HEAD,
    HEADS,
    best,
    compare,
    every_seed,
    keydiff,
    run,
    sinks,
    text_of,
    view_of,
)

# Streaming heads.

PATTERN = ((1, 1, 1), (0, 1, 0))  # the views here are of layer 1


@every_seed
@pytest.mark.parametrize(
    ("pattern", "first", "recent", "budgets"),
    [
        (PATTERN, 2, 3, [11, 5, 11]),
        (PATTERN, 1, 3, [12, 4, 11]),
        (PATTERN, 3, 30, [9, 9, 9]),
        (((0, 0, 0), (1, 0, 1)), 1, 2, [3, 21, 3]),
        (((0, 0, 0), (1, 1, 1)), 2, 2, [4, 4, 4]),
        (((1, 1, 1), (0, 0, 0)), 2, 2, [9, 9, 9]),
    ],
)
def test_streaming_heads_leave_their_room_to_the_others(pattern, first, recent, budgets, seed):
    def oracle(text, row, head, own, history):
        return {p: float(p) for p in own} if pattern[1][head] else keydiff(text, row, head, own, history)

    spelling = f"sink_recent(streaming={pattern}, sinks={first}, recent={recent}, policy=keydiff())"
    for text, _, scores, kept, history in run(spelling, seed):
        for row, head in np.ndindex(BATCH, HEADS):
            own = history[-1][2][row, head]
            expected = oracle(text, row, head, own, history)
            np.testing.assert_allclose(scores[row, head][: len(own)], list(expected.values()), rtol=1e-9)
            marked = [p for p in own if p < first] if pattern[1][head] else []
            assert kept[row, head] == best(expected, budgets[head], marked)


@pytest.mark.parametrize("budget", [5, 9, 400])
@pytest.mark.parametrize("marks", [(0, 1, 0), (1, 1, 0), (1, 1, 1), (0, 0, 0)])
def test_streaming_heads_never_exceed_the_buffers(marks, budget):
    policy = policies.make(f"sink_recent(streaming=({marks},), sinks=1, recent=3, policy=keydiff())")
    view, _ = next(_views(policy, budget))
    view = replace(view, layer=0)
    found = policy.budgets(view, view.positions)
    layers = (replace(HEAD, kv_heads=3),)
    spec = ModelSpec("llama", 7, 8, 9, layers, 1e-6, 64)
    assert found.max() == policy.most(budget, 0, spec)
    assert found.sum() == (BATCH * 3 * budget if 0 in marks else BATCH * 3 * min(4, budget))


def _views(policy, budget):
    """One view of a prompt."""
    text, nothing = text_of(0), np.zeros(BATCH, np.int32)
    held = {(row, head): list(range(text.lengths[row])) for row, head in np.ndindex(BATCH, HEADS)}
    yield view_of(policy, text, held, nothing, text.lengths, {}, "prefill", budget=budget)


def test_streaming_must_fit_the_model():
    spec = ModelSpec("llama", 7, 8, 9, (HEAD, HEAD), 1e-6, 64)
    policies.make(f"sink_recent(streaming={PATTERN}, policy=keydiff())").constants(spec)
    with pytest.raises(KvtwinError, match=r"layers of \[3\] kv heads; expected \[3, 3\]"):
        policies.make("sink_recent(streaming=((0, 1, 0),), policy=keydiff())").constants(spec)


# FastGen.

SPECIAL, PUNCTUATION = (1, 30), (2, 3, 7)


def kinds_of(text, row, seen, mass, heavy, local):
    """The tokens of each kind, with those of the kinds before."""
    ids, ranked = text.ids[row], sorted(mass, key=lambda p: -mass[p])
    kinds = [{p for p in mass if ids[p] in SPECIAL}]
    kinds.append(kinds[-1] | {p for p in mass if ids[p] in PUNCTUATION})
    kinds.append(kinds[-1] | set(ranked[: int(heavy * seen + 1e-9)]))
    kinds.append(kinds[-1] | {p for p in mass if p >= seen - int(local * seen + 1e-9)})
    return [*kinds, set(mass)]


def masses(text, row, head, own, history):
    mass = dict.fromkeys(own, 0.0)
    for before, seen, held in history:
        for asked, member in [(q, g) for q in range(before[row], seen[row]) for g in range(GROUP)]:
            for p, weight in text.gives(row, head, member, asked, held[row, head]).items():
                mass[p] = mass.get(p, 0.0) + weight / GROUP
    return mass


def fastgen(text, row, head, own, history, heavy, local, recovery):
    """The kind of a head, the tokens it asks for, and what each received."""
    first = history[0]
    mass = masses(text, row, head, first[2][row, head], history[:1])
    kinds = kinds_of(text, row, int(first[1][row]), mass, heavy, local)
    kind = [sum(mass[p] for p in each) >= recovery * sum(mass.values()) for each in kinds].index(True)
    mass = {p: x for p, x in masses(text, row, head, own, history).items() if p in own}
    return kind, kinds_of(text, row, int(history[-1][1][row]), mass, heavy, local)[kind], mass


FASTGEN = [(0.3, 0.3, 0.95), (0.3, 0.2, 0.7), (0.1, 0.5, 0.5), (0.2, 0.1, 0.3), (0.25, 0.1, 0.05)]


@every_seed
@pytest.mark.parametrize(("heavy", "local", "recovery"), FASTGEN)
def test_fastgen_keeps_the_cheapest_kind_that_recovers_the_attention(heavy, local, recovery, seed):
    fields = (
        f"heavy={heavy}, local={local}, recovery={recovery}, special={SPECIAL}, punctuation={PUNCTUATION}"
    )
    for text, view, _, kept, history in run(f"fastgen({fields})", seed):
        for row in range(BATCH):
            held = [history[-1][2][row, head] for head in range(HEADS)]
            found = [
                fastgen(text, row, head, own, history, heavy, local, recovery)
                for head, own in enumerate(held)
            ]
            rooms = [min(9, max(1, len(asked))) for _, asked, _ in found]
            for head, (kind, asked, mass) in enumerate(found):
                assert view.memory["kind"][row, head] == kind
                rooms[head] += min(9 * HEADS - sum(rooms), max(1, len(asked)) - rooms[head])
                order = sorted(mass, key=lambda p: (p in asked, text.ids[row, p] in SPECIAL, mass[p]))
                assert kept[row, head] == sorted(order[::-1][: rooms[head]])


def test_fastgen_of_random_texts_takes_every_kind():
    taken = set()
    for heavy, local, recovery in FASTGEN:
        for seed in range(2):
            text = text_of(seed)
            for row, head in np.ndindex(BATCH, HEADS):
                own = list(range(text.lengths[row]))
                history = [(np.zeros(BATCH, np.int32), text.lengths, {(row, head): own})]
                taken.add(fastgen(text, row, head, own, history, heavy, local, recovery)[0])
    assert taken == {0, 1, 2, 3, 4}


# SimLayerKV.


def is_lazy(text, row, history, first, recent, threshold):
    """Whether the last query of the prompt, over all heads, looks at the ends."""
    _, seen, held = history[0]
    share, last = 0.0, int(seen[row]) - 1
    for head, member in np.ndindex(HEADS, GROUP):
        for p, weight in text.gives(row, head, member, last, held[row, head]).items():
            share += (p < first or p > last - recent) * weight / HEADS / GROUP
    return share > threshold


SIMLAYER = [(4, 3, 0.3), (0, 2, 0.1), (1, 6, 0.4), (2, 30, 0.9), (2, 3, 1)]


@every_seed
@pytest.mark.parametrize(("first", "recent", "threshold"), SIMLAYER)
def test_simlayer_cuts_lazy_layers(first, recent, threshold, seed):
    def each(text, row, history):
        lazy = is_lazy(text, row, history, first, recent, threshold)
        return [min(9, first + recent) if lazy else 9] * HEADS

    def oracle(text, row, head, own, history):
        return {p: float(p) for p in own}

    fields = f"sinks={first}, recent={recent}, threshold={threshold}"
    compare(f"simlayer({fields})", seed, oracle, sinks(first), each=each)


def test_simlayer_of_random_texts_is_lazy_or_not():
    found = set()
    for (first, recent, threshold), seed, row in [
        (x, s, r) for x in SIMLAYER for s in (0, 1) for r in (0, 1)
    ]:
        text = text_of(seed)
        held = {(row, head): list(range(text.lengths[row])) for head in range(HEADS)}
        found.add((is_lazy(text, row, [(None, text.lengths, held)], first, recent, threshold), recent < 7))
    assert found >= {(True, True), (False, True)}
