"""Llama 1 to 3.x: grouped-query attention, SwiGLU, optional biases, every rope scaling but longrope."""

from typing import Any, final

from framework.config import Config
from framework.family import FULL, Family, activation_name, read_decoder, read_windows
from framework.spec import ModelSpec


@final
class Llama(Family):
    """`attention_bias` is on all four projections, `mlp_bias` on all three."""

    architecture = "LlamaForCausalLM"

    def read(self, config: Config) -> ModelSpec:
        """The spec of a Llama config."""
        bias = config.flag("attention_bias")
        return read_decoder(
            config,
            windows=read_windows(config, [FULL] * config.integer("num_hidden_layers"), None),
            positions=2048,
            stop=2,
            qkv_bias=bias,
            output_bias=bias,
            ffn_bias=config.flag("mlp_bias"),
        )

    def extras(self, spec: ModelSpec) -> dict[str, Any]:
        """Biases and activation."""
        return {
            "attention_bias": spec.qkv_bias,
            "mlp_bias": spec.ffn_bias,
            "hidden_act": activation_name(spec),
        }
