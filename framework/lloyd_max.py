"""The best codebook for one coordinate of a random direction: cells and their means, until neither moves (Lloyd, Max).

A coordinate of a unit vector in d dimensions has the density (1 - x^2)^((d - 3) / 2), up to a factor, which is near
that of a normal number of variance 1 / d. All is done in float64 by sums in order, products and square roots, so that
every machine finds the same numbers.
"""

import functools

import numpy as np
from jaxtyping import Float32, Float64

POINTS = 2**14  # of the grid on which the density is summed
REACH = 9.0  # in standard deviations; beyond it lie 1e-18 of all numbers
STILL = 1e-10
ZERO = 2.0**-60  # the bound in the middle: XLA takes numbers below 2^-126 for 0
ROUNDS = 50_000  # 6,000 are enough for 6 bits


@functools.cache
def codebook(width: int, bits: int) -> tuple[Float32[np.ndarray, "codes"], Float32[np.ndarray, "codes-1"]]:
    """What each of the 2^bits codes stands for, ascending, and the bounds between them."""
    means = _means(width, 2 ** (bits - 1))
    whole = np.concatenate([-means[::-1], means])
    bounds = (whole[1:] + whole[:-1]) / 2
    bounds[len(means) - 1] = ZERO
    return whole.astype(np.float32), bounds.astype(np.float32)


def _means(width: int, count: int) -> Float64[np.ndarray, "count"]:
    """The codes above 0; those below are their mirror image."""
    edge = min(1.0, REACH / np.sqrt(width))
    x = np.linspace(0.0, edge, POINTS + 1)
    density = np.sqrt(1 - x * x) if width % 2 == 0 else np.ones_like(x)
    for _ in range((width - 3) // 2):
        density = density * (1 - x * x)
    mass, moment = _integral(density), _integral(density * x)
    means = (np.arange(count) + 0.5) / count * min(edge, 3 / np.sqrt(width))
    for _ in range(ROUNDS):
        bounds = np.concatenate([[0.0], (means[1:] + means[:-1]) / 2, [edge]])
        before = means
        means = np.diff(np.interp(bounds, x, moment)) / np.diff(np.interp(bounds, x, mass))
        if np.abs(means - before).max() < STILL * edge:
            break
    return means


def _integral(y: Float64[np.ndarray, "points"]) -> Float64[np.ndarray, "points"]:
    """From the first point to each, by trapezoids; the distance of points is 1."""
    return np.concatenate([[0.0], np.cumsum((y[1:] + y[:-1]) / 2)])
