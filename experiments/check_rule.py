"""The first tier of `kvtwin check`: the rule of a policy on one random layer, on every library.

A `Case` is one layer with random keys, values and queries in float64, rows of different length and heads that hold
different positions. Its NumPy trajectory (a prefill, then decode steps, at several budgets) is the record against which
everything else is held. Each check takes a policy and a case and returns a `Failure` or None.
"""

import copy
import functools
import inspect
import linecache
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, get_origin

import numpy as np

from framework.arrays import keep
from framework.errors import KvtwinError
from framework.policy import (
    UNLIMITED,
    Policy,
    View,
    alive,
    attends,
    budgets,
    judge,
    noted,
    policies,
    survivors,
    weakest,
)
from framework.shapes import EMPTY
from framework.spec import Layer, ModelSpec

TOLERANCE = 1e-9  # of the largest score; float64 leaves 1e-15, sums in another order a little more
SINGLE = 1e-5  # the same where a policy works in float32
STRICT = "array-api-strict"
MOST = 4096  # the largest protected count that is looked for


@functools.cache
def libraries() -> dict[str, Any]:
    """The array namespaces by name."""
    import array_api_compat.numpy
    import array_api_compat.torch
    import array_api_strict
    import jax.numpy

    return {
        "NumPy": array_api_compat.numpy,
        STRICT: array_api_strict,
        "torch": array_api_compat.torch,
        "jax": jax.numpy,
    }


