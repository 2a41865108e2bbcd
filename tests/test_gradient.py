"""Gradients by what attention gives: the reference by finite differences, backends by the reference, and the hook."""

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import backends.flax.model as flax_model
from backends import backends
from framework.backend import Model
from framework.cache import Cache
from framework.errors import KvtwinError
from framework.policy import Block, Needs, Policy, View
from framework.reference import ReferenceModel
from framework.spec import Layer
from tests.tiny import FAMILIES, relative_drift, tiny_model, tiny_tokens
from tests.twins import LENGTHS, column, compilations, hybrid, prompts, snapshot_drift, texts, unchecked

EXACT = 1e-9
BEGUN = 17  # tokens that a cache has seen, of which it keeps fewer
PLAIN, CLOSED = "window(budget=11, sinks=2)", "window(budget=11, sinks=2, reposition=True)"


def ahead(vocab: int) -> np.ndarray:
    """Three ragged rows to come, padded within and at the end; the last one has none."""
    tokens = np.random.default_rng(5).integers(0, vocab, (3, 13)).astype(np.int32)
    tokens[0, [2, 7]] = -1
    tokens[1, 6:] = -1
    tokens[2] = -1
    return tokens


def begun(model: Model, policy: str = PLAIN) -> Cache:
    """Rows that have seen different numbers of tokens and lost some; `length` bends the angles of dynamic ropes."""
    tokens = tiny_tokens(model.spec, 1, 3, BEGUN)
    tokens[1, 12:] = -1
    _, cache = model.step(tokens, model.cache(policy, batch=3, length=57), logits=None)
    return cache


@dataclass
class Nudged(ReferenceModel):
    """The reference with something added to the output of each layer's attention."""

    nudges: dict[str, np.ndarray] = field(default_factory=dict)

    def linear(self, x: np.ndarray, key: str) -> np.ndarray:
        return super().linear(x, key) + self.nudges.get(key, 0.0)


def objective(model: Model, row: np.ndarray, cache: Cache) -> float:
    """The sum of squares of what the last layer gives at the tokens of one row."""
    taps: dict[str, np.ndarray] = {}
    model.step(row, cache.fork(), logits=None, evict=False, taps=taps)
    return float((taps[f"layers.{len(model.spec.layers) - 1}.output"] ** 2).sum())


@pytest.mark.parametrize("policy", [PLAIN, CLOSED])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_reference_agrees_with_central_differences(kind: str, seed: int, policy: str) -> None:
    """In a random direction per layer, all tokens and channels at once; a token in the cache stays what it was."""
    spec, weights = tiny_model(kind, seed)
    model = backends.get("reference").build(spec, weights, "float64")
    nudged = Nudged(spec, {key: value.astype(np.float64) for key, value in weights.items()}, model.tokenizer)
    cache, step = begun(model, policy), 1e-4
    tokens = ahead(spec.vocab)
    found = model.gradients(tokens, cache)
    for number in (0, 1):
        row, real = tokens[[number]], tokens[number] >= 0
        alone = cache.rows([number])
        random = np.random.default_rng([seed, number])
        for index, one in enumerate(found):
            way = random.normal(size=(int(real.sum()), spec.dim))
            ends = []
            for side in (1, -1, 2, -2):
                nudged.nudges = {f"layers.{index}.attention.output": side * step * way}
                ends.append(objective(nudged, row, alone))
            slope = (8 * (ends[0] - ends[1]) - (ends[2] - ends[3])) / (12 * step)
            assert abs((one[number, real] * way).sum() - slope) <= 1e-7 * abs(slope) + 1e-8
            assert (one[number, ~real] == 0).all()
    assert all((one[2] == 0).all() for one in found)


