"""Reading a foreign config.json: every key is read, known to be harmless, off, or refused by name.

A config that says more than the spec holds would otherwise load and compute something else.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from framework.errors import KvtwinError
from framework.spec import Rope

# Keys that name, store, train, time or print a model, and do not change its logits.
HARMLESS = frozenset(
    """
    _attn_implementation _commit_hash _name_or_path add_cross_attention architectures attention_dropout auto_map
    bad_words_ids begin_suppress_tokens bos_token_id cache_implementation chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    embd_pdrop encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id hidden_dropout id2label initializer_range is_decoder is_encoder_decoder label2id
    length_penalty max_length min_length model_type name_or_path no_repeat_ngram_size num_beam_groups num_beams
    num_labels num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix
    problem_type remove_invalid_values repetition_penalty resid_pdrop return_dict return_dict_in_generate
    sep_token_id suppress_tokens task_specific_params temperature tie_encoder_decoder tokenizer_class top_k top_p
    torch_dtype torchscript transformers_version typical_p unsloth_fixed unsloth_version use_cache
    """.split()
)

REQUIRED: Any = object()

ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "llama3")


class Config:
    """A foreign JSON object that remembers which of its keys were read."""

    def __init__(self, values: Mapping[str, Any], place: str) -> None:
        self.values = values
        self.place = place
        self._read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `key`, which counts as read from now on; `default` where it is absent."""
        self._read.add(key)
        value = self.values.get(key, default)
        if value is REQUIRED:
            raise KvtwinError(f"{self.place}: {key} is absent; expected a value")
        return value

    def integer(self, key: str, default: Any = REQUIRED, least: int = 1, null: bool = False) -> Any:
        """A whole number; null and `default` as in `number`."""
        value = self.number(key, default, least, null)
        if value is not None and value != int(value):
            raise self.refuse(key, value, "a whole number")
        return None if value is None else int(value)

    def number(self, key: str, default: Any = REQUIRED, least: float | int = 0, null: bool = False) -> Any:
        """A finite number of at least `least`; `default` where it is absent; None where it is null and may be."""
        value = self.get(key, default)
        if value is None and (null or default is None):
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.refuse(key, value, "a number")
        if value < least:
            raise self.refuse(key, value, f"at least {least}")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        """True or False; null counts as absent."""
        value = self.get(key, default)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refuse(key, value, "true or false")
        return value

    def finish(self, harmless: frozenset[str] = frozenset()) -> None:
        """Raises KvtwinError naming every key that is neither read, nor harmless, nor off (null, false or empty)."""
        known = self._read | harmless
        unknown = [
            f"{key}={value!r}" for key, value in self.values.items() if key not in known and not _off(value)
        ]
        if unknown:
            raise KvtwinError(
                f"{self.place} asks for what is not implemented: {', '.join(unknown)[:300]}\n"
                "expected these keys absent or null; remove them only if the model computes the same without them"
            )

    def refuse(self, key: str, value: Any, expected: str) -> KvtwinError:
        """The error that `key` holds `value` where `expected` was."""
        return KvtwinError(f"{self.place}: {key} is {value!r}; expected {expected}")


