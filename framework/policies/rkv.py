"""R-KV: tokens that the newest queries attend to and whose keys do not repeat others (arXiv 2505.24133).

The attention of the newest `window` queries, the largest of a group and the mean over the queries, takes the maximum
over `kernel` neighbours. Redundancy is the softmax over the tokens of the mean cosine between a key and the other keys;
between a key and the newest of those that it resembles by more than 0.5 the cosine counts as 0, so that the newest of
many alike is not redundant. The score is `beta` * attention - (1 - `beta`) * redundancy. The window itself stays.

Deviations: the reference code takes the largest product of a group before the softmax, which goes over the tokens
outside the window alone; here it is the model's attention. There a key like no other loses its cosine with the first
token; here it loses none.
"""

from dataclasses import dataclass

from jaxtyping import Bool, Float

from framework.arrays import Array, blocks, device, pool, softmax, take_slots
from framework.errors import KvtwinError
from framework.policies.keydiff import unit
from framework.policy import Needs, Policy, View

ALIKE = 0.5  # cosine above which two keys repeat each other
SIZE = 128  # slots that are compared with all others at a time


@dataclass(frozen=True, kw_only=True)
class RKV(Policy):
    """Keeps what is attended to and not said again later."""

    interval: int = 128
    window: int = 8
    kernel: int = 7
    beta: float | int = 0.07

    def __post_init__(self) -> None:
        if self.window < 1 or self.kernel < 1 or self.kernel % 2 == 0 or not 0 <= self.beta <= 1:
            raise KvtwinError(
                f"rkv has window={self.window}, kernel={self.kernel}, beta={self.beta}; "
                "expected window >= 1, an odd kernel, beta from 0 to 1"
            )

    @property
    def needs(self) -> Needs:
        return Needs(queries=self.window)

    def score(self, view: View) -> Float[Array, "batch kv_heads slots"]:
        xp = view.xp
        observed = xp.sum(xp.max(view.attention(), axis=2), axis=2) / self.window
        observed = pool(xp, xp.where(self.protected(view), 0.0, observed), self.kernel, maximum=True)
        return self.beta * observed - (1 - self.beta) * softmax(xp, self._likeness(view), view.filled)

    def _likeness(self, view: View) -> Float[Array, "batch kv_heads slots"]:
        """The mean cosine of each key with the others, without those of which it is the newest alike."""
        xp = view.xp
        keys = xp.where(view.filled[..., None], unit(xp, view.keys), 0.0)
        slots = xp.arange(keys.shape[2], dtype=xp.int32, device=device(keys))

        def newest_alike(part: Array) -> Array:
            near = xp.matmul(xp.take(keys, part, axis=2), xp.matrix_transpose(keys))
            return xp.max(xp.where((near > ALIKE) & (slots != part[:, None]), slots, -1), axis=-1)

        newest = blocks(xp, newest_alike, slots, size=SIZE, axis=0, out=2)
        near = xp.sum(keys * take_slots(xp, keys, newest), axis=-1)

        def spared(part: Array) -> Array:
            return xp.sum(xp.where(newest[:, :, None, :] == part[:, None], near[:, :, None, :], 0.0), axis=-1)

        others = xp.sum(keys, axis=2, keepdims=True) - keys
        total = xp.sum(keys * others, axis=-1) - blocks(xp, spared, slots, size=SIZE, axis=0, out=2)
        return total / xp.sum(xp.astype(view.filled, keys.dtype), axis=-1, keepdims=True)

    def protected(self, view: View) -> Bool[Array, "batch kv_heads slots"]:
        return view.newest(self.window)

    def protects(self, budget: int) -> int:
        return self.window

    @classmethod
    def examples(cls) -> list[Policy]:
        return [
            cls(budget=9, window=3, kernel=3, interval=1),
            cls(budget=8, window=2, kernel=5, beta=0.6, interval=3),
        ]
