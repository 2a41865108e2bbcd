"""The outside judge: Hugging Face transformers on random tiny models of every family, and what that judge can see."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from backends import backends
from tests.tiny import (
    FAMILIES,
    LENGTH,
    ROPES,
    huggingface,
    huggingface_logits,
    relative_drift,
    tiny_config,
    tiny_model,
    tiny_tokens,
)

# Hugging Face computes norms, softmax and rope angles in float32 whatever the dtype; 7e-7 was the worst of 100 models.
JUDGE = 2e-5
SEEN = 1e-4

SEEDS = [pytest.param(seed, marks=[pytest.mark.slow] if seed >= 4 else []) for seed in range(20)]


@pytest.mark.parametrize("backend", ["reference", "torch", "flax"])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_logits_equal_hugging_face(model_type: str, seed: int, backend: str) -> None:
    spec, weights = tiny_model(model_type, seed)
    tokens = tiny_tokens(spec, seed)
    expected = huggingface_logits(huggingface(tiny_config(model_type, seed), weights), tokens)
    model = backends.get(backend).build(spec, weights, dtype="float64")
    cache = model.cache(batch=len(tokens), length=LENGTH)
    found, _ = model.step(tokens, cache, logits="all")
    assert relative_drift(found, expected) <= JUDGE


def test_the_judge_sees_every_rope_in_every_family() -> None:
    """The seeds of the fast and the slow test go round: 4 configs meet 4 of the kinds, 20 all of them."""
    kinds = {
        (name, tiny_model(name, seed)[0].layers[0].rope.kind)
        for name in FAMILIES
        for seed in range(len(ROPES))
    }
    assert kinds == {(name, kind) for name in FAMILIES for kind in ROPES}


@dataclass(frozen=True)
class Feature:
    """A part of a family, and its removal from Hugging Face's side: from the config, the weights, or the modules."""

    family: str
    name: str
    having: dict[str, Any]
    config: Callable[[dict[str, Any]], dict[str, Any]] = lambda config: config
    weights: Callable[[str, np.ndarray], np.ndarray] = lambda name, value: value
    modules: Callable[[Any], None] = lambda model: None

    def __str__(self) -> str:
        return f"{self.family}-{self.name}"


def _zeroed(part: str) -> Callable[[str, np.ndarray], np.ndarray]:
    return lambda name, value: value * 0 if part in name and name.endswith(".bias") else value


def _changed(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda config: config | changes


def _without(*modules: str) -> Callable[[Any], None]:
    def remove(model: Any) -> None:
        for layer in model.model.layers:
            for module in modules:
                parent, _, child = module.rpartition(".")
                setattr(layer.get_submodule(parent), child, torch.nn.Identity())

    return remove


def _unscaled(model: Any) -> None:
    model.model.embed_tokens.embed_scale.fill_(1.0)


def _rope(kind: str, **changes: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0} | ROPES[kind] | changes}


def _windows(family: str, **having: Any) -> list[Feature]:
    having = {"sliding_window": 13} | having
    return [
        Feature(family, f"window {width}", having, _changed(sliding_window=width)) for width in (12, 14, 1000)
    ]


WINDOWED = {"use_sliding_window": True, "max_window_layers": 1}
FULL, SLIDING = "full_attention", "sliding_attention"
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 7}

FEATURES = [
    *(
        Feature(
            "llama",
            f"{part.strip('.')} bias",
            {"attention_bias": True, "mlp_bias": True},
            weights=_zeroed(part),
        )
        for part in (".query.", ".key.", ".value.", ".output.", ".gate.", ".up.", ".down.")
    ),
    *(
        Feature(name, f"rope {kind}", _rope(kind), _changed(**_rope("default")))
        for name in FAMILIES
        for kind in ROPES
        if kind != "default"
    ),
    Feature("llama", "yarn attention factor", _rope("yarn"), _changed(**_rope("yarn", attention_factor=1.0))),
    Feature("llama", "yarn truncate", _rope("yarn"), _changed(**_rope("yarn", truncate=False))),
    Feature("llama", "rope theta", _rope("default"), _changed(**_rope("default", rope_theta=501.0))),
    *_windows("mistral"),
    *_windows("qwen2", **WINDOWED),
    *_windows("qwen3", **WINDOWED),
    *_windows("gemma2"),
    Feature(
        "qwen2", "layers below the window", {"sliding_window": 13} | WINDOWED, _changed(max_window_layers=0)
    ),
    *(
        Feature("qwen2", f"{part} bias", {}, weights=_zeroed(f".{part}."))
        for part in ("query", "key", "value")
    ),
    Feature("qwen3", "query norm", {}, modules=_without("self_attn.q_norm")),
    Feature("qwen3", "key norm", {}, modules=_without("self_attn.k_norm")),
    Feature("qwen3", "bias", {"attention_bias": True}, weights=_zeroed(".")),
    Feature("gemma2", "attention soft-cap", CAPS, _changed(attn_logit_softcapping=None)),
    Feature("gemma2", "logit soft-cap", CAPS, _changed(final_logit_softcapping=None)),
    Feature("gemma2", "attention scale", CAPS, _changed(query_pre_attn_scalar=8)),
    Feature(
        "gemma2",
        "alternation",
        {"layer_types": [SLIDING, FULL, SLIDING]},
        _changed(layer_types=[FULL, SLIDING, FULL]),
    ),
    Feature("gemma2", "attention post norm", {}, modules=_without("post_attention_layernorm")),
    Feature("gemma2", "ffn post norm", {}, modules=_without("post_feedforward_layernorm")),
    Feature("gemma2", "norm offset", {}, weights=lambda name, value: value - ("norm.weight" in name)),
    Feature("gemma2", "embedding scale", {}, modules=_unscaled),
    Feature("gemma2", "activation", {}, _changed(hidden_activation="silu")),
]


@pytest.mark.parametrize("feature", FEATURES, ids=str)
def test_removing_a_feature_moves_hugging_face(feature: Feature) -> None:
    """Otherwise the comparison above would be blind to it."""
    config = tiny_config(feature.family, seed=11) | {"rope_scaling": None} | _rope("default") | feature.having
    config |= {"max_position_embeddings": 44} if config["rope_parameters"]["rope_type"] == "dynamic" else {}
    spec, weights = tiny_model(feature.family, 11, config)
    tokens = tiny_tokens(spec, 5, batch=1)
    expected = huggingface_logits(huggingface(config, weights), tokens)
    changed = {name: feature.weights(name, value) for name, value in weights.items()}
    model = huggingface(feature.config(config), changed)
    feature.modules(model)
    assert relative_drift(huggingface_logits(model, tokens), expected) >= SEEN