def _off(value: Any) -> bool:
    return value is None or value is False or value == [] or value == {}


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint; the `eos_token_id` of its generation_config.json, if any, goes before its own."""
    config = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    stop = read_json(generation).get("eos_token_id") if generation.exists() else None
    return config if stop is None else config | {"eos_token_id": stop}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; KvtwinError where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise KvtwinError(
            f"{path} does not exist; expected a folder with config.json and safetensors"
        ) from None
    except (OSError, ValueError) as error:
        raise KvtwinError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise KvtwinError(f"{path} holds a JSON {type(value).__name__}; expected an object")
    return value


def stop_tokens(config: Config, default: int | None) -> tuple[int, ...]:
    """`eos_token_id`: nothing, one id or a list."""
    value = config.get("eos_token_id", default)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in ids):
        raise config.refuse("eos_token_id", value, "a token id or a list of them")
    return tuple(ids)


def layer_ropes(config: Config, kinds: list[str], head_dim: int, length: int) -> list[Rope]:
    """The rope of each layer; `kinds` holds the layers' types, under which transformers 5 may nest the parameters.

    `length` is the model's max_position_embeddings.
    """
    old, new = config.get("rope_scaling"), config.get("rope_parameters")
    if old and new and old != new:
        raise config.refuse("rope_scaling", old, f"nothing beside rope_parameters={new!r}")
    parameters = new or old or {}
    if not isinstance(parameters, dict):
        raise config.refuse("rope_parameters", parameters, "an object")
    theta = config.number("rope_theta", 10000.0)
    original = config.integer("original_max_position_embeddings", None)
    if config.number("partial_rotary_factor", None) not in (None, 1):
        raise config.refuse("partial_rotary_factor", config.get("partial_rotary_factor"), "1 in this family")
    common = {"rope_theta": theta, "original_max_position_embeddings": original}
    nested = set(kinds) & set(parameters)
    if nested and set(parameters) - {"full_attention", "sliding_attention"}:
        raise config.refuse("rope_parameters", parameters, "one object per layer type and nothing else")
    if nested and set(kinds) - set(parameters):
        raise config.refuse("rope_parameters", parameters, f"an entry for each of {sorted(set(kinds))}")
    made = {
        kind: _rope(parameters[kind] if nested else parameters, common, head_dim, length, config.place)
        for kind in set(kinds)
    }
    return [made[kind] for kind in kinds]


def _rope(parameters: Any, common: dict[str, Any], head_dim: int, length: int, place: str) -> Rope:
    rope = Config(
        parameters if isinstance(parameters, dict) else {"": parameters}, f"{place} rope parameters"
    )
    kind = _rope_kind(rope)
    theta = rope.number("rope_theta", common["rope_theta"])
    if theta is None or theta <= 1:
        raise rope.refuse("rope_theta", theta, "more than 1")
    if rope.number("partial_rotary_factor", 1) != 1:
        raise rope.refuse("partial_rotary_factor", rope.get("partial_rotary_factor"), "1 in this family")
    fields: dict[str, Any] = {}
    if kind != "default":
        fields = _rope_fields(rope, kind, common["original_max_position_embeddings"], head_dim, length)
    rope.finish(frozenset({"finetuned"}))
    return Rope(theta=float(theta), dim=head_dim, kind=kind, **fields)


def _rope_kind(rope: Config) -> Any:
    kind, older = rope.get("rope_type"), rope.get("type")
    if kind and older and kind != older:
        raise rope.refuse("type", older, f"the same as rope_type={kind!r}")
    kind = kind or older or "default"
    if kind in ("longrope", "su"):
        raise KvtwinError(
            f"{rope.place}: {kind!r} (longrope) is not implemented; expected one of {ROPE_KINDS}"
        )
    if kind not in ROPE_KINDS:
        raise rope.refuse("rope_type", kind, f"one of {ROPE_KINDS}")
    return kind


def _rope_fields(rope: Config, kind: str, outer: int | None, head_dim: int, length: int) -> dict[str, Any]:
    """The fields of Rope that `kind` reads, beside theta and dim."""
    if kind == "linear":
        return {"factor": float(rope.number("factor", least=1))}
    if kind == "dynamic":
        return {
            "factor": float(rope.number("factor", least=1)),
            "original": _trained(rope, outer, head_dim, length),
        }
    inner = rope.integer("original_max_position_embeddings", None)
    if inner and outer and inner != outer:
        raise rope.refuse("original_max_position_embeddings", inner, f"{outer}, as outside")
    original = inner or outer or length
    if kind == "yarn":
        return {"original": original} | _yarn_fields(rope, original, length)
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if high <= low:
        raise rope.refuse("high_freq_factor", high, f"more than low_freq_factor={low}")
    factor = float(rope.number("factor", least=1))
    return {
        "factor": factor,
        "original": original,
        "low_frequency": float(low),
        "high_frequency": float(high),
    }


def _trained(rope: Config, outer: int | None, head_dim: int, length: int) -> int:
    """The length from which on `dynamic` stretches: max_position_embeddings, whatever else a config says."""
    for value in (rope.integer("original_max_position_embeddings", None), outer):
        if value not in (None, length):
            raise rope.refuse("original_max_position_embeddings", value, f"max_position_embeddings={length}")
    if head_dim < 4:
        raise KvtwinError(f"{rope.place}: dynamic with head_dim {head_dim}; expected at least 4")
    return length


def _yarn_fields(rope: Config, original: int, length: int) -> dict[str, Any]:
    factor = rope.number("factor", None, least=1) or length / original
    if factor < 1:
        raise rope.refuse("factor", factor, "at least 1")
    attention = rope.number("attention_factor", None)
    top, bottom = rope.number("mscale", None), rope.number("mscale_all_dim", None)
    if attention is None:
        attention = _temper(factor, top) / _temper(factor, bottom) if top and bottom else _temper(factor, 1.0)
    return {
        "factor": float(factor),
        "attention_factor": float(attention),
        "beta_fast": float(rope.number("beta_fast", None) or 32),
        "beta_slow": float(rope.number("beta_slow", None) or 1),
        "truncate": rope.flag("truncate", True),
    }


def _temper(factor: float | int, scale: float | int) -> float:
    """YaRN's attention temperature, equation 22 of arXiv 2309.00071."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def rope_parameters(rope: Rope) -> dict[str, Any]:
    """The transformers-5 `rope_parameters` of a rope."""
    written: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind != "default":
        written["factor"] = rope.factor
    if rope.kind in ("yarn", "llama3"):
        written["original_max_position_embeddings"] = rope.original
    if rope.kind == "llama3":
        written |= {"low_freq_factor": rope.low_frequency, "high_freq_factor": rope.high_frequency}
    if rope.kind == "yarn":
        written |= {"attention_factor": rope.attention_factor, "truncate": rope.truncate}
        written |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
    return written
