"""Decoding on buffers that stay where they are, so that a GPU repeats a recorded step without asking the host.

`Step` is one step of the decode loop as tensor operations alone, the twin of `loop` in backends/flax/decode.py: it
chooses a token, appends it, attends, evicts, and writes everything it changes into the tensors that it found. On CUDA
it is recorded once as a graph and then repeated; the host looks at which rows go on every few steps. Elsewhere the same
step runs as it stands.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import array_api_compat.numpy
import array_api_compat.torch as xp
import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from backends.torch.cache import TorchCache
from backends.torch.convert import to_numpy, to_torch, widened
from backends.torch.layer import LayerCache
from backends.torch.pages import PagedLayer
from backends.torch.recorded import Recorded
from backends.torch.rope import next_positions
from backends.torch.share import ALONE
from framework.decode import Sampling, choose
from framework.errors import KvtwinError
from framework.policy import View, name
from framework.random import gumbel
from framework.rope import check_reach, ropes
from framework.shapes import EMPTY, bucket

if TYPE_CHECKING:
    from backends.torch.model import TorchModel

LOOK = 16  # steps between two looks of the host
ROOM = 256  # steps that a buffer has room for when it is made: each new one is recorded again
ALIGNED = 16  # fused attention on CUDA copies a mask whose rows have another length


def qualifies(model: "TorchModel", cache: TorchCache, steps: int) -> bool:
    """Whether so many steps can be taken on buffers that stay.

    One process has all heads, every layer is one tensor per stream and stores what the model makes, evictions come at
    each step or never, and no row can reach the end of what it may hold.
    """
    layers, most = cache.layers, int(cache.row_seen.max()) + steps
    if model.share is not ALONE:
        return False
    if not cache.codec.exact or cache.pending or cache.policy.interval != 1 or cache.policy.repositions:
        return False
    if any(isinstance(layer, PagedLayer) for layer in layers) or any(cache.layouts):
        return False
    if any(cache.overwrites(layer) and layer.used < 1 for layer in layers):
        return False
    if len({layer.fill for layer in layers if isinstance(layer, LayerCache) and layer.limit is None}) > 1:
        return False
    try:
        cache.admit(np.full(cache.batch, steps))
        for rope in ropes(model.spec):
            check_reach(rope, most - 1, cache.length)
    except KvtwinError:  # a row may stop before: the other loop raises where it comes to that
        return False
    return True


@dataclass
class StaticLayer(LayerCache):
    """A layer whose tensors stay. `at`: the slot that the next token comes to, where it overwrites none."""

    at: Int[torch.Tensor, "1"] = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))
    buffers: dict[str, Any] = field(default_factory=dict)

    def room(self, filled: torch.Tensor, active: torch.Tensor) -> tuple[int, bool]:
        return self.slots - 1, True

    def append(self, new: dict[str, torch.Tensor], positions: torch.Tensor, start: Any) -> None:
        for key, value in new.items():
            self.streams[key].index_copy_(2, self.at, value)
        heads = self.positions.shape[1]
        self.positions.index_copy_(2, self.at, positions[:, None].expand(-1, heads, -1))
        for key, value in start.items():
            if isinstance(value, torch.Tensor):
                held = self.memory[key]
                held.index_copy_(2, self.at, value.to(held.dtype).expand(-1, heads, -1))
            else:
                self.memory[key].index_fill_(2, self.at, value)

    def overwrite(self, new: dict[str, torch.Tensor], positions: torch.Tensor, start: Any) -> None:
        slot = self.positions.argmin(dim=-1, keepdim=True)
        for key, value in new.items():
            index = slot[:, : value.shape[1], :, None].expand(-1, -1, -1, value.shape[-1])
            self.streams[key].scatter_(2, index, value)
        self.positions.scatter_(2, slot, positions[:, None].expand(-1, slot.shape[1], -1))
        for key, value in start.items():
            if isinstance(value, torch.Tensor):
                held = self.memory[key]
                held.scatter_(2, slot, value.to(held.dtype).expand(slot.shape))
            else:
                self.memory[key].scatter_(2, slot, value)

    def keep(self) -> None:
        """Name the tensors that there are as those that stay."""
        self.buffers = {each.name: getattr(self, each.name) for each in fields(LayerCache)}
        self.buffers |= {key: dict(self.buffers[key]) for key in NAMED}

    def settle(self) -> None:
        """Bring what a step has made anew into the tensors that stay."""
        for key, held in self.buffers.items():
            now = getattr(self, key)
            if key in NAMED:
                for inner, tensor in held.items():
                    _copied(now[inner], tensor)
                setattr(self, key, dict(held))
            elif isinstance(held, torch.Tensor):
                _copied(now, held)
                setattr(self, key, held)

    def same(self, layer: LayerCache) -> bool:
        """Whether this layer's tensors are those of another, which is then what this one steps on."""
        pairs = [(self.buffers[key], getattr(layer, key)) for key in self.buffers]
        tensors = [pair for pair in pairs if isinstance(pair[0], torch.Tensor)]
        for mine, theirs in (pair for pair in pairs if isinstance(pair[0], dict)):
            tensors += [(each, theirs[key]) for key, each in mine.items()]
        return all(mine is theirs for mine, theirs in tensors)


