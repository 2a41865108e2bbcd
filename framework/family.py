"""Families of models: how a Hugging Face config.json becomes a ModelSpec, and how it names its tensors."""

import difflib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from framework.config import HARMLESS, Config, layer_ropes, rope_parameters, stop_tokens
from framework.errors import KvtwinError
from framework.registry import Registry
from framework.spec import Layer, ModelSpec

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
FULL, SLIDING = "full_attention", "sliding_attention"


class Family(ABC):
    """One foreign model type. A member reads its own keys in `read` and writes them in `extras`."""

    @property
    def name(self) -> str:
        """The `model_type`, which is also the name of the member's file."""
        return type(self).__module__.rpartition(".")[2]

    @property
    @abstractmethod
    def architecture(self) -> str:
        """Hugging Face's class, as `architectures` names it."""

    @abstractmethod
    def read(self, config: Config) -> ModelSpec:
        """The spec. Reads every key that changes numbers; what it leaves unread is refused by the caller."""

    @abstractmethod
    def extras(self, spec: ModelSpec) -> dict[str, Any]:
        """The keys of config.json that not every family has."""

    def spec(self, config: Mapping[str, Any]) -> ModelSpec:
        """The spec of a config.json, old and flat or from transformers 5.

        Raises KvtwinError where a key is missing, wrong, or not implemented and not off.
        """
        reader = Config(config, f"config.json of family {self.name}")
        if reader.get("model_type") != self.name:
            raise reader.refuse("model_type", config.get("model_type"), repr(self.name))
        if config.get("quantization_config"):
            raise KvtwinError(
                f"{reader.place} has a quantization_config: quantized weights are not implemented\n"
                "expected float32, float64, bfloat16 or float16 weights: use the unquantized checkpoint"
            )
        if reader.integer("pretraining_tp", 1) != 1:
            raise reader.refuse("pretraining_tp", config["pretraining_tp"], "1")
        spec = self.read(reader)
        reader.finish(HARMLESS)
        return spec

    def config(self, spec: ModelSpec) -> dict[str, Any]:
        """The config.json, in the form of transformers 5, that reads back to `spec`.

        Raises KvtwinError naming the fields that this family cannot express.
        """
        layer = spec.layers[0]
        written = {
            "architectures": [self.architecture],
            "model_type": self.name,
            "vocab_size": spec.vocab,
            "hidden_size": spec.dim,
            "intermediate_size": spec.ffn,
            "num_hidden_layers": len(spec.layers),
            "num_attention_heads": layer.heads,
            "num_key_value_heads": layer.kv_heads,
            "head_dim": layer.head_dim,
            "max_position_embeddings": spec.positions,
            "rms_norm_eps": spec.norm_eps,
            "rope_parameters": rope_parameters(layer.rope) if layer.rope else None,
            "tie_word_embeddings": spec.tied,
            "bos_token_id": None,
            "pad_token_id": None,
            "eos_token_id": spec.stop[0] if len(spec.stop) == 1 else list(spec.stop) or None,
        } | self.extras(spec)
        back = self.spec(written)
        lost = [item.name for item in fields(spec) if getattr(back, item.name) != getattr(spec, item.name)]
        if lost:
            raise KvtwinError(
                f"family {self.name} cannot express this spec's {', '.join(lost)}\n"
                "expected a spec whose config.json reads back to the same spec"
            )
        return written

    def names(self, spec: ModelSpec) -> dict[str, str]:
        """Canonical tensor name -> foreign tensor name, of every tensor that `spec` has."""
        found = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
        if not spec.tied:
            found["head.weight"] = self.head
        for index in range(len(spec.layers)):
            for canonical, foreign in _layer_names(spec).items():
                found[f"layers.{index}.{canonical}"] = f"model.layers.{index}.{foreign}"
        return found

    @property
    def head(self) -> str:
        """The foreign name of the output matrix, which tied checkpoints may hold too."""
        return "lm_head.weight"

    def ignored(self, foreign: str) -> bool:
        """Whether a tensor of old checkpoints holds nothing that the config does not say."""
        return foreign.endswith("rotary_emb.inv_freq")


def _layer_names(spec: ModelSpec) -> dict[str, str]:
    linears = {
        f"attention.{name}": f"self_attn.{name[0]}_proj" for name in ("query", "key", "value", "output")
    }
    linears |= {f"ffn.{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    biased = {"attention.output": spec.output_bias} | {
        f"ffn.{name}": spec.ffn_bias for name in ("gate", "up", "down")
    }
    named = {"attention_norm.weight": "input_layernorm.weight"}
    if spec.post_norms:
        named["attention_post_norm.weight"] = "post_attention_layernorm.weight"
        named["ffn_norm.weight"] = "pre_feedforward_layernorm.weight"
        named["ffn_post_norm.weight"] = "post_feedforward_layernorm.weight"
    else:
        named["ffn_norm.weight"] = "post_attention_layernorm.weight"
    if spec.query_key_norm:
        named["attention.query_norm.weight"] = "self_attn.q_norm.weight"
        named["attention.key_norm.weight"] = "self_attn.k_norm.weight"
    for canonical, foreign in linears.items():
        named[f"{canonical}.weight"] = f"{foreign}.weight"
        if biased.get(canonical, spec.qkv_bias):
            named[f"{canonical}.bias"] = f"{foreign}.bias"
    return named


