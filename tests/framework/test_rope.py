"""Rotary frequencies against transformers, and angles at long positions and beyond the trained length."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from framework.errors import KvtwinError
from framework.family import family
from framework.rope import angles, frequencies, reach
from framework.spec import Rope

TRAINED = 64
SIZES = {
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 48,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": TRAINED,
}
SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16},
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096, "truncate": False},
    {
        "rope_type": "yarn",
        "factor": 40.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
        "beta_fast": 16,
        "beta_slow": 2,
    },
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.8},
    {"rope_type": "yarn", "factor": 1.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 6},  # a ramp of no width
    {"rope_type": "yarn", "factor": 4.0, "beta_slow": 1e-11},  # a ramp beyond the last channel
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
]


def _rope(scaling: dict[str, Any]) -> Rope:
    config = SIZES | {"rope_parameters": {"rope_theta": 500000.0} | scaling}
    rope = family(config).spec(config).layers[0].rope
    assert rope is not None
    return rope


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_frequencies_equal_transformers(scaling: dict[str, Any]) -> None:
    config = LlamaConfig(**SIZES, rope_parameters={"rope_theta": 500000.0} | scaling)
    expected, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config)
    found, found_factor = frequencies(_rope(scaling))
    np.testing.assert_allclose(found, expected.numpy(), rtol=2e-6)
    assert found_factor == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("length", [1, TRAINED, TRAINED + 1, 3 * TRAINED])
def test_dynamic_equals_transformers_at_the_declared_length(length: int) -> None:
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    config = LlamaConfig(**SIZES, rope_parameters={"rope_theta": 500000.0} | scaling)
    expected, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, seq_len=length)
    found, _ = frequencies(_rope(scaling), length)
    np.testing.assert_allclose(found, expected.numpy(), rtol=2e-6)


def test_default_is_the_definition() -> None:
    rope = Rope(theta=10000.0, dim=8)
    cos, sin = angles(rope, np.array([[0, 1, 70000]]))
    turned = 70000 * 10000.0 ** (-2 / 8)
    assert cos.shape == sin.shape == (1, 3, 4)
    assert cos.dtype == np.float64
    np.testing.assert_array_equal(cos[0, 0], np.ones(4))
    np.testing.assert_array_equal(sin[0, 0], np.zeros(4))
    assert cos[0, 2, 1] == pytest.approx(np.cos(turned), abs=1e-10)
    assert sin[0, 1, 0] == pytest.approx(np.sin(1.0), abs=1e-15)


def test_the_attention_factor_multiplies_both() -> None:
    rope = _rope({"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.5})
    cos, sin = angles(rope, np.arange(5))
    np.testing.assert_allclose(cos**2 + sin**2, np.full((5, 12), 0.25))


def test_dynamic_within_the_trained_length_is_plain() -> None:
    rope = _rope({"rope_type": "dynamic", "factor": 2.0})
    plain = replace(rope, kind="default")
    for length in (None, TRAINED):
        np.testing.assert_array_equal(
            angles(rope, np.arange(TRAINED), length), angles(plain, np.arange(TRAINED))
        )


def test_dynamic_uses_one_base_for_all_positions() -> None:
    rope = _rope({"rope_type": "dynamic", "factor": 2.0})
    whole, _ = angles(rope, np.arange(100), 100)
    part, _ = angles(rope, np.arange(7), 100)
    np.testing.assert_array_equal(whole[:7], part)
    plain, _ = angles(rope, np.arange(7))
    assert np.abs(plain - part).max() > 1e-2


@pytest.mark.parametrize(("last", "length"), [(TRAINED, None), (TRAINED, 3), (100, 100)])
def test_dynamic_beyond_the_length_is_refused(last: int, length: int | None) -> None:
    rope = _rope({"rope_type": "dynamic", "factor": 2.0})
    with pytest.raises(KvtwinError, match=f"position {last} .*\n.*declare it"):
        angles(rope, np.array([0, last]), length)


@pytest.mark.parametrize("length", [None, 5, 3 * TRAINED])
def test_reach_is_the_number_of_positions_with_angles(length: int | None) -> None:
    rope = _rope({"rope_type": "dynamic", "factor": 2.0})
    most = reach(rope, length)
    assert most == max(TRAINED, length or 0)
    angles(rope, np.arange(most), length)
    assert reach(replace(rope, kind="linear"), length) is None


def test_no_positions_have_no_angles() -> None:
    cos, _ = angles(_rope({"rope_type": "dynamic", "factor": 2.0}), np.zeros((2, 0), np.int32))
    assert cos.shape == (2, 0, 12)
