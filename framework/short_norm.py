"""Euclidean norms in float16, the same from every library: square roots are not.

The squares are summed in pairs, halves of what is left; the root of a library is then compared with its neighbours,
since the number halfway between two float16 numbers has a square that float32 holds exactly.
"""

import numpy as np
from jaxtyping import Float16, Float32

from framework.arrays import Array, Namespace, device
from framework.rounding import half, rounded

INFINITE = 0x7C00  # as a float16


def short_norm(xp: Namespace, x: Float32[Array, "*axes width"]) -> Float16[Array, "*axes 1"]:
    """The norm of each vector, to nearest, of two the smaller; infinite beyond float16, and for NaN."""
    with np.errstate(over="ignore", invalid="ignore"):
        square = rounded(xp, x * x)
        while square.shape[-1] > 1:
            if square.shape[-1] % 2:
                pad = xp.zeros((*square.shape[:-1], 1), dtype=square.dtype, device=device(square))
                square = xp.concat([square, pad], axis=-1)
            size = square.shape[-1] // 2
            square = square[..., :size] + square[..., size:]
        square = xp.where(xp.isnan(square), xp.inf, square)
        word = xp.astype(half(xp, xp.sqrt(square)).view(xp.int16), xp.int32)
        up, down = _halfway(xp, word), _halfway(xp, word - 1)
        word = xp.where(
            square > up * up, word + 1, xp.where((word > 0) & (square <= down * down), word - 1, word)
        )
    return xp.astype(xp.where(xp.isinf(square), INFINITE, word), xp.int16).view(xp.float16)


def _halfway(xp: Namespace, word: Array) -> Float32[Array, "*axes"]:
    """The number halfway between the float16 with these bits and the next; infinite where there is none."""

    def number(word: Array) -> Float32[Array, "*axes"]:
        x = xp.astype(xp.astype(xp.clip(word, 0, INFINITE), xp.int16).view(xp.float16), xp.float32)
        return xp.where(xp.isinf(x), 65536.0, x)  # what would follow 65504

    middle = (number(word) + number(word + 1)) * 0.5
    return xp.where(word >= INFINITE, xp.inf, middle)
