"""The attention that a policy loses on held-out text, beside two oracles that see the future (`experiments/regret.py`).

All are means over the given tokens, the heads, and the layers that evict; where none does, nothing is lost.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from experiments.held import held_by
from experiments.question import Answer, Held, Measure, Setting
from experiments.reading import Reading, holds
from experiments.regret import Attention, attended, mass, oracle_future, oracle_step
from framework.backend import Model


@dataclass(frozen=True, kw_only=True)
class RegretOf(Reading):
    """`mass` of the policy, of the oracle that never takes back (`future`) and of the one that chooses anew at each
    query (`step`), with as many tokens per head; `regret` is `future` - `mass`."""

    measures = (
        Measure("regret", "lower", "share of attention"),
        Measure("mass", "higher", "share of attention"),
        Measure("future", None, "share of attention"),
        Measure("step", None, "share of attention"),
    )

    def ask(self, setting: Setting, seeds: Sequence[int]) -> list[Answer]:
        model, passages = setting.model, self.passages(setting.model, seeds)
        held: list[Held] = []
        evicting, kept = [], []
        for _, cache in self.along(setting, passages):
            if not held:
                held = held_by(model, cache, [self.prompt] * len(seeds))
                evicting = [
                    index for index in range(len(model.spec.layers)) if cache.limit(index) is not None
                ]
            kept.append(cache.kept)
        full = setting.once(
            (RegretOf, "attention", model, self.length, self.prompt, tuple(seeds)),
            partial(attention, model, passages.texts, self.prompt),
        )
        answers = []
        for row, seed in enumerate(seeds):
            means = [(1.0, 1.0, 1.0)]
            if evicting:
                means = [
                    self._masses(full[index][row], [one[index][row] for one in kept[:-1]])
                    for index in evicting
                ]
            policy, future, step = np.mean(means, axis=0).tolist()
            measures = {"regret": future - policy, "mass": policy, "future": future, "step": step}
            answers.append(Answer(seed, measures, held[row]))
        return answers

    def _masses(self, full: Attention, kept: Sequence[np.ndarray]) -> tuple[float, float, float]:
        """The mean mass of one layer: of the policy and of both oracles with as many tokens."""
        own = np.stack([holds(one[None], self.length)[0] for one in kept], axis=1)
        counts = own.sum(-1)
        sets = (
            own,
            oracle_future(full, counts, self.prompt),
            oracle_step(full, counts, self.prompt),
        )
        policy, future, step = (float(mass(full, one, self.prompt).mean()) for one in sets)
        return policy, future, step


def attention(model: Model, texts: np.ndarray, prompt: int) -> list[np.ndarray]:
    """What the given tokens give to each token under the full cache, [batch kv_heads queries tokens] for each layer."""
    return [weights.mean(2) for weights, _ in attended(model, texts, prompt)]
