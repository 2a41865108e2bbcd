"""The contract of a backend: `Backend` builds a `Model`, a `Model` makes a `Cache` and steps it."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int, Integer, Shaped

from framework.arrays import FAR
from framework.checkpoint import open_checkpoint
from framework.codec import Codec, codecs
from framework.coding import check_codec
from framework.errors import KvtwinError
from framework.eviction import allocated, check_policy, layer_budgets, limit, overwrites, remembers
from framework.groups import Groups, counted
from framework.pages import Pages, pages
from framework.policy import Phase, Policy, policies
from framework.shapes import EMPTY
from framework.snapshot import Snapshot
from framework.spec import ModelSpec
from framework.tokenizer import Tokenizer

if TYPE_CHECKING:
    from framework.decode import Sampling
    from framework.generate import Generated


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


class Model(ABC):
    """A decoder with its weights on one backend. NumPy in, NumPy out."""

    spec: ModelSpec
    dtype: str
    tokenizer: Tokenizer

    @abstractmethod
    def cache(
        self,
        policy: str | Policy = "full()",
        codec: str | Codec = "full()",
        batch: int = 1,
        capacity: int | None = None,
        length: int | None = None,
    ) -> Cache:
        """An empty cache.

        `capacity`: most tokens per row in layers that evict nothing; beyond it a step raises (None: grows as needed).
        `length`: the final number of tokens when known; the angles of dynamic rope scaling depend on it.
        """

    def step(
        self,
        tokens: Integer[np.ndarray, "batch tokens"] | Sequence[Sequence[int]],
        cache: Cache | None = None,
        *,
        logits: Literal["last", "all"] | None = "last",
        phase: Phase | None = None,
        evict: bool = True,
        forced: Sequence[np.ndarray] | None = None,
        decisions: list[Decision] | None = None,
        taps: dict[str, np.ndarray] | None = None,
    ) -> tuple[Any, Any]:
        """Append the tokens, attend, then evict; returns the logits and the cache that replaces the given one.

        `tokens`: ids; -1 is padding, anywhere in a row, and a row of padding does not advance. `cache` None: a new
        full one. `logits`: "last" of each row's last real token [batch, 1, vocab], "all" [batch, tokens, vocab] with 0
        at padding, or None for None; float32, or float64 from a float64 model.
        `phase`: "prefill" evicts at the end of the call, "decode" every `policy.interval` steps; by default the first
        call on a cache is prefill and later ones decode. `evict=False` holds everything back until the next call that
        evicts (chunked prefill). `forced`: kept positions per layer, which replace the policy's choice where this
        call evicts. `decisions`: a list that receives one entry per layer when this call evicts. `taps`: a dict that
        receives the named values inside the model, in order.
        """
        tokens = read_tokens(tokens, self.spec, cache.batch if cache else None)
        cache = cache or self.cache(batch=len(tokens))
        phase = phase or ("decode" if cache.seen.any() else "prefill")
        if phase not in ("prefill", "decode") or logits not in ("last", "all", None):
            raise KvtwinError(
                f"phase={phase!r}, logits={logits!r}; "
                'expected phase "prefill" or "decode", and logits "last", "all" or None'
            )
        whole = phase == "prefill" or cache.pending
        allots = cache.policy.allocates and whole and evict
        evicted = (tokens >= 0).any(axis=1) | np.full(len(tokens), whole)
        if forced is not None and not allots:
            cache.check_forced(forced, evicted)
        call = partial(self.run, forced=forced, decisions=decisions)
        if not allots:
            return call(tokens, cache, logits=logits, phase=phase, evict=evict, taps=taps)
        statistics: list[np.ndarray] = []
        out, cache = self.run(
            tokens, cache, logits=logits, phase=phase, evict=False, taps=taps, statistics=statistics
        )
        cache.allot(statistics)
        if forced is not None:  # only now is it known what each layer may hold
            cache.check_forced(forced, evicted)
        _, cache = call(np.full((cache.batch, 1), EMPTY, np.int32), cache, logits=None, phase="prefill")
        return out, cache

    @abstractmethod
    def run(
        self,
        tokens: Int[np.ndarray, "batch tokens"],
        cache: Any,
        *,
        logits: Literal["last", "all"] | None = "last",
        phase: Phase,
        evict: bool = True,
        forced: Sequence[np.ndarray] | None = None,
        decisions: list[Decision] | None = None,
        taps: dict[str, np.ndarray] | None = None,
        statistics: list[np.ndarray] | None = None,
        gradients: Sequence[Float[np.ndarray, "batch tokens dim"]] | None = None,
    ) -> tuple[Any, Any]:
        """`step` with everything decided: one call of the backend. `statistics` receives one [batch] per layer;
        `gradients` are what the policy's blocks carry in a second pass, one array per layer."""

    @abstractmethod
    def gradients(
        self, tokens: Int[np.ndarray, "batch tokens"], cache: Any
    ) -> list[Float[np.ndarray, "batch tokens dim"]]:
        """How much each layer's attention matters for the model's output, if these tokens came behind the cache.

        Per layer, the gradient of the sum over the tokens of |h|^2, h being the output of the last layer before the
        final norm, with respect to the output of the layer's attention (that of its output projection); what the cache
        holds is fixed. 0 at padding. Float32, or float64 from a float64 model. The cache stays as it is.

        Exact, by one forward and one backward pass. The backward pass runs a layer again from its input, and 256
        queries again from their keys, so that it holds the inputs of all layers, one layer's activations and keys, and
        256 x slots weights, never tokens x tokens.
        """

    def read(self, tokens: Int[np.ndarray, "batch tokens"], cache: Cache) -> Cache:
        """Let the policy see these tokens behind the cache, in the phase "pass", and forget them again.

        What it remembers of the tokens in the cache stays; -1 is padding. Consumes the cache.
        """
        tokens, seen = read_tokens(tokens, self.spec, cache.batch), cache.seen
        held = cache.steps, cache.singles, cache.pending
        gradients = self.gradients(tokens, cache) if cache.policy.needs.gradients else None
        _, cache = self.run(tokens, cache, logits=None, phase="pass", evict=False, gradients=gradients)
        result = cache.until(seen)
        result.steps, result.singles, result.pending = held
        cache.consume()
        return result

    @abstractmethod
    def decode(
        self,
        cache: Cache,
        logits: Float[np.ndarray, "batch vocab"],
        sampling: "Sampling",
        stop: Sequence[int],
        steps: int,
        first: int = 0,
        active: Bool[np.ndarray, "batch"] | None = None,
    ) -> tuple[Int[np.ndarray, "batch steps"], Float[np.ndarray, "batch vocab"], Cache]:
        """Choose a token from the logits and step with it, `steps` times; -1 after a row's stop token.

        The stop token itself is part of the result and of the cache. `first` is the number of tokens chosen before,
        which the noise of sampling depends on. Rows where `active` is False take no part. A cache that holds back an
        eviction evicts first.
        """

    @abstractmethod
    def restore(self, source: Snapshot | str | os.PathLike) -> Cache:
        """A cache from a snapshot, or from a file that `Cache.save` of any backend wrote."""

    def generate(self, prompts: str | Sequence[Any], **options: Any) -> "Generated":
        """Continue the prompts; the options are those of `framework.generate.generate`."""
        from framework.generate import generate

        return generate(self, prompts, **options)

    def stream(self, prompt: str | Sequence[Any], **options: Any) -> Iterator[str]:
        """Yield the continuation of one prompt piece by piece; options as in `framework.generate.stream`."""
        from framework.generate import stream

        return stream(self, prompt, **options)


