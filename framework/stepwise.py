"""Sums, products and quotients rounded one by one, so that all libraries compute the same codes.

XLA joins a product and a sum into one rounding, and makes a * c / b of a / (b / c). A `where` between the two
keeps them apart only where its condition reads the first and its other arm is no constant: LLVM moves a sum into the
arms of any other.
"""

from jaxtyping import Float

from framework.arrays import Array, Namespace


def rounded(xp: Namespace, x: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    """`x`, rounded before anything is made of it."""
    return xp.where(x == x, x, -x)
