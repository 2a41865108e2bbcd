"""Token ids, the stream of tokens, and what policies remember per head and slot, counted again by loops."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from framework.cache import Cache
from framework.compare import drift
from framework.decode import Sampling
from framework.policy import BLOCK, Block, Needs, Policy, View
from framework.spec import Layer
from tests.hooked import (
    BACKENDS,
    DIM,
    EXACT,
    GROUP,
    KV_HEADS,
    LENGTHS,
    assert_same,
    begun,
    every_backend,
    fed,
    held,
    run,
    tapped,
)
from tests.twins import WINDOW, column, hybrid, prompts, texts

# Token ids.


def worth(token: int) -> int:
    """A number per token id that has nothing to do with its position."""
    return token * 37 % 101


@dataclass(frozen=True, kw_only=True)
class ByToken(Policy):
    """Scores by token id alone."""

    free: bool = True

    @property
    def order_free(self) -> bool:
        return self.free

    @property
    def needs(self) -> Needs:
        return Needs(tokens=True)

    def score(self, view: View) -> Any:
        assert view.tokens.dtype == view.xp.int32
        return view.tokens * 37 % 101


def best_by(
    worths: Callable[[int, int], float], budget: int, steps: int, window: int | None, interval: int = 1
) -> list[list[int]]:
    """What each row keeps of a score that never changes, one token at a time after the prompts."""
    result = []
    for row, length in enumerate(LENGTHS):
        own = list(range(length))
        for step in range(steps + 1):
            if step:
                own.append(length + step - 1)
            if step % interval == 0:
                living = [p for p in own if window is None or p > length + step - window]
                living.sort(key=lambda p: (worths(row, p), p))
                own = sorted(living[-budget:])
        result.append(own)
    return result


@every_backend
@pytest.mark.parametrize(
    "policy",
    [ByToken(budget=6), ByToken(budget=6, free=False, interval=3)],
    ids=["overwriting", "compacting"],
)
def test_token_ids_follow_their_slots(backend: str, policy: ByToken) -> None:
    rows = texts(len(LENGTHS))
    cache = begun(backend, policy)
    for steps in (0, 1, 8):
        cache = fed(backend, cache, range(cache.seen[0] - LENGTHS[0], steps))
        for layer, window in zip(cache.snapshot().layers, (None, WINDOW), strict=True):
            expected = best_by(lambda r, p: worth(int(rows[r, p])), 6, steps, window, policy.interval)
            for row, head in np.ndindex(len(LENGTHS), KV_HEADS):
                assert held(layer.positions[row, head]) == expected[row]
                count = len(expected[row])
                assert layer.memory["tokens"][row, head, :count].tolist() == rows[row, expected[row]].tolist()


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_token_ids_are_saved_and_the_reference_agrees(backend: str, tmp_path: Any) -> None:
    policy = ByToken(budget=6)
    cache = begun(backend, policy, 3)
    assert_same(cache, begun("reference", policy, 3))
    cache.save(tmp_path / "cache")
    again = hybrid(backend).restore(tmp_path / "cache")
    assert_same(again, cache, 0)
    assert_same(fed(backend, again, (3, 4)), begun("reference", policy, 5))
    # Several tokens at once are compacted, from slots that overwriting has left in no order.
    more = np.concatenate([column(step, LENGTHS) for step in (3, 4, 5)], axis=1)
    found, expected = (
        hybrid(one).step(more, held_so_far, logits=None)[1]
        for one, held_so_far in ((backend, cache), ("reference", begun("reference", policy, 3)))
    )
    assert_same(found, expected)


# The stream of tokens, memory per head and memory per slot.


@dataclass(frozen=True, kw_only=True)
class Summing(Policy):
    """Sums un-rotated queries and inputs of the layer per head, counts tokens, and notes attention per slot."""

    @property
    def needs(self) -> Needs:
        return Needs(keys=True, sums=True, stream=True)

    @property
    def memory(self) -> Mapping[str, float]:
        return {"mass": 0.5}

    def head_memory(self, layer: Layer) -> Mapping[str, tuple[int, ...]]:
        return {"count": (), "queries": (layer.group, layer.head_dim), "hidden": (DIM,)}

    def stream(self, view: View, block: Block) -> Mapping[str, Any]:
        xp, old = view.xp, view.memory
        real = block.positions >= 0
        count = xp.astype(xp.sum(xp.astype(real, xp.int32), axis=1), old["count"].dtype)[:, None]
        queries = xp.sum(xp.where(real[:, None, None, :, None], block.queries, 0.0), axis=3)
        hidden = xp.sum(xp.where(real[..., None], block.hidden, 0.0), axis=1)[:, None, :]
        return {
            "mass": old["mass"],
            "count": old["count"] + count,
            "queries": old["queries"] + queries,
            "hidden": old["hidden"] + hidden,
        }

    def note(self, view: View) -> Mapping[str, Any]:
        return {**view.memory, "mass": view.memory["mass"] + view.sums}

    def score(self, view: View) -> Any:
        xp, memory = view.xp, view.memory
        queries = xp.sum(memory["queries"], axis=2)[:, :, None, :] / memory["count"][..., None, None]
        pull = xp.sum(memory["hidden"], axis=-1)[..., None]
        return xp.sum(view.keys * queries, axis=-1) + memory["mass"] * pull


def assert_summed(cache: Cache, taps: Mapping[str, np.ndarray], tokens: np.ndarray) -> None:
    """The head memory of `Summing` is what the taps of the same tokens add up to."""
    for index, layer in enumerate(cache.snapshot().layers):
        queries, hidden = taps[f"layers.{index}.attention.query"], taps[f"layers.{index}.attention_norm"]
        for row, head in np.ndindex(len(tokens), KV_HEADS):
            columns = [column for column in range(tokens.shape[1]) if tokens[row, column] >= 0]
            assert layer.heads["count"][row, head] == len(columns)
            total = sum(hidden[row, column] for column in columns)
            assert drift(layer.heads["hidden"][row, head], total) <= EXACT
            for member in range(GROUP):
                total = sum(queries[row, column, head * GROUP + member] for column in columns)
                assert drift(layer.heads["queries"][row, head, member], total) <= EXACT


def moved(tokens: np.ndarray) -> np.ndarray:
    """The same rows padded on the left."""
    return np.stack([np.roll(row, int((row < 0).sum())) for row in tokens])


@every_backend
def test_the_stream_is_every_token_once(backend: str) -> None:
    """Un-rotated queries and inputs, right and left padding, and a chunked prompt with a chunk that a row lacks."""
    tokens, policy, model = prompts(LENGTHS), Summing(budget=7), hybrid(backend)
    taps = tapped(tokens)
    straight = begun(backend, policy)
    assert_summed(straight, taps, tokens)
    assert_same(straight, begun("reference", policy))
    _, left = model.step(moved(tokens), model.cache(policy, batch=3))
    assert_same(left, straight)
    chunks = [(tokens[:, :10], {"phase": "prefill", "evict": False}), (tokens[:, 10:], {"phase": "prefill"})]
    assert (tokens[2, 10:] < 0).all()
    chunked, _ = run(model, model.cache(policy, batch=3), chunks)
    assert_same(chunked, straight, 1e-11)


@every_backend
def test_a_long_prompt_streams_in_blocks(backend: str) -> None:
    lengths = (BLOCK + 34, 5, BLOCK + 21)
    tokens, policy = prompts(lengths), Summing(budget=7)
    cache = begun(backend, policy, 0, lengths)
    assert_summed(cache, tapped(tokens), tokens)
    assert_same(cache, begun("reference", policy, 0, lengths))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_head_remembers_lives_as_long_as_its_row(backend: str, tmp_path: Any) -> None:
    """Decode, fork, rows, save and restore; a silent row keeps its own bit for bit."""
    policy = Summing(budget=7)
    cache = begun(backend, policy)
    copy, three, picked = cache.fork(), cache.rows([1]).fork(rows=3), cache.rows([2, 0, 2])
    before = cache.snapshot()
    cache.save(tmp_path / "cache")
    cache = fed(backend, cache, range(4), silent=[1])
    expected = fed("reference", begun("reference", policy), range(4), silent=[1])
    assert_same(cache, expected)
    after = cache.snapshot()
    for old, new in zip(before.layers, after.layers, strict=True):
        for key in old.heads:
            assert (old.heads[key][1] == new.heads[key][1]).all()
            assert (old.heads[key][0] != new.heads[key][0]).any()
    for again in (copy, hybrid(backend).restore(tmp_path / "cache")):
        assert_same(fed(backend, again, range(4), silent=[1]), cache, 0 if again is copy else EXACT)
    for row in range(3):
        assert_same(three.rows([row]), begun("reference", policy).rows([1]))
    assert_same(picked, begun("reference", policy).rows([2, 0, 2]))


@every_backend
def test_head_memory_in_the_decode_loop(backend: str) -> None:
    """`Model.decode` ends in the memory that the same tokens give one by one; an inactive row keeps its own."""
    policy, model = Summing(budget=7), hybrid(backend)
    logits, cache = model.step(prompts(LENGTHS), model.cache(policy, batch=3))
    active = np.array([True, True, False])
    new, _, cache = model.decode(cache, logits[:, 0], Sampling(), [], 5, active=active)
    expected = begun("reference", policy)
    for step in range(5):
        _, expected = hybrid("reference").step(new[:, step : step + 1], expected)
    assert (new[2] == -1).all()
    assert_same(cache, expected)


@dataclass(frozen=True, kw_only=True)
class Counting(Policy):
    """Counts in whole numbers, which memory is not."""

    @property
    def needs(self) -> Needs:
        return Needs(stream=True)

    @property
    def memory(self) -> Mapping[str, float]:
        return {"age": 0.0}

    def head_memory(self, layer: Layer) -> Mapping[str, tuple[int, ...]]:
        return {"count": ()}

    def stream(self, view: View, block: Block) -> Mapping[str, Any]:
        xp = view.xp
        count = xp.sum(xp.astype(block.positions >= 0, xp.int32), axis=1, dtype=xp.int32)[:, None]
        return {**view.memory, "count": xp.astype(view.memory["count"], xp.int32) + count}

    def note(self, view: View) -> Mapping[str, Any]:
        return {**view.memory, "age": view.seen[:, None, None] - view.positions}

    def score(self, view: View) -> Any:
        return -view.memory["age"]


@every_backend
def test_memory_is_of_one_precision(backend: str) -> None:
    """Whole numbers that a policy returns become what memory is, in one block as in several."""
    lengths = (BLOCK + 34, 5, BLOCK + 21)
    cache = begun(backend, Counting(budget=4), 0, lengths)
    for layer in cache.snapshot().layers:
        assert layer.heads["count"].dtype == layer.memory["age"].dtype == np.float64
        assert layer.heads["count"].tolist() == [[length] * KV_HEADS for length in lengths]
        assert layer.memory["age"][:, 0].tolist() == [[4.0, 3.0, 2.0, 1.0]] * 3
