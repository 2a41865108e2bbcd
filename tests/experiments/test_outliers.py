"""experiments/outliers.py: which numbers change, by loops over heads and channels, and that the function stays."""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from backends import backends
from experiments.outliers import Sites, key_bias, pair_rescale
from framework.compare import TOLERANCE, drift
from framework.errors import KvtwinError
from framework.spec import ModelSpec, Rope
from framework.weights import Weights, random_weights, shapes
from tests.twins import hybrid_spec, texts

HEAD_DIM, GROUP, KV_HEADS = 8, 3, 2


def spec_of(kind: str) -> ModelSpec:
    """Three layers; `plain` has no biases, `partial` rotates 6 of 8 channels, `still` none, `soft` caps its logits."""
    full, sliding = hybrid_spec().layers
    spec = hybrid_spec(qkv_bias=kind != "plain")
    rope = Rope(theta=500.0, dim=6)
    changes: dict[str, dict[str, Any]] = {
        "partial": {"rope": rope},
        "still": {"rope": None},
        "soft": {"softcap": 3.0},
    }
    layers = tuple(replace(layer, **changes.get(kind, {})) for layer in (full, sliding, full))
    return replace(spec, layers=layers)


def weights_of(kind: str) -> Weights:
    return random_weights(spec_of(kind), 5, np.float32)


def logits(backend: str, spec: ModelSpec, weights: Weights, dtype: str = "float64") -> np.ndarray:
    """Of every token of two rows, longer than the window."""
    model = backends.get(backend).build(spec, weights, dtype)
    return model.step(texts(2)[:, :17], logits="all")[0]


@cache
def before(backend: str, kind: str, dtype: str = "float64") -> np.ndarray:
    return logits(backend, spec_of(kind), weights_of(kind), dtype)


def changed(old: Weights, new: Weights) -> set[str]:
    return {name for name in new if name not in old or not np.array_equal(old[name], new[name])}


@pytest.mark.parametrize("factor", [0.03, 100.0, 1000.0])
@pytest.mark.parametrize("kind", ["plain", "bias", "partial", "still", "soft"])
def test_a_rescaled_pair_leaves_the_function(kind: str, factor: float) -> None:
    spec, weights = pair_rescale(spec_of(kind), weights_of(kind), factor)
    assert spec == spec_of(kind)
    assert drift(logits("reference", spec, weights), before("reference", kind)) <= 1e-12


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("torch", "float64"),
        ("torch", "float32"),
        ("flax", "float64"),
        pytest.param("flax", "float32", marks=pytest.mark.slow),
    ],
)
def test_a_rescaled_pair_leaves_the_function_of_a_backend(backend: str, dtype: str) -> None:
    spec, weights = pair_rescale(spec_of("bias"), weights_of("bias"), 100.0, Sites(layers=[0, 1, 2]))
    found = drift(logits(backend, spec, weights, dtype), before(backend, "bias", dtype))
    assert found <= TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("kind", "heads", "pair", "partner"),
    [("bias", None, 3, 7), ("partial", None, 2, 5), ("plain", None, 3, 7), ("plain", [1], 3, 7)],
)
def test_what_a_rescaled_pair_changes(kind: str, heads: list[int] | None, pair: int, partner: int) -> None:
    """By default the slowest pair of all heads in the first and the last layer; queries follow their key."""
    old = weights_of(kind)
    _, new = pair_rescale(spec_of(kind), old, 10.0, Sites(heads=heads))
    expected = {name: value.astype(np.float64) for name, value in old.items()}
    for layer in (0, 2):
        for ending in ["weight"] if kind == "plain" else ["weight", "bias"]:
            keys, queries = (
                expected[f"layers.{layer}.attention.{each}.{ending}"] for each in ("key", "query")
            )
            for head in heads or range(KV_HEADS):
                for channel in (pair, partner):
                    keys[head * HEAD_DIM + channel] *= 10.0
                    for query in range(head * GROUP, head * GROUP + GROUP):
                        queries[query * HEAD_DIM + channel] /= 10.0
    for name, value in expected.items():
        np.testing.assert_allclose(new[name], value, rtol=1e-15, err_msg=name)


def test_the_keys_of_chosen_sites_are_larger_and_no_others() -> None:
    spec, old = spec_of("bias"), weights_of("bias")
    _, new = pair_rescale(spec, old, 7.0, Sites(layers=[1], heads=[1], pair=2))
    taps: list[dict[str, np.ndarray]] = [{}, {}]
    for weights, tap in zip((old, new), taps, strict=True):
        backends.get("reference").build(spec, weights, "float64").step(texts(2)[:, :9], taps=tap)
    for layer in range(3):
        gain = np.ones((KV_HEADS, 1, HEAD_DIM))
        if layer == 1:
            gain[1, 0, [2, 6]] = 7.0
        at = f"layers.{layer}.attention.key_rotated"
        first, second = (np.moveaxis(tap[at], -2, -3).reshape(2, KV_HEADS, 9, HEAD_DIM) for tap in taps)
        np.testing.assert_allclose(second, first * gain, rtol=1e-9)
        assert np.abs(first).min() > 0


