"""What only the flax backend promises: how often it compiles, that decode reuses its buffers, what stays allocated."""

import gc
from typing import Any

import jax
import numpy as np
import pytest

from backends import backends
from backends.flax import decode as compiled
from backends.flax.convert import DTYPES, PAGE, parameter
from framework.backend import Model
from framework.compare import TOLERANCE, drift
from framework.decode import Sampling
from framework.errors import KvtwinError
from framework.weights import random_weights
from tests.twins import LENGTHS, compilations, hybrid, hybrid_spec, hybrid_weights, prompts, texts, unchecked

POLICY = "h2o(budget={})"


def fresh(dtype: str = "float32") -> Model:
    """A model that nothing has been compiled for."""
    compiled.interned.cache_clear()
    return backends.get("flax").build(hybrid_spec(), hybrid_weights(), dtype)


def run(model: Model, policy: str, length: int, count: int, **sampling: Any) -> None:
    tokens = [[int(token) for token in row[:length]] for row in texts()]
    model.generate(tokens, policy=policy, max_new_tokens=count, stop=(), **sampling)


def test_five_prompt_lengths_and_300_steps_compile_twice() -> None:
    """One prefill and one decode loop; then nothing more, whatever else changes within the bucket."""
    model = fresh()
    with compilations() as seen, unchecked():
        run(model, POLICY.format(9), 25, 300)
        for length in (26, 28, 31, 32):
            run(model, POLICY.format(9), length, 3)
        assert len(seen) == 2, seen
        run(model, POLICY.format(10), 30, 5)  # budgets 9 to 11 share a bucket in the sliding layer too
        run(model, POLICY.format(9), 30, 7, temperature=0.7)
        run(model, POLICY.format(11), 30, 7, temperature=1.2, top_k=5, seed=3)
        run(model, POLICY.format(9), 30, 7, temperature=1.2, top_p=0.5, min_p=0.1, seed=4)
        run(model, POLICY.format(9), 30, 500)
        assert len(seen) == 2, seen
        run(model, POLICY.format(9), 33, 3)
        assert len(seen) > 2, "the listener hears nothing"


def test_the_full_policy_compiles_twice_for_many_lengths() -> None:
    """Buffers that only grow are sized for the announced tokens."""
    model = fresh()
    with compilations() as seen, unchecked():
        for length, count in ((25, 300), (27, 40), (32, 3), (29, 400)):
            run(model, "full()", length, count)
    assert len(seen) == 2, seen


def test_streaming_compiles_twice() -> None:
    model = fresh()
    with compilations() as seen, unchecked():
        for length in (25, 31):
            assert list(
                model.stream(texts()[0, :length].tolist(), policy=POLICY.format(9), max_new_tokens=30)
            )
    assert len(seen) == 2, seen


def test_models_that_differ_in_weights_alone_share_what_is_compiled() -> None:
    run(fresh(), POLICY.format(9), 25, 20)
    other = backends.get("flax").build(hybrid_spec(), hybrid_weights(4), "float32")
    larger = backends.get("flax").build(
        hybrid_spec(ffn=29), random_weights(hybrid_spec(ffn=29), 4), "float32"
    )
    with compilations() as seen, unchecked():
        run(other, POLICY.format(9), 25, 20)
        assert not seen
        run(larger, POLICY.format(9), 25, 20)
        assert len(seen) == 2


def test_given_tokens_compile_one_step() -> None:
    model = fresh()
    with compilations() as seen:
        _, cached = model.step(prompts(), model.cache(POLICY.format(9), batch=len(LENGTHS)))
        for step in range(20):
            _, cached = model.step(texts()[:, 50 + step : 51 + step], cached)
    assert len(seen) == 2, seen


def loop_arguments(model: Model, policy: str) -> tuple[Any, tuple]:
    """A cache after the prompts, and what `decode` would give its compiled loop."""
    logits, cached = model.step(prompts(), model.cache(policy, batch=len(LENGTHS)))
    cached = model.ready(cached, 8)
    settings = (np.float32(0), np.int32(0), np.float32(1), np.float32(0), np.uint32(0))
    return cached, (
        model.skeleton, cached.plan, model.leaves, model.given(cached, 64), cached.state, logits[:, 0],
        np.full((len(LENGTHS), 512), -1, np.int32), np.ones(len(LENGTHS), bool),
        np.int32(0), np.int32(8), np.int32(0), settings, np.full(compiled.STOPS, -2, np.int32),
    )  # fmt: skip


