"""Tensor parallelism: a decoder's parameters as DTensors over a mesh, and the sums and joins that this asks for.

Each process multiplies with what it holds, as plain tensors. A layer adds up twice, behind `output` and `down`.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module
from torch.distributed.tensor.placement_types import Placement

from backends.torch.share import Share


def parallelize(decoder: nn.Module, mesh: DeviceMesh, share: Share, vocab: int) -> None:
    """Spread a decoder that holds this process's part of every parameter (`share.cut`) over the mesh."""
    plan = {
        "layers.*.attention.query_key_value": Columns(),
        "layers.*.attention.output": Rows(share),
        "layers.*.ffn.gate_up": Columns(),
        "layers.*.ffn.down": Rows(share),
        "head": Vocabulary(share, vocab),
    }
    names = {child for child, module in decoder.named_children() if module is not None}
    parallelize_module(decoder, mesh, plan | ({"table": Columns()} if "table" in names else {}))


class Columns(ParallelStyle):
    """A process has some of the outputs, and keeps them."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return _spread(module, device_mesh, weight=Shard(0), bias=Shard(0))


class Rows(ParallelStyle):
    """A process has some of the inputs; the products are added up."""

    def __init__(self, share: Share):
        self.share = share

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module.register_forward_hook(self._total)
        return _spread(module, device_mesh, weight=Shard(1), bias=Partial())

    def _total(self, module: nn.Module, given: Any, y: torch.Tensor) -> torch.Tensor:
        return self.share.total(y)


class Vocabulary(ParallelStyle):
    """A process has some of the vocabulary; all of them get all logits."""

    def __init__(self, share: Share, vocab: int):
        self.share, self.vocab = share, vocab

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module.register_forward_hook(self._whole)
        return _spread(module, device_mesh, weight=Shard(0))

    def _whole(self, module: nn.Module, given: Any, logits: torch.Tensor) -> torch.Tensor:
        # Without the padding of the last process's.
        return self.share.whole(logits, -1)[..., : self.vocab]


def _spread(module: nn.Module, mesh: DeviceMesh, **placements: Placement) -> nn.Module:
    """The module with its parameters, which are this process's parts, as DTensors."""
    for name, held in list(module.named_parameters(recurse=False)):
        spread = DTensor.from_local(held.detach(), mesh, [placements[name]], run_check=False)
        module.register_parameter(name, nn.Parameter(spread, requires_grad=False))
    return module