@dataclass(frozen=True)
class Failure:
    """What failed, where, and the smallest example that shows it."""

    what: str
    where: Mapping[str, Any] = field(default_factory=dict)
    example: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a policy decided about one view, as NumPy."""

    positions: np.ndarray
    scores: np.ndarray
    protected: np.ndarray
    living: np.ndarray
    kept: np.ndarray
    memory: dict[str, np.ndarray]
    single: bool  # scores came in less than float64

    @property
    def tolerance(self) -> float:
        """The gap, relative to the largest score, below which two scores count as equal."""
        return SINGLE if self.single else TOLERANCE


@dataclass(frozen=True, eq=False)
class Step:
    """One call of a trajectory: the view before `note`, and what NumPy made of it."""

    number: int
    budget: int
    view: View
    outcome: Outcome


@dataclass(frozen=True)
class Case:
    """One random layer. `tokens` is the longest prompt; the other rows are shorter."""

    tokens: int
    steps: int = 4
    batch: int = 3
    kv_heads: int = 2
    group: int = 3
    head_dim: int = 4
    seed: int = 0

    @property
    def lengths(self) -> np.ndarray:
        """Prompt length of each row."""
        return np.array([self.tokens, max(1, self.tokens - 3), max(1, self.tokens // 3)], np.int32)[
            : self.batch
        ]

    @property
    def slots(self) -> int:
        """Slots of every view: one more than can be filled, so that the shape never changes."""
        return self.tokens + self.steps + 1

    @functools.cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """Keys, values [batch kv_heads all head_dim] and queries [batch kv_heads group all head_dim] by position."""
        random = np.random.default_rng([self.seed, self.tokens, self.batch])
        slots = (self.batch, self.kv_heads, self.slots, self.head_dim)
        queries = (self.batch, self.kv_heads, self.group, self.slots, self.head_dim)
        return {
            "keys": random.standard_normal(slots),
            "values": random.standard_normal(slots),
            "queries": 2 * random.standard_normal(queries),
        }

    def budgets(self, policy: Policy) -> list[tuple[int, int | None]]:
        """Budgets with sliding windows: p, p + 1, T - 1, T, T + 1, and one in a layer with a window."""
        if not policy.evicts:
            return [(UNLIMITED, None), (UNLIMITED, self.tokens - 1)]
        least = least_budget(policy)
        asked = {least, least + 1, self.tokens - 1, self.tokens, self.tokens + 1}
        plain: list[tuple[int, int | None]] = [(budget, None) for budget in sorted(asked) if budget >= least]
        return [*plain, (max(least, self.tokens - 2), max(2, self.tokens - 1))]

    def view(
        self,
        policy: Policy,
        positions: np.ndarray,
        memory: dict[str, np.ndarray],
        before: np.ndarray,
        seen: np.ndarray,
        budget: int,
        window: int | None,
    ) -> View:
        """What the policy sees after the tokens from `before` to `seen`, which attended to these positions."""
        needs, filled = policy.needs, positions >= 0
        wanted = {"keys": needs.keys or needs.queries > 0, "values": needs.values}
        streams: dict[str, Any] = {
            key: np.where(filled[..., None], _at(self.arrays[key], positions), 0.0) if asked else None
            for key, asked in wanted.items()
        }
        ring = seen[:, None] - needs.queries + np.arange(needs.queries)
        ring = np.where(ring < 0, EMPTY, ring).astype(np.int32)
        every = self.arrays["queries"]
        queries = np.stack([every[row][:, :, np.maximum(ring[row], 0)] for row in range(self.batch)])
        return View(
            xp=libraries()["NumPy"],
            phase="decode" if before.any() else "prefill",
            layer=1,
            layers=2,
            positions=positions,
            budget=np.full(positions.shape[:2], budget, np.int32),
            seen=seen,
            memory={key: np.where(filled, _at(value, positions), 0.0) for key, value in memory.items()},
            queries=np.where(ring[:, None, None, :, None] >= 0, queries, 0.0) if needs.queries else None,
            query_positions=ring if needs.queries else None,
            sums=self._sums(positions, before, seen, window) if needs.sums else None,
            scale=self.head_dim**-0.5,
            window=window,
            **streams,
        )

    def _sums(
        self, positions: np.ndarray, before: np.ndarray, seen: np.ndarray, window: int | None
    ) -> np.ndarray:
        """The attention that each slot received from the queries of a call, mean over the group."""
        sums = np.zeros(positions.shape)
        for row in range(self.batch):
            asked = np.arange(before[row], seen[row])
            for head in range(self.kv_heads):
                keys = self.arrays["keys"][row, head, np.maximum(positions[row, head], 0)]
                logits = self.arrays["queries"][row, head][:, asked] @ keys.T * self.head_dim**-0.5
                mask = attends(asked[:, None], positions[row, head][None], window)
                weights = np.where(mask, np.exp(logits), 0.0)
                total = weights.sum(-1, keepdims=True)
                sums[row, head] = (weights / np.where(total == 0, 1, total)).sum(1).mean(0)
        return sums

    def trajectory(self, policy: Policy, budget: int, window: int | None) -> Iterator[Step]:
        """A prefill and decode steps in NumPy; every step keeps what the policy decided."""
        shape = (self.batch, self.kv_heads, self.slots)
        memory = {key: np.full(shape, start, np.float64) for key, start in policy.memory.items()}
        kept = np.full(shape, EMPTY, np.int32)
        before, seen = np.zeros(self.batch, np.int32), self.lengths
        for number in range(self.steps + 1):
            positions = _with(kept, before, seen)
            view = self.view(policy, positions, memory, before, seen, budget, window)
            outcome = decided(policy, view)
            yield Step(number, budget, view, outcome)
            for key, value in memory.items():
                _put(value, positions, outcome.memory[key])
            kept, before, seen = outcome.kept, seen, seen + 1

    def every(self, policy: Policy) -> Iterator[Step]:
        """The steps of all trajectories; the policy is without its budget, as in a compiled step."""
        static = replace(policy, budget=None)
        for budget, window in self.budgets(policy):
            yield from self.trajectory(static, budget, window)

    def record(self, policy: Policy) -> list[Step]:
        """`every`, kept, since all checks ask for it."""
        return _record(self, policy)


@functools.lru_cache(maxsize=64)
def _record(case: Case, policy: Policy) -> list[Step]:
    return list(case.every(policy))


def _at(x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """What lies at these positions of each row and head."""
    index = np.maximum(positions, 0)
    return np.take_along_axis(x, index if x.ndim == 3 else index[..., None], axis=2)


def _put(x: np.ndarray, positions: np.ndarray, value: np.ndarray) -> None:
    row, head, slot = np.nonzero(positions >= 0)
    x[row, head, positions[row, head, slot]] = value[row, head, slot]


def _with(kept: np.ndarray, before: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """The kept positions of each head, then those of the call, then empty slots."""
    positions = np.full_like(kept, EMPTY)
    for row, head in np.ndindex(kept.shape[:2]):
        old = kept[row, head][kept[row, head] >= 0]
        new = np.concatenate([old, np.arange(int(before[row]), int(seen[row]), dtype=np.int32)])
        positions[row, head, : len(new)] = new
    return positions


def decided(policy: Policy, view: View) -> Outcome:
    """Note, score, protected and survivors on the view's own library, brought back to NumPy.

    Raises KvtwinError where the policy fails or scores a token NaN or infinite.
    """
    memory, scores, protected, living, kept = _decide(policy, view)
    outcome = Outcome(
        positions=to_numpy(view.positions),
        scores=to_numpy(scores).astype(np.float64),
        protected=to_numpy(protected),
        living=to_numpy(living),
        kept=to_numpy(kept),
        memory={key: to_numpy(value) for key, value in memory.items()},
        single=to_numpy(scores).dtype in (np.float32, np.float16),
    )
    wrong = np.argwhere(~np.isfinite(outcome.scores) & (outcome.positions >= 0))
    if len(wrong):
        row, head, slot = wrong[0]
        raise KvtwinError(
            f"score gave {outcome.scores[row, head, slot]} to the token at position "
            f"{outcome.positions[row, head, slot]} in row {row}, head {head}; expected a finite number\n"
            f"positions {outcome.positions[row, head].tolist()}, scores {short(outcome.scores[row, head])}"
        )
    return outcome


def _decide(policy: Policy, view: View) -> tuple[Any, Any, Any, Any, Any]:
    xp = view.xp
    view = noted(policy, view)
    scores, protected = judge(policy, view)
    marked = xp.zeros_like(view.filled) if protected is None else protected & view.filled
    living = alive(view.positions, view.seen, view.window)
    index = survivors(xp, scores, protected, living, view.budget, view.positions.shape[-1])
    return view.memory, scores, marked, living, keep(xp, view.positions, index, EMPTY)


def to_numpy(x: Any) -> np.ndarray:
    """The array of any of the libraries as NumPy."""
    return np.array(x)


ARRAYS = ("positions", "budget", "seen", "keys", "values", "queries", "query_positions", "sums")


def moved(view: View, xp: Any) -> View:
    """The view in the arrays of another library."""
    arrays = {key: xp.asarray(value) for key in ARRAYS if (value := getattr(view, key)) is not None}
    memory = {key: xp.asarray(value) for key, value in view.memory.items()}
    return replace(view, xp=xp, memory=memory, **arrays)


# What a policy keeps by the words of the contract, and how two outcomes differ.


def ranking(outcome: Outcome, row: int, head: int) -> list[int]:
    """Living slots, the first to stay first: protected, then the higher score, then the newer token."""
    slots = np.flatnonzero(outcome.living[row, head])

    def key(slot: int) -> tuple:
        marked, position = outcome.protected[row, head, slot], outcome.positions[row, head, slot]
        return marked, 0.0 if marked else outcome.scores[row, head, slot], position

    return sorted(slots.tolist(), key=key, reverse=True)


def expected(outcome: Outcome, row: int, head: int, budget: int) -> list[int]:
    """Positions that stay under this budget, rising."""
    return sorted(outcome.positions[row, head, ranking(outcome, row, head)[:budget]].tolist())


def kept_of(outcome: Outcome, row: int, head: int) -> list[int]:
    """Positions that were kept."""
    return [position for position in outcome.kept[row, head].tolist() if position >= 0]


def difference(
    ours: Outcome, theirs: Outcome, budget: int
) -> tuple[str, dict[str, Any], dict[str, Any]] | None:
    """The first head where two outcomes would keep different tokens under this or any other budget, or None.

    Slots may lie in another order. Swaps of scores that are equal up to rounding do not count.
    """
    tolerance = max(ours.tolerance, theirs.tolerance)
    for row, head in np.ndindex(ours.positions.shape[:2]):
        where, own, other = {"row": row, "head": head}, ranking(ours, row, head), ranking(theirs, row, head)
        score = {ours.positions[row, head, slot]: ours.scores[row, head, slot] for slot in own}
        guard = {ours.positions[row, head, slot]: ours.protected[row, head, slot] for slot in own}
        margin = tolerance * max((abs(value) for value in score.values()), default=0.0)
        a, b = ours.positions[row, head, own].tolist(), theirs.positions[row, head, other].tolist()
        swaps = [(x, y) for x, y in zip(a, b, strict=False) if x != y]
        fine = len(a) == len(b) and all(
            y in score and guard[x] == guard[y] and abs(score[x] - score[y]) <= margin for x, y in swaps
        )
        if not fine:
            place = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(b))
            # The smallest budget at which the sets differ; the asked one where they differ there.
            shown = budget if set(a[:budget]) != set(b[:budget]) else place + 1
            got = dict(zip(b, theirs.scores[row, head, other].tolist(), strict=True))
            return (
                "keeps other tokens",
                where,
                {
                    "positions": sorted(a),
                    "scores expected": short([score[key] for key in sorted(a)]),
                    "scores got": short([got.get(key, np.nan) for key in sorted(a)]),
                    "budget": shown,
                    "expected": sorted(a[:shown]),
                    "got": sorted(b[:shown]),
                },
            )
        for key, value in ours.memory.items():
            mine = dict(zip(ours.positions[row, head].tolist(), value[row, head].tolist(), strict=True))
            its = dict(
                zip(theirs.positions[row, head].tolist(), theirs.memory[key][row, head].tolist(), strict=True)
            )
            room = tolerance * max((abs(mine[place]) for place in a), default=0.0)
            wrong = [place for place in a if not abs(mine[place] - its.get(place, np.inf)) <= room]
            if wrong:
                return (
                    f"remembers other numbers in {key!r}",
                    where,
                    {
                        "positions": sorted(a),
                        "expected": short([mine[place] for place in sorted(a)]),
                        "got": short([its.get(place, np.nan) for place in sorted(a)]),
                    },
                )
    return None


def short(values: Any) -> list[float]:
    return [float(f"{value:.4g}") for value in np.asarray(values).tolist()]


def _failure(step: Step, found: tuple | None, what: str, **where: Any) -> Failure | None:
    if found is None:
        return None
    text, place, example = found
    return Failure(f"{what}: {text}", where | {"step": step.number} | place, example)


# The checks.


def check_instance(policy: Policy, case: Case) -> Failure | None:
    """A frozen dataclass, hashable, equal to its copy, and read back from its spelling."""
    kind = type(policy)
    own = [key for key, hint in inspect.get_annotations(kind).items() if get_origin(hint) is not ClassVar]
    if own and "__dataclass_params__" not in vars(kind):
        return Failure(
            f"{kind.__name__} is no dataclass, so its fields {own} are lost; expected @dataclass(frozen=True)"
        )
    loose = [each.name for each in fields(policy) if not each.compare]
    if loose or not kind.__dataclass_params__.eq:  # type: ignore[attr-defined]
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


def check_runs(policy: Policy, case: Case) -> Failure | None:
    """Runs in NumPy at every budget: right shapes, finite scores."""
    return _running(policy, "NumPy", lambda: case.record(policy))


def check_portable(policy: Policy, case: Case) -> Failure | None:
    """Runs in array-api-strict, which has the array API standard and nothing else."""
    return _running(policy, STRICT, lambda: _on(libraries()[STRICT], case.record(policy), policy))


def _on(xp: Any, steps: list[Step], policy: Policy) -> list[Outcome]:
    static = replace(policy, budget=None)
    return [decided(static, moved(step.view, xp)) for step in steps]


def _running(policy: Policy, library: str, what: Callable[[], Any]) -> Failure | None:
    try:
        what()
    except Exception as error:
        return broken(policy, error, library)
    return None


def broken(policy: Policy, error: Exception, library: str = "") -> Failure:
    """The failure that an exception stands for: its message, and the call and line of the policy's file."""
    cause = error.__cause__ if isinstance(error, KvtwinError) and error.__cause__ is not None else error
    where: dict[str, Any] = {"library": library} if library else {}
    frames = [
        frame for frame in traceback.extract_tb(cause.__traceback__) if frame.filename in sources(policy)
    ]
    if frames:
        where |= {"file": Path(frames[-1].filename).name, "line": frames[-1].lineno}
        where |= {"call": (linecache.getline(frames[-1].filename, frames[-1].lineno or 0)).strip()}
    if cause is error:
        text = str(error)
    else:
        text = f"{type(cause).__name__}: {(str(cause).splitlines() or [''])[0][:300]}"
    if "NoneType" in text:
        text += " (is what it reads declared in `needs`?)"
    head, _, example = text.partition("\npositions ")
    return Failure(head, where, {"positions": example} if example else {})


