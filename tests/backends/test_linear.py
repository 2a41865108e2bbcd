"""Products in parts against the product itself, for machines with different numbers of cores; few rows and many."""

import math
from dataclasses import replace

import pytest
import torch

from backends.torch.decoder import BLOCK, FeedForward
from backends.torch.linear import MANY, Linear, Wide, parts_of
from tests.tiny import tiny_model

CORES = [1, 2, 3, 16]
SIZES = [(5, 24), (7, 13), (12, 30)]  # inputs and outputs; 13 cannot be cut
AXES = [(5,), (1, 1), (3, 4), (2, 0), (MANY - 1,), (MANY,), (3, MANY - 7)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
BOUND = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 0.05}


def weights(inside, out, dtype=torch.float64):
    generator = torch.Generator().manual_seed(out)
    return [
        torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)
        for shape in ((out, inside), (out,))
    ]


def inputs(axes, inside, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*axes, inside, dtype=torch.float64, generator=generator).to(dtype)


def close(found, expected, dtype=torch.float64):
    assert (found.shape, found.dtype) == (expected.shape, dtype)
    bound = BOUND[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=bound, atol=bound)


def filled(module, weight, bias):
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    module.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)
    return module


@pytest.mark.parametrize("axes", AXES, ids=str)
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("inside", "out"), SIZES)
@pytest.mark.parametrize("cores", CORES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_are_the_product(dtype, cores, inside, out, biased, axes):
    weight, bias = weights(inside, out, dtype)
    x, bias = inputs(axes, inside, dtype), bias if biased else None
    expected = torch.einsum("...i,oi->...o", x.double(), weight.double())
    expected = expected if bias is None else expected + bias.double()
    wide = Wide(inside, out, biased, cores)
    wide = filled(wide, wide.held(weight), bias)
    with torch.inference_mode():
        close(filled(Linear(inside, out, biased, cores), weight, bias)(x), expected, dtype)
        close(wide(x), expected, dtype)
        pieces = [wide.part(x, index) for index in range(wide.parts)]
        close(torch.cat(pieces, dim=-1), expected, dtype)


@pytest.mark.parametrize("cores", CORES)
def test_rows_of_a_wide_weight_are_those_of_the_weight(cores):
    weight, _ = weights(5, 24)
    wide = Wide(5, 24, False, cores)
    index = torch.tensor([[0, 23, 11], [12, 7, 7]], dtype=torch.int32)
    found = filled(wide, wide.held(weight), None).rows(index)
    torch.testing.assert_close(found, weight[index.long()], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("out", "cores", "parts"), [(24, 1, 1), (24, 2, 2), (25, 2, 5), (13, 2, 1), (26, 3, 1), (24, 5, 6)]
)
def test_parts_are_equal_and_at_least_one_a_core(out, cores, parts):
    assert parts_of(out, cores) == parts


@pytest.mark.parametrize("rows", [1, MANY - 1, MANY, BLOCK, BLOCK + 1, 2 * BLOCK + 3])
@pytest.mark.parametrize("family", ["llama", "gemma2"])  # silu and gelu
@pytest.mark.parametrize("cores", [1, 2, 16])
def test_a_feed_forward_in_blocks_and_parts_is_the_formula(cores, family, rows):
    spec = replace(tiny_model(family, 0)[0], dim=6, ffn=32, ffn_bias=True)
    module = FeedForward(spec, cores).double().requires_grad_(False)
    (gates, bias), (down, shift) = weights(6, 64), weights(32, 6)
    filled(module.gate_up, module.gate_up.held(gates), bias), filled(module.down, down, shift)
    x = inputs((rows, 1), 6)
    gate, up = (x @ gates.T + bias).chunk(2, dim=-1)
    act = gate * torch.sigmoid(gate)
    if family == "gemma2":
        act = gate / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    close(module(x), (act * up) @ down.T + shift)
