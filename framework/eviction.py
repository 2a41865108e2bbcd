"""What the machinery makes of a policy: who survives, on every backend by the one rule; and which budgets hold."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Shaped

from framework.arrays import FAR, Array, Namespace, device, take_slots
from framework.errors import KvtwinError
from framework.policy import Block, Policy, View, name
from framework.shapes import EMPTY
from framework.spec import Layer, ModelSpec

UNLIMITED = 2**30  # the traced budget of a layer without one


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


def placed(
    xp: Namespace,
    scores: Shaped[Array, "batch kv_heads slots"],
    protected: Bool[Array, "batch kv_heads slots"] | None,
    living: Bool[Array, "batch kv_heads slots"],
) -> Int[Array, "batch kv_heads slots"]:
    """The place of each slot in the order in which they stay, 0 the first. Slots must come in position order."""
    rank = _rank(xp, scores, protected, living)
    # Newest first, then a stable sort by falling score: equal scores keep the newer token.
    best_first = scores.shape[-1] - 1 - xp.argsort(-xp.flip(rank, axis=-1), axis=-1, stable=True)
    return xp.argsort(best_first, axis=-1)  # the inverse permutation


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
    protected, who fit into any budget that is not refused, only age counts. No more than `capacity` stay.
    """
    slots = scores.shape[-1]
    place = placed(xp, scores, protected, living)
    stays = living & (place < budget[..., None]) & (place < capacity)
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


def slot_memory(policy: Policy) -> dict[str, float]:
    """The arrays with one number per slot that a cache keeps for a policy, and what a new token starts with."""
    return dict(policy.memory) | ({"tokens": float(EMPTY)} if policy.needs.tokens else {})


def remembers(policy: Policy, spec: ModelSpec) -> bool:
    """True where a token, once seen, leaves something behind that cannot be taken back."""
    return bool(policy.memory) or any(policy.head_memory(layer) for layer in spec.layers)


def streamed(policy: Policy, view: View, block: Block) -> View:
    """The view with the memory that the policy's `stream` gives."""
    memory = _call(policy, view, lambda seen: policy.stream(seen, block), "stream")
    return _with_memory(policy, view, memory, "stream")


def noted(policy: Policy, view: View) -> View:
    """The view with the memory that the policy's `note` gives."""
    if not view.memory:
        return view
    return _with_memory(policy, view, _call(policy, view, policy.note), "note")


def _with_memory(policy: Policy, view: View, memory: Any, hook: str) -> View:
    """The view with this memory, in the precision that memory has."""
    shapes = (
        {key: _shape(view, value) for key, value in memory.items()} if isinstance(memory, Mapping) else {}
    )
    expected = {key: tuple(value.shape) for key, value in view.memory.items()}
    if shapes != expected:
        raise KvtwinError(
            f"policy {name(policy)}: {hook} returned {shapes or type(memory).__name__}; "
            f"expected {expected}: the arrays that `memory` and `head_memory` name, made with view.xp"
        )
    return replace(view, memory={key: _like(view, memory[key], key) for key in view.memory})


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


def heads_budgets(policy: Policy, view: View, scores: Array) -> Int[Array, "batch kv_heads"]:
    """Tokens that each head keeps at this eviction."""
    if not policy.divides:
        return view.budget
    given = _call(policy, view, lambda seen: policy.budgets(seen, scores), "budgets")
    if _shape(view, given) != tuple(view.budget.shape) or given.dtype != view.budget.dtype:
        raise KvtwinError(
            f"policy {name(policy)}: budgets returned {_shape(view, given)}, {getattr(given, 'dtype', '')}; "
            f"expected int32 of shape {tuple(view.budget.shape)}: one number per (batch, kv_heads)"
        )
    return given


def measured(policy: Policy, view: View) -> Shaped[Array, "batch"]:
    """What `allocate` is to know of this layer."""
    given = _call(policy, view, policy.statistic)
    if _shape(view, given) != tuple(view.seen.shape):
        raise KvtwinError(
            f"policy {name(policy)}: statistic returned {_shape(view, given)}; "
            f"expected shape {tuple(view.seen.shape)}: one number per row, made with view.xp"
        )
    return given


