"""What the reference holds: a list of rows, each head of a row with its own list of tokens, without padding."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from framework.cache import Bytes, Cache
from framework.codec import Codec, Side, codecs
from framework.coding import SIDES, payload
from framework.eviction import merged
from framework.groups import AGAIN, ROW, asked, fixed_rows, of_groups, tables_layout
from framework.policy import Policy, View, name
from framework.snapshot import LayerSnapshot, Snapshot, canonical
from framework.spec import ModelSpec


@dataclass
class Head:
    """What one kv head of one row holds, in position order; `memory` per slot and, in `own`, of the head.

    `streams`: keys and values as the model sees them. `coded`: what a codec made of them, the first head having it for
    all where they are coded as one; empty without a codec. Under a codec that keeps the newest tokens exact, `keys` are
    the keys as they are stored, `groups` what each group of them has once, and `again` how often they were coded again.
    """

    positions: np.ndarray
    streams: dict[str, np.ndarray]
    memory: dict[str, np.ndarray]
    own: dict[str, np.ndarray]
    coded: dict[str, np.ndarray] = field(default_factory=dict)
    keys: np.ndarray | None = None
    groups: list[dict[str, np.ndarray]] = field(default_factory=list)
    again: int = 0


@dataclass
class Row:
    """One sequence: `heads[layer][kv_head]`, and per layer the newest queries with their positions."""

    heads: list[list[Head]]
    queries: list[np.ndarray]
    query_positions: list[np.ndarray]
    seen: int = 0
    dropped: int = 0


@dataclass(repr=False, eq=False)
class ReferenceCache(Cache):
    """A list of rows."""

    spec: ModelSpec
    policy: Policy
    codec: Codec
    budgets: list[np.ndarray | None]
    content: list[Row]
    question: np.ndarray
    capacity: int | None = None
    length: int | None = None
    steps: int = 0
    pending: bool = False
    singles: int = 0
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    consumed: bool = False

    @property
    def batch(self) -> int:
        return len(self.content)

    @property
    def seen(self) -> np.ndarray:
        self.alive()
        return np.array([row.seen for row in self.content], np.int32)

    @property
    def bytes(self) -> Bytes:
        self.alive()
        heads = [head for row in self.content for layer in row.heads for head in layer]
        held = [each for head in heads for each in self.held(head).items()]
        beside = [
            each
            for row in self.content
            for index, heads in enumerate(row.heads)
            for head in heads
            for each in self.tables(index, head, row.seen).items()
        ]
        newest = [
            head.streams[side][head.positions >= row.seen - self.codec.recent]
            for row in self.content
            for heads in row.heads
            for head in heads
            for side in SIDES
            if self.codec.recent
        ]
        return Bytes(
            payload=sum(x.nbytes for key, x in held if payload(key)) + sum(x.nbytes for x in newest),
            scales=sum(x.nbytes for key, x in [*held, *beside] if not payload(key)),
            positions=sum(head.positions.nbytes for head in heads),
            memory=sum(x.nbytes for head in heads for x in [*head.memory.values(), *head.own.values()]),
            queries=sum(x.nbytes for row in self.content for x in [*row.queries, *row.query_positions]),
            padding=0,
        )

    def held(self, head: Head) -> dict[str, np.ndarray]:
        """The streams of a head as they are stored."""
        return head.streams if self.codec.exact else head.coded

    def tables(self, index: int, head: Head, seen: int) -> dict[str, np.ndarray]:
        """What stands beside the slots of a head: `framework/groups.py`."""
        layer, result = self.spec.layers[index], {}
        for key, (stream, kind) in tables_layout(self.codec, layer).items():
            rows = fixed_rows(self.codec, key)
            table = np.zeros((len(head.groups) if rows is None else rows, stream.width), kind or np.float64)
            if key == AGAIN:
                table[:] = head.again
            elif rows is None:
                for number, group in enumerate(head.groups):
                    table[number] = group[key.removeprefix("keys.")]
            else:
                assert head.keys is not None
                stored = head.keys if key.startswith("keys") else head.streams["values"]
                for slot, position in enumerate(head.positions):
                    if position >= seen - rows:
                        table[position % rows] = stored[slot]
            result[key] = table
        return result

    def snapshot(self) -> Snapshot:
        self.alive()
        layers = []
        for index in range(len(self.spec.layers)):
            grid = [row.heads[index] for row in self.content]
            first = grid[0][0]
            newest = asked(self.policy, self.codec) > 0
            tables = [
                [self.tables(index, head, row.seen) for head in row.heads[index]] for row in self.content
            ]
            layers.append(
                canonical(
                    {
                        key: stack(
                            [[held[key] for head in row if key in (held := self.held(head))] for row in grid]
                        )
                        for key in self.held(first)
                    },
                    stack([[head.positions for head in row] for row in grid], -1),
                    {
                        key: stack([[head.memory[key] for head in row] for row in grid])
                        for key in first.memory
                    },
                    {key: np.array([[head.own[key] for head in row] for row in grid]) for key in first.own},
                    np.stack([row.queries[index] for row in self.content]) if newest else None,
                    np.stack([row.query_positions[index] for row in self.content]) if newest else None,
                    {key: stack([[one[key] for one in each] for each in tables]) for key in tables[0][0]},
                    self.codec,
                    self.seen,
                )
            )
        return Snapshot(
            spec=self.spec,
            policy=name(self.policy),
            codec=codecs.spelling(self.codec),
            dtype="float64",
            layers=tuple(layers),
            seen=self.seen,
            dropped=self.last_eviction,
            question=self.question.copy(),
            budgets=tuple(self.budgets),
            steps=self.steps,
            pending=self.pending,
            capacity=self.capacity,
            length=self.length,
        )

    @property
    def last_eviction(self) -> np.ndarray:
        return np.array([row.dropped for row in self.content], np.int32)

    def fork(self, rows: int = 1) -> "ReferenceCache":
        self.check_fork(rows)
        return self._gather(list(range(self.batch)) * rows)

    def rows(self, index: Sequence[int]) -> "ReferenceCache":
        self.check_rows(index)
        return self._gather(list(index))

    def _gather(self, index: list[int]) -> "ReferenceCache":
        content = [copy.deepcopy(self.content[row]) for row in index]
        budgets = [None if each is None else each[index] for each in self.budgets]
        return replace(self, content=content, budgets=budgets, question=self.question[index])

    def until(self, seen: np.ndarray) -> "ReferenceCache":
        result = self.fork()
        result.question = self.marked_until(seen)
        for row, count in zip(result.content, seen, strict=True):
            row.seen = int(count)
            for heads in row.heads:
                for head in heads:
                    select(head, np.flatnonzero(head.positions < count))
        return result


def select(head: Head, index: np.ndarray) -> None:
    """Keep the slots `index` of a head, in this order, and drop the others."""
    head.positions = head.positions[index]
    head.streams = {key: value[index] for key, value in head.streams.items()}
    head.coded = {key: value[index] for key, value in head.coded.items()}
    head.keys = None if head.keys is None else head.keys[index]
    head.memory = {key: value[index] for key, value in head.memory.items()}


def stack(grid: list[list[np.ndarray]], empty: float | int = 0) -> np.ndarray:
    """Arrays [row][head] of different lengths as one array [row head slots ...], padded with `empty`."""
    wide = max(x.shape[0] for row in grid for x in row)
    result = np.full((len(grid), len(grid[0]), wide, *grid[0][0].shape[1:]), empty, grid[0][0].dtype)
    for index, row in enumerate(grid):
        for number, x in enumerate(row):
            result[index, number, : x.shape[0]] = x
    return result


def restored_head(
    layer: LayerSnapshot, streams: dict[Side, np.ndarray], row: int, head: int, codec: Codec
) -> Head:
    """One head of one row of a snapshot; `streams` are the layer's as they are stored, in float64."""
    filled = layer.positions[row, head] >= 0
    groups = of_groups(layer.tables)
    used = layer.streams[ROW][row, head, filled].max(initial=-1) + 1 if codec.together else 0
    return Head(
        layer.positions[row, head][filled],
        {key: value[row, head][filled].astype(np.float64) for key, value in streams.items()},
        {key: value[row, head][filled].astype(np.float64) for key, value in layer.memory.items()},
        {key: np.asarray(value[row, head], np.float64) for key, value in layer.heads.items()},
        {}
        if codec.exact
        else {key: x[row, head][filled] for key, x in layer.streams.items() if head < x.shape[1]},
        streams["keys"][row, head][filled].astype(np.float64) if codec.recent else None,
        [
            {key.removeprefix("keys."): x[row, head, number] for key, x in groups.items()}
            for number in range(used)
        ],
        int(layer.tables[AGAIN][row, head, 0, 0]) if codec.regroups else 0,
    )


def merge_heads(policy: Policy, view: View, heads: list[Head], chosen: list[np.ndarray]) -> None:
    """Write what the policy makes of the kept slots' keys and values where they stand, and of its head memory."""
    keys, values, memory = merged(policy, view, stack([chosen], -1))
    for which, (head, slots) in enumerate(zip(heads, chosen, strict=True)):
        head.own |= {key: np.asarray(value[0, which]) for key, value in memory.items()}
        head.streams["keys"][slots] = keys[0, which, : len(slots)]
        head.streams["values"][slots] = values[0, which, : len(slots)]
