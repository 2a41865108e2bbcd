"""A random rotation that all libraries compute alike: three rounds of random signs, Hadamard blocks and a shuffle.

A block is as long as the largest power of 2 that divides the width; where that is the width, nothing is shuffled. It
stands in for a rotation drawn from all of them, which as a matrix would round differently in each library: sums of a
product with ones and Hadamard matrices have an order.
"""

import functools

import array_api_compat.numpy
import numpy as np
from jaxtyping import Float, Float32, Int64

from framework import hadamard
from framework.arrays import Array, Namespace, device
from framework.random import hash32

ROUNDS = 3


def rotated(
    xp: Namespace, x: Float[Array, "*axes width"], stream: tuple[int, ...]
) -> Float[Array, "*axes width"]:
    """`x` rotated and `stretch` times as long."""
    signs, orders = _drawn(x.shape[-1], stream)
    for number in range(ROUNDS):
        x = _blocks(xp, x * xp.asarray(signs[number], device=device(x)))
        x = _shuffled(xp, x, orders[number])
    return x


def restored(
    xp: Namespace, x: Float[Array, "*axes width"], stream: tuple[int, ...]
) -> Float[Array, "*axes width"]:
    """`x` rotated back and `stretch` times as long."""
    signs, orders = _drawn(x.shape[-1], stream)
    for number in reversed(range(ROUNDS)):
        x = _blocks(xp, _shuffled(xp, x, np.argsort(orders[number])))
        x = x * xp.asarray(signs[number], device=device(x))
    return x


def stretch(width: int) -> float:
    """How many times as long `rotated` makes a vector."""
    return float(width & -width) ** (ROUNDS / 2)


@functools.cache
def matrix(width: int, stream: tuple[int, ...]) -> Float32[np.ndarray, "width width"]:
    """The rotation as a matrix: `x @ matrix` is `rotated(x) / stretch`."""
    return (rotated(array_api_compat.numpy, np.eye(width), stream) / stretch(width)).astype(np.float32)


def _blocks(xp: Namespace, x: Float[Array, "*axes width"]) -> Float[Array, "*axes width"]:
    size = x.shape[-1] & -x.shape[-1]
    return xp.reshape(hadamard.transform(xp, xp.reshape(x, (*x.shape[:-1], -1, size))), x.shape)


def _shuffled(
    xp: Namespace, x: Float[Array, "*axes width"], order: Int64[np.ndarray, "width"]
) -> Float[Array, "*axes width"]:
    if x.shape[-1] & (x.shape[-1] - 1) == 0:
        return x
    return xp.take(x, xp.asarray(order.astype(np.int32), device=device(x)), axis=-1)


@functools.cache
def _drawn(
    width: int, stream: tuple[int, ...]
) -> tuple[Float32[np.ndarray, "rounds width"], Int64[np.ndarray, "rounds width"]]:
    """The signs and the orders of each round."""
    place = np.arange(ROUNDS * width, dtype=np.int32)
    signs, keys = (
        hash32(array_api_compat.numpy, *stream, part, place).reshape(ROUNDS, width) for part in (0, 1)
    )
    return np.where(signs & 1, -1.0, 1.0).astype(np.float32), np.argsort(keys, axis=-1, stable=True)
