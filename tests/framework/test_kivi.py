"""KIVI's keys: what holds for any numbers in a group, by channel."""

import array_api_compat.numpy as xp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from framework.codecs.kivi import Kivi
from framework.packing import unpack

TOKENS, WIDTH = 8, 4
few = settings(max_examples=60, deadline=None)
both_bits = st.sampled_from([2, 4])
any_numbers = (
    st.floats(-1e4, 1e4, width=32)
    | st.floats(-(2.0**-12), 2.0**-12, width=32)
    | st.sampled_from([0.0, -0.0, 1.0, 1024.5, -9999.0, 1e-40])
)
groups = arrays(np.float32, (TOKENS, WIDTH), elements=any_numbers)
# Their least difference, over 15 and times 2^-6, is a normal float16.
steps = arrays(np.float32, (TOKENS, WIDTH), elements=st.integers(-2000, 2000).map(lambda x: x / 16))


def coded(bits, x, filled=None):
    """Codes, scales and minima of one group [tokens width] of keys, and the keys as they read."""
    codec = Kivi(bits=bits, group=len(x), residual=len(x))
    filled = np.ones(len(x), bool) if filled is None else filled
    with np.errstate(all="ignore"):
        own, once = codec.encode_group(xp, x, filled, None)
        parts = own | {key: np.broadcast_to(part, (len(x), WIDTH)) for key, part in once.items()}
        back = codec.read(xp, parts, "keys")
    return unpack(xp, own["codes"], bits), once["scales"], once["minima"], back


def same(one, other):
    for each, like in zip(one, other, strict=True):
        assert (each.dtype, each.shape) == (like.dtype, like.shape)
        np.testing.assert_array_equal(each, like)


@few
@given(x=groups, bits=both_bits)
def test_a_number_is_off_by_half_a_scale_and_what_float16_rounds(x, bits):
    codes, scale, low, back = coded(bits, x)
    most, wide = 2**bits - 1, x.astype(np.float64)
    assert codes.max() <= most
    assert np.isfinite(scale).all()
    assert (scale > 0).all()
    least, span = wide.min(0), np.ptp(wide, axis=0)
    # The minimum and the scale are rounded, the scale as often as there are steps; the sum is, in float32.
    rounding = (np.abs(least) + span) * 2.0**-11 + (most + 1) * 2.0**-25 + np.abs(wide) * 2.0**-22
    assert (np.abs(back - wide) <= scale.astype(np.float64) / 2 + rounding).all()
    assert (np.abs(low - least) <= np.abs(least) * 2.0**-11 + 2.0**-25).all()
    wanted = span / most  # of numbers below the least float16, nothing is left
    none = scale == 1
    assert (np.abs(scale - wanted) <= wanted * 2.0**-10.9 + 2.0**-25)[~none].all()
    assert ((wanted <= 2.0**-25) | (np.abs(wanted - 1) < 2.0**-10))[none].all()


