"""Protect: the first tokens and the newest ones stay, whatever the policy inside says.

`protect(budget=64, sinks=4, recent=8, policy=key_norm())`: beside what the inner policy protects, `sinks` tokens from
the start of the text and the `recent` newest. They count in the budget. No paper: most of them do this for themselves,
and their code calls it sink and recent (or local) tokens.
"""

from dataclasses import dataclass

from jaxtyping import Bool

from framework.arrays import Array
from framework.errors import KvtwinError
from framework.policies.h2o import H2O
from framework.policies.key_norm import KeyNorm
from framework.policy import Policy, View
from framework.wrapper import Wrapper


@dataclass(frozen=True, kw_only=True)
class Protect(Wrapper):
    """Adds sinks and recent tokens to what a policy protects."""

    sinks: int = 4
    recent: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sinks < 0 or self.recent < 0 or self.sinks + self.recent == 0:
            raise KvtwinError(
                f"protect has sinks={self.sinks}, recent={self.recent}; expected no negative number, and one above 0"
            )

    def protected(self, view: View) -> Bool[Array, "batch kv_heads slots"]:
        own = (view.filled & (view.positions < self.sinks)) | view.newest(self.recent)
        inner = super().protected(view)
        return own if inner is None else own | inner

    def protects(self, budget: int) -> int:
        return self.policy.protects(budget) + self.sinks + self.recent

    @classmethod
    def examples(cls) -> list[Policy]:
        return [
            cls(budget=9, sinks=2, recent=3, policy=KeyNorm()),
            cls(budget=10, sinks=0, recent=4, policy=H2O(), interval=3),
        ]
