"""A cache policy: the rule that says which tokens live, written once in array code for every backend.

A policy file holds one subclass of `Policy`: a frozen dataclass whose `score` gives a number per slot; higher stays.
Everything else here is the machinery's side of the contract: what a policy is shown (`View`), and the one rule that
turns scores into a kept set (`survivors`, and `weakest` for one slot).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from framework.arrays import FAR, Array, Namespace, device, softmax
from framework.errors import KvtwinError
from framework.registry import Registry
from framework.spec import ModelSpec

Phase = Literal["prefill", "decode"]
UNLIMITED = 2**30  # the traced budget of a layer without one


@dataclass(frozen=True)
class Needs:
    """What a policy reads of the model beside positions and its own memory. What is not asked for is not computed.

    `queries`: the number of newest queries kept for `View.attention` (implies `keys`). `sums`: the attention that each
    slot received from the queries of this call.
    """

    keys: bool = False
    values: bool = False
    queries: int = 0
    sums: bool = False


@dataclass(frozen=True)
class View:
    """What a policy sees of one layer after the tokens of a call were appended and attended.

    Slots are in position order with the empty ones (position -1) last, except under `order_free` policies, which see
    any order. Heads that hold fewer slots are padded with empty ones. Arrays are at least float32.

    `budget` is the only budget that a policy may read. `seen` counts the tokens of each row, those of this call
    included: the next token will have position `seen`. `queries` are the newest ones as the model used them (rotated),
    at `query_positions` (-1: no such query yet). Memory holds the policy's own arrays, one number per slot.
    """

    xp: Namespace
    phase: Phase
    layer: int
    layers: int
    positions: Int[Array, "batch kv_heads slots"]
    budget: Int[Array, "batch kv_heads"]
    seen: Int[Array, "batch"]
    memory: Mapping[str, Float[Array, "batch kv_heads slots"]]
    keys: Array = (
        None  # [batch kv_heads slots head_dim]; this and what follows is None unless `needs` asks for it
    )
    values: Array = None  # [batch kv_heads slots head_dim]
    queries: Array = None  # [batch kv_heads group window head_dim]
    query_positions: Array = None  # [batch window]
    sums: Array = None  # [batch kv_heads slots]
    scale: float = 1.0
    softcap: float | None = None
    window: int | None = None

    @property
    def filled(self) -> Bool[Array, "batch kv_heads slots"]:
        """True where a slot holds a token."""
        return self.positions >= 0

    def newest(self, count: int | Int[Array, "batch kv_heads"]) -> Bool[Array, "batch kv_heads slots"]:
        """True for the tokens at the last `count` positions of each row."""
        first = self.seen[:, None] - count
        return self.filled & (self.positions >= first[..., None])

    def attention(self) -> Float[Array, "batch kv_heads group window slots"]:
        """What each of the newest queries gives to each slot: the model's own softmax, recomputed over these slots.

        A query that does not exist gives 0 everywhere.
        """
        xp = self.xp
        batch, kv_heads, group, window, head_dim = self.queries.shape
        flat = xp.reshape(self.queries, (batch, kv_heads, group * window, head_dim))
        logits = xp.matmul(flat, xp.matrix_transpose(self.keys)) * self.scale
        logits = xp.reshape(logits, (batch, kv_heads, group, window, -1))
        if self.softcap is not None:
            logits = xp.tanh(logits / self.softcap) * self.softcap
        mask = attends(self.query_positions[:, None, :, None], self.positions[:, :, None, :], self.window)
        return softmax(xp, logits, mask[:, :, None, ...])


@dataclass(frozen=True, kw_only=True)
class Policy(ABC):
    """Base of every policy. Fields are hashable: an equal policy is the same static argument of a compiled step.

    `budget`: tokens kept per kv head, one number or one per layer. `fraction`: a share of the longest prompt instead;
    `resolved` makes a budget of it once the prompt is known, as `generate` does. `interval`: decode steps between two
    evictions; the cache then holds up to `interval - 1` tokens more than the budget.

    Class attributes: `memory` names the per-slot arrays and the value that a new token starts with. `order_free`
    promises that scores do not depend on slot order. `shared`: one kept set for all heads of a layer. `evicts`: False
    only for a policy that keeps all.
    """

    budget: int | tuple[int, ...] | None = None
    fraction: float | int | None = None
    interval: int = 1

    memory: ClassVar[Mapping[str, float]] = {}
    order_free: ClassVar[bool] = False
    shared: ClassVar[bool] = False
    evicts: ClassVar[bool] = True

    @abstractmethod
    def score(self, view: View) -> Shaped[Array, "batch kv_heads slots"]:
        """A number per slot; higher stays. Equal scores keep the newer token. What empty slots get does not matter."""

    @property
    def needs(self) -> Needs:
        """What the view must carry."""
        return Needs()

    @property
    def repositions(self) -> bool:
        """True: keys are rotated by their rank among the kept tokens, at every call, not by their position."""
        return False

    def note(self, view: View) -> Mapping[str, Float[Array, "batch kv_heads slots"]]:
        """The memory after this call; runs after attention, before `score`, at every call.

        It must work slot by slot: it may see the slots in any order.
        """
        return view.memory

    def protected(self, view: View) -> Bool[Array, "batch kv_heads slots"] | None:
        """True where a slot must stay whatever its score; None for nowhere."""
        return None

    def protects(self, budget: int) -> int:
        """How many slots `protected` can mark under this budget. A smaller budget is refused."""
        return 0

    @classmethod
    def examples(cls) -> list["Policy"]:
        """Small instances that every contract and equivalence test runs by itself."""
        return [cls(budget=9)]


policies = Registry(kind="policy", package="framework.policies", base=Policy)


def attends(query: Int[Array, "*query"], key: Int[Array, "*key"], window: int | None) -> Bool[Array, "*both"]:
    """True where the query at one position may attend to the key at another. -1, an empty place, never takes part."""
    seen = (key >= 0) & (key <= query)
    return seen if window is None else seen & (key > query - window)


def alive(
    positions: Int[Array, "batch kv_heads slots"], seen: Int[Array, "batch"], window: int | None
) -> Bool[Array, "batch kv_heads slots"]:
    """True where a slot holds a token that the next query of its row can still see."""
    filled = positions >= 0
    return filled if window is None else filled & (positions > seen[:, None, None] - window)


def _rank(xp: Namespace, scores: Array, protected: Array | None, living: Array) -> Array:
    """Scores in which dead slots lose to all others and protected ones win over all others."""
    dtype = xp.float64 if scores.dtype == xp.float64 else xp.float32
    largest = xp.finfo(dtype).max
    rank = xp.clip(xp.astype(scores, dtype), -largest, largest)
    if protected is not None:
        rank = xp.where(protected, xp.inf, rank)
    return xp.where(living, rank, -xp.inf)


def survivors(
    xp: Namespace,
    scores: Shaped[Array, "batch kv_heads slots"],
    protected: Bool[Array, "batch kv_heads slots"] | None,
    living: Bool[Array, "batch kv_heads slots"],
    budget: Int[Array, "batch kv_heads"],
    capacity: int,
) -> Int[Array, "batch kv_heads capacity"]:
    """Index of the slots that stay, in position order, -1 beyond their count. Slots must come in position order.

    Dead slots never stay. Of the living, the protected win, then the higher score, then the newer token. Among the
    protected, who fit into any budget that is not refused, only age counts.
    """
    slots = scores.shape[-1]
    rank = _rank(xp, scores, protected, living)
    # Newest first, then a stable sort by falling score: equal scores keep the newer token.
    best_first = slots - 1 - xp.argsort(-xp.flip(rank, axis=-1), axis=-1, stable=True)
    place = xp.argsort(best_first, axis=-1)  # the inverse permutation
    stays = living & (place < budget[..., None])
    here = xp.arange(slots, dtype=xp.int32, device=device(scores))
    index = xp.sort(xp.where(stays, here, slots), axis=-1)
    index = xp.where(index == slots, -1, index)[..., : min(capacity, slots)]
    if capacity > slots:
        tail = xp.full((*index.shape[:-1], capacity - slots), -1, dtype=index.dtype, device=device(scores))
        index = xp.concat([index, tail], axis=-1)
    return xp.astype(index, xp.int32)


def weakest(
    xp: Namespace,
    scores: Shaped[Array, "batch kv_heads slots"],
    positions: Int[Array, "batch kv_heads slots"],
    protected: Bool[Array, "batch kv_heads slots"] | None,
    living: Bool[Array, "batch kv_heads slots"],
) -> Int[Array, "batch kv_heads"]:
    """The slot that `survivors` drops first, in any order: filled but dead, else lowest score, oldest of equals."""
    filled = positions >= 0
    rank = _rank(xp, scores, protected, living)
    rank = xp.where(filled, rank, xp.inf)
    lowest = rank == xp.min(rank, axis=-1, keepdims=True)
    return xp.argmin(xp.where(lowest & filled, positions, FAR), axis=-1)


def noted(policy: Policy, view: View) -> View:
    """The view with the memory that the policy's `note` gives."""
    if not policy.memory:
        return view
    memory = _call(policy, view, policy.note)
    shapes = (
        {key: _shape(view, value) for key, value in memory.items()} if isinstance(memory, Mapping) else {}
    )
    expected = dict.fromkeys(policy.memory, tuple(view.positions.shape))
    if shapes != expected:
        raise KvtwinError(
            f"policy {name(policy)}: note returned {shapes or type(memory).__name__}; "
            f"expected {expected}: one number per (batch, kv_heads, slots)"
        )
    return replace(view, memory=memory)


