"""Shapes that the literature agrees on, for codecs: how much few bits cost, and that they buy tokens."""

from functools import cache

import numpy as np
import pytest

from backends import backends
from experiments.collapse import encoded, stretches, surprise


@cache
def perplexity(policy: str, codec: str) -> tuple[float, int]:
    """Held-out text, one token a step; and bytes of keys and values at its end."""
    model = backends.get("torch").load("bytes")
    text = stretches(encoded(None, model.tokenizer), 8, 192)
    held, nats = model.cache(policy, codec, batch=len(text)), []
    for place in range(text.shape[1] - 1):
        logits, held = model.step(text[:, place : place + 1], held)
        nats.append(surprise(logits[:, 0], text[:, place + 1]))
    return float(np.exp(np.mean(nats))), held.bytes.payload + held.bytes.scales


@pytest.mark.parametrize(
    ("codec", "least", "most"),
    [
        ("int8()", 0.999, 1.001),
        pytest.param("exl3(k_bits=8, v_bits=8)", 0.999, 1.001, marks=pytest.mark.slow),
        pytest.param("exl3(k_bits=4, v_bits=4)", 1.0005, 1.01, marks=pytest.mark.slow),
        pytest.param("exl3(k_bits=3, v_bits=3)", 1.01, 1.05, marks=pytest.mark.slow),
        ("exl3(k_bits=2, v_bits=2)", 1.15, 1.6),
    ],
)
def test_eight_bits_cost_nothing_four_little_and_two_much(codec: str, least: float, most: float) -> None:
    assert least < perplexity("full()", codec)[0] / perplexity("full()", "full()")[0] < most


@pytest.mark.slow
@pytest.mark.parametrize("budget", [9, 18])
@pytest.mark.parametrize("policy", ["h2o(budget={})", "window(budget={}, sinks=2)"])
def test_at_equal_bytes_few_bits_and_more_tokens_win(policy: str, budget: int) -> None:
    """16 bits against 4.5, scales included, and as many more tokens."""
    exact, whole = perplexity(policy.format(budget), "fp16()")
    coded, held = perplexity(policy.format(budget * 32 // 9), "exl3()")
    assert held == whole
    assert coded < 0.95 * exact