def sources(policy: Policy) -> set[str]:
    """Files that define the policy's class and its bases, except the contract itself."""
    kinds = [kind for kind in type(policy).__mro__ if issubclass(kind, Policy) and kind is not Policy]
    return {str(inspect.getsourcefile(kind)) for kind in kinds}


def check_torch(policy: Policy, case: Case) -> Failure | None:
    """torch keeps what NumPy keeps."""
    return _like_numpy(policy, case, "torch", lambda steps: _on(libraries()["torch"], steps, policy))


def check_strict(policy: Policy, case: Case) -> Failure | None:
    """array-api-strict keeps what NumPy keeps."""
    return _like_numpy(policy, case, STRICT, lambda steps: _on(libraries()[STRICT], steps, policy))


def check_jax(policy: Policy, case: Case) -> Failure | None:
    """jax, compiled, keeps what NumPy keeps."""
    return _like_numpy(policy, case, "jax", lambda steps: _compiled(policy, steps)[0])


def _like_numpy(
    policy: Policy, case: Case, library: str, run: Callable[[list[Step]], list[Outcome]]
) -> Failure | None:
    steps = case.record(policy)
    try:
        outcomes = run(steps)
    except Exception as error:
        return broken(policy, error, library)
    for step, outcome in zip(steps, outcomes, strict=True):
        found = difference(step.outcome, outcome, step.budget)
        failure = _failure(step, found, f"{library} and NumPy disagree", library=library)
        if failure:
            return failure
    return None