def allocated(
    policy: Policy,
    statistics: Sequence[Shaped[np.ndarray, "batch"]],
    seen: Int[np.ndarray, "batch"],
    spec: ModelSpec,
) -> Int[np.ndarray, "layers batch"]:
    """Tokens per head of each layer and row, as the policy shares its own budget among the layers."""
    asked = np.array([[max(heads or (0,))] * len(seen) for heads in layer_budgets(policy, spec)], np.int32)
    try:
        given = np.asarray(policy.allocate(np.stack(statistics).astype(np.float64), asked, seen))
    except KvtwinError:
        raise
    except Exception as error:
        raise _failed(policy, "allocate", "NumPy", error) from error
    if given.shape != asked.shape or given.dtype.kind not in "iu":
        raise KvtwinError(
            f"policy {name(policy)}: allocate returned {given.dtype} of shape {given.shape}; "
            f"expected integers of shape {asked.shape}: tokens per head of each (layer, row)"
        )
    for index, one in ((index, int(one)) for index, row in enumerate(given) for one in np.unique(row)):
        least = max(1, policy.protects(one))
        if one < least:
            raise KvtwinError(
                f"policy {name(policy)}: allocate gave a head of layer {index} {one} tokens; "
                f"expected at least {least}: what it protects, and at least 1"
            )
    return given.astype(np.int32)


def merged(
    policy: Policy, view: View, index: Array, active: Bool[Array, "batch"] | None = None
) -> tuple[Array, Array, dict[str, Array]]:
    """Keys and values of the kept slots with the evicted ones blended in, 0 where the index is -1; and the arrays of
    head memory that this changed.

    Those of a row that is not active stay as they are.
    """
    xp = view.xp
    given = _call(policy, view, lambda seen: policy.merge(seen, index), "merge")
    shape = (*index.shape, view.keys.shape[-1])
    heads = {key: tuple(old.shape) for key, old in view.memory.items() if key not in policy.memory}
    came = [
        {key: _shape(view, value) for key, value in one.items()}
        if isinstance(one, Mapping)
        else _shape(view, one)
        for one in (given if isinstance(given, tuple) else (given,))
    ]
    memory = came[2] if len(came) == 3 else None
    if came[:2] != [shape, shape] or not isinstance(memory, dict) or not memory.items() <= heads.items():
        raise KvtwinError(
            f"policy {name(policy)}: merge returned {came}; expected keys and values of shape {shape}, and a dict "
            f"with what changes of its head memory {heads}"
        )

    def where_active(new: Array, old: Array) -> Array:
        if active is None:
            return new
        return xp.where(xp.reshape(active, (-1,) + (1,) * (old.ndim - 1)), new, old)

    hole = (index < 0)[..., None]
    keys, values = (
        xp.where(hole, 0.0, where_active(new, take_slots(xp, old, index)))
        for new, old in zip(given[:2], (view.keys, view.values), strict=True)
    )
    changed = {
        key: where_active(_like(view, value, key), view.memory[key]) for key, value in given[2].items()
    }
    return keys, values, changed


def _like(view: View, value: Array, key: str) -> Array:
    """A new array of memory in the precision that memory has."""
    dtype = view.memory[key].dtype
    return value if value.dtype == dtype else view.xp.astype(value, dtype)


def repositioned(view: View) -> View:
    """The view with its keys and queries rotated by rank; they come as cached, un-rotated."""
    keys = None if view.keys is None else view.rotate(view.keys, view.rotary)
    queries = view.queries
    if queries is not None:
        queries = view.rotate(queries, view.query_rotary(view.query_positions)[:, :, None, :])
    return replace(view, keys=keys, queries=queries)


def _call(policy: Policy, view: View, hook: Callable[[View], Any], called: str = "") -> Any:
    try:
        return hook(view)
    except KvtwinError:
        raise
    except Exception as error:
        raise _failed(policy, called or hook.__name__, view.xp.__name__, error) from error


def _failed(policy: Policy, called: str, library: str, error: Exception) -> KvtwinError:
    first = (str(error).splitlines() or [""])[0][:200]
    return KvtwinError(
        f"policy {name(policy)} failed in {called} on {library}: {type(error).__name__}: {first}\n"
        "expected array code that runs on NumPy, torch and jax alike; `kvtwin check` shows a smallest example"
    )


def ordered(policy: Policy, view: View, order: Int[Array, "batch kv_heads slots"], take: Any) -> View:
    """The same view with its slots gathered by `order`; `take(x, order)` is the backend's gather."""
    optional = {
        key: take(value, order)
        for key in ("keys", "values", "sums", "tokens")
        if (value := getattr(view, key)) is not None
    }
    memory = {
        key: take(value, order) if key in policy.memory else value for key, value in view.memory.items()
    }
    return replace(view, positions=take(view.positions, order), memory=memory, **optional)


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


