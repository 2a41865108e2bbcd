"""A random layer and what a policy does on it: the ground on which the rule tier of `kvtwin check` stands.

A `Case` is one layer with random keys, values and queries in float64, rows of different length and heads that hold
different positions. Its NumPy trajectory (a prefill, then decode steps, at several budgets) is the record against which
everything else is held.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from framework.arrays import FAR, keep
from framework.errors import KvtwinError
from framework.eviction import (
    UNLIMITED,
    alive,
    heads_budgets,
    judge,
    merged,
    noted,
    repositioned,
    streamed,
    survivors,
)
from framework.policy import Block, Policy, View, attends
from framework.rope import angles
from framework.shapes import EMPTY
from framework.spec import Layer, ModelSpec, Rope

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


@dataclass(frozen=True, eq=False)
class Step:
    """One call of a trajectory: the view before `note`, and what NumPy made of it."""

    number: int
    budget: int
    view: View
    block: Block | None
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
    def question(self) -> np.ndarray:
        """Where the question of each row begins; the second row has none."""
        return np.array([self.tokens // 2, FAR, max(1, self.tokens // 3) - 1], np.int32)[: self.batch]

    @property
    def slots(self) -> int:
        """Slots of every view: one more than can be filled, so that the shape never changes."""
        return self.tokens + self.steps + 1

    @functools.cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """What a layer makes of each token, by position: keys, values [batch kv_heads all head_dim], queries [batch
        kv_heads group all head_dim], hidden [batch all dim], token ids; and its output projection."""
        random = np.random.default_rng([self.seed, self.tokens, self.batch])
        slots = (self.batch, self.kv_heads, self.slots, self.head_dim)
        queries = (self.batch, self.kv_heads, self.group, self.slots, self.head_dim)
        return {
            "keys": random.standard_normal(slots),
            "values": random.standard_normal(slots),
            "queries": 2 * random.standard_normal(queries),
            "hidden": random.standard_normal((self.batch, self.slots, self.spec.dim)),
            "output": random.standard_normal((self.kv_heads, self.group, self.head_dim, self.spec.dim)),
            "tokens": np.broadcast_to(
                random.integers(0, self.spec.vocab, (self.batch, 1, self.slots)), slots[:3]
            ).astype(np.int32),
        }

    @property
    def rope(self) -> Rope:
        """The rotation of this layer."""
        return Rope(theta=100.0, dim=self.head_dim)

    @property
    def layer(self) -> Layer:
        """This layer's numbers."""
        return Layer(
            heads=self.kv_heads * self.group,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            scale=self.head_dim**-0.5,
            rope=self.rope,
        )

    @property
    def spec(self) -> ModelSpec:
        """A model of two such layers."""
        return replace(tiny_spec(), layers=(self.layer, self.layer))

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
        slots = {key: np.where(filled, _at(memory[key], positions), 0.0) for key in policy.memory}
        heads = {key: memory[key] for key in policy.head_memory(self.layer)}
        cos, sin = angles(self.rope, np.arange(self.slots + needs.ahead))
        return View(
            xp=libraries()["NumPy"],
            phase="decode" if before.any() else "prefill",
            layer=1,
            layers=2,
            positions=positions,
            budget=np.full(positions.shape[:2], budget, np.int32),
            seen=seen,
            question=self.question,
            memory=slots | heads,
            queries=np.where(ring[:, None, None, :, None] >= 0, queries, 0.0) if needs.queries else None,
            query_positions=ring if needs.queries else None,
            sums=self._sums(positions, before, seen, window) if needs.sums else None,
            tokens=np.where(filled, _at(self.arrays["tokens"], positions), 0) if needs.tokens else None,
            output=self.arrays["output"] if needs.output else None,
            cos=cos,
            sin=sin,
            constants=policy.constants(self.spec),
            scale=self.head_dim**-0.5,
            window=window,
            repositions=policy.repositions,
            **streams,
        )

    def block(self, policy: Policy, before: np.ndarray, seen: np.ndarray) -> Block | None:
        """The tokens of a call, where the policy reads the stream."""
        if not policy.needs.stream:
            return None
        places = np.arange(int((seen - before).max(initial=0)))
        positions = np.where(places < (seen - before)[:, None], before[:, None] + places, EMPTY)
        where = np.maximum(positions, 0)
        queries = np.take_along_axis(self.arrays["queries"], where[:, None, None, :, None], axis=3)
        hidden = np.take_along_axis(self.arrays["hidden"], where[..., None], axis=1)
        return Block(positions.astype(np.int32), queries, hidden)

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
        memory |= {key: np.zeros((*shape[:2], *rest)) for key, rest in policy.head_memory(self.layer).items()}
        kept = np.full(shape, EMPTY, np.int32)
        before, seen = np.zeros(self.batch, np.int32), self.lengths
        for number in range(self.steps + 1):
            positions = _with(kept, before, seen)
            view = self.view(policy, positions, memory, before, seen, budget, window)
            block = self.block(policy, before, seen)
            outcome = decided(policy, view, block)
            yield Step(number, budget, view, block, outcome)
            for key, value in outcome.memory.items():
                if key in policy.memory:
                    _put(memory[key], positions, value)
                else:
                    memory[key] = value
            memory |= outcome.heads
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


ROWS = (
    "positions", "budget", "seen", "question", "keys", "values", "queries", "query_positions", "sums", "tokens",
)  # fmt: skip
ARRAYS = (*ROWS, "output", "cos", "sin")
MAPS = ("memory", "constants")
STATIC = ("phase", "layer", "layers", "scale", "window", "repositions")


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


def failure_at(step: Step, found: tuple | None, what: str, **where: Any) -> Failure | None:
    if found is None:
        return None
    text, place, example = found
    return Failure(f"{what}: {text}", where | {"step": step.number} | place, example)


def least_budget(policy: Policy) -> int:
    """The smallest budget that holds what the policy protects, and at least 1. Raises KvtwinError if there is none."""
    for budget in range(1, MOST + 1):
        if policy.protects(budget) <= budget:
            return budget
    raise KvtwinError(
        f"protects(budget) exceeds the budget for every budget up to {MOST}: "
        f"protects({MOST}) is {policy.protects(MOST)}"
    )


def tiny_spec(layers: int = 2, window: int = 5) -> ModelSpec:
    """A decoder whose second layer has a sliding window."""
    head = Layer(heads=6, kv_heads=2, head_dim=4, scale=0.5, rope=Rope(theta=100.0, dim=4))
    return ModelSpec(
        family="llama", vocab=29, dim=10, ffn=14, norm_eps=1e-6, positions=512,
        layers=tuple(replace(head, window=window if index % 2 else None) for index in range(layers)),
    )  # fmt: skip
