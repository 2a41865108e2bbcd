"""Keeps every token. In a layer with a sliding window, those that a later query can see."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Shaped

from framework.arrays import Array
from framework.policy import Policy, View


@dataclass(frozen=True, kw_only=True)
class Full(Policy):
    """No eviction: the baseline of every comparison."""

    order_free: ClassVar[bool] = True
    evicts: ClassVar[bool] = False

    def score(self, view: View) -> Shaped[Array, "batch kv_heads slots"]:
        return view.positions

    @classmethod
    def examples(cls) -> list[Policy]:
        return [cls()]
