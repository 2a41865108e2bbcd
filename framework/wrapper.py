"""A policy around another one: `adakv(budget=64, policy=snapkv(window=8))`. It has the budget; the inner one scores.

A wrapper file holds one subclass of `Wrapper` that overrides what it changes; all else is the inner policy's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from framework.arrays import Array
from framework.errors import KvtwinError
from framework.policy import Block, Needs, Policy, View, name
from framework.spec import Layer, ModelSpec

OUTER = {"budget": None, "fraction": None, "interval": 1}  # fields that only the outermost policy sets


def both(one: Needs, other: Needs) -> Needs:
    """What two policies need together."""
    return Needs(
        **{each.name: max(getattr(one, each.name), getattr(other, each.name)) for each in fields(Needs)}
    )


def check_inner(outer: str, inner: Policy) -> None:
    """Raises unless a policy can stand inside another one."""
    for field, unset in OUTER.items():
        if getattr(inner, field) != unset:
            raise KvtwinError(
                f"{name(inner)} inside {outer} has its own {field}; expected it on {outer}: {outer}({field}=..., ...)"
            )
    if not inner.evicts:
        raise KvtwinError(
            f"{name(inner)} inside {outer} keeps every token; expected a policy that scores them"
        )


@dataclass(frozen=True, kw_only=True)
class Wrapper(Policy):
    """Base of the wrappers: passes every hook on to `policy`."""

    policy: Policy

    def __post_init__(self) -> None:
        outer = name(self).partition("(")[0]
        check_inner(outer, self.policy)
        if self.divides and self.policy.divides:
            raise KvtwinError(
                f"{outer} and {name(self.policy)} both divide budgets among heads; expected one of them"
            )
        if self.divides and self.policy.shared:
            raise KvtwinError(
                f"{name(self.policy)} keeps one set for all heads of a layer, so that {outer} has nothing to divide; "
                "expected a policy that scores heads apart"
            )

    @property
    def needs(self) -> Needs:
        return self.policy.needs

    @property
    def memory(self) -> Mapping[str, float]:
        return self.policy.memory

    @property
    def order_free(self) -> bool:
        return self.policy.order_free

    @property
    def shared(self) -> bool:
        return self.policy.shared

    @property
    def repositions(self) -> bool:
        return self.policy.repositions

    @property
    def divides(self) -> bool:
        return self.policy.divides

    @property
    def allocates(self) -> bool:
        return self.policy.allocates

    @property
    def merges(self) -> bool:
        return self.policy.merges

    def head_memory(self, layer: Layer) -> Mapping[str, tuple[int, ...]]:
        return self.policy.head_memory(layer)

    def constants(self, spec: ModelSpec) -> Mapping[str, np.ndarray]:
        return self.policy.constants(spec)

    def stream(self, view: View, block: Block) -> Mapping[str, Float[Array, "batch kv_heads *rest"]]:
        return self.policy.stream(view, block)

    def note(self, view: View) -> Mapping[str, Float[Array, "batch kv_heads *rest"]]:
        return self.policy.note(view)

    def score(self, view: View) -> Shaped[Array, "batch kv_heads slots"]:
        return self.policy.score(view)

    def protected(self, view: View) -> Bool[Array, "batch kv_heads slots"] | None:
        return self.policy.protected(view)

    def protects(self, budget: int) -> int:
        return self.policy.protects(budget)

    def budgets(
        self, view: View, scores: Shaped[Array, "batch kv_heads slots"]
    ) -> Int[Array, "batch kv_heads"]:
        return self.policy.budgets(view, scores)

    def most(self, budget: int, layer: int, spec: ModelSpec) -> int:
        return self.policy.most(budget, layer, spec)

    def statistic(self, view: View) -> Float[Array, "batch"]:
        return self.policy.statistic(view)

    def allocate(
        self,
        statistics: Float[np.ndarray, "layers batch"],
        budgets: Int[np.ndarray, "layers batch"],
        seen: Int[np.ndarray, "batch"],
    ) -> Int[np.ndarray, "layers batch"]:
        return self.policy.allocate(statistics, budgets, seen)

    def merge(self, view: View, index: Int[Array, "batch kv_heads kept"]) -> tuple[Any, Any]:
        return self.policy.merge(view, index)

    def passes(self, prompt: Sequence[int], encode: Callable[[str], list[int]]) -> list[list[int]]:
        return self.policy.passes(prompt, encode)
