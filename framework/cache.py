"""The contract of a cache: what every backend's has, what it holds, and what it refuses."""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from framework.arrays import FAR
from framework.codec import Codec, codecs
from framework.errors import KvtwinError
from framework.eviction import allocated, limit, overwrites, remembers
from framework.groups import Groups, counted
from framework.pages import Pages, pages
from framework.policy import Phase, Policy, policies
from framework.snapshot import Snapshot
from framework.spec import ModelSpec


@dataclass(frozen=True)
class Bytes:
    """Bytes that a cache holds now, measured on its arrays.

    `payload`: keys and values of kept tokens. `scales`: what a codec stores beside its codes. `positions`, `memory`:
    of kept tokens. `queries`: the newest queries that a policy asked for. `padding`: allocated and empty. `capacity`:
    all of it, i.e. the sum of the others.
    """

    payload: int
    scales: int
    positions: int
    memory: int
    queries: int
    padding: int

    @property
    def capacity(self) -> int:
        """Everything allocated."""
        return self.payload + self.scales + self.positions + self.memory + self.queries + self.padding


@dataclass(frozen=True)
class Decision:
    """One eviction of one layer as a backend decided it: the slots it saw, what decided, and the positions it chose.

    `budget` is what each head was to keep.
    """

    layer: int
    positions: Int[np.ndarray, "batch kv_heads slots"]
    scores: Float[np.ndarray, "batch kv_heads slots"]
    protected: Bool[np.ndarray, "batch kv_heads slots"]
    kept: Int[np.ndarray, "batch kv_heads kept"]
    budget: Int[np.ndarray, "batch kv_heads"]


