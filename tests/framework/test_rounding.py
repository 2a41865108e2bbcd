"""Rounding to fewer bits: the same bytes from every library, and those of ml_dtypes."""

import array_api_compat.numpy
import array_api_compat.torch
import jax
import jax.numpy
import ml_dtypes
import numpy as np
import pytest

from framework.rounding import byte_float, half, largest, quotient, upper_half


def on_torch(f, *arrays):
    made = f(array_api_compat.torch, *map(array_api_compat.torch.asarray, arrays))
    return made.view(array_api_compat.torch.int16).numpy() if made.dtype.itemsize == 2 else made.numpy()


RUNS = {
    "numpy": lambda f, *arrays: np.asarray(f(array_api_compat.numpy, *arrays)),
    "torch": on_torch,
    "jax": lambda f, *arrays: np.asarray(f(jax.numpy, *map(jax.numpy.asarray, arrays))),
    "jit": lambda f, *arrays: np.asarray(jax.jit(lambda *given: f(jax.numpy, *given))(*arrays)),
}
every_library = pytest.mark.parametrize("library", RUNS)
# kind: mantissa bits, exponent bias, the code of NaN, the largest number
BYTES = {"float8_e4m3fn": (3, 7, 0x7F, 448.0), "float8_e5m2": (2, 15, 0x7F, 57344.0)}


def words(count):
    """Float32 numbers of every exponent, with those that lie near a tie of a shorter format."""
    random = np.random.default_rng(8)
    bits = random.integers(0, 2**32, count, dtype=np.uint32)
    near = (bits & 0xFFF80000) + random.integers(-1, 2, count).astype(np.uint32)
    edges = np.array([0, -0.0, 1e-45, -1e-39, 65504, 65519.99, 65520, np.inf, -np.inf], np.float32)
    numbers = np.concatenate([bits.view(np.float32), near.view(np.float32), edges])
    return numbers[~np.isnan(numbers)]


@every_library
def test_half_is_the_cast_of_numpy(library):
    x = words(50_000)
    with np.errstate(over="ignore"):
        expected = x.astype(np.float16)
    made = RUNS[library](half, x)
    np.testing.assert_array_equal(made.view(np.int16), expected.view(np.int16))


@every_library
@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_largest_does_not_pass_over_what_is_not_finite(kind, library):
    x = np.random.default_rng(10).standard_normal((3 * 32, 32)).astype(kind)
    expected = np.abs(x).max(axis=-1)
    for place in range(32):  # in each place once
        x[place, place], x[32 + place, place] = np.nan, -np.inf
    expected[:64] = np.inf
    made = RUNS[library](lambda xp, x: xp.where(largest(xp, x) < 0, 0.0, largest(xp, x)) * 1.0, x)
    np.testing.assert_array_equal(made.view(kind)[:, 0], expected)


@every_library
@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_quotient_is_rounded_once_though_the_divisor_is_one_for_many(kind, library):
    x = np.random.default_rng(9).standard_normal((60, 70)).astype(kind)
    by = np.abs(x).max(axis=-1, keepdims=True)
    x[3, 5] = 0
    made = RUNS[library](quotient, x, by)
    assert made.view(np.int16).tobytes() == (x / by).view(np.int16).tobytes()


@every_library
def test_quotient_of_zero_is_zero(library):
    made = RUNS[library](quotient, np.zeros((2, 3), np.float32), np.zeros((2, 1), np.float32))
    np.testing.assert_array_equal(made, 0)


@every_library
@pytest.mark.parametrize("kind", BYTES)
def test_byte_float_is_the_cast_of_ml_dtypes(kind, library):
    mantissa, bias, nan, most = BYTES[kind]
    x = words(50_000)
    x = np.where(np.isfinite(x), np.clip(x, -most, most), x).astype(np.float32)
    expected = x.astype(getattr(ml_dtypes, kind)).view(np.uint8)
    expected = np.where(np.isfinite(x), expected, nan)
    made = RUNS[library](lambda xp, x: byte_float(xp, x, mantissa, bias, nan), x)
    np.testing.assert_array_equal(made, expected)


@every_library
def test_upper_half_reads_e5m2(library):
    codes = np.arange(256, dtype=np.uint8)
    made = RUNS[library](upper_half, codes)
    np.testing.assert_array_equal(made, codes.view(ml_dtypes.float8_e5m2).astype(np.float32))
