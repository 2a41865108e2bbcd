"""CaM: what is evicted during generation is merged, by chance, into the kept tokens after it (openreview LCTmppB165).

Around the policy that decides who stays. An evicted token is merged with probability its attention over the mean
attention of the next `span` kept tokens, at most 1; then each of them, or as many as follow, gets an equal part of its
value. The attention is what a token has received since it came, as in `h2o`.

Deviations: the chance is a hash of `seed`, layer, head and position, the same on every backend. Each head decides by
itself, over all tokens that it drops at an eviction; the prompt is compressed without merging, and what a sliding
window has left leaves no trace. With grouped queries the attention is the mean over the group.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float, Int

from framework.arrays import Array, blocks, device, keep
from framework.errors import KvtwinError
from framework.eviction import alive
from framework.policies.h2o import H2O
from framework.policies.merge import is_kept, numbers, poured
from framework.policies.snapkv import SnapKV
from framework.policy import BLOCK, Merged, Needs, Policy, View
from framework.random import hash32
from framework.wrapper import Memory, Wrapper, both


@dataclass(frozen=True, kw_only=True)
class Cam(Wrapper):
    """Shares evicted values out among the tokens after them."""

    span: int = 32
    seed: int = 0

    order_free = False
    merges = True
    own = ("cam_received",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.span < 1:
            raise KvtwinError(f"cam has span={self.span}; expected at least 1 token")

    @property
    def needs(self) -> Needs:
        return both(self.policy.needs, Needs(keys=True, values=True, sums=True))

    @property
    def memory(self) -> Mapping[str, float]:
        return {**self.policy.memory, "cam_received": 0.0}

    def note(self, view: View) -> Memory:
        return {**super().note(view), "cam_received": view.memory["cam_received"] + view.sums}

    def merge(self, view: View, index: Int[Array, "batch kv_heads kept"]) -> Merged:
        xp = view.xp
        keys, values = keep(xp, view.keys, index, 0.0), keep(xp, view.values, index, 0.0)
        if view.phase != "decode":
            return keys, values, {}
        first, last, mean = self._followers(view, index)
        received = view.memory["cam_received"]
        chance = xp.where(
            mean > 0, received / xp.where(mean > 0, mean, 1.0), xp.astype(received > 0, mean.dtype)
        )
        heads = xp.arange(index.shape[1], dtype=xp.int32, device=device(view.positions))[None, :, None]
        drawn = xp.astype(hash32(xp, self.seed, view.layer, heads, view.positions), mean.dtype) * 2.0**-24
        dropped = alive(view.positions, view.seen, view.window) & ~is_kept(view, index)
        merges = dropped & (drawn < chance) & (last > first)
        part = xp.where(merges, 1.0 / xp.astype(xp.where(merges, last - first, 1), mean.dtype), 0.0)

        def into(number: Array) -> Array:
            follows = (number[..., None] >= first[:, :, None, :]) & (number[..., None] < last[:, :, None, :])
            return xp.where(follows, part[:, :, None, :], 0.0)

        return keys, values + poured(view, into, index.shape[-1], view.values)[0], {}

    def _followers(
        self, view: View, index: Int[Array, "batch kv_heads kept"]
    ) -> tuple[
        Int[Array, "batch kv_heads slots"],
        Int[Array, "batch kv_heads slots"],
        Float[Array, "batch kv_heads slots"],
    ]:
        """The first of the kept slots after each slot, the end of its span, and the mean attention over the span."""
        xp = view.xp
        received = keep(xp, view.memory["cam_received"], index, 0.0)
        held = xp.sum(xp.astype(index >= 0, xp.int32), axis=-1, dtype=xp.int32)[..., None]
        order = numbers(view, index.shape[-1])

        def span(slot: Array) -> Array:
            before = (index[:, :, None, :] >= 0) & (index[:, :, None, :] < slot[..., None])
            first = xp.sum(xp.astype(before, xp.int32), axis=-1, dtype=xp.int32)
            last = xp.minimum(first + self.span, held)
            inside = (order[:, :, None, :] >= first[..., None]) & (order[:, :, None, :] < last[..., None])
            total = xp.sum(xp.where(inside, received[:, :, None, :], 0.0), axis=-1)
            return xp.stack([xp.astype(first, total.dtype), xp.astype(last, total.dtype), total], axis=-1)

        made = blocks(xp, span, numbers(view, view.positions.shape[-1]), size=BLOCK, axis=2, out=2)
        first, last = xp.astype(made[..., 0], xp.int32), xp.astype(made[..., 1], xp.int32)
        return first, last, made[..., 2] / xp.astype(xp.where(last > first, last - first, 1), made.dtype)

    @classmethod
    def examples(cls) -> list[Policy]:
        return [
            cls(budget=9, span=3, policy=H2O()),
            cls(budget=8, span=2, seed=4, policy=SnapKV(window=2, kernel=3), interval=3),
        ]
