"""The outside judge of the policies: what kvpress keeps of a prompt on the same models, as tests/kvpress recorded it.

A press keeps int(T (1 - ratio)) tokens, which is the budget here. Kept sets are equal per layer and head but for near
ties, and so are the scores. Where a policy goes apart from a press on purpose, `DEVIATIONS` names how, and what is
compared is the press with that one thing changed.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends import backends
from framework.backend import Decision, Model
from framework.calibration import write_filters
from tests.kvpress.models import CASES, CONFIGS, filters, model, print_of, text

RECORDED = Path(__file__).parent / "kvpress" / "recorded.npz"
BACKENDS = ("reference", "torch", "flax")
# Hugging Face computes norms, softmax and rope angles in float32 whatever the dtype; 1.3e-6 was the worst.
TOLERANCE = 5e-6


@dataclass(frozen=True)
class Theirs:
    """What a press did in one layer to one prompt: kept, and where every token got one score, scores."""

    kept: np.ndarray  # [kv_heads tokens]
    scores: np.ndarray | None  # [kv_heads tokens]
    values: np.ndarray | None = None  # [kv_heads kept head_dim]


Change = Callable[[Theirs, Decision], Theirs]


def last_token_by_score(theirs: Theirs, ours: Decision) -> Theirs:
    """What the press would do with our score of the last token."""
    forced = theirs.scores.copy()
    budget = int(ours.budget[0, 0])
    assert (theirs.kept == best(forced, budget)).all()
    assert (forced[:, -1] > 1).all()
    forced[:, -1] = ours.scores[0, :, forced.shape[-1] - 1]
    return Theirs(best(forced, budget), forced)


def other_sign(theirs: Theirs, ours: Decision) -> Theirs:
    """What the press would keep by the negative of its scores."""
    return Theirs(best(-theirs.scores, int(ours.budget[0, 0])), -theirs.scores)


# name: (what the press does and we do not, the press without it)
DEVIATIONS: dict[str, tuple[str, Change]] = {
    "tova": ("kvpress always keeps the last token; the paper does not", last_token_by_score),
    "q_filter": ("kvpress scores by minus the product with a filter", other_sign),
}


@dataclass(frozen=True)
class Twin:
    """The policy for a press, with a place for the budget. `scores`: "equal", or "other": only kept sets compare."""

    policy: str
    scores: str = "equal"


SNAPKV = 'snapkv(window=8, kernel=5, pooling="mean")'
TWINS = {
    "knorm": Twin("key_norm(budget={})"),
    "snapkv": Twin('snapkv(budget={}, window=8, kernel=5, pooling="mean")'),
    "tova": Twin("tova(budget={})"),
    "streaming_llm": Twin("window(budget={}, sinks=4)", scores="other"),
    "keydiff": Twin("keydiff(budget={})"),
    "expected_attention": Twin("expected_attention(budget={})"),
    "expected_attention_mean": Twin("expected_attention(budget={}, future=64, sinks=2, covariance=False)"),
    "expected_attention_plain": Twin("expected_attention(budget={}, future=64, value_norm=False)"),
    "expected_attention_epsilon": Twin("expected_attention(budget={}, future=64, epsilon=0.02)"),
    "leverage": Twin("leverage(budget={}, sketch=48)"),
    "q_filter": Twin("q_filter(budget={}, path={filters!r})"),
    "adakv_snapkv": Twin(f"adakv(budget={{}}, policy={SNAPKV})"),
    "adakv_knorm": Twin("adakv(budget={}, floor=0.5, policy=key_norm())"),
}
# Recorded for policies that do not exist yet, or compared in a test of its own.
APART = {
    "block_keydiff",
    "lagkv", "lagkv_short", "lagkv_cross", "observed_attention",
    "cur", "cur_global", "cur_key", "cur_value", "cur_average",
    "non_causal", "non_causal_chunks", "compactor", "compactor_blend", "cap", "cap_near",
    "pyramid", "pyramid_flat", "critical_snapkv", "critical_expected", "critical_adakv",
    "chunk_knorm", "chunkkv_knorm", "chunkkv_snapkv", "simlayer", "merging_knorm", "merging_fraction",
}  # fmt: skip


@cache
def recording() -> dict[str, np.ndarray]:
    with np.load(RECORDED) as data:
        return dict(data)


def recorded(name: str, length: int, press: str) -> list[Theirs]:
    """What a press did, per layer."""
    data, at = recording(), f"{name}-{length}-{press}"
    scores, values = (data.get(f"{at}-{what}") for what in ("scores", "values"))
    return [
        Theirs(
            np.unpackbits(data[f"{at}-kept-{layer}"], axis=-1)[:, :length].astype(bool),
            None if scores is None else scores[layer].astype(np.float64),
            None if values is None else values[layer],
        )
        for layer in range(CONFIGS[name]["num_hidden_layers"])
    ]


@cache
def built(backend: str, name: str) -> Model:
    spec, weights = model(name)
    return backends.get(backend).build(spec, weights, "float64" if backend == "reference" else "float32")


def decided(backend: str, name: str, length: int, policy: str) -> list[Decision]:
    """Our decisions about the prompt, one per layer."""
    one, found = built(backend, name), []
    one.step(text(name, length), one.cache(policy), logits=None, decisions=found)
    return found


def best(scores: np.ndarray, budget: int) -> np.ndarray:
    """True at the `budget` highest scores of each head; the newer of equal ones."""
    kept = np.zeros(scores.shape, bool)
    for head, row in enumerate(scores):
        order = sorted(range(len(row)), key=lambda token: (row[token], token), reverse=True)
        kept[head, order[:budget]] = True
    return kept


def mask(positions: np.ndarray, length: int) -> np.ndarray:
    """True where a token is kept [kv_heads tokens]."""
    kept = np.zeros((len(positions), length), bool)
    for head, one in enumerate(positions):
        kept[head, one[one >= 0]] = True
    return kept


def same(kept: np.ndarray, theirs: Theirs) -> bool:
    """True where the sets of each head are equal, or what is swapped lies within the tolerance."""
    if (kept == theirs.kept).all():
        return True
    if theirs.scores is None or (kept.sum(-1) != theirs.kept.sum(-1)).any():
        return False
    apart = [
        scores[theirs & ~ours].max() - scores[ours & ~theirs].min()
        for scores, ours, theirs in zip(theirs.scores, kept, theirs.kept, strict=True)
        if (ours != theirs).any()
    ]
    return max(apart) <= TOLERANCE * np.abs(theirs.scores).max()


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A file of the filters of each model."""
    folder, result = tmp_path_factory.mktemp("filters"), {}
    for name in CONFIGS:
        result[name] = str(folder / name)
        spec, _ = model(name)
        write_filters(
            result[name], {f"layers.{index}": each for index, each in enumerate(filters(name))}, spec
        )
    return result


