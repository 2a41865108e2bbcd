"""StreamingLLM: the first tokens and the newest ones (arXiv 2309.17453).

`reposition=True` is the paper's own form: kept keys are rotated by their rank in the cache, not by their position in
the text, so that distances never exceed the budget. Without it tokens keep their positions, as most other libraries do.

Deviation: the reference code gives sizes to sinks and recent tokens apart (4 + 512); here the budget is their sum.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Shaped

from framework.arrays import Array
from framework.policy import Policy, View


@dataclass(frozen=True, kw_only=True)
class Window(Policy):
    """Keeps `sinks` tokens from the start of the text and fills the budget with the newest."""

    sinks: int = 4
    reposition: bool = False

    order_free: ClassVar[bool] = True

    @property
    def repositions(self) -> bool:
        return self.reposition

    def score(self, view: View) -> Shaped[Array, "batch kv_heads slots"]:
        return view.positions

    def protected(self, view: View) -> Bool[Array, "batch kv_heads slots"]:
        return view.filled & (view.positions < self.sinks)

    def protects(self, budget: int) -> int:
        return self.sinks

    @classmethod
    def examples(cls) -> list[Policy]:
        return [
            cls(budget=9),
            cls(budget=8, sinks=0),
            cls(budget=10, sinks=2, reposition=True),
            cls(budget=7, sinks=3, interval=4),
        ]
