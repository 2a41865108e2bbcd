"""Gemma 2: soft-caps, alternating windows, norms after each block too, scaled and tied embeddings."""

from typing import Any, final

from framework.config import Config
from framework.family import (
    FULL,
    SLIDING,
    Family,
    activation_name,
    layer_types,
    read_decoder,
    read_windows,
    the_window,
)
from framework.spec import ModelSpec


@final
class Gemma2(Family):
    """Norm weights are stored less 1; the attention scale is query_pre_attn_scalar ** -0.5."""

    architecture = "Gemma2ForCausalLM"

    def read(self, config: Config) -> ModelSpec:
        """The spec of a Gemma 2 config. Layers 0, 2, 4, ... have the window where `layer_types` is absent."""
        count = config.integer("num_hidden_layers")
        alternating = [FULL if index % 2 else SLIDING for index in range(count)]
        bias = config.flag("attention_bias")
        older = config.get("hidden_act")
        if older is not None and older != config.get("hidden_activation", "gelu_pytorch_tanh"):
            raise config.refuse("hidden_act", older, "the same as hidden_activation, which counts")
        return read_decoder(
            config,
            windows=read_windows(config, alternating, config.integer("sliding_window", 4096)),
            positions=8192,
            kv_heads=4,
            head_dim=256,
            scale=config.integer("query_pre_attn_scalar", 256) ** -0.5,
            softcap=_softcap(config, "attn_logit_softcapping", 50.0),
            stop=1,
            activation="hidden_activation",
            tied=True,
            qkv_bias=bias,
            output_bias=bias,
            post_norms=True,
            norm_offset=1.0,
            embed_scale=config.integer("hidden_size") ** 0.5,
            logit_softcap=_softcap(config, "final_logit_softcapping", 30.0),
        )

    def extras(self, spec: ModelSpec) -> dict[str, Any]:
        """Soft-caps, scale, windows, bias and activation."""
        return {
            "hidden_activation": activation_name(spec),
            "attention_bias": spec.qkv_bias,
            "query_pre_attn_scalar": round(spec.layers[0].scale ** -2),
            "attn_logit_softcapping": spec.layers[0].softcap,
            "final_logit_softcapping": spec.logit_softcap,
            "sliding_window": the_window(spec) or 4096,
            "layer_types": layer_types([layer.window for layer in spec.layers]),
        }


def _softcap(config: Config, key: str, default: float) -> float | None:
    """A positive number; null turns the cap off, absence means the family's own."""
    value = config.number(key, default, null=True)
    if value == 0:
        raise config.refuse(key, value, "more than 0, or null")
    return None if value is None else float(value)
