"""How fast one sequence is read and continued, in this process, with whatever else the machine does."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from experiments.held import held_by
from experiments.question import Answer, Measure, Setting
from experiments.reading import Reading, compressed
from framework.decode import Sampling

PIECE = 8  # tokens between two readings of the clock


@dataclass(frozen=True, kw_only=True)
class Speed(Reading):
    """The context is read twice and timed the second time, its compression included. Then the rest of `length` is
    written greedily, in pieces of 8; the first piece warms up, and the rate is that of the median piece."""

    measures = (Measure("rate", "higher", "tokens per second"), Measure("prompt", "lower", "seconds"))
    seeded: ClassVar[bool] = False

    least = 2 * PIECE

    def ask(self, setting: Setting, seeds: Sequence[int]) -> list[Answer]:
        model, pieces = setting.model, (self.length - self.prompt) // PIECE
        [context] = self.passages(model, seeds[:1]).contexts
        for _ in range(2):
            begun = time.perf_counter()
            cache, logits = compressed(setting, [context], pieces * PIECE, self.prompt)
            prompt = time.perf_counter() - begun
        [held] = held_by(model, cache, [self.prompt])
        seconds = []
        for number in range(pieces):
            begun = time.perf_counter()
            _, logits, cache = model.decode(cache, logits, Sampling(), (), PIECE, first=number * PIECE)
            seconds.append(time.perf_counter() - begun)
        rate = PIECE / float(np.median(seconds[1:]))
        return [Answer(seed, {"rate": rate, "prompt": prompt}, held) for seed in seeds]
