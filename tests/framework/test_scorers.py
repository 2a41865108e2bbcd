"""Policies that score: each against its published formula, written again in plain loops from the papers.

An oracle gives {position: score} of one head. Kept sets are compared too, with what is protected kept by hand.
"""

import functools
from dataclasses import replace

import array_api_compat.numpy as xp
import numpy as np
import pytest

from framework.arrays import FAR
from framework.errors import KvtwinError
from framework.eviction import alive, judge, noted, streamed, survivors
from framework.policy import Block, View, policies
from framework.random import normal
from framework.rope import angles
from framework.spec import Layer, ModelSpec, Rope

BATCH, HEADS, GROUP, DIM = 2, 3, 5, 6
ROPE = Rope(theta=40.0, dim=4)  # the last two channels do not turn
SCALE = 0.7
HEAD = Layer(heads=HEADS * GROUP, kv_heads=HEADS, head_dim=DIM, scale=SCALE, rope=ROPE)
every_seed = pytest.mark.parametrize("seed", range(2))


def turn(x, position):
    """One vector rotated to a position, pair by pair."""
    out, half = np.array(x, float), ROPE.dim // 2
    for channel in range(half):
        angle = position * ROPE.theta ** (-2 * channel / ROPE.dim)
        a, b = x[channel], x[channel + half]
        out[channel] = a * np.cos(angle) - b * np.sin(angle)
        out[channel + half] = b * np.cos(angle) + a * np.sin(angle)
    return out


class Text:
    """One layer's numbers by position, and the tokens that each head holds. Everything is un-rotated."""

    def __init__(self, seed, tokens=33):
        random = np.random.default_rng(seed)
        self.lengths = np.array([tokens - 7, tokens - 10], np.int32)  # room for seven more
        self.keys = random.standard_normal((BATCH, HEADS, tokens, DIM))
        self.values = random.standard_normal((BATCH, HEADS, tokens, DIM))
        self.queries = 1.5 * random.standard_normal((BATCH, HEADS, GROUP, tokens, DIM))
        self.ids = random.integers(0, 12, (BATCH, tokens)).astype(np.int32)
        self.turned = {key: np.empty_like(getattr(self, key)) for key in ("keys", "queries")}
        for key, out in self.turned.items():
            for place in np.ndindex(out.shape[:-1]):
                out[place] = turn(getattr(self, key)[place], place[-1])

    def rotated(self, row, head, position):
        """The key at a position."""
        return self.turned["keys"][row, head, position]

    def gives(self, row, head, member, asked, held, window=None):
        """What the query at position `asked` gives to the tokens held, as the model attends."""
        seen = [p for p in held if p <= asked and (window is None or asked - p < window)]
        query = self.turned["queries"][row, head, member, asked]
        weights = [np.exp(SCALE * float(query @ self.rotated(row, head, p))) for p in seen]
        return {p: weight / sum(weights) for p, weight in zip(seen, weights, strict=True)}


text_of = functools.cache(Text)


def view_of(policy, text, held, before, seen, memory, phase, window=None, budget=9, question=(FAR, FAR)):
    """The view and block after the tokens from `before` to `seen`; `memory` goes by position."""
    slots = max(len(held[place]) for place in held) + 2
    needs, asked = policy.needs, policy.needs.queries
    positions = np.full((BATCH, HEADS, slots), -1, np.int32)
    arrays = {key: np.full((*positions.shape, DIM), 9.0) for key in ("keys", "values")}
    sums, tokens = np.zeros(positions.shape), np.zeros(positions.shape, np.int32)
    slot_memory = {key: np.full(positions.shape, 7.0) for key in policy.memory}
    for (row, head), own in held.items():
        for slot, p in enumerate(own):
            positions[row, head, slot] = p
            arrays["keys"][row, head, slot] = text.rotated(row, head, p)
            arrays["values"][row, head, slot] = text.values[row, head, p]
            tokens[row, head, slot] = text.ids[row, p]
            for key, start in policy.memory.items():
                slot_memory[key][row, head, slot] = memory.get((key, row, head, p), start)
        for query in range(before[row], seen[row]) if needs.sums else ():
            for member in range(GROUP):
                for p, weight in text.gives(row, head, member, query, own, window).items():
                    sums[row, head, own.index(p)] += weight / GROUP
    width = int(max(seen - before))
    block = np.full((BATCH, width), -1, np.int32)
    raw = np.full((BATCH, HEADS, GROUP, width, DIM), 5.0)
    ring = np.full((BATCH, asked), -1, np.int32)
    turned = np.full((BATCH, HEADS, GROUP, asked, DIM), 4.0)
    for row in range(BATCH):
        for place, p in enumerate(range(before[row], seen[row])):
            block[row, place], raw[row, :, :, place] = p, text.queries[row, :, :, p]
        for place, p in enumerate(range(seen[row] - asked, seen[row])):
            if p >= 0:
                ring[row, place] = p
                turned[row, :, :, place] = text.turned["queries"][row, :, :, p]
    cos, sin = angles(ROPE, np.arange(64 + needs.ahead))
    view = View(
        xp=xp,
        phase=phase,
        layer=1,
        layers=2,
        positions=positions,
        budget=np.full((BATCH, HEADS), budget, np.int32),
        seen=seen.astype(np.int32),
        question=np.array(question, np.int32),
        memory=slot_memory
        | {
            key: memory.get(key, np.zeros((BATCH, HEADS, *shape)))
            for key, shape in policy.head_memory(HEAD).items()
        },
        keys=arrays["keys"] if needs.keys or asked else None,
        values=arrays["values"] if needs.values else None,
        queries=turned if asked else None,
        query_positions=ring if asked else None,
        sums=sums if needs.sums else None,
        tokens=tokens if needs.tokens else None,
        cos=cos,
        sin=sin,
        scale=SCALE,
        window=window,
    )
    return view, Block(block, raw, np.zeros((BATCH, width, 2)))