def layer_budgets(policy: Policy, spec: ModelSpec) -> tuple[tuple[int, ...] | None, ...]:
    """Tokens kept by each kv head, for each layer; None where the policy keeps all. Refuses what cannot be met."""
    if not policy.evicts:
        if policy.budget is not None or policy.fraction is not None:
            raise KvtwinError(f"policy {name(policy)} keeps every token; expected no budget")
        return (None,) * len(spec.layers)
    if policy.fraction is not None:
        raise KvtwinError(
            f"policy {name(policy)} has a fraction of a prompt that is not known here; expected a budget in tokens, "
            "as framework.eviction.resolved(policy, tokens) makes it"
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
    return tuple(
        _head_budgets(policy, index, budget, layer)
        for index, (budget, layer) in enumerate(zip(each, spec.layers, strict=True))
    )


def _head_budgets(policy: Policy, index: int, budget: Any, layer: Layer) -> tuple[int, ...]:
    """One budget per kv head of a layer."""
    heads = budget if isinstance(budget, tuple) else (budget,) * layer.kv_heads
    if len(heads) != layer.kv_heads:
        raise KvtwinError(
            f"policy {name(policy)} has {len(heads)} budgets in layer {index}; "
            f"expected one, or one for each of {layer.kv_heads} kv heads"
        )
    for one in heads:
        if isinstance(one, bool) or not isinstance(one, int):
            raise KvtwinError(f"policy {name(policy)}: budget {one!r} in layer {index}; expected an integer")
        least = max(1, policy.protects(one))
        if one < least:
            raise KvtwinError(
                f"policy {name(policy)}: budget {one} in layer {index}; expected at least {least}: "
                "what it protects, and at least 1"
            )
    if policy.shared and len(set(heads)) > 1:
        raise KvtwinError(
            f"policy {name(policy)} keeps one set for all heads of a layer; expected one budget in layer {index}, "
            f"not {heads}"
        )
    return heads


def check_policy(policy: Policy, spec: ModelSpec) -> None:
    """Raises where two things that a policy does exclude each other."""
    for layer in spec.layers:
        twice = sorted(set(policy.head_memory(layer)) & set(slot_memory(policy)))
        if twice:
            raise KvtwinError(
                f"policy {name(policy)} has two memories called {twice[0]!r}; expected one of each name"
            )
    if "tokens" in policy.memory:
        raise KvtwinError(
            f"policy {name(policy)} has a memory called 'tokens'; expected another name, since the ids that "
            "Needs.tokens asks for are kept under this one"
        )
    wrong = {
        "keeps one set for all heads and divides budgets among them": policy.shared and policy.divides,
        "allocates budgets to layers and divides them among heads": policy.allocates and policy.divides,
        "allocates budgets to layers and has a budget for each head": policy.allocates
        and isinstance(policy.budget, tuple)
        and any(isinstance(one, tuple) for one in policy.budget),
        "repositions and merges keys": policy.repositions and policy.merges,
        "repositions and looks ahead of the tokens' own positions": policy.repositions
        and policy.needs.ahead > 0,
    }
    asked = policy.needs
    if asked.gradients and not asked.stream:
        raise KvtwinError(
            f"policy {name(policy)} asks for gradients; expected it to ask for the stream as well, "
            "whose blocks carry them"
        )
    if policy.merges and not ((asked.keys or asked.queries) and asked.values):
        raise KvtwinError(f"policy {name(policy)} merges; expected its needs to name keys and values")
    for what, so in wrong.items():
        if so:
            raise KvtwinError(f"policy {name(policy)} {what}; expected one of the two")


def limit(budget: int | None, window: int | None) -> int | None:
    """Most tokens that a head of this layer can hold after an eviction; None where nothing is ever evicted."""
    bounds = [bound for bound in (budget, None if window is None else window - 1) if bound is not None]
    return min(bounds, default=None)


def overwrites(policy: Policy, bounded: bool) -> bool:
    """True where decode puts each new token into the slot of the weakest, instead of appending and compacting."""
    compacts = policy.repositions or policy.divides or policy.merges or policy.interval > 1
    return bounded and policy.order_free and not compacts
