"""What a view computes for a policy, against plain loops in float64, on every array library."""

import math
from dataclasses import replace

import array_api_compat.numpy
import array_api_compat.torch
import array_api_strict
import jax.numpy
import numpy as np
import pytest

from framework.arrays import FAR, blocks, standardised, when
from framework.eviction import placed, repositioned
from framework.policy import NORMS, Block, View
from framework.random import hash32, normal

LIBRARIES = {
    "numpy": array_api_compat.numpy,
    "torch": array_api_compat.torch,
    "jax": jax.numpy,
    "strict": array_api_strict,
}
every_library = pytest.mark.parametrize("xp", LIBRARIES.values(), ids=LIBRARIES)
NUMPY = array_api_compat.numpy

BATCH, HEADS, GROUP, SLOTS, WIDTH, HALF, REACH, MODEL = 2, 3, 5, 11, 8, 3, 40, 7
FACTOR = 1.3  # as yarn's: cosines and sines are multiplied by it
SCALE = 0.4
TOLERANCE = {"rtol": 3e-5, "atol": 3e-6}  # of float32


def angle(place: int, channel: int) -> float:
    """How far a pair of channels turns at a place; an empty one turns as the first."""
    return max(place, 0) * 30.0 ** (-channel / HALF)


def turned(x: np.ndarray, place: int) -> np.ndarray:
    """One vector rotated: channel i with channel i + HALF; the last ones pass through."""
    result = x.astype(np.float64)
    for channel in range(HALF):
        cos, sin = (FACTOR * f(angle(place, channel)) for f in (math.cos, math.sin))
        a, b = float(x[channel]), float(x[channel + HALF])
        result[channel], result[channel + HALF] = a * cos - b * sin, b * cos + a * sin
    return result


def table() -> tuple[np.ndarray, np.ndarray]:
    every = np.array([[angle(place, channel) for channel in range(HALF)] for place in range(REACH)])
    return FACTOR * np.cos(every), FACTOR * np.sin(every)


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def shuffled(seed: int = 3, last: int = 29) -> np.ndarray:
    """Positions in no order, with empty slots between, another number of them in each head."""
    random = np.random.default_rng(seed)
    positions = np.full((BATCH, HEADS, SLOTS), -1, np.int32)
    for row, head in np.ndindex(BATCH, HEADS):
        count = SLOTS - row - head
        places = random.permutation(SLOTS)[:count]
        positions[row, head, places] = random.permutation(last)[:count]
    return positions


def a_view(xp, dtype=np.float32, rope=True, **changes) -> View:
    """Random keys, values and queries in shuffled slots, as arrays of this library."""
    cos, sin = table()
    numbers = {
        "keys": drawn(BATCH, HEADS, SLOTS, WIDTH, seed=1),
        "values": drawn(BATCH, HEADS, SLOTS, WIDTH, seed=2),
        "queries": drawn(BATCH, HEADS, GROUP, 4, WIDTH, seed=3),
        "output": drawn(HEADS, GROUP, WIDTH, MODEL, seed=4),
        "cos": cos if rope else None,
        "sin": sin if rope else None,
    }
    whole = {
        "positions": shuffled(),
        "budget": np.full((BATCH, HEADS), 4, np.int32),
        "seen": np.array([29, 29], np.int32),
        "question": np.array([23, FAR], np.int32),
        "query_positions": np.array([[-1, 26, 27, 28], [25, 26, 27, 28]], np.int32),
    }
    given = {key: None if x is None else x.astype(dtype) for key, x in numbers.items()} | whole | changes
    arrays = {key: xp.asarray(x) if isinstance(x, np.ndarray) else x for key, x in given.items()}
    fixed = {"xp": xp, "phase": "decode", "layer": 0, "layers": 2, "memory": {}, "scale": SCALE}
    return View(**(fixed | arrays))


def back(x) -> np.ndarray:
    """NumPy of an array of any library."""
    return np.asarray(x)


# Rotation.


@every_library
def test_rotate_turns_pairs_and_leaves_the_rest(xp):
    view = a_view(xp)
    positions = np.array([[[3], [0], [-1]], [[39], [7], [1]]], np.int32)  # broadcasts over the slots
    got = back(view.rotate(view.keys, xp.asarray(positions)))
    keys = back(view.keys)
    assert got.dtype == np.float32
    for row, head, slot in np.ndindex(BATCH, HEADS, SLOTS):
        right = turned(keys[row, head, slot], int(positions[row, head, 0]))
        np.testing.assert_allclose(got[row, head, slot], right, **TOLERANCE)
        assert (got[row, head, slot, 2 * HALF :] == keys[row, head, slot, 2 * HALF :]).all()


