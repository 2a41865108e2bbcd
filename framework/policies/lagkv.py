"""LagKV: tokens whose channels spread widely in the range of those that follow (arXiv 2504.04704).

Behind the first `sinks`, the tokens held are cut into partitions of `lag`. Keys are scaled by the minimum and maximum
of each channel in the next partition; the softmax over the partition of their standard deviation over the channels
(n - 1), averaged with the same of the values, orders the tokens of a partition, and their rank in it over `lag` is the
score. What has no full partition behind it, the last full partition and the tail, scores 1; so do sinks, which stay.
With fewer than 2 `lag` tokens behind the sinks the newest stay. `cross=True` scores by the softmax itself.

Deviations: partitions are counted among the tokens that a head holds, so that the rule can run again at decode. Where
more score 1 than the budget takes, the newest stay. A channel that is constant in the next partition is not scaled.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float, Int

from framework.arrays import Array, Namespace, device, softmax, take_slots
from framework.errors import KvtwinError
from framework.policy import Needs, Policy, View


@dataclass(frozen=True, kw_only=True)
class LagKV(Policy):
    """Keeps the tokens least like those that follow."""

    sinks: int = 4
    lag: int = 128
    cross: bool = False

    needs: ClassVar[Needs] = Needs(keys=True, values=True)

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.lag < 2:
            raise KvtwinError(f"lagkv has sinks={self.sinks}, lag={self.lag}; expected sinks >= 0, lag >= 2")

    def score(self, view: View) -> Float[Array, "batch kv_heads slots"]:
        xp = view.xp
        first = _count(xp, self.protected(view))
        rest = _count(xp, view.filled) - first
        rank = xp.arange(view.positions.shape[-1], dtype=xp.int32, device=device(view.positions)) - first
        spread = (self._spread(xp, view.keys, first) + self._spread(xp, view.values, first)) / 2
        if not self.cross:
            place = xp.argsort(xp.argsort(spread, axis=-1, stable=True), axis=-1)
            spread = xp.astype(place, spread.dtype) / self.lag
        spread = xp.reshape(spread, (*spread.shape[:2], -1))
        scored = (rank >= 0) & (rank // self.lag < rest // self.lag - 1)
        score = xp.where(scored, take_slots(xp, spread, rank), 1.0)
        newest = xp.astype(rank, score.dtype) / xp.astype(xp.where(rest < 1, 1, rest), score.dtype)
        return xp.where(rest < 2 * self.lag, newest, score)

    def _spread(
        self,
        xp: Namespace,
        x: Float[Array, "batch kv_heads slots dim"],
        first: Int[Array, "batch kv_heads 1"],
    ) -> Float[Array, "batch kv_heads partitions lag"]:
        """The softmax over each partition, with room for all slots; nonsense where the next one is not full."""
        batch, heads, slots, dim = x.shape
        wide = (slots // self.lag + 2) * self.lag
        index = first + xp.arange(wide, dtype=xp.int32, device=device(x))
        x = take_slots(xp, x, xp.where(index < slots, index, slots - 1))
        x = xp.reshape(x, (batch, heads, -1, self.lag, dim))
        x, following = x[:, :, :-1, ...], x[:, :, 1:, ...]
        low = xp.min(following, axis=3, keepdims=True)
        span = xp.max(following, axis=3, keepdims=True) - low
        spread = xp.std((x - low) / xp.where(span == 0, 1.0, span), axis=-1, correction=1)
        return softmax(xp, spread, xp.isfinite(spread))

    def protected(self, view: View) -> Bool[Array, "batch kv_heads slots"]:
        return view.filled & (view.positions < self.sinks)

    def protects(self, budget: int) -> int:
        return self.sinks

    @classmethod
    def examples(cls) -> list[Policy]:
        return [
            cls(budget=9, sinks=2, lag=3),
            cls(budget=12, sinks=1, lag=4, cross=True, interval=3),
        ]


def _count(xp: Namespace, mask: Bool[Array, "batch kv_heads slots"]) -> Int[Array, "batch kv_heads 1"]:
    return xp.sum(xp.astype(mask, xp.int32), axis=-1, keepdims=True, dtype=xp.int32)
