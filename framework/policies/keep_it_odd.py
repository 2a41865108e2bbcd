"""Odd positions before even ones: a toy with many ties, which shows at once when a backend breaks ties differently."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Shaped

from framework.arrays import Array
from framework.policy import Policy, View


@dataclass(frozen=True, kw_only=True)
class KeepItOdd(Policy):
    """Scores a token by its position modulo 2."""

    order_free: ClassVar[bool] = True

    def score(self, view: View) -> Shaped[Array, "batch kv_heads slots"]:
        return view.positions % 2
