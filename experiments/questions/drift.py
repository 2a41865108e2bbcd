"""The same cell on the other backend: flax beside torch, torch beside any other.

Flax reads freely. torch is led along its tokens with its kept sets forced, and what torch itself would have kept is
compared at every eviction, so that one swap excuses nothing later. A head whose set differs by tokens with scores equal
up to rounding counts as the same (`experiments/demo.py`). Then each reads freely once more and writes the last tokens
by itself: the same text, or one that parts where the two best logits lie within the drift.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from experiments.compare import prompted
from experiments.demo import swapped
from experiments.held import held_by
from experiments.question import Answer, Held, Measure, Setting
from experiments.reading import Passages, Reading, empty, padded
from framework.backend import Model
from framework.cache import Decision
from framework.compare import drift, token_agreement
from framework.policy import policies

WRITTEN = 16


@dataclass(frozen=True)
class Run:
    """What one backend did: logits after each given token, what was kept after the context and after each of them, and
    the tokens written, with the logits that they were chosen from; tokens first, then rows."""

    logits: np.ndarray
    kept: list[list[np.ndarray]]
    written: np.ndarray
    choices: np.ndarray
    held: list[Held]


@dataclass(frozen=True, kw_only=True)
class Drift(Reading):
    """`same`: share of heads and evictions with the same kept set. `drift`: of the logits after the given tokens.
    `text`: 1 where the last 16 tokens of `length`, which are not given but written, agree."""

    measures = (
        Measure("same", "higher", "share of heads"),
        Measure("drift", "lower", "relative"),
        Measure("text", "higher", "share of rows"),
    )

    least = WRITTEN + 1

    def ask(self, setting: Setting, seeds: Sequence[int]) -> list[Answer]:
        model, passages = setting.model, self.passages(setting.model, seeds)
        passages = replace(passages, given=passages.given[:, :-WRITTEN])
        on_torch = type(model).__module__.startswith("backends.torch")
        other = setting.other("flax" if on_torch else "torch")
        free = {each: self._free(replace(setting, model=each), passages) for each in (model, other)}
        led, lead = (model, other) if on_torch else (other, model)
        same, logits = self._led(replace(setting, model=led), passages, free[lead].kept)
        expected, found = free[lead], free[led]
        answers = []
        for row, seed in enumerate(seeds):
            far = drift(logits[:, row], expected.logits[:, row])
            agreement = token_agreement(
                found.written[None, :, row], expected.written[None, :, row], expected.choices[None, :, row]
            )
            measures = {"same": same[row], "drift": far, "text": float(agreement.within(2 * far))}
            answers.append(Answer(seed, measures, free[model].held[row]))
        return answers

    def _free(self, setting: Setting, passages: Passages) -> Run:
        """Read the given tokens, then go on by oneself."""
        model, logits, kept = setting.model, [], []
        held: list[Held] = []
        for out, cache in self.along(setting, passages, WRITTEN):
            held = held or held_by(model, cache, [self.prompt] * cache.batch)
            logits.append(out)
            kept.append(cache.kept)
        written, choices = [], []
        for _ in range(WRITTEN):
            choices.append(out)
            written.append(out.argmax(-1).astype(np.int32))
            wide, cache = model.step(written[-1][:, None], cache)
            out = wide[:, 0]
        return Run(np.array(logits[1:]), kept, np.array(written), np.array(choices), held)

    def _led(
        self, setting: Setting, passages: Passages, kept: Sequence[Sequence[np.ndarray]]
    ) -> tuple[list[float], np.ndarray]:
        """For each row the share of heads that would have kept the same, and the logits, led along the kept sets."""
        model, contexts = setting.model, passages.contexts
        evicts = policies.make(setting.policy).evicts
        cache = empty(setting, contexts, passages.given.shape[1] + WRITTEN)
        logits, same = [], []
        for call, sets in enumerate(kept):
            forced = [
                each for each, layer in zip(sets, model.spec.layers, strict=True) if evicts or layer.window
            ]
            own: list[Decision] = []
            out, cache = self._fed(model, passages, call, cache, forced, own)
            logits.append(out[:, 0])
            same += [agreeing(one, sets[one.layer]) for one in own]
        shares = np.concatenate(same, axis=1).mean(1) if same else np.ones(len(contexts))
        return shares.tolist(), np.array(logits[1:])

    def _fed(
        self,
        model: Model,
        passages: Passages,
        call: int,
        cache: Any,
        forced: list[np.ndarray],
        own: list[Decision],
    ) -> tuple[np.ndarray, Any]:
        """The contexts at the first call, then one given token at each."""
        if call:
            return model.step(passages.given[:, call - 1 : call], cache, forced=forced, decisions=own)
        return prompted(model, padded(passages.contexts, self.length), cache, forced=forced, decisions=own)


def agreeing(own: Decision, kept: np.ndarray) -> np.ndarray:
    """True for the rows and heads [batch, kv_heads] that keep the same, up to tokens whose scores are equal up to
    rounding."""
    result = np.zeros(kept.shape[:2], bool)
    arrays = [each.name for each in fields(Decision) if each.name != "layer"]
    for row, head in np.ndindex(result.shape):
        here = np.s_[row : row + 1, head : head + 1]
        one = replace(own, **{name: getattr(own, name)[here] for name in arrays})
        result[row, head] = swapped(one, kept[here])[1]
    return result
