"""Codecs that code keys in groups and keep the newest tokens exact, in whole caches.

The rule by hand, from KIVI's own (arXiv 2402.02750), against the reference; and the backends against the reference.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from backends.flax.pages import PagedState
from backends.torch.pages import PagedLayer
from framework.codec import Codec
from framework.codecs.unbias import Unbias
from framework.compare import TOLERANCE, drift
from framework.generate import prefill
from tests import runs
from tests.runs import (
    AGAIN,
    BEFORE,
    BOTH,
    CENTRED,
    LENGTHS,
    LONG,
    ODD,
    OFTEN,
    STEPS,
    THINK,
    TWO,
    UNBIASED,
    Call,
)

SHORT = 20  # steps of what flax compiles
EXACT = TOLERANCE["float64"]


def rotated(x: np.ndarray, position: int) -> np.ndarray:
    """Channel i of 8 turns with channel i + 4, by an angle of its own times the position."""
    angle = position * 500.0 ** (-2 * np.arange(4) / 8)
    one, other = x[:4], x[4:]
    return np.concatenate(
        [one * np.cos(angle) - other * np.sin(angle), other * np.cos(angle) + one * np.sin(angle)]
    )


def read_back(x: np.ndarray, bits: int) -> np.ndarray:
    """What is left of numbers that share a minimum and a scale."""
    x, most = x.astype(np.float32), 2**bits - 1
    scale, low = np.float16((x.max() - x.min()) / np.float32(most)), np.float16(x.min())
    scale = np.float16(1) if scale == 0 else scale
    codes = [min(most, max(0, round(float((one - np.float32(low)) / np.float32(scale))))) for one in x]
    return np.array([np.float32(code) * np.float32(scale) + np.float32(low) for code in codes], np.float64)


@dataclass
class Held:
    """One head of one row: keys as they are stored and values by position, and what is coded of them."""

    keys: dict[int, np.ndarray] = field(default_factory=dict)
    values: dict[int, np.ndarray] = field(default_factory=dict)
    groups: dict[int, int] = field(default_factory=dict)
    coded: set[int] = field(default_factory=set)  # of the values
    made: int = 0
    again: int = 0

    def keep(self, kept: set[int]) -> None:
        for each in (self.keys, self.values, self.groups):
            for position in set(each) - kept:
                del each[position]

    def code(self, codec: Any, seen: int) -> None:
        """The rule: keys of whole blocks of `residual` tokens by channel, all values but the newest by token."""
        bits, size = codec.bits, codec.group
        due = [p for p in sorted(self.keys) if p < seen - seen % codec.residual and p not in self.groups]
        apart = len(set(self.groups.values())) + -(-len(due) // size)
        if codec.regroup and due and apart > 2 * -(-(len(due) + len(self.groups)) // size):
            due, self.groups = sorted({*due, *self.groups}), {}
            self.again += 1
        for start in range(0, len(due), size):
            own, self.made = due[start : start + size], self.made + 1
            x = np.stack([self.keys[p] for p in own])
            for channel in range(x.shape[1]):
                x[:, channel] = read_back(x[:, channel], bits)
            for position, key in zip(own, x, strict=True):
                self.keys[position], self.groups[position] = key, self.made
        for position in self.values:
            if position < seen - codec.residual and position not in self.coded:
                parts = [self.values[position][at : at + size] for at in range(0, 8, size)]
                self.values[position] = np.concatenate([read_back(part, bits) for part in parts])
                self.coded.add(position)

    def counts(self, size: int) -> np.ndarray:
        groups = len(set(self.groups.values()))
        return np.array([groups, len(self.groups), groups * size, self.again])


def by_hand(
    policy: str, codec: Codec, calls: list[Call]
) -> Iterator[tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]]:
    """Logits, counts of groups and kept positions after each call: an exact cache whose contents are written by hand.

    It is the policy that says who stays; it sees what is exact in a call as exact, as it does under the codec.
    """
    rule: Any = codec.codec if isinstance(codec, Unbias) else codec
    runner = runs.model("reference")
    cache = runner.cache(policy, batch=len(LENGTHS))
    turned = not cache.policy.repositions
    held = {(row, layer, head): Held() for row in range(3) for layer in range(2) for head in range(2)}
    for call in calls:
        taps: dict[str, np.ndarray] = {}
        before = cache.seen
        logits, cache = runner.step(
            call.tokens, cache, logits="all", phase=call.phase, evict=call.evict, taps=taps
        )
        shot, layers = cache.snapshot(), []
        for index, layer in enumerate(shot.layers):
            at = f"layers.{index}.attention"
            bias = runs.weights()[f"{at}.key.bias"].astype(np.float64).reshape(2, 8)
            keys, values = (np.zeros((*layer.positions.shape, 8)) for _ in range(2))
            for row, head in np.ndindex(3, 2):
                own = held[row, index, head]
                for place, column in enumerate(np.flatnonzero(call.tokens[row] >= 0)):
                    position = int(before[row]) + place
                    key = taps[f"{at}.key"][row, column, head] - codec.unbiased * bias[head]
                    own.keys[position] = rotated(key, position) if turned and not codec.unrotated else key
                    own.values[position] = taps[f"{at}.value"][row, column, head]
                kept = [int(p) for p in layer.positions[row, head] if p >= 0]
                own.keep(set(kept))
                own.code(rule, int(shot.seen[row]))
                for slot, position in enumerate(kept):
                    plus = codec.unbiased * bias[head]
                    if turned and not codec.unrotated:
                        plus = rotated(plus, position)
                    key = own.keys[position] + plus
                    key = rotated(key, position) if turned and codec.unrotated else key
                    keys[row, head, slot], values[row, head, slot] = key, own.values[position]
            layers.append(replace(layer, streams={"keys": keys, "values": values}))
        counts = [
            sum((held[row, index, head].counts(rule.group) for row, head in np.ndindex(3, 2)), np.zeros(4))
            for index in range(2)
        ]
        yield logits, counts, shot.kept
        cache = runner.restore(replace(shot, layers=tuple(layers)))


BY_HAND = [
    *(("full()", codec) for codec in (TWO, AGAIN, BEFORE, ODD, LONG, UNBIASED, BOTH)),
    ("window(budget=7, sinks=2, interval=3)", TWO),
    ("h2o(budget=9)", ODD),
    ("key_norm(budget=9)", OFTEN),
    ("keydiff(budget=8)", BEFORE),
    ("keydiff(budget=11)", AGAIN),
    ("snapkv(budget=9, window=3, kernel=3)", UNBIASED),
    ("window(budget=8, sinks=2, reposition=True)", BOTH),
]


@pytest.mark.parametrize(("policy", "codec"), BY_HAND, ids=str)
def test_the_reference_does_what_the_rule_says(policy: str, codec: Codec) -> None:
    """Logits, kept tokens and groups after every call."""
    runner, calls = runs.model("reference"), runs.text(32)
    cache, again = runner.cache(policy, codec, 3), 0
    with runs.unchecked():
        for call, (expected, counts, kept) in zip(calls, by_hand(policy, codec, calls), strict=True):
            logits, cache = runner.step(call.tokens, cache, logits="all", phase=call.phase, evict=call.evict)
            assert drift(logits, expected) <= EXACT
            for ours, theirs in zip(cache.kept, kept, strict=True):
                np.testing.assert_array_equal(ours, theirs)
            for found, count in zip(cache.groups, counts, strict=True):
                assert [found.groups, found.tokens, found.places, found.again] == count.tolist()
            again = sum(each.again for each in cache.groups)
    assert again > 0 or not codec.regroups or policy == "full()"


AGREE = [
    ("full()", ODD),
    ("full()", AGAIN),
    ("full()", CENTRED),
    ("window(budget=8)", BEFORE),
    ("keydiff(budget=9)", THINK),
    ("snapkv(budget=9, window=4, kernel=3)", THINK),
    ("h2o(budget=9)", TWO),
    ("key_norm(budget=9)", OFTEN),
    ("keydiff(budget=11)", AGAIN),
    ("keydiff(budget=8)", BOTH),
    ("snapkv(budget=9, window=3, kernel=3)", UNBIASED),
    ("h2o(budget=7, interval=3)", LONG),
    ("window(budget=8, sinks=2, reposition=True)", BEFORE),
    ("reposition(budget=8, interval=3, policy=h2o())", BOTH),
    ("adakv(budget=30, floor=0.1, policy=h2o())", TWO),
    ("adakv(budget=30, floor=0.1, interval=3, policy=snapkv(window=3, kernel=3))", BOTH),
    ("reposition(budget=30, policy=adakv(floor=0.1, policy=h2o()))", OFTEN),
    ("cake(budget=9, window=3, policy=snapkv(window=3, kernel=3))", OFTEN),
    ("pyramid(budget=9, beta=4, window=3, policy=snapkv(window=3, kernel=3))", BEFORE),
]
PAGES = [each for each in AGREE if "adakv" in each[0]]

# Flax compiles each anew: two of them for make test, one of every kind for make test-slow.
FAST = [("h2o(budget=9)", TWO)]
LATER = [
    ("adakv(budget=30, floor=0.1, policy=h2o())", TWO),
    ("full()", ODD),
    ("snapkv(budget=9, window=3, kernel=3)", UNBIASED),
    ("snapkv(budget=9, window=4, kernel=3)", THINK),
    ("reposition(budget=8, interval=3, policy=h2o())", BOTH),
    ("reposition(budget=30, policy=adakv(floor=0.1, policy=h2o()))", OFTEN),
    ("cake(budget=9, window=3, policy=snapkv(window=3, kernel=3))", OFTEN),
]
WHOLE = [("keydiff(budget=11)", AGAIN), PAGES[1]]


@pytest.mark.parametrize(
    ("backend", "policy", "codec", "steps"),
    [("torch", *each, STEPS) for each in AGREE]
    + [("flax", *each, SHORT) for each in FAST]
    + [pytest.param("flax", *each, SHORT, marks=pytest.mark.slow) for each in LATER]
    + [pytest.param("flax", *each, STEPS, marks=pytest.mark.slow) for each in WHOLE],
    ids=str,
)
def test_backends_agree_with_the_reference(backend: str, policy: str, codec: Codec, steps: int) -> None:
    """Logits of every call, kept positions, codes, tables: ragged rows, chunks, silent rows, a window."""
    found, expected = runs.begun(backend, policy, codec, steps), runs.right(policy, codec, steps)
    assert runs.apart(found, expected) <= EXACT
    assert found[1].groups == expected[1].groups
    if (policy, codec) in PAGES:
        inside: Any = getattr(found[1], "state", found[1])
        assert isinstance(inside.layers[0], PagedLayer | PagedState)


@pytest.mark.parametrize(
    ("backend", "policy", "chunk"),
    [
        ("torch", "kvzip", 10),
        ("torch", "kvgrad", 10),
        pytest.param("flax", "kvgrad", None, marks=pytest.mark.slow),
    ],
)
def test_prompts_that_are_read_twice(backend: str, policy: str, chunk: int | None) -> None:
    """What is read leaves nothing behind, and is attended to as far as it stays: codes, newest tokens, gradients."""
    random, policy = np.random.default_rng(11), f"{policy}(budget=7, sinks=2, chunk=13)"
    rows = [random.integers(0, 256, count).tolist() for count in (29, 18)]
    found = []
    for name in ("reference", backend):
        runner = runs.model(name)
        cache, logits = prefill(runner, rows, None, policy, UNBIASED, 1, chunk, "prompt")
        more, cache = runs.went(runner, cache, [Call(np.array([[5 + step], [9]])) for step in range(9)])
        found.append(([logits, *more], cache))
    assert runs.apart(found[1], found[0]) <= EXACT


@pytest.mark.parametrize("backend", ["torch", pytest.param("flax", marks=pytest.mark.slow)])
def test_prompts_with_questions(backend: str) -> None:
    prompt = runs.texts(3)[:, :12].tolist()
    asked = [runs.texts(3)[0, 20:24].tolist(), None, [7, 8]]
    found = []
    for name in ("reference", backend):
        runner = runs.model(name)
        cache, logits = prefill(
            runner, prompt, None, "finch(budget=8, window=3)", BEFORE, 1, None, "prompt", None, asked
        )
        more, cache = runs.went(runner, cache, runs.text(9)[1:])
        found.append(([logits, *more], cache))
    assert runs.apart(found[1], found[0]) <= EXACT


@pytest.mark.parametrize("codec", [AGAIN, BOTH], ids=str)
@pytest.mark.parametrize("backend", ["torch", pytest.param("flax", marks=pytest.mark.slow)])
def test_gradients_behind_groups(backend: str, codec: Codec) -> None:
    ahead = runs.texts(3)[:, 300:311]
    held = {name: runs.begun(name, "h2o(budget=9)", codec, 5)[1] for name in ("reference", backend)}
    found, expected = (runs.model(name).gradients(ahead, cache) for name, cache in reversed(held.items()))
    for one, other in zip(found, expected, strict=True):
        assert drift(one, other) <= 1e-9
