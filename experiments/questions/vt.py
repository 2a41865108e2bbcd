"""Variable tracking: the chain of assignments of RULER (arXiv 2404.06654).

`VAR X = 12345`, then `VAR Y = VAR X` for each hop, in order, in noise; asked for are the names of all variables that
hold the number. Variables are five upper-case letters. Deviation: without RULER's example in front.
"""

from dataclasses import dataclass

import numpy as np

from experiments.recall import Case, Recall, Turn
from experiments.words import letters, noise
from framework.errors import KvtwinError


@dataclass(frozen=True, kw_only=True)
class VariableTracking(Recall):
    """`chains` of `hops` assignments each; the first chain is asked for."""

    chains: int = 1
    hops: int = 4

    def __post_init__(self) -> None:
        if self.chains < 1 or self.hops < 0:
            raise KvtwinError(
                f"chains={self.chains}, hops={self.hops}; expected at least one chain, of 0 hops or more"
            )

    def case(self, random: np.random.Generator, size: int) -> Case:
        names = [name.upper() for name in letters(random, self.chains * (self.hops + 1), 5)]
        values = random.choice(np.arange(10_000, 100_000), self.chains, replace=False)
        chains = np.array(names).reshape(self.chains, self.hops + 1)
        steps = [
            (place, f"VAR {chain[hop]} = " + (f"VAR {chain[hop - 1]}" if hop else str(value)))
            for chain, value in zip(chains, values, strict=True)
            for hop, place in enumerate(np.sort(random.random(self.hops + 1)))
        ]
        text, used = [], 0
        for place, step in sorted(steps):
            until = int(place * (size + 1))
            text += [*noise(until - used, used), step]
            used = until
        question = (
            f"Question: Find all variables that are assigned the value {values[0]} in the text above. "
            f"Answer: the variables that are assigned the value {values[0]} are:"
        )
        return Case(
            "\n".join([*text, *noise(size - used, used)]) + "\n", (Turn(question, tuple(chains[0].tolist())),)
        )