def _compiled(policy: Policy, steps: list[Step]) -> tuple[list[Outcome], int]:
    """Outcomes of one compiled function over all steps, and how often it was traced."""
    import jax

    function, traces = _jitted()
    before = len(traces)
    outcomes = []
    with jax.enable_x64(True):
        for step in steps:
            view = step.view
            arrays = {key: getattr(view, key) for key in ARRAYS}
            static = (view.phase, view.layer, view.layers, view.scale, view.window)
            fresh = replace(policy, budget=None)  # an equal instance, not the same one
            memory, scores, protected, living, kept = function(fresh, static, arrays, dict(view.memory))
            arrays = {"scores": scores, "protected": protected, "living": living, "kept": kept}
            outcomes.append(_outcome(arrays | {"positions": view.positions, "memory": memory}))
    return outcomes, len(traces) - before


def _outcome(values: dict[str, Any]) -> Outcome:
    memory = {key: to_numpy(value) for key, value in values.pop("memory").items()}
    arrays = {key: to_numpy(value) for key, value in values.items()}
    single = arrays["scores"].dtype in (np.float32, np.float16)
    return Outcome(**arrays | {"scores": arrays["scores"].astype(np.float64)}, memory=memory, single=single)


@functools.cache
def _jitted() -> tuple[Callable, list]:
    """The compiled decision, and a list that grows by one whenever it is traced."""
    import jax

    traces: list[Any] = []

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def function(policy: Policy, static: tuple, arrays: dict, memory: dict) -> Any:
        traces.append(static)
        rest = dict(zip(("phase", "layer", "layers", "scale", "window"), static, strict=True))
        return _decide(policy, View(xp=libraries()["jax"], memory=memory, **rest, **arrays))

    return function, traces


