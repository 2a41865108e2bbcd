"""Random texts, and what a policy scores and keeps of them, beside an oracle.

An oracle gives {position: score} of one head. Kept sets are compared too, with what is protected kept by hand.
"""

import functools

import array_api_compat.numpy as xp
import numpy as np
import pytest

from framework.arrays import FAR
from framework.eviction import alive, judge, noted, streamed, survivors
from framework.policy import Block, View, policies
from framework.rope import angles
from framework.spec import Layer, Rope

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


def keydiff(text, row, head, own, history):
    """An oracle: keys unlike the mean of all directions, as the policy of that name has it."""
    keys = {p: text.rotated(row, head, p) for p in own}
    anchor = np.mean([key / np.linalg.norm(key) for key in keys.values()], axis=0)
    return {p: -cosine(key, anchor) for p, key in keys.items()}
