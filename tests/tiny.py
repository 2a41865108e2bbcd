"""Random tiny models of every family, and the same in Hugging Face transformers: what the tests share."""

from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from framework.family import family
from framework.spec import ModelSpec
from framework.weights import Weights, random_weights

FAMILIES = ("gemma2", "llama", "mistral", "qwen2", "qwen3")
LENGTH = 60  # tokens in a comparison: longer than every window, and than what the scaled ropes were made for

ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 2.5},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 28, "beta_fast": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 36,
    },
}


def tiny_config(model_type: str, seed: int) -> dict[str, Any]:
    """A random config.json: the rope kind goes round with the seed, the form (flat or transformers 5) is drawn.

    Every axis has another size: dim, ffn and vocab lie apart, and heads * head_dim is mostly not dim.
    """
    random = np.random.default_rng([seed, FAMILIES.index(model_type)])
    kv_heads, group = (int(x) for x in random.integers(1, 4, 2))
    heads = kv_heads * group
    kinds = list(ROPES)
    kind = kinds[(seed + FAMILIES.index(model_type)) % len(kinds)]
    config = {
        "model_type": model_type,
        "vocab_size": int(random.integers(61, 90)),
        "hidden_size": heads * int(np.ceil(random.integers(20, 33) / heads)),
        "intermediate_size": int(random.integers(37, 50)),
        "num_hidden_layers": 3,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 2 * int(random.integers(3, 9)),
        "max_position_embeddings": {"dynamic": 44, "yarn": 112}.get(kind, 512),
        "rms_norm_eps": float(random.choice([1e-6, 1e-5, 1e-2])),
        "tie_word_embeddings": bool(random.integers(2)),
        "bos_token_id": None,
        "pad_token_id": None,
        "eos_token_id": [None, 3, [3, 5]][random.integers(3)],
    }
    theta = float(random.choice([300.0, 10000.0, 500000.0]))
    scaling = {"rope_type": kind} | ROPES[kind]
    if random.integers(2):
        config["rope_parameters"] = scaling | {"rope_theta": theta}
    else:
        config |= {"rope_theta": theta, "rope_scaling": scaling if ROPES[kind] else None}
    return config | _own(model_type, random)


def _own(model_type: str, random: np.random.Generator) -> dict[str, Any]:
    """The keys that only this family has."""
    flip = bool(random.integers(2))
    window = int(random.integers(5, 21))
    upper = {
        "use_sliding_window": flip,
        "sliding_window": window,
        "max_window_layers": int(random.integers(3)),
    }
    return {
        "llama": {"attention_bias": flip, "mlp_bias": bool(random.integers(2))},
        "mistral": {"sliding_window": window if random.integers(4) else None},
        "qwen2": upper,
        "qwen3": upper | {"attention_bias": bool(random.integers(2))},
        "gemma2": {
            "sliding_window": window,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"] if flip else None,
            "query_pre_attn_scalar": int(random.integers(3, 30)),
            "attn_logit_softcapping": float(random.uniform(1, 4)) if random.integers(4) else None,
            "final_logit_softcapping": float(random.uniform(2, 9)) if random.integers(4) else None,
        },
    }[model_type]


def tiny_model(
    model_type: str, seed: int, config: dict[str, Any] | None = None, dtype: Any = np.float64
) -> tuple[ModelSpec, Weights]:
    """The spec of a random tiny config, or of this one, with random weights."""
    config = config or tiny_config(model_type, seed)
    spec = family(config).spec(config)
    return spec, random_weights(spec, seed, dtype)


def tiny_tokens(spec: ModelSpec, seed: int, batch: int = 2, tokens: int = LENGTH) -> np.ndarray:
    """Random token ids [batch, tokens]."""
    return np.random.default_rng([seed, 77]).integers(0, spec.vocab, (batch, tokens), dtype=np.int32)


def huggingface(config: dict[str, Any], weights: Weights) -> Any:
    """The same model in Hugging Face transformers, float64 and eager attention.

    Its norms, softmax and rope angles stay float32, whatever the dtype.
    """
    kind = family(config)
    names = kind.names(kind.spec(config))
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**config), attn_implementation="eager", dtype=torch.float64
    )
    loaded = model.load_state_dict(
        {names[name]: torch.from_numpy(value.astype(np.float64)) for name, value in weights.items()},
        strict=False,
    )
    assert set(loaded.missing_keys) <= {"lm_head.weight"}
    assert not loaded.unexpected_keys
    model.tie_weights()
    return model.eval()


def huggingface_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Logits [batch, tokens, vocab] of one full forward."""
    with torch.no_grad():
        return model(torch.from_numpy(tokens.astype(np.int64)), use_cache=False).logits.numpy()


def relative_drift(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest absolute difference relative to the largest absolute expected value."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())
