"""The dynamic cache: its layers free what they drop, also where the heads of one differ."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from backends.torch.convert import to_numpy
from backends.torch.layer import LayerCache
from backends.torch.pages import PagedLayer, closed, opened
from backends.torch.share import Share
from framework.cache import Bytes, Cache
from framework.codec import Codec, codecs
from framework.coding import payload
from framework.eviction import UNLIMITED, overwrites
from framework.groups import table_bytes
from framework.pages import Pages
from framework.policy import Policy, name
from framework.shapes import EMPTY
from framework.snapshot import Snapshot, canonical
from framework.spec import ModelSpec


@dataclass(repr=False, eq=False)
class TorchCache(Cache):
    """Layers of one batch, with what each row has seen. `step`: what last decoded it on buffers that stay, to be used
    again while these are still its own.

    Over a mesh each process holds its own kv heads. `bytes` are those of this process; `kept`, `save`, `fork` and all
    else that shows or changes a cache are calls that every process makes, and `kept` and `save` are of all heads. Heads
    of different lengths do not lie in pages there: what the shorter ones leave free is `padding`.
    """

    spec: ModelSpec
    policy: Policy
    codec: Codec
    dtype: str
    budgets: list[np.ndarray | None]
    layers: list[LayerCache | PagedLayer]
    row_seen: np.ndarray
    dropped: torch.Tensor
    question: np.ndarray
    capacity: int | None = None
    length: int | None = None
    steps: int = 0
    pending: bool = False
    singles: int = 0
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    layouts: list[Pages | None] = field(default_factory=list)
    consumed: bool = False
    step: Any = None

    @property
    def batch(self) -> int:
        return len(self.row_seen)

    @property
    def share(self) -> Share:
        """Which kv heads this process holds."""
        return self.layers[0].share

    @property
    def seen(self) -> np.ndarray:
        self.alive()
        return self.row_seen.copy()

    def overwrites(self, layer: LayerCache | PagedLayer) -> bool:
        """True where decode puts a token into an emptied slot."""
        return overwrites(self.policy, layer.limit is not None)

    def allot(self, statistics: Sequence[np.ndarray]) -> None:
        super().allot(statistics)
        self.layers = [replace(opened(layer)) for layer in self.layers]
        self.bind()

    def bind(self) -> None:
        """Hand each layer its limit and its budgets, on its device, and see which are to lie in pages."""
        alone = self.share.count == 1
        self.layouts = [
            self.laid_out(index, (self.limit(index) or 0) + self.policy.interval) if alone else None
            for index in range(len(self.layers))
        ]
        for index, (layer, budget) in enumerate(zip(self.layers, self.budgets, strict=True)):
            layer.limit, shape = self.limit(index), (self.batch, self.spec.layers[index].kv_heads)
            numbers = np.full(shape, UNLIMITED) if budget is None else budget
            layer.budget = torch.as_tensor(numbers, dtype=torch.int32, device=self.dropped.device)

    def settle(self) -> None:
        """Bring every layer into the form that it rests in."""
        for index, layer in enumerate(self.layers):
            layout = None if self.pending else self.layouts[index]
            if layout is not None and isinstance(layer, LayerCache):
                self.layers[index] = closed(layer, layout, layer.budget if self.overwrites(layer) else 0)

    def open(self) -> None:
        """Make all heads of each layer as wide as the longest."""
        self.layers = [opened(layer) for layer in self.layers]

    @property
    def bytes(self) -> Bytes:
        self.alive()
        totals = dict.fromkeys(("payload", "scales", "positions", "memory", "queries", "padding"), 0)
        for layer in self.layers:
            [positions] = layer.stored["positions"]
            filled = int((positions >= 0).sum())
            for key, tensors in layer.stored.items():
                every = sum(x.nbytes for x in tensors)
                own = every * filled // max(positions.numel(), 1)
                totals[key] += own
                totals["padding"] += every - own
            if isinstance(layer, PagedLayer):
                totals["positions"] += layer.first.nbytes + layer.count.nbytes
            for key, own, every in table_bytes(
                self.codec, layer.streams, layer.positions, layer.tables, self.row_seen
            ):
                totals["payload" if payload(key) else "scales"] += own
                totals["padding"] += every - own
            totals["memory"] += sum(x.nbytes for x in layer.heads.values())
            totals["queries"] += sum(
                x.nbytes for x in (layer.queries, layer.query_positions) if x is not None
            )
        return Bytes(**totals)

    @property
    def kept(self) -> list[np.ndarray]:
        self.alive()
        every = self.share.wholes({str(index): layer.positions for index, layer in enumerate(self.layers)})
        return [canonical({}, to_numpy(positions), {}, {}).positions for positions in every.values()]

    def snapshot(self) -> Snapshot:
        self.alive()

        def whole(given: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
            return {key: to_numpy(value) for key, value in self.share.wholes(given).items()}

        layers = tuple(
            canonical(
                whole(layer.streams),
                whole({"positions": layer.positions})["positions"],
                whole(layer.memory),
                whole(layer.heads),
                None if layer.queries is None else whole({"queries": layer.queries})["queries"],
                None if layer.query_positions is None else to_numpy(layer.query_positions),
                whole(layer.tables),
                self.codec,
                self.row_seen,
            )
            for layer in self.layers
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

    def save(self, path: str | os.PathLike) -> None:
        snapshot = self.snapshot()
        self.share.once(lambda: snapshot.save(path))

    def fork(self, rows: int = 1) -> "TorchCache":
        self.check_fork(rows)
        return self._gather(list(range(self.batch)) * rows)

    def rows(self, index: Sequence[int]) -> "TorchCache":
        self.check_rows(index)
        return self._gather(list(index))

    def _gather(self, index: list[int]) -> "TorchCache":
        def pick(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None else x[index]

        layers: list[LayerCache | PagedLayer] = [
            replace(
                layer,
                streams={key: value[index] for key, value in layer.streams.items()},
                positions=layer.positions[index],
                budget=layer.budget[index],
                memory={key: value[index] for key, value in layer.memory.items()},
                heads={key: value[index] for key, value in layer.heads.items()},
                queries=pick(layer.queries),
                query_positions=pick(layer.query_positions),
                tables={key: value[index] for key, value in layer.tables.items()},
            )
            for layer in map(opened, self.layers)
        ]
        budgets = [None if each is None else each[index] for each in self.budgets]
        rows = {key: getattr(self, key)[index] for key in ("row_seen", "dropped", "question")}
        result = replace(self, layers=layers, budgets=budgets, step=None, **rows)
        result.bind()
        result.settle()
        return result

    @property
    def last_eviction(self) -> np.ndarray:
        return to_numpy(self.dropped)

    def until(self, seen: np.ndarray) -> "TorchCache":
        result = self.fork()
        result.row_seen, result.question = seen.astype(np.int32), self.marked_until(seen)
        end = torch.as_tensor(result.row_seen, device=self.dropped.device)
        result.layers = list(layers := [opened(layer) for layer in result.layers])
        for layer in layers:
            gone = layer.positions >= end[:, None, None]
            layer.positions.masked_fill_(gone, EMPTY)
            for value in layer.streams.values():
                value.masked_fill_(gone[:, : value.shape[1], :, None], 0)
            held = self.share.whole(layer.positions) >= 0  # all heads go on from one slot
            if layer.fill < layer.slots or not self.overwrites(layer):
                filled = held.any(dim=1).any(dim=0).nonzero()
                layer.fill = int(filled.max()) + 1 if len(filled) else 0
            layer.used = int(held.sum(-1).max())
        result.settle()
        return result
