"""Several turns on one compressed context: key-value pairs as in `mqar`, asked for one after the other (SCBench,
arXiv 2412.10319).

The context is compressed once. With `aware=True` the policy sees the first question only, and what it dropped for that
is missing in the later turns: compare `first` with `last`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experiments.question import Measure
from experiments.questions.mqar import MQAR
from experiments.recall import Case


@dataclass(frozen=True, kw_only=True)
class Turns(MQAR):
    """`queries` of `pairs` pairs are asked for, one a turn."""

    measures = (
        Measure("score", "higher", "share of answers"),
        Measure("first", "higher", "share of answers"),
        Measure("last", "higher", "share of answers"),
    )

    queries: int = 4

    def marks(self, case: Case, scores: Sequence[float]) -> dict[str, float]:
        return {"score": float(np.mean(scores)), "first": scores[0], "last": scores[-1]}