class Cache(ABC):
    """The keys and values of a batch of sequences, under one policy and one codec.

    `budgets`: tokens kept by each kv head in each layer, None where no budget holds. `question`: the position at which
    the question of each row begins, FAR where there is none; `mark` sets it.

    A step consumes its cache: the one that it returns replaces it, and using the old one raises. Rows are sequences;
    a row advances only by the real tokens that it is given.
    """

    spec: ModelSpec
    policy: Policy
    codec: Codec
    budgets: list[Int[np.ndarray, "batch kv_heads"] | None]
    question: Int[np.ndarray, "batch"]
    capacity: int | None
    length: int | None
    steps: int
    singles: int
    pending: bool
    consumed: bool = False

    def __repr__(self) -> str:
        seen = "consumed" if self.consumed else f"seen {self.seen.tolist()}"
        return (
            f"<{type(self).__name__} {policies.spelling(self.policy)}, {codecs.spelling(self.codec)}, {seen}>"
        )

    @property
    @abstractmethod
    def batch(self) -> int:
        """Number of rows."""

    def consume(self) -> None:
        """Mark this cache as used up; raises when it already was."""
        self.alive()
        self.consumed = True

    def alive(self) -> None:
        """Raises when a step has consumed this cache."""
        if self.consumed:
            raise KvtwinError(
                "this cache was consumed by a step; use the cache that the step returned, or fork() before stepping"
            )

    @property
    @abstractmethod
    def seen(self) -> Int[np.ndarray, "batch"]:
        """Tokens that each row has been given."""

    def mark(self, question: Int[np.ndarray, "batch"] | Sequence[int]) -> None:
        """Say at which position the question of each row begins, FAR for none, from the next call on."""
        self.alive()
        marks = np.asarray(question)
        if (
            marks.shape != (self.batch,)
            or marks.dtype.kind not in "iu"
            or (marks < 0).any()
            or (marks > FAR).any()
        ):
            raise KvtwinError(
                f"questions begin at {question}; expected a position of at least 0 for each of {self.batch} rows"
            )
        self.question = marks.astype(np.int32)

    def marked_until(self, seen: Int[np.ndarray, "batch"]) -> Int[np.ndarray, "batch"]:
        """The marks that are left without the tokens from these positions on."""
        return np.where(self.question < seen, self.question, FAR).astype(np.int32)

    @property
    @abstractmethod
    def bytes(self) -> Bytes:
        """What the cache occupies, measured."""

    @property
    def kept(self) -> list[Int[np.ndarray, "batch kv_heads kept"]]:
        """Positions held in each layer, rising, -1 padded."""
        return self.snapshot().kept

    @property
    def groups(self) -> list[Groups]:
        """The groups in which the keys of each layer are coded; none under a codec that codes each key by itself."""
        layers = self.snapshot().layers if self.codec.together else ()
        return [counted(self.codec, layer.streams, layer.positions, layer.tables) for layer in layers]

    @abstractmethod
    def snapshot(self) -> Snapshot:
        """The cache as NumPy arrays in canonical order."""

    @abstractmethod
    def fork(self, rows: int = 1) -> "Cache":
        """A deep copy; `rows` > 1 copies a cache of one row into that many."""

    @abstractmethod
    def rows(self, index: Sequence[int]) -> "Cache":
        """A new cache with these rows, in this order; the old one stays usable."""

    def roll_back(self, count: int) -> "Cache":
        """The cache as if the last `count` tokens of every row had never come, consuming this one.

        Refused where something was lost: an eviction since then, or a policy whose memory or queries cannot be undone.
        """
        self.check_roll_back(count)
        result = self.until(self.seen - count)
        result.steps, result.singles = max(0, self.steps - count), max(0, self.singles - count)
        self.consume()
        return result

    @abstractmethod
    def until(self, seen: Int[np.ndarray, "batch"]) -> "Cache":
        """A copy without the tokens from these positions on; what the policy remembers of the others stays as it is."""

    @property
    @abstractmethod
    def last_eviction(self) -> Int[np.ndarray, "batch"]:
        """What `seen` was when a token of the row was last evicted, 0 where none was."""

    def limit(self, index: int) -> int | None:
        """Most tokens that a head of this layer can hold after an eviction; None where nothing is ever evicted."""
        budget = self.budgets[index]
        most = None
        if budget is not None:
            most = max(self.policy.most(int(one), index, self.spec) for one in np.unique(budget))
        return limit(most, self.spec.layers[index].window)

    def laid_out(self, index: int, slots: int) -> Pages | None:
        """The pages of a layer whose heads differ; None where they take no less than heads of this many slots."""
        budget, bound = self.budgets[index], self.limit(index)
        if budget is None or bound is None:
            return None
        total = sum(self.policy.total(row, index, self.spec) for row in budget.tolist())
        # Rows that are silent at an eviction keep what came since their own last one.
        interval = self.policy.interval
        growth, spare = (1, 1) if overwrites(self.policy, True) else (interval, 2 * interval)
        layout = pages(min(total, budget.size * bound), budget.size, spare, growth)
        return layout if layout.places < budget.size * slots else None

    def allot(self, statistics: Sequence[Shaped[np.ndarray, "batch"]]) -> None:
        """Share the budgets among the layers as the policy says."""
        given = allocated(self.policy, statistics, self.seen, self.spec)
        pairs = zip(given, self.spec.layers, strict=True)
        self.budgets = [np.repeat(each[:, None], layer.kv_heads, axis=1) for each, layer in pairs]

    def expect(self, tokens: int) -> None:
        """Announce how many tokens will follow the next call, so that fixed-size buffers are allocated once."""
        del tokens  # nothing to do for a cache that grows

    def save(self, path: str | os.PathLike) -> None:
        """Write the cache to one safetensors file; `Model.restore(path)` of any backend reads it."""
        self.snapshot().save(path)

    def admit(self, given: Int[np.ndarray, "batch"]) -> Int[np.ndarray, "batch"]:
        """What the rows will have seen with this many more tokens; raises where that exceeds a declared capacity."""
        after = (self.seen + given).astype(np.int32)
        if self.capacity is None or after.max() <= self.capacity:
            return after
        if any(self.limit(index) is None for index in range(len(self.spec.layers))):
            raise KvtwinError(f"{after.max()} tokens exceed the capacity {self.capacity} of the cache")
        return after

    def counted(self, phase: Phase, single: bool, calls: int = 1) -> tuple[int, int]:
        """`steps` and `singles` after more calls; `single`: each gave every row exactly one token.

        `steps` are the decode calls since the last prefill, and matter only under an interval, so that elsewhere they
        stay 0. `singles` are the last of them whose number is known from the tokens alone.
        """
        if phase != "decode" or self.policy.interval == 1:
            return 0, 0
        return self.steps + calls, self.singles + calls if single and not self.pending else 0

    def check_forced(self, forced: Sequence[np.ndarray], rows: Bool[np.ndarray, "batch"]) -> None:
        """Raises unless the sets are one per layer that evicts, and fit into what it may hold."""
        limits = [limit for index in range(len(self.spec.layers)) if (limit := self.limit(index)) is not None]
        if len(forced) != len(limits):
            raise KvtwinError(
                f"{len(forced)} forced sets came; expected one for each of the {len(limits)} layers that evict"
            )
        together = any(self.codec.joint(layer) for layer in self.spec.layers)
        for kept, limit in zip(forced, limits, strict=True):
            most = int((np.asarray(kept)[rows] >= 0).sum(-1).max(initial=0))
            if most > limit:
                raise KvtwinError(
                    f"a forced set has {most} tokens; expected at most {limit}, what the layer may hold"
                )
            if together and (np.sort(kept, axis=-1) != np.sort(kept, axis=-1)[:, :1]).any():
                raise KvtwinError(
                    f"a forced set differs between heads, and codec {codecs.spelling(self.codec)} codes them together; "
                    "expected one set for all heads of a layer"
                )

    def check_fork(self, rows: int) -> None:
        """Raises unless the cache can be copied into this many rows."""
        self.alive()
        if rows < 1:
            raise KvtwinError(f"fork(rows={rows}); expected at least 1")
        if rows != 1 and self.batch != 1:
            raise KvtwinError(f"fork(rows={rows}) of a cache with batch {self.batch}; expected a batch of 1")

    def check_rows(self, index: Sequence[int]) -> None:
        """Raises unless every entry names a row."""
        self.alive()
        wrong = [row for row in index if not -self.batch <= row < self.batch]
        if wrong or not len(index):
            raise KvtwinError(
                f"rows {list(index)} of a cache with batch {self.batch}; expected indices below {self.batch}"
            )

    def check_roll_back(self, count: int) -> None:
        """Raises unless the last `count` tokens can be taken back without a trace."""
        seen, dropped, queries = self.seen, self.last_eviction, self.policy.needs.queries
        if count < 0 or (count > seen).any():
            raise KvtwinError(f"cannot roll back {count} tokens: the rows have seen {seen.tolist()}")
        if not count:
            return
        recent = self.codec.recent
        if recent and (seen >= recent).any():
            raise KvtwinError(
                f"cannot roll back {count} tokens: codec {codecs.spelling(self.codec)} has coded tokens, and what is "
                f"coded does not become exact again; expected rows of less than {recent} tokens; fork() before the "
                "part that may be taken back"
            )
        if (dropped > seen - count).any():
            raise KvtwinError(
                f"cannot roll back {count} tokens: tokens were evicted within them, and what is dropped is gone; "
                "fork() before the part that may be taken back"
            )
        if self.codec.queries:
            raise KvtwinError(
                f"cannot roll back under codec {codecs.spelling(self.codec)}: its newest queries cannot be undone; "
                "fork() before the part that may be taken back"
            )
        if queries or remembers(self.policy, self.spec):
            what = "newest queries" if queries else "memory"
            raise KvtwinError(
                f"cannot roll back under {policies.spelling(self.policy)}: its {what} cannot be undone; "
                "fork() before the part that may be taken back"
            )
        if self.policy.interval > 1 and count > self.singles:
            raise KvtwinError(
                f"cannot roll back {count} tokens under {policies.spelling(self.policy)}: only the last {self.singles} "
                "came one a step, and for others its next eviction cannot be placed; fork() before them"
            )
