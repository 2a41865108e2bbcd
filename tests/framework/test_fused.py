"""Joined matrices against their parts, row by row."""

from dataclasses import replace

import numpy as np
import pytest

from framework.fused import fused, parted
from framework.spec import Layer, ModelSpec
from framework.weights import random_weights

LAYER = Layer(heads=6, kv_heads=2, head_dim=4, scale=0.5, rope=None)
SPEC = ModelSpec(
    family="qwen2",
    vocab=11,
    dim=5,
    ffn=7,
    layers=(LAYER, replace(LAYER, heads=3, kv_heads=3)),
    norm_eps=1e-6,
    positions=32,
    qkv_bias=True,
)


@pytest.fixture(scope="module")
def weights():
    return random_weights(SPEC, 3)


@pytest.mark.parametrize("kind", ["weight", "bias"])
@pytest.mark.parametrize("index", [0, 1])
def test_rows_stand_by_kv_head(weights, index, kind):
    layer, at = SPEC.layers[index], f"layers.{index}.attention"
    query, key, value = (weights[f"{at}.{part}.{kind}"] for part in ("query", "key", "value"))
    rows = []
    for head in range(layer.kv_heads):
        for own in range(layer.group):
            for channel in range(layer.head_dim):
                rows.append(query[(head * layer.group + own) * layer.head_dim + channel])
        for side in (key, value):
            for channel in range(layer.head_dim):
                rows.append(side[head * layer.head_dim + channel])
    joined = dict(fused(SPEC, weights))
    np.testing.assert_array_equal(joined[f"{at}.query_key_value.{kind}"], np.array(rows))


def test_gates_stand_before_ups(weights):
    joined = dict(fused(SPEC, weights))["layers.1.ffn.gate_up.weight"]
    np.testing.assert_array_equal(joined[: SPEC.ffn], weights["layers.1.ffn.gate.weight"])
    np.testing.assert_array_equal(joined[SPEC.ffn :], weights["layers.1.ffn.up.weight"])


def test_every_tensor_comes_once_and_no_part_beside_its_whole(weights):
    names = [name for name, _ in fused(SPEC, weights)]
    size = sum(value.size for _, value in fused(SPEC, weights))
    assert len(set(names)) == len(names)
    assert size == sum(value.size for value in weights.values())
    assert not [name for name in names if name.split(".")[-2] in ("query", "key", "value", "gate", "up")]


def test_a_tensor_is_read_when_it_is_its_turn(weights):
    read = []

    class Listened(dict):
        def __getitem__(self, name):
            read.append(name)
            return super().__getitem__(name)

    next(fused(SPEC, Listened(weights)))
    assert set(read) == {"embed.weight"}


def test_parted_is_the_inverse(weights):
    back = parted(SPEC, dict(fused(SPEC, weights)))
    assert list(back) == list(weights)
    for name, value in weights.items():
        np.testing.assert_array_equal(back[name], value)
