"""Means with an interval that they lie in: the percentile bootstrap (Efron, 1979)."""

from collections.abc import Sequence

import numpy as np

from framework.errors import KvtwinError

RESAMPLES = 2000
LEVEL = 0.95

Values = Sequence[float] | np.ndarray


def interval(values: Values, seed: int = 0) -> tuple[float, float, float]:
    """The mean, and the ends of its interval of 95%, from 2000 resamples; the same seed gives the same ends.

    Of a single value both ends are that value: nothing is known of its spread. Where a value is not finite, both ends
    are NaN.
    """
    found = np.asarray(values, np.float64)
    if found.ndim != 1 or not found.size:
        raise KvtwinError(f"values of shape {found.shape}; expected one row of at least one number")
    mean = float(found.mean())
    if not np.isfinite(found).all():
        return mean, float("nan"), float("nan")
    drawn = np.random.default_rng(seed).integers(found.size, size=(RESAMPLES, found.size))
    low, high = np.quantile(found[drawn].mean(1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return mean, float(low), float(high)


def paired(one: Values, other: Values, seed: int = 0) -> tuple[float, float, float]:
    """`interval` of the differences, one minus other, of values that belong together in this order."""
    if len(one) != len(other):
        raise KvtwinError(
            f"{len(one)} values beside {len(other)}; expected pairs, as of the same seeds in the same order"
        )
    return interval(np.subtract(one, other), seed)
