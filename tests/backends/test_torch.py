"""What only the torch backend promises: dropped tokens free their memory, and growth is amortised."""

import gc
from typing import Any

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from framework.decode import Sampling
from framework.errors import KvtwinError
from tests.twins import hybrid, texts, unchecked

POLICIES = ["window(budget=9)", "h2o(budget=(20, 5))", "snapkv(budget=9, window=4, kernel=3)"]
LONG = 400


def tensors(x: Any, seen: set[int] | None = None) -> list[torch.Tensor]:
    """Every tensor that is reachable from an object through its attributes, dicts and lists."""
    seen = set() if seen is None else seen
    if id(x) in seen:
        return []
    seen.add(id(x))
    if isinstance(x, torch.Tensor):
        return [x]
    inside = list(getattr(x, "__dict__", {}).values())
    inside += list(x.values()) if isinstance(x, dict) else list(x) if isinstance(x, list | tuple) else []
    return [tensor for one in inside for tensor in tensors(one, seen)]


def storages(cache: Any) -> dict[int, torch.UntypedStorage]:
    """The distinct storages by address; empty ones have none."""
    every = (tensor.untyped_storage() for tensor in tensors(cache))
    return {storage.data_ptr(): storage for storage in every if storage.nbytes()}


def held(cache: Any) -> int:
    return sum(storage.nbytes() for storage in storages(cache).values())


@pytest.mark.parametrize("policy", POLICIES)
def test_compression_frees_what_it_drops(policy: str) -> None:
    """Storages fall to the budget's after a prompt held back in full, and the old ones are dead."""
    model, tokens = hybrid("torch", "float32"), texts()[:, :LONG]
    _, cached = model.step(tokens, model.cache(policy, batch=3), logits=None, evict=False)
    budgets = {layer.budget.untyped_storage().data_ptr() for layer in cached.layers}  # which stay
    before = [StorageWeakRef(x) for place, x in storages(cached).items() if place not in budgets]
    whole = held(cached)
    slots = cached.layers[0].positions.shape[-1]
    assert slots >= LONG
    assert not any(storage.expired() for storage in before)
    _, cached = model.step(np.full((3, 1), -1), cached, logits=None, phase="prefill")
    gc.collect()
    assert all(storage.expired() for storage in before)
    queries = sum(x.nbytes for layer in cached.layers for x in (layer.queries,) if x is not None)
    bounds = [min(9, 11)] * 2 if "20" not in policy else [20, 5]
    memory = 4 if "h2o" in policy else 0
    per_slot = 3 * 2 * (2 * 8 * 4 + 4 + memory)
    assert (
        cached.bytes.capacity <= held(cached) <= sum(bound + 1 for bound in bounds) * per_slot + queries + 200
    )
    assert held(cached) < whole / 8


@pytest.mark.parametrize("policy", POLICIES)
def test_memory_stays_at_the_budget_during_decode(policy: str) -> None:
    model = hybrid("torch", "float32")
    _, cached = model.step(texts()[:, :60], model.cache(policy, batch=3), logits=None)
    sizes = set()
    for step in range(40):
        _, cached = model.step(texts()[:, 60 + step : 61 + step], cached, logits=None)
        sizes.add(held(cached))
    assert len(sizes) <= 2
    assert max(sizes) <= 1.25 * min(sizes)


def test_growth_is_amortised() -> None:
    """1000 tokens, one at a time: the buffers move O(log) times, and at most a quarter lies empty."""
    model = hybrid("torch", "float32")
    cached, moves, last = model.cache(batch=1), 0, None
    random = np.random.default_rng(1)
    with unchecked():
        for _ in range(1000):
            _, cached = model.step(random.integers(0, 701, (1, 1)), cached, logits=None)
            layer = cached.layers[0]
            place = layer.streams["keys"].untyped_storage().data_ptr()
            moves += place != last
            last = place
            assert layer.slots - layer.fill <= max(8, layer.fill / 4 + 1)
    assert layer.fill == 1000
    assert moves <= 30


def test_a_fork_shares_no_storage() -> None:
    model = hybrid("torch")
    _, cached = model.step(texts()[:, :20], model.cache("h2o(budget=9)", batch=3))
    assert not storages(cached).keys() & storages(cached.fork()).keys()
    assert not storages(cached).keys() & storages(cached.rows([2, 0])).keys()


def test_a_consumed_cache_raises() -> None:
    model = hybrid("torch")
    cached = model.cache(batch=2)
    model.step(texts(2)[:, :5], cached)
    for use in (
        lambda: model.step(texts(2)[:, 5:6], cached),
        lambda: model.decode(cached, np.zeros((2, 701)), Sampling(), (), 4),
        cached.fork,
        cached.snapshot,
        lambda: cached.bytes,
        lambda: cached.seen,
        lambda: cached.kept,
        lambda: cached.rows([0]),
        lambda: cached.roll_back(1),
    ):
        with pytest.raises(KvtwinError, match="consumed by a step"):
            use()
    assert "consumed" in repr(cached)