def run(spelling, seed, calls=(None, 1, 2, 1), window=None, budget=9, tokens=33):
    """The policy over a prompt and a few calls: (text, view after its hooks, the sets kept, calls so far) of each.

    The history is a list of (before, seen, what each head held at attention), for oracles with memory.
    """
    policy, text = policies.make(spelling), text_of(seed, tokens)
    held = {place: [] for place in np.ndindex(BATCH, HEADS)}
    before, memory, history = np.zeros(BATCH, np.int32), {}, []
    for number, count in enumerate(calls):
        seen = text.lengths if count is None else before + count
        for (row, head), own in held.items():
            own.extend(p for p in range(before[row], seen[row]))
            if not number:
                del own[3 : 3 + head]  # heads hold different numbers of tokens
        phase = "decode" if number else "prefill"
        view, block = view_of(policy, text, held, before, seen, memory, phase, window, budget)
        history.append((before, seen, {place: list(own) for place, own in held.items()}))
        if policy.needs.stream:
            view = streamed(policy, view, block)
        view = noted(policy, view)
        scores, protected = judge(policy, view)
        given = policy.budgets(view, scores) if policy.divides else view.budget
        living = alive(view.positions, view.seen, window)
        index = survivors(xp, scores, protected, living, given, view.positions.shape[-1])
        kept = {}
        for place in held:
            kept[place] = [int(view.positions[place][slot]) for slot in index[place] if slot >= 0]
            for key in policy.memory:
                memory |= {(key, *place, p): view.memory[key][place][s] for s, p in enumerate(held[place])}
        memory |= {key: view.memory[key] for key in policy.head_memory(HEAD)}
        yield text, view, scores, kept, list(history)
        held, before = {place: list(own) for place, own in kept.items()}, seen


def best(score, budget, stay=()):
    """The tokens that stay, then those of the highest score; of equal scores the newer."""
    rest = sorted((p for p in score if p not in stay), key=lambda p: (score[p], p), reverse=True)
    return sorted([*stay, *rest[: budget - len(stay)]])


def compare(spelling, seed, oracle, stay=lambda p, seen: False, window=None, budget=9, each=None, **options):
    """Scores and kept sets of every head in every call; `oracle(text, row, head, own, history)` gives scores.

    `each(text, row, history)` gives the budgets of the heads, where they differ.
    """
    for text, _, scores, kept, history in run(spelling, seed, window=window, budget=budget, **options):
        for row, head in np.ndindex(BATCH, HEADS):
            own, seen = history[-1][2][row, head], int(history[-1][1][row])
            expected = oracle(text, row, head, own, history)
            marked = [p for p in own if stay(p, seen)]
            free = [slot for slot, p in enumerate(own) if p in expected]
            found = scores[row, head][free]
            np.testing.assert_allclose(found, [expected[own[slot]] for slot in free], rtol=1e-8, atol=1e-10)
            living = {p: score for p, score in expected.items() if window is None or seen - p < window}
            marked = [p for p in marked if window is None or seen - p < window]
            missing = {p: 0.0 for p in marked if p not in living}
            room = budget if each is None else each(text, row, history)[head]
            assert kept[row, head] == best(living | missing, room, marked)


def sinks(count, recent=0):
    return lambda p, seen: p < count or p >= seen - recent


def cosine(a, b):
    return float(a @ b) / np.linalg.norm(a) / np.linalg.norm(b)


def standard(score):
    """z-scores of numbers of several heads."""
    numbers = np.array([x for one in score.values() for x in one.values()])
    deviation = np.sqrt(((numbers - numbers.mean()) ** 2).sum() / (len(numbers) - 1))
    return {
        place: {p: (x - numbers.mean()) / deviation for p, x in one.items()} for place, one in score.items()
    }


# Expected attention.


def mean_turn(positions):
    """The mean rotation, column by column."""
    eye = np.eye(DIM)
    return np.stack([np.mean([turn(eye[c], p) for p in positions], axis=0) for c in range(DIM)], axis=1)


