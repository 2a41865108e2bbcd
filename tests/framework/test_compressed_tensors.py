"""The judge compressed-tensors: `int8`, `fp8` and `quanto` have its codes on the same grid; how grids differ."""

from functools import partial

import numpy as np
import pytest
import torch

from framework.codec import codecs, decoded
from framework.packing import unpack
from tests.libraries import LIBRARIES, everywhere, same_bytes

NUMPY = LIBRARIES["numpy"][0]
f32 = np.float32
INT8 = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": True}
pytestmark = pytest.mark.judge


class Theirs:
    """compressed-tensors with these arguments, from arrays to arrays; scales are those of tokens, tensors or groups."""

    def __init__(self, **arguments):
        from compressed_tensors.quantization import QuantizationArgs

        self.arguments = QuantizationArgs(**arguments)

    def scales(self, x):
        """Its scales of `x`, [tokens width], and its zero points."""
        from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

        scales, zeros = compute_dynamic_scales_and_zp(torch.from_numpy(x)[None], self.arguments, None)
        return [(each if each.ndim == 1 else each[0]).numpy() for each in (scales, zeros.float())]

    def codes(self, x, scales, zeros=None):
        """Its codes, byte by byte."""
        from compressed_tensors.quantization.lifecycle.forward import quantize

        kind = self.arguments.pytorch_dtype()
        return quantize(*map(tensor, (x, scales, zeros)), self.arguments, kind).view(torch.int8).numpy()

    def read(self, codes, scales, zeros=None):
        """What it reads from its codes."""
        from compressed_tensors.quantization.lifecycle.forward import dequantize

        there = tensor(codes).view(self.arguments.pytorch_dtype())
        return dequantize(there, tensor(scales), tensor(zeros), self.arguments).numpy()


def tensor(x):
    return None if x is None else torch.from_numpy(np.array(x))


def halves(random, most, exponents):
    """[20 40]: numbers at codes and between two, up to `most` in both signs, times a power of two for each vector."""
    x = random.integers(-2 * most, 2 * most + 1, (20, 40)) / 2
    x[:, 5], x[:, 6] = -most, most
    return x * 2.0 ** random.integers(*exponents, (20, 1))


def values(seed=0):
    """[60 40]: vectors of many sizes, one of equal numbers; and ties of int8."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((40, 40)) * 10.0 ** random.integers(-9, 10, (40, 1))
    x[7] = -1.7
    return np.concatenate([x, halves(random, 127, (-30, 31))]).astype(f32)


def test_int8_has_its_codes_at_the_same_scales():
    for seed in range(4):
        x, codec, theirs = values(seed), codecs.make("int8"), Theirs(**INT8)
        parts = codec.encode(NUMPY, x, "keys")
        codes = theirs.codes(x, parts["scales"])
        np.testing.assert_array_equal(parts["codes"], codes)
        read = decoded(codec, NUMPY, parts, "keys", f32)
        assert read.tobytes() == theirs.read(codes, parts["scales"]).tobytes()


def test_int8_takes_its_scale_by_127_and_they_by_127_and_a_half():
    """There a largest number above 0 is read half a step smaller; one below 0 lies between two codes."""
    x, theirs = values(), Theirs(**INT8)
    wanted, zeros = theirs.scales(x)
    assert not zeros.any()
    ours = codecs.make("int8").encode(NUMPY, x, "keys")["scales"]
    np.testing.assert_allclose(ours.astype(float), wanted.astype(float) * (127.5 / 127), rtol=3 * 2.0**-24)
    codes, most = theirs.codes(x, wanted), np.max(np.abs(x), 1, keepdims=True)
    assert set(codes[x == most]) == {127}
    assert set(codes[x == -most]) == {-127, -128}


def test_int8_of_what_they_would_clip_is_theirs_but_for_one_code():
    """Both from the numbers to the codes: vectors whose scales are powers of two, in theirs and, clipped, in ours."""
    x, theirs = halves(np.random.default_rng(1), 127.5, (-30, 31)).astype(f32), Theirs(**INT8)
    scales, _ = theirs.scales(x)
    assert set(np.frexp(scales)[0].ravel()) == {0.5}
    parts = codecs.make("int8").encode(NUMPY, np.clip(x, -127 * scales, 127 * scales), "values")
    assert parts["scales"].tobytes() == scales.tobytes()
    np.testing.assert_array_equal(parts["codes"], np.maximum(theirs.codes(x, scales), -127))


def test_int8_reads_zeros_of_a_vector_of_zeros_which_have_a_scale_there():
    x, theirs = np.zeros((2, 40), f32), Theirs(**INT8)
    x[1] = 3
    scales, _ = theirs.scales(x)
    parts = codecs.make("int8").encode(NUMPY, x, "keys")
    assert (parts["scales"][0], scales[0]) == (0, np.finfo(f32).eps)
    np.testing.assert_array_equal(parts["codes"], theirs.codes(x, scales))
    np.testing.assert_array_equal(parts["codes"][0], 0)


def around_codes():
    """All numbers of e4m3, what lies half way between two, the float32 next to each, and what lies beyond; signed."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32).numpy()
    x = np.concatenate([codes, (codes[1:] + codes[:-1]) / 2, [464, 480, 1e9]]).astype(f32)
    x = np.concatenate([x, np.nextafter(x, f32(0)), np.nextafter(x, f32(np.inf))])
    x = x[x >= 2.0**-120]  # where XLA would take it for 0
    return np.concatenate([x, -x, f32([0, np.nan])])[None]


