"""Needles in a haystack: the eight retrieval tasks of RULER (arXiv 2404.06654).

A needle says "One of the special magic numbers for {key} is: {value}." The haystack is `noise` (the same sentences
again and again), `text` (held-out source text, in place of RULER's essays), or `needles` (others, with keys that are
not asked for). RULER's names are these settings:

    single_1     niah()
    single_2     niah(haystack='text')
    single_3     niah(haystack='text', values_are='uuids')
    multikey_1   niah(haystack='text', keys=4)
    multikey_2   niah(haystack='needles')
    multikey_3   niah(haystack='needles', keys_are='uuids', values_are='uuids')
    multivalue   niah(haystack='text', values=4)
    multiquery   niah(haystack='text', keys=4, queries=4)

Deviations: RULER's answer begins with "The special magic number for {key} mentioned in the provided text is". Here it
begins as the needle does, so that models that only continue a text can answer, and several keys are asked for in as
many turns.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from experiments.recall import Case, Recall, Turn
from experiments.text import lines
from experiments.words import noise, numbers, pairs_of_words, uuids
from framework.errors import KvtwinError

Kind = Literal["numbers", "words", "uuids"]
MADE: dict[str, Callable[[np.random.Generator, int], list[str]]] = {
    "numbers": numbers,
    "words": pairs_of_words,
    "uuids": uuids,
}


@dataclass(frozen=True, kw_only=True)
class Niah(Recall):
    """`keys` needles, each with `values` values, of which `queries` keys are asked for in as many turns."""

    haystack: Literal["noise", "text", "needles"] = "noise"
    keys: int = 1
    values: int = 1
    queries: int = 1
    keys_are: Kind = "words"
    values_are: Kind = "numbers"

    def __post_init__(self) -> None:
        if self.haystack not in ("noise", "text", "needles") or not {self.keys_are, self.values_are} <= {
            *MADE
        }:
            raise KvtwinError(
                f"haystack={self.haystack!r}, keys_are={self.keys_are!r}, values_are={self.values_are!r}; expected a "
                f"haystack of noise, text or needles, and keys and values that are {', '.join(MADE)}"
            )
        if not 1 <= self.queries <= self.keys or self.values < 1:
            raise KvtwinError(
                f"keys={self.keys}, values={self.values}, queries={self.queries}; "
                f"expected 1 to {self.keys} queries and at least one value"
            )

    def case(self, random: np.random.Generator, size: int) -> Case:
        keys = MADE[self.keys_are](random, self.keys)
        values = MADE[self.values_are](random, self.keys * self.values)
        asked = random.choice(self.keys, self.queries, replace=False)
        needles = [self._needle(keys[number // self.values], value) for number, value in enumerate(values)]
        order, places = random.permutation(len(needles)), np.sort(random.random(len(needles)))
        hay, text, used = self._hay(random, size, keys), [], 0
        for number, place in zip(order, places, strict=True):
            until = int(place * (size + 1))
            text += [*hay[used:until], needles[number]]
            used = until
        turns = []
        for one in asked:
            wanted = [values[number] for number in order if number // self.values == one]
            begin = f"The special magic {self.values_are} for {keys[one]} are:"
            single = f"One of the special magic {self.values_are} for {keys[one]} is:"
            turns.append(Turn(begin if self.values > 1 else single, tuple(wanted), ", "))
        return Case("\n".join([*text, *hay[used:]]) + "\n", tuple(turns))

    def _needle(self, key: str, value: str) -> str:
        return f"One of the special magic {self.values_are} for {key} is: {value}."

    def _hay(self, random: np.random.Generator, size: int, taken: Sequence[str]) -> list[str]:
        if self.haystack == "text":
            return lines(random, size)
        if self.haystack == "noise":
            return noise(size)
        keys, values = (MADE[kind](random, size) for kind in (self.keys_are, self.values_are))
        # A needle of the haystack with a key that is asked for would be another answer.
        while clashes := [number for number, key in enumerate(keys) if key in taken]:
            for number in clashes:
                [keys[number]] = MADE[self.keys_are](random, 1)
        return [self._needle(key, value) for key, value in zip(keys, values, strict=True)]
