"""A layer whose heads have different lengths, in pages: the buffers of framework/pages.py, whose shapes stay."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Shaped

from framework.coding import payload
from framework.pages import Pages, first_places, joined, owners, places, slots_of, taken
from framework.shapes import EMPTY


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedState:
    """Buffers of one layer as runs of places. `first`: where each head begins; `count`: its slots in use.

    `streams`, `positions` and `memory` show them as `LayerState` has them, `slots` wide; what is not read is not made.
    """

    runs: dict[str, Shaped[jax.Array, "places width"]]
    marks: Int[jax.Array, "places"]
    notes: dict[str, Float[jax.Array, "places"]]
    first: Int[jax.Array, "batch kv_heads"]
    count: Int[jax.Array, "batch kv_heads"]
    heads: dict[str, Float[jax.Array, "batch kv_heads *rest"]]
    queries: Float[jax.Array, "batch kv_heads group window head_dim"] | None
    query_positions: Int[jax.Array, "batch window"] | None
    tables: dict[str, Shaped[jax.Array, "batch kv_heads rows _"]]
    layout: Pages = field(metadata={"static": True})
    slots: int = field(metadata={"static": True})

    @property
    def fill(self) -> Int[jax.Array, ""]:
        """The slots in use of the longest head."""
        return jnp.max(self.count)

    @property
    def streams(self) -> dict[str, Shaped[jax.Array, "batch kv_heads slots width"]]:
        return {key: self.shown(value, 0) for key, value in self.runs.items()}

    @property
    def positions(self) -> Int[jax.Array, "batch kv_heads slots"]:
        return self.shown(self.marks, EMPTY)

    @property
    def memory(self) -> dict[str, Float[jax.Array, "batch kv_heads slots"]]:
        return {key: self.shown(value, 0) for key, value in self.notes.items()}

    @property
    def stored(self) -> dict[str, list[jax.Array]]:
        """The buffers themselves, by what they hold."""
        return {
            "payload": [value for key, value in self.runs.items() if payload(key)],
            "scales": [value for key, value in self.runs.items() if not payload(key)],
            "positions": [self.marks],
            "memory": list(self.notes.values()),
        }

    @property
    def overflows(self) -> Bool[jax.Array, ""]:
        """True if the heads hold more than there are pages for: something is lost."""
        free = places(jnp, self.first, self.layout, self.slots) >= 0
        return jnp.any(jnp.sum(free, axis=-1) < self.count)

    def shown(
        self, run: Shaped[jax.Array, "places *rest"], empty: float | int = 0
    ) -> Shaped[jax.Array, "batch kv_heads slots *rest"]:
        """One value for each place as `LayerState` would have it."""
        return taken(jnp, run, places(jnp, self.first, self.layout, self.slots), empty)

    def put(
        self,
        streams: Mapping[str, jax.Array] | None = None,
        positions: jax.Array | None = None,
        memory: Mapping[str, jax.Array] | None = None,
        **rest: Any,
    ) -> "PagedState":
        """The layer with these in the place of its own, given as `LayerState` has them."""
        index = slots_of(jnp, self.first, self.layout, self.slots)

        def run(x: jax.Array, empty: float | int) -> jax.Array:
            return taken(jnp, joined(x, jnp), index, empty)

        return replace(
            self,
            runs=self.runs | {key: run(value, 0) for key, value in (streams or {}).items()},
            marks=self.marks if positions is None else run(positions, EMPTY),
            notes=self.notes | {key: run(value, 0) for key, value in (memory or {}).items()},
            **rest,
        )

    def gathered(self, source: Int[jax.Array, "batch kv_heads slots"]) -> "PagedState":
        """The layer with the slots that `source` names, -1 giving an empty one; pages change hands as needed."""
        count = jnp.sum(source >= 0, axis=-1, dtype=jnp.int32)
        first = first_places(jnp, count, self.layout)
        old = jnp.where(source < 0, -1, self.first[..., None] + source)
        index = taken(jnp, joined(old, jnp), slots_of(jnp, first, self.layout, source.shape[-1]), -1)
        return replace(
            self,
            runs={key: taken(jnp, value, index, 0) for key, value in self.runs.items()},
            marks=taken(jnp, self.marks, index, EMPTY),
            notes={key: taken(jnp, value, index, 0) for key, value in self.notes.items()},
            first=first,
            count=count,
        )

    def append_one(
        self,
        new: Mapping[str, jax.Array],
        position: Int[jax.Array, "batch kv_heads 1"],
        fresh: Mapping[str, jax.Array],
    ) -> "PagedState":
        """The layer with one token per row behind the last slot of each head; -1 leaves a row as it is."""
        real = position[..., 0] >= 0
        place = jnp.where(real, self.first + self.count, self.layout.places)
        return replace(self._written(place, new, position, fresh), count=self.count + real.astype(jnp.int32))

    def overwrite(
        self,
        new: Mapping[str, jax.Array],
        position: Int[jax.Array, "batch kv_heads 1"],
        fresh: Mapping[str, jax.Array],
    ) -> "PagedState":
        """The layer with one token per row in an empty slot of each head."""
        place = self.first + jnp.argmin(self.positions, axis=-1).astype(jnp.int32)
        return self._written(place, new, position, fresh)

    def _written(
        self, place: jax.Array, new: Mapping[str, jax.Array], position: jax.Array, fresh: Mapping[str, jax.Array]
    ) -> "PagedState":  # fmt: skip
        flat = place.reshape(-1)

        def write(run: jax.Array, value: jax.Array) -> jax.Array:
            return run.at[flat].set(value.reshape(-1, *run.shape[1:]).astype(run.dtype), mode="drop")

        return replace(
            self,
            runs={key: write(self.runs[key], value) for key, value in new.items()},
            marks=write(self.marks, position),
            notes={key: write(self.notes[key], value) for key, value in fresh.items()},
        )

    def paged(self) -> tuple[dict[str, jax.Array], Int[jax.Array, "pages size"], Int[jax.Array, "pages"]]:
        """Streams and positions by page, and the head that owns each page."""
        shape = (self.layout.count, self.layout.size)
        streams = {key: value.reshape(*shape, -1) for key, value in self.runs.items()}
        return streams, self.marks.reshape(shape), owners(jnp, self.first, self.layout)


def closed(layer: Any, layout: Pages, least: Int[Any, "batch kv_heads"] | int) -> PagedState:
    """A layer whose tokens are in position order, in pages; each head has room for at least this many."""
    count = jnp.sum(layer.positions >= 0, axis=-1, dtype=jnp.int32)
    empty = PagedState(
        runs={},
        marks=jnp.zeros(0, jnp.int32),
        notes={},
        first=first_places(jnp, jnp.maximum(count, least), layout),
        count=count,
        heads=layer.heads,
        queries=layer.queries,
        query_positions=layer.query_positions,
        tables=layer.tables,
        layout=layout,
        slots=layer.slots,
    )
    return empty.put(layer.streams, layer.positions, layer.memory)
