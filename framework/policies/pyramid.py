"""PyramidKV: early layers keep more than late ones (arXiv 2406.02069).

The budget is the mean over the layers. The first layer gets max = 2 budget - min, the last one min = budget / `beta`,
those between lie on a line. Where max would not leave room for the window in the prompt, max is the prompt less the
window, and min what keeps the mean. Where even that is impossible (max < min, min below the window) all layers get the
budget. Around the policy that scores: `pyramid(budget=1024, policy=snapkv(window=8))`.

Deviations: `window` is by default what the inner policy must protect, which is SnapKV's window. A number ending in one
half is rounded up. The shares are computed per text from its prompt, and decode goes on with them. A model of one layer
keeps the budget.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Int, Shaped

from framework.arrays import Array
from framework.errors import KvtwinError
from framework.policies.h2o import H2O
from framework.policies.snapkv import SnapKV
from framework.policy import Policy, View
from framework.spec import Layer, ModelSpec
from framework.wrapper import Memory, Wrapper, least


@dataclass(frozen=True, kw_only=True)
class Pyramid(Wrapper):
    """Layer budgets that fall on a line."""

    beta: int = 20
    window: int | None = None

    order_free = False
    divides = True
    layerwise = True
    own = ("prompt",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.beta, bool) or not isinstance(self.beta, int) or self.beta < 1:
            raise KvtwinError(f"pyramid has beta={self.beta!r}; expected an integer >= 1")
        if self.window is not None and self.window < least(self.policy):
            raise KvtwinError(
                f"pyramid has window={self.window}; expected at least {least(self.policy)}, what the policy inside "
                "protects"
            )

    def head_memory(self, layer: Layer) -> Mapping[str, tuple[int, ...]]:
        return {**self.policy.head_memory(layer), "prompt": ()}

    def note(self, view: View) -> Memory:
        memory = dict(super().note(view))
        if view.phase == "prefill":
            old = memory["prompt"]
            memory["prompt"] = view.xp.zeros_like(old) + view.xp.astype(view.seen, old.dtype)[:, None]
        return memory

    def inside(self, view: View) -> View:
        return super().inside(replace(view, budget=self._share(view)))

    def budgets(
        self, view: View, scores: Shaped[Array, "batch kv_heads slots"]
    ) -> Int[Array, "batch kv_heads"]:
        return self._share(view)

    def most(self, budget: int, layer: int, spec: ModelSpec) -> int:
        top, rest = 2 * budget - budget // self.beta, budget % self.beta
        return max(budget, self._on_line(top, rest, budget, layer, len(spec.layers)))

    def total(self, budgets: Sequence[int], layer: int, spec: ModelSpec) -> int:
        return sum(self.most(budget, layer, spec) for budget in budgets)

    def _share(self, view: View) -> Int[Array, "batch kv_heads"]:
        """Whole numbers only, so that all backends round alike: max is `top` - `rest` / beta."""
        xp, budget = view.xp, view.budget
        window = least(self.policy) if self.window is None else self.window
        prompt = xp.astype(view.memory["prompt"], budget.dtype)
        least_share, rest = budget // self.beta, budget % self.beta
        top, room = 2 * budget - least_share, prompt - window
        full = top - xp.astype(rest > 0, budget.dtype) >= room
        top, rest = xp.where(full, room, top), xp.where(full, 0, rest)
        fits = (top >= budget) & xp.where(full, 2 * budget - room >= window, least_share >= window)
        return xp.where(fits, self._on_line(top, rest, budget, view.layer, view.layers), budget)

    def _on_line(self, top: Any, rest: Any, budget: Any, layer: int, layers: int) -> Any:
        """max - layer (max - min) / (layers - 1), rounded."""
        steps = layers - 1
        if steps == 0:
            return budget
        whole = steps * top - 2 * layer * (top - budget)
        over = (whole % steps) * self.beta + (2 * layer - steps) * rest
        return whole // steps + (2 * over + steps * self.beta) // (2 * steps * self.beta)

    @classmethod
    def examples(cls) -> list[Policy]:
        return [
            cls(budget=9, beta=3, policy=SnapKV(window=2, kernel=3)),
            cls(budget=8, beta=4, policy=H2O(), interval=3),
        ]