def read_decoder(
    config: Config,
    *,
    windows: list[int | None],
    positions: int,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    stop: int | None = None,
    activation: str = "hidden_act",
    tied: bool = False,
    **others: Any,
) -> ModelSpec:
    """The spec of a decoder from the keys that all families share.

    `windows` has one entry a layer. `positions`, `kv_heads`, `head_dim`, `stop` and `tied` are what the family assumes
    where the config is silent; `activation` is its name of that key; `scale` None means head_dim ** -0.5; `others` are
    further fields of the spec.
    """
    dim, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads", kv_heads, null=True)
    head_dim = read_head_dim(config, head_dim)
    positions = config.integer("max_position_embeddings", positions)
    ropes = layer_ropes(config, layer_types(windows), head_dim, positions)
    layers = tuple(
        Layer(heads, kv_heads or heads, head_dim, scale or head_dim**-0.5, rope, window, softcap)
        for rope, window in zip(ropes, windows, strict=True)
    )
    return ModelSpec(
        family=str(config.get("model_type")),
        vocab=config.integer("vocab_size"),
        dim=dim,
        ffn=config.integer("intermediate_size"),
        layers=layers,
        norm_eps=float(config.number("rms_norm_eps", 1e-6)),
        positions=positions,
        activation=_activation(config, activation),
        tied=config.flag("tie_word_embeddings", tied),
        stop=stop_tokens(config, stop),
        **others,
    )


def _activation(config: Config, key: str) -> Any:
    value = config.get(key, "gelu_pytorch_tanh" if key == "hidden_activation" else "silu")
    if value not in ACTIVATIONS:
        raise config.refuse(key, value, f"one of {tuple(ACTIVATIONS)}")
    return ACTIVATIONS[value]


def read_head_dim(config: Config, default: int | None) -> int:
    """`head_dim`, or hidden_size / num_attention_heads where it is null; `default` where it is absent."""
    dim, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    size = config.integer("head_dim", default, null=True)
    if size is None and dim % heads:
        raise config.refuse(
            "hidden_size", dim, f"a multiple of num_attention_heads={heads}, as head_dim is absent"
        )
    size = size or dim // heads
    if size % 2:
        raise config.refuse("head_dim", size, "an even number: rope turns pairs of channels")
    return size


def read_windows(config: Config, default: list[str], window: int | None) -> list[int | None]:
    """The window of each layer from `layer_types`, or from the types that the family assumes in their absence."""
    types = config.get("layer_types") or default
    if not isinstance(types, list) or len(types) != len(default) or set(types) - {FULL, SLIDING}:
        raise config.refuse("layer_types", types, f"{len(default)} times {FULL!r} or {SLIDING!r}")
    if SLIDING in types and window is None:
        raise config.refuse("sliding_window", None, f"a number, as layer_types has {SLIDING!r}")
    return [window if kind == SLIDING else None for kind in types]


def read_upper_windows(config: Config) -> list[int | None]:
    """The windows of the Qwen families: off unless `use_sliding_window`; then on layers from `max_window_layers` up."""
    count = config.integer("num_hidden_layers")
    width = config.integer("sliding_window", 4096, null=True)
    first = config.integer("max_window_layers", 28, least=0)
    window = width if config.flag("use_sliding_window") else None
    return read_windows(
        config, [FULL if window is None or index < first else SLIDING for index in range(count)], window
    )


def write_upper_windows(spec: ModelSpec) -> dict[str, Any]:
    """The keys that `read_upper_windows` reads."""
    window = the_window(spec)
    types = layer_types([layer.window for layer in spec.layers])
    first = types.index(SLIDING) if window else len(types)
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": first,
        "layer_types": types,
    }


def layer_types(windows: list[int | None]) -> list[str]:
    """What `layer_types` calls each layer."""
    return [FULL if window is None else SLIDING for window in windows]


def the_window(spec: ModelSpec) -> int | None:
    """The window of the windowed layers of a spec, None where there are none."""
    return next((layer.window for layer in spec.layers if layer.window is not None), None)


def activation_name(spec: ModelSpec) -> str:
    """Hugging Face's name of the activation."""
    return next(name for name, meaning in ACTIVATIONS.items() if meaning == spec.activation)


families = Registry(kind="family", package="framework.families", base=Family)


def family(config: Mapping[str, Any]) -> Family:
    """The family of a config.json, by its `model_type`. Raises KvtwinError with near names where there is none."""
    model_type, known = config.get("model_type"), families.names()
    # Only bundled members: a config.json is data, and must not choose a module or a path to import.
    if model_type not in known:
        near = " or ".join(difflib.get_close_matches(str(model_type), known, n=2))
        raise KvtwinError(
            f"config.json has model_type {model_type!r}, which is not implemented"
            f"{f'; did you mean {near}?' if near else ''}\nexpected one of {', '.join(known)}"
        )
    return families.get(model_type)()
