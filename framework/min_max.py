"""Codes of a few bits between the minimum and the maximum of a group of numbers (KIVI, arXiv 2402.02750).

code = round((x - minimum) / scale), ties to even, clipped to 0 .. 2^bits - 1, where the minimum is that of the group
and the scale its range over 2^bits - 1, both as they are stored, in float16; where nothing of the scale is left in
float16, as in a constant group, it is 1. It is read as code * scale + minimum, exactly, since a code of 8 bits times
a float16 fits into a float32. What cannot be coded gives a scale that is not finite.

Deviations: KIVI computes in float16, and gives NaN for a constant group.
"""

import numpy as np
from jaxtyping import Float16, Float32, UInt8

from framework.arrays import Array, Namespace
from framework.rounding import half, quotient, rounded

HALF_MOST = 65520.0  # from here on a float16 is infinite
LEAST = 2.0**-100  # far above what XLA takes for 0


def encode(
    xp: Namespace, x: Float32[Array, "*axes"], bits: int, axis: int
) -> tuple[UInt8[Array, "*axes"], Float16[Array, "*groups"], Float16[Array, "*groups"]]:
    """Codes, and the scale and the minimum of each group; a group is what lies along `axis`, which those keep as 1."""
    most = 2.0**bits - 1
    x = xp.where(xp.isnan(x), xp.inf, rounded(xp, x))
    with np.errstate(over="ignore", invalid="ignore"):
        low = xp.min(x, axis=axis, keepdims=True)
        low = xp.where(xp.abs(low) < LEAST, 0.0, low)  # of 0 and -0 libraries take either
        span = xp.max(x, axis=axis, keepdims=True) - low
        size = quotient(xp, span, xp.full_like(span, most))
        fits = (xp.abs(low) < HALF_MOST) & (size < HALF_MOST)
        scale = half(xp, xp.where(fits, size, xp.inf))
        low = half(xp, xp.where(fits, low, 0.0))
        scale = xp.where(scale == 0, xp.ones_like(scale), scale)
        above = xp.where(fits, x - xp.astype(low, xp.float32), 0.0)
        ratio = quotient(xp, above, xp.astype(scale, xp.float32))
    return xp.astype(xp.clip(xp.round(ratio), 0.0, most), xp.uint8), scale, low


def read(
    xp: Namespace,
    codes: UInt8[Array, "*axes"],
    scale: Float16[Array, "*#axes"],
    low: Float16[Array, "*#axes"],
) -> Float32[Array, "*axes"]:
    """The numbers that the codes stand for."""
    x = xp.astype(codes, xp.float32) * xp.astype(scale, xp.float32)
    return x + xp.astype(low, xp.float32)