def check_compiles(policy: Policy, case: Case) -> Failure | None:
    """Neither another step nor another budget compiles anew in jax."""
    steps = case.record(policy)
    _compiled(policy, steps)
    try:
        _, traces = _compiled(policy, steps)
    except Exception as error:
        return broken(policy, error, "jax")
    if traces:
        return Failure(
            f"{traces} of {len(steps)} calls compiled anew for an equal policy; expected none: __eq__ and __hash__ "
            "must depend on the fields alone",
            {"library": "jax"},
        )
    return None


def check_survivors(policy: Policy, case: Case) -> Failure | None:
    """The kept set is what the words of the contract say, and as large as the budget allows."""
    for step in case.record(policy):
        for row, head in np.ndindex(step.view.positions.shape[:2]):
            words, got = expected(step.outcome, row, head, step.budget), kept_of(step.outcome, row, head)
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
            budgets(replace(policy, budget=budget), spec)
        except KvtwinError as error:
            return Failure(f"budget {budget} is refused, and {least} is not: {error}")
    try:
        budgets(replace(policy, budget=least - 1), spec)
    except KvtwinError:
        return None
    return Failure(f"budget {least - 1} is accepted; expected a refusal below {least}, what it protects")


def least_budget(policy: Policy) -> int:
    """The smallest budget that holds what the policy protects, and at least 1. Raises KvtwinError if there is none."""
    for budget in range(1, MOST + 1):
        if policy.protects(budget) <= budget:
            return budget
    raise KvtwinError(
        f"protects(budget) exceeds the budget for every budget up to {MOST}: "
        f"protects({MOST}) is {policy.protects(MOST)}"
    )


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
        if failure := _failure(step, found, what, library="NumPy"):
            return failure
    return None


