"""What every codec promises, through its `examples()`: parts by token, the same bytes everywhere, nothing hidden."""

import functools

import array_api_compat.numpy
import array_api_compat.torch
import jax
import jax.numpy
import numpy as np
import pytest

from framework.codec import codecs, decoded

WIDTH, AXES = 128, (2, 3, 7)  # batch, kv_heads, slots
SIDES = ("keys", "values")
CASES = {
    f"{codecs.spelling(each)}-{side}": (each, side)
    for name in codecs.names()
    for each in codecs.get(name).examples()
    for side in SIDES
}
every_case = pytest.mark.parametrize(("codec", "side"), CASES.values(), ids=CASES)
NUMPY = array_api_compat.numpy
LIBRARIES = {
    "numpy": (NUMPY, np.asarray),
    "torch": (array_api_compat.torch, array_api_compat.torch.asarray),
    "jax": (jax.numpy, jax.numpy.asarray),
    "jit": (jax.numpy, np.asarray),
}


FIRST = {codecs.spelling(codecs.get(name).examples()[0]) for name in codecs.names()}


def in_libraries(*libraries):
    """Every case in these libraries; what jax compiles for more than one example of a codec is slow."""
    return pytest.mark.parametrize(
        ("codec", "side", "library"),
        [
            pytest.param(
                *case,
                library,
                id=f"{name}-{library}",
                marks=[pytest.mark.slow]
                if library in ("jax", "jit") and codecs.spelling(case[0]) not in FIRST
                else [],
            )
            for name, case in CASES.items()
            for library in libraries
        ],
    )


def both_ways(xp, codec, side, x):
    """The parts of `x`, and what comes back."""
    parts = codec.encode(xp, x, side)
    return parts, decoded(codec, xp, parts, side, xp.float32)


@functools.cache
def coder(library, codec, side):
    """`both_ways` in a library, NumPy in and out; under jit compiled once."""
    xp, array = LIBRARIES[library]
    run = functools.partial(both_ways, xp, codec, side)
    run = jax.jit(run) if library == "jit" else run
    return lambda x: jax.tree.map(np.asarray, run(array(x)))


