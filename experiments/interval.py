"""95% intervals by the bootstrap: percentiles of the means of resampled values, the same for the same seed."""

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000
BOUNDS = (2.5, 97.5)


def interval(values: Sequence[float] | np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """The mean, and the bounds of its interval; NaN of no values."""
    given = np.asarray(values, float)
    if not given.size:
        return (float("nan"),) * 3
    drawn = np.random.default_rng(seed).integers(given.size, size=(RESAMPLES, given.size))
    low, high = np.percentile(given[drawn].mean(-1), BOUNDS)
    return float(given.mean()), float(low), float(high)


def paired(
    a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray, seed: int = 0
) -> tuple[float, float, float]:
    """The mean of `a - b`, pair by pair, and the bounds of its interval."""
    return interval(np.asarray(a, float) - np.asarray(b, float), seed)
