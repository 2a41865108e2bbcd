"""experiments/regret.py: masses against a model that sees only what was kept, and oracles against all choices."""

from itertools import combinations

import numpy as np
import pytest
from typer.testing import CliRunner

from experiments import regret
from experiments.run import app
from framework.errors import KvtwinError
from tests.twins import hybrid, texts

PROMPT, CALLS = 6, 4
random = np.random.default_rng(3)


def rows(heads: int = 2) -> np.ndarray:
    """Random attention [heads, CALLS, PROMPT + CALLS] of queries from PROMPT on."""
    logits = random.standard_normal((heads, CALLS, PROMPT + CALLS)) * 2
    seen = np.arange(PROMPT + CALLS) <= PROMPT + np.arange(CALLS)[:, None]
    weights = np.where(seen, np.exp(logits), 0)
    return weights / weights.sum(-1, keepdims=True)


def test_attention_of_the_full_cache_mixes_the_values() -> None:
    """Summed with the values it gives what the layer mixes; groups are averaged, so the mixes are too."""
    model, tokens = hybrid("reference"), texts()[0, :17]
    taps: dict[str, np.ndarray] = {}
    model.step(tokens[None], logits=None, taps=taps)
    for index, attention in enumerate(regret.attention_of(model, tokens, PROMPT)):
        layer = model.spec.layers[index]
        values = taps[f"layers.{index}.attention.value"][0]
        mixed = taps[f"layers.{index}.attention.mixed"][0, PROMPT:].reshape(
            -1, layer.kv_heads, layer.group, 8
        )
        np.testing.assert_allclose(np.einsum("hqp,phd->qhd", attention, values), mixed.mean(2), atol=1e-12)


def test_the_step_oracle_is_the_best_of_all_sets() -> None:
    attention, budget = rows(), 3
    kept = regret.oracle_step(attention, np.full((2, CALLS), budget), PROMPT)
    found = regret.mass(attention, kept, PROMPT)
    for head, call in np.ndindex(2, CALLS):
        own = attention[head, call, PROMPT + call]
        past = attention[head, call, : PROMPT + call]
        assert found[head, call] == pytest.approx(max(sum(one) for one in combinations(past, budget)) + own)


def test_the_future_oracle_never_brings_back_and_drops_what_is_worth_least() -> None:
    attention, budget = rows(), 3
    kept = regret.oracle_future(attention, np.full((2, CALLS), budget), PROMPT)
    for head in range(2):
        held = set(range(PROMPT))
        for call in range(CALLS):
            worth = {p: attention[head, call:, p].sum() for p in held}
            best = set(sorted(held, key=lambda p: worth[p])[-budget:])
            assert set(np.flatnonzero(kept[head, call])) == best
            held = best | {PROMPT + call}


@pytest.mark.parametrize(
    "policy", ["h2o(budget=5)", "window(budget=5, sinks=1, interval=3)", "adakv(budget=5, policy=h2o())"]
)
def test_no_policy_beats_the_step_oracle(policy: str) -> None:
    model, tokens = hybrid("torch"), texts()[0, :40]
    found = regret.regrets(model, tokens, policy, 20)
    assert {(each.layer, each.head) for each in found} == {
        (layer, head) for layer in (0, 1) for head in (0, 1)
    }
    for each in found:
        assert each.step >= max(each.policy, each.future) - 1e-12
        assert 0 < each.policy <= 1 + 1e-12


def test_a_budget_for_everything_loses_nothing() -> None:
    for each in regret.regrets(hybrid("torch"), texts()[0, :30], "h2o(budget=40)", 20):
        assert each.policy == pytest.approx(1)
        assert each.regret == pytest.approx(0)


def test_the_mass_is_that_of_the_tokens_that_the_cache_held() -> None:
    """Held after each call, by stepping, against what the table is made of."""
    model, tokens, policy = hybrid("torch"), texts()[1, :26], "window(budget=5, sinks=2, interval=3)"
    full = regret.attention_of(model, tokens, 20)
    _, cache = model.step(tokens[None, :20], model.cache(policy))
    masses = []
    for call in range(6):
        held = cache.kept[0][0]
        masses.append(
            [full[0][head, call, [*held[head][held[head] >= 0], 20 + call]].sum() for head in range(2)]
        )
        _, cache = model.step(tokens[None, 20 + call : 21 + call], cache)
    found = [each for each in regret.regrets(model, tokens, policy, 20) if each.layer == 0]
    np.testing.assert_allclose([each.policy for each in found], np.mean(masses, axis=0))


def test_bad_input() -> None:
    with pytest.raises(KvtwinError, match="the prompt has 30 of 30 tokens"):
        regret.regrets(hybrid("torch"), texts()[0, :30], "h2o(budget=4)", 30)
    with pytest.raises(KvtwinError, match="cannot read the text nothere"):
        CliRunner().invoke(app, ["regret", "bytes", "nothere", "--policy", "full()"], catch_exceptions=False)


def test_the_command(tmp_path) -> None:
    (tmp_path / "text").write_text("the quick brown fox jumps over the lazy dog " * 3)
    sizes = ["--prompt", "60", "--steps", "20"]
    asked = [
        "regret",
        "bytes",
        str(tmp_path / "text"),
        *sizes,
        "--policy",
        "h2o(budget=8)",
        "--policy",
        "full()",
    ]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0
    assert "mean regret" in result.output
    assert "over 8 heads" in result.output
    assert "nothing was evicted" in result.output
