"""Questions that read held-out text, against loops over single rows, and attention, from its definition."""

from collections.abc import Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from backends import backends
from experiments import regret
from experiments.question import Answer, Setting, questions
from experiments.questions import speed
from experiments.reading import stretches
from experiments.text import held_out
from framework.backend import Model
from framework.codec import codecs
from framework.compare import distributions
from framework.footprint import footprint
from framework.policy import policies
from tests.twins import hybrid, hybrid_spec, hybrid_weights, unchecked

LENGTH, CONTEXT = 60, 40
SIZES = f"length={LENGTH}, context={CONTEXT}"
SEEDS = (5, 2)
pytestmark = pytest.mark.usefixtures("no_type_checks")  # texts read token by token
# With budgets per head, a sliding window in the second layer, and an interval at which nothing is evicted.
POLICIES = ("window(budget=9)", "h2o(budget=12, interval=3)", "adakv(budget=12, policy=snapkv(window=4))")
every_policy = pytest.mark.parametrize(
    "policy", [POLICIES[2], *(pytest.param(policy, marks=pytest.mark.slow) for policy in POLICIES[:2])]
)
every_backend = pytest.mark.parametrize("backend", ["torch", pytest.param("flax", marks=pytest.mark.slow)])


@pytest.fixture
def no_type_checks() -> Iterator[None]:
    with unchecked():
        yield


def setting(policy: str, backend: str = "torch", codec: str = "full()") -> Setting:
    return Setting(hybrid(backend), policy, codec, hybrid)


def ask(spelling: str, policy: str, backend: str = "torch", codec: str = "full()") -> list[Answer]:
    return questions.make(spelling).ask(setting(policy, backend, codec), SEEDS)


@cache
def texts() -> list[np.ndarray]:
    return [np.array(text, np.int32) for text in stretches(hybrid("torch"), SEEDS, LENGTH)]


