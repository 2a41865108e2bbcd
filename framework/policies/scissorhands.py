"""Scissorhands: the tokens that queries overlook least often stay (arXiv 2305.17118).

A query that sees n tokens overlooks those that it gives less than 1 / n of its attention. The score is minus the number
of queries that overlooked a token since it came; of a prompt the last `window` queries count. The newest `recent`
tokens stay.

Deviations: the paper counts in a sliding history of `window` queries; here counts go on over all of decode, and every
call of a prompt read in several counts its own last `window`. With grouped queries the counts of a kv head's query
heads are added. The budget is met at every eviction; the paper drops half of it at a time.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float

from framework.arrays import Array
from framework.errors import KvtwinError
from framework.policy import Block, Needs, Policy, View, attends


@dataclass(frozen=True, kw_only=True)
class Scissorhands(Policy):
    """Keeps what few queries overlook, and the newest."""

    recent: int = 10
    window: int = 400

    needs: ClassVar[Needs] = Needs(keys=True, stream=True)
    memory: ClassVar[Mapping[str, float]] = {"overlooked": 0.0}
    order_free: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.recent < 0 or self.window < 1:
            raise KvtwinError(
                f"scissorhands has recent={self.recent}, window={self.window}; expected recent >= 0, window >= 1"
            )

    def stream(self, view: View, block: Block) -> Mapping[str, Float[Array, "batch kv_heads slots"]]:
        xp, given = view.xp, view.attention(block)
        asked = block.positions[:, None, :, None]
        sees = attends(asked, view.positions[:, :, None, :], view.window)[:, :, None, ...]
        tokens = xp.sum(xp.astype(sees, given.dtype), axis=-1, keepdims=True)
        low = sees & (given * tokens < 1)
        if view.phase == "prefill":
            low = low & (asked >= view.seen[:, None, None, None] - self.window)[:, :, None, ...]
        count = xp.sum(xp.astype(low, given.dtype), axis=(2, 3))
        return {"overlooked": view.memory["overlooked"] + count}

    def score(self, view: View) -> Float[Array, "batch kv_heads slots"]:
        return -view.memory["overlooked"]

    def protected(self, view: View) -> Bool[Array, "batch kv_heads slots"]:
        return view.newest(self.recent)

    def protects(self, budget: int) -> int:
        return self.recent

    @classmethod
    def examples(cls) -> list[Policy]:
        return [cls(budget=9, recent=3), cls(budget=8, recent=2, window=6, interval=3)]