def judge(policy: Policy, view: View) -> tuple[Array, Array | None]:
    """Scores and protected slots of one layer; a policy that fails or returns a wrong shape is named."""
    scores = _call(policy, view, policy.score)
    protected = _call(policy, view, policy.protected)
    for what, value in (("score", scores), ("protected", protected)):
        shape = _shape(view, value)
        if shape != tuple(view.positions.shape) and not (what == "protected" and value is None):
            raise KvtwinError(
                f"policy {name(policy)}: {what} returned {'shape ' * isinstance(shape, tuple)}{shape}; "
                f"expected {tuple(view.positions.shape)}: one value per (batch, kv_heads, slots), made with view.xp"
            )
    if protected is not None and protected.dtype != view.xp.bool:
        raise KvtwinError(
            f"policy {name(policy)}: protected returned {protected.dtype}; expected True or False per slot"
        )
    return scores, protected


def _shape(view: View, value: Any) -> tuple[int, ...] | str:
    """The shape of an array of the view's library; the type of anything else."""
    foreign = isinstance(value, np.ndarray) and not isinstance(view.positions, np.ndarray)
    if foreign or not hasattr(value, "shape"):
        return f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")
    return tuple(value.shape)


def _call(policy: Policy, view: View, hook: Callable[[View], Any]) -> Any:
    try:
        return hook(view)
    except KvtwinError:
        raise
    except Exception as error:
        first = (str(error).splitlines() or [""])[0][:200]
        raise KvtwinError(
            f"policy {name(policy)} failed in {hook.__name__} on {view.xp.__name__}: {type(error).__name__}: {first}\n"
            "expected array code that runs on NumPy, torch and jax alike; `kvtwin check` shows a smallest example"
        ) from error


