"""TOVA: the tokens that the newest query attends to most (arXiv 2401.06104).

The score is the attention of the last query, averaged over all heads of the layer; every kv head keeps the same
tokens, as in the paper and its reference code. The newest token is not protected.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float

from framework.arrays import Array
from framework.policy import Needs, Policy, View


@dataclass(frozen=True, kw_only=True)
class Tova(Policy):
    """Keeps what the last query looks at, one set for all heads."""

    order_free: ClassVar[bool] = True
    shared: ClassVar[bool] = True

    @property
    def needs(self) -> Needs:
        return Needs(queries=1)

    def score(self, view: View) -> Float[Array, "batch kv_heads slots"]:
        xp = view.xp
        mean = xp.mean(view.attention(), axis=(1, 2, 3))
        return xp.broadcast_to(mean[:, None, :], view.positions.shape)

    @classmethod
    def examples(cls) -> list[Policy]:
        return [cls(budget=9), cls(budget=(7, 10), interval=2)]
