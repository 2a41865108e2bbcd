"""Common words: which words of a long list come most often (RULER, arXiv 2404.06654).

RULER's rules: 10 common words come 30 times each and the other words 3 times, from 4,096 tokens on, else 6 times and
once; the list is shuffled with the seed 42, the same for every case, and numbered: "1. word 2. word". An example with
its answer stands in front: 40 words, 10 and 3 times, or 20 words, 3 times and once.

Deviations: words are adjectives and nouns of `experiments/words.py`, with pairs of them among the others where a list
needs more than there are; the other words are the filler, as many as fit. The shortest case has 60 entries beside the
example, which are about 1,700 bytes: byte-level models are asked for fewer words, as in cwe(words=3, example=False).
"""

from dataclasses import dataclass
from random import Random

import numpy as np

from experiments.recall import Case, Recall, Turn
from experiments.words import plain_words
from framework.errors import KvtwinError

SEED = 42  # of the order of every list
TASK = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often."
)
LONG = 4096  # tokens from which RULER repeats more


@dataclass(frozen=True, kw_only=True)
class CommonWords(Recall):
    """`words` common words are asked for; `example`: whether RULER's example comes first."""

    words: int = 10
    example: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.words <= 20:
            raise KvtwinError(f"words={self.words}; expected 1 to 20 common words")

    def case(self, random: np.random.Generator, size: int) -> Case:
        long = self.length >= LONG
        front = ""
        if self.example:
            text, common = self._list(
                random, (40 if long else 20) - self.words, *((10, 3) if long else (3, 1))
            )
            front = f"{TASK}\n{text}\n{self._asked}{Turn('', common, numbered=True).wanted}\n"
        text, common = self._list(random, size, *((30, 3) if long else (6, 1)))
        return Case(f"{front}{TASK}\n{text}\n", (Turn(self._asked, common, numbered=True),))

    @property
    def _asked(self) -> str:
        return (
            f"Question: What are the {self.words} most common words in the above list? "
            f"Answer: The top {self.words} words that appear most often in the list are:"
        )

    def _list(
        self, random: np.random.Generator, others: int, often: int, seldom: int
    ) -> tuple[str, tuple[str, ...]]:
        """A list, as text, and its common words."""
        drawn = plain_words(random, self.words + others)
        common, rare = drawn[: self.words], drawn[self.words :]
        every = common * often + rare * seldom
        Random(SEED).shuffle(every)
        return " ".join(f"{number}. {word}" for number, word in enumerate(every, 1)), tuple(common)
