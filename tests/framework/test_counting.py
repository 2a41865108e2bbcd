"""framework/counting.py: what transformers' own caches hold, the families' own reading, and what is refused."""

import json
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from framework.counting import counted
from framework.errors import KvtwinError
from framework.family import family
from framework.spec import Layer
from tests.tiny import FAMILIES, tiny_config

TOKENS = 23
NO_TOKENS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
BASE = NO_TOKENS | {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
EXPERTS = {
    "num_experts": 2,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "n_routed_experts": 2,
    "n_shared_experts": 1,
    "shared_expert_intermediate_size": 16,
}
WINDOWED = BASE | {"sliding_window": 9}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 24, "mamba_d_state": 8, "mamba_n_groups": 1}
STATES = {"mamba_num_heads": 4, "mamba_head_dim": 24, "ssm_state_size": 8, "n_groups": 1}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
LATENT = {
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "q_lora_rank": 12,
}
OWN_HEADS = {key: value for key, value in BASE.items() if key != "num_key_value_heads"}

# model_type: (config, layers without keys and values)
FOREIGN: dict[str, tuple[dict[str, Any], int]] = {
    "bamba": (BASE | MAMBA | {"attn_layer_indices": [1, 4]}, 4),
    "bloom": (NO_TOKENS | {"vocab_size": 97, "n_layer": 3, "n_head": 4, "hidden_size": 32}, 0),
    "cohere2": (WINDOWED, 0),
    "deepseek_v3": (BASE | EXPERTS | LATENT | {"n_group": 1, "topk_group": 1, "num_key_value_heads": 6}, 0),
    "gemma3_text": (WINDOWED | {"head_dim": 10}, 0),
    "gpt2": (NO_TOKENS | {"vocab_size": 97, "n_layer": 3, "n_head": 4, "n_embd": 32, "n_positions": 64}, 0),
    "gpt_neox": (OWN_HEADS, 0),
    "gpt_oss": (WINDOWED | EXPERTS | {"head_dim": 10, "rope_parameters": {"rope_type": "default"}}, 0),
    "granitemoehybrid": (
        BASE | EXPERTS | MAMBA | {"layer_types": ["mamba", "attention", *["mamba"] * 3, "attention"]},
        4,
    ),
    "lfm2": (BASE | {"full_attn_idxs": [1, 2, 5]}, 3),
    "mixtral": (WINDOWED | EXPERTS, 0),
    "nemotron_h": (
        BASE | STATES | {"hybrid_override_pattern": "M-*M*-", "head_dim": 10},
        4,
    ),
    "olmo3": (WINDOWED, 0),
    "phi3": (WINDOWED, 0),
    "qwen2_moe": (WINDOWED | EXPERTS | {"use_sliding_window": True, "max_window_layers": 4}, 0),
    "qwen3_moe": (BASE | EXPERTS | {"head_dim": 10}, 0),
    "qwen3_next": (BASE | EXPERTS | LINEAR | {"head_dim": 12, "linear_value_head_dim": 8}, 5),
    "starcoder2": (WINDOWED, 0),
}


def elements(layers: tuple[Layer, ...]) -> int:
    """What a cache of TOKENS tokens holds between two calls."""
    return sum(
        min(TOKENS, (layer.window or TOKENS + 1) - 1)
        * sum(each.heads * each.width for each in layer.streams.values())
        for layer in layers
    )


