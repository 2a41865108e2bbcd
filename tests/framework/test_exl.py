"""The caches of ExLlamaV2 and V3: their definitions in loops, number by number, and what is known of them."""

import math

import array_api_compat.numpy as xp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from framework.codec import codecs, decoded
from framework.errors import KvtwinError
from framework.spec import Layer

HALF, SINGLE = np.float16, np.float32
EXL2 = {
    "exl2_q4": {"keys": 4, "values": 4},
    "exl2_q6": {"keys": 8, "values": 4},
    "exl2_q8": {"keys": 8, "values": 8},
}
every_exl2 = pytest.mark.parametrize(("name", "side"), [(name, side) for name in EXL2 for side in EXL2[name]])
pytestmark = pytest.mark.filterwarnings("error")


def comes_back(codec, parts, side):
    return decoded(codec, xp, parts, side, SINGLE)


def butterfly(lanes):
    """32 threads: each adds its partner's number to its own, negated where the thread has the bit."""
    w = list(lanes)
    for bit in (1, 2, 4, 8, 16):
        w = [(-w[t] if t & bit else w[t]) + w[t ^ bit] for t in range(32)]
    return w


def exl2_span(span, bits):
    """The bytes, scales and numbers read of 64 float16 values: what 32 threads with two values each do."""
    even, odd = butterfly(span[0::2]), butterfly(span[1::2])
    middle = HALF(8 if bits == 4 else 128)
    stored, scales, seen_even, seen_odd = [], [], [], []
    for half in (range(16), range(16, 32)):
        most = max(max(abs(even[t]), abs(odd[t])) for t in half)
        scale = most * HALF(1 / middle)
        scales.append(scale)
        for t in half:
            pair = []
            for w in (even[t], odd[t]):
                code = 0
                if most > 0:
                    code = int(np.clip(np.rint(HALF(HALF(w / most) * middle + middle)), 0, 2 * middle - 1))
                pair.append(code)
            stored += [pair[0] | pair[1] << 4] if bits == 4 else pair
            seen_even.append(HALF(pair[0] - middle) * scale)
            seen_odd.append(HALF(pair[1] - middle) * scale)
    back = np.empty(64, HALF)
    back[0::2] = np.array(butterfly(seen_even)) * HALF(1 / 32)
    back[1::2] = np.array(butterfly(seen_odd)) * HALF(1 / 32)
    return np.array(stored, np.uint8), np.array(scales), back


def exl2(row, bits):
    """A token's row of heads, span by span."""
    spans = [exl2_span(row[first : first + 64].astype(HALF), bits) for first in range(0, len(row), 64)]
    return tuple(np.concatenate(part) for part in zip(*spans, strict=True))


def exl3_group(group, bits):
    """The codes, the scale and the numbers read of 32 values, before they are rotated back."""
    root, middle = SINGLE(1 / math.sqrt(32)), 2 ** (bits - 1)
    v = [w * root for w in butterfly(group)]
    s = SINGLE(max(abs(w) for w in v)) + SINGLE(1e-10)
    codes = [int(np.clip(math.floor(w / s * SINGLE(middle) + SINGLE(middle)), 0, 2 * middle - 1)) for w in v]
    read = [(code - (middle - 0.5)) / middle * float(HALF(s)) for code in codes]
    return codes, HALF(s), np.array(butterfly(read)) / math.sqrt(32)


