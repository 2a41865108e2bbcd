"""Codes in bytes and Hadamard transforms: loops over single bits and single sums, and the same bytes everywhere."""

import array_api_compat.numpy
import array_api_compat.torch
import jax
import jax.numpy
import numpy as np
import pytest

from framework.hadamard import blockwise, matrix, transform
from framework.packing import pack, pieces, planes, unpack

LIBRARIES = {
    "numpy": (array_api_compat.numpy, np.asarray),
    "torch": (array_api_compat.torch, array_api_compat.torch.asarray),
    "jax": (jax.numpy, jax.numpy.asarray),
}
PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


def packed_by_bit(codes, bits):
    """One vector, bit after bit: plane by plane, byte j holds the codes j, j + n, j + 2n, ..."""
    out, low = [], 0
    for width in PLANES[bits]:
        size = len(codes) * width // 8
        plane = [0] * size
        for number, code in enumerate(codes):
            byte, place = number % size, number // size
            for bit in range(width):
                plane[byte] |= ((int(code) >> (low + bit)) & 1) << (place * width + bit)
        out += plane
        low += width
    return np.array(out, np.uint8)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_come_back_from_the_bytes_of_the_loop(bits, library):
    xp, array = LIBRARIES[library]
    codes = np.random.default_rng(bits).integers(0, 2**bits, (2, 3, 40)).astype(np.uint8)
    packed = pack(xp, array(codes), bits)
    assert planes(bits) == PLANES[bits]
    assert packed.shape == (2, 3, 5 * bits)
    for place in np.ndindex(2, 3):
        np.testing.assert_array_equal(np.asarray(packed[place]), packed_by_bit(codes[place], bits))
    np.testing.assert_array_equal(np.asarray(unpack(xp, packed, bits)), codes)
    apart = pieces(xp, packed, bits)
    assert [piece.shape[-1] for piece in apart] == [5 * PLANES[bits][0]] * (8 // PLANES[bits][0])
    np.testing.assert_array_equal(np.concatenate([np.asarray(piece) for piece in apart], axis=-1), codes)


def butterfly(x):
    """Lane by lane: each stage adds the partner's number to the lane's own, negated where the lane has the bit."""
    w = list(x)
    for bit in (1, 2, 4, 8, 16):
        w = [(-w[t] if t & bit else w[t]) + w[t ^ bit] for t in range(32)]
    return np.array(w)


@pytest.mark.parametrize("library", [*LIBRARIES, "jit"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_transform_rounds_as_the_butterfly_does(dtype, library):
    x = (300 * np.random.default_rng(5).standard_normal((3, 4, 32))).astype(dtype)
    if library == "jit":
        made = jax.jit(lambda x: transform(jax.numpy, x))(x)
    else:
        xp, array = LIBRARIES[library]
        made = transform(xp, array(x))
    for place in np.ndindex(3, 4):
        np.testing.assert_array_equal(np.asarray(made[place]), butterfly(x[place]))


def test_transform_beyond_float16_is_not_finite():
    x = np.full((1, 32), 3000, np.float16)
    x[0, 1:3] = -3000, -3000
    assert not np.isfinite(transform(array_api_compat.numpy, 20 * x)).all()


@pytest.mark.parametrize("size", [1, 2, 4, 32])
def test_matrix_is_what_transform_multiplies_by(size):
    x = np.random.default_rng(6).integers(-9, 10, (5, size)).astype(np.float32)
    np.testing.assert_array_equal(transform(array_api_compat.numpy, x), x @ matrix(size))
    np.testing.assert_array_equal(matrix(size) @ matrix(size), size * np.eye(size))


def test_blockwise_applies_a_block_to_each_piece():
    block = np.arange(6, 15, dtype=np.float32).reshape(3, 3)
    x = np.random.default_rng(7).integers(-9, 10, (4, 12)).astype(np.float32)
    expected = np.concatenate([x[:, first : first + 3] @ block for first in range(0, 12, 3)], axis=1)
    np.testing.assert_array_equal(x @ blockwise(block, 12), expected)
