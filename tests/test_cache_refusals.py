"""Calls, tokens and sizes that every backend refuses, leaving the cache as it is."""

from typing import Any

import numpy as np
import pytest

from framework.decode import Sampling
from framework.errors import KvtwinError
from tests.ragged import BACKENDS, FEED, FIRST, PROMPT, begun, model
from tests.twins import unchecked


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"phase": "Decode"}, "phase='Decode'"),
        ({"phase": "pass"}, "phase='pass'"),
        ({"logits": "none"}, "logits='none'"),
        ({"forced": []}, "0 forced sets came"),
        ({"forced": [np.zeros((2, 2, 1), np.int32)] * 3}, "3 forced sets came"),
        ({"forced": [np.zeros((2, 2, 7), np.int32)] * 2}, "a forced set has 7 tokens; expected at most"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_options_of_a_step_are_refused_and_leave_the_cache(
    backend: str, options: dict[str, Any], reason: str
) -> None:
    made = model(backend)
    _, cache = made.step(PROMPT, made.cache("h2o(budget=6)", batch=2))
    with unchecked(), pytest.raises(KvtwinError, match=reason):
        made.step(FEED[:, :1], cache, **options)
    assert cache.seen.tolist() == [8, 11]


@pytest.mark.parametrize("sizes", [{"batch": 2.5}, {"batch": True}, {"capacity": "9"}, {"length": 0}])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sizes_that_are_no_whole_numbers_are_refused(backend: str, sizes: dict[str, Any]) -> None:
    (what,) = sizes
    with unchecked(), pytest.raises(KvtwinError, match=f"{what} is .*; expected an integer of at least 1"):
        model(backend).cache(**sizes)


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        (np.array([[1, 31], [0, 2]]), "token 31 at row 0, column 1; expected 0 to 30, or -1 for padding"),
        (np.array([[1, 2], [0, -2]]), "token -2 at row 1, column 1; expected 0 to 30"),
        (np.array([[1, 2]]), "tokens have 1 rows; expected 2, the batch of the cache"),
        (np.zeros((2, 0), np.int32), r"shape \(2, 0\); expected \[batch, tokens\] with at least one token"),
        (np.zeros(2, np.int32), r"shape \(2,\); expected \[batch, tokens\]"),
        ([], "no list of rows"),
        ([[], []], "at least one token"),
        ([1, 2], "no list of rows"),
        (np.array([[0.5], [1.0]]), "tokens have dtype float64; expected integers"),
        (np.array([[np.nan], [1.0]]), "tokens have dtype float64; expected integers"),
        (np.array([["a"], ["b"]]), "expected integers"),
        ([["a"], ["b"]], "expected integers"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_tokens_are_refused_and_leave_the_cache(backend: str, tokens: Any, reason: str) -> None:
    cache = begun(backend)
    with unchecked(), pytest.raises(KvtwinError, match=reason):
        model(backend).step(tokens, cache)
    assert cache.seen.tolist() == [8, 11]


@pytest.mark.parametrize("backend", BACKENDS)
def test_beyond_the_capacity(backend: str) -> None:
    made = model(backend)
    _, cache = made.step(PROMPT, made.cache(batch=2, capacity=12))
    _, cache = made.step(FEED[:, :1], cache)
    with pytest.raises(KvtwinError, match="13 tokens exceed the capacity 12"):
        made.step(FEED[:, :1], cache)
    with pytest.raises(KvtwinError, match="capacity 12"):
        made.decode(cache, FIRST, Sampling(), (), 1)
    assert cache.seen.tolist() == [9, 12]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prompt_beyond_the_capacity(backend: str) -> None:
    made = model(backend)
    cache = made.cache(batch=2, capacity=10)
    with pytest.raises(KvtwinError, match="11 tokens exceed the capacity 10"):
        made.step(PROMPT, cache)
    assert cache.seen.tolist() == [0, 0]


@pytest.mark.parametrize(("field", "value"), [("batch", 0), ("batch", -1), ("capacity", 0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cache_of_nothing_is_refused(backend: str, field: str, value: int) -> None:
    with pytest.raises(KvtwinError, match=f"{field} is {value}; expected an integer of at least 1"):
        model(backend).cache(**{field: value})
