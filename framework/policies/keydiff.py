"""KeyDiff: tokens whose keys point elsewhere than the mean direction stay (arXiv 2504.15364).

The score is minus the cosine between a key and the mean of the keys' directions over the cache, per head. The paper
evicts block by block while it reads the prompt: `generate(chunk=n, evict="chunk")` does that.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float

from framework.arrays import Array, Namespace
from framework.policy import Needs, Policy, View


@dataclass(frozen=True, kw_only=True)
class KeyDiff(Policy):
    """Keeps the keys that are least like the others."""

    needs: ClassVar[Needs] = Needs(keys=True)
    order_free: ClassVar[bool] = True

    def score(self, view: View) -> Float[Array, "batch kv_heads slots"]:
        xp, keys = view.xp, view.keys
        # With the keys as they are: their directions would be another array of the keys' size at every step.
        length = xp.sqrt(xp.sum(keys * keys, axis=-1))
        there = view.filled & (length > 0)
        inverse = xp.where(there, 1.0 / xp.where(there, length, 1.0), 0.0)
        anchor = unit(xp, xp.sum(keys * inverse[..., None], axis=2))
        return -xp.matmul(keys, anchor[..., None])[..., 0] * inverse


def unit(xp: Namespace, x: Float[Array, "*axes dim"]) -> Float[Array, "*axes dim"]:
    """Vectors scaled to length 1; a zero vector stays."""
    length = xp.sqrt(xp.sum(x * x, axis=-1, keepdims=True))
    return x / xp.where(length == 0, 1.0, length)
