"""Random numbers that are the same on every backend: the bits of `jax.random` for sampling, a hash for scores.

Functions take the array namespace `xp` first. The standard has no random numbers, and torch has no arithmetic on
uint32: its noise is made in NumPy. `hash32` needs int32 only and runs everywhere.
"""

import functools
import math
from typing import Any

import array_api_compat.numpy
import numpy as np
from jaxtyping import Float32, Float64, Int32, Integer, UInt32

from framework.arrays import Array, Namespace

_WORD = 0xFFFFFFFF
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA
_GOLDEN = 0x1E3779B9  # the golden ratio's bits without the top one, so that it is an int32


def threefry2x32(
    key: tuple[Array, Array], counter: tuple[Array, Array]
) -> tuple[UInt32[Array, "..."], UInt32[Array, "..."]]:
    """Threefry-2x32 with 20 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

    Keys and counters are pairs of uint32 arrays of at least one axis, which broadcast.
    """
    keys = (key[0], key[1], key[0] ^ key[1] ^ _PARITY)
    a, b = counter[0] + keys[0], counter[1] + keys[1]
    for group in range(5):
        for turn in _ROTATIONS[group % 2]:
            a = a + b
            b = a ^ ((b << turn) | (b >> (32 - turn)))
        a = a + keys[(group + 1) % 3]
        b = b + (keys[(group + 2) % 3] + (group + 1))
    return a, b


def key(xp: Namespace, seed: int | Integer[Array, "*batch"]) -> UInt32[Array, "*batch 2"]:
    """The key of `seed` modulo 2^32: `jax.random.key_data(jax.random.key(seed))` with 64-bit types off."""
    low = _words(xp, seed)
    return xp.stack([xp.zeros_like(low), low], axis=-1)


def fold(
    xp: Namespace, key: UInt32[Array, "*batch 2"], data: int | Integer[Array, "..."]
) -> UInt32[Array, "... 2"]:
    """The key that `data` gives under `key`: `jax.random.fold_in`. Leading axes broadcast."""
    low = _words(xp, data)[..., None]
    a, b = threefry2x32((key[..., :1], key[..., 1:]), (xp.zeros_like(low), low))
    return xp.concat([a, b], axis=-1)


def bits(xp: Namespace, key: UInt32[Array, "*batch 2"], count: int) -> UInt32[Array, "*batch {count}"]:
    """`jax.random.bits(key, (count,))`, of its default, the partitionable threefry."""
    low = xp.arange(count, dtype=xp.uint32)
    a, b = threefry2x32((key[..., :1], key[..., 1:]), (xp.zeros_like(low), low))
    return a ^ b


def gumbel(
    xp: Namespace,
    seed: int | Integer[Array, ""],
    step: int | Integer[Array, "..."],
    row: int | Integer[Array, "..."],
    vocab: int,
) -> Float32[Array, "... {vocab}"]:
    """Gumbel noise for one sampling step, from the key of `seed` with `step` and then the prompt's index folded in.

    `row` is one prompt index, or one per row of the result; so may `step` be. The uniform numbers, odd multiples of
    2^-24, are exact and never 0 nor 1; the two logarithms are the library's own, so that the noise of two libraries
    may differ in the last bit.
    """
    words = bits(xp, fold(xp, fold(xp, key(xp, seed), step), row), vocab)
    uniform = (xp.astype(words >> 9, xp.float32) + 0.5) * 2.0**-23
    return -xp.log(-xp.log(uniform))


def hash32(xp: Namespace, *values: int | Integer[Array, "..."]) -> Int32[Array, "..."]:
    """24 random bits for each combination of the integers, which broadcast: an int32 in [0, 2^24), exact as float32.

    At least one value must be an array. Equal for every library, backend, batch and slot order. Only the low 32 bits
    of a value count. The mixer is lowbias32 (Wellons, "Prospecting for hash functions"), once per value.
    """
    shape = np.broadcast_shapes(*(tuple(each.shape) for each in values if hasattr(each, "shape")))
    state: Any = 0
    for value in values:
        if isinstance(value, (int, np.integer)):
            word: Any = _signed(int(value))
        else:
            # NumPy warns when a scalar overflows, not when an array does.
            word = xp.astype(xp.reshape(value, tuple(value.shape) or (1,)), xp.int32)
        if isinstance(state, int) and isinstance(word, int):
            state = int(_mixed(np.asarray([state ^ word], dtype=np.int32))[0])
        else:
            state = _mixed(state ^ word)
    return xp.reshape((state >> 8) & 0xFFFFFF, shape)


@functools.cache
def normal(stream: tuple[int, ...], shape: tuple[int, ...]) -> Float64[np.ndarray, "*shape"]:
    """Standard normal numbers, the same on every machine and backend: Box and Muller on `hash32` of the stream."""
    index = np.arange(math.prod(shape), dtype=np.int32)
    one, two = (
        (hash32(array_api_compat.numpy, *stream, half, index).astype(np.float64) + 0.5) * 2.0**-24
        for half in (0, 1)
    )
    result = (np.sqrt(-2 * np.log(one)) * np.cos(2 * np.pi * two)).reshape(shape)
    result.flags.writeable = False
    return result


def _mixed(x: Array) -> Array:
    """lowbias32 in int32: the arithmetic shift and a mask make the logical shift that int32 lacks."""
    x = x + _GOLDEN  # zero must not stay zero
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * _signed(0x7FEB352D)
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * _signed(0x846CA68B)
    return x ^ ((x >> 16) & 0xFFFF)


def _signed(value: int) -> int:
    """The int32 with the low 32 bits of `value`."""
    return ((value + 2**31) & _WORD) - 2**31


def _words(xp: Namespace, value: int | Array) -> Array:
    """The low 32 bits as uint32."""
    if isinstance(value, (int, np.integer)):
        return xp.asarray(int(value) & _WORD, dtype=xp.uint32)
    return xp.astype(xp.asarray(value), xp.uint32)
