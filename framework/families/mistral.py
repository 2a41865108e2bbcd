"""Mistral: Llama without biases, with one sliding window for all layers, or none."""

from typing import Any, final

from framework.config import Config
from framework.family import FULL, SLIDING, Family, activation_name, read_decoder, read_windows, the_window
from framework.spec import ModelSpec


@final
class Mistral(Family):
    """`sliding_window` is the number of tokens that a query sees, itself included; null means all."""

    architecture = "MistralForCausalLM"

    def read(self, config: Config) -> ModelSpec:
        """The spec of a Mistral config. Mixed `layer_types` are refused: Hugging Face's Mistral ignores them."""
        window = config.integer("sliding_window", 4096, null=True)
        types = [FULL if window is None else SLIDING] * config.integer("num_hidden_layers")
        if config.get("layer_types", types) not in (types, None):
            raise config.refuse(
                "layer_types", config.get("layer_types"), f"all {types[0]!r}, as sliding_window={window}"
            )
        return read_decoder(
            config,
            windows=read_windows(config, types, window),
            positions=131072,
            kv_heads=8,
            stop=2,
        )

    def extras(self, spec: ModelSpec) -> dict[str, Any]:
        """Window and activation."""
        return {"sliding_window": the_window(spec), "hidden_act": activation_name(spec)}
