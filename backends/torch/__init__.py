"""The torch backend: an eager decoder over a dynamic cache."""

import torch

if not hasattr(torch, "Tensor"):
    raise ImportError(
        "`torch` resolved to kvtwin's backends/torch: run from the repository root, not inside backends/"
    )

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from backends.torch.convert import DTYPES
from backends.torch.model import TorchModel
from framework.backend import Backend as Contract
from framework.spec import ModelSpec
from framework.tokenizer import ByteTokenizer, Tokenizer
from framework.weights import check


@dataclass(frozen=True)
class Backend(Contract):
    """torch, on a GPU when there is one."""

    name: str = "torch"
    dtypes: tuple[str, ...] = tuple(DTYPES)

    def build(
        self,
        spec: ModelSpec,
        weights: Mapping[str, np.ndarray],
        dtype: str = "float32",
        tokenizer: Tokenizer | None = None,
    ) -> TorchModel:
        self.check_dtype(dtype)
        check(spec, weights)
        return TorchModel(spec, weights, dtype, tokenizer or ByteTokenizer())