@every_library
def test_rotating_back_is_the_inverse(xp):
    """Also where cosine and sine are multiplied by a factor."""
    view = a_view(xp)
    there = view.rotate(view.keys, view.positions)
    again = back(view.rotate(there, view.positions, back=True))
    np.testing.assert_allclose(again, back(view.keys), **TOLERANCE)
    assert not np.allclose(back(there), back(view.keys), atol=0.1)
    backwards = view.rotate(view.rotate(view.keys, view.positions, back=True), view.positions)
    np.testing.assert_allclose(back(backwards), back(view.keys), **TOLERANCE)


@every_library
def test_a_layer_without_rope_rotates_nothing(xp):
    view = a_view(xp, rope=False)
    assert view.rotate(view.keys, view.positions) is view.keys
    assert (back(view.unrotated()) == back(view.keys)).all()
    mean = back(view.mean_rotation(view.query_positions))
    assert (mean == np.broadcast_to(np.eye(WIDTH), (BATCH, WIDTH, WIDTH))).all()


@every_library
@pytest.mark.parametrize("repositions", [False, True])
def test_unrotated_keys_are_those_before_the_rotation(xp, repositions):
    positions, plain = shuffled(), drawn(BATCH, HEADS, SLOTS, WIDTH, seed=6)
    keys = np.zeros_like(plain)
    for row, head, slot in np.ndindex(BATCH, HEADS, SLOTS):
        own = positions[row, head]
        place = int(own[slot])
        if repositions and place >= 0:
            place = sum(0 <= other < place for other in own)
        keys[row, head, slot] = turned(plain[row, head, slot], place)
    view = a_view(xp, keys=keys.astype(np.float32), repositions=repositions)
    np.testing.assert_allclose(back(view.unrotated()), plain, **TOLERANCE)


@every_library
def test_rotary_is_the_rank_in_any_slot_order(xp):
    view = a_view(xp)
    assert (back(view.rotary) == back(view.positions)).all()
    got, positions = back(replace(view, repositions=True).rotary), shuffled()
    assert got.dtype == np.int32
    for row, head, slot in np.ndindex(BATCH, HEADS, SLOTS):
        own, place = positions[row, head], positions[row, head, slot]
        right = -1 if place < 0 else sum(0 <= other < place for other in own)
        assert got[row, head, slot] == right


@every_library
def test_queries_are_rotated_at_the_rank_of_their_token(xp):
    """Queries in no order, some of them of tokens that a head has evicted: the rank of the newest one before it."""
    view, asked = a_view(xp), np.array([[28, 3, -1, 11, 20], [0, 17, 9, -1, 28]], np.int32)
    assert (back(view.query_rotary(xp.asarray(asked))) == asked[:, None].repeat(HEADS, 1)).all()
    got = back(replace(view, repositions=True).query_rotary(xp.asarray(asked)))
    assert got.dtype == np.int32
    positions = shuffled()
    for row, head, query in np.ndindex(BATCH, HEADS, 5):
        held = [place for place in positions[row, head] if 0 <= place <= asked[row, query]]
        assert got[row, head, query] == len(held) - 1


@every_library
def test_the_mean_rotation_is_that_of_every_rotation(xp):
    view = a_view(xp)
    places = np.array([[0, 4, 9, 39, 2, 2], [1, 1, 1, 1, 1, 30]], np.int32)
    got, x = back(view.mean_rotation(xp.asarray(places))), drawn(WIDTH, seed=8)
    assert got.shape == (BATCH, WIDTH, WIDTH)
    for row in range(BATCH):
        right = sum(turned(x, int(place)) for place in places[row]) / 6
        np.testing.assert_allclose(got[row] @ x, right, **TOLERANCE)


# Attention.


def attended(queries, asked, keys, positions, softcap, window) -> np.ndarray:
    """[row head member query slot]: a softmax over the slots that each query sees, 0 from one that does not exist."""
    result = np.zeros((*queries.shape[:-1], keys.shape[2]))
    for row, head, member, query in np.ndindex(queries.shape[:-1]):
        at, weights = int(asked[row, query]), {}
        for slot, place in enumerate(positions[row, head]):
            if at >= 0 and 0 <= place <= at and (window is None or at - place < window):
                logit = SCALE * float(keys[row, head, slot] @ queries[row, head, member, query])
                logit = logit if softcap is None else softcap * math.tanh(logit / softcap)
                weights[slot] = math.exp(logit)
        for slot, weight in weights.items():
            result[row, head, member, query, slot] = weight / sum(weights.values())
    return result


settings = pytest.mark.parametrize(
    ("softcap", "window"), [(None, None), (0.7, None), (None, 9)], ids=["plain", "softcap", "window"]
)