def expected_attention(text, row, head, own, history, first, future, covariance, value_norm, epsilon):
    seen = int(history[-1][1][row])
    rotation = mean_turn(range(seen, seen + future))
    total = dict.fromkeys([p for p in own if p >= first], 0.0)
    for member in range(GROUP):
        queries = text.queries[row, head, member, first:seen]
        mean, weights = queries.mean(0), {}
        spread = sum(np.outer(q - mean, q - mean) for q in queries) / len(queries)
        for p in total:
            key = text.rotated(row, head, p)
            logit = SCALE * float(key @ rotation @ mean)
            if covariance:
                logit += SCALE**2 / 2 * float(key @ rotation @ spread @ rotation.T @ key)
            weights[p] = np.exp(logit)
        for p in total:
            total[p] += weights[p] / sum(weights.values()) / GROUP
    if not value_norm:
        return total
    return {p: (x + epsilon) * np.linalg.norm(text.values[row, head, p]) for p, x in total.items()}


@every_seed
@pytest.mark.parametrize(
    ("fields", "numbers"),
    [
        ("sinks=3, future=11", (3, 11, True, True, 0)),
        ("sinks=0, future=4, covariance=False", (0, 4, False, True, 0)),
        ("sinks=2, future=7, value_norm=False", (2, 7, True, False, 0)),
        ("sinks=1, future=7, epsilon=0.02", (1, 7, True, True, 0.02)),
    ],
)
def test_expected_attention_is_that_of_normal_queries(fields, numbers, seed):
    def oracle(*where):
        return expected_attention(*where, *numbers)

    compare(f"expected_attention({fields})", seed, oracle, sinks(numbers[0]))


# KeyDiff.


def keydiff(text, row, head, own, history):
    keys = {p: text.rotated(row, head, p) for p in own}
    anchor = np.mean([key / np.linalg.norm(key) for key in keys.values()], axis=0)
    return {p: -cosine(key, anchor) for p, key in keys.items()}


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


# Cap.


def cap(text, row, head, own, history, first, future, tau):
    seen = int(history[-1][1][row])
    rotation = mean_turn(range(seen, seen + future))
    rest = [p for p in own if p >= first]
    total = dict.fromkeys(rest, 0.0)
    for member in range(GROUP):
        anchor = rotation @ text.queries[row, head, member, first:seen].mean(0)
        near = {p: cosine(text.rotated(row, head, p), anchor) for p in rest}
        weight = {p: np.exp(tau * (near[p] - max(near.values()))) for p in rest}
        matrix = np.eye(DIM)
        for p in rest:
            value = text.values[row, head, p]
            matrix = matrix + (weight[p] + 1e-6) * np.outer(value, value)
        inverse = np.linalg.inv(matrix)
        for p in rest:
            value = text.values[row, head, p]
            total[p] += weight[p] * float(value @ inverse @ value) / GROUP
    return total


@every_seed
@pytest.mark.parametrize(("first", "future", "tau"), [(4, 9, 5), (0, 3, 1.5), (2, 20, 0)])
def test_cap_is_leverage_among_relevant_values(first, future, tau, seed):
    def oracle(*where):
        return cap(*where, first, future, tau)

    compare(f"cap(sinks={first}, future={future}, tau={tau})", seed, oracle, sinks(first))


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


# Fields without a meaning.


@pytest.mark.parametrize(
    ("spelling", "words"),
    [
        ("lagkv(lag=1)", "lagkv has sinks=4, lag=1; expected sinks >= 0, lag >= 2"),
        ("lagkv(sinks=-1)", "lagkv has sinks=-1, lag=128"),
        ("noncausal_attention(chunk=0)", "noncausal_attention has chunk=0; expected at least 1"),
        (
            "compactor(recent=-1)",
            "compactor has sinks=8, recent=-1, chunk=256, sketch=48; expected sinks and",
        ),
        ("compactor(sketch=0)", "chunk and sketch >= 1"),
        ("cur(kernel=0)", "cur has sinks=4, kernel=0, kind='product'; expected sinks >= 0, kernel >= 1"),
        ("scissorhands(window=0)", "scissorhands has recent=10, window=0; expected recent >= 0, window >= 1"),
        ("rkv(kernel=4)", "rkv has window=8, kernel=4, beta=0.07; expected window >= 1, an odd kernel"),
        ("rkv(beta=1.5)", "beta from 0 to 1"),
        (
            "sink_recent(streaming=((0, 2),), policy=keydiff())",
            "sink_recent has sinks=128, recent=256, streaming=((0, 2),); expected sinks >= 0",
        ),
        (
            "fastgen(heavy=1.5)",
            "fastgen has heavy=1.5, local=0.3, recovery=0.95; expected shares from 0 to 1",
        ),
        ("simlayer(recent=0)", "simlayer has sinks=4, recent=0, threshold=0.9; expected sinks >= 0"),
        ("cap(future=0)", "cap has sinks=4, future=0, tau=5; expected sinks >= 0, future >= 1, tau >= 0"),
    ],
)
def test_fields_without_a_meaning_are_refused(spelling, words):
    with pytest.raises(KvtwinError) as error:
        policies.make(spelling)
    assert words in str(error.value)
