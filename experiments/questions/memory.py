"""The memory that a cache takes, measured on its arrays, beside what the formula says."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from experiments.held import ITEMSIZE, held_by
from experiments.question import Answer, Measure, Question, Setting
from experiments.reading import compressed, stretches
from framework.codec import codecs
from framework.footprint import footprint
from framework.policy import policies


@dataclass(frozen=True, kw_only=True)
class Memory(Question):
    """Of one sequence of `length` tokens, once it is compressed: `bytes` of all arrays, `payload` of the kept keys and
    values with their scales, and the `footprint` of these by `framework/footprint.py`."""

    measures = (
        Measure("bytes", "lower", "bytes"),
        Measure("payload", "lower", "bytes"),
        Measure("footprint", "lower", "bytes"),
    )
    seeded: ClassVar[bool] = False

    length: int = 512

    def ask(self, setting: Setting, seeds: Sequence[int]) -> list[Answer]:
        model = setting.model
        texts = stretches(model, seeds, self.length)
        cache, _ = compressed(setting, texts, 0, self.length)
        policy, codec = policies.make(setting.policy), codecs.make(setting.codec)
        said = footprint(model.spec, policy, codec, self.length, ITEMSIZE[model.dtype])
        return [
            Answer(
                seed,
                {"bytes": float(held.allocated), "payload": float(held.payload), "footprint": said.kv},
                held,
            )
            for seed, held in zip(seeds, held_by(model, cache, [self.length] * len(seeds)), strict=True)
        ]