@every_library
@settings
def test_attention_of_the_newest_queries_in_any_slot_order(xp, softcap, window):
    view = a_view(xp, softcap=softcap, window=window)
    queries, keys = (back(x).astype(np.float64) for x in (view.queries, view.keys))
    right = attended(queries, back(view.query_positions), keys, shuffled(), softcap, window)
    got = back(view.attention())
    assert (got[0, :, :, 0] == 0).all()
    np.testing.assert_allclose(got, right, **TOLERANCE)


@every_library
@settings
@pytest.mark.parametrize("repositions", [False, True])
def test_attention_of_a_block_rotates_its_queries(xp, softcap, window, repositions):
    """A block has another number of queries than the window, un-rotated, with padding before and behind."""
    asked = np.array([[-1, 12, 13, 14, 15, 16, 17], [20, 21, 22, 23, -1, -1, -1]], np.int32)
    raw, positions = drawn(BATCH, HEADS, GROUP, 7, WIDTH, seed=9), shuffled()
    view = a_view(xp, softcap=softcap, window=window, repositions=repositions)
    as_given = (xp.asarray(x.astype(np.float32)) for x in (raw, drawn(BATCH, 7, MODEL)))
    got = back(view.attention(Block(xp.asarray(asked), *as_given)))
    queries = np.zeros_like(raw)
    for row, head, member, query in np.ndindex(raw.shape[:-1]):
        place = int(asked[row, query])
        if repositions:
            place = sum(0 <= other <= place for other in positions[row, head]) - 1
        queries[row, head, member, query] = turned(raw[row, head, member, query], place)
    right = attended(queries, asked, back(view.keys).astype(np.float64), positions, softcap, window)
    assert (got[0, :, :, 0] == 0).all()
    assert (got[1, :, :, 4:] == 0).all()
    np.testing.assert_allclose(got, right, **TOLERANCE)


@every_library
def test_a_repositioned_view_has_keys_and_queries_at_their_ranks(xp):
    plain = a_view(xp, repositions=True)
    view, positions = repositioned(plain), shuffled()
    for row, head, slot in np.ndindex(BATCH, HEADS, SLOTS):
        place = positions[row, head, slot]
        rank = -1 if place < 0 else sum(0 <= other < place for other in positions[row, head])
        right = turned(back(plain.keys)[row, head, slot], rank)
        np.testing.assert_allclose(back(view.keys)[row, head, slot], right, **TOLERANCE)
    for row, head, member, query in np.ndindex(BATCH, HEADS, GROUP, 4):
        place = back(view.query_positions)[row, query]
        rank = sum(0 <= other <= place for other in positions[row, head]) - 1
        right = turned(back(plain.queries)[row, head, member, query], rank)
        np.testing.assert_allclose(back(view.queries)[row, head, member, query], right, **TOLERANCE)
    assert repositioned(replace(plain, keys=None, queries=None)).keys is None


# The output's norms, and the pieces that they are computed in.


@every_library
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("slots", [SLOTS, NORMS, NORMS + 1, 2 * NORMS + 17])
def test_output_norms_of_every_slot(xp, slots, order):
    values = drawn(BATCH, HEADS, slots, WIDTH, seed=slots).astype(np.float32)
    view = a_view(xp)
    values[:, :, 0] = 0.0
    got, output = back(view.output_norm(xp.asarray(values), order)), back(view.output).astype(np.float64)
    assert got.shape == (BATCH, HEADS, GROUP, slots)
    for row, head, member in np.ndindex(BATCH, HEADS, GROUP):
        for slot in {0, 1, slots // 2, min(NORMS, slots) - 1, NORMS % slots, slots - 1}:
            right = 0.0
            for column in range(MODEL):
                right += abs(float(values[row, head, slot] @ output[head, member, :, column])) ** order
            assert got[row, head, member, slot] == pytest.approx(right ** (1 / order), rel=3e-5)


@every_library
@pytest.mark.parametrize(("axis", "out"), [(0, 0), (1, 2), (2, 1)])
@pytest.mark.parametrize("size", [1, 2, 4, 5, 9, 50])
def test_blocks_are_joined_where_they_were_cut(xp, axis, out, size):
    """Sizes that divide, that do not, and that are larger than all."""
    x = drawn(4, 5, 9, seed=size).astype(np.float32)
    widths = []

    def f(part):
        widths.append(part.shape[axis])
        return xp.moveaxis(part * part + 1.0, axis, out)

    got = back(blocks(xp, f, xp.asarray(x), size, axis, out))
    np.testing.assert_allclose(got, np.moveaxis(x * x + 1, axis, out), rtol=1e-6)
    assert set(widths) == {min(size, x.shape[axis])}


@every_library
def test_blocks_may_change_the_other_axes(xp):
    x = drawn(2, 7, 3).astype(np.float32)
    got = back(blocks(xp, lambda part: xp.sum(part, axis=2), xp.asarray(x), 3, 1, 1))
    np.testing.assert_allclose(got, x.sum(2), rtol=1e-5, atol=1e-6)


# z-scores.


@every_library
def test_standardised_is_over_the_heads_of_a_row(xp):
    x = drawn(4, HEADS, SLOTS, seed=5).astype(np.float32) * 3 + 2
    mask = np.random.default_rng(6).uniform(size=x.shape) < 0.6
    mask[2], x[3] = False, 1.5  # nothing to go by; and all equal
    mask[1] = False
    mask[1, 2, 4] = True  # one number
    x = np.where(mask, x, np.float32(1e6))  # what is outside must not count
    got = back(standardised(xp, xp.asarray(x), xp.asarray(mask)))
    assert got.dtype == np.float32
    assert np.isfinite(got).all()
    assert (got[~mask] == 0).all()
    values = [float(one) for one in x[0][mask[0]]]
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((one - mean) ** 2 for one in values) / (len(values) - 1))
    np.testing.assert_allclose(got[0][mask[0]], [(one - mean) / deviation for one in values], **TOLERANCE)
    assert (got[1:] == 0).all()


