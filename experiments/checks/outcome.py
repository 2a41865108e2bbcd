"""What a policy decides about one view in any of the array libraries, as NumPy, and how two such outcomes differ."""

import functools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from framework.arrays import keep
from framework.errors import KvtwinError
from framework.eviction import alive, heads_budgets, judge, merged, noted, repositioned, streamed, survivors
from framework.policy import Block, Policy, View
from framework.shapes import EMPTY

TOLERANCE = 1e-9  # of the largest score; float64 leaves 1e-15, sums in another order a little more
SINGLE = 1e-5  # the same where a policy works in float32
STRICT = "array-api-strict"
ROWS = (
    "positions", "budget", "seen", "question", "keys", "values", "queries", "query_positions", "sums", "tokens",
)  # fmt: skip
ARRAYS = (*ROWS, "output", "cos", "sin")
MAPS = ("memory", "constants")
STATIC = ("phase", "layer", "layers", "scale", "window", "repositions")


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


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a policy decided about one view, as NumPy.

    `memory`: after `note`. Where it merges, `merged`: keys and values that stay; `heads`: the memory that this changed.
    """

    positions: np.ndarray
    scores: np.ndarray
    protected: np.ndarray
    living: np.ndarray
    kept: np.ndarray
    budget: np.ndarray
    memory: dict[str, np.ndarray]
    merged: tuple[np.ndarray, ...]
    heads: dict[str, np.ndarray]
    single: bool  # scores came in less than float64

    @property
    def tolerance(self) -> float:
        """The gap, relative to the largest score, below which two scores count as equal."""
        return SINGLE if self.single else TOLERANCE


def decided(policy: Policy, view: View, block: Block | None) -> Outcome:
    """What the hooks and the rule make of a view on its own library, brought back to NumPy.

    Raises KvtwinError where the policy fails or scores a token NaN or infinite.
    """
    outcome = outcome_of(view.positions, decide(policy, view, block))
    wrong = np.argwhere(~np.isfinite(outcome.scores) & (outcome.positions >= 0))
    if len(wrong):
        row, head, slot = wrong[0]
        raise KvtwinError(
            f"score gave {outcome.scores[row, head, slot]} to the token at position "
            f"{outcome.positions[row, head, slot]} in row {row}, head {head}; expected a finite number\n"
            f"positions {outcome.positions[row, head].tolist()}, scores {short(outcome.scores[row, head])}"
        )
    return outcome


def decide(policy: Policy, view: View, block: Block | None) -> dict[str, Any]:
    """All hooks of one call and eviction, in the arrays of the view's library."""
    xp = view.xp
    view = remembered(policy, view, block)
    scores, protected = judge(policy, view)
    budget = heads_budgets(policy, view, scores)
    marked = xp.zeros_like(view.filled) if protected is None else protected & view.filled
    living = alive(view.positions, view.seen, view.window)
    index = survivors(xp, scores, protected, living, budget, view.positions.shape[-1])
    *pair, heads = merged(policy, view, index) if policy.merges else ({},)
    return {
        "scores": scores,
        "protected": marked,
        "living": living,
        "kept": keep(xp, view.positions, index, EMPTY),
        "budget": budget,
        "memory": dict(view.memory),
        "merged": tuple(pair),
        "heads": heads,
    }


def remembered(policy: Policy, view: View, block: Block | None) -> View:
    """The view after attention: keys as the model uses them, and the memory after `stream` and `note`."""
    if policy.repositions:
        view = repositioned(view)
    return noted(policy, view if block is None else streamed(policy, view, block))


def outcome_of(positions: Any, values: dict[str, Any]) -> Outcome:
    """What `decide` gave, as NumPy."""
    maps: dict[str, Any] = {
        what: {key: to_numpy(value) for key, value in values[what].items()} for what in ("memory", "heads")
    }
    blended = tuple(to_numpy(value) for value in values["merged"])
    arrays: dict[str, Any] = {
        key: to_numpy(value) for key, value in values.items() if key not in (*maps, "merged")
    }
    single = arrays["scores"].dtype in (np.float32, np.float16)
    arrays["scores"] = arrays["scores"].astype(np.float64)
    return Outcome(positions=to_numpy(positions), merged=blended, single=single, **maps, **arrays)


def to_numpy(x: Any) -> np.ndarray:
    """The array of any of the libraries as NumPy."""
    return np.array(x)


def moved(view: View, xp: Any) -> View:
    """The view in the arrays of another library."""
    arrays = {key: xp.asarray(value) for key in ARRAYS if (value := getattr(view, key)) is not None}
    maps: dict[str, Any] = {key: {k: xp.asarray(v) for k, v in getattr(view, key).items()} for key in MAPS}
    return replace(view, xp=xp, **arrays, **maps)


def moved_block(block: Block | None, xp: Any) -> Block | None:
    """The block in the arrays of another library."""
    return block and Block(*(None if x is None else xp.asarray(x) for x in vars(block).values()))


# What a policy keeps by the words of the contract, and how two outcomes differ.


def ranking(outcome: Outcome, row: int, head: int) -> list[int]:
    """Living slots, the first to stay first: protected, then the higher score, then the newer token."""
    slots = np.flatnonzero(outcome.living[row, head])

    def key(slot: int) -> tuple:
        marked, position = outcome.protected[row, head, slot], outcome.positions[row, head, slot]
        return marked, 0.0 if marked else outcome.scores[row, head, slot], position

    return sorted(slots.tolist(), key=key, reverse=True)


def expected(outcome: Outcome, row: int, head: int) -> list[int]:
    """Positions that stay, rising."""
    budget = int(outcome.budget[row, head])
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
        if ours.budget[row, head] != theirs.budget[row, head]:
            budgets = {"expected": int(ours.budget[row, head]), "got": int(theirs.budget[row, head])}
            return "gives another budget", where, budgets
        for key, value in ours.memory.items():
            if value.shape[2:] != ours.positions.shape[2:]:
                continue
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
    return _other_numbers(ours, theirs, tolerance)


def _other_numbers(
    ours: Outcome, theirs: Outcome, tolerance: float
) -> tuple[str, dict[str, Any], dict[str, Any]] | None:
    """The first head memory, or merged key or value, that differs by more than rounding."""
    pairs = {
        f"{key!r}": (value, theirs.memory[key])
        for key, value in ours.memory.items()
        if value.shape[2:] != ours.positions.shape[2:]
    }
    pairs |= {f"{key!r} after merging": (value, theirs.heads[key]) for key, value in ours.heads.items()}
    pairs |= dict(
        zip(("merged keys", "merged values"), zip(ours.merged, theirs.merged, strict=True), strict=False)
    )
    for key, (one, other) in pairs.items():
        if key.startswith("merged "):
            slots = min(one.shape[2], other.shape[2])
            one, other = one[:, :, :slots], other[:, :, :slots]
        room = tolerance * float(np.abs(one).max(initial=0))
        wrong = np.argwhere(~(np.abs(one - other) <= room))
        if len(wrong):
            place = tuple(wrong[0].tolist())
            where = {"row": place[0], "head": place[1]}
            return (
                f"other numbers in {key}",
                where,
                {"expected": float(one[place]), "got": float(other[place])},
            )
    return None


def short(values: Any) -> list[float]:
    return [float(f"{value:.4g}") for value in np.asarray(values).tolist()]
