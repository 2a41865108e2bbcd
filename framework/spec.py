"""ModelSpec: the frozen numbers of a decoder, as every backend reads them; `config.json` is only their source."""

from dataclasses import dataclass, field, fields
from typing import Literal

from framework.errors import KvtwinError

RopeKind = Literal["default", "linear", "dynamic", "yarn", "llama3"]


@dataclass(frozen=True, order=True)
class Rope:
    """Rotary position embedding of one layer (arXiv 2104.09864), NeoX halves: channel i pairs with i + dim / 2.

    `dim` channels are rotated, the rest pass through. The fields below `factor` belong to single kinds: `yarn` reads
    `original`, the betas, `attention_factor` and `truncate`; `llama3` reads `original` and the two frequency factors;
    `dynamic` reads `original`.
    """

    theta: float
    dim: int
    kind: RopeKind = "default"
    factor: float = 1.0
    original: int = 0
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True


@dataclass(frozen=True)
class Stream:
    """One array that a layer keeps per slot: `[batch heads slots width]`."""

    heads: int
    width: int


@dataclass(frozen=True)
class Layer:
    """Attention of one layer.

    `window` is the number of tokens a query sees, itself included (None: all before it). `scale` multiplies the query
    key products. `softcap` bounds them by `softcap * tanh(x / softcap)`. `latent` is the width of a single shared
    stream (multi-head latent attention) of which the values are a prefix; None for separate keys and values.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: Rope | None
    window: int | None = None
    softcap: float | None = None
    latent: int | None = None

    @property
    def group(self) -> int:
        """Query heads that share one kv head."""
        return self.heads // self.kv_heads

    @property
    def streams(self) -> dict[str, Stream]:
        """What the cache of this layer holds, by name."""
        if self.latent is not None:
            return {"latent": Stream(1, self.latent)}
        return {name: Stream(self.kv_heads, self.head_dim) for name in ("keys", "values")}


@dataclass(frozen=True)
class ModelSpec:
    """Everything that fixes a decoder's function, apart from its weights.

    `norm_offset` is added to every RMSNorm weight (1 in the Gemma families). `embed_scale` multiplies the embeddings.
    `stop` holds the token ids that end a text. `positions` is the length the model was made for.
    """

    family: str
    vocab: int
    dim: int
    ffn: int
    layers: tuple[Layer, ...]
    norm_eps: float
    positions: int
    activation: Literal["silu", "gelu_tanh"] = "silu"
    qkv_bias: bool = False
    output_bias: bool = False
    ffn_bias: bool = False
    query_key_norm: bool = False
    post_norms: bool = False
    norm_offset: float = 0.0
    embed_scale: float = 1.0
    tied: bool = False
    logit_softcap: float | None = None
    stop: tuple[int, ...] = field(default=())

    def __post_init__(self) -> None:
        for index, layer in enumerate(self.layers):
            if layer.kv_heads < 1 or layer.heads % layer.kv_heads:
                raise KvtwinError(
                    f"layer {index}: {layer.heads} heads do not divide into {layer.kv_heads} kv heads; "
                    "expected heads to be a multiple of kv_heads"
                )
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in ("vocab", "dim", "ffn", "positions") and value < 1:
                raise KvtwinError(f"{item.name} is {value}; expected at least 1")
        if not self.layers:
            raise KvtwinError("the spec has 0 layers; expected at least 1")
