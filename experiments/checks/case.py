"""A random layer and what a policy does on it: the ground on which the rule tier of `kvtwin check` stands.

A `Case` is one layer with random keys, values and queries in float64, rows of different length and heads that hold
different positions. Its NumPy trajectory (a prefill, then decode steps, at several budgets) is the record against which
everything else is held.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from experiments.checks.failure import Failure
from experiments.checks.outcome import Outcome, decided, libraries
from framework.arrays import FAR
from framework.errors import KvtwinError
from framework.eviction import UNLIMITED
from framework.policy import Block, Policy, View, attends
from framework.rope import angles
from framework.shapes import EMPTY
from framework.spec import Layer, ModelSpec, Rope

MOST = 4096  # the largest protected count that is looked for


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
