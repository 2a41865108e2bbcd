"""Keys in groups through hundreds of calls in which anything comes and goes, against a model of dictionaries."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import jax
import numpy as np
import pytest

from framework.codec import Codec
from framework.coding import SIDES, shown, stored
from framework.groups import (
    AGAIN,
    ROW,
    Call,
    exact_of,
    fixed_rows,
    most_rows,
    of_groups,
    recoded,
    tables_layout,
)
from tests.grouped import HEADS, LAYER, WIDTH, Fifths
from tests.libraries import LIBRARIES, same_bytes

NUMPY = LIBRARIES["numpy"][0]
BATCH = 3


@dataclass(eq=False)
class Group:
    """Keys that were coded together: what it has once, and how many they were."""

    low: np.ndarray
    step: np.ndarray
    count: int


@dataclass
class Token:
    """A key and a value as they came; once coded, the key as it reads, and its group."""

    key: np.ndarray
    value: np.ndarray
    group: Group | None = None


@dataclass
class Head:
    """What one head holds, by position."""

    tokens: dict[int, Token] = field(default_factory=dict)
    again: int = 0

    def groups(self) -> list[Group]:
        """Those with tokens, in the order of their positions."""
        found: list[Group] = []
        for position in sorted(self.tokens):
            group = self.tokens[position].group
            if group is not None and group not in found:
                found.append(group)
        return found

    def complete(self, codec: Fifths, seen: int) -> bool:
        """Code what lies before the last multiple of `newest`; False where there is nothing."""
        due: list[int] = []
        old: list[int] = []
        for position in sorted(self.tokens):
            if self.tokens[position].group is not None:
                old.append(position)
            elif position < seen // codec.newest * codec.newest:
                due.append(position)
        if codec.again and due:
            many = len(self.groups()) + -(-len(due) // codec.size)
            if many > 2 * -(-len(due + old) // codec.size):
                due, self.again = sorted(due + old), self.again + 1
        found = bool(due)
        while due:
            own, due = [self.tokens[position] for position in due[: codec.size]], due[codec.size :]
            low, step = np.zeros(WIDTH, np.float32), np.zeros(WIDTH, np.float32)
            for channel in range(WIDTH):
                numbers = [token.key[channel] for token in own]
                low[channel] = min(numbers)
                step[channel] = (max(numbers) - min(numbers)) / 4
            group = Group(low, step, len(own))
            for token in own:
                size = np.where(step == 0, np.float32(1), step)
                token.key, token.group = np.round((token.key - low) / size) * step + low, group
        return found

    def value(self, position: int, seen: int, codec: Fifths) -> np.ndarray:
        """As the model sees it."""
        value = self.tokens[position].value
        return value if position >= seen - codec.newest else np.round(value * 4) / 4


class Walk:
    """A layer through calls and evictions in which anything may come, and its model.

    `loses`: the share of tokens that go at most evictions. `slots`: a number that stays, and 3 tokens in every call,
    so that shapes stay as well; None: any.
    """

    def __init__(self, codec: Fifths, seed: int, loses: float = 0.3, slots: int | None = None) -> None:
        self.codec, self.random, self.loses, self.slots = codec, np.random.default_rng(seed), loses, slots
        self.heads = {place: Head() for place in np.ndindex(BATCH, HEADS)}
        self.seen = np.zeros(BATCH, np.int32)
        self.positions = np.full((BATCH, HEADS, slots or 0), -1, np.int32)
        none = np.zeros((BATCH, HEADS, slots or 0, WIDTH), np.float32)
        self.streams = stored(codec, NUMPY, LAYER, {"keys": none, "values": none})
        self.tables = {}
        for key, (one, kind) in tables_layout(codec, LAYER).items():
            rows = fixed_rows(codec, key)
            rows = (most_rows(codec, slots, True) if slots else 0) if rows is None else rows
            # A row of the newest for which there is no token may hold anything.
            filler = np.nan if kind is None else 0
            self.tables[key] = np.full((BATCH, one.heads, rows, one.width), filler, kind or np.float32)

    def append(self) -> Call:
        """Tokens come, in some rows none."""
        random = self.random
        most = 3 if self.slots else int(random.choice([1, 1, 1, 2, 5, 11]))
        came = random.random((BATCH, most)) < random.choice([0.5, 0.9, 1.0])
        came &= (random.random(BATCH) < 0.85)[:, None]
        after = (self.seen + came.sum(1)).astype(np.int32)
        positions = np.where(came, self.seen[:, None] + np.cumsum(came, axis=1) - 1, -1).astype(np.int32)
        keys, values = random.standard_normal((2, BATCH, HEADS, most, WIDTH)).astype(np.float32)
        keys *= 3
        keys[..., 2] = -1.5
        for row, column in np.argwhere(came):
            for head in range(HEADS):
                token = Token(keys[row, head, column], values[row, head, column])
                self.heads[row, head].tokens[int(positions[row, column])] = token
        new = {"keys": keys, "values": values}
        made = stored(self.codec, NUMPY, LAYER, new)
        self.streams = {key: np.concatenate([x, made[key]], axis=2) for key, x in self.streams.items()}
        wide = np.broadcast_to(positions[:, None], (BATCH, HEADS, most))
        self.positions = np.concatenate([self.positions, wide], axis=2)
        full = (self.seen // self.codec.recent < after // self.codec.recent).any()
        return Call(new, positions, self.seen, after, due=bool(full or self.slots or random.random() < 0.1))

    def lose(self) -> None:
        """Some tokens go, at times all of a head; the others move to other slots."""
        random, kept = self.random, {}
        for place, head in self.heads.items():
            part = self.loses * random.choice([0, 0, 1, 1, 3]) if random.random() < 0.97 else self.loses * 9
            held = [position for position in head.tokens if random.random() >= part][-(self.slots or 999) :]
            head.tokens = {position: head.tokens[position] for position in held}
            slots = np.flatnonzero(np.isin(self.positions[place], held))
            kept[place] = random.permutation(slots)
        wide = self.slots or max(map(len, kept.values())) + int(random.integers(0, 3))
        index = np.full((BATCH, HEADS, wide), -1)
        for place, slots in kept.items():
            index[place][random.permutation(wide)[: len(slots)]] = slots
        safe = np.where(index < 0, 0, index)  # an empty slot holds what some token held
        self.streams = {
            key: np.take_along_axis(x, safe[..., None], axis=2) for key, x in self.streams.items()
        }
        self.positions = np.where(index < 0, -1, np.take_along_axis(self.positions, safe, axis=2))

    def check(self, call: Call) -> None:
        """Every token reads as in the model."""
        exact = exact_of(NUMPY, self.codec, self.tables, self.positions, call)
        for side in SIDES:
            x = shown(self.codec, NUMPY, LAYER, self.streams, side, np.float32, self.tables, exact)
            expected = np.zeros_like(x)
            for place, head in self.heads.items():
                seen, here = int(call.before[place[0]]), self.positions[place].tolist()
                assert sorted(one for one in here if one >= 0) == sorted(head.tokens)
                for position, token in head.tokens.items():
                    read = token.key if side == "keys" else head.value(position, seen, self.codec)
                    expected[place][here.index(position)] = read
            x = np.where(self.positions[..., None] < 0, 0, x)
            np.testing.assert_array_equal(x, expected, side)

    def check_groups(self) -> None:
        """The numbers of groups after a coding, and what groups have once."""
        for (row, number), head in self.heads.items():
            groups = head.groups()
            for slot, position in enumerate(self.positions[row, number]):
                group = head.tokens[int(position)].group if position >= 0 else None
                expected = -1 if group is None else groups.index(group)
                assert self.streams[ROW][row, number, slot, 0] == expected
            for index, group in enumerate(groups):
                once = {key: x[row, number, index] for key, x in of_groups(self.tables).items()}
                assert once["keys.count"] == group.count
                np.testing.assert_array_equal(np.roll(once["keys.low"], 1) * 2, group.low)
                np.testing.assert_array_equal(np.roll(once["keys.step"], 1) * 2, group.step)

    def call(self, recode: Callable[..., Any]) -> None:
        """One call; `recode` is `recoded`."""
        call = self.append()
        self.check(call)
        self.lose()
        streams, self.tables, wrong = recode(self.streams, self.tables, self.positions, call)
        self.streams |= streams
        assert not wrong.any()
        most = most_rows(self.codec, self.positions.shape[2], self.loses > 0)
        for place, head in self.heads.items():
            if head.complete(self.codec, int(call.after[place[0]])):
                assert len(head.groups()) <= most
            if self.codec.again:
                assert self.tables[AGAIN][place] == head.again
        self.seen = call.after
        nothing = np.zeros((BATCH, HEADS, 1, WIDTH), np.float32)
        none = np.full((BATCH, 1), -1, np.int32)
        self.check(Call({"keys": nothing, "values": nothing}, none, self.seen, self.seen))
        if call.due and self.positions.shape[2]:
            self.check_groups()
            most = max(len(head.groups()) for head in self.heads.values())
            assert all(self.slots or x.shape[2] == most for x in of_groups(self.tables).values())


def in_library(library: str, codec: Codec, rows: int | None = None) -> Callable[..., Any]:
    """`recoded` in a library, NumPy in and out."""
    xp, array = LIBRARIES[library]

    def recode(streams: Any, tables: Any, positions: Any, call: Call) -> Any:
        given = streams, tables, positions, call.new, call.positions, call.before, call.after
        with np.errstate(invalid="ignore"):  # where no token is
            made = run(*jax.tree.map(array, given), due=call.due)
        return jax.tree.map(np.asarray, made)

    def run(streams: Any, tables: Any, positions: Any, *call: Any, due: bool) -> Any:
        return recoded(xp, codec, streams, tables, positions, Call(*call, due=due), rows)

    run = jax.jit(run, static_argnames="due") if library == "jax" else run
    return recode


def both(codec: Codec) -> Callable[..., Any]:
    """`recoded` of NumPy, and at times the same bytes from torch."""
    number = count()

    def recode(*given: Any) -> Any:
        made = in_library("numpy", codec)(*given)
        if next(number) % 10 == 0:
            other = in_library("torch", codec)(*given)
            one, two = ({**x[0], **x[1], "wrong": x[2]} for x in (made, other))
            same_bytes({"numpy": one, "torch": two})
        return made

    return recode


SHAPES = [(3, 4), (1, 1), (2, 4), (5, 2), (100, 4), (4, 4), (3, 7)]
every_shape = pytest.mark.parametrize(("size", "newest"), SHAPES)


@pytest.mark.parametrize("again", [False, True])
@every_shape
def test_every_token_reads_as_in_the_model(size: int, newest: int, again: bool) -> None:
    codec = Fifths(size=size, newest=newest, again=again)
    walk = Walk(codec, seed=1)
    for _ in range(40):
        walk.call(both(codec))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 12))
@pytest.mark.parametrize("again", [False, True])
@every_shape
def test_every_token_reads_as_in_the_model_on_other_walks(
    size: int, newest: int, again: bool, seed: int
) -> None:
    codec = Fifths(size=size, newest=newest, again=again)
    walk = Walk(codec, seed)
    for _ in range(100):
        walk.call(both(codec))


@every_shape
def test_where_nothing_is_evicted_fewer_rows_are_enough(size: int, newest: int) -> None:
    walk = Walk(Fifths(size=size, newest=newest), seed=4, loses=0)
    for _ in range(12):
        walk.call(in_library("numpy", walk.codec))


@pytest.mark.parametrize("again", [False, True])
def test_compiled_tables_keep_their_size_and_every_token_reads_as_in_the_model(again: bool) -> None:
    codec = Fifths(size=4, newest=4, again=again)
    walk = Walk(codec, seed=3, loses=0.3, slots=11)
    recode = in_library("jax", codec, most_rows(codec, walk.slots or 0, True))
    for _ in range(30):
        walk.call(recode)
    assert not again or any(head.again for head in walk.heads.values())
