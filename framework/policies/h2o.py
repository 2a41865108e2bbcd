"""H2O, heavy hitters: the tokens that received most attention so far, and the newest (arXiv 2306.14048).

The score of a token is the attention it received, summed over all queries since it came. Half of the budget goes to
the newest tokens, as in the paper's evaluation (heavy ratio = recent ratio).

Deviations: with grouped queries a kv head sums the mean over its query heads (the reference code caches every query
head apart). Evicted tokens are dropped; the reference code masks them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float

from framework.arrays import Array
from framework.policy import Needs, Policy, View


@dataclass(frozen=True, kw_only=True)
class H2O(Policy):
    """Keeps the newer half of the budget by age and the other half by accumulated attention."""

    memory: ClassVar[Mapping[str, float]] = {"mass": 0.0}
    order_free: ClassVar[bool] = True

    @property
    def needs(self) -> Needs:
        return Needs(sums=True)

    def note(self, view: View) -> Mapping[str, Float[Array, "batch kv_heads slots"]]:
        return {"mass": view.memory["mass"] + view.sums}

    def score(self, view: View) -> Float[Array, "batch kv_heads slots"]:
        return view.memory["mass"]

    def protected(self, view: View) -> Bool[Array, "batch kv_heads slots"]:
        return view.newest(view.budget // 2)

    def protects(self, budget: int) -> int:
        return budget // 2

    @classmethod
    def examples(cls) -> list[Policy]:
        return [cls(budget=9), cls(budget=8, interval=3)]
