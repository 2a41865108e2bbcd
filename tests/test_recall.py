"""What policies keep of a recall prompt, and whether recall survives, against the model's closed form."""

from functools import cache

import numpy as np
import pytest

from backends import backends
from framework.backend import Model
from framework.models.recall_form import KV_HEADS, LAYERS, Prompt, attention, predict, prompt
from framework.policies.random import Random
from framework.random import hash32

GROUP = 2
TOLERANCE = (
    1e-4  # of the largest score: the closed form leaves out what the other kv head and far distances add
)

CASES = {
    "window(budget=24, sinks=1)": lambda weights: np.arange(weights.shape[-1], dtype=float),
    "h2o(budget=24)": lambda weights: weights.mean(1).sum(1),
    "tova(budget=24)": lambda weights: np.broadcast_to(weights[:, :, -1].mean((0, 1)), weights.shape[::3]),
    "snapkv(budget=24, window=5, kernel=3)": lambda weights: pooled(weights[:, :, -5:].mean(2)).mean(1),
    "keep_it_odd(budget=24)": lambda weights: np.arange(weights.shape[-1]) % 2.0,
    "random(budget=24, seed=5)": None,
}
PROTECTED = {"window": (1, 0), "h2o": (0, 12), "snapkv": (0, 5)}  # first and newest tokens


def pooled(observed: np.ndarray) -> np.ndarray:
    """Maximum over three neighbours, the five newest tokens left out."""
    inside = observed.copy()
    inside[..., -5:] = 0
    edge = np.zeros_like(inside[..., :1])
    wide = np.concatenate([edge, inside, edge], -1)
    return np.maximum(np.maximum(wide[..., :-2], wide[..., 1:-1]), wide[..., 2:])


@cache
def loaded(backend: str) -> Model:
    return backends.get(backend).load("recall", dtype="float64")


def expected_scores(policy: str, asked: Prompt, layer: int) -> np.ndarray:
    """Scores [kv_heads tokens] of the prompt without its last token, from the closed form alone."""
    tokens = asked.tokens[:-1]
    if policy.startswith("random"):
        positions = np.arange(len(tokens), dtype=np.int32)[None]
        heads = np.arange(KV_HEADS, dtype=np.int32)[:, None]
        return hash32(np, Random(budget=24, seed=5).seed, layer, heads, positions).astype(float)
    weights = np.stack(
        [[attention(tokens, layer, kv * GROUP + one) for one in range(GROUP)] for kv in range(KV_HEADS)]
    )
    return np.broadcast_to(CASES[policy](weights), (KV_HEADS, len(tokens)))


@pytest.mark.parametrize("length", [61, 150])
@pytest.mark.parametrize("policy", CASES)
def test_kept_sets_are_the_best_by_the_closed_form(policy: str, length: int) -> None:
    """No dropped token scores above a kept one, beyond the closed form's own error; protected tokens stay."""
    asked = prompt(np.random.default_rng(length), length, pairs=4)
    tokens = asked.tokens[:-1]
    model = loaded("torch")
    _, held = model.step(np.array([tokens]), model.cache(policy))
    first, newest = PROTECTED.get(policy.split("(")[0], (0, 0))
    positions = np.arange(len(tokens))
    safe = (positions < first) | (positions >= len(tokens) - newest)
    for layer in range(LAYERS):
        scores = expected_scores(policy, asked, layer)
        for head in range(KV_HEADS):
            kept = np.isin(positions, held.kept[layer][0, head])
            assert kept.sum() == 24
            assert kept[safe].all()
            worst, best = scores[head][kept & ~safe].min(), scores[head][~kept].max()
            assert best - worst <= TOLERANCE * np.abs(scores).max()


@pytest.mark.parametrize("backend", ["torch", "flax"])
@pytest.mark.parametrize(
    "policy", ["window(budget=24, sinks=1)", "random(budget=24, seed=5)", "h2o(budget=24)"]
)
def test_recall_is_what_the_closed_form_predicts(policy: str, backend: str) -> None:
    """After eviction the answer is the one that the kept slots of the match head allow, right or wrong."""
    model, rows = loaded(backend), [prompt(np.random.default_rng(seed), 120, pairs=2) for seed in range(12)]
    _, held = model.step(np.array([row.tokens[:-1] for row in rows]), model.cache(policy, batch=len(rows)))
    kept = held.kept[1][:, 0]
    logits, held = model.step(np.array([row.tokens[-1:] for row in rows]), held)
    answers = logits[:, 0].argmax(-1)
    recalled = []
    for row, slots, answer in zip(rows, kept, answers, strict=True):
        decided = row.value_position in slots or 0 in slots  # the sink is at position 0
        if decided:
            last = np.append(slots[slots >= 0], len(row.tokens) - 1)
            assert answer == predict(row.tokens, kept=last)
        recalled.append(answer == row.answer)
    if not policy.startswith("h2o"):
        assert 0 < sum(recalled) < len(rows)  # the case shows both outcomes


def recalled(backend: str, policy: str, rows: list[Prompt]) -> tuple[np.ndarray, np.ndarray]:
    """What the model answers after the prompts were evicted, and which answers are right."""
    model = loaded(backend)
    _, held = model.step(np.array([row.tokens[:-1] for row in rows]), model.cache(policy, batch=len(rows)))
    logits, _ = model.step(np.array([row.tokens[-1:] for row in rows]), held)
    answers = logits[:, 0].argmax(-1)
    return answers, answers == np.array([row.answer for row in rows])


@cache
def planted() -> list[Prompt]:
    """Prompts of one length whose answers stand at many depths."""
    return [prompt(np.random.default_rng(seed), 120, pairs=2) for seed in range(40)]


@pytest.mark.parametrize("backend", ["torch", "flax"])
@pytest.mark.parametrize("budget", [24, 60, 96])
def test_a_window_recalls_exactly_what_lies_outside_the_evicted_block(backend: str, budget: int) -> None:
    """StreamingLLM on a needle: accuracy is the share of needles among the first `sinks` and newest tokens."""
    rows, sinks = planted(), 4
    _, right = recalled(backend, f"window(budget={budget}, sinks={sinks})", rows)
    tokens = len(rows[0].tokens) - 1
    outside = [row.value_position < sinks or row.value_position >= tokens - (budget - sinks) for row in rows]
    assert right.tolist() == outside
    assert 0 < sum(outside) < len(rows)


@pytest.mark.parametrize("backend", ["torch", "flax"])
def test_without_the_sink_a_lost_needle_gives_noise_instead_of_byte_0(backend: str) -> None:
    rows = planted()
    with_sink, right = recalled(backend, "window(budget=24, sinks=1)", rows)
    without, also_right = recalled(backend, "window(budget=24, sinks=0)", rows)
    lost = ~right & ~also_right
    assert lost.sum() > 10
    assert (with_sink[lost] == 0).all()
    assert (without[lost] != 0).all()


@pytest.mark.parametrize("backend", ["torch", "flax"])
def test_the_one_retrieval_head_deserves_the_budget(backend: str) -> None:
    """Layer 1, kv head 0 retrieves: at the same total, tokens for it recall more, and tokens for the other less."""
    rows = planted()
    scores = [
        recalled(backend, f"window(budget=(24, {heads}), sinks=1)", rows)[1].sum()
        for heads in ((8, 40), (24, 24), (40, 8))
    ]
    assert scores[0] < scores[1] < scores[2]
    tokens = len(rows[0].tokens) - 1
    for found, budget in zip(scores, (8, 24, 40), strict=True):
        assert found == sum(row.value_position >= tokens - (budget - 1) for row in rows)
