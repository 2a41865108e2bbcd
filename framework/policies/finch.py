"""Finch: of the context, what the question behind it attends to (arXiv 2408.00167).

The question is what `generate(question=...)` marks; without one it is the last `window` tokens of each prefill call.
The score of a token of the context is the attention that the question's queries give it, each times the number of
tokens that the query sees (the more of them, the less each gets), summed, and averaged over the group. What comes after
the context, question and answer, goes only when no context is left, the oldest first. Another question counts anew.
With `generate(evict="chunk")` the question is read behind each chunk before that is compressed, as in the paper. The
paper also closes up the positions of what stays: `reposition(budget=512, policy=finch())`.

Deviations: the paper's budget is for the context alone, and its answer may grow. kvpress' FinchPress takes the mean
over the queries, which orders tokens alike, and weighs each by one less than it sees, which hardly changes the order.
At decode, which the paper leaves alone, the scores stay those of the question.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float

from framework.arrays import FAR, Array, when
from framework.errors import KvtwinError
from framework.policy import Block, Needs, Policy, View, attends
from framework.spec import Layer


@dataclass(frozen=True, kw_only=True)
class Finch(Policy):
    """Keeps what the question attends to, and the question."""

    window: int = 32

    needs: ClassVar[Needs] = Needs(keys=True, stream=True, question=True)
    memory: ClassVar[Mapping[str, float]] = {"asked": 0.0}
    order_free: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.window < 1:
            raise KvtwinError(f"finch has window={self.window}; expected at least 1")

    def head_memory(self, layer: Layer) -> Mapping[str, tuple[int, ...]]:
        return {"begin": ()}

    def stream(self, view: View, block: Block) -> Mapping[str, Float[Array, "batch kv_heads *rest"]]:
        if view.phase == "decode":
            return view.memory
        xp, old, asked = view.xp, view.memory["begin"], view.memory["asked"]
        begin = xp.where(view.question == FAR, view.seen - self.window, view.question)
        asks = block.positions >= begin[:, None]

        def received() -> Array:
            given, places = view.attention(block), block.positions[:, None, :, None]
            sees = attends(places, view.positions[:, :, None, :], view.window) & asks[:, None, :, None]
            tokens = xp.sum(xp.astype(sees, given.dtype), axis=-1, keepdims=True)
            return xp.astype(
                xp.sum(given * tokens[:, :, None, ...], axis=(2, 3)) / given.shape[2], asked.dtype
            )

        new = when(xp, xp.any(asks), received, xp.zeros_like(asked))
        # A question that is read ahead is another one than the same in its own place.
        now = xp.astype(begin, old.dtype) - (0.5 if view.phase == "pass" else 0.0)
        now = xp.broadcast_to(now[:, None], old.shape)
        return {"asked": xp.where((now == old)[..., None], asked, 0.0) + new, "begin": now}

    def score(self, view: View) -> Float[Array, "batch kv_heads slots"]:
        xp, asked = view.xp, view.memory["asked"]
        context = self._context(view)
        asked = xp.where(context, asked, 0.0)
        return xp.where(context, asked, xp.max(asked, axis=(1, 2), keepdims=True) + 1)

    def _context(self, view: View) -> Bool[Array, "batch kv_heads slots"]:
        before = view.xp.astype(view.positions, view.memory["begin"].dtype) < view.memory["begin"][..., None]
        return view.filled & before

    @classmethod
    def examples(cls) -> list[Policy]:
        return [cls(budget=9, window=4), cls(budget=8, window=3, interval=3)]
