"""D2O: what goes is merged where it is like what stays, by a threshold that follows the text (arXiv 2406.13035).

Around the policy that decides who stays. Each evicted token finds, in its head, the kept key of the largest cosine. The
threshold of a head is the mean of these cosines at its first eviction, and later `beta` x this eviction's mean + (1 -
`beta`) x the threshold before. Tokens below it are dropped. A kept token and the others that found it are averaged,
keys and values alike, with the weights e and exp(cosine).

By default it is the whole method, around `d2o_layers(policy=h2o())`; `d2o(policy=h2o())` leaves the layers equal.

Deviations: the paper's rule at decode is for one evicted token; where several leave at once the mean of their cosines
counts, as in its reference code. That code decides for all heads of a layer at once, by their mean cosine, where each
head has a threshold here; and it multiplies by the cosine and divides by the count; the weights above are those
of the equations as others cite them. `beta` is 0.7 as in the code's comment; its class has 0.5. A cosine within 1e-6 of
the threshold reaches it, so that equal ones are decided alike on every backend. The split between recent and important
tokens, and the first tokens that the code keeps, are the inner policy's matter. Tokens that a sliding window has left
leave no trace. Keys are merged as they are rotated.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Int

from framework.arrays import Array, keep
from framework.errors import KvtwinError
from framework.eviction import alive
from framework.policies.d2o_layers import D2OLayers
from framework.policies.h2o import H2O
from framework.policies.merge import blended, is_kept, nearest
from framework.policies.snapkv import SnapKV
from framework.policy import Merged, Needs, Policy, View
from framework.spec import Layer
from framework.wrapper import Wrapper, both

ROUNDING = 1e-6


@dataclass(frozen=True, kw_only=True)
class D2O(Wrapper):
    """Merges evicted keys and values into similar ones that stay, above a moving threshold."""

    policy: Policy = D2OLayers(policy=H2O())
    beta: float | int = 0.7

    order_free = False
    merges = True
    own = ("d2o_threshold", "d2o_begun")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.beta <= 1:
            raise KvtwinError(f"d2o has beta={self.beta}; expected a share from 0 to 1")

    @property
    def needs(self) -> Needs:
        return both(self.policy.needs, Needs(keys=True, values=True))

    def head_memory(self, layer: Layer) -> Mapping[str, tuple[int, ...]]:
        return {**self.policy.head_memory(layer), "d2o_threshold": (), "d2o_begun": ()}

    def merge(self, view: View, index: Int[Array, "batch kv_heads kept"]) -> Merged:
        xp = view.xp
        cosine, target = nearest(view, index, keep(xp, view.keys, index, 0.0))
        evicted = alive(view.positions, view.seen, view.window) & ~is_kept(view, index)
        evicted = evicted & xp.any(index >= 0, axis=-1)[..., None]
        count = xp.sum(xp.astype(evicted, cosine.dtype), axis=-1)
        mean = xp.sum(xp.where(evicted, cosine, 0.0), axis=-1) / xp.where(count == 0, 1.0, count)
        old, begun = view.memory["d2o_threshold"], view.memory["d2o_begun"]
        moved = xp.where(begun > 0, self.beta * mean + (1 - self.beta) * old, mean)
        threshold = xp.where(count > 0, moved, old)
        merges = evicted & (cosine >= threshold[..., None] - ROUNDING)
        weight = xp.where(merges, xp.exp(cosine), 0.0)
        begun = xp.where(count > 0, 1.0, begun)
        return *blended(view, index, target, weight, math.e), {"d2o_threshold": threshold, "d2o_begun": begun}

    @classmethod
    def examples(cls) -> list[Policy]:
        return [
            cls(budget=9),
            cls(budget=8, beta=0.5, policy=SnapKV(window=2, kernel=3), interval=3),
        ]
