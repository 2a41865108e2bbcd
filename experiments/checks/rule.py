"""The first tier of `kvtwin check`: the rule of a policy on one random layer, in four array libraries.

Each check takes a policy and a `Case` and returns a `Failure` or None.
"""

import copy
import inspect
import linecache
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, get_origin

import numpy as np

from experiments.checks.case import Case, Step, failure_at, least_budget, tiny_spec
from experiments.checks.failure import Failure, broken, sources
from experiments.checks.libraries import (
    check_compiles,
    check_jax,
    check_portable,
    check_runs,
    check_strict,
    check_torch,
)
from experiments.checks.outcome import (
    ROWS,
    Outcome,
    decided,
    difference,
    expected,
    kept_of,
    remembered,
    short,
    to_numpy,
)
from framework.errors import KvtwinError
from framework.eviction import alive, judge, layer_budgets, overwrites, weakest
from framework.policy import Block, Policy, View, policies
from framework.shapes import EMPTY


def check_instance(policy: Policy, case: Case) -> Failure | None:
    """A frozen dataclass, hashable, equal to its copy, and read back from its spelling."""
    kind = type(policy)
    own = [key for key, hint in inspect.get_annotations(kind).items() if get_origin(hint) is not ClassVar]
    if own and "__dataclass_params__" not in vars(kind):
        return Failure(
            f"{kind.__name__} is no dataclass, so its fields {own} are lost; expected @dataclass(frozen=True)"
        )
    loose = [each.name for each in fields(policy) if not each.compare]
    if loose or not inspect.getattr_static(kind, "__dataclass_params__").eq:
        return Failure(
            f"{kind.__name__} is compared without its fields {loose or own}, and a compiled step would take one policy "
            "for another; expected the dataclass's own __eq__ over all fields"
        )
    try:
        again = replace(policy)
        same, equal = hash(policy) == hash(again), policy == again
    except TypeError as error:
        return Failure(
            f"a policy must be hashable: {error}; expected fields such as numbers, strings and tuples"
        )
    if not (same and equal):
        return Failure(
            "two equal instances differ, so that every step would compile anew; expected equality by fields"
        )
    text = policies.spelling(policy)
    try:
        read = policies.make(text)
    except KvtwinError as error:
        return Failure(f"its spelling {text} cannot be read back: {error}")
    return None if read == policy else Failure(f"its spelling {text} reads back as {read}")


def check_survivors(policy: Policy, case: Case) -> Failure | None:
    """The kept set is what the words of the contract say, and as large as the budget allows."""
    for step in case.record(policy):
        for row, head in np.ndindex(step.view.positions.shape[:2]):
            words, got = expected(step.outcome, row, head), kept_of(step.outcome, row, head)
            if words != got:
                positions, scores = step.outcome.positions[row, head], step.outcome.scores[row, head]
                return Failure(
                    f"a budget of {step.budget} is not met by protected, then score, then the newer token",
                    {"library": "NumPy", "step": step.number, "row": row, "head": head},
                    {"positions": positions.tolist(), "scores": short(scores), "expected": words, "got": got},
                )
    return None


def check_protected(policy: Policy, case: Case) -> Failure | None:
    """`protected` marks no more than `protects` says, and all of it stays."""
    for step in case.record(policy):
        promised = policy.protects(step.budget)
        for row, head in np.ndindex(step.view.positions.shape[:2]):
            own = step.outcome.positions[row, head]
            marked = own[step.outcome.protected[row, head]].tolist()
            where = {"library": "NumPy", "step": step.number, "row": row, "head": head}
            if len(marked) > promised:
                return Failure(
                    f"protected marks {len(marked)} tokens at budget {step.budget}; "
                    f"protects({step.budget}) promises at most {promised}",
                    where,
                    {"positions": own[own >= 0].tolist(), "protected": marked},
                )
            lost = set(marked) & set(own[step.outcome.living[row, head]].tolist())
            lost -= set(kept_of(step.outcome, row, head))
            if lost:
                return Failure(
                    f"protected tokens were dropped at budget {step.budget}", where, {"lost": sorted(lost)}
                )
    return None


