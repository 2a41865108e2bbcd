"""Reading for questions: contexts compressed as one batch, and held-out text given after them token by token."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar
from zlib import crc32

import numpy as np
from jaxtyping import Bool, Float, Int

from experiments.compare import prompted
from experiments.question import Question, Setting
from experiments.text import held_out
from framework.backend import Model
from framework.cache import Cache
from framework.errors import KvtwinError
from framework.eviction import resolved
from framework.policy import policies
from framework.shapes import EMPTY, bucket
from framework.spec import ModelSpec
from framework.tokenizer import Tokenizer

GIVEN = 64  # tokens given one by one, where nothing else is said
COLUMNS = 64  # questions are padded to a multiple of this, so that few widths are compiled


def compressed(
    setting: Setting,
    contexts: Sequence[list[int]],
    following: int,
    columns: int,
    questions: Sequence[list[int]] | None = None,
) -> tuple[Cache, Float[np.ndarray, "batch vocab"]]:
    """A cache that has read the contexts and evicted, with room for `following` tokens, and the logits after each row.

    `questions` are read with the contexts, and marked as what the policy is to keep them for. Rows are padded to
    `columns`, so that cells of one length share what is compiled.
    """
    asked = questions or [[]] * len(contexts)
    rows = [context + question for context, question in zip(contexts, asked, strict=True)]
    held = empty(setting, rows, following)
    if questions:
        held.mark([len(context) for context in contexts])
    logits, held = prompted(setting.model, padded(rows, columns), held)
    return held, logits[:, 0]


def empty(setting: Setting, rows: Sequence[list[int]], following: int) -> Cache:
    """A cache for these rows and `following` tokens more; a fraction is one of the longest row."""
    longest = max(map(len, rows))
    policy = resolved(policies.make(setting.policy), longest)
    room = bucket(longest + following)
    return setting.model.cache(policy, setting.codec, len(rows), capacity=room, length=room)


def followed(
    model: Model, rows: Sequence[list[int]], held: Cache
) -> tuple[Cache, Float[np.ndarray, "batch vocab"]]:
    """The cache after the next turn of a conversation, a call of decode, and the logits after each row."""
    wide = max(map(len, rows))
    logits, held = model.step(padded(rows, -(-wide // COLUMNS) * COLUMNS), held, phase="decode")
    return held, logits[:, 0]


def padded(rows: Sequence[list[int]], columns: int) -> Int[np.ndarray, "batch tokens"]:
    """Rows of ids as one array of at least so many columns, -1 on the right."""
    wide = max(columns, *map(len, rows))
    return np.array([row + [EMPTY] * (wide - len(row)) for row in rows], np.int32)


def check_length(spec: ModelSpec, length: int) -> None:
    """Raises where the model was not made for so many tokens."""
    if length > spec.positions:
        raise KvtwinError(
            f"length={length}; expected at most {spec.positions}, the positions that this model was made for"
        )


@dataclass(frozen=True)
class Passages:
    """Stretches of the held-out text, one a row: what is compressed, and what is then given, [batch, given]."""

    contexts: list[list[int]]
    given: Int[np.ndarray, "batch given"]

    @property
    def texts(self) -> Int[np.ndarray, "batch tokens"]:
        """The whole of each."""
        return np.concatenate([np.array(self.contexts, np.int32), self.given], axis=1)


@dataclass(frozen=True, kw_only=True)
class Reading(Question):
    """`length` tokens of held-out text, from a place that the seed chooses, of which the first `context` are compressed
    (None: all but the last 64) and the others given one by one, with an eviction after each. The tokenizer's opening
    token, where it has one, begins the context.
    """

    length: int = 512
    context: int | None = None

    least: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not 0 < self.prompt <= self.length - self.least:
            raise KvtwinError(
                f"length={self.length}, context={self.context}; expected a context of at least one token, and at least "
                f"{self.least} more (without context, a length above {GIVEN})"
            )

    @property
    def prompt(self) -> int:
        """Tokens of the context."""
        return self.length - GIVEN if self.context is None else self.context

    def passages(self, model: Model, seeds: Sequence[int]) -> Passages:
        """What is read under every policy; the same seed gives all questions of one length the same place."""
        texts = stretches(model, seeds, self.length)
        given = np.array([text[self.prompt :] for text in texts], np.int32)
        return Passages([text[: self.prompt] for text in texts], given)

    def along(
        self, setting: Setting, passages: Passages, more: int = 0
    ) -> Iterator[tuple[Float[np.ndarray, "batch vocab"], Cache]]:
        """The logits and the cache after the contexts, and after each given token. The next one consumes the cache,
        which has room for `more` tokens."""
        steps = passages.given.shape[1]
        held, logits = compressed(setting, passages.contexts, steps + more, self.length)
        yield logits, held
        for step in range(steps):
            out, held = setting.model.step(passages.given[:, step : step + 1], held)
            yield out[:, 0], held

    def whole(self, setting: Setting, seeds: Sequence[int]) -> Float[np.ndarray, "given batch vocab"]:
        """The logits after each given token under the full cache, made once in a process."""

        def read() -> np.ndarray:
            exact = replace(setting, policy="full()", codec="full()")
            return np.stack(
                [logits for logits, _ in self.along(exact, self.passages(setting.model, seeds))][1:]
            )

        key = (Reading, "logits", setting.model, self.length, self.prompt, tuple(seeds))
        logits: np.ndarray = setting.once(key, read)
        return logits


def stretches(model: Model, seeds: Sequence[int], length: int) -> list[list[int]]:
    """Held-out text of `length` tokens from a place that each seed chooses, the opening token included."""
    check_length(model.spec, length)
    opening, tokens = _encoded(model.tokenizer)
    own = length - len(opening)
    places = len(tokens) - own + 1
    if own < 1 or places < 1:
        raise KvtwinError(
            f"length={length}; expected {len(opening) + 1} to {len(opening) + len(tokens)}, "
            "the tokens of the held-out text"
        )
    name = crc32(__name__.encode())
    starts = [int(np.random.default_rng([seed, name]).integers(places)) for seed in seeds]
    return [[*opening, *tokens[start : start + own]] for start in starts]


@cache
def _encoded(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The opening tokens, and the held-out text without them."""
    text = held_out()
    first, bare = tokenizer.encode(text[:1]), tokenizer.encode(text[:1], opening=False)
    return first[: first.index(bare[0])], tokenizer.encode(text, opening=False)


def log_probabilities(logits: Float[np.ndarray, "*axes vocab"]) -> Float[np.ndarray, "*axes vocab"]:
    """In float64."""
    wide = logits.astype(np.float64)
    wide = wide - wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def holds(
    kept: Int[np.ndarray, "batch kv_heads kept"], tokens: int
) -> Bool[np.ndarray, "batch kv_heads tokens"]:
    """True for the positions below `tokens` that are kept."""
    mask = np.zeros((*kept.shape[:2], tokens + 1), bool)
    np.put_along_axis(mask, np.where(kept < 0, tokens, kept), True, axis=-1)
    return mask[..., :tokens]
