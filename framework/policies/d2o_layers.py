"""D2O's layer budgets: the more evenly a layer attends to the prompt, the more it keeps (arXiv 2406.13035).

Of each head, the variance over tokens of the attention that each has received from the prompt. The variances of a
layer's heads are scaled, (variance - least) / (largest - least + 1e-6), and F is their mean. Layers get shares of
layers x budget in proportion to exp(-F), once the prompt is seen. Around the policy that scores.

Deviations: the scaling is that of the reference code; whether the paper has it could not be established. With grouped
queries a head is a kv head, with the mean attention of its group, so that a layer with one kv head has F = 0. The code
leaves the first two layers and the last whole, and cuts the others' share of the prompt to between 0.01 and 1, whatever
the sum; here all layers share the budget, each gets at least what the inner policy must protect and at most the length
of the prompt, and what that leaves over goes to the others, as in `cake`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from framework.arrays import Array
from framework.policies.cake import shares
from framework.policies.h2o import H2O
from framework.policies.snapkv import SnapKV
from framework.policy import Needs, Policy, View
from framework.wrapper import Memory, Wrapper, both, least

TINY = 1e-6


@dataclass(frozen=True, kw_only=True)
class D2OLayers(Wrapper):
    """Divides the budget of all layers by the variance of the attention that tokens receive."""

    allocates = True
    own = ("d2o_attended",)

    @property
    def needs(self) -> Needs:
        return both(self.policy.needs, Needs(sums=True))

    @property
    def memory(self) -> Mapping[str, float]:
        return {**self.policy.memory, "d2o_attended": 0.0}

    def note(self, view: View) -> Memory:
        attended = view.memory["d2o_attended"]
        return {
            **super().note(view),
            "d2o_attended": attended + view.sums if view.phase != "pass" else attended,
        }

    def statistic(self, view: View) -> Float[Array, "batch"]:
        """F."""
        xp = view.xp
        attended, filled = (
            view.memory["d2o_attended"],
            xp.astype(view.filled, view.memory["d2o_attended"].dtype),
        )
        count = xp.sum(filled, axis=-1, keepdims=True)
        mean = xp.sum(attended * filled, axis=-1, keepdims=True) / xp.where(count < 1, 1.0, count)
        apart = (attended - mean) * filled
        variance = xp.sum(apart * apart / xp.where(count < 2, 1.0, count - 1), axis=-1)
        low, high = (xp.expand_dims(end(variance, axis=-1), axis=-1) for end in (xp.min, xp.max))
        return xp.mean((variance - low) / (high - low + TINY), axis=-1)

    def allocate(
        self,
        statistics: Float[np.ndarray, "layers batch"],
        budgets: Int[np.ndarray, "layers batch"],
        seen: Int[np.ndarray, "batch"],
    ) -> Int[np.ndarray, "layers batch"]:
        low, given = least(self.policy), np.zeros(budgets.shape, np.int32)
        for row, tokens in enumerate(seen.tolist()):
            weights = np.exp(-statistics[:, row])
            given[:, row] = shares(weights, int(budgets[:, row].sum()), low, max(low, tokens))
        return given

    @classmethod
    def examples(cls) -> list[Policy]:
        return [cls(budget=9, policy=H2O()), cls(budget=8, policy=SnapKV(window=2, kernel=3), interval=3)]
