"""Policies made of policies: around one, `adakv(budget=64, policy=snapkv(window=8))`, or of several.

The outermost has the budget; those inside score. A wrapper file holds one subclass of `Wrapper` that overrides what it
changes; all else is the inner policy's. A file that puts policies side by side holds one of `Several`.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce
from itertools import count
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from framework.arrays import Array, take_slots
from framework.errors import KvtwinError
from framework.policy import Block, Merged, Needs, Policy, View, name
from framework.spec import Layer, ModelSpec

OUTER = ("budget", "fraction", "interval")  # fields that only the outermost policy sets
MOST = 2**16  # the largest protected count that is looked for

Memory = Mapping[str, Float[Array, "batch kv_heads *rest"]]


def both(one: Needs, other: Needs) -> Needs:
    """What two policies need together."""
    return Needs(
        **{each.name: max(getattr(one, each.name), getattr(other, each.name)) for each in fields(Needs)}
    )


def least(policy: Policy) -> int:
    """The smallest budget that holds what a policy protects, and at least 1."""
    for budget in count(1):
        if policy.protects(budget) <= budget:
            return budget
        if budget > MOST:
            break
    raise KvtwinError(f"{name(policy)} protects more than every budget up to {MOST}; expected less")


def rereads(policy: Policy) -> bool:
    """True where a policy, or the one that it wraps, reads the prompt a second time."""
    while isinstance(policy, Wrapper):
        policy = policy.policy
    return type(policy).passes is not Policy.passes


def seen_by(policy: Policy, view: View) -> View:
    """The view with no more of the newest queries than an inner policy asks for; those around it may ask for more."""
    asked = policy.needs.queries
    if view.queries is None or view.queries.shape[3] == asked:
        return view
    if asked == 0:
        return replace(view, queries=None, query_positions=None)
    return replace(
        view, queries=view.queries[:, :, :, -asked:, :], query_positions=view.query_positions[:, -asked:]
    )


def check_inner(outer: str, inner: Policy) -> None:
    """Raises unless a policy can stand inside another one."""
    for field in OUTER:
        # A policy that comes with an interval of its own has it as a default, and here the outer one counts.
        if getattr(inner, field) != type(inner).__dataclass_fields__[field].default:
            raise KvtwinError(
                f"{name(inner)} inside {outer} has its own {field}; expected it on {outer}: {outer}({field}=..., ...)"
            )
    if not inner.evicts:
        raise KvtwinError(
            f"{name(inner)} inside {outer} keeps every token; expected a policy that scores them"
        )


@dataclass(frozen=True, kw_only=True)
class Wrapper(Policy):
    """Base of the wrappers: passes every hook on to `policy`.

    One that needs, or remembers, more than the policy inside adds it to `needs`, and names its own arrays in
    `head_memory`; `inside` is the view as the inner policy knows it. `layerwise`: what `budgets` gives is one number
    for all heads of a layer, which a wrapper further out may divide among them.
    """

    policy: Policy

    layerwise: ClassVar[bool] = False
    own: ClassVar[
        tuple[str, ...]
    ] = ()  # names of the wrapper's own memory, which the inner policy does not see

    def __post_init__(self) -> None:
        outer, inner = name(self).partition("(")[0], name(self.policy)
        check_inner(outer, self.policy)
        kind = type(self)
        divided = kind.divides is True and self.policy.divides
        if divided and (kind.layerwise or not getattr(self.policy, "layerwise", False)):
            raise KvtwinError(f"{outer} and {inner} both divide the budget; expected one of them")
        if kind.divides is True and self.policy.shared:
            raise KvtwinError(
                f"{inner} keeps one set for all heads of a layer, and {outer} gives each head a budget of its own; "
                "expected a policy that scores heads apart"
            )
        if kind.shared is True and self.policy.divides:
            raise KvtwinError(
                f"{outer} keeps one set for all heads of a layer, and {inner} divides budgets; "
                "expected a policy that does not"
            )
        if kind.allocates is True and (self.policy.allocates or self.policy.divides):
            raise KvtwinError(
                f"{outer} shares the budget among layers, and {inner} divides it too; expected one of them"
            )
        for what in ("repositions", "merges"):
            if getattr(kind, what) is True and getattr(self.policy, what):
                raise KvtwinError(f"{outer} and {inner} both {what.removesuffix('s')}; expected one of them")
        if kind.protected is not Wrapper.protected and self.policy.divides and kind.divides is not True:
            raise KvtwinError(
                f"{inner} divides budgets without knowing what {outer} protects; expected {outer} inside of it"
            )

    def inside(self, view: View) -> View:
        """What the inner policy sees."""
        memory = {key: value for key, value in view.memory.items() if key not in self.own}
        return seen_by(self.policy, replace(view, memory=memory))

    def _with_own(self, view: View, memory: Memory) -> Memory:
        return {**memory, **{key: view.memory[key] for key in self.own}}

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

    def stream(self, view: View, block: Block) -> Memory:
        return self._with_own(view, self.policy.stream(self.inside(view), block))

    def note(self, view: View) -> Memory:
        return self._with_own(view, self.policy.note(self.inside(view)))

    def score(self, view: View) -> Shaped[Array, "batch kv_heads slots"]:
        return self.policy.score(self.inside(view))

    def protected(self, view: View) -> Bool[Array, "batch kv_heads slots"] | None:
        return self.policy.protected(self.inside(view))

    def protects(self, budget: int) -> int:
        return self.policy.protects(budget)

    def budgets(
        self, view: View, scores: Shaped[Array, "batch kv_heads slots"]
    ) -> Int[Array, "batch kv_heads"]:
        """Those of the inner policy, by its own scores."""
        if not self.policy.divides:
            return view.budget
        inner = self.inside(view)
        same = type(self).score is Wrapper.score
        return self.policy.budgets(inner, scores if same else self.policy.score(inner))

    def most(self, budget: int, layer: int, spec: ModelSpec) -> int:
        return self.policy.most(budget, layer, spec)

    def total(self, budgets: Sequence[int], layer: int, spec: ModelSpec) -> int:
        return self.policy.total(budgets, layer, spec)

    def statistic(self, view: View) -> Float[Array, "batch"]:
        return self.policy.statistic(self.inside(view))

    def allocate(
        self,
        statistics: Float[np.ndarray, "layers batch"],
        budgets: Int[np.ndarray, "layers batch"],
        seen: Int[np.ndarray, "batch"],
    ) -> Int[np.ndarray, "layers batch"]:
        return self.policy.allocate(statistics, budgets, seen)

    def merge(self, view: View, index: Int[Array, "batch kv_heads kept"]) -> Merged:
        return self.policy.merge(self.inside(view), index)

    def passes(self, prompt: Sequence[int], encode: Callable[[str], list[int]]) -> list[list[int]]:
        return self.policy.passes(prompt, encode)


@dataclass(frozen=True, kw_only=True)
class Several(Policy):
    """Base of what puts policies side by side: `members` names them, `turn` says which of them decides.

    Each has its own memory, under its name. Together they need, and remember, what any of them does; a promise holds
    where all of them make it.
    """

    @property
    @abstractmethod
    def members(self) -> Mapping[str, Policy]:
        """The policies, each under a name of its own."""

    @abstractmethod
    def turn(self, view: View) -> str:
        """The name of the one that decides here."""

    def notes(self, view: View) -> Sequence[str]:
        """The names of those that are to remember what they see here."""
        return list(self.members)

    def _hearing(self, view: View) -> list[str]:
        """`notes`; and of a question that is read before it comes, those that ask for it alone."""
        every = view.phase != "pass"
        return [key for key in self.notes(view) if every or self.members[key].needs.question]

    def __post_init__(self) -> None:
        outer = name(self).partition("(")[0]
        for each in self.members.values():
            check_inner(outer, each)
            if each.allocates:
                raise KvtwinError(
                    f"{name(each)} inside {outer} shares the budget among layers, not all of which are its own; "
                    f"expected it around {outer}"
                )
            if rereads(each):
                raise KvtwinError(
                    f"{name(each)} inside {outer} reads the prompt a second time, which the policies beside it would "
                    f"take for text; expected it alone, or inside a wrapper of one policy"
                )
        if self._any("repositions") and not self._all("repositions"):
            raise KvtwinError(
                f"{outer}: some of its policies reposition and some do not, and a cache rotates keys in one way; "
                "expected all or none"
            )

    def as_seen_by(self, key: str, view: View) -> View:
        """The view of one of them: its own memory and constants under their own names."""
        memory, constants = stripped(view.memory, key), stripped(view.constants, key)
        return seen_by(self.members[key], replace(view, memory=memory, constants=constants))

    def _decides(self, view: View) -> tuple[Policy, View]:
        key = self.turn(view)
        return self.members[key], self.as_seen_by(key, view)

    def _all(self, what: str) -> bool:
        return all(getattr(each, what) for each in self.members.values())

    def _any(self, what: str) -> bool:
        return any(getattr(each, what) for each in self.members.values())

    @property
    def needs(self) -> Needs:
        return reduce(both, (each.needs for each in self.members.values()))

    @property
    def memory(self) -> Mapping[str, float]:
        return named({key: each.memory for key, each in self.members.items()})

    @property
    def order_free(self) -> bool:
        return self._all("order_free")

    @property
    def shared(self) -> bool:
        return self._all("shared")

    @property
    def repositions(self) -> bool:
        return self._all("repositions")

    @property
    def divides(self) -> bool:
        return self._any("divides")

    @property
    def merges(self) -> bool:
        return self._any("merges")

    def head_memory(self, layer: Layer) -> Mapping[str, tuple[int, ...]]:
        return named({key: each.head_memory(layer) for key, each in self.members.items()})

    def constants(self, spec: ModelSpec) -> Mapping[str, np.ndarray]:
        return named({key: each.constants(spec) for key, each in self.members.items()})

    def stream(self, view: View, block: Block) -> Memory:
        asking = [key for key in self._hearing(view) if self.members[key].needs.stream]
        new = {key: self.members[key].stream(self.as_seen_by(key, view), block) for key in asking}
        return {**view.memory, **named(new)}

    def note(self, view: View) -> Memory:
        new = {key: self.members[key].note(self.as_seen_by(key, view)) for key in self._hearing(view)}
        return {**view.memory, **named(new)}

    def score(self, view: View) -> Shaped[Array, "batch kv_heads slots"]:
        policy, own = self._decides(view)
        return policy.score(own)

    def protected(self, view: View) -> Bool[Array, "batch kv_heads slots"] | None:
        policy, own = self._decides(view)
        return policy.protected(own)

    def protects(self, budget: int) -> int:
        return max(each.protects(budget) for each in self.members.values())

    def budgets(
        self, view: View, scores: Shaped[Array, "batch kv_heads slots"]
    ) -> Int[Array, "batch kv_heads"]:
        policy, own = self._decides(view)
        return policy.budgets(own, scores) if policy.divides else view.budget

    def most(self, budget: int, layer: int, spec: ModelSpec) -> int:
        return max(each.most(budget, layer, spec) for each in self.members.values())

    def total(self, budgets: Sequence[int], layer: int, spec: ModelSpec) -> int:
        return max(each.total(budgets, layer, spec) for each in self.members.values())

    def merge(self, view: View, index: Int[Array, "batch kv_heads kept"]) -> Merged:
        policy, own = self._decides(view)
        if policy.merges:
            keys, values, memory = policy.merge(own, index)
            return keys, values, named({self.turn(view): memory})
        return take_slots(view.xp, view.keys, index), take_slots(view.xp, view.values, index), {}


def named(maps: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The entries of several maps, each with the name of its map before its own."""
    return {f"{key}_{each}": value for key, one in maps.items() for each, value in one.items()}


def stripped(entries: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The entries of one map out of `named`."""
    start = f"{key}_"
    return {each.removeprefix(start): value for each, value in entries.items() if each.startswith(start)}
