"""config.json to spec and back: old and new forms of every family, and everything that is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig

from framework.config import read_config
from framework.errors import KvtwinError
from framework.family import families, family
from framework.spec import ModelSpec
from framework.weights import shapes
from tests.tiny import FAMILIES, ROPES, huggingface, huggingface_logits, tiny_config, tiny_model, tiny_tokens

SEEDS = range(6)
SIZES = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
}


def _spec(model_type: str, **keys: Any) -> ModelSpec:
    config = SIZES | {"model_type": model_type} | keys
    return family(config).spec(config)


def _windows(spec: ModelSpec) -> list[int | None]:
    return [layer.window for layer in spec.layers]


def test_the_tests_know_every_family() -> None:
    assert set(families.names()) == set(FAMILIES)


# Real config.json files in the form in which they lie on the hub, before and after transformers 5.

LLAMA31 = """{
  "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 128000,
  "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
  "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama",
  "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1,
  "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
  "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "rope_theta": 500000.0,
  "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.42.3", "use_cache": true,
  "vocab_size": 128256}"""
MISTRAL = """{
  "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
  "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
  "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
  "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": false,
  "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0", "use_cache": true, "vocab_size": 32000}"""
QWEN25 = """{
  "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
  "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
  "max_position_embeddings": 32768, "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 14,
  "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
  "sliding_window": 32768, "tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers_version": "4.43.1",
  "use_cache": true, "use_sliding_window": false, "vocab_size": 151936}"""
QWEN3 = """{
  "architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 151643,
  "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02,
  "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
  "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
  "rope_scaling": null, "rope_theta": 1000000, "sliding_window": null, "tie_word_embeddings": true,
  "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": true, "use_sliding_window": false,
  "vocab_size": 151936}"""
GEMMA2 = """{
  "architectures": ["Gemma2ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1,
  "final_logit_softcapping": 30.0, "head_dim": 128, "hidden_act": "gelu_pytorch_tanh",
  "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 4608, "initializer_range": 0.02,
  "intermediate_size": 36864, "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 32,
  "num_hidden_layers": 46, "num_key_value_heads": 16, "pad_token_id": 0, "query_pre_attn_scalar": 144,
  "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096, "torch_dtype": "bfloat16",
  "transformers_version": "4.42.0.dev0", "use_cache": true, "vocab_size": 256000, "_attn_implementation": "eager"}"""
PUBLISHED = {"llama": LLAMA31, "mistral": MISTRAL, "qwen2": QWEN25, "qwen3": QWEN3, "gemma2": GEMMA2}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_published_config_and_what_transformers_5_writes_of_it_agree(model_type: str) -> None:
    old = json.loads(PUBLISHED[model_type])
    parsed = AutoConfig.for_model(**old)
    kind = family(old)
    for new in (parsed.to_dict(), parsed.to_diff_dict(), kind.config(kind.spec(old))):
        assert kind.spec(json.loads(json.dumps(new, default=str))) == kind.spec(old)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_silent_config_means_what_hugging_face_assumes(model_type: str) -> None:
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    silent = {"model_type": model_type, "num_attention_heads": 32} | dict.fromkeys(keys, 64)
    spoken = AutoConfig.for_model(**silent).to_dict()
    assert family(silent).spec(silent) == family(silent).spec(spoken)


def test_llama31() -> None:
    config = json.loads(LLAMA31)
    spec = family(config).spec(config)
    rope = spec.layers[0].rope
    assert (spec.vocab, spec.dim, spec.ffn, len(spec.layers), spec.positions) == (
        128256,
        4096,
        14336,
        32,
        131072,
    )
    assert (spec.layers[0].heads, spec.layers[0].kv_heads, spec.layers[0].head_dim) == (32, 8, 128)
    assert (rope.kind, rope.factor, rope.original, rope.theta) == ("llama3", 8.0, 8192, 500000.0)
    assert spec.stop == (128001, 128008, 128009)
    assert (spec.qkv_bias, spec.output_bias, spec.ffn_bias, spec.tied, spec.post_norms) == (False,) * 5


def test_gemma2() -> None:
    config = json.loads(GEMMA2)
    spec = family(config).spec(config)
    assert spec.layers[0].scale == 144**-0.5
    assert _windows(spec) == [4096, None] * 23
    assert (spec.layers[0].softcap, spec.logit_softcap, spec.norm_offset) == (50.0, 30.0, 1.0)
    assert (spec.embed_scale, spec.tied, spec.post_norms, spec.activation) == (
        4608**0.5,
        True,
        True,
        "gelu_tanh",
    )


def test_qwen_biases_and_norms() -> None:
    assert (_spec("qwen2").qkv_bias, _spec("qwen2").output_bias) == (True, False)
    assert (_spec("qwen3").query_key_norm, _spec("qwen3", attention_bias=True).output_bias) == (True, True)


@pytest.mark.parametrize(
    ("model_type", "keys", "expected"),
    [
        ("mistral", {}, [4096] * 4),
        ("mistral", {"sliding_window": None}, [None] * 4),
        ("mistral", {"sliding_window": 5}, [5] * 4),
        ("qwen2", {"sliding_window": 5}, [None] * 4),
        ("qwen2", {"sliding_window": 5, "use_sliding_window": True}, [None] * 4),
        (
            "qwen2",
            {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 3},
            [None] * 3 + [5],
        ),
        ("qwen3", {"sliding_window": None, "use_sliding_window": True, "max_window_layers": 0}, [None] * 4),
        (
            "qwen3",
            {
                "sliding_window": 5,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            [5, None] * 2,
        ),
        ("gemma2", {"sliding_window": 5}, [5, None] * 2),
        ("gemma2", {"sliding_window": 5, "layer_types": ["full_attention"] * 4}, [None] * 4),
    ],
)
def test_windows(model_type: str, keys: dict[str, Any], expected: list[int | None]) -> None:
    assert _windows(_spec(model_type, **keys)) == expected


def test_head_dim_is_inferred_where_null() -> None:
    assert _spec("llama", head_dim=None).layers[0].head_dim == 4
    assert _spec("qwen3", head_dim=None).layers[0].head_dim == 4
    assert _spec("mistral", num_key_value_heads=None).layers[0].kv_heads == 6


def test_ropes_nested_by_layer_type() -> None:
    nested = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default"},
    }
    ropes = [layer.rope for layer in _spec("gemma2", rope_parameters=nested, rope_theta=77.0).layers]
    assert [(rope.kind, rope.theta) for rope in ropes] == [("default", 77.0), ("linear", 1e6)] * 2


def test_the_older_key_of_the_rope_kind() -> None:
    spec = _spec("llama", rope_scaling={"type": "linear", "factor": 2})
    assert (spec.layers[0].rope.kind, spec.layers[0].rope.factor) == ("linear", 2.0)


@pytest.mark.parametrize(("value", "expected"), [(None, ()), (7, (7,)), ([7, 9], (7, 9))])
def test_stop(value: Any, expected: tuple[int, ...]) -> None:
    assert _spec("llama", eos_token_id=value).stop == expected


def test_generation_config_has_the_last_word_on_stop(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SIZES | {"model_type": "llama", "eos_token_id": 3}))
    assert read_config(tmp_path)["eos_token_id"] == 3
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6}')
    assert read_config(tmp_path)["eos_token_id"] == 3
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 8]}')
    assert read_config(tmp_path)["eos_token_id"] == [3, 8]


@pytest.mark.parametrize(
    ("model_type", "keys", "reason"),
    [
        ("llama", {"logit_scale": 2.0}, "not implemented: logit_scale=2.0"),
        ("llama", {"logit_shift": 0}, "logit_shift=0"),
        ("llama", {"mixer": ""}, "mixer=''"),
        ("llama", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ("llama", {"sliding_window": 8}, "sliding_window=8"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config: quantized weights"),
        ("llama", {"pretraining_tp": 2}, "pretraining_tp is 2; expected 1"),
        ("llama", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("llama", {"hidden_size": None}, "hidden_size is None; expected a number"),
        ("llama", {"hidden_size": 2.5}, "hidden_size is 2.5; expected a whole number"),
        ("llama", {"hidden_size": "24"}, "hidden_size is '24'; expected a number"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers is 0; expected at least 1"),
        ("llama", {"num_key_value_heads": 4}, "6 heads do not divide into 4 kv heads"),
        ("llama", {"head_dim": 5}, "head_dim is 5; expected an even number"),
        ("llama", {"head_dim": None, "hidden_size": 25}, "a multiple of num_attention_heads=6"),
        ("llama", {"tie_word_embeddings": "yes"}, "expected true or false"),
        ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ("llama", {"eos_token_id": "</s>"}, "expected a token id or a list"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; expected 1"),
        ("llama", {"layer_types": ["sliding_attention"] * 4}, "sliding_window is None"),
        ("llama", {"layer_types": ["full_attention"] * 3}, "layer_types is .*expected 4 times"),
        ("llama", {"layer_types": ["linear_attention"] * 4}, "layer_types is"),
        ("llama", {"rope_theta": 0.0}, "rope_theta is 0.0; expected more than 1"),
        ("llama", {"rope_scaling": {"type": "longrope"}}, "longrope"),
        (
            "llama",
            {"rope_scaling": {"type": "su", "short_factor": [1.0]}},
            "'su' .longrope. is not implemented",
        ),
        ("llama", {"rope_scaling": {"type": "mrope"}}, "rope_type is 'mrope'; expected one of"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "factor is absent"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor is 0.5; expected at least 1"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2, "alpha": 3}}, "alpha=3"),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2}},
            "the same as rope_type",
        ),
        ("llama", {"rope_scaling": {"type": "default", "mrope_section": [1, 2]}}, "mrope_section"),
        ("llama", {"rope_scaling": [2]}, "rope_parameters is .2.; expected an object"),
        (
            "llama",
            {"rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 9}},
            "expected max_position_embeddings=2048",
        ),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
            "nothing beside rope_parameters",
        ),
        (
            "llama",
            {
                "rope_scaling": {
                    "type": "llama3",
                    "factor": 2.0,
                    "low_freq_factor": 4.0,
                    "high_freq_factor": 4.0,
                }
            },
            "more than low_freq_factor",
        ),
        ("mistral", {"sliding_window": 0}, "sliding_window is 0; expected at least 1"),
        ("mistral", {"layer_types": ["full_attention"] * 4}, "expected all 'sliding_attention'"),
        ("mistral", {"attention_bias": True}, "attention_bias=True"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 4}, "sliding_window is None"),
        ("gemma2", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; expected the same as"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'; expected one of"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gemma2", {"final_logit_softcapping": 0.0}, "more than 0, or null"),
        ("gemma2", {"rope_parameters": {"full_attention": {}}}, "an entry for each of"),
    ],
)
def test_refused(model_type: str, keys: dict[str, Any], reason: str) -> None:
    with pytest.raises(KvtwinError, match=reason) as caught:
        _spec(model_type, **keys)
    assert len(str(caught.value).splitlines()) <= 3


def test_a_missing_size_is_named() -> None:
    config = {key: value for key, value in SIZES.items() if key != "intermediate_size"} | {
        "model_type": "llama"
    }
    with pytest.raises(KvtwinError, match="intermediate_size is absent"):
        family(config).spec(config)


@pytest.mark.parametrize("off", [None, False, [], {}])
def test_an_unknown_key_that_is_off_is_harmless(off: Any) -> None:
    assert _spec("llama", some_new_thing=off) == _spec("llama")


@pytest.mark.parametrize(
    ("model_type", "near"),
    [("qwen33", "did you mean qwen3"), ("os.path", "expected one of gemma2"), (None, "None")],
)
def test_an_unknown_family_is_refused(model_type: Any, near: str) -> None:
    with pytest.raises(KvtwinError, match=near):
        family({"model_type": model_type})


# The writer.


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_written_config_reads_back(model_type: str, seed: int) -> None:
    config = tiny_config(model_type, seed)
    kind = family(config)
    spec = kind.spec(config)
    assert kind.spec(json.loads(json.dumps(kind.config(spec)))) == spec


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_written_config_is_the_same_function_to_hugging_face(model_type: str, seed: int) -> None:
    config = tiny_config(model_type, seed)
    spec, weights = tiny_model(model_type, seed)
    tokens = tiny_tokens(spec, seed)
    expected = huggingface_logits(huggingface(config, weights), tokens)
    found = huggingface_logits(huggingface(family(config).config(spec), weights), tokens)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", ROPES)
def test_every_rope_is_written(kind: str) -> None:
    spec = _spec("llama", rope_parameters={"rope_type": kind} | ROPES[kind])
    assert spec.layers[0].rope.kind == kind
    assert families.get("llama")().spec(families.get("llama")().config(spec)) == spec


def test_what_a_family_cannot_express_is_not_written() -> None:
    with pytest.raises(KvtwinError, match="family llama cannot express this spec's family, output_bias"):
        families.get("llama")().config(_spec("qwen2"))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_tensor_has_a_foreign_name(model_type: str, seed: int) -> None:
    spec, _ = tiny_model(model_type, seed)
    names = families.get(model_type)().names(spec)
    assert set(names) == set(shapes(spec))
    assert len(set(names.values())) == len(names)
