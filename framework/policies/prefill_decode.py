"""Prefill and decode: one policy for the prompt, another one while text is generated.

`prefill_decode(budget=64, prefill=snapkv(window=8), decode=h2o())`. Both see every call and remember what they need, so
that either can take over at any time; a second prompt in the same cache is the first one's again. Both work under the
same budget, and a smaller one than either protects is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from framework.errors import KvtwinError
from framework.policies.h2o import H2O
from framework.policies.key_norm import KeyNorm
from framework.policies.snapkv import SnapKV
from framework.policies.window import Window
from framework.policy import Policy, View
from framework.wrapper import Several


@dataclass(frozen=True, kw_only=True)
class PrefillDecode(Several):
    """The phase decides who scores."""

    prefill: Policy
    decode: Policy

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prefill.shared != self.decode.shared:
            raise KvtwinError(
                "prefill_decode: one of its policies keeps one set for all heads of a layer, and the other does not, "
                "so that it would find heads with different tokens; expected both or none"
            )

    @property
    def members(self) -> Mapping[str, Policy]:
        return {"prefill": self.prefill, "decode": self.decode}

    def turn(self, view: View) -> str:
        return "decode" if view.phase == "decode" else "prefill"

    @classmethod
    def examples(cls) -> list[Policy]:
        return [
            cls(budget=9, prefill=SnapKV(window=3, kernel=3), decode=H2O()),
            cls(budget=8, prefill=KeyNorm(), decode=Window(sinks=2), interval=3),
        ]
