"""One layer of the dynamic cache: tensors that grow in blocks and shrink by gather, and what a policy does with it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import array_api_compat.torch as xp
import torch
from jaxtyping import Float, Int, Shaped

from backends.torch.convert import widened
from backends.torch.share import ALONE, Share
from framework.arrays import by_position, keep, take_slots
from framework.codec import Codec, Side
from framework.coding import payload, shown
from framework.eviction import alive, heads_budgets, judge, merged, ordered, repositioned, survivors, weakest
from framework.groups import Call, Exact, recoded
from framework.policy import Policy, View
from framework.shapes import EMPTY, bucket
from framework.spec import Layer
from framework.wrapper import seen_by

# Keys as the model sees them, from keys as they are stored and their positions [batch kv_heads slots].
Finish = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

MEMORY = "memory."


class HeldLayer(ABC):
    """What the policy sees and changes of a layer, however its slots are stored.

    `used` is the most tokens that a head can hold now. `memory` is what the policy remembers per slot, `heads` per
    head. `limit`: most tokens per head after an eviction. `share`: which of the model's kv heads these are; a policy
    sees all of them, and so does `budget`, and every process decides for all and takes its own part of the answer.
    """

    share: Share = ALONE
    spec: Layer
    codec: Codec
    limit: int | None
    budget: Int[torch.Tensor, "batch every"]
    heads: dict[str, Float[torch.Tensor, "batch kv_heads *rest"]]
    queries: Float[torch.Tensor, "batch kv_heads group window head_dim"] | None
    query_positions: Int[torch.Tensor, "batch window"] | None
    used: int
    tables: dict[str, Shaped[torch.Tensor, "batch kv_heads rows _"]]  # of a codec, beside the slots
    streams: Any  # by name, [batch kv_heads slots width]; one head for all where a codec codes them together
    positions: Any  # [batch kv_heads slots]
    memory: Any  # by name, [batch kv_heads slots]

    @property
    @abstractmethod
    def stored(self) -> dict[str, list[torch.Tensor]]:
        """The tensors themselves, by what they hold."""

    @abstractmethod
    def restorable(self) -> "HeldLayer":
        """The layer as it is, whatever a call then does to it: tokens are only written to places that are empty now."""

    @abstractmethod
    def put(
        self,
        streams: Mapping[str, torch.Tensor] | None = None,
        positions: torch.Tensor | None = None,
        memory: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Take these in the place of its own."""

    @abstractmethod
    def gather(self, source: Int[torch.Tensor, "batch kv_heads kept"], room: int, whole: bool) -> None:
        """Keep the slots that `source` names, -1 giving an empty one; no head holds more than `room`.

        `whole`: every row was evicted, so that no head has more than its budget.
        """

    def read(
        self, side: Side, dtype: torch.dtype, finish: Finish | None, exact: Exact | None
    ) -> Float[torch.Tensor, "batch kv_heads slots width"]:
        """Keys or values of all slots, as the model sees them; keys go through `finish`."""
        x = shown(self.codec, xp, self.spec, self.streams, side, dtype, self.tables, exact)
        return x if finish is None or side == "values" else finish(x, self.positions)

    def recode(self, call: Call) -> torch.Tensor:
        """Code what the call made complete; returns the heads of which something could not be coded."""
        streams, self.tables, wrong = recoded(
            xp, self.codec, self.streams, self.tables, self.positions, call, None
        )
        if self.codec.together and call.due:
            self.put(streams)
        return wrong

    @property
    def bound(self) -> int:
        """`limit` of a layer that evicts."""
        assert self.limit is not None
        return self.limit

    def observe(self, queries: torch.Tensor, positions: torch.Tensor) -> None:
        """Keep the newest queries of each row; padding does not push older ones out."""
        if self.queries is None:
            return
        assert self.query_positions is not None
        asked = self.query_positions.shape[1]
        every = torch.cat([self.query_positions, positions], dim=1)
        order = torch.argsort(every, dim=1, stable=True)[:, -asked:]
        self.query_positions = every.gather(1, order)
        both = torch.cat([self.queries, queries], dim=3)
        index = order[:, None, None, :, None].expand(-1, *both.shape[1:3], -1, both.shape[-1])
        self.queries = both.gather(3, index)

    def view(
        self,
        policy: Policy,
        sums: torch.Tensor | None,
        table: tuple[torch.Tensor, torch.Tensor] | None,
        dtype: torch.dtype,
        finish: Finish | None,
        exact: Exact | None,
        **rest: Any,
    ) -> View:
        """What the policy sees, in physical slot order; `table` holds the cosines and sines of this layer's rope, and
        coded vectors are read in `dtype`, and keys go through `finish`."""
        needs = policy.needs
        cos, sin = (None, None) if table is None else table
        own = {"positions": self.positions} | self.remembering(policy)
        if needs.keys or needs.queries > 0:
            own["keys"] = widened(self.read("keys", dtype, finish, exact))
        if needs.values:
            own["values"] = widened(self.read("values", dtype, None, exact))
        if self.queries is not None:
            own["queries"] = widened(self.queries)
        if sums is not None:
            own["sums"] = sums
        if needs.tokens:
            own["tokens"] = self.memory["tokens"].to(torch.int32)
        every = self.share.wholes(own)
        view = View(
            xp=xp,
            budget=self.budget,
            memory={key.removeprefix(MEMORY): every.pop(key) for key in own if key.startswith(MEMORY)},
            query_positions=self.query_positions,
            **every,
            cos=cos,
            sin=sin,
            scale=self.spec.scale,
            softcap=self.spec.softcap,
            window=self.spec.window,
            repositions=policy.repositions,
            **rest,
        )
        view = seen_by(policy, view)
        return repositioned(view) if policy.repositions else view

    def remembering(self, policy: Policy) -> dict[str, torch.Tensor]:
        """The policy's memory of the heads that are here, under names that nothing else has."""
        own = {key: self.memory[key] for key in policy.memory} | self.heads
        return {f"{MEMORY}{key}": value for key, value in own.items()}

    def remembered(self, policy: Policy) -> dict[str, torch.Tensor]:
        """The policy's memory of all heads."""
        every = self.share.wholes(self.remembering(policy))
        return {key.removeprefix(MEMORY): value for key, value in every.items()}

    def remember(self, memory: Mapping[str, torch.Tensor], active: torch.Tensor) -> None:
        """Take over what the policy noted of all heads, in the rows that are active."""

        def chosen(key: str, old: torch.Tensor) -> torch.Tensor:
            new = self.share.own(memory[key])
            return torch.where(active.view(-1, *(1,) * (old.ndim - 1)), new, old)

        self.put(memory={key: chosen(key, old) for key, old in self.memory.items() if key in memory})
        self.heads = {key: chosen(key, old) for key, old in self.heads.items()}

    def room(self, filled: torch.Tensor, active: torch.Tensor) -> tuple[int, bool]:
        """The most tokens that a head may hold after an eviction, and whether every row is evicted."""
        # A row that takes no part in this call keeps what it has gathered since its own last eviction.
        whole = bool(active.all())
        idle = 0 if whole else int(filled[~active].sum(-1).max())
        return min(self.used, max(self.bound, idle)), whole

    def compact(
        self,
        policy: Policy,
        view: View,
        active: torch.Tensor,
        forced: torch.Tensor | None,
    ) -> tuple[torch.Tensor, tuple, torch.Tensor]:
        """Keep the survivors in position order in new, smaller tensors.

        Returns which rows lost a token, the decision, and whether a score was NaN.
        """
        order, own = by_position(xp, view.positions), self.share.own
        seen = ordered(policy, view, order, lambda x, index: take_slots(xp, x, index))
        scores, protected = judge(policy, seen)
        budget = heads_budgets(policy, seen, scores)
        filled = seen.filled
        bad = (torch.isnan(scores) if scores.is_floating_point() else torch.zeros_like(filled)) & filled
        living = alive(seen.positions, seen.seen, self.spec.window)
        room, whole = self.room(filled, active)
        slots = room + policy.interval
        index = survivors(xp, scores, protected, living, budget, slots)
        index = torch.where(active[:, None, None], index, _all(filled, slots))
        chosen = keep(xp, seen.positions, index, EMPTY)
        decision = (seen.positions, scores, protected, chosen, budget)
        if forced is not None:
            index = torch.where(active[:, None, None], _slots_of(seen.positions, forced, slots), index)
        lost = (index >= 0).sum(-1) < filled.sum(-1)
        source = take_slots(xp, order, index)
        source = torch.where(index < 0, index, source.to(index.dtype))
        self.gather(own(source), room, whole)
        if policy.merges:
            *pair, heads = merged(policy, seen, index, active)
            named = zip(("keys", "values"), pair, strict=True)
            self.put({key: own(value).to(self.streams[key].dtype) for key, value in named})
            self.heads = self.heads | {key: own(value) for key, value in heads.items()}
        return lost.any(dim=1), decision, bad.any()

    def evict_one(
        self, policy: Policy, view: View, active: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Empty the weakest slot of each head that holds too many; returns which rows lost a token, and NaN."""
        scores, protected = judge(policy, view)
        filled = view.filled
        bad = (torch.isnan(scores) if scores.is_floating_point() else torch.zeros_like(filled)) & filled
        living = alive(view.positions, view.seen, self.spec.window)
        slot = weakest(xp, scores, view.positions, protected, living)[..., None]
        over = (filled.sum(-1) > view.budget) | (filled & ~living).any(-1)
        over = (over & active[:, None])[..., None]
        left = torch.where(over, EMPTY, view.positions.gather(2, slot)).to(torch.int32)
        self.put(positions=self.share.own(view.positions.scatter_(2, slot, left)))
        self.used = min(self.used, self.bound)
        return over.any(dim=1)[:, 0], bad.any()


@dataclass
class LayerCache(HeldLayer):
    """One layer. Slots from `fill` on are free to append to; `used` is the most tokens that a head can hold now.

    `memory` is what the policy remembers per slot, `heads` per head. `limit`: most tokens per head after an eviction.
    While `fill` is below the number of slots, the filled slots are in position order.
    """

    spec: Layer
    codec: Codec
    limit: int | None
    budget: Int[torch.Tensor, "batch every"]
    streams: dict[str, Shaped[torch.Tensor, "batch heads slots width"]]
    positions: Int[torch.Tensor, "batch kv_heads slots"]
    memory: dict[str, Float[torch.Tensor, "batch kv_heads slots"]]
    heads: dict[str, Float[torch.Tensor, "batch kv_heads *rest"]]
    queries: Float[torch.Tensor, "batch kv_heads group window head_dim"] | None
    query_positions: Int[torch.Tensor, "batch window"] | None
    tables: dict[str, Shaped[torch.Tensor, "batch kv_heads rows _"]]
    fill: int = 0
    used: int = 0
    share: Share = ALONE

    @property
    def slots(self) -> int:
        return self.positions.shape[-1]

    @property
    def stored(self) -> dict[str, list[torch.Tensor]]:
        return {
            "payload": [value for key, value in self.streams.items() if payload(key)],
            "scales": [value for key, value in self.streams.items() if not payload(key)],
            "positions": [self.positions],
            "memory": list(self.memory.values()),
        }

    def restorable(self) -> "LayerCache":
        streams, memory = dict(self.streams), dict(self.memory)
        return replace(self, streams=streams, memory=memory, positions=self.positions.clone())

    def put(
        self,
        streams: Mapping[str, torch.Tensor] | None = None,
        positions: torch.Tensor | None = None,
        memory: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.streams |= streams or {}
        self.memory |= memory or {}
        self.positions = self.positions if positions is None else positions

    def gather(self, source: torch.Tensor, room: int, whole: bool) -> None:
        self.streams = {
            key: keep(xp, value, source[:, : value.shape[1]], 0) for key, value in self.streams.items()
        }
        self.memory = {key: keep(xp, value, source, 0) for key, value in self.memory.items()}
        self.positions = keep(xp, self.positions, source, EMPTY)
        self.fill = self.used = room

    def reserve(self, slots: int) -> None:
        """Make room for `slots` slots."""
        more = slots - self.slots
        if more <= 0:
            return

        def wider(x: torch.Tensor, empty: float | int) -> torch.Tensor:
            tail = x.new_full((*x.shape[:2], more, *x.shape[3:]), empty)
            return torch.cat([x, tail], dim=2)

        self.streams = {key: wider(value, 0) for key, value in self.streams.items()}
        self.positions = wider(self.positions, EMPTY)
        self.memory = {key: wider(value, 0) for key, value in self.memory.items()}

    def append(
        self,
        new: dict[str, torch.Tensor],
        positions: torch.Tensor,
        start: Mapping[str, float | torch.Tensor],
    ) -> None:
        """Write the tokens behind the filled slots, growing by a quarter where there is no room."""
        count = positions.shape[1]
        if self.fill + count > self.slots:
            room = self.fill + count if self.limit is not None else bucket(self.fill + count + 1)
            self.reserve(room)
        span = slice(self.fill, self.fill + count)
        for key, value in new.items():
            self.streams[key][:, :, span] = value
        self.positions[:, :, span] = positions[:, None]
        for key, value in start.items():
            self.memory[key][:, :, span] = value
        self.fill += count
        self.used += count

    def overwrite(
        self,
        new: dict[str, torch.Tensor],
        positions: torch.Tensor,
        start: Mapping[str, float | torch.Tensor],
    ) -> None:
        """Write one token into an empty slot of each row and head."""
        if self.used + 1 > self.slots:
            self.reserve(min(bucket(self.used + 1), self.bound + 1))
        slot = self.positions.argmin(dim=-1, keepdim=True)
        for key, value in new.items():
            index = slot[:, : value.shape[1], :, None].expand(-1, -1, -1, value.shape[-1])
            self.streams[key].scatter_(2, index, value)
        self.positions.scatter_(2, slot, positions[:, None].expand(-1, slot.shape[1], -1))
        for key, value in start.items():
            fresh = torch.as_tensor(value, dtype=self.memory[key].dtype, device=slot.device)
            self.memory[key].scatter_(2, slot, fresh.expand(slot.shape))
        self.fill = self.slots
        self.used += 1


def _slots_of(positions: torch.Tensor, forced: torch.Tensor, slots: int) -> torch.Tensor:
    """Index of the slots that hold the forced positions, in position order, -1 beyond their count."""
    wanted = (positions[..., :, None] == forced[..., None, :]).any(-1) & (positions >= 0)
    return _all(wanted, slots)


def _all(wanted: torch.Tensor, slots: int) -> torch.Tensor:
    """Index [.. slots] of the True entries, in order, -1 beyond their count."""
    total = wanted.shape[-1]
    here = torch.where(wanted, torch.arange(total, device=wanted.device), total).sort(dim=-1).values
    here = torch.nn.functional.pad(here, (0, max(0, slots - total)), value=total)[..., :slots]
    return torch.where(here == total, -1, here).to(torch.int32)