NAMED = ("streams", "memory", "heads", "tables")


def _copied(new: torch.Tensor, held: torch.Tensor) -> None:
    if new is not held:
        held.copy_(new)


class Step:
    """One decode step of a cache, whose layers it makes its own, and what it reads and writes."""

    def __init__(self, model: "TorchModel", cache: TorchCache, sampling: Sampling, stop: Sequence[int]):
        self.model, self.settings, self.stop = model, settings(sampling), tuple(stop)
        device, batch = model.device, cache.batch
        self.end = torch.zeros(1, dtype=torch.int64, device=device)
        layers: list[LayerCache | PagedLayer] = [self._layer(layer, cache) for layer in cache.layers]
        self.slots = min((layer.slots for layer in layers if layer.limit is None), default=None)
        # What the rows have seen is known to the device alone.
        unknown = np.full(batch, EMPTY, np.int32)
        self.cache = replace(cache, layers=layers, row_seen=unknown, step=None, consumed=False)
        self.tables = {rope: model.tables.tables[rope, cache.length] for rope in ropes(model.spec)}
        self.stops = torch.tensor(self.stop, dtype=torch.int32, device=device)
        wide = torch.promote_types(model.kind, torch.float32)
        whole = {"dtype": torch.int32, "device": device}
        self.seen, self.question = torch.zeros(batch, **whole), torch.zeros(batch, **whole)
        self.going = torch.zeros(batch, dtype=torch.bool, device=device)
        self.turn = torch.zeros(1, dtype=torch.int64, device=device)
        self.out = torch.full((batch, LOOK), EMPTY, **whole)
        self.logits = torch.zeros(batch, model.spec.vocab, dtype=wide, device=device)
        rows = LOOK if sampling.temperature else 0
        self.noise = torch.zeros(rows, batch, model.spec.vocab, dtype=torch.float32, device=device)
        self.bad = torch.zeros(len(layers), dtype=torch.bool, device=device)
        self.recorded = Recorded(device)

    def _layer(self, layer: Any, cache: TorchCache) -> StaticLayer:
        """The layer with room for what comes, in tensors that stay."""
        held = StaticLayer(**{each.name: getattr(layer, each.name) for each in fields(LayerCache)})
        held.streams, held.memory = dict(layer.streams), dict(layer.memory)
        if layer.limit is None:
            held.reserve(max(held.slots, bucket(held.fill + ROOM)))
            held.at = self.end
        else:
            taken = held.used if cache.overwrites(layer) else held.fill
            held.reserve(-(-max(held.slots, taken + 1, held.bound + 1) // ALIGNED) * ALIGNED)
            held.at = torch.full((1,), held.slots - 1, dtype=torch.int64, device=self.model.device)
        held.fill, held.used = held.slots - 1, 1  # attention is to see all slots; the host counts no further
        held.keep()
        return held

    def fits(self, cache: TorchCache, sampling: Sampling, stop: Sequence[int]) -> bool:
        """Whether this is a step of the cache as it is now."""
        mine = (self.settings, self.stop)
        if mine != (settings(sampling), tuple(stop)) or not self.left(cache):
            return False
        tables = self.model.tables.tables
        if any(tables[rope, cache.length] is not each for rope, each in self.tables.items()):
            return False
        if cache.dropped is not self.cache.dropped:
            return False
        pairs = zip(self.cache.layers, cache.layers, strict=True)
        return all(
            isinstance(mine, StaticLayer) and isinstance(layer, LayerCache) and mine.same(layer)
            for mine, layer in pairs
        )

    def left(self, cache: TorchCache) -> int:
        """Steps until a buffer is full; without any that grows, as many as one likes."""
        fills = [
            layer.fill for layer in cache.layers if isinstance(layer, LayerCache) and layer.limit is None
        ]
        return LOOK if self.slots is None else self.slots - max(fills)

    def begin(self, cache: TorchCache, logits: torch.Tensor, going: Bool[np.ndarray, "batch"]) -> None:
        """Start from this state of the cache."""
        for held, given in (
            (self.seen, cache.row_seen), (self.question, cache.question), (self.going, going),
        ):  # fmt: skip
            held.copy_(to_torch(given, device=self.model.device))
        if self.slots is not None:
            self.end.fill_(self.slots - self.left(cache))
        self.logits.copy_(logits)
        self.bad.zero_()

    def look(
        self, count: int, noise: Float[np.ndarray, "steps batch vocab"] | None
    ) -> Int[np.ndarray, "batch steps"]:
        """Take so many steps, at most `LOOK`; the tokens that were chosen. Raises where a score was NaN."""
        self.turn.zero_()
        if noise is not None:
            self.noise[:count].copy_(to_torch(noise, device=self.model.device))
        for _ in range(count):
            self.recorded(self.run)
        if wrong := torch.nonzero(self.bad).flatten().tolist():
            what = name(self.cache.policy)
            raise KvtwinError(f"policy {what} scored NaN in layer {wrong[0]}; expected numbers")
        return to_numpy(self.out[:, :count])

    def run(self) -> None:
        """Choose and step, without a word to the host."""
        chosen = self._chosen()
        token = torch.where(self.going, chosen, EMPTY)
        self.out.index_copy_(1, self.turn, token[:, None])
        fresh = self._advance(token)
        self.logits.copy_(torch.where(self.going[:, None], fresh, self.logits))
        if self.stop:
            self.going.logical_and_((chosen[:, None] != self.stops).all(1))
        self.turn.add_(1)
        self.end.add_(1)

    def _chosen(self) -> Int[torch.Tensor, "batch"]:
        if not len(self.noise):
            return self.logits.argmax(-1).to(torch.int32)
        noise = self.noise.index_select(0, self.turn)[0]
        return choose(xp, self.logits.float(), noise, *self.settings)

    def _advance(self, token: Int[torch.Tensor, "batch"]) -> Float[torch.Tensor, "batch vocab"]:
        """The logits behind these tokens; a row that is given -1 stays as it is."""
        model, cache, tokens = self.model, self.cache, token[:, None]
        real = tokens >= 0
        positions = next_positions(real, self.seen)
        after = self.seen + real[:, 0].to(torch.int32)
        rows, turns = {"seen": after, "question": self.question}, model.turns(positions, cache)
        x = model.decoder.embed(tokens.clamp(min=0)) * model.spec.embed_scale
        evicted: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        for index, block in enumerate(model.decoder.layers):
            held = cache.layers[index]
            assert isinstance(held, StaticLayer)
            y, view, _ = model._attend(
                block, index, x, tokens, positions, turns, self.seen, rows, cache, True, "decode",
                asked=held.limit is not None,
            )  # fmt: skip
            if held.limit is not None:
                evicted.append((index, *self._evicted(held, view, real[:, 0])))
            held.settle()
            x = model._rest(block, index, x, y)
        if evicted:
            lost = torch.stack([rows for _, rows, _ in evicted]).any(0)
            cache.dropped.copy_(torch.where(lost, after, cache.dropped))
            for index, _, wrong in evicted:
                self.bad[index].logical_or_(wrong)
        self.seen.copy_(after)
        out = model._logits(x, real, "all", _silent)
        assert out is not None
        return widened(out[:, 0])

    def _evicted(
        self, held: StaticLayer, view: View, active: Bool[torch.Tensor, "batch"]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Evict from one layer; which rows lost a token, and whether a score was NaN."""
        if self.cache.overwrites(held):
            return held.evict_one(self.cache.policy, view, active)
        lost, _, bad = held.compact(self.cache.policy, view, active, None)
        return lost, bad

    def after(self, cache: TorchCache, tokens: Int[np.ndarray, "batch steps"]) -> TorchCache:
        """The cache after these steps; `cache` is what it was before, whose numbers the host has."""
        count = tokens.shape[1]
        layers: list[LayerCache | PagedLayer] = []
        for mine, layer in zip(self.cache.layers, cache.layers, strict=True):
            assert isinstance(mine, StaticLayer)
            assert isinstance(layer, LayerCache)
            values = {each.name: getattr(mine, each.name) for each in fields(LayerCache)}
            grown = layer.used + count
            used = grown if layer.limit is None else min(grown, layer.bound)
            if layer.limit is None:
                fill = layer.fill + count
            else:
                fill = mine.slots if cache.overwrites(layer) else min(layer.fill + count, layer.bound)
            values |= {key: dict(values[key]) for key in NAMED}
            layers.append(LayerCache(**values | {"fill": fill, "used": used}))
        seen = cache.row_seen + (tokens >= 0).sum(1).astype(np.int32)
        return replace(cache, layers=layers, row_seen=seen, dropped=self.cache.dropped, step=self)


def _silent(key: str, value: torch.Tensor) -> None:
    """Listens to nothing."""


def decode(
    model: "TorchModel",
    cache: TorchCache,
    logits: np.ndarray,
    sampling: Sampling,
    stop: Sequence[int],
    steps: int,
    first: int = 0,
    active: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, TorchCache]:
    """See `framework.backend.Model.decode`; of a cache that qualifies."""
    going = np.ones(cache.batch, bool) if active is None else np.array(active)
    cache.consume()
    cache = replace(cache, consumed=False)
    for rope in ropes(model.spec):
        most = int(cache.row_seen.max()) + steps + cache.policy.needs.ahead
        model.tables.grow(rope, cache.length, most)
    current = to_torch(np.asarray(logits), device=model.device)
    pieces: list[np.ndarray] = []
    done = 0
    while done < steps and going.any():
        step = cache.step
        if step is None or not step.fits(cache, sampling, stop):
            step, cache.step = None, None  # what it holds is let go before more is made
            step = Step(model, cache, sampling, stop)
        step.begin(cache, current, going)
        while (count := min(LOOK, steps - done, step.left(cache))) and going.any():
            noise = (
                _noise(model, cache.batch, sampling, first + done, count) if sampling.temperature else None
            )
            tokens = step.look(count, noise)
            going = to_numpy(step.going)
            taken = int((tokens >= 0).any(0).sum())  # rows that have stopped stay so
            cache, done = step.after(cache, tokens[:, :taken]), done + taken
            pieces.append(tokens[:, :taken])
        current = step.logits
    out = np.full((cache.batch, steps), EMPTY, np.int32)
    found = np.concatenate([out[:, :0], *pieces], axis=1)
    out[:, : found.shape[1]] = found
    return out, to_numpy(current), cache


def _noise(
    model: "TorchModel", batch: int, sampling: Sampling, first: int, count: int
) -> Float[np.ndarray, "steps batch vocab"]:
    """NumPy's noise for some steps: torch lacks the unsigned arithmetic."""
    rows, vocab = np.arange(batch), model.spec.vocab
    made = [
        gumbel(array_api_compat.numpy, sampling.seed, step, rows, vocab)
        for step in range(first, first + count)
    ]
    return np.stack(made)


def settings(sampling: Sampling) -> list[float | int | None]:
    """Temperature, top_k, top_p, min_p; a filter that is off is None and costs nothing."""
    return [
        sampling.temperature,
        sampling.top_k or None,
        sampling.top_p if sampling.top_p < 1 else None,
        sampling.min_p or None,
    ]
