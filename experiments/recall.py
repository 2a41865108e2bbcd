"""Questions that ask for something of a context: the context is compressed, then it is asked for, and scored by RULER's
rule: the share of the answers that occur in what the model writes.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar
from zlib import crc32

import numpy as np

from experiments.held import held_by
from experiments.question import Answer, Measure, Question, Setting
from experiments.reading import check_length, compressed, followed
from framework.backend import Model
from framework.cache import Cache
from framework.decode import Sampling
from framework.errors import KvtwinError
from framework.tokenizer import Tokenizer

ROOM = 8  # the tokens to write are counted in steps of so many


@dataclass(frozen=True)
class Turn:
    """What is asked, up to where the answer begins, and what must all come in the answer, in the order asked for. An
    answer ends with its line.

    `numbered`: a model that knows the answer would write "1. " before the first, and so on.
    """

    text: str
    answers: tuple[str, ...]
    joint: str = " "
    numbered: bool = False

    @property
    def wanted(self) -> str:
        """The answer as a model that knows it would write it."""
        each = [f"{number}. {answer}" for number, answer in enumerate(self.answers, 1)]
        return " " + self.joint.join(each if self.numbered else self.answers)


@dataclass(frozen=True)
class Case:
    """One context, which ends with a line, and the turns that follow it in one conversation."""

    context: str
    turns: tuple[Turn, ...]


@dataclass(frozen=True, kw_only=True)
class Recall(Question):
    """A context of `length` tokens with all that follows it. `aware`: the policy sees the first question before it
    compresses the context. `room`: tokens to write at each turn (None: those of the longest answer, and a few more).
    """

    measures: ClassVar[tuple[Measure, ...]] = (Measure("score", "higher", "share of answers"),)

    length: int = 512
    aware: bool = False
    room: int | None = None

    @abstractmethod
    def case(self, random: np.random.Generator, size: int) -> Case:
        """A case with `size` units of filler, from 0 on; the same `random` gives the same one."""

    def marks(self, case: Case, scores: Sequence[float]) -> dict[str, float]:
        """The measures, from the scores of the turns."""
        return {"score": float(np.mean(scores))}

    def draw(self, tokenizer: Tokenizer, seed: int) -> Case:
        """The case with as much filler as fits into `length` tokens."""
        name = crc32(type(self).__module__.encode())

        def drawn(size: int) -> Case:
            return self.case(np.random.default_rng([seed, name]), size)

        return fitted(drawn, lambda case: tokens_of(tokenizer, case), self.length)

    def ask(self, setting: Setting, seeds: Sequence[int]) -> list[Answer]:
        """Read the contexts as one batch, compress, then ask turn by turn on the same cache."""
        model, tokenizer = setting.model, setting.model.tokenizer
        self._check(model)
        cases = [
            setting.once((self, model, "case", seed), partial(self.draw, tokenizer, seed)) for seed in seeds
        ]
        contexts = [tokenizer.encode(case.context) for case in cases]
        turns = list(zip(*(case.turns for case in cases), strict=True))
        room = self.room or _room(tokenizer, [turn for each in turns for turn in each])
        asked = [[tokenizer.encode(turn.text, opening=False) for turn in each] for each in turns]
        following = sum(max(map(len, each)) + room for each in asked)
        first = asked[0] if self.aware else None
        cache, logits = compressed(setting, contexts, following, self.length, first)
        lengths = [
            len(row) + len(question)
            for row, question in zip(contexts, first or [[]] * len(contexts), strict=True)
        ]
        held = held_by(model, cache, lengths)
        said = []
        for number, questions in enumerate(asked):
            if number or not self.aware:
                cache, logits = followed(model, questions, cache)
            new, cache = written(model, cache, logits, room)
            said.append([tokenizer.decode(row) for row in new])
        return [
            Answer(
                seed,
                self.marks(case, [found(turn, one[row]) for turn, one in zip(case.turns, said, strict=True)]),
                held[row],
                "\n".join(one[row] for one in said),
                "\n".join(turn.wanted for turn in case.turns),
            )
            for row, (seed, case) in enumerate(zip(seeds, cases, strict=True))
        ]

    def _check(self, model: Model) -> None:
        check_length(model.spec, self.length)
        if self.room is not None and self.room < 1:
            raise KvtwinError(f"room={self.room}; expected at least 1 token to write, or None")


def found(turn: Turn, said: str) -> float:
    """The share of the answers that occur in what was said, in any case of letters: RULER's `string_match_all`."""
    return float(np.mean([answer.lower() in said.lower() for answer in turn.answers]))


def fitted(drawn: Callable[[int], Case], tokens: Callable[[Case], int], length: int) -> Case:
    """The largest case of at most `length` tokens; raises where even one without filler has more."""
    least = drawn(0)
    if tokens(least) > length:
        raise KvtwinError(
            f"a case without filler has {tokens(least)} tokens; expected at most length={length}, so give a longer one"
        )
    low, high = 0, 1
    while tokens(drawn(high)) <= length:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if tokens(drawn(middle)) <= length else (low, middle)
    return drawn(low)


def tokens_of(tokenizer: Tokenizer, case: Case) -> int:
    """Tokens of the context, of the turns and of their answers."""
    following = [part for turn in case.turns for part in (turn.text, turn.wanted + "\n")]
    return len(tokenizer.encode(case.context)) + sum(
        len(tokenizer.encode(part, opening=False)) for part in following
    )


def written(model: Model, cache: Cache, logits: np.ndarray, room: int) -> tuple[list[list[int]], Cache]:
    """What the model writes greedily, up to `room` tokens; a row ends with its line, or a stop token, left out here."""
    line = model.tokenizer.encode("\n", opening=False)
    stop = [*model.spec.stop, *(line if len(line) == 1 else [])]
    new, _, cache = model.decode(cache, logits, Sampling(), stop, room)
    return [[int(token) for token in row if token >= 0 and token not in stop] for row in new], cache


def _room(tokenizer: Tokenizer, turns: Sequence[Turn]) -> int:
    longest = max(len(tokenizer.encode(turn.wanted, opening=False)) for turn in turns)
    return -(-(longest + 2) // ROOM) * ROOM
