"""Policies that score by attention received, against their formulas in plain loops from the papers."""

import numpy as np
import pytest

from framework.policy import policies
from tests.scored import (
    GROUP,
    compare,
    cosine,
    every_seed,
    sinks,
)

# Observed attention.


def observed(text, row, head, own, history, window):
    """What a token received, over the queries that could see it."""
    got, could = dict.fromkeys(own, 0.0), dict.fromkeys(own, 0)
    for before, seen, held in history:
        for asked in range(before[row], seen[row]):
            for p in own:
                could[p] += p <= asked and (window is None or asked - p < window)
            for member in range(GROUP):
                for p, weight in text.gives(row, head, member, asked, held[row, head], window).items():
                    if p in got:
                        got[p] += weight / GROUP
    return {p: got[p] / could[p] for p in own}


@every_seed
@pytest.mark.parametrize("window", [None, 12])
def test_observed_attention_is_the_mean_over_the_queries_that_could_see(window, seed):
    def oracle(*where):
        return observed(*where, window)

    compare("observed_attention", seed, oracle, window=window)


# Scissorhands.


def scissorhands(text, row, head, own, history, last, window):
    """Minus how often a token got less than an even share."""
    count = dict.fromkeys(own, 0)
    for number, (before, seen, held) in enumerate(history):
        first = max(before[row], seen[row] - last) if number == 0 else before[row]
        for asked, member in [(q, g) for q in range(first, seen[row]) for g in range(GROUP)]:
            given = text.gives(row, head, member, asked, held[row, head], window)
            for p, weight in given.items():
                if p in count and weight < 1 / len(given):
                    count[p] -= 1
    return count


@every_seed
@pytest.mark.parametrize(("recent", "last", "window"), [(4, 400, None), (0, 5, None), (3, 20, 12)])
def test_scissorhands_drops_what_queries_overlook(recent, last, window, seed):
    def oracle(*where):
        return scissorhands(*where, last, window)

    fields = f"recent={recent}, window={last}"
    compare(f"scissorhands({fields})", seed, oracle, sinks(0, recent), window=window)


# R-KV.


def rkv(text, row, head, own, history, window, kernel, beta):
    seen = int(history[-1][1][row])
    got = dict.fromkeys(own, 0.0)
    for asked in range(seen - window, seen):
        given = [text.gives(row, head, member, asked, own) for member in range(GROUP)]
        for p in own:
            got[p] += 0.0 if p >= seen - window else max(one.get(p, 0.0) for one in given) / window
    keys = {p: text.rotated(row, head, p) for p in own}
    likeness = dict.fromkeys(own, 0.0)
    for p in own:
        near = {other: cosine(keys[p], keys[other]) for other in own if other != p}
        alike = [other for other, x in near.items() if x > 0.5]
        for other, x in near.items():
            likeness[other] += 0.0 if alike and other == max(alike) else x / len(own)
    weight = {p: np.exp(x) for p, x in likeness.items()}
    side, score = kernel // 2, {}
    for slot, p in enumerate(own):
        pooled = max(got[other] for other in own[max(0, slot - side) : slot + side + 1])
        score[p] = beta * pooled - (1 - beta) * weight[p] / sum(weight.values())
    return score


@every_seed
@pytest.mark.parametrize(("window", "kernel", "beta"), [(3, 5, 0.07), (2, 1, 0.8), (1, 7, 0), (5, 3, 1)])
def test_rkv_weighs_attention_against_repetition(window, kernel, beta, seed):
    def oracle(*where):
        return rkv(*where, window, kernel, beta)

    compare(f"rkv(window={window}, kernel={kernel}, beta={beta})", seed, oracle, sinks(0, window))


def test_rkv_compares_more_slots_than_fit_at_a_time():
    def oracle(*where):
        return rkv(*where, 2, 3, 0.3)

    spelling = "rkv(window=2, kernel=3, beta=0.3)"
    compare(spelling, 7, oracle, sinks(0, 2), calls=(None, 1), tokens=157, budget=140)


def test_rkv_evicts_every_128_steps():
    assert policies.make("rkv").interval == 128
