"""Sums, products and quotients that are rounded one by one, so that all libraries compute the same codes.

XLA joins a product and a sum into one rounding, turns a quotient whose divisor is a constant or is broadcast into a
product with the reciprocal, and turns a / (b / c) into a * c / b. A `where` between two of them keeps them apart only
where its condition reads the first and its other arm is no constant: LLVM moves a sum into the arms of any other.
"""

from jaxtyping import Float, Float16, Float32

from framework.arrays import Array, Namespace

HALF_MOST = 65520.0  # from here on a float16 is infinite


def rounded(xp: Namespace, x: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    """`x`, rounded before anything is made of it."""
    return xp.where(x == x, x, -x)


def quotient(
    xp: Namespace, a: Float[Array, "*axes"], b: Float[Array, "*#axes"] | float
) -> Float[Array, "*axes"]:
    """`a / b`, rounded to nearest and before anything is made of it; `b` is not 0."""
    return rounded(xp, a / xp.astype(xp.where(a == a, b, xp.inf), a.dtype))


def half(xp: Namespace, x: Float32[Array, "*axes"]) -> Float16[Array, "*axes"]:
    """The nearest float16; infinite where there is none, and for NaN."""
    return xp.astype(xp.where(xp.abs(x) < HALF_MOST, x, xp.inf), xp.float16)
