"""Products in parts against the product itself, in float64, for machines with different numbers of cores."""

import pytest
import torch

from backends.torch.linear import Linear, Wide, joined, parts_of

CORES = [1, 2, 3, 16]
SIZES = [(5, 24), (7, 13), (12, 30)]  # inputs and outputs; 13 cannot be cut
AXES = [(5,), (1, 1), (3, 4), (2, 0)]


def weights(inside, out):
    generator = torch.Generator().manual_seed(out)
    return [
        torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((out, inside), (out,))
    ]


def inputs(axes, inside):
    return torch.randn(*axes, inside, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def filled(module, weight, bias):
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    module.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)
    return module


@pytest.mark.parametrize("axes", AXES, ids=str)
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("inside", "out"), SIZES)
@pytest.mark.parametrize("cores", CORES)
def test_both_are_the_product(cores, inside, out, biased, axes):
    weight, bias = weights(inside, out)
    x, bias = inputs(axes, inside), bias if biased else None
    expected = torch.einsum("...i,oi->...o", x, weight) + (0 if bias is None else bias)
    wide = Wide(inside, out, biased, cores)
    plain = filled(Linear(inside, out, biased, cores), weight, bias)(x)
    turned = joined(filled(wide, wide.held(weight), bias)(x))
    torch.testing.assert_close(plain, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(turned, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("cores", CORES)
def test_halves_are_parts_of_their_own(cores):
    weight, bias = weights(5, 24)
    wide = Wide(5, 24, True, cores, least=2)
    first, second = filled(wide, wide.held(weight), bias)(inputs((3,), 5)).chunk(2)
    whole = torch.einsum("ti,oi->to", inputs((3,), 5), weight) + bias
    torch.testing.assert_close(joined(first), whole[:, :12], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(joined(second), whole[:, 12:], rtol=1e-13, atol=1e-13)


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