def vectors(seed=1, slots=40):
    """Vectors of many lengths, and of odd kinds: zeros, one number many times, denormals, one number far beyond."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((*AXES[:2], slots, WIDTH)).astype(np.float32)
    x[1] *= np.exp2(random.integers(-12, 8, (3, slots, 1)))
    x[0, 0, 0] = 0
    x[0, 1, 1], x[0, 2, 2] = 1.7, -0.3
    x[0, 0, 3] *= 1e-39
    x[0, 1, 4] *= 1e-6
    x[0, 2, 5, 40], x[1, 0, 6, 41] = 400, -400
    x[1, 1, 7, :64] = 0
    x[1, 2, 8] = np.round(x[1, 2, 8] * 4) / 4
    return x


def visible(codec, parts, side):
    """True for each token of which a scale, or what is read, is not finite."""
    with np.errstate(all="ignore"):
        finite = np.isfinite(decoded(codec, NUMPY, parts, side, NUMPY.float32)).all(-1)
    for name, part in parts.items():
        if name != "codes" and part.dtype.kind == "f":
            finite &= np.isfinite(part).all(-1)
    return ~finite


@pytest.mark.parametrize("name", codecs.names())
def test_a_codec_has_examples_spelled_as_they_are_made(name):
    examples = codecs.get(name).examples()
    assert examples
    for each in examples:
        assert codecs.make(codecs.spelling(each)) == each
        assert hash(each) == hash(codecs.make(codecs.spelling(each)))


@every_case
def test_parts_have_one_entry_for_each_token(codec, side):
    x = vectors()[..., : AXES[2], :64]
    parts = codec.encode(NUMPY, x, side)
    assert "codes" in parts
    for part in parts.values():
        assert part.shape[:-1] == AXES
    read, scale, turn = codec.read(NUMPY, parts, side), codec.scale(NUMPY, parts, side), codec.turn(64, side)
    assert (read.shape, read.dtype) == (x.shape, np.float32)
    if scale is not None:
        assert (scale.shape, scale.dtype) == (AXES, np.float32)
    if turn is not None:
        assert (turn.shape, turn.dtype) == ((64, 64), np.float32)


@every_case
def test_pieces_side_by_side_are_what_is_read(codec, side):
    parts = codec.encode(NUMPY, vectors(), side)
    pieces = codec.pieces(NUMPY, parts, side)
    assert np.concatenate(pieces, axis=-1).tobytes() == codec.read(NUMPY, parts, side).tobytes()


@every_case
def test_bits_are_what_the_parts_take(codec, side):
    x = vectors()
    parts = codec.encode(NUMPY, x, side)
    codes, beside = codec.bits_of(WIDTH, side, x.itemsize)
    assert parts["codes"].nbytes * 8 == codes * x[..., 0].size
    others = sum(part.nbytes for name, part in parts.items() if name != "codes")
    assert others * 8 == beside * x[..., 0].size


@in_libraries("torch", "jax", "jit")
def test_every_library_gives_the_same_bytes_and_reads_the_same(codec, side, library):
    x = vectors()
    expected, seen = coder("numpy", codec, side)(x)
    made, back = coder(library, codec, side)(x)
    assert made.keys() == expected.keys()
    for name, part in expected.items():
        assert (made[name].dtype, made[name].shape) == (part.dtype, part.shape), name
        assert made[name].tobytes() == part.tobytes(), name
    assert (np.abs(back - seen) <= 1e-6 * np.linalg.norm(x, axis=-1, keepdims=True) + 1e-30).all()


@every_case
def test_a_token_is_coded_alone(codec, side):
    x = vectors()
    whole = codec.encode(NUMPY, x, side)
    piece = codec.encode(NUMPY, x[1:, :2, 3:9], side)
    flat = codec.encode(NUMPY, x[1, 2, 8], side)
    for name, part in whole.items():
        assert piece[name].tobytes() == part[1:, :2, 3:9].tobytes(), name
        assert flat[name].tobytes() == part[1, 2, 8].tobytes(), name


@every_case
def test_zeros_come_back_as_zeros(codec, side):
    parts = codec.encode(NUMPY, np.zeros((*AXES, WIDTH), np.float32), side)
    np.testing.assert_array_equal(decoded(codec, NUMPY, parts, side, NUMPY.float32), 0)


@every_case
def test_what_comes_back_is_near(codec, side):
    x = vectors()[0, :, 10:]
    parts = codec.encode(NUMPY, x, side)
    error = decoded(codec, NUMPY, parts, side, NUMPY.float32) - x
    assert np.sqrt((error**2).mean() / (x**2).mean()) < 0.4


@in_libraries("numpy", "torch", "jit")
def test_what_is_not_finite_shows(codec, side, library):
    x = vectors()
    hidden = np.zeros(x.shape[:-1], bool)
    for number, (row, head, slot, channel) in enumerate([(0, 1, 6, 0), (1, 0, 9, 77), (1, 2, 11, 127)]):
        x[row, head, slot, channel] = (np.nan, np.inf, -np.inf)[number]
        hidden[row, head, slot] = True
    with np.errstate(all="ignore"):
        parts, _ = coder(library, codec, side)(x)
    np.testing.assert_array_equal(visible(codec, parts, side), hidden)


@every_case
def test_what_is_too_large_shows_in_an_array_of_floats(codec, side):
    """So that a cache can refuse it without reading it."""
    x = vectors()
    for number, size in enumerate((7e4, 1e6, 1e20, 1e38)):
        x[0, 1, 10 + number, 3 + number] = size
        x[1, 2, 20 + number] *= size
    with np.errstate(all="ignore"):
        parts = codec.encode(NUMPY, x, side)
        lost = ~np.isfinite(decoded(codec, NUMPY, parts, side, NUMPY.float32)).all(-1)
    floats = [part for part in parts.values() if part.dtype.kind == "f"]
    shows = ~np.all([np.isfinite(part).all(-1) for part in floats], axis=0) if floats else False
    assert not (lost & ~shows).any()
