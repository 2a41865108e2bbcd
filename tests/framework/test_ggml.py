"""ggml's block types: loops over single values, in ggml's own layout, from every library; `gguf` is the outside judge.

White noise loses what it loses there.
"""

import numpy as np
import pytest

from framework.codec import codecs, decoded
from framework.spec import Layer
from tests.libraries import LIBRARIES, everywhere, same_bytes

PARTS = {  # the order of a block's parts in ggml
    "q4_0": ("scales", "codes"),
    "q4_1": ("scales", "minima", "codes"),
    "q5_0": ("scales", "codes"),
    "q5_1": ("scales", "minima", "codes"),
    "q8_0": ("scales", "codes"),
}
ERRORS = {"q4_0": 0.0865, "q4_1": 0.0782, "q5_0": 0.0428, "q5_1": 0.0381, "q8_0": 0.0054}
BYTES = {"q4_0": 18, "q4_1": 20, "q5_0": 22, "q5_1": 24, "q8_0": 34}
single = np.float32


def block_of(kind, values):
    """The bytes of one block: the C code, value by value."""
    values = [single(each) for each in values]
    if kind == "q8_0":
        d = max(abs(each) for each in values) / single(127)
        scaled = [each * inverse(d) for each in values]
        codes = [int(np.sign(each)) * (int(abs(each)) + (float(abs(each)) % 1 >= 0.5)) for each in scaled]
        return np.float16(d).tobytes() + np.asarray(codes, np.int8).tobytes()
    most, head = (15 if kind[1] == "4" else 31), b""
    if kind.endswith("_0"):
        top = single(0)
        for each in values:
            if abs(each) > abs(top):
                top = each
        d = top / single(-(most + 1) // 2)
        codes = [int(each * inverse(d) + single((most + 1) // 2 + 0.5)) for each in values]
    else:
        low = min(values)
        d = (max(values) - low) / single(most)
        codes = [int((each - low) * inverse(d) + single(0.5)) for each in values]
        head = np.float16(low).tobytes()
    codes = [min(each, most) for each in codes]
    if kind[1] == "5":
        head += sum((each >> 4) << place for place, each in enumerate(codes)).to_bytes(4, "little")
    low_bits = bytes(codes[place] % 16 + codes[place + 16] % 16 * 16 for place in range(16))
    return np.float16(d).tobytes() + head + low_bits


def inverse(d):
    return single(1) / d if d else single(0)


def assembled(kind, parts):
    """The parts of vectors as ggml's blocks: [.. blocks bytes]."""
    blocks = parts["scales"].shape[-1]
    cut = [
        np.ascontiguousarray(parts[name]).view(np.uint8).reshape(*parts[name].shape[:-1], blocks, -1)
        for name in PARTS[kind]
    ]
    assert set(parts) == set(PARTS[kind])
    return np.concatenate(cut, axis=-1)


def values(seed=0, width=128):
    """Vectors [2 3 5 width]: noise of many sizes, ties, a block of zeros and a constant one, tiny and huge numbers."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((2, 3, 5, width)) * 10.0 ** random.integers(-6, 4, (2, 3, 5, 1))
    x[0, 0, 0, :32] = 0
    x[0, 0, 1, :32] = -2.5
    x[0, 1, 0, :32] = random.integers(-3, 4, 32)  # several values are farthest from 0
    x[0, 1, 1, 32:64] = random.integers(-127, 128, 32) / 2  # codes halfway between integers
    x[0, 1, 2] = random.permutation(np.resize([3.0, -3.0, 1.5, 0.5], width))
    x[0, 2, 0, :32] *= 1e-42 / np.abs(x[0, 2, 0]).max()  # numbers that XLA takes for 0
    x[0, 2, 1, 3] = 6e4
    x[0, 2, 3, 32:64] = random.choice([0.0, -0.0], 32)
    return x.astype(np.float32)


def edges(kind):
    """Blocks [1 1 blocks 32] of values between two codes, or next to that: one rounding instead of two shows here."""
    random = np.random.default_rng(7)
    most = {"q8_0": 127, "q4_0": 7, "q4_1": 15, "q5_0": 15, "q5_1": 31}[kind]
    scale = random.uniform(0.5, 1, (1, 1, 600, 1)).astype(np.float32)
    least = 0 if kind.endswith("_1") else -most
    x = ((random.integers(least, most, (1, 1, 600, 32)) + 0.5) * scale).astype(np.float32)
    x = (x.view(np.int32) + random.integers(-2, 3, x.shape, dtype=np.int32)).view(np.float32)
    x[..., :1] = 0 if kind.endswith("_1") else -(most + 1) * scale if kind != "q8_0" else 0
    x[..., 1:2] = most * scale
    return x


def codec_of(kind, rotated=False):
    return codecs.make(f"ggml_{kind}(rotated={rotated})")


@pytest.mark.parametrize("kind", PARTS)
def test_codes_between_two_are_those_of_the_loop_from_every_library(kind):
    x = edges(kind)
    made = everywhere(lambda xp, x: codec_of(kind).encode(xp, x, "keys"), x)
    got = assembled(kind, same_bytes(made))
    for place in range(0, 600, 4):
        assert got[0, 0, place].tobytes() == block_of(kind, x[0, 0, place]), place


@pytest.mark.parametrize("kind", PARTS)
def test_codes_are_those_of_the_loop_from_every_library(kind):
    x = values()
    made = everywhere(lambda xp, x: codec_of(kind).encode(xp, x, "keys"), x)
    got = assembled(kind, same_bytes(made))
    x[0, 2, 0, :32], x[0, 2, 3, 32:64] = 0, 0
    for place in np.ndindex(2, 3, 5):
        wanted = b"".join(block_of(kind, x[place][first : first + 32]) for first in range(0, 128, 32))
        assert got[place].tobytes() == wanted, place


@pytest.mark.judge
@pytest.mark.parametrize("kind", PARTS)
def test_blocks_are_those_of_gguf(kind):
    import gguf

    x = np.concatenate([values(seed).reshape(-1, 128) for seed in range(1, 9)])
    x[np.abs(x) < 1e-30] = 0  # and no -0
    codec, kind_there = codec_of(kind), gguf.GGMLQuantizationType[kind.upper()]
    parts = codec.encode(LIBRARIES["numpy"][0], x, "values")
    there = gguf.quants.quantize(x, kind_there)
    np.testing.assert_array_equal(assembled(kind, parts).reshape(there.shape), there)
    read = decoded(codec, LIBRARIES["numpy"][0], parts, "values", np.float32)
    np.testing.assert_array_equal(read, gguf.quants.dequantize(there, kind_there))


@pytest.mark.parametrize("kind", PARTS)
def test_white_noise_loses_what_was_seen(kind):
    x = np.random.default_rng(5).standard_normal((1, 2, 1000, 128)).astype(np.float32)
    xp = LIBRARIES["numpy"][0]
    for codec in (codec_of(kind), codec_of(kind, rotated=True)):
        for side in ("keys", "values"):
            error = decoded(codec, xp, codec.encode(xp, x, side), side, np.float32) - x
            assert np.sqrt(np.mean(error**2)) == pytest.approx(ERRORS[kind], rel=0.02)


def walsh(size):
    """Entry i, j is -1 to the number of bits that i and j share."""
    return np.array([[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)])


SIZES = {  # head_dim: the sizes of the matrices for keys and for values
    64: (64, 64),
    96: (1, 1),
    128: (128, 64),
    192: (64, 64),
    256: (256, 64),
}


@pytest.mark.parametrize(("width", "side"), [(width, side) for width in SIZES for side in ("keys", "values")])
def test_vectors_are_rotated_before_they_are_coded_and_back(width, side):
    size = SIZES[width][side == "values"]
    block = walsh(size)
    # The sums of small integers are exact, so that the only rounding is that of the product with 1 / sqrt(size).
    x = np.random.default_rng(width).integers(-99, 100, (1, 2, 3, width)).astype(np.float32)
    sums = (x.reshape(1, 2, 3, -1, size) @ block).astype(np.float32).reshape(x.shape)
    by_hand = sums * np.float32(1 / np.sqrt(size)) if size > 1 else x
    plain, codec = codec_of("q8_0"), codec_of("q8_0", rotated=True)
    made = same_bytes(everywhere(lambda xp, x: codec.encode(xp, x, side), x, eager=False))
    wanted = plain.encode(np, by_hand, side)
    assert {name: each.tobytes() for name, each in made.items()} == {
        name: each.tobytes() for name, each in wanted.items()
    }
    whole = np.kron(np.eye(width // size), block) / np.sqrt(size)
    turn = codec.turn(width, side)
    if size > 1:
        assert turn.dtype == np.float32
        np.testing.assert_allclose(turn, whole.T, atol=1e-7)
    else:
        assert turn is None
    back = decoded(codec, np, made, side, np.float32)
    np.testing.assert_allclose(
        back, decoded(plain, np, wanted, side, np.float32) @ whole.T, rtol=1e-5, atol=1e-3
    )
    assert np.abs(back - x).max() < 5


@pytest.mark.parametrize("kind", PARTS)
def test_an_outlier_costs_less_when_it_is_rotated(kind):
    x = np.random.default_rng(2).standard_normal((1, 1, 50, 128)).astype(np.float32)
    x[..., 5] *= 12
    lost = []
    for rotated in (False, True):
        codec = codec_of(kind, rotated)
        back = decoded(codec, np, codec.encode(np, x, "keys"), "keys", np.float32)
        lost.append(np.mean((back - x)[..., :32] ** 2))
    assert lost[1] < 0.6 * lost[0]


@pytest.mark.parametrize("kind", PARTS)
def test_what_cannot_be_coded_shows_in_its_scale_alone(kind):
    x = values(4)
    x[1, 2, :, 70] = np.inf, -np.inf, np.nan, 3e38, -1e9
    made = same_bytes(everywhere(lambda xp, x: codec_of(kind).encode(xp, x, "keys"), x, eager=False))
    fine = np.isfinite(made["scales"].astype(np.float32)).all(axis=-1)
    assert not fine[1, 2].any()
    assert fine.sum() == fine.size - 5


@pytest.mark.parametrize("kind", ["q4_1", "q5_1"])
def test_a_minimum_beyond_float16_shows_in_the_scale(kind):
    x = np.full((1, 1, 1, 32), 7e4, np.float32)
    made = same_bytes(everywhere(lambda xp, x: codec_of(kind).encode(xp, x, "keys"), x))
    assert np.isinf(made["scales"]).all()


@pytest.mark.parametrize("kind", PARTS)
def test_bits_are_those_of_the_parts_and_of_the_block(kind):
    codec = codec_of(kind)
    parts = codec.encode(np, values(width=96)[:1, :1, :1], "keys")
    assert sum(each.nbytes for each in parts.values()) * 8 == sum(codec.bits_of(96, "keys", 4))
    assert sum(codec.bits_of(96, "values", 2)) == 3 * 8 * BYTES[kind]
    assert codec.bits_of(96, "keys", 4)[1] == 3 * 16 * (1 + ("minima" in parts))


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize(
    ("head_dim", "fits"), [(16, False), (32, True), (80, False), (96, True), (128, True)]
)
def test_head_dim_is_a_multiple_of_a_block(kind, head_dim, fits):
    layer = Layer(heads=4, kv_heads=2, head_dim=head_dim, scale=1.0, rope=None)
    assert (codec_of(kind).unfit(layer) is None) == fits
    if not fits:
        assert str(head_dim) in codec_of(kind).unfit(layer)


@pytest.mark.parametrize("kind", PARTS)
def test_rotation_is_what_llama_cpp_does_now(kind):
    assert codecs.make(f"ggml_{kind}()").rotated
    assert codecs.spelling(codec_of(kind)) == f"ggml_{kind}(rotated=False)"