def check_budgets(policy: Policy, case: Case) -> Failure | None:
    """Budgets from the protected tokens on are met, a smaller one is refused."""
    if not policy.evicts:
        return None
    least = least_budget(policy)
    spec = tiny_spec(layers=1)
    for budget in (least, least + 1, case.tokens - 1, case.tokens, case.tokens + 1):
        try:
            layer_budgets(replace(policy, budget=budget), spec)
        except KvtwinError as error:
            return Failure(f"budget {budget} is refused, and {least} is not: {error}")
    try:
        layer_budgets(replace(policy, budget=least - 1), spec)
    except KvtwinError:
        return None
    return Failure(f"budget {least - 1} is accepted; expected a refusal below {least}, what it protects")


def check_own_budget(policy: Policy, case: Case) -> Failure | None:
    """No hook reads `self.budget`, which a compiled step does not have."""
    reads: list[tuple[str, int]] = []
    files = sources(policy)

    def spying(self: Any, key: str) -> Any:
        frame = sys._getframe(1)
        if key == "budget" and frame.f_code.co_filename in files:
            reads.append((frame.f_code.co_filename, frame.f_lineno))
        return object.__getattribute__(self, key)

    spy = copy.copy(policy)
    object.__setattr__(spy, "__class__", type("Spy", (type(policy),), {"__getattribute__": spying}))
    budget, window = case.budgets(policy)[0]
    try:
        for _ in case.trajectory(spy, budget, window):
            if reads:
                break
    except Exception:
        pass  # without a read of the budget it is the next check's to say
    if not reads:
        return None
    file, line = reads[0]
    return Failure(
        "the rule reads self.budget, which a compiled step does not have; expected view.budget",
        {"file": Path(file).name, "line": line, "call": linecache.getline(file, line).strip()},
    )


def check_repeats(policy: Policy, case: Case) -> Failure | None:
    """The same sequence, after another one, gives the same scores: no hidden state, no random generator."""
    static = replace(policy, budget=None)
    before = dict(vars(static))
    budget, window = case.budgets(policy)[0]
    other = replace(case, seed=case.seed + 1)
    try:
        first = list(case.trajectory(static, budget, window))
        list(other.trajectory(static, budget, window))
        again = list(case.trajectory(static, budget, window))
    except Exception as error:
        return broken(policy, error, "NumPy")
    if vars(static) != before:
        return Failure(
            f"the policy changed its own fields from {before} to {vars(static)}; memory belongs to `note`"
        )
    for step, repeated in zip(first, again, strict=True):
        found = difference(step.outcome, repeated.outcome, budget)
        what = "the same sequence a second time (hidden state between sequences, or a random generator)"
        if failure := failure_at(step, found, what, library="NumPy"):
            return failure
    return None


def check_slot_order(policy: Policy, case: Case) -> Failure | None:
    """`note` works slot by slot in any order; under `order_free` so does `score`."""
    if not (policy.order_free or policy.memory or policy.head_memory(case.layer)):
        return None
    static, random = replace(policy, budget=None), np.random.default_rng(case.seed)
    for step in case.record(policy):
        order = shuffled(policy, step.view.positions.shape, random)
        view = reordered(policy, step.view, order)
        try:
            outcome = (
                decided(static, view, step.block)
                if policy.order_free
                else _only_noted(static, view, step, order)
            )
        except KvtwinError as error:
            return broken(policy, error, "NumPy")
        # What merges lies in position order, which these slots do not.
        bare, other = (replace(one, merged=(), heads={}) for one in (step.outcome, outcome))
        found = difference(bare, other, step.budget)
        what = (
            "slots in another order, which order_free promises not to matter"
            if policy.order_free
            else ("slots in another order, which note must not depend on")
        )
        if failure := failure_at(step, found, what, library="NumPy"):
            return failure
    return None


def reordered(policy: Policy, view: View, order: np.ndarray) -> View:
    """The view with its slots permuted."""

    def take(x: Any) -> Any:
        if x is None:
            return None
        return np.take_along_axis(x, order if x.ndim == 3 else order[..., None], axis=2)

    arrays = {key: take(getattr(view, key)) for key in ("positions", "keys", "values", "sums", "tokens")}
    memory = {key: take(value) if key in policy.memory else value for key, value in view.memory.items()}
    return replace(view, memory=memory, **arrays)


