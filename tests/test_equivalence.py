"""Both backends against the reference: logits of every family, caches filled in every way, and attention alone."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

from backends import backends
from backends.flax.attention import attention as flax_attention
from backends.torch.attention import attention as torch_attention
from framework.compare import TOLERANCE, distributions, drift, first_differing
from framework.policy import policies
from framework.spec import Layer, ModelSpec, Rope
from framework.weights import random_weights
from tests.tiny import FAMILIES, LENGTH, tiny_model, tiny_tokens
from tests.twins import LENGTHS, TWINS, column, hybrid, prompts, snapshot_drift, texts

EXACT = TOLERANCE["float64"]
SEEDS = [pytest.param(seed, marks=[pytest.mark.slow] if seed >= 4 else []) for seed in range(20)]
HALVES = [("torch", "bfloat16"), ("flax", "bfloat16"), ("torch", "float16")]


@cache
def tiny(model_type: str, seed: int):
    """Spec, weights that float32 holds exactly, tokens, and the reference's logits."""
    spec, weights = tiny_model(model_type, seed, dtype=np.float32)
    tokens = tiny_tokens(spec, seed)
    model = backends.get("reference").build(spec, weights)
    logits, _ = model.step(tokens, model.cache(batch=len(tokens), length=LENGTH), logits="all")
    return spec, weights, tokens, logits


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("backend", TWINS)
def test_logits_of_every_family(backend: str, dtype: str, model_type: str, seed: int) -> None:
    spec, weights, tokens, expected = tiny(model_type, seed)
    model = backends.get(backend).build(spec, weights, dtype)
    found, _ = model.step(tokens, model.cache(batch=len(tokens), length=LENGTH), logits="all")
    assert found.dtype == dtype
    assert drift(found, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("backend", TWINS)
def test_prefill_and_decode_equal_the_full_forward(backend: str, model_type: str) -> None:
    spec, weights, tokens, expected = tiny(model_type, 1)
    model = backends.get(backend).build(spec, weights, "float64")
    cached = model.cache(batch=len(tokens), length=LENGTH)
    cached.expect(LENGTH - 29)
    _, cached = model.step(tokens[:, :29], cached)
    for place in range(29, LENGTH):
        found, cached = model.step(tokens[:, place : place + 1], cached)
        assert drift(found[:, 0], expected[:, place]) <= EXACT


@pytest.mark.parametrize("model_type", ["gemma2", "qwen3"])
@pytest.mark.parametrize(("backend", "dtype"), HALVES)
def test_half_precision_by_distribution(backend: str, dtype: str, model_type: str) -> None:
    spec, weights, tokens, expected = tiny(model_type, 2)
    model = backends.get(backend).build(spec, weights, dtype)
    found, _ = model.step(tokens, model.cache(batch=len(tokens), length=LENGTH), logits="all")
    assert distributions(found, expected).within(dtype), distributions(found, expected)


@pytest.mark.parametrize(("backend", "dtype"), HALVES)
def test_huge_queries_and_keys_stay_finite(backend: str, dtype: str) -> None:
    """Their products lie beyond the largest float16; each query attends to one key, and the logits are numbers."""
    spec, weights, tokens, _ = tiny("llama", 0)
    huge = {
        key: value * (300 if ".query.weight" in key or ".key.weight" in key else 1)
        for key, value in weights.items()
    }
    taps: dict[str, np.ndarray] = {}
    judge = backends.get("reference").build(spec, huge)
    judge.step(tokens[:1], taps=taps)
    products = taps["layers.0.attention.query"].max() * taps["layers.0.attention.key"].max()
    assert products > np.finfo(np.float16).max
    model = backends.get(backend).build(spec, huge, dtype)
    found, cached = model.step(tokens, model.cache(batch=len(tokens), length=LENGTH), logits="all")
    again, _ = model.step(tokens[:, :1], cached)
    assert np.isfinite(found).all()
    assert np.isfinite(again).all()


# Several calls, rows of different lengths, capacities


@cache
def expected_run(policy: str, steps: int):
    """Logits of the prompts, of each decode step, and the cache, as the reference has them row by row."""
    model = hybrid("reference")
    first, cached = model.step(prompts(), model.cache(policy, batch=len(LENGTHS)), logits="all")
    later = []
    for step in range(steps):
        logits, cached = model.step(column(step), cached)
        later.append(logits)
    return first, later, cached


AT_END = [policies.spelling(policies.get(name).examples()[0]) for name in policies.names()]
AT_END.append("window(budget=10, sinks=2, reposition=True)")
PLAIN = [
    policy for policy in AT_END if policy.startswith(("keep_it_odd", "key_norm", "random", "window(budget=9"))
]


@pytest.mark.parametrize(
    ("backend", "policy"),
    [
        pytest.param(
            backend,
            policy,
            marks=[pytest.mark.slow] if backend == "flax" and (policy in PLAIN or index % 2) else [],
        )
        for backend in TWINS
        for index, policy in enumerate(AT_END)
    ],
)
def test_chunked_prefill_equals_whole(backend: str, policy: str) -> None:
    """The last chunk has a row without tokens, which is evicted all the same."""
    whole, _, judged = expected_run(policy, 0)
    model, tokens = hybrid(backend), prompts()
    cached = model.cache(policy, batch=len(tokens))
    cached.expect(60)
    first, cached = model.step(tokens[:, :25], cached, logits="all", phase="prefill", evict=False)
    last, cached = model.step(tokens[:, 25:], cached, logits="all", phase="prefill")
    assert drift(np.concatenate([first, last], axis=1), whole) <= EXACT
    assert snapshot_drift(cached, judged) <= EXACT


def _right(rows: list[np.ndarray], width: int) -> np.ndarray:
    return np.stack([np.pad(row, (0, width - len(row)), constant_values=-1) for row in rows])


def _left(rows: list[np.ndarray], width: int) -> np.ndarray:
    return np.stack([np.pad(row, (width - len(row), 0), constant_values=-1) for row in rows])


def _scattered(rows: list[np.ndarray], width: int) -> np.ndarray:
    random = np.random.default_rng(5)
    tokens = np.full((len(rows), width), -1, np.int32)
    for padded, row in zip(tokens, rows, strict=True):
        padded[np.sort(random.permutation(width)[: len(row)])] = row
    return tokens


@pytest.mark.parametrize("pad", [_right, _left, _scattered])
@pytest.mark.parametrize("policy", ["full()", "h2o(budget=9)", "snapkv(budget=9, window=4, kernel=3)"])
@pytest.mark.parametrize("backend", TWINS)
def test_a_padded_batch_equals_each_row_alone(backend: str, policy: str, pad) -> None:
    """The reference runs each row by itself and without padding."""
    first, later, judged = expected_run(policy, 3)
    tokens = pad([row[:length] for row, length in zip(texts(), LENGTHS, strict=True)], 47)
    model = hybrid(backend)
    found, cached = model.step(tokens, model.cache(policy, batch=len(tokens)), logits="all")
    assert (found[tokens < 0] == 0).all()
    assert drift(found[tokens >= 0], first[prompts() >= 0]) <= EXACT
    for step, expected in enumerate(later):
        found, cached = model.step(column(step), cached)
        assert drift(found, expected) <= EXACT
    assert snapshot_drift(cached, judged) <= EXACT


@pytest.mark.parametrize("capacity", [43, 200])
@pytest.mark.parametrize("backend", TWINS)
def test_extra_capacity_changes_nothing(backend: str, capacity: int) -> None:
    first, later, judged = expected_run("full()", 3)
    model = hybrid(backend)
    cached = model.cache(batch=len(LENGTHS), capacity=capacity)
    found, cached = model.step(prompts(), cached, logits="all")
    assert drift(found, first) <= EXACT
    for step, expected in enumerate(later):
        found, cached = model.step(column(step), cached)
        assert drift(found, expected) <= EXACT
    assert snapshot_drift(cached, judged) <= EXACT


@pytest.mark.parametrize("backend", TWINS)
def test_rows_at_their_capacity_beside_shorter_ones(backend: str) -> None:
    """Slots are shared by the rows of a batch: a short row goes on where a long one is full."""
    lengths, capacity = (23, 9), 24
    judge, model = hybrid("reference"), hybrid(backend)
    caches = [one.cache(batch=2, capacity=capacity) for one in (judge, model)]
    tokens = prompts(lengths)
    for step in range(-1, 12):
        if step >= 0:
            tokens = np.where([[step == 0], [True]], column(step, lengths), -1)
        expected, caches[0] = judge.step(tokens, caches[0])
        found, caches[1] = model.step(tokens, caches[1])
        assert drift(found, expected) <= EXACT
    assert snapshot_drift(caches[1], caches[0]) <= EXACT


@pytest.mark.parametrize("policy", ["snapkv(budget=9, window=4, kernel=3)"])
@pytest.mark.parametrize("backend", TWINS)
def test_every_tap_equals_the_reference(backend: str, policy: str) -> None:
    """In flax the taps come from the function that is not compiled, so this is also jit == no jit."""
    expected: dict[str, np.ndarray] = {}
    found: dict[str, np.ndarray] = {}
    tokens = prompts()
    right, judged = hybrid("reference").step(
        tokens, hybrid("reference").cache(policy, batch=3), logits="all", taps=expected
    )
    ours, cached = hybrid(backend).step(
        tokens, hybrid(backend).cache(policy, batch=3), logits="all", taps=found
    )
    real = tokens >= 0
    expected, found = ({key: value[real] for key, value in one.items()} for one in (expected, found))
    assert list(found) == list(expected)
    assert first_differing(found, expected, EXACT) is None
    assert drift(ours, right) <= EXACT
    assert snapshot_drift(cached, judged) <= EXACT


@pytest.mark.slow
def test_jit_equals_no_jit() -> None:
    """One decode step of the compiled function against the same function run operation by operation."""
    model, policy = hybrid("flax"), "h2o(budget=9)"
    _, cached = model.step(prompts(), model.cache(policy, batch=len(LENGTHS)))
    twin = cached.fork()
    compiled, cached = model.step(column(0), cached)
    with jax.disable_jit():
        plain, twin = model.step(column(0), twin)
    assert drift(compiled, plain) <= EXACT
    assert snapshot_drift(cached, twin) <= EXACT


def far_spec() -> ModelSpec:
    layer = Layer(heads=2, kv_heads=1, head_dim=6, scale=0.4, rope=Rope(theta=10000.0, dim=6))
    return ModelSpec(
        family="llama", vocab=97, dim=10, ffn=14, layers=(layer,), norm_eps=1e-6, positions=8192, tied=True
    )


@cache
def far_run(policy: str):
    """A prompt of 1500 tokens and three more on one layer, by the reference."""
    model = backends.get("reference").build(far_spec(), random_weights(far_spec(), 9, np.float32))
    tokens = np.random.default_rng(4).integers(0, 97, (1, 1503), dtype=np.int32)
    first, cached = model.step(tokens[:, :1500], model.cache(policy), logits="all")
    later = []
    for place in range(1500, 1503):
        logits, cached = model.step(tokens[:, place : place + 1], cached)
        later.append(logits)
    return tokens, first, later, cached


@pytest.mark.parametrize("policy", ["full()", "h2o(budget=1300)"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("backend", TWINS)
def test_far_positions(backend: str, dtype: str, policy: str) -> None:
    """Faults of the rope hide below 100; the prompt is also longer than one block of queries."""
    tokens, first, later, judged = far_run(policy)
    model = backends.get(backend).build(far_spec(), random_weights(far_spec(), 9, np.float32), dtype)
    found, cached = model.step(tokens[:, :1500], model.cache(policy), logits="all")
    assert drift(found, first) <= TOLERANCE[dtype]
    for place, expected in zip(range(1500, 1503), later, strict=True):
        found, cached = model.step(tokens[:, place : place + 1], cached)
        assert drift(found, expected) <= TOLERANCE[dtype]
    if dtype == "float64":
        assert snapshot_drift(cached, judged) <= EXACT


# Attention alone


def oracle(queries, keys, values, query_positions, key_positions, layer: Layer):
    """Attention query by query in float64: the mixed values, and the sums over queries (mean over the group)."""
    batch, kv_heads, group, tokens, _ = queries.shape
    mixed = np.zeros((*queries.shape[:-1], values.shape[-1]))
    sums = np.zeros(key_positions.shape)
    for row, head, member, token in np.ndindex(batch, kv_heads, group, tokens):
        own = query_positions[row, token]
        there = key_positions[row, head]
        visible = (there >= 0) & (there <= own)
        if layer.window is not None:
            visible &= own - there < layer.window
        if not visible.any():
            continue
        logits = keys[row, head][visible] @ queries[row, head, member, token] * layer.scale
        if layer.softcap is not None:
            logits = layer.softcap * np.tanh(logits / layer.softcap)
        weights = np.exp(logits - logits.max())
        weights /= weights.sum()
        mixed[row, head, member, token] = weights @ values[row, head][visible]
        sums[row, head, visible] += weights / group
    return mixed, sums


def on_torch(*arrays, layer: Layer, with_sums: bool):
    *rest, query_positions, key_positions = (
        torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
        if x.dtype == ml_dtypes.bfloat16
        else torch.from_numpy(x)
        for x in arrays
    )
    first = key_positions.shape[-1] - query_positions.shape[-1]
    mixed, sums = torch_attention(*rest, query_positions, key_positions, layer, first, with_sums)
    return mixed.double().numpy(), None if sums is None else sums.double().numpy()


compiled_attention = partial(jax.jit, static_argnames=("layer", "with_sums"))(flax_attention)


def on_flax(*arrays, layer: Layer, with_sums: bool):
    with jax.enable_x64(True):
        mixed, sums = compiled_attention(*map(jnp.asarray, arrays), layer=layer, with_sums=with_sums)
    return np.array(mixed, np.float64), None if sums is None else np.array(sums, np.float64)


RUNS = {"torch": on_torch, "flax": on_flax}
SHAPES = [(1, 1), (1, 5), (2, 5), (5, 5), (5, 2)]
KINDS = {
    "plain": ({}, False),
    "softcap": ({"softcap": 1.3}, False),
    "window": ({"window": 3}, False),
    "sums": ({}, True),
    "all": ({"softcap": 1.3, "window": 3}, True),
}


def random_attention(queries: int, slots: int, head_dim: int = 4):
    random = np.random.default_rng([queries, slots])
    q = random.normal(size=(2, 3, 2, queries, head_dim))
    k, v = random.normal(size=(2, 2, 3, slots, head_dim))
    return q, k, v


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("queries", "slots"), SHAPES)
@pytest.mark.parametrize("backend", TWINS)
def test_masks_are_lower_right(backend: str, queries: int, slots: int, kind: str) -> None:
    """The last query sees the last key. More queries than keys: the first ones see none, and give 0."""
    changes, with_sums = KINDS[kind]
    layer = Layer(heads=6, kv_heads=3, head_dim=4, scale=0.7, rope=None, **changes)
    arrays = random_attention(queries, slots)
    places = np.broadcast_to(np.arange(slots - queries, slots, dtype=np.int32), (2, queries))
    held = np.broadcast_to(np.arange(slots, dtype=np.int32), (2, 3, slots))
    _agree(backend, (*arrays, places.copy(), held.copy()), layer, with_sums)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("queries", "slots"), [(2, 5), (3, 9)])
@pytest.mark.parametrize("backend", TWINS)
def test_masks_follow_the_positions_of_each_head(backend: str, queries: int, slots: int, kind: str) -> None:
    """Each head holds other positions, in any order, with empty slots between them; one row is all padding."""
    changes, with_sums = KINDS[kind]
    layer = Layer(heads=6, kv_heads=3, head_dim=4, scale=0.7, rope=None, **changes)
    random = np.random.default_rng(slots)
    held = np.stack([[random.permutation(2 * slots)[:slots] for _ in range(3)] for _ in range(2)])
    held[random.random(held.shape) < 0.3] = -1
    held[0, 1] = -1
    places = np.sort(random.permutation(2 * slots)[: 2 * queries].reshape(2, queries), axis=1)
    places[1, 0] = -1
    arrays = (*random_attention(queries, slots), places.astype(np.int32), held.astype(np.int32))
    _agree(backend, arrays, layer, with_sums)


def _agree(backend: str, arrays: tuple, layer: Layer, with_sums: bool) -> None:
    mixed, sums = oracle(*arrays, layer)
    found, received = RUNS[backend](*arrays, layer=layer, with_sums=with_sums)
    blind = ~mixed.any(-1)
    assert (found[blind] == 0).all()
    np.testing.assert_allclose(found, mixed, rtol=0, atol=1e-13)
    assert (received is None) == (not with_sums)
    if with_sums:
        np.testing.assert_allclose(received, sums, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", ["plain", "softcap", "sums"])
@pytest.mark.parametrize(("backend", "dtype"), [*HALVES, ("flax", "float16")])
def test_half_precision_attention_does_not_overflow(backend: str, dtype: str, kind: str) -> None:
    """q = k = 300 in one of 128 channels: the product is 90000 before it is scaled."""
    changes, with_sums = KINDS[kind]
    layer = Layer(heads=6, kv_heads=3, head_dim=128, scale=128**-0.5, rope=None, **changes)
    half = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    q, k, v = random_attention(3, 5, head_dim=128)
    q[..., 7] = k[:, :, ::2, 7] = 300
    q, k, v = (x.astype(half) for x in (q, k, v))
    places = np.broadcast_to(np.arange(2, 5, dtype=np.int32), (2, 3)).copy()
    held = np.broadcast_to(np.arange(5, dtype=np.int32), (2, 3, 5)).copy()
    mixed, sums = oracle(*(x.astype(np.float64) for x in (q, k, v)), places, held, layer)
    found, received = RUNS[backend](q, k, v, places, held, layer=layer, with_sums=with_sums)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, mixed, rtol=0, atol=0.02)
    if with_sums:
        np.testing.assert_allclose(received, sums, rtol=0, atol=0.02)