def planes(codes, bits):
    """Planes of 4, 2 and 1 bits; in one of n bytes, byte j holds the codes j, j + n, ... from its lowest bits on."""
    out, low = [], 0
    for width in [8] if bits == 8 else [width for width in (4, 2, 1) if bits & width]:
        size = 32 * width // 8
        plane = [0] * size
        for place, code in enumerate(codes):
            plane[place % size] |= ((code >> low) % 2**width) << (place // size * width)
        out, low = out + plane, low + width
    return out


def exl3(row, bits):
    stored, scales, back = [], [], []
    for first in range(0, len(row), 32):
        codes, scale, seen = exl3_group(row[first : first + 32], bits)
        stored += planes(codes, bits)
        scales.append(scale)
        back.append(seen)
    return np.array(stored, np.uint8), np.array(scales), np.concatenate(back)


def rows(seed, width, count=5):
    """[2, 1, count, width]: of many sizes, one of zeros, one of one number, one with a channel far beyond."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((2, 1, count, width)).astype(SINGLE) * np.exp2(
        random.integers(-9, 7, (2, 1, count, 1))
    )
    x[0, 0, 0], x[0, 0, 1] = 0, -2.5
    x[1, 0, 2, width // 3] = 400
    x[1, 0, 3, :64] = 0
    x[1, 0, 4] *= 1e-7  # subnormal in float16
    return x.astype(SINGLE)


@pytest.mark.parametrize("width", [64, 128, 320])  # one span, two, and the five of 4 heads of head_dim 80
@every_exl2
def test_exl2_stores_the_bytes_of_the_threads(name, side, width):
    x, bits = rows(width, width), EXL2[name][side]
    codec = codecs.make(name)
    parts = codec.encode(xp, x, side)
    back = comes_back(codec, parts, side)
    for place in np.ndindex(x.shape[:-1]):
        stored, scales, seen = exl2(x[place], bits)
        np.testing.assert_array_equal(parts["codes"][place], stored)
        assert parts["scales"][place].tobytes() == scales.tobytes()
        # The threads round each step on the way back to float16.
        largest = np.abs(scales.astype(SINGLE)).max() * 2 ** (bits - 1)
        assert np.abs(back[place] - seen).max() <= 2e-3 * largest + 2e-7


@pytest.mark.parametrize("bits", range(2, 9))
def test_exl3_stores_the_codes_of_the_formula(bits):
    x = rows(bits, 96)
    codec = codecs.make(f"exl3(k_bits={bits}, v_bits={10 - bits})")
    for side, own in (("keys", bits), ("values", 10 - bits)):
        parts = codec.encode(xp, x, side)
        back = comes_back(codec, parts, side)
        for place in np.ndindex(x.shape[:-1]):
            stored, scales, seen = exl3(x[place], own)
            np.testing.assert_array_equal(parts["codes"][place], stored)
            assert parts["scales"][place].tobytes() == scales.tobytes()
            np.testing.assert_allclose(back[place], seen, rtol=0, atol=3e-6 * np.abs(seen).max())


NOISE = {
    ("exl2_q4()", "keys"): 0.0935,
    ("exl2_q6()", "keys"): 0.0060,
    ("exl2_q6()", "values"): 0.0935,
    ("exl2_q8()", "values"): 0.0060,
    ("fp8_truncated()", "keys"): 0.098,
    **{
        (f"exl3(k_bits={bits})", "keys"): error
        for bits, error in zip(
            range(2, 9), (0.356, 0.178, 0.0891, 0.0446, 0.0223, 0.0111, 0.0056), strict=True
        )
    },
}


@pytest.mark.parametrize(("name", "side"), NOISE)
def test_white_noise_comes_back_with_the_known_error(name, side):
    x = np.random.default_rng(11).standard_normal((1, 2, 2000, 128)).astype(SINGLE)
    codec = codecs.make(name)
    error = comes_back(codec, codec.encode(xp, x, side), side) - x
    assert np.sqrt((error**2).mean() / (x**2).mean()) == pytest.approx(NOISE[name, side], rel=0.02)


def outlier(name, place=20, tokens=500):
    """Errors beside a dominant channel: the number 400 in normal ones. Its own, the first channel's, and those of the
    others of its 32."""
    x = np.random.default_rng(12).standard_normal((1, 1, tokens, 64)).astype(SINGLE)
    x[..., place] = 400
    codec = codecs.make(name)
    error = (comes_back(codec, codec.encode(xp, x, "keys"), "keys") - x)[0, 0].astype(float)
    return error[:, place], error[:, 0], np.delete(error[:, :32], [0, place], axis=1)


@pytest.mark.parametrize("name", ["exl2_q4()", "exl3()"])
def test_beside_a_dominant_channel_the_others_vanish_in_4_bits(name):
    _, _, others = outlier(name)
    assert np.sqrt((others**2).mean()) == pytest.approx(1, abs=0.06)  # as large as they are


@pytest.mark.parametrize("name", ["exl2_q6()", "exl2_q8()", "exl3(k_bits=8)"])
def test_beside_a_dominant_channel_8_bits_keep_the_others(name):
    _, _, others = outlier(name)
    assert 0.14 < np.sqrt((others**2).mean()) < 0.2


def test_the_clip_of_exl2_bends_the_dominant_channel_and_the_first_of_its_parity():
    own, first, others = outlier("exl2_q4()")
    assert own.mean() == pytest.approx(-15, abs=1.5)
    assert first.mean() == pytest.approx(-24.5, abs=1.5)
    assert np.abs(others.mean(axis=0)).max() < 0.2


@every_exl2
def test_the_largest_positive_number_is_clipped_and_the_largest_negative_is_not(name, side):
    middle = 2 ** (EXL2[name][side] - 1)
    codec = codecs.make(name)
    for sign, kept in ((1, (middle - 1) / middle), (-1, 1)):
        x = np.full((1, 64), sign, SINGLE)  # rotated: 32 and zeros, in each parity
        np.testing.assert_array_equal(comes_back(codec, codec.encode(xp, x, side), side), kept * x)


@every_exl2
def test_a_sum_beyond_float16_is_not_finite_in_a_scale(name, side):
    codec = codecs.make(name)
    x = np.random.default_rng(13).standard_normal((2, 3, 128)).astype(SINGLE)
    x[0, 1, 64:] = 3000  # 32 of them are 96000
    x[1, 2, 5] = 70000  # no float16
    x[1, 0, :64:2] = 2000  # 64000
    scales = codec.encode(xp, x, side)["scales"]
    tokens, spans = np.isfinite(scales).all(-1), np.isfinite(scales).reshape(2, 3, 2, 2).all(-1)
    np.testing.assert_array_equal(tokens, [[True, False, True], [True, True, False]])
    assert spans[0, 1].tolist() == [True, False]
    assert spans[1, 2].tolist() == [False, True]


@every_exl2
def test_a_sum_beyond_float16_on_the_way_back_is_not_finite_in_a_scale(name, side):
    """One channel beside 65504 / 32: all spans can be stored, and some cannot be read."""
    random, codec = np.random.default_rng(15), codecs.make(name)
    x = random.standard_normal((40, 192)).astype(SINGLE)
    x[np.arange(40), 70 + np.arange(40) % 2] = random.uniform(1500, 2600, 40) * random.choice((-1, 1), 40)
    scales = codec.encode(xp, x, side)["scales"]
    with np.errstate(over="ignore", invalid="ignore"):
        spans = [
            [exl2_span(row[at : at + 64].astype(HALF), EXL2[name][side]) for at in (0, 64, 128)] for row in x
        ]
    assert all(np.isfinite(span[1]).all() for row in spans for span in row)
    read = np.array([[np.isfinite(span[2]).all() for span in row] for row in spans])
    assert 5 < read[:, 1].sum() < 35
    np.testing.assert_array_equal(np.isfinite(scales).reshape(40, 3, 2).all(-1), read)
    np.testing.assert_array_equal(np.isfinite(scales).reshape(40, 3, 2).any(-1), read)


def test_exl3_beyond_float16_is_not_finite_in_a_scale():
    codec = codecs.make("exl3()")
    x = np.random.default_rng(14).standard_normal((3, 64)).astype(SINGLE)
    x[0, :32], x[1, 40], x[2, 3] = 1e4, 4e5, 3e5  # rotated: 56569, 70711, 53033
    scales = codec.encode(xp, x, "keys")["scales"]
    np.testing.assert_array_equal(np.isfinite(scales), [[True, True], [True, False], [True, True]])


finite = st.integers(0, 2**32 - 1)


@settings(max_examples=60, deadline=None)
@given(seed=finite, exponent=st.integers(-14, 10), spread=st.integers(0, 6), bits=st.integers(2, 8))
def test_the_error_of_exl3_is_half_a_step(seed, exponent, spread, bits):
    random = np.random.default_rng(seed)
    x = random.standard_normal((4, 96)) * np.exp2(exponent + spread * random.standard_normal((4, 96)))
    x = np.clip(x, -1e4, 1e4).astype(SINGLE)
    codec = codecs.make(f"exl3(v_bits={bits})")
    parts = codec.encode(xp, x, "values")
    error = np.linalg.norm((comes_back(codec, parts, "values") - x).reshape(4, 3, 32), axis=-1)
    scales = parts["scales"].astype(SINGLE)
    # In 32 places half a step, and the scale's own rounding; what float16 cannot hold is lost.
    assert (error <= math.sqrt(32) * (scales * (2.0**-bits + 2.0**-11) + 2.0**-25) * (1 + 1e-4)).all()


@settings(max_examples=60, deadline=None)
@given(seed=finite, exponent=st.integers(-10, 7), spread=st.integers(0, 2), bits=st.sampled_from([4, 8]))
@example(seed=989411763, exponent=0, spread=2, bits=8)
def test_the_error_of_exl2_is_half_a_step_and_one_where_it_clips(seed, exponent, spread, bits):
    random = np.random.default_rng(seed)
    x = random.standard_normal((4, 128)) * np.exp2(exponent + spread * random.standard_normal((4, 128)))
    x = np.clip(x, -350, 350).astype(SINGLE)  # all sums stay in float16, also those on the way back
    codec = codecs.make("exl2_q6()")
    side = "keys" if bits == 8 else "values"
    parts = codec.encode(xp, x, side)
    turn = codec.turn(128, side).astype(float)
    turned = x @ np.linalg.inv(turn)
    lanes = 16 if bits == 4 else 32  # what lies together of a group of 32
    error, turned = (
        each.reshape(4, -1, 4, lanes).swapaxes(1, 2).reshape(4, 4, 32)
        for each in (np.abs(codec.read(xp, parts, side) - turned), turned)
    )
    scales = parts["scales"].astype(float)[..., None]
    clipped = turned > scales * (2 ** (bits - 1) - 1)
    # Codes are made in float16: of a ratio up to 1 that loses 2^-12, and of the code, up to 2^bits, 2^-12 of that.
    lost = 2.0 ** (bits - 1) * (2.0**-12 + 2.0**-11)
    # Beside the step: six roundings to float16, of the numbers themselves and of five sums.
    noise = (
        6 * 2.0**-11 * np.abs(x).reshape(4, 2, 64).sum(-1).repeat(2, axis=1)[..., None] / 4 + 32 * 2.0**-24
    )
    assert (error <= (np.where(clipped, 1.0, 0.5) + lost) * scales + noise).all()


@pytest.mark.parametrize(
    ("name", "least", "most"), [("exl2_q4()", 7 / 8, 1), ("exl3(k_bits=3)", 7 / 8, 7 / 8)]
)
def test_coding_again_shrinks_what_was_read(name, least, most):
    """Neither is idempotent: exl2 clips the largest positive number, exl3 reads the middle of an interval."""
    x = np.random.default_rng(15).standard_normal((50, 64)).astype(SINGLE)
    codec = codecs.make(name)
    once = codec.encode(xp, x, "keys")
    twice = codec.encode(xp, comes_back(codec, once, "keys"), "keys")
    ratio = twice["scales"].astype(float) / once["scales"].astype(float)
    assert ratio.min() == pytest.approx(least, abs=2e-3)
    assert ratio.max() == pytest.approx(most, abs=2e-3)


HEADS = {
    # head_dim, kv_heads: joint and fit of exl2, joint and fit of exl3
    (64, 1): (False, True, False, True),
    (80, 4): (True, True, True, True),
    (80, 2): (True, False, True, True),
    (80, 1): (True, False, True, False),
    (96, 2): (True, True, False, True),
    (96, 3): (True, False, False, True),
    (128, 3): (False, True, False, True),
    (256, 1): (False, True, False, True),
    (20, 3): (True, False, True, False),
}


@pytest.mark.parametrize(("head_dim", "kv_heads"), HEADS)
def test_what_crosses_heads_is_joint_and_what_does_not_divide_unfit(head_dim, kv_heads):
    layer = Layer(heads=kv_heads, kv_heads=kv_heads, head_dim=head_dim, scale=1.0, rope=None)
    joint2, fit2, joint3, fit3 = HEADS[head_dim, kv_heads]
    for name, joint, fit, size in (
        *((name, joint2, fit2, 64) for name in EXL2),
        ("exl3", joint3, fit3, 32),
    ):
        codec = codecs.make(name)
        assert codec.joint(layer) == joint
        reason = codec.unfit(layer)
        assert (reason is None) == fit
        if reason:
            assert f"{kv_heads} kv heads of head_dim {head_dim}" in reason
            assert f"multiple of {size}" in reason


@pytest.mark.parametrize("wrong", ["k_bits=1", "v_bits=9", "k_bits=-4"])
def test_exl3_refuses_other_widths(wrong):
    name, _, value = wrong.partition("=")
    with pytest.raises(KvtwinError, match=rf"exl3 has {name}={value}; expected an integer from 2 to 8"):
        codecs.make(f"exl3({wrong})")


BYTES = {  # KiB for one token of all layers: layers, kv_heads, head_dim
    ("exl2_q4()", "Qwen2-7B"): (28, 4, 128, 15.75),
    ("exl2_q6()", "Qwen2-7B"): (28, 4, 128, 22.75),
    ("exl2_q8()", "Qwen2-7B"): (28, 4, 128, 29.75),
    ("fp16()", "Qwen2-7B"): (28, 4, 128, 56),
    ("exl2_q4()", "Llama-3-8B"): (32, 8, 128, 36),
    ("bf16()", "Llama-3-8B"): (32, 8, 128, 128),
    ("exl2_q4()", "Llama-2-7B"): (32, 32, 128, 144),
    ("fp8()", "Llama-2-7B"): (32, 32, 128, 256),
    ("exl2_q4()", "Phi-3-mini"): (32, 32, 96, 108),
    ("exl3()", "Llama-3-8B"): (32, 8, 128, 36),
}


@pytest.mark.parametrize(("name", "model"), BYTES)
def test_bytes_of_a_token_are_the_published_ones(name, model):
    layers, kv_heads, head_dim, expected = BYTES[name, model]
    codec = codecs.make(name)
    bits = sum(sum(codec.bits_of(kv_heads * head_dim, side, 4)) for side in ("keys", "values"))
    assert layers * bits / 8 / 1024 == expected
