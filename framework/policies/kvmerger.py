"""KVMerger: tokens in a row whose keys are alike are merged into the most attended of them (arXiv 2407.08454).

Around the policy that decides who stays. A set is a run of neighbours in a head's cache, each with a cosine above
`threshold` to the key before it. Every evicted token of a set is merged into the set's pivot: of those of the set that
stay, the one that has received most attention since it came. The weight of a merged token is the Gaussian kernel
exp(-|key - pivot's key|^2 / (2 `sigma`^2)), that of the pivot 1; keys and values alike are averaged.

Deviations: in the paper each set leaves one token behind, so that the threshold says how many remain, and tokens of
high attention and the newest are left out of the sets. Here the budget says it: who stays is the inner policy's choice,
with `h2o` the newest and the most attended. So a set may keep several tokens, of which only the pivot takes anything
in, and a set of which none stays is dropped. Neighbours are neighbours in the cache, also where tokens between them
were evicted before. Merging goes on at decode, with the keys as they were merged. Which threshold and sigma the paper
used could not be established: 0.75 is that of another implementation, 5 a choice made here, and the paper's estimate
of sigma from the data is left out.
Keys are compared as they are rotated. With grouped queries the attention is the mean over the group. Tokens that a
sliding window has left leave no trace.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Bool, Int

from framework.arrays import Array, blocks, keep, take_slots
from framework.errors import KvtwinError
from framework.eviction import alive
from framework.policies.h2o import H2O
from framework.policies.keydiff import unit
from framework.policies.merge import blended, is_kept
from framework.policies.snapkv import SnapKV
from framework.policy import BLOCK, Merged, Needs, Policy, View
from framework.wrapper import Memory, Wrapper, both


@dataclass(frozen=True, kw_only=True)
class KVMerger(Wrapper):
    """Merges what is evicted into the most attended of its similar neighbours that stay."""

    policy: Policy = H2O()
    threshold: float | int = 0.75
    sigma: float | int = 5.0

    order_free = False
    merges = True
    own = ("kvmerger_received",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (-1 <= self.threshold < 1 and 0 < self.sigma < float("inf")):
            raise KvtwinError(
                f"kvmerger has threshold={self.threshold}, sigma={self.sigma}; "
                "expected a cosine from -1 to below 1, and a finite sigma above 0"
            )

    @property
    def needs(self) -> Needs:
        return both(self.policy.needs, Needs(keys=True, values=True, sums=True))

    @property
    def memory(self) -> Mapping[str, float]:
        return {**self.policy.memory, "kvmerger_received": 0.0}

    def note(self, view: View) -> Memory:
        received = view.memory["kvmerger_received"]
        return {
            **super().note(view),
            "kvmerger_received": received + view.sums if view.phase != "pass" else received,
        }

    def merge(self, view: View, index: Int[Array, "batch kv_heads kept"]) -> Merged:
        xp = view.xp
        found, pivot = self._pivots(view, index)
        apart = view.keys - take_slots(xp, keep(xp, view.keys, index, 0.0), pivot)
        kernel = xp.exp(-xp.sum(apart * apart, axis=-1) / (2 * self.sigma**2))
        evicted = alive(view.positions, view.seen, view.window) & ~is_kept(view, index)
        weight = xp.where(found & evicted, kernel, 0.0)
        return *blended(view, index, pivot, weight, 1.0), {}

    def _pivots(
        self, view: View, index: Int[Array, "batch kv_heads kept"]
    ) -> tuple[Bool[Array, "batch kv_heads slots"], Int[Array, "batch kv_heads slots"]]:
        """Whether a token of each slot's set stays, and the number of the most attended one; the oldest of equals."""
        xp, key = view.xp, unit(view.xp, view.keys)
        cosine = xp.sum(key[:, :, 1:, :] * key[:, :, :-1, :], axis=-1)
        first = xp.concat([xp.ones_like(view.filled[:, :, :1]), cosine <= self.threshold], axis=-1)
        run = xp.cumulative_sum(xp.astype(first, xp.int32), axis=-1, dtype=xp.int32)
        own, received = keep(xp, run, index, 0), keep(xp, view.memory["kvmerger_received"], index, 0.0)

        def best(number: Array) -> Array:
            worth = xp.where(number[..., None] == own[:, :, None, :], received[:, :, None, :], -1.0)
            top = xp.max(worth, axis=-1)
            return xp.stack([top, xp.astype(xp.argmax(worth, axis=-1), top.dtype)], axis=-1)

        made = blocks(xp, best, run, size=BLOCK, axis=2, out=2)
        return made[..., 0] >= 0, xp.astype(made[..., 1], xp.int32)

    @classmethod
    def examples(cls) -> list[Policy]:
        return [
            cls(budget=9, threshold=0.2, sigma=2),
            cls(budget=8, threshold=-0.5, policy=SnapKV(window=2, kernel=3), interval=3),
        ]
