"""Groups along tokens and along channels: loops over single groups, tails, and what KIVI's errors are."""

import numpy as np
import pytest

from framework.channel_groups import encode_channels, encode_tokens, read_channels, read_tokens
from framework.errors import KvtwinError
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


def along_tokens(x, bits, group):
    """What `encode_channels` is to give, unpacked: by loops."""
    batch, heads, tokens, width = x.shape
    groups = -(-tokens // group)
    codes = np.zeros((batch, heads, groups, width, group), np.uint8)
    scales, lows = np.zeros((2, batch, heads, groups, width), np.float16)
    for row, head, number, channel in np.ndindex(batch, heads, groups, width):
        values = x[row, head, number * group : (number + 1) * group, channel]
        place = row, head, number, channel
        found, scales[place], lows[place] = group_of(values, bits)
        codes[place][: len(found)] = found
    return codes, scales, lows


def named(encode, bits, group):
    """`encode` with names for codes, scales and minima."""
    return lambda xp, x: dict(zip("csm", encode(xp, x, bits, group), strict=True))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("tokens", "group"), [(16, 8), (21, 16), (5, 32)])
def test_channels_are_coded_as_in_the_loop_by_every_library(bits, tokens, group):
    x = numbers(tokens, 7)
    made = same_bytes(everywhere(named(encode_channels, bits, group), x, eager=bits == 4))
    x[..., 4] = 0
    codes, scales, lows = along_tokens(x, bits, group)
    np.testing.assert_array_equal(unpack(NUMPY, made["c"], bits), codes)
    np.testing.assert_array_equal(made["s"], scales)
    np.testing.assert_array_equal(made["m"], lows)
    assert made["c"].shape[-1] * 8 == group * bits
    wanted = codes.astype(np.float32) * scales[..., None].astype(np.float32) + lows[..., None].astype(
        np.float32
    )
    wanted = wanted.swapaxes(-1, -2).reshape(2, 3, -1, 7)[:, :, :tokens]
    for xp, array in LIBRARIES.values():
        parts = (array(made[name]) for name in "csm")
        back = np.asarray(read_channels(xp, *parts, bits, tokens))
        np.testing.assert_allclose(back, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("width", "group"), [(64, 32), (40, 16)])
def test_tokens_are_coded_as_channels_of_what_is_transposed(width, group):
    x = np.ascontiguousarray(numbers(width, 9, seed=3).swapaxes(-1, -2))
    made = same_bytes(everywhere(named(encode_tokens, 4, group), x))
    x[..., 4, :] = 0
    codes, scales, lows = along_tokens(x.swapaxes(-1, -2), 4, group)
    np.testing.assert_array_equal(unpack(NUMPY, made["c"], 4), codes.swapaxes(-2, -3))
    np.testing.assert_array_equal(made["s"], scales.swapaxes(-1, -2))
    np.testing.assert_array_equal(made["m"], lows.swapaxes(-1, -2))
    back = read_tokens(NUMPY, made["c"], made["s"], made["m"], 4, width)
    assert back.shape == x.shape
    half = np.repeat(made["s"].astype(np.float32), group, axis=-1)[..., :width] * 0.5
    assert (np.abs(back - x) <= half * 1.01 + np.abs(x) * 2e-3).all()


@pytest.mark.parametrize(("bits", "error"), [(4, 0.078), (2, 0.393)])
def test_white_noise_loses_what_was_seen(bits, error):
    x = np.random.default_rng(1).standard_normal((1, 2, 640, 128)).astype(np.float32)
    keys = read_channels(NUMPY, *encode_channels(NUMPY, x, bits, 32), bits, 640)
    values = read_tokens(NUMPY, *encode_tokens(NUMPY, x, bits, 32), bits, 128)
    for back in (keys, values):
        assert np.sqrt(np.mean((back - x) ** 2)) == pytest.approx(error, rel=0.02)


@pytest.mark.parametrize("factor", [2.0**-3, 2.0**5])
def test_a_channel_times_a_power_of_two_has_the_same_codes(factor):
    x = np.random.default_rng(2).standard_normal((2, 3, 21, 8)).astype(np.float32)
    pair = x.copy()
    pair[..., [1, 5]] *= np.float32(factor)  # rope turns channel i with channel i + half
    codes, scale, low = encode_channels(NUMPY, x, 4, 16)
    paired, wide, shifted = encode_channels(NUMPY, pair, 4, 16)
    scale[..., [1, 5]] *= np.float16(factor)
    low[..., [1, 5]] *= np.float16(factor)
    np.testing.assert_array_equal(paired, codes)
    np.testing.assert_array_equal(wide, scale)
    np.testing.assert_array_equal(shifted, low)


def test_what_cannot_be_coded_shows_in_the_scale_of_its_group():
    x = np.random.default_rng(4).standard_normal((1, 1, 24, 9)).astype(np.float32)
    x[0, 0, 3, :5] = np.nan, np.inf, -np.inf, 3e38, -1e7
    x[0, 0, 8:, 6] = 7e4  # fits in no minimum
    made = same_bytes(everywhere(named(encode_channels, 2, 8), x))
    bad = ~np.isfinite(made["s"][0, 0])
    wanted = np.zeros((3, 9), bool)
    wanted[0, :5] = wanted[1:, 6] = True
    np.testing.assert_array_equal(bad, wanted)
    assert np.isfinite(made["m"]).all()


@pytest.mark.parametrize(("bits", "group"), [(0, 32), (9, 32), (4, 12), (4, 0)])
def test_other_groups_are_refused(bits, group):
    with pytest.raises(KvtwinError, match="expected 1 to 8, and a multiple of 8"):
        encode_tokens(NUMPY, np.zeros((2, 3), np.float32), bits, group)
