"""Per layer: a policy for each layer, from the first to the last.

`per_layer(budget=64, policies=(window(), window(), snapkv(window=8), h2o()))`. Budgets per layer go with it as with any
policy: `budget=(32, 32, 64, 128)`. Every layer allocates what any of the policies remembers; a budget below what any of
them protects is refused in all layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from framework.errors import KvtwinError
from framework.policies.h2o import H2O
from framework.policies.key_norm import KeyNorm
from framework.policies.snapkv import SnapKV
from framework.policies.window import Window
from framework.policy import Policy, View
from framework.spec import ModelSpec
from framework.wrapper import Several


@dataclass(frozen=True, kw_only=True)
class PerLayer(Several):
    """The layer decides who scores."""

    policies: tuple[Policy, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.policies, tuple) or not self.policies:
            raise KvtwinError(
                f"per_layer has policies={self.policies!r}; expected a tuple, one for each layer"
            )
        super().__post_init__()

    @property
    def members(self) -> Mapping[str, Policy]:
        return {f"p{number}": each for number, each in enumerate(dict.fromkeys(self.policies))}

    def turn(self, view: View) -> str:
        self._check(view.layers)
        mine = self.policies[view.layer]
        return next(key for key, each in self.members.items() if each == mine)

    def notes(self, view: View) -> list[str]:
        return [self.turn(view)]

    def constants(self, spec: ModelSpec) -> Mapping[str, np.ndarray]:
        self._check(len(spec.layers))
        return super().constants(spec)

    def most(self, budget: int, layer: int, spec: ModelSpec) -> int:
        return self.policies[layer].most(budget, layer, spec) if layer < len(self.policies) else budget

    def total(self, budgets: Sequence[int], layer: int, spec: ModelSpec) -> int:
        return (
            self.policies[layer].total(budgets, layer, spec) if layer < len(self.policies) else sum(budgets)
        )

    def _check(self, layers: int) -> None:
        if layers != len(self.policies):
            raise KvtwinError(
                f"per_layer has {len(self.policies)} policies; expected one for each of {layers} layers"
            )

    @classmethod
    def examples(cls) -> list[Policy]:
        return [
            cls(budget=9, policies=(H2O(), SnapKV(window=3, kernel=3))),
            cls(budget=(8, 7), policies=(Window(sinks=2), KeyNorm()), interval=3),
        ]