def ordered(view: View, order: Int[Array, "batch kv_heads slots"], take: Any) -> View:
    """The same view with its slots gathered by `order`; `take(x, order)` is the backend's gather."""
    optional = {
        key: take(value, order)
        for key in ("keys", "values", "sums")
        if (value := getattr(view, key)) is not None
    }
    memory = {key: take(value, order) for key, value in view.memory.items()}
    return replace(view, positions=take(view.positions, order), memory=memory, **optional)


def name(policy: Policy) -> str:
    """The policy in the one spelling, as `policies.make` reads it back."""
    return policies.spelling(policy)


def resolved(policy: Policy, tokens: int) -> Policy:
    """The policy with its `fraction` of this many prompt tokens, rounded up, as its budget."""
    if policy.fraction is None or not policy.evicts:
        return policy
    if policy.budget is not None:
        raise KvtwinError(f"policy {name(policy)} has a budget and a fraction; expected one of them")
    if isinstance(policy.fraction, bool) or not 0 < policy.fraction <= 1:
        raise KvtwinError(
            f"policy {name(policy)}: fraction is {policy.fraction}; expected above 0, at most 1"
        )
    return replace(policy, budget=math.ceil(round(policy.fraction * tokens, 6)), fraction=None)


def budgets(policy: Policy, spec: ModelSpec) -> tuple[int | None, ...]:
    """Tokens kept per kv head, for each layer; None where the policy keeps all. Refuses what cannot be met."""
    if not policy.evicts:
        if policy.budget is not None or policy.fraction is not None:
            raise KvtwinError(f"policy {name(policy)} keeps every token; expected no budget")
        return (None,) * len(spec.layers)
    if policy.fraction is not None:
        raise KvtwinError(
            f"policy {name(policy)} has a fraction of a prompt that is not known here; expected a budget in tokens, "
            "as framework.policy.resolved(policy, tokens) makes it"
        )
    if policy.budget is None:
        raise KvtwinError(
            f"policy {name(policy)} has no budget; expected the tokens to keep, as in budget=64"
        )
    if isinstance(policy.interval, bool) or not isinstance(policy.interval, int) or policy.interval < 1:
        raise KvtwinError(f"policy {name(policy)}: interval is {policy.interval!r}; expected an integer >= 1")
    each = policy.budget if isinstance(policy.budget, tuple) else (policy.budget,) * len(spec.layers)
    if len(each) != len(spec.layers):
        raise KvtwinError(
            f"policy {name(policy)} has {len(each)} budgets; expected one, or one for each of {len(spec.layers)} layers"
        )
    for layer, budget in enumerate(each):
        if isinstance(budget, bool) or not isinstance(budget, int):
            raise KvtwinError(
                f"policy {name(policy)}: budget {budget!r} in layer {layer}; expected an integer"
            )
        least = max(1, policy.protects(budget))
        if budget < least:
            raise KvtwinError(
                f"policy {name(policy)}: budget {budget} in layer {layer}; expected at least {least}: "
                "what it protects, and at least 1"
            )
    return each


def limit(budget: int | None, window: int | None) -> int | None:
    """Most tokens that a head of this layer can hold after an eviction; None where nothing is ever evicted."""
    bounds = [bound for bound in (budget, None if window is None else window - 1) if bound is not None]
    return min(bounds, default=None)


def overwrites(policy: Policy, budget: int | None, window: int | None) -> bool:
    """True where decode puts each new token into the slot of the weakest, instead of appending and compacting."""
    return (
        policy.order_free
        and not policy.repositions
        and policy.interval == 1
        and (budget is not None or window is not None)
    )
