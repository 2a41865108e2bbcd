"""Codes between a minimum and a maximum: loops over single groups, along tokens and along channels; KIVI's errors."""

import numpy as np
import pytest

from framework.codec import codecs
from framework.codecs.kivi import Kivi
from framework.errors import KvtwinError
from framework.min_max import encode, read
from framework.packing import unpack
from tests.libraries import LIBRARIES, everywhere, same_bytes

NUMPY = LIBRARIES["numpy"][0]


def group_of(values, bits):
    """Codes, scale and minimum of one group, value by value."""
    low, high = np.float32(min(values)), np.float32(max(values))
    scale = np.float16((high - low) / np.float32(2**bits - 1)) or np.float16(1)
    low = np.float16(low)
    codes = [round(float((each - np.float32(low)) / np.float32(scale))) for each in values]
    return [min(max(each, 0), 2**bits - 1) for each in codes], scale, low


def numbers(tokens, width, seed=0):
    """[2 3 tokens width]: sizes by channel, a constant channel, one of zeros, tiny ones, ties between two codes."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((2, 3, tokens, width)) * 10.0 ** random.integers(-3, 4, width)
    x[..., 2] = -1.7
    x[..., 3] = random.choice([0.0, -0.0], (2, 3, tokens))
    x[..., 4] *= 1e-41
    x[..., 5] = random.integers(0, 31, (2, 3, tokens)) / 2
    x = x.astype(np.float32)
    # Of 4 bits halfway between two codes, under scales of 11 bits: the product with a reciprocal is not.
    step = random.integers(1025, 2048, (2, 3, 1)) * np.float32(2.0**-12)
    x[..., 6] = (random.integers(0, 15, (2, 3, tokens)) + 0.5) * step
    x[..., 0::5, 6], x[..., 1::5, 6] = 0, 15 * step
    return x


def by_groups(x, bits, size):
    """Codes as `x` is laid out, and scale and minimum of every `size` numbers of the last axis: by loops."""
    groups = -(-x.shape[-1] // size)
    codes = np.zeros(x.shape, np.uint8)
    scales, lows = np.zeros((2, *x.shape[:-1], groups), np.float16)
    for place in np.ndindex(*x.shape[:-1], groups):
        span = slice(place[-1] * size, (place[-1] + 1) * size)
        codes[place[:-1]][span], scales[place], lows[place] = group_of(x[place[:-1]][span], bits)
    return codes, scales, lows


def along(axis, bits):
    """`encode` with names for codes, scales and minima."""
    return lambda xp, x: dict(zip("csm", encode(xp, x, bits, axis), strict=True))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("tokens", [16, 5])
def test_a_channel_of_some_tokens_is_coded_as_in_the_loop_by_every_library(bits, tokens):
    x = numbers(tokens, 7)
    made = same_bytes(everywhere(along(-2, bits), x, eager=bits == 4))
    x[..., 4] = 0
    codes, scales, lows = by_groups(np.ascontiguousarray(x.swapaxes(-1, -2)), bits, tokens)
    np.testing.assert_array_equal(made["c"], codes.swapaxes(-1, -2))
    np.testing.assert_array_equal(made["s"][..., 0, :], scales[..., 0])
    np.testing.assert_array_equal(made["m"][..., 0, :], lows[..., 0])
    wanted = made["c"].astype(np.float64) * made["s"].astype(np.float64) + made["m"].astype(np.float64)
    for xp, array in LIBRARIES.values():
        back = np.asarray(read(xp, *(array(made[name]) for name in "csm")))
        np.testing.assert_array_equal(back, wanted.astype(np.float32))


@pytest.mark.parametrize(("bits", "width", "group"), [(2, 64, 32), (4, 40, 16), (4, 80, 32)])
def test_a_value_is_coded_by_channels_of_its_own_and_its_last_group_may_be_short(bits, width, group):
    codec = Kivi(bits=bits, group=group, residual=group)
    x = np.ascontiguousarray(numbers(width, 9, seed=3).swapaxes(-1, -2))
    made = same_bytes(everywhere(lambda xp, x: codec.encode(xp, x, "values"), x))
    x[..., 4, :] = 0
    codes, scales, lows = by_groups(x, bits, group)
    np.testing.assert_array_equal(unpack(NUMPY, made["codes"], bits), codes)
    np.testing.assert_array_equal(made["scales"], scales)
    np.testing.assert_array_equal(made["minima"], lows)
    back = codec.read(NUMPY, made, "values")
    half = np.repeat(made["scales"].astype(np.float32), group, axis=-1)[..., :width] * 0.5
    assert (np.abs(back - x) <= half * 1.01 + np.abs(x) * 2e-3).all()


@pytest.mark.parametrize("name", ["kivi", "kvquant"])
def test_a_group_of_keys_packs_the_codes_of_each_token(name):
    codec = codecs.make(f"{name}(bits=4, group=8, residual=8)")
    x = numbers(8, 10, seed=5)
    full = np.ones(x.shape[:3], bool)
    own, once = codec.encode_group(NUMPY, x, full, None)
    codes, scale, low = encode(NUMPY, x, 4, -2)
    np.testing.assert_array_equal(unpack(NUMPY, own["codes"], 4), codes)
    np.testing.assert_array_equal(once["scales"], scale[..., 0, :])
    np.testing.assert_array_equal(once["minima"], low[..., 0, :])
    spread = {key: np.repeat(part[..., None, :], 8, axis=-2) for key, part in once.items()}
    np.testing.assert_array_equal(codec.read(NUMPY, own | spread, "keys"), read(NUMPY, codes, scale, low))


@pytest.mark.parametrize(("bits", "error"), [(4, 0.078), (2, 0.393)])
def test_white_noise_loses_what_was_seen(bits, error):
    x = np.random.default_rng(1).standard_normal((2, 20, 32, 128)).astype(np.float32)
    keys = read(NUMPY, *encode(NUMPY, x, bits, -2))
    codec = Kivi(bits=bits)
    values = codec.read(NUMPY, codec.encode(NUMPY, x, "values"), "values")
    for back in (keys, values):
        assert np.sqrt(np.mean((back - x) ** 2)) == pytest.approx(error, rel=0.02)


@pytest.mark.parametrize("factor", [2.0**-3, 2.0**5])
def test_a_channel_times_a_power_of_two_has_the_same_codes(factor):
    x = np.random.default_rng(2).standard_normal((2, 3, 16, 8)).astype(np.float32)
    pair = x.copy()
    pair[..., [1, 5]] *= np.float32(factor)  # rope turns channel i with channel i + half
    codes, scale, low = encode(NUMPY, x, 4, -2)
    paired, wide, shifted = encode(NUMPY, pair, 4, -2)
    scale[..., [1, 5]] *= np.float16(factor)
    low[..., [1, 5]] *= np.float16(factor)
    np.testing.assert_array_equal(paired, codes)
    np.testing.assert_array_equal(wide, scale)
    np.testing.assert_array_equal(shifted, low)


def test_what_cannot_be_coded_shows_in_the_scale_of_its_group():
    x = np.random.default_rng(4).standard_normal((3, 8, 9)).astype(np.float32)
    x[0, 3, :5] = np.nan, np.inf, -np.inf, 3e38, -1e7
    x[1:, :, 6] = 7e4  # fits in no minimum
    made = same_bytes(everywhere(along(-2, 2), x))
    wanted = np.zeros((3, 1, 9), bool)
    wanted[0, 0, :5] = wanted[1:, 0, 6] = True
    np.testing.assert_array_equal(~np.isfinite(made["s"]), wanted)
    assert np.isfinite(made["m"]).all()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ("bits=3", "kivi has bits=3; expected 2 or 4"),
        ("group=0", "kivi has group=0; expected at least 1"),
        ("group=32, residual=48", "kivi has residual=48; expected a positive multiple of group=32"),
        ("residual=0", "kivi has residual=0; expected a positive multiple of group=32"),
    ],
)
def test_other_numbers_are_refused(fields, says):
    with pytest.raises(KvtwinError, match=says):
        codecs.make(f"kivi({fields})")
