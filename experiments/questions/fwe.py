"""Frequent words: the three most frequent of coded words, whose counts fall as a power (RULER, arXiv 2404.06654).

RULER's rules: length // 50 coded words of six letters; of n words in all, rank k comes int(n k^-2 / zeta(2)) times; the
first rank is noise, written "..."; the answer are ranks 2 to 4; the text is shuffled with the seed 42.

Deviation: n is lowered to where the fourth rank comes more often than the fifth, as the answer would be arbitrary
otherwise; this matters only for short texts. At 512 bytes there is room for little more than the answer.
"""

from dataclasses import dataclass
from random import Random

import numpy as np

from experiments.recall import Case, Recall, Turn
from experiments.words import letters

SEED = 42
NOISE = "..."
ZETA = np.pi**2 / 6  # zeta(2)
LEAST = 27  # words in all, from which the fourth rank comes at all
ASKED = (
    "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
    "appeared words in the above coded text? "
    "Answer: According to the coded text above, the three most frequently appeared words are:"
)


@dataclass(frozen=True, kw_only=True)
class FrequentWords(Recall):
    """`length`: tokens of the whole case, which also sets the number of different words."""

    def case(self, random: np.random.Generator, size: int) -> Case:
        ranked = [NOISE, *letters(random, max(self.length // 50, 5) - 1, 6)]
        counts = _counts(LEAST + size, len(ranked))
        text = [word for word, count in zip(ranked, counts, strict=True) for _ in range(count)]
        Random(SEED).shuffle(text)
        context = (
            "Read the following coded text and track the frequency of each coded word. "
            f"Find the three most frequently appeared coded words. {' '.join(text)}\n"
        )
        return Case(context, (Turn(ASKED, tuple(ranked[1:4])),))


def _counts(total: int, ranks: int) -> list[int]:
    """How often each rank comes, of at most `total` words."""
    ranked = np.arange(1, ranks + 1, dtype=np.float64)
    while True:
        counts = (total * ranked**-2 / ZETA).astype(int).tolist()
        if counts[3] > counts[4]:
            return counts
        total -= 1
