"""System instructions: rules at the beginning, text of a user behind them, then two of the rules are asked for.

Compression makes some instructions vanish before others (arXiv 2510.00231). So one rule of the first half of the list
is asked for and one of the second, in random order, in two turns on one compressed context, and each half has its own
measure.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experiments.question import Measure
from experiments.recall import Case, Recall, Turn
from experiments.text import lines
from experiments.words import pairs_of_words
from framework.errors import KvtwinError


@dataclass(frozen=True, kw_only=True)
class Instructions(Recall):
    """`rules` rules, each "Rule 1: always answer apple-river."; an odd one in the middle belongs to the second half."""

    measures = (
        Measure("score", "higher", "share of answers"),
        Measure("first_half", "higher", "share of answers"),
        Measure("second_half", "higher", "share of answers"),
    )

    rules: int = 6

    def __post_init__(self) -> None:
        if self.rules < 2:
            raise KvtwinError(f"rules={self.rules}; expected at least 2, one for each half")

    def case(self, random: np.random.Generator, size: int) -> Case:
        answers = pairs_of_words(random, self.rules)
        half = self.rules // 2
        asked = [int(random.integers(half)), int(random.integers(half, self.rules))]
        if random.random() < 0.5:
            asked.reverse()
        stated = [f"Rule {number}: always answer {answer}." for number, answer in enumerate(answers, 1)]
        turns = [
            Turn(f"What is rule {one + 1}? Rule {one + 1}: always answer", (answers[one],)) for one in asked
        ]
        return Case("\n".join([*stated, *lines(random, size)]) + "\n", tuple(turns))

    def marks(self, case: Case, scores: Sequence[float]) -> dict[str, float]:
        places = [case.context.index(f"always answer {turn.answers[0]}.") for turn in case.turns]
        (_, first), (_, second) = sorted(zip(places, scores, strict=True))
        return {"score": float(np.mean(scores)), "first_half": first, "second_half": second}
