"""Codecs without groups: short floats and int8, against tables of all their numbers, and the bounds of their errors."""

import array_api_compat.numpy as xp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from framework.codec import codecs, decoded
from framework.errors import KvtwinError

SINGLE = np.float32
# Exponent bits, mantissa bits, bias, how many of the upper codes are no numbers.
KINDS = {"e4m3": (4, 3, 7, 1), "e5m2": (5, 2, 15, 4)}
vectors = arrays(
    SINGLE,
    (3, 10),
    elements=st.floats(-1e4, 1e4, width=32)
    | st.floats(-(2.0**-10), 2.0**-10, width=32)
    | st.sampled_from([0.0, 448.0, 1e-40]),
)
few = settings(max_examples=80, deadline=None)


def comes_back(codec, parts, side):
    return decoded(codec, xp, parts, side, SINGLE)


def table(kind):
    """The numbers of the codes 0, 1, 2, ... of one sign, from their bits."""
    _, mantissa, bias, none = KINDS[kind]
    numbers = []
    for code in range(128 - none):
        exponent, rest = code >> mantissa, code % 2**mantissa
        whole = rest / 2**mantissa + (exponent > 0)
        numbers.append(whole * 2.0 ** (max(exponent, 1) - bias))
    return numbers


def nearest(numbers, x):
    """The code of the nearest number, of two the even one; beyond the last, the last."""
    apart = [abs(min(abs(x), numbers[-1]) - number) for number in numbers]
    best = min(apart)
    close = [code for code, each in enumerate(apart) if each == best]
    code = close[0] if len(close) == 1 else next(code for code in close if code % 2 == 0)
    return code + (128 if np.signbit(x) else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_number_of_a_kind(kind):
    assert table(kind)[-1] == {"e4m3": 448, "e5m2": 57344}[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_fp8_stores_the_nearest_number(kind, scale):
    random, numbers = np.random.default_rng(3), table(kind)
    ties = [(a + b) / 2 for a, b in zip(numbers, numbers[1:], strict=False)]
    x = np.concatenate(
        [numbers, ties, random.standard_normal(200) * np.exp2(random.integers(-20, 18, 200)), [1e30]]
    )
    x = (scale * np.concatenate([x, -x])).astype(SINGLE)
    codec = codecs.make(f"fp8(kind='{kind}', k_scale={scale})")
    parts = codec.encode(xp, x, "keys")
    expected = [nearest(numbers, float(each) / scale) for each in x]
    np.testing.assert_array_equal(parts["codes"], expected)
    read = [scale * numbers[code % 128] * (-1 if code > 127 else 1) for code in expected]
    np.testing.assert_array_equal(codec.read(xp, parts, "keys"), read)


def test_fp8_has_a_scale_for_each_side():
    codec, x = codecs.make("fp8(k_scale=0.5, v_scale=4.0)"), np.full((1, 2), 1e9, SINGLE)
    assert comes_back(codec, codec.encode(xp, x, "keys"), "keys").tolist() == [[224, 224]]
    assert comes_back(codec, codec.encode(xp, x, "values"), "values").tolist() == [[1792, 1792]]


@few
@given(x=vectors)
def test_fp8_truncated_keeps_the_upper_byte_of_float16(x):
    codec = codecs.make("fp8_truncated")
    parts = codec.encode(xp, x, "keys")
    expected = np.frombuffer(x.astype("<f2").tobytes(), np.uint8)[1::2].reshape(x.shape)
    np.testing.assert_array_equal(parts["codes"], expected)
    back, half = comes_back(codec, parts, "keys"), x.astype(np.float16).astype(SINGLE)
    assert (np.abs(back) <= np.abs(half)).all()
    assert (np.abs(half - back) <= 0.25 * np.abs(half) + 2.0**-16).all()


@few
@given(x=vectors)
def test_the_error_of_short_floats_is_half_a_unit(x):
    size = np.abs(x.astype(float))
    bounds = {
        "fp16()": size * 2.0**-11 + 2.0**-25,
        "bf16()": size * 2.0**-8 + 2.0**-134,
        "fp8()": np.where(size <= 448, size * 2.0**-4 + 2.0**-10, size - 448),
        "fp8(kind='e5m2')": size * 2.0**-3 + 2.0**-17,
    }
    for name, bound in bounds.items():
        codec = codecs.make(name)
        error = np.abs(comes_back(codec, codec.encode(xp, x, "values"), "values") - x.astype(float))
        assert (error <= bound * (1 + 1e-6)).all(), name


@pytest.mark.parametrize(
    "name", ["fp16()", "bf16()", "fp8(k_scale=0.3)", "fp8(kind='e5m2', k_scale=7.0)", "fp8_truncated()"]
)
@few
@given(x=vectors)
def test_what_short_floats_read_is_coded_the_same_again(name, x):
    codec = codecs.make(name)
    once = codec.encode(xp, x, "keys")
    twice = codec.encode(xp, comes_back(codec, once, "keys"), "keys")
    assert twice["codes"].tobytes() == once["codes"].tobytes()


def test_beyond_float16_is_infinite_in_fp16_and_shows():
    x = np.array([[65519.0, 65520.0, -1e9]], SINGLE)
    codes = codecs.make("fp16").encode(xp, x, "keys")["codes"]
    assert codes.tolist() == [[65504, np.inf, -np.inf]]


def test_beyond_float16_is_the_largest_number_of_fp8_truncated():
    codec, x = codecs.make("fp8_truncated"), np.array([[60000.0, 65520.0, -1e9]], SINGLE)
    assert comes_back(codec, codec.encode(xp, x, "keys"), "keys").tolist() == [[57344, 57344, -57344]]


def test_bf16_codes_are_the_words_of_bfloat16():
    random = np.random.default_rng(4)
    x = random.integers(0, 2**32, 100_000, dtype=np.uint32)
    x[:1000] = (x[:1000] & 0xFFFF0000) | 0x8000  # ties
    x = x.view(SINGLE)
    with np.errstate(over="ignore", invalid="ignore"):
        x = x[np.isfinite(x.astype(ml_dtypes.bfloat16))]
    codec = codecs.make("bf16")
    codes = codec.encode(xp, x, "keys")["codes"]
    np.testing.assert_array_equal(codes, x.astype(ml_dtypes.bfloat16).view(np.int16))
    edge = np.array([3.4e38, -3.4e38, np.inf, -np.inf], SINGLE)
    most = float(ml_dtypes.finfo("bfloat16").max)
    assert comes_back(codec, codec.encode(xp, edge, "keys"), "keys").tolist() == [
        most,
        -most,
        np.inf,
        -np.inf,
    ]


@few
@given(x=vectors, exponent=st.integers(-60, 100))
def test_int8_rounds_to_127ths_of_the_largest(x, exponent):
    x = (x * 2.0**exponent).astype(SINGLE)
    codec = codecs.make("int8")
    parts = codec.encode(xp, x, "keys")
    scale = codec.scale(xp, parts, "keys")
    for vector, codes, step in zip(x, parts["codes"], scale, strict=True):
        most = max(abs(each) for each in vector)
        if most < 2.0**-100:
            assert step == 0
            assert codes.tolist() == [0] * 10
            continue
        assert step == most * SINGLE(1 / 127)
        assert codes.tolist() == [int(np.clip(np.rint(each / step), -127, 127)) for each in vector]
        assert max(abs(int(code)) for code in codes) == 127
        assert (np.abs(codes * float(step) - vector) <= 0.5 * step * (1 + 1e-5)).all()
    np.testing.assert_array_equal(codec.read(xp, parts, "keys"), parts["codes"])
    again = codec.encode(xp, comes_back(codec, parts, "keys"), "keys")
    np.testing.assert_array_equal(again["codes"], parts["codes"])
    np.testing.assert_allclose(again["scales"], parts["scales"], rtol=3e-7)


def test_int8_takes_at_most_28_hundredths_of_float32():
    codes, beside = codecs.make("int8").bits_of(64, "keys", 4)
    assert (codes + beside) / (64 * 32) <= 0.28


WRONG = {
    "kind='e3m4'": r"fp8 has kind='e3m4'; expected one of e4m3, e5m2",
    "k_scale=0.0": r"fp8 has k_scale=0.0; expected a number from 1e-20 to 1e\+?20",
    "v_scale=-1.0": r"fp8 has v_scale=-1.0; expected a number",
    "k_scale=1e999": r"fp8 has k_scale=inf; expected a number",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_fp8_refuses_what_is_no_kind_or_scale(wrong):
    with pytest.raises(KvtwinError, match=WRONG[wrong]):
        codecs.make(f"fp8({wrong})")
