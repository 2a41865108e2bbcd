"""A layer whose heads have different lengths, in pages (framework/pages.py)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import array_api_compat.torch as xp
import torch
from jaxtyping import Float, Int, Shaped

from backends.torch.layer import HeldLayer, LayerCache
from framework.arrays import by_position, take_slots
from framework.codec import Codec
from framework.coding import payload
from framework.pages import Pages, first_places, joined, owners, places, slots_of, taken
from framework.shapes import EMPTY
from framework.spec import Layer


class Shown(Mapping[str, torch.Tensor]):
    """Runs as `LayerCache` would have them, each made when it is read."""

    def __init__(self, layer: "PagedLayer", runs: dict[str, torch.Tensor]):
        self.layer, self.runs = layer, runs

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.layer.shown(self.runs[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self.runs)

    def __len__(self) -> int:
        return len(self.runs)


@dataclass
class PagedLayer(HeldLayer):
    """One layer as runs of places. `first`: where each head begins; `count`: its slots in use."""

    spec: Layer
    codec: Codec
    limit: int | None
    budget: Int[torch.Tensor, "batch kv_heads"]
    runs: dict[str, Shaped[torch.Tensor, "places width"]]
    marks: Int[torch.Tensor, "places"]
    notes: dict[str, Float[torch.Tensor, "places"]]
    first: Int[torch.Tensor, "batch kv_heads"]
    count: Int[torch.Tensor, "batch kv_heads"]
    heads: dict[str, Float[torch.Tensor, "batch kv_heads *rest"]]
    queries: Float[torch.Tensor, "batch kv_heads group window head_dim"] | None
    query_positions: Int[torch.Tensor, "batch window"] | None
    tables: dict[str, Shaped[torch.Tensor, "batch kv_heads rows _"]]
    layout: Pages
    slots: int
    used: int

    @property
    def streams(self) -> Mapping[str, torch.Tensor]:
        return Shown(self, self.runs)

    @property
    def positions(self) -> torch.Tensor:
        return self.shown(self.marks, EMPTY)

    @property
    def memory(self) -> Mapping[str, torch.Tensor]:
        return Shown(self, self.notes)

    @property
    def stored(self) -> dict[str, list[torch.Tensor]]:
        return {
            "payload": [value for key, value in self.runs.items() if payload(key)],
            "scales": [value for key, value in self.runs.items() if not payload(key)],
            "positions": [self.marks],
            "memory": list(self.notes.values()),
        }

    def restorable(self) -> "PagedLayer":
        return replace(self, runs=dict(self.runs), notes=dict(self.notes), marks=self.marks.clone())

    def shown(self, run: torch.Tensor, empty: float | int = 0) -> torch.Tensor:
        """One value for each place as `LayerCache` would have it."""
        return taken(xp, run, places(xp, self.first, self.layout, self.slots), empty)

    def put(
        self,
        streams: Mapping[str, torch.Tensor] | None = None,
        positions: torch.Tensor | None = None,
        memory: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.runs |= {key: self.run(value) for key, value in (streams or {}).items()}
        self.notes |= {key: self.run(value) for key, value in (memory or {}).items()}
        if positions is not None:
            self.marks = self.run(positions, EMPTY)

    def run(self, x: torch.Tensor, empty: float | int = 0) -> torch.Tensor:
        """What `LayerCache` has for each slot as one value for each place."""
        index = slots_of(xp, self.first, self.layout, x.shape[2])
        return taken(xp, joined(x, xp), index, empty)

    def gather(self, source: torch.Tensor, room: int, whole: bool) -> None:
        count = (source >= 0).sum(-1, dtype=torch.int32)
        if not whole:  # a row that kept all it has gathered may hold more than its share
            self.layout = enough(self.layout, count)
        first = first_places(xp, count, self.layout)
        old = torch.where(source < 0, -1, self.first[..., None] + source)
        index = taken(xp, joined(old, xp), slots_of(xp, first, self.layout, source.shape[-1]), -1)
        self.runs = {key: taken(xp, value, index, 0) for key, value in self.runs.items()}
        self.marks = taken(xp, self.marks, index, EMPTY)
        self.notes = {key: taken(xp, value, index, 0) for key, value in self.notes.items()}
        self.first, self.count, self.slots, self.used = first, count, source.shape[-1], room

    def append(
        self,
        new: dict[str, torch.Tensor],
        positions: torch.Tensor,
        start: Mapping[str, float | torch.Tensor],
    ) -> None:
        """Write one token of each row behind the last slot of its heads; -1 leaves a row as it is."""
        real = positions >= 0
        self._write(self.first + self.count, new, positions, start, real)
        self.count = self.count + real.to(torch.int32)
        self.used += 1
        self.slots = max(self.slots, self.used)

    def overwrite(
        self,
        new: dict[str, torch.Tensor],
        positions: torch.Tensor,
        start: Mapping[str, float | torch.Tensor],
    ) -> None:
        """Write one token into an empty slot of each row and head."""
        self.used += 1
        self.slots = max(self.slots, self.used)
        self._write(self.first + self.positions.argmin(-1), new, positions, start, positions >= 0)

    def _write(
        self, place: torch.Tensor, new: dict[str, torch.Tensor], positions: torch.Tensor,
        start: Mapping[str, float | torch.Tensor], real: torch.Tensor,
    ) -> None:  # fmt: skip
        place = place.to(torch.int64)
        real = real.expand(place.shape)

        def write(run: torch.Tensor, value: torch.Tensor) -> None:
            old, wide = run[place], real.view(*real.shape, *(1,) * (run.ndim - 1))
            run[place] = torch.where(wide, value.to(run.dtype), old)

        for key, value in new.items():
            write(self.runs[key], value[:, :, 0])
        write(self.marks, positions.expand(place.shape))
        for key, value in start.items():
            fresh = torch.as_tensor(value, dtype=self.notes[key].dtype, device=place.device)
            write(self.notes[key], (fresh[..., 0] if fresh.ndim else fresh).expand(place.shape))

    def paged(self) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
        """Streams [pages size width], positions [pages size], and the head that owns each page."""
        shape = (self.layout.count, self.layout.size)
        streams = {key: value.view(*shape, -1) for key, value in self.runs.items()}
        return streams, self.marks.view(shape), owners(xp, self.first, self.layout)


def enough(layout: Pages, count: Int[torch.Tensor, "batch kv_heads"]) -> Pages:
    """The layout with more pages where the heads hold more than their share."""
    needed = int(((count + layout.spare + layout.size - 1) // layout.size).sum())
    return replace(layout, count=max(layout.count, needed))


def opened(layer: LayerCache | PagedLayer) -> LayerCache:
    """The layer with all its heads as wide as the longest."""
    if isinstance(layer, LayerCache):
        return layer
    return LayerCache(
        layer.spec, layer.codec, layer.limit, layer.budget, dict(layer.streams), layer.positions, dict(layer.memory),
        layer.heads, layer.queries, layer.query_positions, layer.tables, fill=layer.used, used=layer.used,
    )  # fmt: skip


def closed(layer: LayerCache, layout: Pages, least: Int[torch.Tensor, "batch kv_heads"] | int) -> PagedLayer:
    """The layer in pages; each head has room for at least this many."""
    filled = layer.positions >= 0
    count = filled.sum(-1, dtype=torch.int32)
    if bool((filled & (torch.arange(layer.slots, device=count.device) >= count[..., None])).any()):
        # Rows that were given less than others have holes, and the next token is to go behind the last one.
        layer, order = replace(layer), by_position(xp, layer.positions)
        source = torch.where(take_slots(xp, layer.positions, order) >= 0, order, EMPTY)
        layer.gather(source, layer.used, whole=True)
    room = torch.maximum(count, torch.as_tensor(least, dtype=torch.int32, device=count.device))
    layout = enough(layout, room)
    made = PagedLayer(
        layer.spec, layer.codec, layer.limit, layer.budget, {}, layer.positions.flatten()[:0], {},
        first_places(xp, room, layout), count, layer.heads, layer.queries, layer.query_positions,
        layer.tables, layout, layer.slots, layer.used,
    )  # fmt: skip
    made.put(layer.streams, layer.positions, layer.memory)
    return made