def alone(model: Model, policy: str, text: np.ndarray) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
    """One row by itself: the logits after the context and after each token, and what is then held."""
    logits, held = model.step(text[None, :CONTEXT], model.cache(policy))
    yield logits[0, 0], [layer[0] for layer in held.kept]
    for place in range(CONTEXT, LENGTH):
        logits, held = model.step(text[None, place : place + 1], held)
        yield logits[0, 0], [layer[0] for layer in held.kept]


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def test_texts_are_places_of_the_held_out_text() -> None:
    """Of the length asked for, the same for a seed whatever the others, all over the text."""
    model, whole = hybrid("torch"), held_out()
    found = stretches(model, range(40), 70)
    assert [len(text) for text in found] == [70] * 40
    places = [whole.index(bytes(text).decode()) for text in found]
    assert {4 * place // len(whole) for place in places} == {0, 1, 2, 3}
    assert stretches(model, [7], 70) == [found[7]]


@every_policy
@every_backend
def test_perplexity(policy: str, backend: str) -> None:
    answers = ask(f"perplexity({SIZES})", policy, backend)
    for answer, text in zip(answers, texts(), strict=True):
        steps = [logits for logits, _ in alone(hybrid("torch"), policy, text)]
        # The logits after given token n are those of given token n + 1.
        chances = [
            softmax(logits)[token] for logits, token in zip(steps[1:-1], text[CONTEXT + 1 :], strict=True)
        ]
        assert len(chances) == LENGTH - CONTEXT - 1
        assert answer.measures["nats"] == pytest.approx(-np.mean(np.log(chances)), rel=1e-9)
        assert answer.measures["perplexity"] == pytest.approx(np.exp(-np.mean(np.log(chances))), rel=1e-9)
        assert answer.held
        assert answer.held.context == CONTEXT


def test_perplexity_under_the_full_cache_is_that_of_one_call() -> None:
    answers = ask(f"perplexity({SIZES})", "full()")
    for answer, text in zip(answers, texts(), strict=True):
        logits, _ = hybrid("reference").step(text[None], logits="all")
        chances = softmax(logits[0, CONTEXT:-1])[np.arange(LENGTH - CONTEXT - 1), text[CONTEXT + 1 :]]
        assert answer.measures["nats"] == pytest.approx(-np.log(chances).mean(), rel=1e-9)


@every_policy
def test_fidelity_of_logits(policy: str) -> None:
    answers = ask(f"fidelity({SIZES})", policy)
    for answer, text in zip(answers, texts(), strict=True):
        found, full = (
            np.array([logits for logits, _ in alone(hybrid("torch"), one, text)])[1:]
            for one in (policy, "full()")
        )
        expected = distributions(found, full)
        best = [set(np.argsort(-logits)[:5]) for logits in found]
        right = [set(np.argsort(-logits)[:5]) for logits in full]
        same = found.argmax(-1) == full.argmax(-1)
        assert answer.measures["kl"] == pytest.approx(expected.kl, rel=1e-9)
        assert answer.measures["top5"] == pytest.approx(
            np.mean([len(one & other) / 5 for one, other in zip(best, right, strict=True)])
        )
        assert answer.measures["top1"] == pytest.approx(same.mean())
        assert answer.measures["first"] == (same.argmin() if not same.all() else len(same))


def test_attention_lost_and_its_error() -> None:
    """By loops over query heads: what is held, the token itself, and the softmax over only these."""
    policy, model = "window(budget=9, sinks=2)", hybrid("reference")
    answers = ask(f"fidelity({SIZES})", policy)
    for answer, text in zip(answers, texts(), strict=True):
        taps: dict[str, np.ndarray] = {}
        model.step(text[None], logits=None, taps=taps)
        held = [kept for _, kept in alone(hybrid("torch"), policy, text)]
        means = []
        for index, layer in enumerate(model.spec.layers):
            at = f"layers.{index}.attention"
            queries, keys = taps[f"{at}.query_rotated"][0], taps[f"{at}.key_rotated"][0]
            values, masses, errors = taps[f"{at}.value"][0], [], []
            for given in range(0, LENGTH - CONTEXT, 8):
                query, full, without = CONTEXT + given, [], []
                for head in range(layer.heads):
                    own = head // layer.group
                    seen = [p for p in range(query + 1) if layer.window is None or p > query - layer.window]
                    logits = np.array([keys[p, own] @ queries[query, head] for p in seen]) * layer.scale
                    kept = np.isin(seen, [*held[given][index][own], query])
                    masses.append(softmax(logits)[~kept].sum())
                    full.append(softmax(logits) @ values[seen, own])
                    without.append(softmax(logits[kept]) @ values[np.array(seen)[kept], own])
                difference = np.concatenate(without) - np.concatenate(full)
                errors.append(np.linalg.norm(difference) / np.linalg.norm(np.concatenate(full)))
            assert answer.measures[f"mass.{index}"] == pytest.approx(np.mean(masses), rel=1e-4)
            assert answer.measures[f"error.{index}"] == pytest.approx(np.mean(errors), rel=1e-4)
            means.append((np.mean(masses), np.mean(errors)))
        assert answer.measures["mass"] == pytest.approx(np.mean(means, axis=0)[0], rel=1e-4)
        assert answer.measures["error"] == pytest.approx(np.mean(means, axis=0)[1], rel=1e-4)
        assert 0.05 < answer.measures["mass"] < 1


@pytest.mark.parametrize("policy", ["full()", "h2o(budget=80)"])
def test_a_cache_that_lost_nothing_is_faithful(policy: str) -> None:
    for answer in ask(f"fidelity({SIZES})", policy):
        assert answer.measures["kl"] == pytest.approx(0, abs=1e-12)
        assert answer.measures["mass"] == pytest.approx(0, abs=1e-6)
        assert answer.measures["error"] == pytest.approx(0, abs=1e-6)
        assert [answer.measures[name] for name in ("top1", "top5", "first")] == [1, 1, 20]


def test_a_codec_shows_in_the_logits_only() -> None:
    for answer in ask(f"fidelity({SIZES})", "full()", codec="int8()"):
        assert answer.measures["kl"] > 1e-6
        assert answer.measures["mass"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", ["fidelity", "regret"])
def test_the_full_run_is_made_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process, whatever the policies; the second and third cell make no full cache."""
    asked, shared, model = questions.make(f"{name}({SIZES})"), {}, hybrid("torch")
    made: list[str] = []
    original = type(model).cache

    def counted(self: Model, policy: Any = "full()", *rest: Any, **options: Any) -> Any:
        made.append(policy if isinstance(policy, str) else policies.spelling(policy))
        return original(self, policy, *rest, **options)

    monkeypatch.setattr(type(model), "cache", counted)
    first, second = (
        Setting(model, policy, "full()", hybrid, shared) for policy in ("window(budget=9)", "h2o(budget=9)")
    )
    answers = asked.ask(first, SEEDS)
    assert len(made) == (3 if name == "fidelity" else 2)
    made.clear()
    others = asked.ask(second, SEEDS)
    assert asked.ask(first, SEEDS) == answers
    assert made == ["h2o(budget=9)", "window(budget=9)"]
    assert all(one.measures != other.measures for one, other in zip(answers, others, strict=True))


@every_policy
def test_regret_is_that_of_the_rows(policy: str) -> None:
    for answer, text in zip(ask(f"regret({SIZES})", policy), texts(), strict=True):
        rows = regret.regrets(hybrid("torch"), text, policy, CONTEXT)
        for name in ("future", "step", "regret"):
            assert answer.measures[name] == pytest.approx(np.mean([getattr(row, name) for row in rows]))
        assert answer.measures["mass"] == pytest.approx(np.mean([row.policy for row in rows]))


def test_no_regret_where_nothing_is_evicted() -> None:
    model = backends.get("torch").load("recall")
    [answer] = questions.make(f"regret({SIZES})").ask(Setting(model, "full()", "full()", hybrid), [1])
    assert answer.measures == {"regret": 0.0, "mass": 1.0, "future": 1.0, "step": 1.0}


# Backends.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "codec"),
    [("snapkv(budget=12, window=4)", "full()"), ("window(budget=9)", "int8()"), ("full()", "full()")],
)
def test_the_backends_do_the_same(policy: str, codec: str) -> None:
    for answer in ask(f"drift({SIZES})", policy, codec=codec):
        assert answer.measures["same"] == answer.measures["text"] == 1
        assert 0 < answer.measures["drift"] < 1e-10


@every_backend
def test_a_fault_of_the_other_backend_shows(backend: str) -> None:
    """One weight of a half more: other scores, other sets, other logits."""
    weights = dict(hybrid_weights())
    weights["layers.0.attention.key.weight"] = weights["layers.0.attention.key.weight"] * 1.5

    def other(name: str) -> Model:
        return backends.get(name).build(hybrid_spec(), weights, "float64")

    faulty = Setting(hybrid(backend), "tova(budget=9)", "full()", other)
    for answer in questions.make(f"drift({SIZES})").ask(faulty, SEEDS):
        assert 0.5 < answer.measures["same"] < 1
        assert answer.measures["drift"] > 1e-4


def test_scores_equal_up_to_rounding_count_as_the_same() -> None:
    """All keys of `recall` have one norm, so that the two backends keep other tokens, in float32."""

    def loaded(name: str) -> Model:
        return backends.get(name).load("recall")

    [answer] = questions.make(f"drift({SIZES})").ask(
        Setting(loaded("torch"), "key_norm(budget=20)", "full()", loaded), [0]
    )
    assert answer.measures["same"] == 1


# Bytes and seconds.


@every_backend
@pytest.mark.parametrize(
    ("policy", "codec"),
    [("full()", "full()"), ("window(fraction=0.25)", "full()"), ("h2o(budget=16)", "int8()")],
)
def test_memory_is_what_the_formula_says(policy: str, codec: str, backend: str) -> None:
    [answer] = questions.make("memory(length=50)").ask(setting(policy, backend, codec), [0])
    expected = footprint(hybrid_spec(), policies.make(policy), codecs.make(codec), 50, 8)
    assert answer.measures["footprint"] == expected.kv
    assert answer.measures["payload"] == pytest.approx(expected.kv, abs=1)
    assert answer.measures["bytes"] > answer.measures["payload"]
    assert answer.held
    assert answer.held.context == 50
    assert answer.held.allocated == answer.measures["bytes"]


def test_speed_is_the_median_piece_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that is asked before and after the prompt, twice, and before and after each piece."""
    seconds = iter([100, 50, 90, 4, 2, 1, 8])
    ticks = [float(tick) for span in seconds for tick in (0, span)]
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=iter(ticks).__next__))
    [answer] = questions.make("speed(length=80, context=40)").ask(setting("window(budget=16)"), [0])
    assert answer.measures == {"rate": 8 / 3, "prompt": 50.0}
    assert answer.held
    assert answer.held.kept == 13.5