@pytest.mark.parametrize(
    "policy",
    [
        "h2o(budget=9)",
        pytest.param("full()", marks=pytest.mark.slow),
        pytest.param("snapkv(budget=9, window=4, kernel=3)", marks=pytest.mark.slow),
    ],
)
def test_the_loop_reuses_the_buffers_of_the_cache(policy: str) -> None:
    """Donation: XLA aliases at least as many bytes as the cache has, and the old arrays are gone."""
    model = hybrid("flax", "float32")
    cached, arguments = loop_arguments(model, policy)
    leaves = jax.tree.leaves(cached.state)
    size = sum(x.nbytes for x in leaves)
    with unchecked():  # lowering puts stand-ins where the arrays are
        memory = compiled.loop.lower(*arguments).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= size
    model.decode(cached, arguments[5], Sampling(), (), 8)
    assert all(x.is_deleted() for x in leaves)


def test_a_single_step_reuses_the_buffers_of_the_cache() -> None:
    model = hybrid("flax", "float32")
    cached, _ = loop_arguments(model, "h2o(budget=9)")
    arrays = [x for layer in cached.state.layers for x in (*layer.streams.values(), *layer.memory.values())]
    places = {x.unsafe_buffer_pointer() for x in arrays}
    _, after = model.step(texts()[:, 50:51], cached)
    now = [x for layer in after.state.layers for x in (*layer.streams.values(), *layer.memory.values())]
    assert all(x.is_deleted() for x in arrays)
    assert {x.unsafe_buffer_pointer() for x in now} == places


@pytest.mark.parametrize(("policy", "most"), [("window(budget=9)", 17), ("h2o(budget=(20, 5))", 25)])
def test_after_the_prompt_only_the_small_buffers_live(policy: str, most: int) -> None:
    """Counted over all arrays of the process, against the same with nothing evicted."""
    model, tokens = hybrid("flax", "float32"), texts()[:, :400]
    model.step(tokens, model.cache(policy, batch=3), logits=None)  # tables and compiled constants stay
    gc.collect()
    before = {id(x) for x in jax.live_arrays()}
    _, cached = model.step(tokens, model.cache(policy, batch=3), logits=None)
    gc.collect()
    new = sum(x.nbytes for x in jax.live_arrays() if id(x) not in before)
    head_dim, heads, layers = 8, 2, 2
    per_slot = 3 * heads * (2 * head_dim * 4 + 4 + (4 if "h2o" in policy else 0))
    assert new >= cached.bytes.capacity
    assert new <= layers * most * per_slot + 100
    assert new < layers * 400 * per_slot / 10


def test_a_declared_capacity_is_kept_on_the_host() -> None:
    """Before anything runs: a compiled write past the end would land on the last slots without a word."""
    model = hybrid("flax")
    cached = model.cache(batch=2, capacity=12)
    _, cached = model.step(texts(2)[:, :10], cached)
    with pytest.raises(KvtwinError, match="13 tokens exceed the capacity 12"):
        model.step(texts(2)[:, 10:13], cached)
    with pytest.raises(KvtwinError, match="14 tokens exceed the capacity 12"):
        model.decode(cached, np.zeros((2, 701)), Sampling(), (), 4)
    assert cached.seen.tolist() == [10, 10]
    _, cached = model.step(texts(2)[:, 10:11], cached)
    _, cached = model.step(texts(2)[:, 11:12], cached)
    with pytest.raises(KvtwinError, match="13 tokens exceed the capacity 12"):
        model.step(texts(2)[:, 12:13], cached)


def test_a_consumed_cache_raises() -> None:
    model = hybrid("flax")
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


def test_float64_and_float32_live_beside_each_other() -> None:
    """Turn by turn in one process; neither loses or gains bits from the other."""
    tokens, policy = prompts(), "h2o(budget=9)"
    expected, judged = hybrid("reference").step(tokens, hybrid("reference").cache(policy, batch=3))
    caches = {dtype: hybrid("flax", dtype).cache(policy, batch=3) for dtype in ("float64", "float32")}
    for step in range(3):
        for dtype, cached in caches.items():
            found, caches[dtype] = hybrid("flax", dtype).step(tokens, cached)
            assert found.dtype == dtype
            assert drift(found, expected) <= TOLERANCE[dtype]
            kinds = {x.dtype for layer in caches[dtype].state.layers for x in layer.streams.values()}
            assert kinds == {np.dtype(dtype)}
        tokens = texts()[np.arange(3), np.array(LENGTHS) + step][:, None]
        expected, judged = hybrid("reference").step(tokens, judged)
    assert not jax.config.jax_enable_x64


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [3, 1500, 3001])
def test_parameters_are_copies_in_large_pages(rows: int, dtype: str) -> None:
    """Large ones begin where a large page can; none shares memory with what it was made from."""
    source = np.random.default_rng(rows).standard_normal((rows, 1401)).astype(np.float32)
    kind = DTYPES[dtype]
    made = parameter(source, kind)
    expected = source.astype(kind)
    assert made.dtype == kind
    assert made.unsafe_buffer_pointer() % PAGE == 0 or expected.nbytes < 4 * PAGE
    source[:] = 7
    assert (np.asarray(made) == expected).all()
