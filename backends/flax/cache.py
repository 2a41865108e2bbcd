"""The fixed-size cache: its buffers' shapes never change inside a compiled loop."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Int

from backends.flax.convert import precision, to_jax, to_numpy
from backends.flax.layer import Held, Plan, opened, packed, without
from backends.flax.pages import PagedState, closed
from backends.flax.sharding import check_cache, placed
from framework.cache import Bytes, Cache
from framework.codec import Codec, codecs
from framework.coding import payload
from framework.eviction import overwrites
from framework.groups import table_bytes
from framework.pages import Pages
from framework.policy import Policy, name
from framework.shapes import bucket
from framework.snapshot import Snapshot, canonical
from framework.spec import ModelSpec


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What the compiled functions take and give back. `bad`: some score was NaN. `unfit`: heads of each layer that made
    what cannot be coded; empty without a codec."""

    layers: list[Held]
    seen: Int[jax.Array, "batch"]
    dropped: Int[jax.Array, "batch"]
    bad: Bool[jax.Array, ""]
    unfit: list[Bool[jax.Array, "kv_heads"]]


@dataclass(repr=False, eq=False)
class FlaxCache(Cache):
    """Buffers of one batch, with what each row has seen.

    `used` bounds the tokens that a head of an unbounded layer holds; `room` is what `expect` announced.
    """

    spec: ModelSpec
    policy: Policy
    codec: Codec
    dtype: str
    budgets: list[np.ndarray | None]
    state: State
    row_seen: np.ndarray
    question: np.ndarray
    capacity: int | None = None
    length: int | None = None
    steps: int = 0
    pending: bool = False
    singles: int = 0
    used: int = 0
    room: int = 0
    constants: dict[str, jax.Array] = field(default_factory=dict)
    mesh: Mesh | None = None
    consumed: bool = False

    @property
    def batch(self) -> int:
        return len(self.row_seen)

    @property
    def seen(self) -> np.ndarray:
        self.alive()
        return self.row_seen.copy()

    @property
    def plan(self) -> Plan:
        """The static part."""
        bounded = tuple(self.limit(index) is not None for index in range(len(self.spec.layers)))
        return Plan(self.spec, replace(self.policy, budget=None), self.codec, bounded, self.mesh)

    def consume(self) -> None:
        """Mark this cache as used up and let go of its buffers."""
        super().consume()
        del self.state

    def expect(self, tokens: int) -> None:
        """Tokens that will follow the next call: buffers that grow are sized for them at once, in steps of 512."""
        self.room = -(-tokens // 512) * 512

    def slots(self, index: int, tokens: int = 0) -> int:
        """Slots of a layer for steady decode or, where nothing is evicted, for `tokens` tokens and the announced ones.

        Budgets of one bucket have the same slots, and so the same compiled step.
        """
        bound = self.limit(index)
        if bound is not None:
            return bucket(bound) + (1 if overwrites(self.policy, True) else 2 * self.policy.interval)
        return self.capacity if self.capacity is not None else bucket(tokens + self.room)

    def pages(self, index: int) -> Pages | None:
        """How a layer is laid out whose heads differ; None for heads of one length.

        Over several devices heads have one length: a shape is the same on all of them, and pages that rows and heads
        share would have to be on each.
        """
        return None if self.mesh is not None else self.laid_out(index, self.slots(index))

    def settled(self) -> "FlaxCache":
        """This cache with every layer in the form that it rests in."""
        if not self.pending:
            layers = [self.settle(index, layer) for index, layer in enumerate(self.state.layers)]
            self.state = replace(self.state, layers=layers)
        self.state = placed(self.mesh, self.state)
        return self

    def settle(self, index: int, layer: Held, slots: int = 0) -> Held:
        """A layer in the form that it rests in; pages have room for heads of this many slots, and for all they hold."""
        layout, least = self.pages(index), self.least(index)
        if layout is None:
            return layer
        with precision(self.dtype):
            held = opened(layer)
            count = np.maximum(to_numpy((held.positions >= 0).sum(axis=-1)), least)
            needed = int((-(-(count + 2 * layout.spare) // layout.size)).sum())
            layout = replace(layout, count=max(layout.count, needed))
            if isinstance(layer, PagedState) and layer.slots >= slots and layer.layout.count >= layout.count:
                return layer
            return closed(packed(held, max(slots, layer.slots)), layout, least)

    def least(self, index: int) -> np.ndarray | int:
        """What each head of a layer in pages has room for at least: its budget, where nothing moves any more."""
        budget = self.budgets[index]
        return budget if budget is not None and overwrites(self.policy, True) else 0

    @property
    def bytes(self) -> Bytes:
        self.alive()
        totals = dict.fromkeys(("payload", "scales", "positions", "memory", "queries", "padding"), 0)
        for layer in self.state.layers:
            [positions] = layer.stored["positions"]
            filled = int((to_numpy(positions) >= 0).sum())
            for key, arrays in layer.stored.items():
                every = sum(x.nbytes for x in arrays)
                own = every * filled // max(positions.size, 1)
                totals[key] += own
                totals["padding"] += every - own
            if isinstance(layer, PagedState):
                totals["positions"] += layer.first.nbytes + layer.count.nbytes
            if self.codec.recent:
                with precision(self.dtype):
                    streams, positions = layer.streams, layer.positions
                for key, own, every in table_bytes(
                    self.codec, streams, positions, layer.tables, self.row_seen
                ):
                    totals["payload" if payload(key) else "scales"] += own
                    totals["padding"] += every - own
            totals["memory"] += sum(x.nbytes for x in layer.heads.values())
            totals["queries"] += sum(
                x.nbytes for x in (layer.queries, layer.query_positions) if x is not None
            )
        return Bytes(**totals)

    def snapshot(self) -> Snapshot:
        self.alive()
        with precision(self.dtype):
            held = [opened(layer) for layer in self.state.layers]
        layers = tuple(
            canonical(
                {key: to_numpy(value) for key, value in layer.streams.items()},
                to_numpy(layer.positions),
                {key: to_numpy(value) for key, value in layer.memory.items()},
                {key: to_numpy(value) for key, value in layer.heads.items()},
                None if layer.queries is None else to_numpy(layer.queries),
                None if layer.query_positions is None else to_numpy(layer.query_positions),
                {key: to_numpy(value) for key, value in layer.tables.items()},
                self.codec,
                self.row_seen,
            )
            for layer in held
        )
        return Snapshot(
            spec=self.spec,
            policy=name(self.policy),
            codec=codecs.spelling(self.codec),
            dtype=self.dtype,
            layers=layers,
            seen=self.row_seen.copy(),
            dropped=self.last_eviction,
            question=self.question.copy(),
            budgets=tuple(self.budgets),
            steps=self.steps,
            pending=self.pending,
            capacity=self.capacity,
            length=self.length,
        )

    def fork(self, rows: int = 1) -> "FlaxCache":
        self.check_fork(rows)
        return self._gather(list(range(self.batch)) * rows)

    def rows(self, index: Sequence[int]) -> "FlaxCache":
        self.check_rows(index)
        return self._gather([row % self.batch for row in index])

    def _gather(self, index: list[int]) -> "FlaxCache":
        check_cache(self.mesh, len(index), self.codec, self.spec)
        pick = np.array(index, np.int32)
        with precision(self.dtype):
            state = replace(self.state, layers=list(map(opened, self.state.layers)))
            layers = jax.tree.map(
                lambda x: jnp.array(x, copy=True) if x.ndim == 0 else jnp.take(x, pick, axis=0), state.layers
            )
            rows_of = {key: jnp.take(getattr(state, key), pick, axis=0) for key in ("seen", "dropped")}
            fresh = {"bad": jnp.array(state.bad, copy=True), "unfit": [jnp.array(x) for x in state.unfit]}
            state = replace(state, layers=layers, **rows_of, **fresh)
        budgets = [None if each is None else each[pick] for each in self.budgets]
        rows = {key: getattr(self, key)[pick] for key in ("row_seen", "question")}
        return replace(self, state=state, budgets=budgets, **rows).settled()

    @property
    def last_eviction(self) -> np.ndarray:
        return to_numpy(self.state.dropped)

    def until(self, seen: np.ndarray) -> "FlaxCache":
        result = self.fork()
        result.row_seen, result.question = seen.astype(np.int32), self.marked_until(seen)
        with precision(self.dtype):
            end = to_jax(result.row_seen)
            layers: list[Held] = [without(opened(layer), end) for layer in result.state.layers]
        # Every step takes a slot in all rows, so that ragged rows reach further than any has seen.
        result.used = max([int(seen.max()), *(int(layer.fill) for layer in layers)])
        result.state = replace(result.state, layers=layers, seen=end)
        return result.settled()
