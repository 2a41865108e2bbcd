"""Keys in groups and the newest tokens exact, piece by piece, by loops; test_groups_walk.py has whole histories."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from framework.arrays import spread
from framework.coding import stored
from framework.errors import KvtwinError
from framework.groups import (
    MOST_ROWS,
    ROW,
    Call,
    Groups,
    counted,
    exact_of,
    fixed_rows,
    most_rows,
    newest,
    recoded,
    rows_of,
    table_bytes,
    tables_layout,
)
from framework.snapshot import LayerSnapshot, canonical
from tests.grouped import HEADS, LAYER, WIDTH, Fifths
from tests.libraries import LIBRARIES, everywhere, same_bytes

NUMPY = LIBRARIES["numpy"][0]
BATCH = 3


def vectors(count: int, seed: int = 0) -> dict[Any, np.ndarray]:
    """Keys and values."""
    x = np.random.default_rng(seed).standard_normal((2, BATCH, HEADS, count, WIDTH)).astype(np.float32)
    return {"keys": x[0], "values": x[1]}


def empty_tables(codec: Fifths) -> dict[str, np.ndarray]:
    """Those of a layer in which nothing was stored."""
    return {
        key: np.zeros((BATCH, one.heads, fixed_rows(codec, key) or 0, one.width), kind or np.float32)
        for key, (one, kind) in tables_layout(codec, LAYER).items()
    }


def first_call(codec: Fifths, count: int, lost: Any = (), queries: Any = None) -> tuple:
    """`count` tokens come to an empty layer, those at `lost` go: what `recoded` is given, without `rows`."""
    new = vectors(count)
    positions = np.tile(np.arange(count, dtype=np.int32), (BATCH, 1))
    held = np.repeat(positions[:, None], HEADS, axis=1)
    held[:, :, list(lost)] = -1
    seen = np.zeros(BATCH, np.int32)
    call = Call(new, positions, seen, seen + np.int32(count), queries)
    return stored(codec, NUMPY, LAYER, new), empty_tables(codec), held, call


def test_spread_puts_numbers_in_their_places():
    random = np.random.default_rng(1)
    index = np.full((2, 3, 5), -1, np.int32)
    for place in np.ndindex(2, 3):
        index[place][:4] = random.permutation(7)[:4]
        index[place] = random.permutation(index[place])
    x = random.integers(0, 99, index.shape).astype(np.int32)
    expected = np.full((2, 3, 7), -5, np.int32)
    for row, head, column in np.ndindex(index.shape):
        if index[row, head, column] >= 0:
            expected[row, head, index[row, head, column]] = x[row, head, column]
    made = same_bytes(everywhere(lambda xp, index, x: {"": spread(xp, 7, index, x, -5)}, index, x))
    np.testing.assert_array_equal(made[""], expected)


@pytest.mark.parametrize("count", [1, 4, 5])
def test_the_rows_of_the_newest_are_for_the_last_positions(count):
    seen = np.arange(13, dtype=np.int32)
    made = same_bytes(everywhere(lambda xp, seen: {"": newest(xp, seen, count)}, seen))[""]
    for each, row in zip(seen.tolist(), made.tolist(), strict=True):
        expected = [-1] * count
        for position in range(max(0, each - count), each):
            expected[position % count] = position
        assert row == expected


def test_exact_are_the_newest_from_before_and_then_those_of_the_call():
    codec, random = Fifths(size=2, newest=4), np.random.default_rng(2)
    before, came = np.array([0, 3, 9], np.int32), np.array([2, 0, 3])
    given = np.array([[-1, 0, -1, 1], [-1, -1, -1, -1], [9, 10, 11, -1]], np.int32)
    new, tables = vectors(4, seed=3), empty_tables(codec)
    for side in ("keys", "values"):
        tables[f"{side}.exact"] = random.standard_normal((BATCH, HEADS, 4, WIDTH)).astype(np.float32)
    positions = np.full((BATCH, HEADS, 10), -1, np.int32)
    for row, head in np.ndindex(BATCH, HEADS):
        there = random.permutation(before[row] + came[row])[:7]  # some were evicted
        positions[row, head, random.permutation(10)[: len(there)]] = there

    def run(xp: Any, positions: Any, given: Any, before: Any, *x: Any) -> dict[str, Any]:
        own, old = dict(zip(new, x[:2], strict=True)), dict(zip(tables, x[2:], strict=True))
        made = exact_of(xp, codec, old, positions, Call(own, given, before, before))
        return {"place": made.place, "positions": made.positions, **made.vectors}

    made = same_bytes(everywhere(run, positions, given, before, *new.values(), *tables.values()))
    for row, head in np.ndindex(BATCH, HEADS):
        held = {int(one) for one in positions[row, head] if one >= 0}
        rows = [-1] * 4
        for position in range(max(0, before[row] - 4), before[row]):
            if position in held:
                rows[position % 4] = position
        assert made["positions"][row, head].tolist() == rows + given[row].tolist()
        for slot, position in enumerate(positions[row, head].tolist()):
            place = made["place"][row, head, slot]
            if position < 0 or position < before[row] - 4:
                assert place == -1
            else:
                assert made["positions"][row, head, place] == position
        for side, x in new.items():
            table = tables[f"{side}.exact"][row, head]
            np.testing.assert_array_equal(made[side][row, head], np.concatenate([table, x[row, head]]))


def test_groups_are_of_survivors_in_the_order_of_their_positions_and_the_last_is_shorter():
    codec = Fifths(size=3, newest=4)
    streams, tables, positions, call = first_call(codec, 14, lost=(1, 5, 6, 12))
    made, found, wrong = recoded(NUMPY, codec, streams, tables, positions, call, None)
    # Of 0 2 3 | 4 7 8 | 9 10 11 and, exact, 13.
    expected = [0, -1, 0, 0, 1, -1, -1, 1, 1, 2, 2, 2, -1, -1]
    assert (made[ROW][..., 0] == expected).all()
    assert (found["keys.count"] == 3).all()
    assert not wrong.any()
    for place in np.ndindex(BATCH, HEADS):
        for number, group in enumerate([(0, 2, 3), (4, 7, 8), (9, 10, 11)]):
            least = call.new["keys"][place][list(group)].min(0)
            np.testing.assert_array_equal(np.roll(found["keys.low"][place][number], 1) * 2, least)
    np.testing.assert_array_equal(
        found["values.exact"][:, :, [1, 2, 3]], call.new["values"][:, :, [13, 10, 11]]
    )
    np.testing.assert_array_equal(found["keys.exact"][:, :, 1], call.new["keys"][:, :, 13])
    for row, position in ((2, 10), (3, 11)):  # coded, and so they read
        steps = made["keys.codes"][:, :, position] * found["keys.step"][:, :, 2] + found["keys.low"][:, :, 2]
        np.testing.assert_array_equal(found["keys.exact"][:, :, row], np.roll(steps * 2, 1, axis=-1))


def test_a_group_is_shown_the_newest_queries_of_its_heads():
    codec = Fifths(size=2, newest=4, asks=2)
    queries = np.random.default_rng(5).standard_normal((BATCH, HEADS, 2, 3, WIDTH)).astype(np.float32)
    given = first_call(codec, 9, queries=queries)
    _, tables, _ = recoded(NUMPY, codec, *given, None)
    expected = queries[:, :, :, 1:].sum((2, 3))
    for number in range(4):
        np.testing.assert_allclose(tables["keys.asked"][:, :, number], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("kept", "again"), [((0, 3, 6, 9), 0), ((0, 3, 6, 9, 12), 1)])
def test_keys_are_coded_again_beyond_twice_the_groups_and_not_at_it(kept, again):
    """Old keys of a group each, and 2 groups of new ones: 6 of 8 keys are twice 3, 7 of 9 are more."""
    codec = Fifths(size=3, newest=4, again=True)
    streams, tables, positions, call = first_call(codec, 16)
    made, tables, _ = recoded(NUMPY, codec, streams, tables, positions, call, None)
    assert (made[ROW][0, 0, :, 0] == [number // 3 for number in range(16)]).all()
    streams |= made
    # Groups of one token each, and then four tokens that come: 2 more.
    new = vectors(4, seed=6)
    streams = {key: x[:, :, list(kept)] for key, x in streams.items()}
    positions = positions[:, :, list(kept)]
    own = np.tile(np.arange(16, 20, dtype=np.int32), (BATCH, 1))
    seen = np.full(BATCH, 16, np.int32)
    call = Call(new, own, seen, seen + 4)
    streams = {
        key: np.concatenate([x, y], axis=2)
        for (key, x), y in zip(streams.items(), stored(codec, NUMPY, LAYER, new).values(), strict=True)
    }
    positions = np.concatenate([positions, np.repeat(own[:, None], HEADS, axis=1)], axis=2)
    made, tables, _ = recoded(NUMPY, codec, streams, tables, positions, call, None)
    groups = len(kept) + 2
    assert (groups > 2 * -(-(len(kept) + 4) // 3)) == bool(again)
    assert (tables["keys.again"] == again).all()
    assert tables["keys.low"].shape[2] == (3 if again else groups)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("lost", [range(8), range(3, 8), ()], ids=["all", "most", "none"])
def test_a_layer_may_hold_nothing(again, lost):
    codec = Fifths(size=100, newest=4, again=again)
    streams, tables, positions, call = first_call(codec, 8, lost)
    gone = (positions[0, 0] < 0).all()
    for slots in (slice(0), slice(0, 1), slice(None)):
        part = {key: x[:, :, slots] for key, x in streams.items()}
        made, found, wrong = recoded(NUMPY, codec, part, tables, positions[:, :, slots], call, None)
        empty = gone or slots == slice(0)
        assert found["keys.low"].shape[2] == (0 if empty else 1)
        assert made[ROW].shape == (BATCH, HEADS, positions[:, :, slots].shape[2], 1)
        assert ((made[ROW][..., 0] == 0) == (positions[:, :, slots] >= 0)).all()
        assert not wrong.any()


def test_heads_of_which_a_group_cannot_be_coded_are_named():
    codec = Fifths(size=2, newest=4)
    streams, tables, positions, call = first_call(codec, 9, lost=(3,))
    call.new["keys"][2, 1, 6, 2] = np.inf
    call.new["keys"][0, 0, 3] = np.nan  # which is not there any more
    call.new["keys"][0, 0, 8] = np.nan  # and which stays exact
    with np.errstate(invalid="ignore"):
        _, _, wrong = recoded(NUMPY, codec, streams, tables, positions, call, None)
    assert wrong.tolist() == [False, True]


def test_more_groups_than_have_numbers_are_refused():
    """Where tables have a fixed number of rows, by naming the heads."""
    codec = Fifths(size=1, newest=1)
    given = first_call(codec, MOST_ROWS + 1, lost=(7,))
    made, found = (recoded(NUMPY, codec, *given, rows) for rows in (None, MOST_ROWS + 5))
    assert made[1]["keys.low"].shape[2] == found[1]["keys.low"].shape[2] == MOST_ROWS
    assert not made[2].any()
    assert not found[2].any()
    given = first_call(codec, MOST_ROWS + 1)
    with pytest.raises(KvtwinError, match="lie in 32768 groups; expected at most 32767: take larger groups"):
        recoded(NUMPY, codec, *given, None)
    assert recoded(NUMPY, codec, *given, MOST_ROWS + 5)[2].all()


@pytest.mark.parametrize("recent", [1, 2, 4, 6, 7])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 100])
def test_rows_are_enough_for_any_way_in_which_tokens_come(size, recent):
    """Where none goes: the most groups that whole runs of the newest can make, one after the other or together."""
    codec, most = Fifths(size=size, newest=recent), {0: 0}
    for runs in range(1, 5):
        most[runs] = max(most[first] + -(-(runs - first) * recent // size) for first in range(runs))
    for slots in range(4 * recent):
        assert most_rows(codec, slots, evicts=False) == most[slots // recent]
        assert most_rows(codec, slots, evicts=True) == slots
        fewer = most_rows(replace(codec, again=True), slots, evicts=True)
        assert fewer == min(slots, 2 * -(-slots // size))


def test_tables_keep_the_rows_of_heads_that_only_lost_tokens():
    """Each of seven tokens is the last of its group, and none is coded: more groups than twice what they need."""
    codec = Fifths(size=4, newest=4, again=True)
    streams, tables, positions, call = first_call(codec, 28)
    made, tables, _ = recoded(NUMPY, codec, streams, tables, positions, call, most_rows(codec, 28, True))
    left = {key: x[:, :, ::4] for key, x in (streams | made).items()}
    none = np.full((BATCH, 1), -1, np.int32)
    idle = Call({key: x[:, :, :1] for key, x in call.new.items()}, none, call.after, call.after)
    after, found, _ = recoded(
        NUMPY, codec, left, tables, positions[:, :, ::4], idle, most_rows(codec, 7, True)
    )
    assert (after[ROW][..., 0] == np.arange(7)).all()
    np.testing.assert_array_equal(found["keys.low"], tables["keys.low"][:, :, :7])


def test_rows_of_a_table_are_those_that_are_named():
    random = np.random.default_rng(7)
    table, row = random.standard_normal((BATCH, HEADS, 4, 5)), random.integers(-1, 4, (BATCH, HEADS, 6))
    owner = np.arange(BATCH * HEADS).reshape(BATCH, HEADS, 1)
    made = rows_of(NUMPY, {"keys.low": table, "keys.exact": table, "keys.again": table}, row, owner)
    assert made.keys() == {"low"}
    for place in np.ndindex(row.shape):
        np.testing.assert_array_equal(made["low"][place], table[place[:2]][max(0, row[place])])
    row = np.minimum(row, 0)  # an empty slot has either number
    assert (rows_of(NUMPY, {"keys.low": table[:, :, :0]}, row, owner)["low"] == 0).all()


def layer(seed: int) -> tuple[Fifths, dict, np.ndarray, dict, np.ndarray]:
    """A layer in which some tokens went and others are exact: codec, streams, positions, tables, and what was seen."""
    codec = Fifths(size=2, newest=4, again=True)
    streams, tables, positions, call = first_call(codec, 14)
    made, tables, _ = recoded(NUMPY, codec, streams, tables, positions, call, None)
    lost = np.random.default_rng(seed).random(positions.shape) < 0.4
    lost[..., 2:4] = True  # a whole group
    lost[0, 0, [9, 13]] = False, True  # the row of the newest was for position 9 before
    return codec, streams | made, np.where(lost, -1, positions).astype(np.int32), tables, call.after


def shuffled(seed: int, streams: dict, positions: np.ndarray, tables: dict) -> tuple[dict, np.ndarray, dict]:
    """Other slots for tokens, other rows for groups, in the same order, and anything where nothing lives."""
    random, slots = np.random.default_rng(seed), positions.shape[2]
    streams = {key: np.concatenate([x, x[:, :, :2]], axis=2) for key, x in streams.items()}
    positions = np.concatenate([positions, np.full_like(positions[:, :, :2], -1)], axis=2)
    tables = {key: x.copy() for key, x in tables.items()}
    groups = tables["keys.low"].shape[2]
    for key in ("keys.low", "keys.step", "keys.count"):
        old = tables[key]
        tables[key] = np.full((*old.shape[:2], groups + 3, old.shape[3]), 77, old.dtype)
    _, _, _, before, seen = layer(seed)
    for place in np.ndindex(BATCH, HEADS):
        order = random.permutation(slots + 2)
        positions[place] = positions[place][order]
        for x in streams.values():
            x[place] = x[place][order]
        into = np.sort(random.permutation(groups + 3)[:groups])
        for key in ("keys.low", "keys.step", "keys.count"):
            tables[key][place][into] = before[key][place]
        row = streams[ROW][place][:, 0]
        streams[ROW][place][:, 0] = np.where(row < 0, row, into[row])
        for side in ("keys", "values"):
            for position in range(seen[0] - 4, seen[0]):
                if position not in positions[place]:
                    tables[f"{side}.exact"][place][position % 4] = -9
    return streams, positions, tables


def test_a_snapshot_is_the_same_for_any_order_of_slots_and_any_rows_of_groups():
    codec, streams, positions, tables, seen = layer(4)

    def shot(streams: dict, positions: np.ndarray, tables: dict) -> LayerSnapshot:
        return canonical(streams, positions, {}, {}, None, None, tables, codec, seen)

    expected, found = shot(streams, positions, tables), shot(*shuffled(4, streams, positions, tables))
    np.testing.assert_array_equal(found.positions, expected.positions)
    for name in ("streams", "tables"):
        one, other = getattr(found, name), getattr(expected, name)
        same_bytes({"numpy": other, "shuffled": one})
    alive = [
        len({int(row) for row, here in zip(each[:, 0], at, strict=True) if row >= 0 and here >= 0})
        for each, at in zip(streams[ROW].reshape(-1, 14, 1), positions.reshape(-1, 14), strict=True)
    ]
    assert expected.tables["keys.low"].shape[2] == max(alive)
    for place, count in zip(np.ndindex(BATCH, HEADS), alive, strict=True):
        assert (expected.tables["keys.count"][place][:count] == 2).all()
        assert (expected.tables["keys.count"][place][count:] == 0).all()


def test_groups_tokens_and_bytes_are_counted_by_what_lives():
    codec, streams, positions, tables, seen = layer(8)
    groups, tokens, exact = set(), 0, 0
    for row, head, slot in np.ndindex(positions.shape):
        if positions[row, head, slot] < 0:
            continue
        exact += positions[row, head, slot] >= seen[row] - 4
        number = streams[ROW][row, head, slot, 0]
        if number >= 0:
            groups.add((row, head, number))
            tokens += 1
    tables["keys.again"][1, 1] = 3
    tables["keys.again"][2, 0] = 1
    assert counted(codec, streams, positions, tables) == Groups(len(groups), tokens, 2 * len(groups), 4)
    found = {key: (own, every) for key, own, every in table_bytes(codec, streams, positions, tables, seen)}
    vector, all_heads = WIDTH * 4, BATCH * HEADS
    assert found == {
        "keys.exact": (exact * vector, 4 * all_heads * vector),
        "values.exact": (exact * vector, 4 * all_heads * vector),
        "keys.low": (len(groups) * vector, 6 * all_heads * vector),
        "keys.step": (len(groups) * vector, 6 * all_heads * vector),
        "keys.count": (len(groups) * 4, 6 * all_heads * 4),
        "keys.again": (all_heads * 4, all_heads * 4),
    }
    assert list(table_bytes(replace(codec, newest=0), streams, positions, {}, seen)) == []
