"""The contract of a backend: `Backend` builds a `Model`, a `Model` makes a `Cache` and steps it."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int, Integer

from framework.cache import Cache, Decision
from framework.checkpoint import open_checkpoint
from framework.codec import Codec, codecs
from framework.coding import check_codec
from framework.errors import KvtwinError
from framework.eviction import check_policy, layer_budgets
from framework.policy import Phase, Policy, policies
from framework.shapes import EMPTY
from framework.snapshot import Snapshot
from framework.spec import ModelSpec
from framework.tokenizer import Tokenizer

if TYPE_CHECKING:
    from framework.decode import Sampling
    from framework.generate import Generated


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