# Normal numbers.


def test_normal_numbers_have_the_moments_of_a_normal():
    x = normal((3, 1), (400, 500))
    assert x.dtype == np.float64
    assert abs(x.mean()) < 0.01
    assert abs(x.var() - 1) < 0.02
    assert abs((x**3).mean()) < 0.03
    assert abs((x**4).mean() - 3) < 0.1
    assert abs((np.abs(x) < 1).mean() - 0.6827) < 0.005
    assert abs(np.corrcoef(x[:, :-1].ravel(), x[:, 1:].ravel())[0, 1]) < 0.01
    assert abs(np.corrcoef(x[:-1].ravel(), x[1:].ravel())[0, 1]) < 0.01


def test_normal_numbers_differ_by_stream_and_stay():
    one = normal((3, 1), (6, 50))
    normal.cache_clear()
    assert (normal((3, 1), (6, 50)) == one).all()
    assert (normal((3, 1), (300,)) == one.ravel()).all()
    for other in ((3, 2), (4, 1), (1, 3), (3,), (3, 1, 0)):
        assert abs(np.corrcoef(one.ravel(), normal(other, (6, 50)).ravel())[0, 1]) < 0.25
        assert not (normal(other, (6, 50)) == one).any()
    with pytest.raises(ValueError, match="read-only"):
        one[0, 0] = 7


def test_normal_numbers_are_box_and_mullers():
    for index, got in enumerate(normal((5, 2), (3,))):
        halves = [int(hash32(NUMPY, 5, 2, half, np.array([index], np.int32))[0]) for half in (0, 1)]
        radius, turn = ((word + 0.5) / 2**24 for word in halves)
        assert got == pytest.approx(
            math.sqrt(-2 * math.log(radius)) * math.cos(2 * math.pi * turn), rel=1e-12
        )


# The order in which slots stay.


@every_library
@pytest.mark.parametrize("marked", [False, True])
def test_placed_counts_who_is_better(xp, marked):
    random = np.random.default_rng(11)
    scores = random.choice([-np.inf, -1.0, 0.0, 0.5, 2.0, np.inf], (BATCH, HEADS, SLOTS)).astype(np.float32)
    protected, living = random.uniform(size=scores.shape) < 0.3, random.uniform(size=scores.shape) < 0.7
    given = [xp.asarray(x) for x in (scores, protected, living)]
    got = back(placed(xp, given[0], given[1] if marked else None, given[2]))
    for row, head in np.ndindex(BATCH, HEADS):

        def rank(slot, row=row, head=head):
            alive = bool(living[row, head, slot])
            saved = alive and marked and bool(protected[row, head, slot])
            score = 0.0 if saved or not alive else float(np.clip(scores[row, head, slot], -3e38, 3e38))
            return alive, saved, score, slot

        order = sorted(range(SLOTS), key=rank, reverse=True)
        assert got[row, head].tolist() == [order.index(slot) for slot in range(SLOTS)]


# What is computed only where it is needed.


@every_library
@pytest.mark.parametrize("needed", [True, False])
def test_when_gives_one_or_the_other(xp, needed):
    calls = []

    def f():
        calls.append(1)
        return xp.asarray([3.0, 4.0])

    found = when(xp, xp.any(xp.asarray([False, needed])), f, xp.asarray([0.0, 1.0]))
    assert back(found).tolist() == ([3.0, 4.0] if needed else [0.0, 1.0])
    assert needed or not calls or xp is LIBRARIES["jax"]  # jax traces both
