"""The layers of a foreign config.json as a cache sees them, also of models that kvtwin cannot run.

Read are the numbers of layers, heads and channels, windows, latent streams, and which layers of a hybrid keep keys and
values at all. A family that kvtwin has reads its own keys. What sounds as if it changed the cache and is not understood
is refused by name: a wrong count would look like a right one.
"""

import re
from collections.abc import Mapping
from typing import Any

from framework.config import REQUIRED, Config
from framework.errors import KvtwinError
from framework.family import FULL, SLIDING, families, family, read_upper_windows
from framework.spec import Layer

NONE = "none"  # a layer without keys and values that grow with the text
TYPES = {"full_attention": FULL, "attention": FULL, "sliding_attention": SLIDING} | dict.fromkeys(
    ("linear_attention", "mamba", "mamba2", "conv", "recurrent", "mlp", "moe"), NONE
)
LETTERS = {"*": FULL, "M": NONE, "-": NONE, "E": NONE}  # of hybrid_override_pattern

# What a config that nests its language model calls it, and older names of four keys.
NESTED = ("text_config", "llm_config", "language_config")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
HEADS = ("num_attention_heads", "n_head", "n_heads")
DIM = ("hidden_size", "n_embd", "d_model")

# Families whose configs are silent because every head has keys and values of its own, or all layers one window.
OWN_HEADS = frozenset({"bloom", "codegen", "gpt2", "gpt_neox", "gptj", "opt"})
ALL_WINDOWED = frozenset({"mixtral", "phi3", "phimoe", "starcoder2"})
# What transformers assumes where a config of these is silent.
ASSUMED: dict[str, dict[str, Any]] = {
    "cohere2": {"sliding_window_pattern": 4},
    "gemma3_text": {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
    },
    "gpt_oss": {"sliding_window_pattern": 2},
    "olmo3": {"sliding_window_pattern": 4},
    "qwen3_next": {"full_attention_interval": 4},
}