@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("exponent", [-7, 0, 5])
def test_fp8_has_its_codes_at_scales_that_are_powers_of_two(exponent, side):
    scale = f32(2.0**exponent)
    x, theirs = around_codes() * scale, Theirs(**FP8)
    codec = codecs.make(f"fp8({side[0]}_scale={scale})")
    parts = codec.encode(NUMPY, x, side)
    codes = theirs.codes(x, [scale])
    assert len(np.unique(parts["codes"])) == 255  # all but the NaN with a sign
    np.testing.assert_array_equal(parts["codes"].view(np.int8), codes)
    np.testing.assert_array_equal(
        decoded(codec, NUMPY, parts, side, f32), theirs.read(codes, np.full((1, 1), scale))
    )


def test_fp8_has_its_codes_at_the_scale_that_it_finds():
    """From every library; a product with the reciprocal of the scale would give other codes at ties."""
    theirs = Theirs(**FP8)
    for seed in range(1, 8):
        x = np.random.default_rng(seed).standard_normal((1, 2000)).astype(f32)
        scales, _ = theirs.scales(x)
        assert scales == np.max(np.abs(x)) / f32(448)
        x = np.concatenate([x, around_codes() * scales], axis=-1)
        codec = codecs.make(f"fp8(k_scale={float(scales[0])})")
        encode = partial(codec.encode, side="keys")
        made = same_bytes(everywhere(encode, x)) if seed == 5 else encode(NUMPY, x)
        codes = theirs.codes(x, scales)
        np.testing.assert_array_equal(made["codes"].view(np.int8), codes)
        np.testing.assert_array_equal(codec.read(NUMPY, made, "keys"), theirs.read(codes, scales))


def test_infinity_is_clipped_there_and_refused_here():
    x, theirs = f32([[np.inf, -np.inf, 1]]), Theirs(**FP8)
    assert theirs.codes(x, f32([1])).view(np.uint8).tolist() == [[0x7E, 0xFE, 0x38]]
    assert codecs.make("fp8").encode(NUMPY, x, "keys")["codes"].tolist() == [[0x7F, 0x7F, 0x38]]


def groups(bits, group):
    """Theirs, of which half of the codes lie below 0, and ours."""
    args = {"num_bits": bits, "type": "int", "symmetric": False, "dynamic": True}
    return Theirs(**args, strategy="group", group_size=group), codecs.make(
        f"quanto(bits={bits}, group={group})"
    )


@pytest.mark.parametrize(("bits", "group"), [(4, 64), (2, 64), (4, 32), (2, 16)])
def test_quanto_has_its_codes_where_the_minimum_is_a_number_of_steps(bits, group):
    """Their zero point is the shift in steps, rounded: there nothing is to round. Half of the numbers are ties."""
    (theirs, codec), random = groups(bits, group), np.random.default_rng(bits)
    below, most = 2**bits // 4, 2**bits - 1
    x = random.integers(0, 2 * most + 1, (30, 128 // group, group)) / 2 - below
    x[..., 3], x[..., 8] = -below, most - below
    x = (x * random.integers(1025, 2048, (30, 128 // group, 1)) * 2.0**-12).astype(f32).reshape(30, 128)
    scales, zeros = theirs.scales(x)
    parts, codes = codec.encode(NUMPY, x, "keys"), theirs.codes(x, scales, zeros)
    assert parts["scales"].tobytes() == scales.tobytes()
    np.testing.assert_array_equal(zeros, below - 2 ** (bits - 1))
    np.testing.assert_array_equal(unpack(NUMPY, parts["codes"], bits), codes + 2 ** (bits - 1))
    np.testing.assert_array_equal(codec.read(NUMPY, parts, "keys"), theirs.read(codes, scales, zeros))


@pytest.mark.parametrize(("bits", "group"), [(4, 64), (2, 32)])
def test_quanto_has_its_scales_and_elsewhere_a_shift_that_is_not_rounded(bits, group):
    """Groups with 0 within, which theirs puts into any. A shift moved by up to half a step moves one code in four."""
    (theirs, codec), random = groups(bits, group), np.random.default_rng(bits)
    x = (random.standard_normal((60, 128)) * 10.0 ** random.integers(-9, 10, (60, 1))).astype(f32)
    scales, zeros = theirs.scales(x)
    parts, codes = codec.encode(NUMPY, x, "keys"), theirs.codes(x, scales, zeros)
    assert parts["scales"].tobytes() == scales.tobytes()
    np.testing.assert_array_equal(np.round(parts["shifts"] / scales) - 2 ** (bits - 1), zeros)
    differ = unpack(NUMPY, parts["codes"], bits) - (codes + 2.0 ** (bits - 1))
    assert np.mean(differ != 0) == pytest.approx(0.25, abs=0.05)
    assert np.max(np.abs(differ)) == 1
    largest = np.max(np.abs(x).reshape(60, -1, group), axis=-1)
    np.testing.assert_array_equal(theirs.scales(np.abs(x))[0], largest / f32(2**bits - 1))