@pytest.mark.parametrize(
    ("backend", "kind", "seed"),
    [("torch", kind, seed) for kind in FAMILIES for seed in (0, 1)]
    + [
        pytest.param("flax", kind, 0, marks=() if kind == "gemma2" else pytest.mark.slow) for kind in FAMILIES
    ],
)
def test_the_backends_agree_with_the_reference(backend: str, kind: str, seed: int) -> None:
    spec, weights = tiny_model(kind, seed)
    tokens, found = ahead(spec.vocab), []
    for each in ("reference", backend):
        model = backends.get(each).build(spec, weights, "float64")
        found.append(model.gradients(tokens, begun(model)))
    for one, other in zip(*found, strict=True):
        assert other.dtype == np.float64
        assert relative_drift(other, one) <= EXACT
        assert (other[tokens < 0] == 0).all()


@pytest.mark.parametrize(
    ("backend", "policy"),
    [(backend, policy) for backend in ("reference", "torch") for policy in ("h2o(budget=9)", CLOSED)]
    + [pytest.param("flax", "h2o(budget=9)", marks=pytest.mark.slow), ("flax", CLOSED)],
)
def test_a_batch_is_its_rows_and_the_cache_stays(backend: str, policy: str) -> None:
    """After decode, where a cache has holes; alone and without padding a row gets what it got among the others."""
    model = hybrid(backend)
    _, cache = model.step(prompts(), model.cache(policy, batch=len(LENGTHS)), logits=None)
    for step in range(3):
        _, cache = model.step(column(step), cache, logits=None)
    before, tokens = cache.fork(), ahead(model.spec.vocab)
    found = model.gradients(tokens, cache)
    assert snapshot_drift(cache, before) == 0
    truth = hybrid("reference")
    for row in (0, 1):
        real = tokens[row] >= 0
        alone = truth.gradients(tokens[[row]][:, real], truth.restore(before.rows([row]).snapshot()))
        for one, other in zip(found, alone, strict=True):
            assert relative_drift(one[row, real], other[0]) <= EXACT
    _, cache = model.step(tokens, cache, logits=None)  # and goes on as if nothing had been asked
    _, other = model.step(tokens, before, logits=None)
    assert snapshot_drift(cache, other) == 0


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("torch", "float32"),
        ("torch", "bfloat16"),
        pytest.param("flax", "bfloat16", marks=pytest.mark.slow),
        pytest.param("flax", "float32", marks=pytest.mark.slow),
    ],
)
def test_lower_precision_stays_near(backend: str, dtype: str) -> None:
    tokens, found = ahead(hybrid("reference").spec.vocab), []
    for model in (hybrid("reference"), hybrid(backend, dtype)):
        _, cache = model.step(prompts(), model.cache("window(budget=9)", batch=3), logits=None)
        found.append(model.gradients(tokens, cache))
    for one, other in zip(*found, strict=True):
        assert other.dtype == np.float32
        assert relative_drift(other, one) <= {"float32": 1e-5, "bfloat16": 0.1}[dtype]


def test_flax_compiles_once_for_all_policies_of_a_shape() -> None:
    model, tokens = hybrid("flax"), ahead(701)
    held = {}
    for policy in ("window(budget=6)", "key_norm(budget=5)"):
        _, held[policy] = model.step(prompts((5, 9, 4)), model.cache(policy, batch=3), logits=None)
    model.gradients(tokens, held["window(budget=6)"])
    with compilations() as seen:
        for cache in held.values():
            model.gradients(tokens[:, ::-1], cache)
            model.gradients(tokens[:, :9], cache)
    assert seen == []


def test_too_many_tokens_are_refused() -> None:
    for backend in ("reference", "torch", "flax"):
        model = hybrid(backend)
        with pytest.raises(KvtwinError, match="10 tokens exceed the capacity 9"):
            model.gradients(np.full((1, 10), 3), model.cache(batch=1, capacity=9))


# Memory: blocks of 256 x slots weights, never tokens x tokens.

MANY = 1024
WEIGHTS = 256 * MANY * 6 * 4  # bytes of the attention weights of one block, in float32