def shuffled(policy: Policy, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """A random order of slots for each row and head; heads that share one kept set share their slots too."""
    heads = (shape[0], 1 if policy.shared else shape[1], shape[2])
    return np.broadcast_to(random.permuted(np.broadcast_to(np.arange(shape[2]), heads), axis=-1), shape)


def _only_noted(policy: Policy, view: View, step: Step, order: np.ndarray) -> Outcome:
    """The outcome of the step, permuted, with the memory that `stream` and `note` give in this order."""
    arrays: dict[str, Any] = {
        key: np.take_along_axis(getattr(step.outcome, key), order, axis=2)
        for key in ("positions", "scores", "protected", "living")
    }
    memory = remembered(policy, view, step.block).memory
    return replace(step.outcome, memory={key: to_numpy(value) for key, value in memory.items()}, **arrays)


def check_empty_slots(policy: Policy, case: Case) -> Failure | None:
    """More empty slots, and whatever numbers evicted tokens left in them, change nothing."""
    static, random = replace(policy, budget=None), np.random.default_rng(case.seed)

    def stale(x: Any, filled: np.ndarray) -> Any:
        if x is None:
            return None
        wide = np.concatenate([x, x[:, :, -2:]], axis=2)
        return np.where(
            filled if x.ndim == 3 else filled[..., None], wide, 3 * random.standard_normal(wide.shape)
        )

    for step in case.record(policy):
        view = step.view
        positions = np.concatenate([view.positions, np.full_like(view.positions[:, :, -2:], EMPTY)], axis=2)
        filled = positions >= 0
        arrays = {key: stale(getattr(view, key), filled) for key in ("keys", "values")}
        # What a slot received from this call is 0 where it is empty.
        sums = None if view.sums is None else np.pad(view.sums, ((0, 0), (0, 0), (0, 2)))
        memory = {
            key: stale(value, filled) if key in policy.memory else value for key, value in view.memory.items()
        }
        ids = None if view.tokens is None else np.pad(view.tokens, ((0, 0), (0, 0), (0, 2)))
        wide = replace(view, positions=positions, memory=memory, sums=sums, tokens=ids, **arrays)
        try:
            outcome = decided(static, wide, step.block)
        except KvtwinError as error:
            return broken(policy, error, "NumPy")
        found = difference(step.outcome, outcome, step.budget)
        if failure := failure_at(step, found, "empty slots at the end change the result", library="NumPy"):
            return failure
    return None


def check_batch(policy: Policy, case: Case) -> Failure | None:
    """Each row alone gives what it gives in a batch."""
    static = replace(policy, budget=None)
    for step in case.record(policy):
        for row in range(case.batch):
            view, only = step.view, slice(row, row + 1)
            arrays = {key: x[only] for key in ROWS if (x := getattr(view, key)) is not None}
            alone = replace(view, memory={key: x[only] for key, x in view.memory.items()}, **arrays)
            block = step.block and Block(*(x if x is None else x[only] for x in vars(step.block).values()))
            try:
                outcome = decided(static, alone, block)
            except KvtwinError as error:
                return broken(policy, error, "NumPy")
            fields = ("positions", "scores", "protected", "living", "kept", "budget")
            cut: dict[str, Any] = {key: getattr(step.outcome, key)[only] for key in fields}
            cut["merged"] = tuple(x[only] for x in step.outcome.merged)
            for what in ("memory", "heads"):
                cut[what] = {key: x[only] for key, x in getattr(step.outcome, what).items()}
            found = difference(replace(step.outcome, **cut), outcome, step.budget)
            if found:
                found[1]["row"] = row
            if failure := failure_at(step, found, "a row depends on the rest of its batch", library="NumPy"):
                return failure
    return None


def check_shared(policy: Policy, case: Case) -> Failure | None:
    """Under `shared` all heads of a layer keep the same tokens."""
    if not policy.shared:
        return None
    for step in case.record(policy):
        for row in range(case.batch):
            sets = [kept_of(step.outcome, row, head) for head in range(case.kv_heads)]
            if any(each != sets[0] for each in sets):
                return Failure(
                    "shared promises one kept set for all heads of a layer, and they differ",
                    {"library": "NumPy", "step": step.number, "row": row},
                    {f"head {head}": each for head, each in enumerate(sets)},
                )
    return None


def check_overwrite(policy: Policy, case: Case) -> Failure | None:
    """Under `order_free` emptying the weakest slot keeps what a compaction keeps."""
    if not overwrites(replace(policy, interval=1), True):
        return None
    static, random = replace(policy, budget=None), np.random.default_rng(case.seed)
    for step in case.record(policy):
        order = shuffled(policy, step.view.positions.shape, random)
        view = remembered(static, reordered(policy, step.view, order), step.block)
        scores, protected = judge(static, view)
        living = alive(view.positions, view.seen, view.window)
        slot = weakest(view.xp, scores, view.positions, protected, living)
        for row, head in np.ndindex(view.positions.shape[:2]):
            held = view.positions[row, head]
            if (held >= 0).sum() != step.budget + 1 or not living[row, head][held >= 0].all():
                continue
            left = sorted(set(held[held >= 0].tolist()) - {int(held[slot[row, head]])})
            kept = kept_of(step.outcome, row, head)
            if left == kept:
                continue
            again = decided(static, reordered(policy, step.view, order), step.block)
            if difference(step.outcome, again, step.budget) is None:
                return Failure(
                    "overwriting the weakest slot keeps other tokens than compaction",
                    {"library": "NumPy", "step": step.number, "row": row, "head": head},
                    {
                        "positions": held.tolist(),
                        "scores": short(scores[row, head]),
                        "expected": kept,
                        "got": left,
                    },
                )
    return None


@dataclass(frozen=True)
class Check:
    """A named check. After the failure of a `gate` nothing else can be judged."""

    name: str
    function: Callable[[Policy, Case], Failure | None] = field(repr=False)
    gate: bool = False


CHECKS = (
    Check("frozen, hashable, spelled", check_instance, gate=True),
    Check("budgets accepted and refused", check_budgets, gate=True),
    Check("no self.budget", check_own_budget, gate=True),
    Check("shapes and finite scores", check_runs, gate=True),
    Check("portable array code", check_portable, gate=True),
    Check("protected as promised", check_protected),
    Check("kept set by the rule", check_survivors),
    Check("no state between sequences", check_repeats),
    Check("slot order", check_slot_order),
    Check("empty slots", check_empty_slots),
    Check("rows alone", check_batch),
    Check("one set for all heads", check_shared),
    Check("overwrite equals compact", check_overwrite),
    Check("array-api-strict equals NumPy", check_strict),
    Check("torch equals NumPy", check_torch),
    Check("jax equals NumPy", check_jax),
    Check("compiled once", check_compiles),
)


def case_for(policy: Policy) -> Case:
    """A case whose prompt is longer than what the policy protects."""
    try:
        return Case(tokens=max(12, least_budget(policy) + 6))
    except Exception:
        return Case(tokens=12)  # why no budget is enough is for `check_budgets` to say


def smaller(case: Case, policy: Policy) -> list[Case]:
    """Cases that are easier to read than this one, the smallest first."""
    least = least_budget(policy) if policy.evicts else 1
    small = replace(case, batch=1, group=1, head_dim=2)
    tokens = sorted({max(1, least), max(2, least + 1), least + 2, least + 4})
    return [replace(small, tokens=count, steps=2, kv_heads=heads) for count in tokens for heads in (1, 2)]


def attempt(check: Check, policy: Policy, case: Case | None = None) -> Failure | None:
    """The check's failure on the smallest case that shows it, or None."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            case = case or case_for(policy)
            failure = check.function(policy, case)
        except Exception as error:
            return broken(policy, error)
        if failure is None:
            return None
        for small in smaller(case, policy):
            try:
                found = check.function(policy, small)
            except Exception:
                continue
            if found is not None:
                return found
    return failure
