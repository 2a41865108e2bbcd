"""The life of a cache on every backend: fork, rows, roll back, prompts in chunks, rows that stop, bytes."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from framework.backend import Model
from framework.cache import Cache
from framework.compare import drift
from framework.decode import Sampling
from framework.errors import KvtwinError
from framework.spec import ModelSpec
from tests.ragged import (
    BACKENDS,
    EXACT,
    FEED,
    FIRST,
    H2O,
    LAYER,
    PROMPT,
    SLIDING,
    SNAPKV,
    SPEC,
    TAIL,
    WINDOW,
    assert_same_row,
    begun,
    differing,
    fed,
    model,
)

# Fork and rows.


@pytest.mark.parametrize("policy", ["full()", H2O, SNAPKV])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fork_is_deep(backend: str, policy: str) -> None:
    cache = begun(backend, policy, 2)
    before = cache.snapshot()
    copy = cache.fork()
    assert differing(copy.snapshot(), before) == []
    gone_on = fed(backend, copy, FEED[:, 2:5])
    assert differing(cache.snapshot(), before) == []
    original = fed(backend, cache, FEED[::-1, 2:5])
    assert differing(gone_on.snapshot(), begun(backend, policy, 5).snapshot()) == []
    assert differing(original.snapshot(), gone_on.snapshot()) != []


@pytest.mark.parametrize("policy", ["full()", H2O])
@pytest.mark.parametrize("backend", BACKENDS)
def test_fork_one_row_into_three(backend: str, policy: str) -> None:
    made = model(backend)
    _, cache = made.step(PROMPT[1:], made.cache(policy))
    three = cache.fork(rows=3)
    assert three.seen.tolist() == [11, 11, 11]
    tokens = np.array([[4, 9], [9, 4], [17, 0]], np.int32)
    after = fed(backend, three, tokens).snapshot()
    for row in range(3):
        alone = fed(backend, cache.fork(), tokens[row : row + 1]).snapshot()
        assert_same_row(after, row, alone, 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_one_row_forks_into_several(backend: str) -> None:
    cache = begun(backend)
    with pytest.raises(KvtwinError, match=r"fork\(rows=3\) of a cache with batch 2; expected a batch of 1"):
        cache.fork(rows=3)
    assert cache.seen.tolist() == [8, 11]


@pytest.mark.parametrize("rows", [0, -1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fork_has_at_least_one_row(backend: str, rows: int) -> None:
    made = model(backend)
    with pytest.raises(KvtwinError, match=rf"rows={rows}"):
        made.cache().fork(rows=rows)


@pytest.mark.parametrize("policy", ["full()", SNAPKV])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_select_and_reorder(backend: str, policy: str) -> None:
    cache = begun(backend, policy, 2)
    before = cache.snapshot()
    picked = cache.rows([1, 0, -1])
    assert differing(cache.snapshot(), before) == []
    assert picked.batch == 3
    tokens = FEED[[1, 0, 1], 2:5]
    after = fed(backend, picked, tokens).snapshot()
    straight = begun(backend, policy, 5).snapshot()
    for row, source in enumerate([1, 0, 1]):
        assert_same_row(after, row, straight, source)


@pytest.mark.parametrize("index", [[2], [0, -3], []])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_are_not_there(backend: str, index: list[int]) -> None:
    with pytest.raises(KvtwinError, match=r"of a cache with batch 2; expected indices"):
        begun(backend).rows(index)


# Roll back.


@pytest.mark.parametrize(
    ("policy", "steps", "count", "spec"),
    [
        ("full()", 5, 3, SPEC),
        ("full()", 0, 4, SPEC),  # into the prompt
        ("full()", 2, 0, SPEC),
        ("window(budget=40, sinks=2)", 5, 2, SPEC),  # nothing evicted yet
        (TAIL, 7, 3, SPEC),  # since the last eviction
        ("key_norm(budget=30)", 4, 4, SPEC),
        ("full()", 3, 2, dataclasses.replace(SLIDING, layers=(LAYER, dataclasses.replace(LAYER, window=40)))),
    ],
    ids=["full", "prompt", "nothing", "window", "interval", "key_norm", "sliding"],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_roll_back_leaves_no_trace(
    backend: str, policy: str, steps: int, count: int, spec: ModelSpec
) -> None:
    cache = begun(backend, policy, steps, spec)
    rolled = cache.roll_back(count)
    if steps >= count:
        never = begun(backend, policy, steps - count, spec)
    else:
        shorter = PROMPT.copy()
        shorter[0, 8 - count :] = shorter[1, 11 - count :] = -1
        made = model(backend, spec)
        _, never = made.step(shorter, made.cache(policy, batch=2))
    assert differing(rolled.snapshot(), never.snapshot(), 0.0 if steps >= count else EXACT) == []
    again, straight = (fed(backend, one, FEED[:, 5:9], spec).snapshot() for one in (rolled, never))
    assert differing(again, straight, EXACT) == []
    with pytest.raises(KvtwinError, match="consumed"):
        cache.snapshot()


@pytest.mark.parametrize("policy", ["full()", "window(budget=40)"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_roll_back_part_of_a_call_of_several_tokens(backend: str, policy: str) -> None:
    made = model(backend)
    _, cache = made.step(FEED[:, :5], begun(backend, policy), logits=None)
    _, never = made.step(FEED[:, :2], begun(backend, policy), logits=None)
    assert differing(cache.roll_back(3).snapshot(), never.snapshot(), EXACT) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_roll_back_is_refused_where_the_next_eviction_cannot_be_placed(backend: str) -> None:
    """With an interval, how many calls the tokens came in decides when the next eviction is due."""
    _, cache = model(backend).step(FEED[:, :3], begun(backend, "window(budget=40, interval=4)"))
    with pytest.raises(KvtwinError, match=r"cannot roll back 2 tokens under window\(.*interval=4\)"):
        cache.roll_back(2)


@pytest.mark.parametrize(
    ("policy", "steps", "count", "reason"),
    [
        (WINDOW, 2, 1, "tokens were evicted within them"),
        (TAIL, 5, 2, "tokens were evicted within them"),
        ("h2o(budget=40)", 2, 1, "its memory cannot be undone"),
        ("snapkv(budget=40, window=5)", 2, 1, "its newest queries cannot be undone"),
        ("full()", 2, 11, r"the rows have seen \[10, 13\]"),
        ("full()", 2, -1, "cannot roll back -1 tokens"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_roll_back_is_refused_with_the_reason(
    backend: str, policy: str, steps: int, count: int, reason: str
) -> None:
    cache = begun(backend, policy, steps)
    before = cache.snapshot()
    with pytest.raises(KvtwinError, match=reason):
        cache.roll_back(count)
    assert differing(cache.snapshot(), before) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_roll_back_is_refused_where_a_sliding_window_has_passed(backend: str) -> None:
    cache = begun(backend, "full()", 1, SLIDING)
    with pytest.raises(KvtwinError, match="tokens were evicted within them"):
        cache.roll_back(1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_empty_is_zero_in_a_snapshot(backend: str) -> None:
    """So that two caches that hold the same are equal, whatever padding once computed there."""
    made = model(backend)
    _, cache = made.step(PROMPT[:, 8:], made.cache(SNAPKV, batch=2), evict=False)
    for layer in cache.snapshot().layers:
        assert layer.queries is not None
        assert layer.query_positions is not None
        assert layer.query_positions.tolist() == [[-1] * 5, [-1, -1, 0, 1, 2]]
        assert not layer.queries[0].any()
        assert not layer.queries[1, :, :, :2].any()
        assert layer.queries[1, :, :, 2:].all()
        assert not layer.streams["keys"][0].any()
    assert cache.snapshot().seen.tolist() == [0, 3]


# Calls.


@pytest.mark.parametrize("policy", ["full()", H2O, SNAPKV])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prompt_in_chunks_equals_the_whole(backend: str, policy: str) -> None:
    made = model(backend)
    cache = made.cache(policy, batch=2)
    for start in (0, 4, 8):
        logits, cache = made.step(PROMPT[:, start : start + 4], cache, phase="prefill", evict=start == 8)
    whole, straight = made.step(PROMPT, made.cache(policy, batch=2))
    assert differing(cache.snapshot(), straight.snapshot(), EXACT) == []
    assert logits is not None
    assert whole is not None
    assert drift(logits[1], whole[1]) <= EXACT
    assert not logits[0].any()  # the shorter row had no token in the last chunk
    ours, theirs = (fed(backend, one, FEED[:, :2]).snapshot() for one in (cache, straight))
    assert differing(ours, theirs, EXACT) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_call_without_a_cache_gives_one(backend: str) -> None:
    made = model(backend)
    logits, cache = made.step(PROMPT)
    same, passed = made.step(PROMPT, made.cache(batch=2))
    assert differing(cache.snapshot(), passed.snapshot()) == []
    assert logits is not None
    assert logits.shape == (2, 1, 31)
    np.testing.assert_array_equal(logits, same)


@pytest.mark.parametrize("backend", BACKENDS)
def test_prefill_and_decode_equal_one_call(backend: str) -> None:
    made = model(backend)
    every, _ = made.step(np.concatenate([PROMPT[1:], FEED[1:, :3]], axis=1), logits="all")
    first, cache = made.step(PROMPT[1:], logits="all")
    parts = [first]
    for column in range(3):
        one, cache = made.step(FEED[1:, column : column + 1], cache)
        parts.append(one)
    assert drift(np.concatenate(parts, axis=1), every) <= EXACT


@pytest.mark.parametrize(
    "use",
    [
        lambda made, cache: made.step(FEED[:, :1], cache),
        lambda made, cache: made.step(FEED[:, :2], cache),
        lambda made, cache: made.decode(cache, FIRST, Sampling(), (), 2),
        lambda made, cache: cache.fork(),
        lambda made, cache: cache.rows([0]),
        lambda made, cache: cache.roll_back(1),
        lambda made, cache: cache.seen,
        lambda made, cache: cache.bytes,
        lambda made, cache: cache.kept,
        lambda made, cache: cache.snapshot(),
    ],
    ids=["step", "chunk", "decode", "fork", "rows", "roll_back", "seen", "bytes", "kept", "snapshot"],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_consumed_cache_says_so(backend: str, use: Callable[[Model, Cache], Any]) -> None:
    cache = begun(backend)
    fed(backend, cache, FEED[:, :1])
    assert "consumed" in repr(cache)
    with pytest.raises(
        KvtwinError,
        match=r"this cache was consumed by a step; use the cache that the step returned, or fork\(\) before",
    ):
        use(model(backend), cache)


@pytest.mark.parametrize("policy", ["full()", WINDOW, TAIL, H2O, SNAPKV])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_finished_row_stays_as_it_is(backend: str, policy: str) -> None:
    cache = begun(backend, policy, 1)
    before = cache.snapshot()
    tokens = FEED[:, 1:6].copy()
    tokens[1] = -1
    after = fed(backend, cache, tokens).snapshot()
    assert_same_row(after, 1, before, 1)
    assert after.dropped[1] == before.dropped[1]
    assert_same_row(after, 0, begun(backend, policy, 6).snapshot(), 0)


@pytest.mark.parametrize("policy", ["full()", TAIL, H2O])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stopped_row_stays_as_it_is(backend: str, policy: str) -> None:
    made = model(backend)
    going = np.array([True, False])
    before = begun(backend, policy, 1)
    shot = before.snapshot()
    tokens, _, after = made.decode(before, FIRST, Sampling(), (), 5, active=going)
    assert (tokens[1] == -1).all()
    assert (tokens[0] >= 0).all()
    assert_same_row(after.snapshot(), 1, shot, 1)


def _held(cache: Any) -> int:
    """Bytes of every array of the cache but its counters."""
    if hasattr(cache, "content"):
        heads = [head for row in cache.content for layer in row.heads for head in layer]
        lists = [[head.positions, *head.streams.values(), *head.memory.values()] for head in heads]
        lists += [[*row.queries, *row.query_positions] for row in cache.content]
        return sum(x.nbytes for one in lists for x in one)
    layers = cache.layers if hasattr(cache, "layers") else cache.state.layers
    every = []
    for layer in layers:
        every += [*layer.streams.values(), layer.positions, *layer.memory.values()]
        every += [x for x in (layer.queries, layer.query_positions) if x is not None]
    return sum(x.nbytes for x in every)


@pytest.mark.parametrize("policy", ["full()", WINDOW, H2O, SNAPKV])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bytes_add_up(backend: str, policy: str) -> None:
    cache = begun(backend, policy, 2)
    held = cache.bytes
    parts = [getattr(held, part.name) for part in dataclasses.fields(held)]
    assert held.capacity == sum(parts) == _held(cache)
    assert min(parts) >= 0
    tokens = sum(int((kept >= 0).sum()) for kept in cache.kept)
    assert held.payload == tokens * 2 * LAYER.head_dim * 8  # keys and values in float64
    assert held.positions == tokens * 4
    assert held.memory == (tokens * 8 if policy == H2O else 0)
    assert (held.queries > 0) == (policy == SNAPKV)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rolling_back_a_ragged_batch_leaves_room_for_what_follows(backend: str) -> None:
    """Each step takes a slot in every row, so that buffers are fuller than any row has seen tokens."""
    made = model(backend)
    tokens = np.full((2, 20), -1, np.int32)
    tokens[0], tokens[1, :8] = np.arange(20), np.arange(8)
    logits, cache = made.step(tokens, made.cache(batch=2))
    _, _, cache = made.decode(cache, logits[:, 0], Sampling(), (), 10, active=np.array([False, True]))
    cache = cache.roll_back(1)
    for step in range(6):
        _, cache = made.step([[step], [step + 6]], cache)
    assert cache.seen.tolist() == [25, 23]
    assert cache.kept[0][0, 0].tolist() == list(range(25))
    assert cache.kept[0][1, 0].tolist() == [*range(23), -1, -1]