def check_slot_order(policy: Policy, case: Case) -> Failure | None:
    """`note` works slot by slot in any order; under `order_free` so does `score`."""
    if not (policy.order_free or policy.memory):
        return None
    static, random = replace(policy, budget=None), np.random.default_rng(case.seed)
    for step in case.record(policy):
        order = shuffled(policy, step.view.positions.shape, random)
        view = reordered(step.view, order)
        try:
            outcome = (
                decided(static, view) if policy.order_free else _only_noted(static, view, step.outcome, order)
            )
        except KvtwinError as error:
            return broken(policy, error, "NumPy")
        found = difference(step.outcome, outcome, step.budget)
        what = (
            "slots in another order, which order_free promises not to matter"
            if policy.order_free
            else ("slots in another order, which note must not depend on")
        )
        if failure := _failure(step, found, what, library="NumPy"):
            return failure
    return None


def reordered(view: View, order: np.ndarray) -> View:
    """The view with its slots permuted."""

    def take(x: Any) -> Any:
        if x is None:
            return None
        return np.take_along_axis(x, order if x.ndim == 3 else order[..., None], axis=2)

    arrays = {key: take(getattr(view, key)) for key in ("positions", "keys", "values", "sums")}
    return replace(view, memory={key: take(value) for key, value in view.memory.items()}, **arrays)


