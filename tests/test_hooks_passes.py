"""Second passes over a prompt, whose attention is counted again by loops."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from framework.compare import drift
from framework.errors import KvtwinError
from framework.generate import prefill
from framework.policy import Block, Needs, Policy, View
from framework.spec import Layer
from tests.hooked import (
    EXACT,
    GROUP,
    KV_HEADS,
    LENGTHS,
    assert_same,
    begun,
    every_backend,
    fed,
    flax_later,
    held,
    tapped,
)
from tests.twins import WINDOW, hybrid, prompts, snapshot_drift, texts


@dataclass(frozen=True, kw_only=True)
class Rereading(Policy):
    """Scores by the attention that passes gave; counts what was read in passes, what came otherwise, and calls."""

    free: bool = False

    @property
    def order_free(self) -> bool:
        return self.free

    @property
    def needs(self) -> Needs:
        return Needs(sums=True, queries=2, stream=True)

    @property
    def memory(self) -> Mapping[str, float]:
        return {"heard": 0.0}

    def head_memory(self, layer: Layer) -> Mapping[str, tuple[int, ...]]:
        return {"told": (), "read": (), "calls": ()}

    def stream(self, view: View, block: Block) -> Mapping[str, Any]:
        xp, key = view.xp, "read" if view.phase == "pass" else "told"
        count = xp.sum(xp.astype(block.positions >= 0, view.memory[key].dtype), axis=1)
        return {**view.memory, key: view.memory[key] + count[:, None]}

    def note(self, view: View) -> Mapping[str, Any]:
        counted = {**view.memory, "calls": view.memory["calls"] + 1.0}
        if view.phase != "pass":
            return counted
        return {**counted, "heard": view.memory["heard"] + view.sums}

    def score(self, view: View) -> Any:
        return view.memory["heard"]

    def passes(self, prompt: Sequence[int], encode: Callable[[str], list[int]]) -> list[list[int]]:
        assert all(type(token) is int for token in prompt)
        first = [*encode("ab"), *prompt[:3]]
        return [first, prompt[2:4]] if len(prompt) > 10 else [first[:2]]


def heard(prompt: list[int], read: list[list[int]]) -> np.ndarray:
    """What the prompt's tokens receive from the queries of each pass, [layers kv_heads tokens], by loops over taps."""
    result = np.zeros((2, KV_HEADS, len(prompt)))
    for part in read:
        taps = tapped(np.array([prompt + part], np.int32))
        for layer, window in enumerate((None, WINDOW)):
            queries, keys = (taps[f"layers.{layer}.attention.{key}_rotated"][0] for key in ("query", "key"))
            for head, query in np.ndindex(KV_HEADS * GROUP, len(part)):
                at, weights = len(prompt) + query, {}
                for position in range(at + 1):
                    if window is None or at - position < window:
                        logit = queries[at, head] @ keys[position, head // GROUP] * 8**-0.5
                        weights[position] = np.exp(logit)
                for position, weight in weights.items():
                    if position < len(prompt):
                        share = weight / sum(weights.values()) / GROUP
                        result[layer, head // GROUP, position] += share
    return result


@every_backend
def test_passes_are_read_before_the_prompt_is_evicted(backend: str) -> None:
    """They leave attention behind and nothing else; the last row has one pass where the others have two."""
    policy, model = Rereading(budget=5), hybrid(backend)
    rows = [texts(3)[row, :length].tolist() for row, length in enumerate(LENGTHS)]
    encode = model.tokenizer.encode
    cache, logits = prefill(model, rows, None, policy, "full()", 3, None, "prompt")
    plain, _ = model.step(prompts(LENGTHS), model.cache(policy, batch=3))
    assert drift(logits, plain[:, 0]) == 0
    assert cache.seen.tolist() == list(LENGTHS)
    shot = cache.snapshot()
    for row, prompt in enumerate(rows):
        read = policy.passes(prompt, encode)
        assert len(read) == (1 if row == 2 else 2)
        right = heard(prompt, read)
        for index, window in enumerate((None, WINDOW)):
            layer = shot.layers[index]
            assert (layer.heads["read"][row] == sum(map(len, read))).all()
            assert (layer.heads["told"][row] == len(prompt)).all()
            assert (layer.heads["calls"][row] == 1 + len(read)).all()
            assert layer.query_positions[row].tolist() == [len(prompt) - 2, len(prompt) - 1]
            for head in range(KV_HEADS):
                living = [p for p in range(len(prompt)) if window is None or p > len(prompt) - window]
                best = sorted(sorted(living, key=lambda p: (right[index, head, p], p))[-5:])
                assert held(layer.positions[row, head]) == best
                assert drift(layer.memory["heard"][row, head], right[index, head, best]) <= EXACT
    assert_same(cache, prefill(hybrid("reference"), rows, None, policy, "full()", 3, None, "prompt")[0])
    with pytest.raises(
        KvtwinError, match=r"Rereading.* reads the whole prompt a second time; expected evict="
    ):
        prefill(model, rows, None, policy, "full()", 3, 4, "chunk")


@flax_later
def test_generate_goes_on_after_passes(backend: str) -> None:
    rows = [texts(3)[row, :length].tolist() for row, length in enumerate(LENGTHS)]
    found = hybrid(backend).generate(rows, policy=Rereading(budget=5), max_new_tokens=4, stop=[], chunk=6)
    expected = hybrid("reference").generate(
        rows, policy=Rereading(budget=5), max_new_tokens=4, stop=[], chunk=6
    )
    assert found.tokens == expected.tokens
    assert_same(found.cache, expected.cache, 1e-11)


@pytest.mark.parametrize(
    "policy",
    [Rereading(budget=5, interval=3), Rereading(budget=5, free=True)],
    ids=["interval", "overwriting"],
)
@every_backend
def test_what_is_read_leaves_no_tokens(backend: str, policy: Rereading) -> None:
    """In the midst of decode: tokens, keys, values and queries stay, and evictions fall due as before."""
    cache = begun(backend, policy, 4)
    assert cache.steps == (4 if policy.interval == 3 else 0)
    before, singles = cache.fork(), cache.singles
    part = np.array([[5, 6, 7], [8, -1, -1], [-1, -1, -1]], np.int32)
    after = hybrid(backend).read(part, cache)
    assert (after.steps, after.singles, after.pending) == (before.steps, singles, False)
    with pytest.raises(KvtwinError, match="consumed"):
        len(cache.seen)
    assert snapshot_drift(after.rows([2]), before.rows([2])) == 0
    for old, new in zip(before.snapshot().layers, after.snapshot().layers, strict=True):
        assert (old.positions == new.positions).all()
        assert (old.query_positions == new.query_positions).all()
        assert (old.queries == new.queries).all()
        assert all((old.streams[key] == new.streams[key]).all() for key in old.streams)
        for row, count in enumerate((3, 1, 0)):
            assert (new.heads["read"][row] == count).all()
            assert (new.heads["calls"][row] == old.heads["calls"][row] + (count > 0)).all()
            changed = new.memory["heard"][row] != old.memory["heard"][row]
            assert changed.any() == (count > 0)
    right = hybrid("reference").read(part, begun("reference", policy, 4))
    assert_same(fed(backend, after, range(4, 8)), fed("reference", right, range(4, 8)))
