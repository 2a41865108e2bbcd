"""Expected attention: the attention that queries still to come will give, from the statistics of those seen
(arXiv 2510.00636).

Un-rotated queries are taken as normal with the mean and covariance seen so far, per query head, the first `sinks` left
out. Rotated by the mean of the next `future` rotations they give E[exp(q k)] in closed form; its softmax over the
tokens, averaged over the group and times the length of the value, is the score. Sinks stay.

Deviations: at decode the statistics go on over all queries of the text and the rotations are those of the true next
positions. The model's own query scale stands for 1 / sqrt(head_dim); a soft-cap is ignored.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Bool, Float

from framework.arrays import Array, device, softmax
from framework.policy import Block, Needs, Policy, View
from framework.spec import Layer


@dataclass(frozen=True, kw_only=True)
class ExpectedAttention(Policy):
    """Keeps what later queries are expected to attend to, weighted by the length of its value."""

    sinks: int = 4
    future: int = 512
    covariance: bool = True
    value_norm: bool = True
    epsilon: float | int = 0.0

    @property
    def needs(self) -> Needs:
        return Needs(keys=True, values=self.value_norm, stream=True, ahead=self.future)

    def head_memory(self, layer: Layer) -> Mapping[str, tuple[int, ...]]:
        mean = (layer.group, layer.head_dim)
        spread = {"spread": (*mean, layer.head_dim)} if self.covariance else {}
        return {"count": (), "mean": mean} | spread

    def stream(self, view: View, block: Block) -> Mapping[str, Float[Array, "batch kv_heads *rest"]]:
        """Mean and sum of squared deviations, joined block by block (Chan, Golub and LeVeque 1979)."""
        xp, old = view.xp, view.memory
        counts = block.positions >= self.sinks
        mask = counts[:, None, None, :, None]
        new = xp.astype(xp.sum(xp.astype(counts, xp.int32), axis=1), old["count"].dtype)[:, None]
        total = old["count"] + new
        share = new / xp.where(total == 0, 1.0, total)
        mean = (
            xp.sum(xp.where(mask, block.queries, 0.0), axis=3) / xp.where(new == 0, 1.0, new)[..., None, None]
        )
        step = xp.where(new[..., None, None] == 0, 0.0, mean - old["mean"])
        result = dict(old) | {"count": total, "mean": old["mean"] + step * share[..., None, None]}
        if self.covariance:
            apart = xp.where(mask, block.queries - mean[..., None, :], 0.0)
            squares = xp.matmul(xp.matrix_transpose(apart), apart)
            between = step[..., :, None] * step[..., None, :] * (old["count"] * share)[..., None, None, None]
            result["spread"] = old["spread"] + squares + between
        return result

    def score(self, view: View) -> Float[Array, "batch kv_heads slots"]:
        xp, memory = view.xp, view.memory
        ahead = xp.arange(self.future, dtype=xp.int32, device=device(view.positions))
        turn = view.mean_rotation(view.seen[:, None] + ahead)[:, None, ...]
        mean = xp.matmul(memory["mean"], xp.matrix_transpose(turn)) * view.scale
        logits = xp.matmul(mean, xp.matrix_transpose(view.keys))
        if self.covariance:
            count = xp.where(memory["count"] == 0, 1.0, memory["count"])[..., None, None, None]
            turn = turn[:, :, None, ...]
            spread = xp.matmul(turn, xp.matmul(memory["spread"] / count, xp.matrix_transpose(turn)))
            keys = view.keys[:, :, None, ...] * view.scale
            logits = logits + xp.sum(xp.matmul(keys, spread) * keys, axis=-1) / 2
        spared = view.filled & (view.positions >= self.sinks)
        expected = xp.mean(softmax(xp, logits, spared[:, :, None, :]), axis=2)
        if not self.value_norm:
            return expected
        return (expected + self.epsilon) * xp.sqrt(xp.sum(view.values * view.values, axis=-1))

    def protected(self, view: View) -> Bool[Array, "batch kv_heads slots"]:
        return view.filled & (view.positions < self.sinks)

    def protects(self, budget: int) -> int:
        return self.sinks

    @classmethod
    def examples(cls) -> list[Policy]:
        return [
            cls(budget=9, sinks=2, future=16),
            cls(budget=8, sinks=1, future=5, covariance=False, interval=3),
        ]