class Backend(ABC):
    """A library that runs models, as a value."""

    name: str
    dtypes: tuple[str, ...]

    @abstractmethod
    def build(
        self,
        spec: ModelSpec,
        weights: Mapping[str, np.ndarray],
        dtype: str = "float32",
        tokenizer: Tokenizer | None = None,
        mesh: Any = None,
    ) -> Model:
        """A model from canonical weights, cast to `dtype`. A tokenizer of bytes when none is given.

        `mesh`: the devices to spread over: the library's own mesh with axes `batch` and `heads`. Rows of caches go by
        the one, kv heads and the matrices that make or read them by the other. Kept sets are those of one device, and
        logits but for the order of sums. Refused where they do not divide.
        """

    def load(self, name: str | os.PathLike, dtype: str = "float32", mesh: Any = None) -> Model:
        """A bundled model by name, a Hugging Face folder on disk, or "org/name" through the hub's cache."""
        checkpoint = open_checkpoint(name)
        return self.build(checkpoint.spec, checkpoint.weights, dtype, checkpoint.tokenizer, mesh)

    def check_dtype(self, dtype: str) -> None:
        """Raises unless this backend computes in `dtype`."""
        if dtype not in self.dtypes:
            raise KvtwinError(
                f"backend {self.name} does not compute in {dtype!r}; expected one of {', '.join(self.dtypes)}"
            )


