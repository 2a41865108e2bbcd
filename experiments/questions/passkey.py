"""One number in a long text: the passkey task of Landmark Attention (arXiv 2305.16300), as Quest asks it.

Garbage, "The pass key is N. Remember it. N is the pass key.", garbage; then "What is the pass key? The pass key is". N
is one of 1 to 50,000, and the garbage before it is a random share of the whole.
"""

from dataclasses import dataclass

import numpy as np

from experiments.recall import Case, Recall, Turn
from experiments.words import noise

TASK = "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it."


@dataclass(frozen=True, kw_only=True)
class Passkey(Recall):
    """`length`: tokens of the whole case."""

    def case(self, random: np.random.Generator, size: int) -> Case:
        number, share = str(random.integers(1, 50_001)), random.random()
        before = int(share * (size + 1))
        key = f"The pass key is {number}. Remember it. {number} is the pass key."
        lines = [TASK, *noise(before), key, *noise(size - before, before)]
        return Case("\n".join(lines) + "\n", (Turn("What is the pass key? The pass key is", (number,)),))
