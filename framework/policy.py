"""A cache policy: the rule that says which tokens live, written once in array code for every backend.

A policy file holds one subclass of `Policy`: a frozen dataclass whose `score` gives a number per slot; higher stays.
What the machinery makes of it, the one rule that turns scores into a kept set, is in `framework/eviction.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from framework.arrays import FAR, Array, Namespace, blocks, device, softmax, take_slots
from framework.registry import Registry
from framework.spec import Layer, ModelSpec

Phase = Literal["prefill", "decode", "pass"]
Budget = int | tuple[int | tuple[int, ...], ...] | None
BLOCK = 256  # most tokens of a call that `stream` gets at a time
NORMS = 128  # slots whose output norms are computed at a time


@dataclass(frozen=True)
class Needs:
    """What a policy reads of the model beside positions and its own memory. What is not asked for is not computed.

    `queries`: the number of newest queries kept for `View.attention` (implies `keys`). `sums`: the attention that each
    slot received from the queries of this call, for `note`. `stream`: all tokens of a call are handed to
    `Policy.stream`. `tokens`: their ids. `output`: the weight that `View.output_norm` multiplies by. `gradients`: the
    blocks of a second pass carry `Block.gradients`. `ahead`: how far beyond the tokens seen `View.rotate` is asked to
    go. `question`: of a prompt that is evicted in chunks, the question is read behind each chunk before it, in the
    phase "pass", and forgotten again.
    """

    keys: bool = False
    values: bool = False
    queries: int = 0
    sums: bool = False
    stream: bool = False
    tokens: bool = False
    output: bool = False
    gradients: bool = False
    ahead: int = 0
    question: bool = False


@dataclass(frozen=True)
class Block:
    """Some new tokens of a call, with what the layer made of them: un-rotated queries, and its normalised input.

    Their keys and values are in the view. Padding is at position -1. How a call is cut into blocks means nothing.

    `gradients`, under `needs.gradients` and in the phase "pass" only (elsewhere None): how much what this layer's
    attention adds at each token matters for the last layer's output h, as the gradient of the sum over the call of
    |h|^2, tokens in the cache held fixed.
    """

    positions: Int[Array, "batch tokens"]
    queries: Float[Array, "batch kv_heads group tokens head_dim"]
    hidden: Float[Array, "batch tokens dim"]
    gradients: Array = None  # [batch tokens dim]


@dataclass(frozen=True)
class View:
    """What a policy sees of one layer after the tokens of a call were appended and attended.

    Slots are in position order with the empty ones (position -1) last, except under `order_free` policies, and in
    `note` and `stream`, which see any order. Heads that hold fewer slots are padded with empty ones. Arrays are at
    least float32.

    `budget` is the only budget that a policy may read. `seen` counts the tokens of each row, those of this call
    included: the next token will have position `seen`. `question` is the position at which the question of each row
    begins, FAR where there is none: what a prompt has from there on is the question. `keys` and `queries` are rotated
    as the model uses them; `queries` are the newest ones, at `query_positions` (-1: no such query yet). `memory` holds
    the policy's own arrays: one number per slot, and those of `Policy.head_memory` per head.
    """

    xp: Namespace
    phase: Phase
    layer: int
    layers: int
    positions: Int[Array, "batch kv_heads slots"]
    budget: Int[Array, "batch kv_heads"]
    seen: Int[Array, "batch"]
    question: Int[Array, "batch"]
    memory: Mapping[str, Float[Array, "batch kv_heads *rest"]]
    keys: Array = (
        None  # [batch kv_heads slots head_dim]; this and what follows is None unless `needs` asks for it
    )
    values: Array = None  # [batch kv_heads slots head_dim]
    queries: Array = None  # [batch kv_heads group window head_dim]
    query_positions: Array = None  # [batch window]
    sums: Array = None  # [batch kv_heads slots]
    tokens: Array = None  # [batch kv_heads slots]
    output: Array = None  # [kv_heads group head_dim dim]
    cos: Array = None  # [reach half]; also None in a layer without rope
    sin: Array = None  # [reach half]
    constants: Mapping[str, Array] = field(default_factory=dict)
    scale: float = 1.0
    softcap: float | None = None
    window: int | None = None
    repositions: bool = False

    @property
    def filled(self) -> Bool[Array, "batch kv_heads slots"]:
        """True where a slot holds a token."""
        return self.positions >= 0

    @property
    def rotary(self) -> Int[Array, "batch kv_heads slots"]:
        """Where the key of each slot is rotated: its position, or under `repositions` its rank among the kept."""
        if not self.repositions:
            return self.positions
        order = self.xp.argsort(self.xp.where(self.filled, self.positions, FAR), axis=-1, stable=True)
        rank = self.xp.argsort(order, axis=-1)
        return self.xp.astype(self.xp.where(self.filled, rank, -1), self.xp.int32)

    def newest(self, count: int | Int[Array, "batch kv_heads"]) -> Bool[Array, "batch kv_heads slots"]:
        """True for the tokens at the last `count` positions of each row."""
        first = self.seen[:, None] - count
        return self.filled & (self.positions >= first[..., None])

    def rotate(
        self, x: Float[Array, "*axes head_dim"], positions: Int[Array, "*#axes"], back: bool = False
    ) -> Float[Array, "*axes head_dim"]:
        """Rotary embedding of `x` at these positions, or with `back` taken off again; -1 turns as 0."""
        if self.cos is None:
            return x
        cos, sin = self._angles(positions)
        if back:  # yarn's attention factor multiplies both, so that the inverse divides by its square
            square = cos * cos + sin * sin
            cos, sin = cos / square, -sin / square
        return _turned(self.xp, x, cos, sin)

    def mean_rotation(self, positions: Int[Array, "batch many"]) -> Float[Array, "batch head_dim head_dim"]:
        """The mean of the rotations to these positions, as a matrix that multiplies from the left."""
        xp = self.xp
        eye = xp.eye(self.keys.shape[-1], dtype=self.keys.dtype, device=device(self.keys))
        eye = xp.broadcast_to(eye, (positions.shape[0], *eye.shape))
        if self.cos is None:
            return eye
        cos, sin = (xp.mean(one, axis=1, keepdims=True) for one in self._angles(positions))
        return xp.matrix_transpose(_turned(xp, eye, cos, sin))

    def _angles(self, positions: Int[Array, "*axes"]) -> tuple[Array, Array]:
        xp = self.xp
        where = xp.reshape(xp.where(positions < 0, 0, positions), (-1,))
        shape = (*positions.shape, self.cos.shape[-1])
        cos, sin = (xp.reshape(xp.take(table, where, axis=0), shape) for table in (self.cos, self.sin))
        return cos, sin

    def unrotated(self) -> Float[Array, "batch kv_heads slots head_dim"]:
        """The keys without their rotation."""
        return self.rotate(self.keys, self.rotary, back=True)

    def attention(self, block: Block | None = None) -> Float[Array, "batch kv_heads group window slots"]:
        """What each of the newest queries, or of the block's, gives to each slot: the model's softmax over these slots.

        A query that does not exist gives 0 everywhere.
        """
        xp = self.xp
        queries, positions = (self.queries, self.query_positions) if block is None else self._rotated(block)
        batch, kv_heads, group, window, head_dim = queries.shape
        flat = xp.reshape(queries, (batch, kv_heads, group * window, head_dim))
        logits = xp.matmul(flat, xp.matrix_transpose(self.keys)) * self.scale
        logits = xp.reshape(logits, (batch, kv_heads, group, window, -1))
        if self.softcap is not None:
            logits = xp.tanh(logits / self.softcap) * self.softcap
        mask = attends(positions[:, None, :, None], self.positions[:, :, None, :], self.window)
        return softmax(xp, logits, mask[:, :, None, ...])

    def query_rotary(self, positions: Int[Array, "batch tokens"]) -> Int[Array, "batch kv_heads tokens"]:
        """Where queries at these positions are rotated: there, or under `repositions` at the rank of their token."""
        xp = self.xp
        if not self.repositions:
            shape = (positions.shape[0], self.positions.shape[1], positions.shape[1])
            return xp.broadcast_to(positions[:, None, :], shape)
        older = self.filled[:, :, None, :] & (self.positions[:, :, None, :] <= positions[:, None, :, None])
        return xp.astype(xp.sum(xp.astype(older, xp.int32), axis=-1) - 1, xp.int32)

    def _rotated(self, block: Block) -> tuple[Array, Array]:
        where = self.query_rotary(block.positions)
        return self.rotate(block.queries, where[:, :, None, :]), block.positions

    def output_norm(
        self, values: Float[Array, "batch kv_heads slots head_dim"], order: Literal[1, 2] = 1
    ) -> Float[Array, "batch kv_heads group slots"]:
        """|W_o v| of each slot through each query head of its group: how much it adds to the layer's output.

        `order` 1: the sum of absolute values; 2: the Euclidean norm, the cheaper of the two.
        """
        xp = self.xp
        # |W_o v|^2 = v' (W_o' W_o) v needs no array as wide as the model.
        square = xp.matmul(self.output, xp.matrix_transpose(self.output)) if order == 2 else None

        def norm(part: Array) -> Array:
            part = part[:, :, None, ...]
            if square is None:
                return xp.sum(xp.abs(xp.matmul(part, self.output[None, ...])), axis=-1)
            length = xp.sum(xp.matmul(part, square[None, ...]) * part, axis=-1)
            return xp.sqrt(xp.where(length > 0, length, 0.0))

        return blocks(xp, norm, values, size=NORMS, axis=2, out=3)


@dataclass(frozen=True, kw_only=True)
class Policy(ABC):
    """Base of every policy. Fields are hashable: an equal policy is the same static argument of a compiled step.

    `budget`: tokens kept per kv head: one number, or one per layer, each a number or one per head. `fraction`: a share
    of the longest prompt instead; `eviction.resolved` makes a budget of it once the prompt is known, as `generate`
    does. `interval`: decode steps between two evictions; the cache then holds up to `interval - 1` tokens more than the
    budget.

    In a call and layer the hooks run in this order: `stream` and `note` after attention, at every call; then, where
    the call evicts, `score`, `protected`, `budgets`, and after the choice `merge`. All but `score` are optional.
    """

    budget: Budget = None
    fraction: float | int | None = None
    interval: int = 1

    @abstractmethod
    def score(self, view: View) -> Shaped[Array, "batch kv_heads slots"]:
        """A number per slot; higher stays. Equal scores keep the newer token. What empty slots get does not matter."""

    @property
    def needs(self) -> Needs:
        """What the view must carry."""
        return Needs()

    # What a policy promises. Most name these as class variables; a wrapper takes them from what it wraps.

    @property
    def memory(self) -> Mapping[str, float]:
        """The arrays with one number per slot, by name, and the value that a new token starts with."""
        return {}

    @property
    def order_free(self) -> bool:
        """True: scores do not depend on slot order, so that a new token may overwrite the weakest."""
        return False

    @property
    def shared(self) -> bool:
        """True: one kept set for all heads of a layer."""
        return False

    @property
    def evicts(self) -> bool:
        """False only for a policy that keeps all."""
        return True

    @property
    def repositions(self) -> bool:
        """True: keys are rotated by their rank among the kept tokens, at every call, not by their position."""
        return False

    @property
    def divides(self) -> bool:
        """True: `budgets` shares a layer's budget among its heads by what it sees."""
        return False

    @property
    def allocates(self) -> bool:
        """True: `allocate` shares the budget among the layers once the whole prompt is seen."""
        return False

    @property
    def merges(self) -> bool:
        """True: `merge` blends what is evicted into what stays."""
        return False

    # Memory.

    def head_memory(self, layer: Layer) -> Mapping[str, tuple[int, ...]]:
        """Arrays with one entry per row and head, by name: their shape after [batch kv_heads]. They start as 0."""
        return {}

    def constants(self, spec: ModelSpec) -> Mapping[str, np.ndarray]:
        """Arrays from a file of the policy's own, which `View.constants` then holds. Raises KvtwinError where they
        cannot be had or belong to another model."""
        return {}

    def stream(self, view: View, block: Block) -> Mapping[str, Float[Array, "batch kv_heads *rest"]]:
        """The memory after some new tokens of a call; runs for each block, where `needs.stream` asks for it."""
        return view.memory

    def note(self, view: View) -> Mapping[str, Float[Array, "batch kv_heads *rest"]]:
        """The memory after this call; runs after attention, before `score`, at every call.

        It must work slot by slot: it may see the slots in any order.
        """
        return view.memory

    # Who stays, beside the score.

    def protected(self, view: View) -> Bool[Array, "batch kv_heads slots"] | None:
        """True where a slot must stay whatever its score; None for nowhere."""
        return None

    def protects(self, budget: int) -> int:
        """How many slots `protected` can mark under this budget. A smaller budget is refused."""
        return 0

    def budgets(
        self, view: View, scores: Shaped[Array, "batch kv_heads slots"]
    ) -> Int[Array, "batch kv_heads"]:
        """Tokens that each head keeps at this eviction, under `divides`."""
        return view.budget

    def most(self, budget: int, layer: int, spec: ModelSpec) -> int:
        """The most tokens that `budgets` gives a head of this layer."""
        return budget

    def total(self, budgets: Sequence[int], layer: int, spec: ModelSpec) -> int:
        """The most tokens that `budgets` gives the heads of this layer together; buffers have room for as many."""
        return sum(self.most(budget, layer, spec) for budget in budgets)

    def statistic(self, view: View) -> Float[Array, "batch"]:
        """What `allocate` is to know of this layer, under `allocates`; by default that all are alike."""
        return view.xp.zeros_like(view.seen, dtype=view.xp.float32)

    def allocate(
        self,
        statistics: Float[np.ndarray, "layers batch"],
        budgets: Int[np.ndarray, "layers batch"],
        seen: Int[np.ndarray, "batch"],
    ) -> Int[np.ndarray, "layers batch"]:
        """Tokens per head of each layer and row, under `allocates`; NumPy in and out."""
        return budgets

    def merge(self, view: View, index: Int[Array, "batch kv_heads kept"]) -> "Merged":
        """Keys and values of the slots that `index` keeps (-1: none), with the others blended in, under `merges`; and
        the arrays of `head_memory` that this changes, by name. By default they stay as they are."""
        return take_slots(view.xp, view.keys, index), take_slots(view.xp, view.values, index), {}

    def passes(self, prompt: Sequence[int], encode: Callable[[str], list[int]]) -> list[list[int]]:
        """Token lists that are read, one after the other, behind a prompt before it is evicted, and then forgotten:
        they reach only `stream` and `note`, in the phase "pass". Under `needs.gradients` each list is also run backward
        once."""
        return []

    @classmethod
    def examples(cls) -> list["Policy"]:
        """Small instances that every contract and equivalence test runs by itself."""
        return [cls(budget=9)]


Merged = tuple[
    Float[Array, "batch kv_heads kept head_dim"],
    Float[Array, "batch kv_heads kept head_dim"],
    Mapping[str, Float[Array, "batch kv_heads *rest"]],
]

policies = Registry(kind="policy", package="framework.policies", base=Policy)


def name(policy: Policy) -> str:
    """The policy in the one spelling, as `policies.make` reads it back."""
    return policies.spelling(policy)


def _turned(xp: Namespace, x: Array, cos: Array, sin: Array) -> Array:
    """Channel i turned with channel i + half."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return xp.concat([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def attends(query: Int[Array, "*query"], key: Int[Array, "*key"], window: int | None) -> Bool[Array, "*both"]:
    """True where the query at one position may attend to the key at another. -1, an empty place, never takes part."""
    seen = (key >= 0) & (key <= query)
    return seen if window is None else seen & (key > query - window)
