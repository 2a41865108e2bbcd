"""Observed attention: the tokens that received most attention per query that could see them.

The score is the attention a token received since it came, over the number of those queries: H2O (arXiv 2306.14048)
without its preference for tokens that have been there for longer.

Deviations: with grouped queries the mean over the query heads of a kv head decides. In a layer with a sliding window
only the queries within its reach count. Other libraries score the prompt alone; here the mean goes on at decode. The
newest tokens are not protected.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float

from framework.arrays import Array
from framework.policy import Needs, Policy, View


@dataclass(frozen=True, kw_only=True)
class ObservedAttention(Policy):
    """Keeps what a query attended to most on average."""

    needs: ClassVar[Needs] = Needs(sums=True)
    memory: ClassVar[Mapping[str, float]] = {"mass": 0.0}
    order_free: ClassVar[bool] = True

    def note(self, view: View) -> Mapping[str, Float[Array, "batch kv_heads slots"]]:
        return {"mass": view.memory["mass"] + view.sums}

    def score(self, view: View) -> Float[Array, "batch kv_heads slots"]:
        xp, mass = view.xp, view.memory["mass"]
        queries = view.seen[:, None, None] - view.positions
        if view.window is not None:
            queries = xp.where(queries > view.window, view.window, queries)
        return mass / xp.astype(queries, mass.dtype)

    @classmethod
    def examples(cls) -> list[Policy]:
        return [cls(budget=9), cls(budget=8, interval=3)]