def test_what_a_key_bias_changes() -> None:
    for kind in ("plain", "bias"):
        old = weights_of(kind)
        spec, new = key_bias(spec_of(kind), old, 50.0, Sites(layers=[2], heads=[1]))
        assert spec == replace(spec_of(kind), qkv_bias=True)
        assert {name: value.shape for name, value in new.items()} == shapes(spec)
        expected = np.zeros(KV_HEADS * HEAD_DIM) + (
            0 if kind == "plain" else old["layers.2.attention.key.bias"]
        )
        expected[1 * HEAD_DIM + 3] += 50.0
        np.testing.assert_allclose(new["layers.2.attention.key.bias"], expected, rtol=1e-15)
        added = changed(old, new) - {"layers.2.attention.key.bias"}
        assert all(name.endswith(".bias") and not new[name].any() for name in added)
        assert len(added) == (8 if kind == "plain" else 0)


@pytest.mark.parametrize("backend", ["reference", "torch", pytest.param("flax", marks=pytest.mark.slow)])
def test_a_key_bias_leaves_the_function_where_nothing_turns(backend: str) -> None:
    spec, weights = key_bias(spec_of("still"), weights_of("still"), 30.0)
    assert drift(logits(backend, spec, weights), before(backend, "still")) <= 1e-12


def test_a_key_bias_nearly_leaves_the_function_where_little_turns() -> None:
    """The pair that turns slowest, 1e-7 per token here; the fastest one would be seen at once."""
    slow = tuple(replace(layer, rope=Rope(theta=1e9, dim=8)) for layer in spec_of("plain").layers)
    spec = replace(spec_of("plain"), layers=slow)
    weights = weights_of("plain")
    right = logits("reference", spec, weights)
    near = drift(logits("reference", *key_bias(spec, weights, 100.0)), right)
    far = drift(logits("reference", *key_bias(spec, weights, 100.0, Sites(pair=0))), right)
    assert 1e-9 < near < 1e-3
    assert far > 0.1


@pytest.mark.parametrize("rewrite", [pair_rescale, key_bias])
def test_the_input_stays_and_nothing_is_shared(rewrite: Any) -> None:
    old = weights_of("bias")
    kept = {name: value.copy() for name, value in old.items()}
    _, new = rewrite(spec_of("bias"), old, 9.0)
    assert changed(kept, old) == set()
    assert changed(old, new) != set()
    assert not any(np.shares_memory(old[name], value) for name, value in new.items() if name in old)


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        (Sites(layers=[3]), r"layer \[3\]; expected different numbers from 0 to 2"),
        (Sites(layers=[]), r"layer \[\]"),
        (Sites(layers=[-1]), r"layer \[-1\]"),
        (Sites(heads=[0, 0]), r"kv head of layer 0 \[0, 0\]; expected different numbers from 0 to 1"),
        (Sites(heads=[2]), r"kv head of layer 0 \[2\]"),
        (Sites(pair=4), r"pair of layer 0 \[4\]; expected different numbers from 0 to 3"),
    ],
)
@pytest.mark.parametrize("rewrite", [pair_rescale, key_bias])
def test_sites_that_are_not_there(rewrite: Any, sites: Sites, message: str) -> None:
    with pytest.raises(KvtwinError, match=message):
        rewrite(spec_of("bias"), weights_of("bias"), 9.0, sites)


@pytest.mark.parametrize("rewrite", [pair_rescale, key_bias])
def test_models_whose_function_would_change_are_refused(rewrite: Any) -> None:
    spec = hybrid_spec(query_key_norm=True)
    with pytest.raises(KvtwinError, match="norms queries and keys after their projection"):
        rewrite(spec, random_weights(spec, 0), 9.0)


def test_other_bad_input() -> None:
    spec, weights = spec_of("bias"), weights_of("bias")
    for factor in (0.0, -2.0, np.inf, np.nan):
        with pytest.raises(KvtwinError, match="expected a finite number above 0"):
            pair_rescale(spec, weights, factor)
    with pytest.raises(KvtwinError, match="nan is added to a key bias"):
        key_bias(spec, weights, np.nan)
    with pytest.raises(KvtwinError, match="layer 0 caps its logits"):
        key_bias(spec_of("soft"), weights_of("soft"), 9.0)
    with pytest.raises(KvtwinError, match="1 missing"):
        pair_rescale(spec, {name: value for name, value in weights.items() if name != "norm.weight"}, 2.0)
    latent = replace(spec, layers=tuple(replace(layer, latent=5) for layer in spec.layers))
    with pytest.raises(KvtwinError, match="layer 0 stores one latent"):
        pair_rescale(latent, weights, 2.0)
