"""Multi-query associative recall (Zoology, arXiv 2312.04927), as text: pairs of letters, then some of them asked for.

Zoology draws token ids: the pairs first, and queries at gaps in noise. Here a pair is a line "key: value" of a few
letters each, so that any tokenizer can read it; lines of noise, which have no colon, stand between the pairs; and the
queries come when the context has been compressed, one a turn.
"""

from dataclasses import dataclass

import numpy as np

from experiments.recall import Case, Recall, Turn
from experiments.words import letters
from framework.errors import KvtwinError


@dataclass(frozen=True, kw_only=True)
class MQAR(Recall):
    """`pairs` keys with their values, of which `queries` are asked for, `width` letters each."""

    pairs: int = 8
    queries: int = 1
    width: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.queries <= self.pairs or self.width < 2:
            raise KvtwinError(
                f"pairs={self.pairs}, queries={self.queries}, width={self.width}; "
                "expected 1 query or more, at least as many pairs, and words of 2 letters or more"
            )

    def case(self, random: np.random.Generator, size: int) -> Case:
        drawn = letters(random, 2 * self.pairs, self.width)
        keys, values = drawn[: self.pairs], drawn[self.pairs :]
        asked = random.choice(self.pairs, self.queries, replace=False)
        after = np.sort(random.random(self.pairs))
        noise = [" ".join(letters(random, 3, self.width)) for _ in range(size)]
        lines, used = [], 0
        for key, value, place in zip(keys, values, after, strict=True):
            until = int(place * (size + 1))
            lines += [*noise[used:until], f"{key}: {value}"]
            used = until
        turns = tuple(Turn(f"{keys[one]}:", (values[one],)) for one in asked)
        return Case("\n".join([*lines, *noise[used:]]) + "\n", turns)
