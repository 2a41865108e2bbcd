"""CAKE: layers share the whole budget by how widely, and how changeably, they attend (arXiv 2503.12491).

A layer's preference is H^(1 / `tau1`) V^(1 / `tau2`): H the entropy of the attention that the newest `window` queries
give to the tokens before them, V its variance from query to query, both summed over heads and tokens. Layers get shares
of layers x budget in proportion to it, once the prompt is seen. Around the policy that scores:
`cake(budget=256, policy=snapkv(window=32))`.

Deviations: only the allocation is CAKE's; its own score, mean plus `gamma` times variance, is another policy's matter.
A layer gets no more than the prompt has tokens, and no less than the inner policy must protect; what is left goes to
the others in proportion, and beyond all prompts evenly. Fractions go to the layers with the largest ones. All layers
are held until the last is read (the reference code shrinks them as it goes, to the same sizes).
"""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int

from framework.arrays import Array
from framework.errors import KvtwinError
from framework.policies.h2o import H2O
from framework.policies.snapkv import SnapKV
from framework.policy import Needs, Policy, View
from framework.wrapper import Wrapper, both, least

UNKNOWN = -1e9  # the logarithm where there is no attention to judge by
SMALLEST = -30.0  # of the largest preference, as a logarithm: what is smaller gets a share as of this


@dataclass(frozen=True, kw_only=True)
class Cake(Wrapper):
    """Divides the budget of all layers by the spread of their attention."""

    window: int = 32
    tau1: float | int = 1.6
    tau2: float | int = 0.4

    allocates = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 2 or not (self.tau1 > 0 and self.tau2 > 0):
            raise KvtwinError(
                f"cake has window={self.window}, tau1={self.tau1}, tau2={self.tau2}; "
                "expected at least 2 queries, and taus above 0"
            )

    @property
    def needs(self) -> Needs:
        return both(self.policy.needs, Needs(queries=self.window))

    def statistic(self, view: View) -> Float[Array, "batch"]:
        """The logarithm of the preference: 1 / `tau2` makes powers that float32 cannot hold."""
        xp = view.xp
        asked = view.query_positions[:, -self.window :]
        view = replace(view, queries=view.queries[:, :, :, -self.window :, :], query_positions=asked)
        attention = view.attention()
        older = view.filled & (view.positions < view.seen[:, None, None] - self.window)
        attention = xp.where(older[:, :, None, None, :], attention, 0.0)
        entropy = -xp.sum(attention * xp.log(attention + 1e-10), axis=(1, 2, 3, 4))
        real = xp.astype(asked >= 0, attention.dtype)[:, None, None, :, None]
        count = xp.sum(real, axis=3, keepdims=True)
        mean = xp.sum(attention, axis=3, keepdims=True) / xp.where(count < 1, 1.0, count)
        apart = (attention - mean) * real
        variance = xp.sum(apart * apart / xp.where(count < 2, 1.0, count - 1), axis=(1, 2, 3, 4))
        known = (entropy > 0) & (variance > 0)
        logs = (
            xp.log(xp.where(known, entropy, 1.0)) / self.tau1,
            xp.log(xp.where(known, variance, 1.0)) / self.tau2,
        )
        return xp.where(known, logs[0] + logs[1], UNKNOWN)

    def allocate(
        self,
        statistics: Float[np.ndarray, "layers batch"],
        budgets: Int[np.ndarray, "layers batch"],
        seen: Int[np.ndarray, "batch"],
    ) -> Int[np.ndarray, "layers batch"]:
        low = least(self.policy)
        given = np.zeros(budgets.shape, np.int32)
        for row, tokens in enumerate(seen.tolist()):
            weights = np.exp(np.maximum(statistics[:, row] - statistics[:, row].max(), SMALLEST))
            given[:, row] = shares(weights, int(budgets[:, row].sum()), low, max(low, tokens))
        return given

    @classmethod
    def examples(cls) -> list[Policy]:
        return [
            cls(budget=9, window=3, policy=SnapKV(window=2, kernel=3)),
            cls(budget=8, window=4, policy=H2O(), interval=3),
        ]


def shares(
    weights: Float[np.ndarray, "layers"], total: int, low: int, high: int
) -> Int[np.ndarray, "layers"]:
    """Whole numbers from `low` to `high` with this sum, in proportion to the weights where the bounds allow it.

    A sum that exceeds the upper bounds goes beyond them evenly.
    """
    layers = len(weights)
    if total >= layers * high:
        exact = np.full(layers, total / layers)
    else:
        # The factor whose bounded products have the right sum, halving the interval in which it lies.
        below, above = 0.0, high / weights.min()
        for _ in range(200):
            middle = (below + above) / 2
            enough = np.clip(middle * weights, low, high).sum() >= total
            below, above = (below, middle) if enough else (middle, above)
        exact = np.clip(above * weights, low, high)
    whole = np.floor(exact + 1e-6).astype(np.int64)
    order = np.argsort(whole - exact, kind="stable")
    whole[order[: total - whole.sum()]] += 1
    return whole