def test_the_recording_is_of_these_models() -> None:
    """Where this fails, weights or texts have changed: run tests/kvpress/record.py again."""
    assert json.loads(str(recording()["prints"])) == {name: print_of(name) for name in CONFIGS}


def test_every_press_ran_and_has_its_place() -> None:
    known = {key.split("-")[2] for key in recording() if "-" in key}
    assert known == TWINS.keys() | APART
    assert not TWINS.keys() & APART
    assert not [key for key in recording() if key.endswith("-error")]


# Flax compiles each of its cases for seconds, and is held to the reference in tests/test_kept.py besides.
QUICK = {"snapkv", "expected_attention", "leverage", "adakv_snapkv"}


def cases(presses: Iterable[str]) -> list[Any]:
    """(backend, press, model, length, ratio); most of flax waits for make test-slow."""
    return [
        pytest.param(
            backend,
            press,
            *case,
            marks=[pytest.mark.slow]
            if backend == "flax" and (press not in QUICK or case != CASES[0])
            else [],
        )
        for backend in BACKENDS
        for press in presses
        for case in CASES
    ]


@pytest.mark.parametrize(("backend", "press", "name", "length", "ratio"), cases(TWINS))
def test_kvpress_keeps_the_same(
    backend: str, press: str, name: str, length: int, ratio: float, paths: dict[str, str]
) -> None:
    twin, change = TWINS[press], DEVIATIONS.get(press, ("", lambda theirs, ours: theirs))[1]
    policy = twin.policy.format(int(length * (1 - ratio)), filters=paths[name])
    every = decided(backend, name, length, policy)
    for ours, given in zip(every, recorded(name, length, press), strict=True):
        theirs = change(given, ours)
        assert same(mask(ours.kept[0], length), theirs)
        if twin.scores == "equal":
            free = ~ours.protected[0, :, :length]
            apart = np.abs(ours.scores[0, :, :length] - theirs.scores)[free].max()
            assert apart <= TOLERANCE * np.abs(theirs.scores[free]).max()


@pytest.mark.parametrize("press", DEVIATIONS)
def test_a_deviation_is_seen(press: str, paths: dict[str, str]) -> None:
    """Without the change the kept sets differ somewhere, so that each entry is needed."""
    found = [
        same(mask(ours.kept[0], length), theirs)
        for name, length, ratio in CASES
        for ours, theirs in zip(
            decided(
                "reference",
                name,
                length,
                TWINS[press].policy.format(int(length * (1 - ratio)), filters=paths[name]),
            ),
            recorded(name, length, press),
            strict=True,
        )
    ]
    assert not all(found)


@pytest.mark.parametrize(("backend", "press", "name", "length", "ratio"), cases(["block_keydiff"]))
def test_keydiff_block_by_block(backend: str, press: str, name: str, length: int, ratio: float) -> None:
    """BlockPress starts from the first n_kept tokens and takes 11 at a time. The prompt has been read whole before it;
    here the tokens of a block see only what was kept, so that from the second layer on the keys are others."""
    one, budget = built(backend, name), int(length * (1 - ratio))
    cached, tokens = one.cache(f"keydiff(budget={budget})"), text(name, length)
    for first, end in zip([0, *range(budget, length, 11)], [*range(budget, length, 11), length], strict=True):
        _, cached = one.step(tokens[:, first:end], cached, logits=None, phase="prefill")
    assert (mask(cached.kept[0][0], length) == recorded(name, length, press)[0].kept).all()
