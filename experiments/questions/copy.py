"""Copying: random words of letters, of which the beginning is given again; the rest is to come in the same order."""

from dataclasses import dataclass

import numpy as np

from experiments.recall import Case, Recall, Turn
from experiments.words import letters
from framework.errors import KvtwinError


@dataclass(frozen=True, kw_only=True)
class Copy(Recall):
    """`words` words of `width` letters are asked for, behind `given` that begin a random place of the context."""

    words: int = 4
    given: int = 2
    width: int = 4

    def __post_init__(self) -> None:
        if min(self.words, self.given) < 1 or self.width < 2:
            raise KvtwinError(
                f"words={self.words}, given={self.given}, width={self.width}; "
                "expected at least one word to come and one given, of 2 letters or more"
            )

    def case(self, random: np.random.Generator, size: int) -> Case:
        every = letters(random, self.given + self.words + size, self.width)
        begin = int(random.integers(size + 1))
        cue, wanted = every[begin:][: self.given], every[begin + self.given :][: self.words]
        return Case(" ".join(every) + "\n", (Turn(" ".join(cue), tuple(wanted)),))
