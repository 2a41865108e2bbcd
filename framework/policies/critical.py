"""CriticalKV: a token counts by what its value adds to the layer's output, not by attention alone (arXiv 2502.03805).

Around a policy that scores: the best tokens by its own score fill the share `first` of the budget, as they are; all
others compete by (score + `epsilon`) times |W_o v|_1, the mean over the query heads of a group.
`critical(policy=adakv(policy=snapkv()))` is the paper's form with uneven heads: the plain scores divide the budget,
then each head goes through both stages with what it got. In `adakv(policy=critical(...))` the first stage fills its
share of the even budget, and the weighted scores divide the rest.

Deviations: what the inner policy protects is part of the first stage. A first stage is never empty unless `first` is 0.
The share is rounded down. At decode both stages run anew at each eviction.
"""

from dataclasses import dataclass

from jaxtyping import Float

from framework.arrays import Array
from framework.errors import KvtwinError
from framework.eviction import alive, placed
from framework.policies.h2o import H2O
from framework.policies.snapkv import SnapKV
from framework.policy import Needs, Policy, View
from framework.wrapper import Wrapper, both


@dataclass(frozen=True, kw_only=True)
class Critical(Wrapper):
    """Half of the budget by the inner score, the other half by the score times the size of the value's output."""

    first: float | int = 0.5
    epsilon: float | int = 1e-4

    order_free = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.first <= 1 or self.epsilon < 0:
            raise KvtwinError(
                f"critical has first={self.first}, epsilon={self.epsilon}; expected a share from 0 to 1, and an "
                "epsilon of at least 0"
            )
        if self.policy.shared:
            raise KvtwinError(
                "critical weighs each head's values, and the policy inside keeps one set for all heads of a layer; "
                "expected a policy that scores heads apart"
            )

    @property
    def needs(self) -> Needs:
        return both(self.policy.needs, Needs(values=True, output=True))

    def score(self, view: View) -> Float[Array, "batch kv_heads slots"]:
        xp, dtype = view.xp, view.values.dtype
        inner = self.inside(view)
        scores = self.policy.score(inner)
        budget = self.policy.budgets(inner, scores) if self.policy.divides else view.budget
        place = placed(
            xp, scores, self.policy.protected(inner), alive(view.positions, view.seen, view.window)
        )
        share = xp.astype(xp.astype(budget, xp.float32) * self.first, xp.int32)
        share = xp.where(share < 1, 1, share) if self.first else share
        size = xp.mean(view.output_norm(view.values), axis=2)
        second = xp.where(view.filled, (xp.astype(scores, dtype) + self.epsilon) * size, 0.0)
        # Above all others of the row, and no larger than that needs: infinity would hide what is wrong elsewhere.
        top = xp.max(xp.abs(second), axis=(1, 2), keepdims=True) * 2 + 1
        return xp.where(place < share[..., None], top, second)

    @classmethod
    def examples(cls) -> list[Policy]:
        return [
            cls(budget=9, policy=SnapKV(window=3, kernel=3)),
            cls(budget=8, first=0.25, policy=H2O(), interval=3),
        ]
