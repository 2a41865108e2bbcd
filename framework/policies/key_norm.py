"""Key norm: tokens whose keys are short stay (arXiv 2406.11430: low norm goes with high attention)."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float

from framework.arrays import Array
from framework.policy import Needs, Policy, View


@dataclass(frozen=True, kw_only=True)
class KeyNorm(Policy):
    """Scores a token by minus the Euclidean norm of its key."""

    order_free: ClassVar[bool] = True

    @property
    def needs(self) -> Needs:
        return Needs(keys=True)

    def score(self, view: View) -> Float[Array, "batch kv_heads slots"]:
        return -view.xp.sqrt(view.xp.sum(view.keys * view.keys, axis=-1))