@pytest.mark.parametrize("form", ["written by hand", "saved by transformers"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_the_count_is_what_transformers_caches(kind: str, form: str) -> None:
    values, without = FOREIGN[kind]
    config = AutoConfig.for_model(kind, **values)
    given = (
        values | {"model_type": kind} if form == "written by hand" else json.loads(config.to_json_string())
    )
    layers, none = counted(given)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        cache = model(torch.arange(TOKENS)[None], use_cache=True).past_key_values
    streams = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    assert (elements(layers), none) == (sum(each.numel() for each in streams if each is not None), without)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_that_runs_is_counted_as_it_runs(model_type: str, seed: int) -> None:
    """Also where kvtwin would refuse to run it, for reasons that a cache does not know."""
    config = tiny_config(model_type, seed)
    unfit = config | {"rope_parameters": {"rope_type": "longrope"}, "quantization_config": {"bits": 4}}
    expected = [(each.kv_heads, each.head_dim, each.window) for each in family(config).spec(config).layers]
    layers, without = counted(unfit)
    assert [(each.kv_heads, each.head_dim, each.window) for each in layers] == expected
    assert without == 0


PLAIN = {"num_hidden_layers": 8, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10}


@pytest.mark.parametrize(
    ("more", "windows"),
    [
        ({"sliding_window": 5, "sliding_window_pattern": 3}, [5, 5, None, 5, 5, None, 5, 5]),
        ({"sliding_window": 5, "_sliding_window_pattern": 2}, [5, None] * 4),
        ({"sliding_window": 5, "use_sliding_window": False, "max_window_layers": 2}, [None] * 8),
        ({"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 6}, [None] * 6 + [5] * 2),
        ({"sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"] * 4}, [None, 5] * 4),
        ({"full_attention_interval": 4, "linear_conv_kernel_dim": 4}, [None] * 2),
        ({"attn_layer_period": 4, "attn_layer_offset": 3, "mamba_d_conv": 4}, [None] * 2),
        ({"attn_layer_period": 3, "attn_layer_offset": 2}, [None] * 2),
        ({"layers_block_type": ["mamba", "attention"] * 4}, [None] * 4),
        ({"num_nextn_predict_layers": 1, "mtp_layers_block_type": ["attention"]}, [None] * 8),
    ],
)
def test_which_layers_have_what(more: dict[str, Any], windows: list[int | None]) -> None:
    layers, without = counted(PLAIN | more)
    assert [each.window for each in layers] == windows
    assert without == 8 - len(windows)
    assert {(each.heads, each.kv_heads, each.head_dim, each.latent) for each in layers} == {(6, 2, 10, None)}


def test_a_nested_language_model_is_the_one_that_counts() -> None:
    vision = {"num_hidden_layers": 3, "hidden_size": 64}
    nested = {"model_type": "some_vl", "text_config": PLAIN, "vision_config": vision, "hidden_size": 7}
    assert counted(nested) == counted(PLAIN)


def test_null_kv_heads_are_all_heads_and_head_dim_is_a_share_of_the_width() -> None:
    given = {"n_layer": 2, "n_head": 4, "n_embd": 24, "num_key_value_heads": None}
    (layer, _), _ = counted(given)
    assert (layer.kv_heads, layer.head_dim) == (4, 6)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"num_hidden_layers": None}, "num_hidden_layers is None"),
        ({"num_key_value_heads": [2, 4]}, "num_key_value_heads is"),
        ({"num_key_value_heads": 4}, "a divisor of num_attention_heads=6"),
        ({"head_dim": None, "hidden_size": 50}, "hidden_size is 50; expected a multiple of 6 heads"),
        ({"v_head_dim": 12}, "v_head_dim is 12; expected 10"),
        ({"sliding_window": 5}, "which layers have it"),
        ({"sliding_window": 5, "full_attention_interval": 4}, "which layers have it"),
        (
            {"sliding_window": 5, "sliding_window_pattern": 2, "full_attention_interval": 4},
            "which layers have it",
        ),
        ({"sliding_window": 5, "sliding_window_pattern": "LLG"}, "sliding_window_pattern is 'LLG'"),
        ({"layer_types": ["full_attention"] * 7}, "layer_types is"),
        ({"layer_types": ["chunked_attention"] * 8}, "layer_types is"),
        ({"layer_types": ["sliding_attention"] * 8}, "sliding_window is None"),
        ({"layers_block_type": "attention"}, "layers_block_type is"),
        ({"hybrid_override_pattern": "M*"}, "hybrid_override_pattern is"),
        ({"attn_layer_indices": [8]}, "attn_layer_indices is"),
        ({"full_attn_idxs": 3}, "attn_layer_indices is 3"),
        ({"layer_types": ["mamba"] * 8}, "no layer keeps keys and values"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder is True"),
        ({"is_encoder_decoder": True, "text_config": PLAIN}, "is_encoder_decoder is True"),
        ({"num_kv_shared_layers": 4}, "num_kv_shared_layers=4"),
        ({"attention_chunk_size": 64}, "attention_chunk_size=64"),
        ({"index_head_dim": 128}, "index_head_dim=128"),
        ({"swa_num_key_value_heads": 4}, "swa_num_key_value_heads=4"),
        ({"global_head_dim": 512}, "global_head_dim=512"),
        ({"mamba_d_state": 16}, "mamba_d_state=16"),
        ({"multi_query": True}, "multi_query=True"),
        ({"kv_lora_rank": 16}, "qk_rope_head_dim is absent"),
        ({"model_type": "qwen2", "hidden_size": 60, "num_kv_shared_layers": 4}, "num_kv_shared_layers=4"),
    ],
)
def test_what_is_not_understood_is_refused(more: dict[str, Any], says: str) -> None:
    with pytest.raises(KvtwinError) as caught:
        counted(PLAIN | more, "a.json")
    assert says in str(caught.value)
    assert 1 <= len(str(caught.value).splitlines()) <= 3
    assert "a.json" in str(caught.value) or "family qwen2" in str(caught.value)


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_attention_heads", "num_key_value_heads"])
def test_what_is_absent_is_named(key: str) -> None:
    given = {name: value for name, value in PLAIN.items() if name != key}
    with pytest.raises(KvtwinError, match=f"{key} is absent"):
        counted(given)


@pytest.mark.parametrize(
    "harmless",
    [{"use_cache": True}, {"qkv_bias": True}, {"num_kv_shared_layers": 0}, {"swa_rope_theta": None}],
)
def test_what_does_not_change_a_cache_is_passed_over(harmless: dict[str, Any]) -> None:
    assert counted(PLAIN | harmless) == counted(PLAIN)
