"""SimLayerKV: lazy layers keep the first tokens and the newest alone (arXiv 2410.13846).

A layer is lazy if the last query of the prompt gives more than `threshold` of its attention, the mean over all heads,
to the first `sinks` and the newest `recent` tokens. It then keeps only as many; the other layers keep all they may.

Deviations: the budget bounds the layers that are not lazy, too, and beyond it their oldest tokens go, except the first
`sinks`; with a budget as long as the text they keep everything, as in the paper. `threshold` depends on the model: 0.9
is the paper's for Llama 3, 0.65 for Llama 2, 0.8 for Mistral, 0.85 for Qwen.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float, Int, Shaped

from framework.arrays import Array
from framework.errors import KvtwinError
from framework.policy import Needs, Policy, View
from framework.spec import Layer


@dataclass(frozen=True, kw_only=True)
class SimLayer(Policy):
    """Gives lazy layers sinks and recent tokens alone."""

    sinks: int = 4
    recent: int = 1024
    threshold: float | int = 0.9

    needs: ClassVar[Needs] = Needs(queries=1)
    divides: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.recent < 1 or not 0 <= self.threshold <= 1:
            raise KvtwinError(
                f"simlayer has sinks={self.sinks}, recent={self.recent}, threshold={self.threshold}; "
                "expected sinks >= 0, recent >= 1, threshold from 0 to 1"
            )

    def head_memory(self, layer: Layer) -> Mapping[str, tuple[int, ...]]:
        return {"lazy": ()}

    def note(self, view: View) -> Mapping[str, Float[Array, "batch kv_heads"]]:
        if view.phase != "prefill":
            return view.memory
        xp, old = view.xp, view.memory["lazy"]
        ends = self.protected(view) | view.newest(self.recent)
        given = xp.where(ends, xp.mean(view.attention()[:, :, :, 0, :], axis=2), 0.0)
        share = xp.mean(xp.sum(given, axis=-1), axis=1, keepdims=True)
        return {"lazy": xp.broadcast_to(xp.astype(share > self.threshold, old.dtype), old.shape)}

    def score(self, view: View) -> Shaped[Array, "batch kv_heads slots"]:
        return view.positions

    def budgets(
        self, view: View, scores: Shaped[Array, "batch kv_heads slots"]
    ) -> Int[Array, "batch kv_heads"]:
        most = self.sinks + self.recent
        return view.xp.where((view.memory["lazy"] > 0) & (view.budget > most), most, view.budget)

    def protected(self, view: View) -> Bool[Array, "batch kv_heads slots"]:
        return view.filled & (view.positions < self.sinks)

    def protects(self, budget: int) -> int:
        return self.sinks

    @classmethod
    def examples(cls) -> list[Policy]:
        return [
            cls(budget=9, sinks=1, recent=3, threshold=0.3),
            cls(budget=8, sinks=2, recent=2, threshold=0.5, interval=3),
        ]