class Live(TorchDispatchMode):
    """Counts the bytes of the storages that are made inside and still there."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, kinds: Any, given: Any = (), named: Any = None) -> Any:
        out = function(*given, **(named or {}))
        for one in tree_leaves(out):
            if isinstance(one, torch.Tensor) and (storage := one.untyped_storage()) not in self.known:
                self.known.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.gone, storage.nbytes())
        return out

    def gone(self, count: int) -> None:
        self.now -= count


def many(backend: str) -> tuple[Model, np.ndarray, Cache]:
    """A pass of many tokens behind a short prompt."""
    model, tokens = hybrid(backend, "float32"), np.arange(MANY, dtype=np.int32)[None] % 701
    _, cache = model.step(tokens[:, :9], model.cache(), logits=None)
    return model, tokens, cache


def test_torch_holds_the_weights_of_a_block_at_a_time() -> None:
    """All four blocks of both layers would be 8 times this, and the backward pass needs several such arrays."""
    model, tokens, cache = many("torch")
    with unchecked(), Live() as live:
        model.gradients(tokens, cache)
    assert WEIGHTS < live.peak < 10 * WEIGHTS


@pytest.mark.slow
def test_flax_holds_the_weights_of_a_block_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens, cache = many("flax")
    asked: list[Any] = []
    compiled = flax_model.gradients

    def listen(*given: Any) -> Any:
        asked.append(given)
        return compiled(*given)

    monkeypatch.setattr(flax_model, "gradients", listen)
    model.gradients(tokens, cache)
    with unchecked():
        memory = compiled.lower(*asked[0]).compile().memory_analysis()
    assert WEIGHTS < memory.temp_size_in_bytes < 6 * WEIGHTS


# What reaches a policy.


@dataclass(frozen=True, kw_only=True)
class Slopes(Policy):
    """Remembers the gradients that it was given, weighed by position, and in which phases."""

    @property
    def needs(self) -> Needs:
        return Needs(stream=True, gradients=True)

    def head_memory(self, layer: Layer) -> Mapping[str, tuple[int, ...]]:
        return {"slopes": (20,)}

    def stream(self, view: View, block: Block) -> Any:
        assert (block.gradients is None) == (view.phase != "pass")
        if block.gradients is None:
            return view.memory
        xp = view.xp
        weight = xp.astype(xp.where(block.positions < 0, 0, block.positions), block.gradients.dtype)
        given = xp.sum(block.gradients * weight[..., None], axis=1)[:, None, :]
        return {"slopes": view.memory["slopes"] + given}

    def score(self, view: View) -> Any:
        return view.positions


@pytest.mark.parametrize(
    ("backend", "tokens"),
    [
        ("reference", 40),
        ("torch", 40),
        ("torch", 300),
        ("flax", 300),
        pytest.param("flax", 40, marks=pytest.mark.slow),
        pytest.param("reference", 300, marks=pytest.mark.slow),
    ],
)
def test_a_second_pass_carries_them_in_blocks(backend: str, tokens: int) -> None:
    model, truth, rows = hybrid(backend), hybrid("reference"), texts(2)
    behind = rows[:, 100 : 100 + tokens].copy()
    behind[1, tokens // 2 :] = -1
    caches = []
    for each in (model, truth):
        _, cache = each.step(
            rows[:, :9], each.cache(Slopes(budget=12), batch=2), logits=None, phase="prefill", evict=False
        )
        caches.append(cache)
    expected = truth.gradients(behind, caches[1])
    places = np.where(behind >= 0, 9 + np.cumsum(behind >= 0, axis=1) - 1, 0)
    cache = model.read(behind, caches[0])
    for layer, slopes in zip(cache.snapshot().layers, expected, strict=True):
        right = (slopes * places[..., None]).sum(1)[:, None]
        assert relative_drift(layer.heads["slopes"], np.broadcast_to(right, (2, 2, 20))) <= EXACT


def test_gradients_without_the_stream_are_refused() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Deaf(Slopes):
        @property
        def needs(self) -> Needs:
            return Needs(gradients=True)

    with pytest.raises(KvtwinError, match="asks for gradients; expected it to ask for the stream as well"):
        hybrid("torch").cache(Deaf(budget=9))
