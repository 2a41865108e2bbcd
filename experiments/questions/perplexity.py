"""Perplexity of held-out text whose beginning was compressed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experiments.held import held_by
from experiments.question import Answer, Measure, Setting
from experiments.reading import Reading, log_probabilities


@dataclass(frozen=True, kw_only=True)
class Perplexity(Reading):
    """Of the given tokens after the first, whose logits come before anything is evicted."""

    measures = (Measure("perplexity", "lower"), Measure("nats", "lower", "nats per token"))

    least = 2

    def ask(self, setting: Setting, seeds: Sequence[int]) -> list[Answer]:
        passages = self.passages(setting.model, seeds)
        steps, rows = passages.given.shape[1], np.arange(len(seeds))
        nats = np.zeros((len(seeds), steps - 1))
        for number, (logits, cache) in enumerate(self.along(setting, passages)):
            if number == 0:
                held = held_by(setting.model, cache, [self.prompt] * len(seeds))
            elif number < steps:
                nats[:, number - 1] = -log_probabilities(logits)[rows, passages.given[:, number]]
        means = nats.mean(1).tolist()
        return [
            Answer(seed, {"perplexity": float(np.exp(mean)), "nats": mean}, each)
            for seed, mean, each in zip(seeds, means, held, strict=True)
        ]