# Of a family that kvtwin has, the keys that bear on the cache.
OWN_KEYS = (
    *("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "sliding_window", "layer_types", "use_sliding_window", "max_window_layers"),
)
# Keys with these in their names change what a cache holds: the first kind always, the second says that some layers keep
# no keys and values, and is harmless once it is known which.
CACHE_WORDS = re.compile(
    r"\bkv_|_kv(_|$)|key_value|multi_query|window|swa_|_head_dim$|attn_layer|attention_layer|attn_type|attention_type|"
    r"layer_type|block_type|block_config|attn_config|hybrid|global|local_att|attention_chunk|index_|compress|"
    r"cla_"
)
STATE_WORDS = re.compile(r"mamba|ssm|linear_|_linear|conv_|_conv|recurr|lru|rwkv|time_mix")


def counted(config: Mapping[str, Any], place: str = "config.json") -> tuple[tuple[Layer, ...], int]:
    """The layers that keep keys and values, in order, and the number of those that keep none.

    Raises KvtwinError where a number is missing, wrong, or not understood. Ropes are left out, and scales are not read.
    """
    nested = next((config[key] for key in NESTED if isinstance(config.get(key), dict)), None)
    values = dict(config if nested is None else nested)
    kind = values.get("model_type") or config.get("model_type")
    reader = Config(ASSUMED.get(str(kind), {}) | values, place)
    if reader.flag("is_encoder_decoder") or config.get("is_encoder_decoder"):
        raise reader.refuse("is_encoder_decoder", True, "a decoder: the keys of an encoder are not counted")
    if kind in families.names():
        layers, without = _of_family({**values, "model_type": kind}, reader)
    else:
        layers, without = _of_numbers(reader, str(kind))
    reader.finish(
        frozenset(key for key, value in reader.values.items() if value == 0 or not _tells(key, without))
    )
    if not layers:
        raise KvtwinError(f"{place}: no layer keeps keys and values; expected at least one with attention")
    return layers, without


def _tells(key: str, without: int) -> bool:
    """Whether a key that nobody read says something of the cache, when so many layers are known to keep nothing."""
    if key.startswith(("mlp_", "mtp_")):  # kinds of feed-forward, and layers beside the decoder
        return False
    return not without if STATE_WORDS.search(key) else CACHE_WORDS.search(key) is not None


def _of_family(values: dict[str, Any], reader: Config) -> tuple[tuple[Layer, ...], int]:
    own = {key: reader.get(key) for key in OWN_KEYS if key in values}
    read = family(own).spec(own | {"vocab_size": 1, "intermediate_size": 1})
    return read.layers, 0


def _of_numbers(config: Config, kind: str) -> tuple[tuple[Layer, ...], int]:
    blocks = config.values.get("layers_block_type")
    given = any(name in config.values for name in LAYERS)
    count = len(blocks) if isinstance(blocks, list) and not given else _number(config, LAYERS)
    heads = _number(config, HEADS)
    rank = config.integer("kv_lora_rank", None)
    if rank is not None:
        width = rank + config.integer("qk_rope_head_dim")
        for key in ("num_key_value_heads", "head_dim", "v_head_dim", "qk_nope_head_dim", "qk_head_dim"):
            config.get(key)  # of what is made of the latent stream, and not kept
        kv_heads, head_dim, latent = 1, width, width
    else:
        kv_heads, head_dim, latent = _kv_heads(config, heads, kind), _head_dim(config, heads), None
    if heads % kv_heads:
        raise config.refuse("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads={heads}")
    kinds, window = _kinds(config, count, kind)
    layers = tuple(
        Layer(
            heads,
            kv_heads,
            head_dim,
            head_dim**-0.5,
            rope=None,
            window=window if each == SLIDING else None,
            latent=latent,
        )
        for each in kinds
        if each != NONE
    )
    return layers, count - len(layers)


def _number(config: Config, names: tuple[str, ...]) -> int:
    """The first of these keys that is there; an error names the first of all."""
    return config.integer(next((name for name in names if name in config.values), names[0]))


def _kv_heads(config: Config, heads: int, kind: str) -> int:
    absent = heads if kind in OWN_HEADS else REQUIRED
    return config.integer("num_key_value_heads", absent, null=True) or heads


def _head_dim(config: Config, heads: int) -> int:
    size = config.integer("head_dim", None)
    if size is None:
        dim = _number(config, DIM)
        if dim % heads:
            raise config.refuse("hidden_size", dim, f"a multiple of {heads} heads, as head_dim is absent")
        size = dim // heads
    if config.integer("v_head_dim", size, null=True) not in (size, None):
        raise config.refuse("v_head_dim", config.get("v_head_dim"), f"{size}, as head_dim")
    return size


def _kinds(config: Config, count: int, kind: str) -> tuple[list[str], int | None]:
    """What each layer keeps, and the window of those that have one."""
    window = config.integer("sliding_window", None)
    cycle = [
        key for key in ("sliding_window_pattern", "_sliding_window_pattern") if config.get(key) is not None
    ]
    types = config.get("layer_types")
    switch, _ = config.get("use_sliding_window"), config.get("max_window_layers")
    hybrid = _hybrid(config, count)
    if types is not None:
        return _typed(config, "layer_types", types, count, window), window
    if hybrid is not None and window is None:
        return hybrid, None
    if switch is not None and hybrid is None:
        uppers = read_upper_windows(config)
        return [FULL if each is None else SLIDING for each in uppers], window
    if window is None or kind in ALL_WINDOWED:
        return [FULL if window is None else SLIDING] * count, window
    if not cycle or hybrid is not None:
        raise config.refuse(
            "sliding_window", window, "layer_types or sliding_window_pattern beside it: which layers have it?"
        )
    every = config.integer(cycle[0])
    return [FULL if (index + 1) % every == 0 else SLIDING for index in range(count)], window


def _hybrid(config: Config, count: int) -> list[str] | None:
    """Which layers keep keys and values, where a config says that some do not."""
    blocks, letters = config.get("layers_block_type"), config.get("hybrid_override_pattern")
    listed = [config.get("attn_layer_indices"), config.get("full_attn_idxs")]
    interval, period = (
        config.integer("full_attention_interval", None),
        config.integer("attn_layer_period", None),
    )
    offset = config.integer("attn_layer_offset", 0, least=0)
    if blocks is not None:
        return _typed(config, "layers_block_type", blocks, count, None)
    if letters is not None:
        if not isinstance(letters, str) or len(letters) != count or set(letters) - set(LETTERS):
            raise config.refuse("hybrid_override_pattern", letters, f"{count} letters of {''.join(LETTERS)}")
        return [LETTERS[each] for each in letters]
    if any(each is not None for each in listed):
        here = next(each for each in listed if each is not None)
        if not isinstance(here, list) or not set(here) <= set(range(count)):
            raise config.refuse("attn_layer_indices", here, f"layers below {count}")
        return [FULL if index in here else NONE for index in range(count)]
    if interval is not None:
        return [FULL if (index + 1) % interval == 0 else NONE for index in range(count)]
    if period is not None:
        return [FULL if index % period == offset else NONE for index in range(count)]
    return None


def _typed(config: Config, key: str, types: Any, count: int, window: int | None) -> list[str]:
    known = isinstance(types, list) and all(isinstance(each, str) and each in TYPES for each in types)
    if not known or len(types) != count:
        raise config.refuse(key, types, f"{count} of {', '.join(sorted(TYPES))}")
    kinds = [TYPES[each] for each in types]
    if SLIDING in kinds and window is None:
        raise config.refuse("sliding_window", None, f"a number, as {key} has {SLIDING!r}")
    return kinds