def read_policy(
    policy: str | Policy, spec: ModelSpec, batch: int
) -> tuple[Policy, list[Int[np.ndarray, "batch kv_heads"] | None]]:
    """The policy, made from its spelling, and the budgets of the layers."""
    made = policies.make(policy) if isinstance(policy, str) else policy
    check_policy(made, spec)
    each = layer_budgets(made, spec)
    return made, [None if heads is None else np.array([heads] * batch, np.int32) for heads in each]


def read_codec(codec: str | Codec, policy: Policy, spec: ModelSpec) -> Codec:
    """The codec, made from its spelling; refused where it cannot store what the model makes under the policy."""
    made = codecs.make(codec) if isinstance(codec, str) else codec
    if not isinstance(made, Codec):
        raise KvtwinError(f'codec is {made!r}; expected a codec or its spelling, as "exl2_q6()"')
    check_codec(made, policy, spec)
    return made


def check_sizes(batch: int, capacity: int | None, length: int | None) -> None:
    """Raises unless a cache can have these sizes."""
    for what, value in (("batch", batch), ("capacity", capacity), ("length", length)):
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1
        ):
            raise KvtwinError(f"{what} is {value!r}; expected an integer of at least 1")


def read_tokens(tokens: Any, spec: ModelSpec, batch: int | None) -> Int[np.ndarray, "batch tokens"]:
    """Token ids as int32 [batch, tokens]; shorter rows of a ragged list are padded with -1 on the right."""
    if not isinstance(tokens, np.ndarray):
        rows = [np.asarray(row) for row in tokens]
        if not rows or any(row.ndim != 1 for row in rows):
            raise KvtwinError("tokens came as no list of rows; expected [batch, tokens]")
        wide = max(len(row) for row in rows)
        filled = [np.pad(row, (0, wide - len(row)), constant_values=-1) for row in rows]
        tokens = np.stack(filled) if wide else np.zeros((len(rows), 0), np.int32)
    if tokens.ndim != 2 or tokens.shape[1] == 0:
        raise KvtwinError(
            f"tokens have shape {tokens.shape}; expected [batch, tokens] with at least one token"
        )
    whole = tokens.dtype.kind in "iu" or (tokens.dtype.kind == "f" and bool((tokens % 1 == 0).all()))
    if not whole:
        raise KvtwinError(f"tokens have dtype {tokens.dtype}; expected integers")
    if batch is not None and tokens.shape[0] != batch:
        raise KvtwinError(f"tokens have {tokens.shape[0]} rows; expected {batch}, the batch of the cache")
    wrong = (tokens >= spec.vocab) | (tokens < -1)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise KvtwinError(
            f"token {tokens[row, column]} at row {row}, column {column}; "
            f"expected 0 to {spec.vocab - 1}, or -1 for padding"
        )
    return tokens.astype(np.int32)
