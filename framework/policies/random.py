"""Random tokens: the floor that every policy must beat.

A token's score is a hash of (seed, layer, head, position): the same on every backend and whatever the batch, different
in every layer and head.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Shaped

from framework.arrays import Array, device
from framework.policy import Policy, View
from framework.random import hash32


@dataclass(frozen=True, kw_only=True)
class Random(Policy):
    """Keeps a random set; once evicted, a token does not come back."""

    seed: int = 0

    order_free: ClassVar[bool] = True

    def score(self, view: View) -> Shaped[Array, "batch kv_heads slots"]:
        xp = view.xp
        heads = xp.arange(view.positions.shape[1], dtype=xp.int32, device=device(view.positions))
        return hash32(xp, self.seed, view.layer, heads[None, :, None], view.positions)

    @classmethod
    def examples(cls) -> list[Policy]:
        return [cls(budget=9), cls(budget=6, seed=3, interval=3)]
