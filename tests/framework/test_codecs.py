"""What every codec promises, through its `examples()`: parts by token, the same bytes everywhere, nothing hidden.

Keys that are coded in groups are coded so here, the last group being shorter; what a group has once is shown once for
each of its tokens.
"""

import functools

import array_api_compat.numpy
import array_api_compat.torch
import jax
import jax.numpy
import numpy as np
import pytest

from framework.codec import codecs, decoded
from framework.codecs.think import Think
from framework.spec import Layer

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


def slow(codec, library):
    """What jax compiles for more than one example of a codec is slow, and so are groups op by op."""
    others = codecs.spelling(codec) not in FIRST
    return library in ("jax", "jit") and others or library == "jax" and codec.together > 0


def in_libraries(*libraries):
    """Every case in these libraries."""
    return pytest.mark.parametrize(
        ("codec", "side", "library"),
        [
            pytest.param(
                *case,
                library,
                id=f"{name}-{library}",
                marks=[pytest.mark.slow] if slow(case[0], library) else [],
            )
            for name, case in CASES.items()
            for library in libraries
        ],
    )


def group_size(codec, side, slots):
    """Tokens of a group; 0 where each is coded by itself. A group has room for 3 more than there are at most."""
    return min(codec.together, slots + 3) if side == "keys" else 0


