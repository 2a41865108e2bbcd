"""experiments/interval.py: ends against the exact distribution of resampled means, and against scipy's bootstrap."""

from itertools import product

import numpy as np
import pytest
from scipy import stats

from experiments.interval import interval, paired
from framework.errors import KvtwinError


@pytest.mark.parametrize(("ones", "count"), [(3, 20), (17, 20), (60, 100), (7, 11)])
def test_shares_have_binomial_ends(ones: int, count: int) -> None:
    """A resampled mean of zeros and ones is a binomial number over their count."""
    values = np.random.default_rng(ones).permutation(np.arange(count) < ones)
    mean, low, high = interval(values)
    assert mean == pytest.approx(ones / count, abs=1e-12)
    exact = stats.binom.ppf([0.025, 0.975], count, ones / count) / count
    # 2000 resamples place a quantile within one step of the exact one.
    assert abs(low - exact[0]) <= 1 / count + 1e-12
    assert abs(high - exact[1]) <= 1 / count + 1e-12
    assert low < mean < high


def test_few_values_have_the_ends_of_all_their_resamples() -> None:
    values = [0.0, 1.0, 10.0]
    means = sorted(np.mean(each) for each in product(values, repeat=3))
    # 0.025 and 0.975 of 27 equal parts lie in the first and in the last one.
    assert interval(values)[1:] == (means[0], means[-1])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ends_are_scipys(seed: int) -> None:
    values = np.random.default_rng(seed).exponential(3, 40)
    found = interval(values, seed)
    judge = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", random_state=np.random.default_rng(9)
    )
    wide = judge.confidence_interval.high - judge.confidence_interval.low
    assert found[0] == pytest.approx(values.mean())
    assert abs(found[1] - judge.confidence_interval.low) < 0.06 * wide
    assert abs(found[2] - judge.confidence_interval.high) < 0.06 * wide


def test_ends_hold_the_true_mean_as_often_as_they_say() -> None:
    """Of 400 samples of 50 normal numbers; the bootstrap of so many holds about 94 in 100."""
    random = np.random.default_rng(5)
    held = 0
    for seed in range(400):
        _, low, high = interval(random.normal(2, 1, 50), seed)
        held += low <= 2 <= high
    assert 0.91 <= held / 400 <= 0.97


def test_ends_are_those_of_the_seed_and_not_of_what_was_drawn_elsewhere() -> None:
    values = np.random.default_rng(1).normal(size=31)
    first = interval(values, 7)
    np.random.default_rng(7).random(100)
    assert interval(values, 7) == first
    assert interval(values, 8)[1:] != first[1:]


def test_pairs_are_compared_with_each_other() -> None:
    """A small difference between pairs that differ much among themselves."""
    random = np.random.default_rng(3)
    base = random.normal(0, 100, 25)
    shift = random.normal(1, 0.1, 25)
    mean, low, high = paired(base + shift, base)
    assert mean == pytest.approx(shift.mean())
    assert 0.9 < low < mean < high < 1.1
    assert paired(base, base + shift)[0] == pytest.approx(-mean)
    assert paired(base + shift, base, 4) == pytest.approx(interval(shift, 4))


def test_one_value_and_values_without_end() -> None:
    assert interval([0.3]) == (0.3, 0.3, 0.3)
    mean, low, high = interval([1.0, np.inf, 2.0])
    assert mean == np.inf
    assert np.isnan([low, high]).all()


@pytest.mark.parametrize("values", [[], np.ones((2, 3))])
def test_what_is_no_row_is_refused(values: object) -> None:
    with pytest.raises(KvtwinError, match="expected one row of at least one number"):
        interval(values)


def test_pairs_that_are_none_are_refused() -> None:
    with pytest.raises(KvtwinError, match="3 values beside 2"):
        paired([1, 2, 3], [1, 2])
