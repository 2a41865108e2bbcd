"""Products of activations with weights, on all cores also where there are few rows.

A decode step multiplies one row per sequence, and is as fast as the weights are read. MKL does such a product on one
core; a batch of products with parts of the weight it spreads over the cores. With two cores and 9,728 x 896 in float32
one row took 2.51 ms by `functional.linear`, 1.31 ms in parts, and 1.01 ms where the long side of the weight also lies
together in memory; from 1,000 rows on all are alike.
"""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import nn

MOST = 4  # parts per core at most


def parts_of(out: int, cores: int) -> int:
    """Equal parts of so many outputs that give each core one: the smallest divisor of `out` that is not below `cores`,
    and 1 where that is far above."""
    fitting = (parts for parts in range(cores, MOST * cores + 1) if out % parts == 0)
    return next(fitting, 1)


class Linear(nn.Module):
    """x W^T + b with the weight [out, in], multiplied in parts of its rows."""

    def __init__(self, inside: int, out: int, bias: bool, cores: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out, inside))
        self.bias = nn.Parameter(torch.empty(out)) if bias else None
        self.parts = parts_of(out, 2 * cores if cores > 1 else 1)

    def forward(self, x: Float[torch.Tensor, "*axes inside"]) -> Float[torch.Tensor, "*axes out"]:
        weight = local(self.weight).unflatten(0, (self.parts, -1)).transpose(1, 2)
        return joined(_product(x, weight, local(self.bias)))


class Wide(nn.Module):
    """`Linear` with many more outputs than inputs. The weight [parts, in, out / parts] holds long rows."""

    def __init__(self, inside: int, out: int, bias: bool, cores: int, least: int = 1):
        super().__init__()
        self.parts = max(least, parts_of(out // least, -(-cores // least)) * least)
        self.weight = nn.Parameter(torch.empty(self.parts, inside, out // self.parts))
        self.bias = nn.Parameter(torch.empty(out)) if bias else None

    def held(self, weight: Float[torch.Tensor, "out inside"]) -> Float[torch.Tensor, "parts inside columns"]:
        """The weight as this module holds it."""
        return weight.unflatten(0, (self.parts, -1)).transpose(1, 2).contiguous()

    def forward(self, x: Float[torch.Tensor, "*axes inside"]) -> Float[torch.Tensor, "parts *axes columns"]:
        """The outputs in parts; see `joined`."""
        return _product(x, local(self.weight), local(self.bias))

    def rows(self, index: Int[torch.Tensor, "*axes"]) -> Float[torch.Tensor, "*axes inside"]:
        """Rows of the weight [out, in]: what embeds where the head is tied."""
        weight, index = local(self.weight), index.long()
        columns = weight.shape[2]
        return weight[index // columns, :, index % columns]


def local(parameter: Any) -> Any:
    """What this process holds of a parameter that may be spread over several (see `parallel`)."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def _product(
    x: Float[torch.Tensor, "*axes inside"],
    weight: Float[torch.Tensor, "parts inside columns"],
    bias: Float[torch.Tensor, "out"] | None,
) -> Float[torch.Tensor, "parts *axes columns"]:
    *axes, inside = x.shape
    rows = x.reshape(1, math.prod(axes), inside).expand(len(weight), -1, -1)
    if bias is None:
        y = torch.bmm(rows, weight)
    else:
        y = torch.baddbmm(bias.view(len(weight), 1, -1), rows, weight)
    return y.view(len(weight), *axes, weight.shape[2])


def joined(parts: Float[torch.Tensor, "parts *axes columns"]) -> Float[torch.Tensor, "*axes out"]:
    """Outputs in parts, as one axis."""
    return parts[0] if len(parts) == 1 else parts.movedim(0, -2).flatten(-2)
