"""Products of activations with weights on all cores, of few rows and of many.

A decode step multiplies one row per sequence, and is as fast as the weights are read. MKL does such a product on one
core; a batch of products with parts of the weight it spreads over the cores. With two cores and 9,728 x 896 in float32
one row took 2.51 ms by `functional.linear`, 1.31 ms in parts, and 1.01 ms where the long side of the weight also lies
together in memory. The rows of a prompt are as fast as the cores multiply: oneDNN, which torch asks on its own for
other dtypes only, takes 0.80 to 0.90 of MKL's time.
"""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import nn
from torch.nn import functional

MOST = 4  # times as many parts as are asked for, at most
MANY = 32  # rows from which on a product is no longer as fast as its weight is read


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
        weight, bias = local(self.weight), local(self.bias)
        if many(x):
            return _of_many(x, weight, bias)
        return _of_few(x, weight.unflatten(0, (self.parts, -1)).transpose(1, 2), bias)


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

    def forward(self, x: Float[torch.Tensor, "*axes inside"]) -> Float[torch.Tensor, "*axes out"]:
        if many(x):
            return torch.cat([self.part(x, index) for index in range(self.parts)], dim=-1)
        return _of_few(x, local(self.weight), local(self.bias))

    def part(
        self, x: Float[torch.Tensor, "*axes inside"], index: int
    ) -> Float[torch.Tensor, "*axes columns"]:
        """One of the parts in which the outputs come, of many rows."""
        weight, bias = local(self.weight), local(self.bias)
        bias = None if bias is None else bias.view(self.parts, -1)[index]
        return _of_many(x, weight[index].T, bias)

    def rows(self, index: Int[torch.Tensor, "*axes"]) -> Float[torch.Tensor, "*axes inside"]:
        """Rows of the weight [out, in]: what embeds where the head is tied."""
        weight, index = local(self.weight), index.long()
        columns = weight.shape[2]
        return weight[index // columns, :, index % columns]


def local(parameter: Any) -> Any:
    """What this process holds of a parameter that may be spread over several (see `parallel`)."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def many(x: Float[torch.Tensor, "*axes inside"]) -> bool:
    """Whether these are so many rows that a CPU multiplies them in another way."""
    return x.device.type == "cpu" and math.prod(x.shape[:-1]) >= MANY


def _of_many(
    x: Float[torch.Tensor, "*axes inside"],
    weight: Float[torch.Tensor, "out inside"],
    bias: Float[torch.Tensor, "out"] | None,
) -> Float[torch.Tensor, "*axes out"]:
    # What torch.compile makes of a linear layer on a CPU; it has no gradient, and takes float32 as it is.
    if x.dtype == torch.float32 and torch.backends.mkldnn.is_available() and not torch.is_grad_enabled():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return functional.linear(x, weight, bias)


def _of_few(
    x: Float[torch.Tensor, "*axes inside"],
    weight: Float[torch.Tensor, "parts inside columns"],
    bias: Float[torch.Tensor, "out"] | None,
) -> Float[torch.Tensor, "*axes out"]:
    """The product with all parts of a weight, and these side by side."""
    (*axes, inside), (parts, _, columns) = x.shape, weight.shape
    rows = x.reshape(1, math.prod(axes), inside).expand(parts, -1, -1)
    if bias is None:
        y = torch.bmm(rows, weight)
    else:
        y = torch.baddbmm(bias.view(parts, 1, columns), rows, weight)
    return y.transpose(0, 1).reshape(*axes, parts * columns)
