"""How far the next tokens are from those of the full cache, on the same held-out text, and what attention lost.

Both read the same given tokens. `kl` is KL(full || policy) of the next token, the mean over the given tokens, as are
`top1` (the same most probable token) and `top5` (the share of the five most probable ones in common). `first` is the
first given token after which the greedy choice differs, or how many there are where none does.

`mass` is the attention of the full cache to tokens that the policy had evicted when the query came, the mean over
queries, heads and layers. `error` is what that does to the mixed values of a layer, |without - full| / |full|, if the
rest of its attention grows in proportion and nothing else changes: what a codec or a merge does shows in `kl` only.
`mass.0`, `error.0` and so on are those of single layers. Both are read at every 8th given token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Bool, Float

from experiments.held import held_by
from experiments.question import Answer, Measure, Setting
from experiments.reading import Reading, holds, log_probabilities
from experiments.regret import attended
from framework.backend import Model

EVERY = 8  # given tokens between two looks at what is kept
TOP = 5

Weights = Float[np.ndarray, "kv_heads group queries tokens"]
Values = Float[np.ndarray, "kv_heads tokens head_dim"]


@dataclass(frozen=True, kw_only=True)
class Fidelity(Reading):
    """Of the logits after each given token."""

    measures = (
        Measure("kl", "lower", "nats per token"),
        Measure("top1", "higher", "share of tokens"),
        Measure("top5", "higher", "share of tokens"),
        Measure("first", "higher", "tokens"),
        Measure("mass", "lower", "share of attention"),
        Measure("error", "lower", "relative"),
    )

    def ask(self, setting: Setting, seeds: Sequence[int]) -> list[Answer]:
        model, passages = setting.model, self.passages(setting.model, seeds)
        full, steps = self.whole(setting, seeds), passages.given.shape[1]
        kl, top1, top5 = (np.zeros((steps, len(seeds))) for _ in range(3))
        queries, kept = self.prompt + np.arange(0, steps, EVERY), []
        for number, (logits, cache) in enumerate(self.along(setting, passages)):
            if number == 0:
                held = held_by(model, cache, [self.prompt] * len(seeds))
            else:
                kl[number - 1], top1[number - 1], top5[number - 1] = compared(logits, full[number - 1])
            if number < steps and number % EVERY == 0:
                kept.append([holds(positions, self.length) for positions in cache.kept])
        full_attention = setting.once(
            (Fidelity, "attention", model, self.length, self.prompt, tuple(seeds)),
            partial(looked_at, model, passages.texts, self.prompt),
        )
        answers = []
        for row, seed in enumerate(seeds):
            masses, errors = [], []
            for layer, (weights, values) in enumerate(full_attention):
                sets = np.stack([one[layer][row] for one in kept], axis=1)
                mass, error = lost(weights[row], values[row], sets, queries)
                masses.append(mass)
                errors.append(error)
            differing = np.flatnonzero(top1[:, row] < 1)
            answers.append(
                Answer(
                    seed,
                    {
                        "kl": max(float(kl[:, row].mean()), 0.0),
                        "top1": float(top1[:, row].mean()),
                        "top5": float(top5[:, row].mean()),
                        "first": float(differing[0] if len(differing) else steps),
                        "mass": float(np.mean(masses)),
                        "error": float(np.mean(errors)),
                        **{f"mass.{layer}": mass for layer, mass in enumerate(masses)},
                        **{f"error.{layer}": error for layer, error in enumerate(errors)},
                    },
                    held[row],
                )
            )
        return answers


def compared(
    found: Float[np.ndarray, "batch vocab"], full: Float[np.ndarray, "batch vocab"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """KL in nats, whether the most probable token is the same, and the share of the most probable ones in common."""
    ours, theirs = log_probabilities(found), log_probabilities(full)
    kl = (np.exp(theirs) * (theirs - ours)).sum(-1)
    best, right = (np.argpartition(x, -TOP, axis=-1)[:, -TOP:] for x in (ours, theirs))
    shared = (best[:, :, None] == right[:, None]).any(-1).mean(-1)
    return kl, (ours.argmax(-1) == theirs.argmax(-1)).astype(float), shared


def looked_at(model: Model, texts: np.ndarray, prompt: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """What every 8th given token gives to each token under the full cache, and the values, for each layer."""
    return [
        (weights[..., ::EVERY, :].astype(np.float32), values.astype(np.float32))
        for weights, values in attended(model, texts, prompt)
    ]


def lost(
    weights: Weights,
    values: Values,
    kept: Bool[np.ndarray, "kv_heads queries tokens"],
    queries: np.ndarray,
) -> tuple[float, float]:
    """The attention to tokens that are not kept, and the relative error of what is mixed without them."""
    here = kept.copy()
    here[:, np.arange(len(queries)), queries] = True  # a query always sees its own token
    left = weights * here[:, None]
    mass = left.sum(-1)
    mixed, full = (
        np.matmul(each, values[:, None]) for each in (left / np.maximum(mass, 1e-30)[..., None], weights)
    )
    size = [np.sqrt((x**2).sum(axis=(0, 1, 3))) for x in (mixed - full, full)]
    return float(1 - mass.mean()), float((size[0] / np.maximum(size[1], 1e-30)).mean())
