"""Numbers rounded to fewer bits, with the same bytes from every library.

XLA:CPU computes a product and a sum of it with one rounding, turns a division by a constant, or by a number that is
the same along an axis, into a product with its reciprocal, takes float32 numbers below 2^-126 for 0, and its maximum
passes over NaN. What codes depend on is written so that none of it matters.
"""

import sys

import numpy as np
from jaxtyping import Float, Float16, UInt8

from framework.arrays import Array, Namespace, device


def half(xp: Namespace, x: Float[Array, "*axes"]) -> Float16[Array, "*axes"]:
    """The nearest float16, ties to even; infinite beyond 65504."""
    with np.errstate(over="ignore"):
        return xp.astype(x, xp.float16)


def rounded(xp: Namespace, x: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    """`x`, rounded before anything is made of it, also where it was computed in the same compiled function."""
    library = sys.modules[xp.__name__.partition(".")[0]]  # imported already, since xp is part of it
    if not hasattr(library, "lax"):
        return x  # every operation is one of its own
    return xp.where(x == x, x, -x)  # the choice reads x, which is rounded before it is made


def largest(xp: Namespace, x: Float[Array, "*axes count"]) -> Float[Array, "*axes 1"]:
    """The largest absolute value along the last axis; infinite where one of them is not finite."""
    return xp.max(xp.where(xp.isfinite(x), xp.abs(x), xp.inf), axis=-1, keepdims=True)


def quotient(xp: Namespace, x: Float[Array, "*axes"], by: Float[Array, "*#axes"]) -> Float[Array, "*axes"]:
    """`x / by`, rounded once; 0 where `x` is 0."""
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        return x / xp.where(x == 0, 1.0, by)  # a choice for each number is not the same along any axis


def total(xp: Namespace, x: Float[Array, "*axes tokens width"]) -> Float[Array, "*axes width"]:
    """The sum over the tokens, in one order everywhere: half is added to half, and zeros behind change nothing."""
    count = x.shape[-2]
    size = 1 << max(count - 1, 0).bit_length()
    more = xp.zeros((*x.shape[:-2], size - count, x.shape[-1]), dtype=x.dtype, device=device(x))
    x = xp.concat([rounded(xp, x), more], axis=-2)
    while size > 1:
        size //= 2
        x = x[..., :size, :] + x[..., size:, :]
    return x[..., 0, :]


def byte_float(
    xp: Namespace, x: Float[Array, "*axes"], mantissa: int, bias: int, nan: int
) -> UInt8[Array, "*axes"]:
    """Float32 as one byte: sign, exponent and `mantissa` bits, to nearest with ties to even.

    No number may lie beyond the largest of the format: clip first. What is not finite becomes the code `nan`.
    """
    finite = xp.isfinite(x)
    x = xp.where(finite, x, 0.0)
    size = xp.abs(x)
    word, cut = size.view(xp.int32), 23 - mantissa
    word = word + ((word >> cut) & 1) + (2 ** (cut - 1) - 1)  # half a unit, less where the last bit is even
    normal = (word >> cut) - ((127 - bias) << mantissa)
    least = 2.0 ** (1 - bias)  # below it all numbers are equally far apart
    below = size < least
    small = xp.astype(xp.round(xp.where(below, size, 0.0) * (2.0**mantissa / least)), xp.int32)
    code = xp.where(below, small, normal) + xp.where(x.view(xp.int32) < 0, 128, 0)
    return xp.astype(xp.where(finite, code, nan), xp.uint8)


def upper_half(xp: Namespace, codes: UInt8[Array, "*axes"]) -> Float[Array, "*axes"]:
    """The float16 numbers whose upper byte is given and whose lower byte is 0, as float32."""
    return xp.astype((xp.astype(codes, xp.int16) << 8).view(xp.float16), xp.float32)
