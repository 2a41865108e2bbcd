"""The models of `kvtwin bench`: shapes of real models with random weights, written once as Hugging Face folders."""

import json
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benches.case import BYTES, FLOAT, REAL, SMALL, Case
from framework.checkpoint import locate
from framework.codec import codecs
from framework.config import read_config
from framework.errors import KvtwinError
from framework.family import family
from framework.footprint import footprint
from framework.policy import policies
from framework.spec import ModelSpec
from framework.weights import Weights, shapes, write

SHAPES: dict[str, dict[str, Any]] = {
    # The 110M model of karpathy/tinyllamas.
    SMALL: {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "head_dim": 64,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "eos_token_id": None,
    },
    # Qwen/Qwen2.5-0.5B.
    REAL: {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "eos_token_id": None,
    },
}


@dataclass(frozen=True)
class Subject:
    """A model that is timed: its folder, and its spec, from which follows what a step has to read."""

    folder: Path
    spec: ModelSpec

    @property
    def weights_bytes(self) -> int:
        """Of all weights, in float32."""
        return BYTES[FLOAT] * self.parameters

    @property
    def parameters(self) -> int:
        """Numbers that the weights are."""
        return sum(int(np.prod(shape)) for shape in shapes(self.spec).values())

    def step_bytes(self, case: Case) -> float:
        """What the average decode step of a block has to read: weights once, live keys and values of all rows.

        Of the embeddings only those of the tokens are read, where the output matrix is another one.
        """
        rows, size = 0 if self.spec.tied else self.spec.vocab * self.spec.dim, BYTES[case.dtype]
        policy, codec = policies.make(case.policy), codecs.make(case.codec)
        live = footprint(self.spec, policy, codec, case.context + case.steps // 2, size)
        return size * (self.parameters - rows) + case.batch * live.kv


def cache_folder() -> Path:
    """Where models are written when nobody says where."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "kvtwin" / "bench"


def subject(name: str, models: Path, say: Callable[[str], None] = print) -> Subject:
    """The model of this name, one of SHAPES or whatever a backend loads; a shape is written when it is first asked for.

    `say` is told of that. Raises KvtwinError.
    """
    if name not in SHAPES:
        try:
            folder = locate(name)
        except KvtwinError as error:
            raise KvtwinError(f"{error}; or one of {', '.join(SHAPES)}, with random weights") from None
        config = read_config(folder)
        return Subject(folder.absolute(), family(config).spec(config))
    spec = family(SHAPES[name]).spec(SHAPES[name])
    one = Subject(models.absolute() / _folder_name(name), spec)
    if not (one.folder / "config.json").exists():
        say(
            f"writing the model {name}, {one.weights_bytes / 2**30:.1f} GiB of random weights, to {one.folder}"
        )
        write(one.folder, spec, drawn(spec))
    return one


def _folder_name(name: str) -> str:
    """Another shape under the same name is another folder."""
    return f"{name}-{zlib.crc32(json.dumps(SHAPES[name], sort_keys=True).encode()):08x}"


def drawn(spec: ModelSpec) -> Weights:
    """Random weights, drawn in float32, as `framework.weights.random_weights` scales them.

    That one draws in float64 and rounds, which takes three times as long and twice the memory.
    """
    random = np.random.default_rng(0)
    found: Weights = {}
    for name, shape in shapes(spec).items():
        noise = random.standard_normal(shape, np.float32)
        if name.endswith("norm.weight"):
            noise = 1 - spec.norm_offset + 0.1 * noise
        elif name.endswith(".bias"):
            noise *= 0.5
        elif name != "embed.weight":
            noise /= np.float32(np.sqrt(shape[-1]))
        found[name] = noise.astype(np.float32, copy=False)
    return found
