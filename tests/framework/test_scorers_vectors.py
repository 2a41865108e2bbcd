"""Policies that score by keys and values themselves, or by attention in chunks, against plain loops from the papers."""

import numpy as np
import pytest

from framework.random import normal
from tests.scored import BATCH, DIM, GROUP, HEADS, compare, every_seed, keydiff, run, sinks, standard

# KeyDiff.


@every_seed
def test_keydiff_keeps_keys_unlike_the_mean(seed):
    compare("keydiff", seed, keydiff)


# Leverage, non-causal attention, and both.


def leverage(text, row, held, sketch, seed):
    """z-scores of all heads of a row."""
    raw = {}
    for head, own in held.items():
        matrix = normal((seed, 1), (HEADS, DIM, sketch))[head] / np.sqrt(sketch)
        keys = [text.keys[row, head, p] for p in own]
        centre = sum(keys) / len(keys)
        x = np.stack([(key - centre) @ matrix for key in keys])
        inverse = np.linalg.inv(sum(np.outer(one, one) for one in x) + 0.01 * np.eye(sketch))
        raw[head] = {p: float(one @ inverse @ one) for p, one in zip(own, x, strict=True)}
    return standard(raw)


def of_row(history, row, leave=lambda p: False):
    return {head: [p for p in history[-1][2][row, head] if not leave(p)] for head in range(HEADS)}


@every_seed
@pytest.mark.parametrize(("sketch", "drawn"), [(4, 0), (9, 3)])
def test_leverage_is_of_centred_and_sketched_keys(sketch, drawn, seed):
    def oracle(text, row, head, own, history):
        return leverage(text, row, of_row(history, row), sketch, drawn)[head]

    compare(f"leverage(sketch={sketch}, seed={drawn})", seed, oracle)


def received(text, row, head, history, chunk, first=0):
    """What each token got from the queries of its chunk, of the tokens held when they came."""
    got = {}
    for before, seen, held in history:
        own = [p for p in held[row, head] if p >= first]
        for asked in range(max(first, before[row]), seen[row]):
            near = [p for p in own if p // chunk == asked // chunk]
            for member in range(GROUP):
                query = text.turned["queries"][row, head, member, asked]
                weights = [np.exp(float(query @ text.rotated(row, head, p))) for p in near]
                for p, weight in zip(near, weights, strict=True):
                    got[p] = got.get(p, 0.0) + weight / sum(weights) / GROUP
    return got


def noncausal(text, row, held, history, chunk, first=0):
    raw = {}
    for head, own in held.items():
        got = received(text, row, head, history, chunk, first)
        weighed = [got[p] * np.linalg.norm(text.values[row, head, p]) for p in own]
        wide = [0.0, *weighed, 0.0]
        raw[head] = {p: sum(wide[slot : slot + 3]) / 3 for slot, p in enumerate(own)}
    return standard(raw)


@every_seed
@pytest.mark.parametrize("chunk", [1, 7, 10, 256])
def test_noncausal_attention_is_within_chunks_in_both_directions(chunk, seed):
    def oracle(text, row, head, own, history):
        return noncausal(text, row, of_row(history, row), history, chunk)[head]

    compare(f"noncausal_attention(chunk={chunk})", seed, oracle)


def test_noncausal_attention_remembers_the_mean_of_the_group():
    for text, view, _, _, history in run("noncausal_attention(chunk=7)", 0):
        for row, head in np.ndindex(BATCH, HEADS):
            own, got = history[-1][2][row, head], received(text, row, head, history, 7)
            found = view.memory["received"][row, head][: len(own)]
            np.testing.assert_allclose(found, [got[p] for p in own], rtol=1e-9)


@every_seed
@pytest.mark.parametrize(("first", "recent", "blending"), [(3, 2, 0.35), (0, 0, 1.5), (1, 4, 0)])
def test_compactor_blends_both_without_the_ends(first, recent, blending, seed):
    def oracle(text, row, head, own, history):
        seen = int(history[-1][1][row])
        held = of_row(history, row, lambda p: sinks(first, recent)(p, seen))
        one = leverage(text, row, held, 4, 2)[head]
        other = noncausal(text, row, held, history, 10, first)[head]
        return {p: blending * one[p] + other[p] for p in one}

    fields = f"sinks={first}, recent={recent}, blending={blending}, chunk=10, sketch=4, seed=2"
    compare(f"compactor({fields})", seed, oracle, sinks(first, recent))


# LagKV.


def lag_rank(vectors, following):
    """Of each vector of a partition the softmax of its spread in the range of the next partition."""
    spreads = []
    for vector in vectors:
        scaled = []
        for channel, x in enumerate(vector):
            column = [other[channel] for other in following]
            scaled.append((x - min(column)) / (max(column) - min(column)))
        mean = sum(scaled) / len(scaled)
        spreads.append(np.sqrt(sum((x - mean) ** 2 for x in scaled) / (len(scaled) - 1)))
    return [np.exp(x) / sum(np.exp(y) for y in spreads) for x in spreads]


def lagkv(text, row, head, own, history, first, lag, cross):
    rest = [p for p in own if p >= first]
    score = dict.fromkeys([p for p in own if p < first], 1.0)
    if len(rest) < 2 * lag:
        return {p: place / len(rest) for place, p in enumerate(rest)}
    for start in range(0, len(rest), lag):
        part, following = rest[start : start + lag], rest[start + lag : start + 2 * lag]
        if len(following) < lag:
            score |= dict.fromkeys(part, 1.0)
            continue
        both = [
            lag_rank([x(row, head, p) for p in part], [x(row, head, p) for p in following])
            for x in (text.rotated, lambda *at: text.values[at])
        ]
        mean = [(a + b) / 2 for a, b in zip(*both, strict=True)]
        for p, x in zip(part, mean, strict=True):
            score[p] = x if cross else sum(y < x for y in mean) / lag
    return score


@every_seed
@pytest.mark.parametrize("budget", [9, 15])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize(("first", "lag"), [(4, 3), (0, 5), (2, 4), (1, 11), (4, 40)])
def test_lagkv_ranks_partitions_by_the_next(first, lag, cross, budget, seed):
    def oracle(*where):
        return lagkv(*where, first, lag, cross)

    compare(f"lagkv(sinks={first}, lag={lag}, cross={cross})", seed, oracle, sinks(first), budget=budget)


# CUR.


def cur(text, row, head, own, history, width, kind):
    def share(vectors):
        squares = [sum(x * x for x in vector) for vector in vectors]
        return [x / sum(squares[i // width * width :][:width]) for i, x in enumerate(squares)]

    key = share([text.rotated(row, head, p) for p in own])
    value = share([text.values[row, head, p] for p in own])
    pick = {
        "key": lambda k, v: k,
        "value": lambda k, v: v,
        "mean": lambda k, v: (k + v) / 2,
        "product": lambda k, v: k * v,
    }
    score = [pick[kind](k, v) for k, v in zip(key, value, strict=True)]
    return {p: x / sum(score) for p, x in zip(own, score, strict=True)}


@every_seed
@pytest.mark.parametrize("kind", ["key", "value", "mean", "product"])
@pytest.mark.parametrize(("first", "width"), [(4, 5), (0, 16), (2, 64)])
def test_cur_compares_lengths_with_the_neighbours(first, width, kind, seed):
    def oracle(*where):
        return cur(*where, width, kind)

    compare(f"cur(sinks={first}, kernel={width}, kind={kind!r})", seed, oracle, sinks(first))
