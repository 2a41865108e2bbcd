"""Threshold: tokens that score at least `least`, however many, up to the budget (as DMS evicts, arXiv 2506.05345).

Around a policy whose scores mean something by themselves: `threshold(budget=512, least=1e-4, policy=snapkv())`. Each
head keeps the tokens that reach the threshold, the best of them where the budget is smaller. What the inner policy
protects stays in any case, and a head never keeps fewer than one token.

Deviations: DMS learns what to evict and has no budget; here the score is any policy's, and the budget bounds memory.
"""

from dataclasses import dataclass

from jaxtyping import Int, Shaped

from framework.arrays import Array
from framework.errors import KvtwinError
from framework.eviction import alive
from framework.policies.h2o import H2O
from framework.policies.key_norm import KeyNorm
from framework.policy import Policy, View
from framework.wrapper import Wrapper


@dataclass(frozen=True, kw_only=True)
class Threshold(Wrapper):
    """Keeps what scores at least `least`, at most the budget."""

    least: float | int

    order_free = False
    divides = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.least != self.least:
            raise KvtwinError("threshold has least=nan; expected a number")

    def budgets(
        self, view: View, scores: Shaped[Array, "batch kv_heads slots"]
    ) -> Int[Array, "batch kv_heads"]:
        xp, most = view.xp, super().budgets(view, scores)
        protected = self.protected(view)
        stays = scores >= self.least
        stays = stays if protected is None else stays | protected
        living = alive(view.positions, view.seen, view.window)
        count = xp.sum(xp.astype(stays & living, xp.int32), axis=-1, dtype=xp.int32)
        return xp.minimum(xp.where(count < 1, 1, count), most)

    @classmethod
    def examples(cls) -> list[Policy]:
        return [
            cls(budget=9, least=-1.8, policy=KeyNorm()),
            cls(budget=8, least=0.5, policy=H2O(), interval=3),
        ]
