"""Merging on the three implementations, and the promises that exclude each other."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from framework.arrays import device, take_slots
from framework.compare import drift
from framework.decode import Sampling
from framework.errors import KvtwinError
from framework.policies.prefill_decode import PrefillDecode
from framework.policy import Needs, Policy, View
from framework.spec import Layer
from framework.wrapper import Wrapper
from tests.hooked import (
    BACKENDS,
    EXACT,
    KV_HEADS,
    LENGTHS,
    assert_same,
    begun,
    evicting,
    fed,
    flax_later,
    held,
    run,
)
from tests.twins import column, hybrid, prompts

# Merging.


@dataclass(frozen=True, kw_only=True)
class Merging(Policy):
    """The oldest token that stays takes in the values of all that go; the keys of all that stay grow a little.

    Each head remembers how many went, of earlier ones half.
    """

    @property
    def merges(self) -> bool:
        return True

    @property
    def order_free(self) -> bool:
        return True

    @property
    def needs(self) -> Needs:
        return Needs(keys=True, values=True)

    def head_memory(self, layer: Layer) -> Mapping[str, tuple[int, ...]]:
        return {"gone": (2,), "calls": ()}

    def note(self, view: View) -> Mapping[str, Any]:
        return {**view.memory, "calls": view.memory["calls"] + 1.0}

    def score(self, view: View) -> Any:
        return view.positions * 7 % 11

    def merge(self, view: View, index: Any) -> tuple[Any, Any, Any]:
        xp = view.xp
        slots = xp.arange(view.positions.shape[-1], dtype=index.dtype, device=device(index))
        stays = xp.any(index[..., None] == slots, axis=2)
        gone = view.filled & ~stays
        total = xp.sum(xp.where(gone[..., None], view.values, 0.0), axis=2, keepdims=True)
        first = xp.arange(index.shape[-1], dtype=index.dtype, device=device(index)) == 0
        keys, values = (take_slots(xp, x, index) for x in (view.keys, view.values))
        count = xp.sum(xp.astype(gone, values.dtype), axis=2)
        count = xp.stack([count, view.memory["calls"]], axis=-1)
        went = 0.5 * view.memory["gone"] + count
        return keys * 1.0625, xp.where(first[:, None], values + total, values), {"gone": went}


def test_the_reference_merges_what_goes() -> None:
    policy, model = Merging(budget=5), hybrid("reference")
    cache = model.cache(policy, batch=3)
    _, held_back = model.step(prompts(LENGTHS), cache.fork(), evict=False)
    layers = held_back.snapshot().layers
    _, cache = model.step(prompts(LENGTHS), cache)
    went: dict[Any, Any] = {}
    for step in range(4):
        for layer, (old, new) in enumerate(zip(layers, cache.snapshot().layers, strict=True)):
            for row, head in np.ndindex(3, KV_HEADS):
                place = layer, row, head
                was, now = held(old.positions[row, head]), held(new.positions[row, head])
                keys, values = (old.streams[key][row, head] for key in ("keys", "values"))
                going = sum((values[slot] for slot, at in enumerate(was) if at not in now), np.zeros(8))
                assert len(was) > len(now)
                went[place] = [
                    one / 2 + two
                    for one, two in zip(went.get(place, (0, 0)), (len(was) - len(now), step + 1), strict=True)
                ]
                assert new.heads["gone"][row, head].tolist() == went[place]
                for slot, position in enumerate(now):
                    source = was.index(position)
                    assert drift(new.streams["keys"][row, head, slot], keys[source] * 1.0625) <= EXACT
                    expected = values[source] + (going if slot == 0 else 0)
                    assert drift(new.streams["values"][row, head, slot], expected) <= EXACT
        layers, cache, _ = evicting("reference", cache, step)


@pytest.mark.parametrize(
    ("backend", "interval"),
    [("torch", 1), ("torch", 2), pytest.param("flax", 1, marks=pytest.mark.slow), ("flax", 2)],
)
def test_merging_is_that_of_the_reference(backend: str, interval: int) -> None:
    """A row without a token stays bit for bit, though merging would change it; then the decode loop goes on."""
    policy = Merging(budget=5, interval=interval)
    found, expected = begun(backend, policy), begun("reference", policy)
    assert_same(found, expected)
    before = found.rows([1])
    found, expected = (
        fed(one, cache, range(4), silent=[1]) for one, cache in ((backend, found), ("reference", expected))
    )
    for one, other in zip(found.rows([1]).snapshot().layers, before.snapshot().layers, strict=True):
        for key in other.streams:
            assert one.streams[key].tobytes() == other.streams[key].tobytes()
        for key in other.heads:
            assert one.heads[key].tobytes() == other.heads[key].tobytes()
    assert_same(found, expected)
    if interval == 1:
        return
    active = np.array([True, False, True])
    logits = np.random.default_rng(2).standard_normal((3, 701))
    new, _, found = hybrid(backend).decode(found, logits, Sampling(), [], 5, active=active)
    same, _, expected = hybrid("reference").decode(expected, logits, Sampling(), [], 5, active=active)
    assert new.tolist() == same.tolist()
    assert_same(found, expected)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_what_a_decision_says_of_a_silent_row(backend: str) -> None:
    """It kept all its tokens."""
    policy = Merging(budget=5, interval=2)
    calls = [(prompts(LENGTHS), {})]
    for step in range(4):
        tokens = column(step, LENGTHS)
        tokens[1] = -1 if step == 3 else tokens[1]
        calls.append((tokens, {}))
    expected, right = run(hybrid("reference"), hybrid("reference").cache(policy, batch=3), calls)
    found, own = run(hybrid(backend), hybrid(backend).cache(policy, batch=3), calls)
    assert_same(found, expected)
    for ours, theirs in zip(own, right, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            for place in np.ndindex(3, KV_HEADS):
                assert held(one.kept[place]) == held(other.kept[place])
    assert len(held(right[-1][0].kept[1, 0])) == 6


@dataclass(frozen=True, kw_only=True)
class Mismerging(Merging):
    """`merge` gives what this names."""

    gives: str = "one"

    @property
    def memory(self) -> Mapping[str, float]:
        return {"mass": 0.0}

    def merge(self, view: View, index: Any) -> Any:
        keys, values, memory = super().merge(view, index)
        return {
            "one": keys,
            "pair": (keys, values),
            "slots": (view.keys, view.values, memory),
            "neither": 7,
            "list": (keys, values, [memory["gone"]]),
            "other": (keys, values, {"went": memory["gone"]}),
            "shape": (keys, values, {"gone": memory["gone"][..., 0]}),
            "per slot": (keys, values, {"mass": view.memory["mass"]}),
            "number": (keys, values, {"gone": 7}),
        }[self.gives]


WRONG = ["one", "pair", "slots", "neither", "list", "other", "shape", "per slot", "number"]


@pytest.mark.parametrize("gives", WRONG)
def test_merges_of_another_kind_are_refused(gives: str) -> None:
    words = r"merge returned .*expected keys and values of shape .* head memory \{'gone': \(\d, 2, 2\)"
    for backend in ("reference", "torch"):
        with pytest.raises(KvtwinError, match=words):
            begun(backend, Mismerging(budget=5, gives=gives))


@dataclass(frozen=True, kw_only=True)
class Merger(Wrapper):
    """Remembers, beside what is inside, whether it did; the memory of those inside goes on."""

    own = ("outer",)

    def head_memory(self, layer: Layer) -> Mapping[str, tuple[int, ...]]:
        return {**self.policy.head_memory(layer), "outer": ()}

    def merge(self, view: View, index: Any) -> Any:
        keys, values, memory = super().merge(view, index)
        return keys, values, {**memory, "outer": view.memory["outer"] + 1.0}


@flax_later
def test_what_merging_remembers_is_passed_on_and_carried(backend: str, tmp_path: Path) -> None:
    """Through a wrapper and policies side by side; forked, saved and restored; a row alone is what it is in a batch."""
    turns = PrefillDecode(prefill=Merging(), decode=Merger(policy=Merging()), budget=5)
    plain = begun(backend, Merging(budget=5), 3)
    cache = begun(backend, turns, 3)
    for one, other in zip(cache.snapshot().layers, plain.snapshot().layers, strict=True):
        assert drift(one.streams["values"], other.streams["values"]) <= EXACT
        first, then = one.heads["prefill_gone"], one.heads["decode_gone"]
        assert (one.heads["decode_outer"] == 3).all()
        assert first[..., 1].tolist() == [[1.0] * KV_HEADS] * 3
        assert (then[..., 1] == 4 + 3 / 2 + 2 / 4).all()
        assert np.array_equal(other.heads["gone"], first / 8 + then)
    path = tmp_path / "cache"
    cache.save(path)
    forked, restored = cache.fork(), hybrid(backend).restore(path)
    assert_same(restored, forked)
    forked, restored = fed(backend, forked, [3, 4]), fed(backend, restored, [3, 4])
    assert_same(restored, forked)
    assert_same(cache, begun(backend, turns, 3))


# What excludes each other.


@dataclass(frozen=True, kw_only=True)
class Clashing(Merging):
    """Promises what `flags` names."""

    flags: tuple[str, ...] = ()

    shared = property(lambda self: "shared" in self.flags)
    divides = property(lambda self: "divides" in self.flags)
    allocates = property(lambda self: "allocates" in self.flags)
    repositions = property(lambda self: "repositions" in self.flags)
    merges = property(lambda self: "merges" in self.flags or "blind" in self.flags)

    @property
    def needs(self) -> Needs:
        values = "blind" not in self.flags
        return Needs(
            keys=True, values=values, tokens="tokens" in self.flags, ahead=2 * ("ahead" in self.flags)
        )

    @property
    def memory(self) -> Mapping[str, float]:
        return {"tokens": 0.0} if "slot tokens" in self.flags else {"mass": 0.0}

    def head_memory(self, layer: Layer) -> Mapping[str, tuple[int, ...]]:
        return {"twice": {"mass": ()}, "head tokens": {"tokens": ()}}.get(self.flags[-1], {})


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("shared", "divides"), "keeps one set for all heads and divides budgets among them"),
        (("allocates", "divides"), "allocates budgets to layers and divides them among heads"),
        (("repositions", "merges"), "repositions and merges keys"),
        (("repositions", "ahead"), "repositions and looks ahead of the tokens' own positions"),
        (("twice",), "has two memories called 'mass'"),
        (("tokens", "slot tokens"), "a memory called 'tokens'"),
        (("slot tokens",), "a memory called 'tokens'"),
        (("tokens", "head tokens"), "has two memories called 'tokens'"),
        (("blind",), "merges; expected its needs to name keys and values"),
    ],
)
def test_promises_that_exclude_each_other_are_refused(flags: tuple[str, ...], words: str) -> None:
    for backend in BACKENDS:
        with pytest.raises(KvtwinError, match=f"policy tests.test_hooks_merging:Clashing.*{words}"):
            hybrid(backend).cache(Clashing(budget=5, flags=flags))
