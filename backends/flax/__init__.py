"""The flax backend: a compiled decoder over fixed-size buffers."""

import flax

if not hasattr(flax, "__version__"):
    raise ImportError(
        "`flax` resolved to kvtwin's backends/flax: run from the repository root, not inside backends/"
    )

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from backends.flax.compile_cache import keep_what_is_compiled
from backends.flax.convert import DTYPES
from backends.flax.model import FlaxModel
from framework.backend import Backend as Contract
from framework.spec import ModelSpec
from framework.tokenizer import ByteTokenizer, Tokenizer
from framework.weights import check


@dataclass(frozen=True)
class Backend(Contract):
    """Flax NNX and jax.jit, on the device that jax chooses, or on those of a jax.sharding.Mesh."""

    name: str = "flax"
    dtypes: tuple[str, ...] = tuple(DTYPES)

    def build(
        self,
        spec: ModelSpec,
        weights: Mapping[str, np.ndarray],
        dtype: str = "float32",
        tokenizer: Tokenizer | None = None,
        mesh: Any = None,
    ) -> FlaxModel:
        self.check_dtype(dtype)
        check(spec, weights)
        keep_what_is_compiled()
        return FlaxModel(spec, weights, dtype, tokenizer or ByteTokenizer(), mesh)
