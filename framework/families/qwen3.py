"""Qwen3 (dense): RMSNorm on each head's query and key before rope, no biases by default."""

from typing import Any, final

from framework.config import Config
from framework.family import Family, activation_name, read_decoder, read_upper_windows, write_upper_windows
from framework.spec import ModelSpec


@final
class Qwen3(Family):
    """`head_dim` is 128 where the config is silent; `attention_bias` is on all four projections."""

    architecture = "Qwen3ForCausalLM"

    def read(self, config: Config) -> ModelSpec:
        """The spec of a Qwen3 config."""
        bias = config.flag("attention_bias")
        return read_decoder(
            config,
            windows=read_upper_windows(config),
            positions=32768,
            kv_heads=32,
            head_dim=128,
            qkv_bias=bias,
            output_bias=bias,
            query_key_norm=True,
        )

    def extras(self, spec: ModelSpec) -> dict[str, Any]:
        """Windows, bias and activation."""
        return write_upper_windows(spec) | {
            "attention_bias": spec.qkv_bias,
            "hidden_act": activation_name(spec),
        }
