"""Qwen1.5, Qwen2 and Qwen2.5: Llama with biased queries, keys and values, and windows on the upper layers."""

from typing import Any, final

from framework.config import Config
from framework.family import Family, activation_name, read_decoder, read_upper_windows, write_upper_windows
from framework.spec import ModelSpec


@final
class Qwen2(Family):
    """The biases are always there and the output projection never has one."""

    architecture = "Qwen2ForCausalLM"

    def read(self, config: Config) -> ModelSpec:
        """The spec of a Qwen2 config."""
        return read_decoder(
            config, windows=read_upper_windows(config), positions=32768, kv_heads=32, qkv_bias=True
        )

    def extras(self, spec: ModelSpec) -> dict[str, Any]:
        """Windows and activation."""
        return write_upper_windows(spec) | {"hidden_act": activation_name(spec)}
