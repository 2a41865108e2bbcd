"""Walsh-Hadamard transforms in Sylvester's order, as sums and as matrices.

The matrix of size 2n is [[H, H], [H, -H]] of the one of size n, and [[1]] for 1. It is symmetric, and its square is its
size: what is rotated by H is rotated back by H / size.
"""

import numpy as np
from jaxtyping import Float

from framework.arrays import Array, Namespace


def transform(xp: Namespace, x: Float[Array, "*axes size"]) -> Float[Array, "*axes size"]:
    """`x @ matrix(size)` in the array's own dtype, rounded after each sum.

    Sums and differences of neighbours come first, then of entries 2, 4, 8 apart. A sum beyond the dtype is infinite,
    and what is made of it infinite or NaN.
    """
    shape, size, step = x.shape, x.shape[-1], 1
    with np.errstate(over="ignore", invalid="ignore"):
        while step < size:
            pairs = xp.reshape(x, (*shape[:-1], size // (2 * step), 2, step))
            a, b = pairs[..., 0, :], pairs[..., 1, :]
            x = xp.reshape(xp.stack([a + b, a - b], axis=-2), shape)
            step *= 2
    return x


def matrix(size: int) -> Float[np.ndarray, "size size"]:
    """The matrix of 1 and -1, float32; `size` is a power of 2."""
    made = np.ones((1, 1), np.float32)
    while made.shape[0] < size:
        made = np.block([[made, made], [made, -made]])
    return made


def blockwise(block: Float[np.ndarray, "size size"], width: int) -> Float[np.ndarray, "width width"]:
    """The matrix that applies `block` to each piece of `size` of a vector, one after the other."""
    return np.kron(np.eye(width // block.shape[0], dtype=block.dtype), block)
