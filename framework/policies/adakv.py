"""AdaKV: heads share the budget of their layer by what their scores are worth (arXiv 2407.11550).

The layer keeps the best kv_heads x budget tokens of all its heads together, and each head at least `floor` of the
budget, and at least one, of its own best. Around any policy that scores heads apart: `adakv(budget=64,
policy=snapkv(window=8))`; around one that gives each layer its own budget, `adakv(policy=pyramid(policy=snapkv()))`, it
divides that.

Deviation: what the inner policy protects counts as best, and a head is never left with less than it protects.
"""

from dataclasses import dataclass

from jaxtyping import Int, Shaped

from framework.arrays import Array
from framework.errors import KvtwinError
from framework.eviction import alive, placed
from framework.policies.snapkv import SnapKV
from framework.policy import Policy, View
from framework.spec import ModelSpec
from framework.wrapper import Wrapper


@dataclass(frozen=True, kw_only=True)
class AdaKV(Wrapper):
    """Divides a layer's budget among its heads by the scores of the policy inside."""

    floor: float | int = 0.2

    order_free = False
    divides = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.floor <= 1:
            raise KvtwinError(f"adakv has floor={self.floor}; expected a share from 0 to 1")

    def budgets(
        self, view: View, scores: Shaped[Array, "batch kv_heads slots"]
    ) -> Int[Array, "batch kv_heads"]:
        xp = view.xp
        batch, heads, slots = scores.shape
        budget = super().budgets(view, scores)
        protected = self.protected(view)
        living = alive(view.positions, view.seen, view.window)
        # A head's own best come before all others; the rest go by score, whichever head they are in.
        own = placed(xp, scores, protected, living)
        least = xp.astype(xp.astype(budget, xp.float32) * self.floor, xp.int32)
        safe = (own < xp.where(least < 1, 1, least)[..., None]) & living
        safe = safe if protected is None else safe | (protected & living)
        flat = (batch, 1, heads * slots)
        place = placed(xp, *(xp.reshape(one, flat) for one in (scores, safe, living)))
        stays = xp.reshape(place < xp.sum(budget, axis=1)[:, None, None], living.shape) & living
        return xp.sum(xp.astype(stays, xp.int32), axis=-1, dtype=xp.int32)

    def most(self, budget: int, layer: int, spec: ModelSpec) -> int:
        return super().most(budget, layer, spec) * spec.layers[layer].kv_heads

    @classmethod
    def examples(cls) -> list[Policy]:
        return [
            cls(budget=9, policy=SnapKV(window=3, kernel=3)),
            cls(budget=8, floor=0.5, policy=SnapKV(window=2, kernel=1), interval=3),
        ]