def grouped(xp, codec, x):
    """`encode_group` of the tokens of `x` and, where the last group lacks some, the last one again."""
    *axes, slots, width = x.shape
    size = group_size(codec, "keys", slots)
    count = -(-slots // size)
    last = xp.broadcast_to(x[..., -1:, :], (*axes, count * size - slots, width))
    x = xp.reshape(xp.concat([x, last], axis=-2), (*axes, count, size, width))
    filled = xp.broadcast_to(xp.reshape(xp.arange(count * size) < slots, (count, size)), x.shape[:-1])
    queries = None
    if codec.queries:
        asked = np.random.default_rng(9).standard_normal((*[1] * len(axes), 1, codec.queries, width))
        queries = xp.asarray(asked.astype(np.float32))
    return codec.encode_group(xp, x, filled, queries)


def coded(xp, codec, side, x):
    """The parts of the tokens of `x`."""
    slots = x.shape[-2]
    if not (size := group_size(codec, side, slots)):
        return codec.encode(xp, x, side)
    own, once = grouped(xp, codec, x)
    own = {name: xp.reshape(part, (*x.shape[:-2], -1, part.shape[-1])) for name, part in own.items()}
    return {name: part[..., :slots, :] for name, part in own.items()} | {
        name: xp.take(part, xp.arange(slots) // size, axis=-2) for name, part in once.items()
    }


def both_ways(xp, codec, side, x):
    """The parts of `x`, and what comes back."""
    parts = coded(xp, codec, side, x)
    return parts, decoded(codec, xp, parts, side, xp.float32)


@functools.cache
def coder(library, codec, side):
    """`both_ways` in a library, NumPy in and out; under jit compiled once."""
    xp, array = LIBRARIES[library]
    run = functools.partial(both_ways, xp, codec, side)
    run = jax.jit(run) if library == "jit" else run
    return lambda x: jax.tree.map(np.asarray, run(array(x)))


def vectors(seed=1, slots=43, width=WIDTH):
    """Vectors of many lengths, and of odd kinds: zeros, one number many times, denormals, one number far beyond; and
    channels that are so."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((*AXES[:2], slots, width)).astype(np.float32)
    x[1] *= np.exp2(random.integers(-12, 8, (3, slots, 1)))
    x[0, 0, 0] = 0
    x[0, 1, 1], x[0, 2, 2] = 1.7, -0.3
    x[0, 0, 3] *= 1e-39
    x[0, 1, 4] *= 1e-6
    x[0, 2, 5, 40], x[1, 0, 6, 41] = 400, -400
    x[1, 1, 7, :64] = 0
    x[1, 2, 8] = np.round(x[1, 2, 8] * 4) / 4
    x[1, 1, 8:24, 50], x[1, 1, 8:24, 51] = 1.7, 0
    x[1, 1, 8:24, 52] *= 1e-39
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
    parts = coded(NUMPY, codec, side, x)
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
    parts = coded(NUMPY, codec, side, vectors())
    pieces = codec.pieces(NUMPY, parts, side)
    assert np.concatenate(pieces, axis=-1).tobytes() == codec.read(NUMPY, parts, side).tobytes()


@every_case
def test_bits_are_what_the_parts_take(codec, side):
    x = vectors()
    parts, once, number = coded(NUMPY, codec, side, x), {}, 0
    if group_size(codec, side, x.shape[-2]):
        once, number = grouped(NUMPY, codec, x)[1], 16  # which group a token belongs to
        shared = sum(part.shape[-1] * part.itemsize for part in once.values())
        assert shared * 8 == codec.group_bits(WIDTH, x.itemsize)
    codes, beside = codec.bits_of(WIDTH, side, x.itemsize)
    assert parts["codes"].nbytes * 8 == codes * x[..., 0].size
    others = sum(part.nbytes for name, part in parts.items() if name != "codes" and name not in once)
    assert others * 8 == (beside - number) * x[..., 0].size


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
def test_other_widths_of_a_head_give_the_same_bytes_or_are_refused(codec, side):
    for width in (64, 80, 96, 256):
        if codec.unfit(Layer(heads=1, kv_heads=1, head_dim=width, scale=1.0, rope=None)):
            continue
        x = vectors(seed=width, slots=13, width=width)
        made = coder("torch", codec, side)(x)[0]
        parts, back = both_ways(NUMPY, codec, side, x)
        assert back.shape == x.shape
        for name, part in parts.items():
            assert made[name].tobytes() == part.tobytes(), (width, name)
        assert parts["codes"].nbytes * 8 == codec.bits_of(width, side, x.itemsize)[0] * x[..., 0].size


@every_case
def test_a_token_or_a_group_is_coded_alone(codec, side):
    x = vectors()
    size = group_size(codec, side, x.shape[-2])
    whole = coded(NUMPY, codec, side, x)
    some, one = (slice(size, 3 * size), slice(2 * size, 3 * size)) if size else (slice(3, 9), 8)
    piece = coded(NUMPY, codec, side, x[1:, :2, some])
    flat = coded(NUMPY, codec, side, x[1, 2, one]) if size else codec.encode(NUMPY, x[1, 2, one], side)
    for name, part in whole.items():
        assert piece[name].tobytes() == part[1:, :2, some].tobytes(), name
        assert flat[name].tobytes() == part[1, 2, one].tobytes(), name


@every_case
def test_zeros_come_back_as_zeros(codec, side):
    parts = coded(NUMPY, codec, side, np.zeros((*AXES, WIDTH), np.float32))
    np.testing.assert_array_equal(decoded(codec, NUMPY, parts, side, NUMPY.float32), 0)


@every_case
def test_what_comes_back_is_near(codec, side):
    x = vectors()[0, :, 10:]
    parts = coded(NUMPY, codec, side, x)
    back = decoded(codec, NUMPY, parts, side, NUMPY.float32)
    if isinstance(codec, Think) and side == "keys":
        dropped = WIDTH - codec.channels
        np.testing.assert_array_equal((back == 0).all(-2).sum(-1), dropped)
        x = np.where(back == 0, 0, x)
    error = back - x
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
    shows, size, slots = visible(codec, parts, side), group_size(codec, side, x.shape[-2]), x.shape[-2]
    assert shows[hidden].all()
    if size:  # a group may show as a whole
        every = np.add.reduceat(hidden, np.arange(0, slots, size), axis=-1) > 0
        hidden = np.repeat(every, size, axis=-1)[..., :slots]
    assert not shows[~hidden].any()


@every_case
def test_what_is_too_large_shows_in_an_array_of_floats(codec, side):
    """So that a cache can refuse it without reading it."""
    x = vectors()
    for number, size in enumerate((7e4, 1e6, 1e20, 1e38)):
        x[0, 1, 10 + number, 3 + number] = size
        x[1, 2, 20 + number] = size * np.clip(x[0, 2, 20 + number], -3, 3)
    with np.errstate(all="ignore"):
        parts = coded(NUMPY, codec, side, x)
        lost = ~np.isfinite(decoded(codec, NUMPY, parts, side, NUMPY.float32)).all(-1)
    floats = [part for part in parts.values() if part.dtype.kind == "f"]
    shows = ~np.all([np.isfinite(part).all(-1) for part in floats], axis=0) if floats else False
    assert not (lost & ~shows).any()