def shuffled(policy: Policy, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """A random order of slots for each row and head; heads that share one kept set share their slots too."""
    heads = (shape[0], 1 if policy.shared else shape[1], shape[2])
    return np.broadcast_to(random.permuted(np.broadcast_to(np.arange(shape[2]), heads), axis=-1), shape)


def _only_noted(policy: Policy, view: View, outcome: Outcome, order: np.ndarray) -> Outcome:
    """The outcome, permuted, with the memory that `note` gives in this order."""
    arrays: dict[str, Any] = {
        key: np.take_along_axis(getattr(outcome, key), order, axis=2)
        for key in ("positions", "scores", "protected", "living")
    }
    return replace(outcome, memory={k: to_numpy(v) for k, v in noted(policy, view).memory.items()}, **arrays)


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
        memory = {key: stale(value, filled) for key, value in view.memory.items()}
        try:
            outcome = decided(static, replace(view, positions=positions, memory=memory, sums=sums, **arrays))
        except KvtwinError as error:
            return broken(policy, error, "NumPy")
        found = difference(step.outcome, outcome, step.budget)
        if failure := _failure(step, found, "empty slots at the end change the result", library="NumPy"):
            return failure
    return None


def check_batch(policy: Policy, case: Case) -> Failure | None:
    """Each row alone gives what it gives in a batch."""
    static = replace(policy, budget=None)
    for step in case.record(policy):
        for row in range(case.batch):
            view, only = step.view, slice(row, row + 1)
            arrays = {key: x[only] for key in ARRAYS if (x := getattr(view, key)) is not None}
            alone = replace(view, memory={key: x[only] for key, x in view.memory.items()}, **arrays)
            try:
                outcome = decided(static, alone)
            except KvtwinError as error:
                return broken(policy, error, "NumPy")
            fields = ("positions", "scores", "protected", "living", "kept")
            cut = {key: getattr(step.outcome, key)[only] for key in fields}
            memory = {key: x[only] for key, x in step.outcome.memory.items()}
            found = difference(replace(step.outcome, memory=memory, **cut), outcome, step.budget)
            if found:
                found[1]["row"] = row
            if failure := _failure(step, found, "a row depends on the rest of its batch", library="NumPy"):
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
    if not policy.order_free:
        return None
    static, random = replace(policy, budget=None), np.random.default_rng(case.seed)
    for step in case.record(policy):
        order = shuffled(policy, step.view.positions.shape, random)
        view = noted(static, reordered(step.view, order))
        scores, protected = judge(static, view)
        living = alive(view.positions, view.seen, view.window)
        slot = weakest(view.xp, scores, view.positions, protected, living)
        for row, head in np.ndindex(view.positions.shape[:2]):
            held = view.positions[row, head]
            if (held >= 0).sum() != step.budget + 1 or not living[row, head][held >= 0].all():
                continue
            left = sorted(set(held[held >= 0].tolist()) - {int(held[slot[row, head]])})
            kept = kept_of(step.outcome, row, head)
            if left != kept and difference(step.outcome, decided(static, view), step.budget) is None:
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


def tiny_spec(layers: int = 2, window: int = 5) -> ModelSpec:
    """A decoder whose second layer has a sliding window."""
    from framework.spec import Rope

    head = Layer(heads=6, kv_heads=2, head_dim=4, scale=0.5, rope=Rope(theta=100.0, dim=4))
    return ModelSpec(
        family="llama", vocab=29, dim=10, ffn=14, norm_eps=1e-6, positions=512,
        layers=tuple(replace(head, window=window if index % 2 else None) for index in range(layers)),
    )  # fmt: skip