@few
@given(x=steps, bits=both_bits, power=st.integers(-6, 6), pair=st.integers(0, WIDTH // 2 - 1))
def test_a_pair_of_channels_times_a_power_of_two_has_the_same_codes(x, bits, power, pair):
    """What rotates channel i with channel i + half leaves a product with queries as it was, if those are divided."""
    factor = np.ones(WIDTH, np.float32)
    factor[[pair, pair + WIDTH // 2]] = 2.0**power
    codes, scale, low, back = coded(bits, x)
    constant = np.ptp(x, axis=0) == 0
    scaled = np.where(constant, scale, scale * factor.astype(np.float16))
    same(coded(bits, x * factor), (codes, scaled, low * factor.astype(np.float16), back * factor))


@few
@given(x=steps, bits=both_bits)
def test_what_was_read_has_the_same_codes_where_they_reach_both_ends(x, bits):
    """Otherwise the range is smaller, and so is the scale. These sums of a minimum and some scales are exact."""
    x[:2, 0] = -3.0, 4.5
    codes, scale, low, back = coded(bits, x)
    again = coded(bits, back)
    ends = (codes.min(0) == 0) & (codes.max(0) == 2**bits - 1)
    ends |= np.ptp(x, axis=0) == 0
    same([each[..., ends] for each in again], [each[..., ends] for each in (codes, scale, low, back)])
    finer = again[1].astype(np.float64) <= scale * (1 + 2.0**-10)
    assert (finer | (again[1] == 1)).all()


def test_codes_reach_both_ends_as_a_rule():
    x = np.random.default_rng(1).standard_normal((32, WIDTH)).astype(np.float32)
    for bits in (2, 4):
        codes = coded(bits, x)[0]
        assert (codes.min(0) == 0).all()
        assert (codes.max(0) == 2**bits - 1).all()


@few
@given(row=arrays(np.float32, WIDTH, elements=any_numbers), bits=both_bits, tokens=st.sampled_from([1, 2, 7]))
def test_one_number_many_times_is_at_least_as_near_as_in_float16(row, bits, tokens):
    codes, scale, low, back = coded(bits, np.repeat(row[None], tokens, axis=0))
    half = row.astype(np.float16)
    np.testing.assert_array_equal(scale, np.float16(1))
    np.testing.assert_array_equal(low, half)
    small = np.abs(row) < 1024  # beyond, float16 is off by more than half of this scale
    np.testing.assert_array_equal(codes[:, small], 0)
    np.testing.assert_array_equal(back[:, small], np.repeat(half[None, small], tokens, axis=0))
    assert (np.abs(back - row) <= np.abs(half - row)).all()


@few
@given(
    x=arrays(
        np.float32, (TOKENS, WIDTH), elements=st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1e-39, -1e-38])
    ),
    bits=both_bits,
)
def test_zeros_and_denormals_read_as_zeros(x, bits):
    codes, scale, low, back = coded(bits, x)
    for each, number in ((codes, 0), (scale, 1), (low, 0), (back, 0)):
        np.testing.assert_array_equal(each, number)
    assert not np.signbit(low).any()


@few
@given(
    x=arrays(
        np.float32,
        (TOKENS, WIDTH),
        elements=st.floats(-7e4, 7e4, width=32)
        | st.floats(-1.5e6, 1.5e6, width=32)
        | st.sampled_from([65519.0, 65520.0, -65519.0, -65520.0, 3.4e38, -3.4e38, np.inf, -np.inf, np.nan]),
    ),
    bits=both_bits,
)
def test_what_fits_in_no_float16_shows_in_the_scale(x, bits):
    _, scale, low, back = coded(bits, x)
    with np.errstate(all="ignore"):
        least = x.min(0)
        size = (x.max(0) - least) / np.float32(2**bits - 1)
        fits = np.isfinite(x).all(0) & (np.abs(least) < 65520) & (size < 65520)
    np.testing.assert_array_equal(np.isfinite(scale), fits)
    assert np.isfinite(low).all()
    assert np.isfinite(back[:, fits]).all()


@few
@given(x=groups, bits=both_bits, tokens=st.integers(1, TOKENS - 1))
def test_a_group_with_fewer_tokens_is_coded_as_they_are_alone(x, bits, tokens):
    x[tokens:] = x[tokens - 1]
    codes, scale, low, back = coded(bits, x, np.arange(TOKENS) < tokens)
    same(coded(bits, x[:tokens]), (codes[:tokens], scale, low, back[:tokens]))


@few
@given(x=groups, bits=both_bits)
def test_the_order_of_tokens_and_other_channels_do_not_matter(x, bits):
    codes, scale, low, back = coded(bits, x)
    same(coded(bits, x[::-1].copy()), (codes[::-1], scale, low, back[::-1]))
    other = x.copy()
    other[:, 1] = 3e38
    apart = [0, 2, 3]
    same(
        [each[..., apart] for each in coded(bits, other)],
        [each[..., apart] for each in (codes, scale, low, back)],
    )


@pytest.mark.parametrize("bits", [2, 4])
def test_a_group_of_one_key_is_that_key_in_float16(bits):
    x = np.random.default_rng(3).standard_normal((1, WIDTH)).astype(np.float32) * 10
    codes, scale, _, back = coded(bits, x)
    np.testing.assert_array_equal(back, x.astype(np.float16))
    assert (codes == 0).all()
    assert (scale == 1).all()
