"""framework/random.py: the bits of jax.random from every library, and a hash that is one everywhere."""

import array_api_compat.numpy as numpy_namespace
import array_api_compat.torch as torch_namespace
import array_api_strict
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from framework import random

SEEDS = [0, 1, 7, 2**31, 2**32 - 1]
HASHING = [numpy_namespace, torch_namespace, array_api_strict, jnp]
WORDS = [numpy_namespace, array_api_strict, jnp]


def name(xp):
    return xp.__name__


@pytest.mark.parametrize("xp", WORDS, ids=name)
@pytest.mark.parametrize("seed", SEEDS)
def test_key_is_that_of_jax(xp, seed):
    expected = jax.random.key_data(jax.random.key(np.uint32(seed)))
    assert np.array_equal(np.asarray(random.key(xp, seed)), expected)


@pytest.mark.parametrize("xp", WORDS, ids=name)
@pytest.mark.parametrize("data", [0, 5, 2**31 + 3])
def test_fold_is_that_of_jax(xp, data):
    expected = jax.random.key_data(jax.random.fold_in(jax.random.key(11), np.uint32(data)))
    assert np.array_equal(np.asarray(random.fold(xp, random.key(xp, 11), data)), expected)


@pytest.mark.parametrize("xp", WORDS, ids=name)
@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_bits_are_those_of_jax(xp, count):
    expected = jax.random.bits(jax.random.key(3), (count,))
    assert np.array_equal(np.asarray(random.bits(xp, random.key(xp, 3), count)), expected)


def test_known_answers_of_threefry():
    """The three vectors of Random123's test file (kat_vectors, threefry 2x32 20)."""
    ones, pi = 0xFFFFFFFF, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    counter = np.asarray([[0, 0], [ones, ones], pi[:2]], dtype=np.uint32)
    key = np.asarray([[0, 0], [ones, ones], pi[2:]], dtype=np.uint32)
    a, b = random.threefry2x32((key[:, 0], key[:, 1]), (counter[:, 0], counter[:, 1]))
    assert a.tolist() == [0x6B200159, 0x1CB996FC, 0xC4923A9C]
    assert b.tolist() == [0x99BA4EFE, 0xBB002BE7, 0x483DF7A0]


def test_a_batch_of_rows_is_each_row():
    rows, vocab = np.asarray([4, 0, 9], dtype=np.int32), 13
    batch = random.gumbel(np, 5, 2, rows, vocab)
    assert batch.shape == (3, vocab)
    for place, row in enumerate(rows):
        assert np.array_equal(batch[place], random.gumbel(np, 5, 2, int(row), vocab))


def test_a_step_per_row_is_each_step():
    steps, rows = np.asarray([8, 1], dtype=np.int32), np.asarray([0, 3], dtype=np.int32)
    batch = random.gumbel(np, 5, steps, rows, 7)
    assert np.array_equal(batch[1], random.gumbel(np, 5, 1, 3, 7))


def test_traced_noise_is_that_of_numpy_within_the_last_bits_of_log():
    traced = jax.jit(lambda seed, step, rows: random.gumbel(jnp, seed, step, rows, 300))
    rows = np.asarray([0, 1, 2], dtype=np.int32)
    ours = np.asarray(traced(jnp.uint32(2**32 - 5), jnp.int32(17), jnp.asarray(rows)))
    expected = random.gumbel(np, 2**32 - 5, 17, rows, 300)
    assert ours.dtype == expected.dtype == np.float32
    np.testing.assert_allclose(ours, expected, rtol=2e-6, atol=1e-6)


def test_noise_is_gumbel_and_finite():
    noise = random.gumbel(np, 1, 0, 0, 200_000)
    assert np.isfinite(noise).all()
    assert abs(noise.mean() - np.euler_gamma) < 0.01
    assert abs(noise.var() - np.pi**2 / 6) < 0.03


@pytest.mark.parametrize("word", [0, 2**32 - 1], ids=["least", "most"])
def test_extreme_bits_give_finite_noise(word, monkeypatch):
    monkeypatch.setattr(random, "bits", lambda xp, key, count: np.full(count, word, dtype=np.uint32))
    assert np.isfinite(random.gumbel(np, 0, 0, 0, 3)).all()


def positions(xp, dtype="int32"):
    return xp.asarray([[[0, 1, 2, 3], [70000, -1, 2**31 - 1, 5]]], dtype=getattr(xp, dtype))


@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize("xp", [numpy_namespace, torch_namespace, array_api_strict], ids=name)
def test_hash_is_the_same_in_every_library(xp, dtype):
    heads = xp.reshape(xp.asarray([0, 1], dtype=xp.int32), (1, 2, 1))
    ours = random.hash32(xp, 2**40 + 3, 4, heads, positions(xp, dtype))
    assert ours.dtype == xp.int32
    jitted = jax.jit(lambda seed, heads, positions: random.hash32(jnp, seed, 4, heads, positions))
    expected = jitted(jnp.int32(3), jnp.asarray([[[0], [1]]]), positions(jnp))
    assert np.array_equal(np.asarray(ours), np.asarray(expected))


@pytest.mark.parametrize("xp", HASHING, ids=name)
def test_hash_of_scalar_arrays_is_that_of_integers(xp):
    where = xp.asarray([3, 1], dtype=xp.int32)
    scalar = xp.asarray(-9, dtype=xp.int32)
    assert np.array_equal(
        np.asarray(random.hash32(xp, scalar, where)), random.hash32(np, -9, np.asarray([3, 1]))
    )
    assert random.hash32(xp, scalar, 5).shape == ()


def test_hash_does_not_change():
    assert random.hash32(np, 0, 0, np.arange(3)).tolist() == [14634399, 5027898, 6481967]


@pytest.mark.parametrize("varied", range(4), ids=["seed", "layer", "head", "position"])
def test_hash_is_uniform_in_every_argument(varied):
    """Chi-square over 256 bins, of the high and of the low bits; 340: the 99.9th percentile for 255 degrees."""
    values = [5, 2, np.asarray([1]), 9]
    values[varied] = np.arange(100_000, dtype=np.int32)
    drawn = random.hash32(np, *values)
    assert drawn.min() >= 0
    assert drawn.max() < 2**24
    for part in (drawn >> 16, drawn & 0xFF):
        counts = np.bincount(part, minlength=256)
        expected = drawn.size / 256
        assert ((counts - expected) ** 2 / expected).sum() < 340


@pytest.mark.parametrize("other", [(1, 0, 0), (0, 1, 0), (0, 0, 1)], ids=["seed", "layer", "head"])
def test_hash_of_another_seed_layer_or_head_is_unrelated(other):
    where = np.arange(10_000, dtype=np.int32)
    one, two = random.hash32(np, 0, 0, 0, where), random.hash32(np, *other, where)
    assert (one == two).mean() < 0.001
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.04


def test_one_bit_of_the_position_flips_half_of_the_hash():
    where = np.arange(4096, dtype=np.int32)
    base = random.hash32(np, 1, 2, 3, where)
    for bit in range(20):
        flipped = base ^ random.hash32(np, 1, 2, 3, where ^ (1 << bit))
        assert abs(np.bitwise_count(flipped).mean() - 12) < 0.5
