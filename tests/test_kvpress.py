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
from framework.backend import Model
from framework.cache import Decision
from tests.kvpress.models import CASES, CONFIGS, QUESTION, model, print_of, text

RECORDED = Path(__file__).parent / "kvpress" / "recorded.npz"
BACKENDS = ("reference", "torch", "flax")
# Hugging Face computes norms, softmax and rope angles in float32 whatever the dtype; 1.3e-6 was the worst.
TOLERANCE = 5e-6


@dataclass(frozen=True)
class Theirs:
    """What a press did in one layer to one prompt: kept, and where every token got one score, scores."""

    kept: np.ndarray  # [kv_heads tokens]
    scores: np.ndarray | None  # [kv_heads tokens]


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
    """The policy for a press, with a place for the budget.

    `budget`: "ratio" for what the press should keep, "recorded" for what it kept in each layer, "all" for the prompt.
    `scores`: "equal", or "other": only kept sets compare. `logits`: False where the press leaves ties open.
    """

    policy: str
    budget: str = "ratio"
    scores: str = "equal"
    logits: bool = True


SNAPKV = 'snapkv(window=8, kernel=5, pooling="mean")'
EXPECTED = "expected_attention(future=64, value_norm=False)"
TWINS = {
    "knorm": Twin("key_norm(budget={})"),
    "snapkv": Twin('snapkv(budget={}, window=8, kernel=5, pooling="mean")'),
    "tova": Twin("tova(budget={})"),
    "streaming_llm": Twin("window(budget={}, sinks=4)", scores="other"),
    "keydiff": Twin("keydiff(budget={})"),
    "lagkv": Twin("lagkv(budget={}, lag=16)", logits=False),
    "lagkv_short": Twin("lagkv(budget={}, lag=128)", scores="other"),
    "lagkv_cross": Twin("lagkv(budget={}, sinks=3, lag=16, cross=True)", logits=False),
    "expected_attention": Twin("expected_attention(budget={})"),
    "expected_attention_mean": Twin("expected_attention(budget={}, future=64, sinks=2, covariance=False)"),
    "expected_attention_plain": Twin("expected_attention(budget={}, future=64, value_norm=False)"),
    "expected_attention_epsilon": Twin("expected_attention(budget={}, future=64, epsilon=0.02)"),
    "observed_attention": Twin("observed_attention(budget={})"),
    "cur": Twin("cur(budget={})"),
    "cur_global": Twin("cur(budget={}, kernel=150)"),
    "cur_key": Twin('cur(budget={}, sinks=2, kernel=7, kind="key")'),
    "cur_value": Twin('cur(budget={}, kind="value")'),
    "cur_average": Twin('cur(budget={}, kind="mean")'),
    "leverage": Twin("leverage(budget={}, sketch=48)"),
    "non_causal_whole": Twin("noncausal_attention(budget={}, chunk={chunk})"),
    "compactor_whole": Twin("compactor(budget={}, sinks=0, recent=0, chunk={chunk})"),
    "cap": Twin("cap(budget={})"),
    "cap_near": Twin("cap(budget={}, tau=2.0, future=64, sinks=2)"),
    "q_filter": Twin('q_filter(budget={}, path="random:0")'),
    "adakv_snapkv": Twin(f"adakv(budget={{}}, policy={SNAPKV})"),
    "adakv_knorm": Twin("adakv(budget={}, floor=0.5, policy=key_norm())"),
    "critical_snapkv": Twin(f"critical(budget={{}}, policy={SNAPKV})", scores="other"),
    "critical_expected": Twin(f"critical(budget={{}}, first=0.25, policy={EXPECTED})", scores="other"),
    "critical_adakv": Twin(f"critical(budget={{}}, policy=adakv(policy={SNAPKV}))", scores="other"),
    "pyramid": Twin(f"pyramid(budget={{}}, policy={SNAPKV})"),
    "pyramid_flat": Twin('pyramid(budget={}, beta=3, policy=snapkv(window=2, kernel=5, pooling="mean"))'),
    "chunkkv_knorm": Twin("chunked(budget={}, chunk=7, policy=key_norm())", "recorded", "other"),
    "chunkkv_keydiff": Twin("chunked(budget={}, chunk=10, policy=keydiff())", "recorded", "other"),
    "finch": Twin("finch(budget={})", scores="other"),  # the weights of queries: has a test of its own
    "finch_plain": Twin(f"snapkv(budget={{}}, window={QUESTION}, kernel=1)"),
    "simlayer": Twin("simlayer(budget={}, recent=19, threshold=0.4)", "all", "other"),
    "merging_knorm": Twin("merge(budget={}, policy=key_norm())"),
    "merging_fraction": Twin("merge(budget={}, threshold=0.3, share=0.75, policy=key_norm())"),
}
# Kept keys rotated by their rank; the next token, too. Only its logits are recorded.
ROTATED = {
    "rerotated_streaming_llm": "window(budget={}, reposition=True)",
    "rerotated_snapkv": f"reposition(budget={{}}, policy={SNAPKV})",
    "rerotated_finch": "reposition(budget={}, policy=finch())",
}
# Recorded, and not held against a policy by what is kept: why.
APART = {
    "block_keydiff": "has a test of its own",
    "non_causal": "pads the last chunk with products of 0, which count in the softmax: has a test of its own",
    "non_causal_chunks": "pads, as above",
    "compactor": "pads; blends by the ratio; cuts chunks from behind the first tokens, without the last ones",
    "compactor_blend": "the same, but for the ratio",
    "chunk_knorm": "prunes each chunk of the prompt by itself: no policy does",
    "chunkkv_snapkv": "takes the window's stand-in scores, the largest + 1, for scores, and keeps whole chunks only",
}


@cache
def recording() -> dict[str, np.ndarray]:
    with np.load(RECORDED) as data:
        return dict(data)


def recorded(name: str, length: int, press: str) -> list[Theirs]:
    """What a press did, per layer."""
    data, at = recording(), f"{name}-{length}-{press}"
    scores = data.get(f"{at}-scores")
    return [
        Theirs(
            np.unpackbits(data[f"{at}-kept-{layer}"], axis=-1)[:, :length].astype(bool),
            None if scores is None else scores[layer].astype(np.float64),
        )
        for layer in range(CONFIGS[name]["num_hidden_layers"])
    ]


@cache
def built(backend: str, name: str) -> Model:
    spec, weights = model(name)
    return backends.get(backend).build(spec, weights, "float64" if backend == "reference" else "float32")


def run(backend: str, name: str, length: int, policy: str) -> tuple[list[Decision], np.ndarray]:
    """Our decisions about the prompt, one per layer, and the logits of the token behind it. Its last tokens are marked
    as the question, which only finch reads."""
    one, tokens, found = built(backend, name), text(name, length), []
    cached = one.cache(policy)
    cached.mark(np.array([length - QUESTION]))
    _, cached = one.step(tokens[:, :length], cached, logits=None, decisions=found)
    logits, _ = one.step(tokens[:, length:], cached)
    return found, logits[0, 0]


def spelled(press: str, name: str, length: int, ratio: float) -> str:
    """The policy for a press with its budget."""
    twin = TWINS[press]
    budget: Any = length if twin.budget == "all" else int(length * (1 - ratio))
    if twin.budget == "recorded":
        budget = tuple(int(one.kept[0].sum()) for one in recorded(name, length, press))
    return twin.policy.format(budget, chunk={61: 61, 150: 50}[length])


def drift_of_logits(name: str, length: int, press: str, logits: np.ndarray) -> float:
    theirs = recording()[f"{name}-{length}-{press}-logits"]
    return float(np.abs(logits[: len(theirs)] - theirs).max() / np.abs(theirs).max())


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


def same(kept: np.ndarray, theirs: Theirs, swaps: bool = True) -> bool:
    """True where the sets of each head are equal, or under `swaps` what is swapped lies within the tolerance."""
    if (kept == theirs.kept).all():
        return True
    if not swaps or theirs.scores is None or (kept.sum(-1) != theirs.kept.sum(-1)).any():
        return False
    apart = [
        scores[theirs & ~ours].max() - scores[ours & ~theirs].min()
        for scores, ours, theirs in zip(theirs.scores, kept, theirs.kept, strict=True)
        if (ours != theirs).any()
    ]
    return max(apart) <= TOLERANCE * np.abs(theirs.scores).max()


def test_the_recording_is_of_these_models() -> None:
    """Where this fails, weights or texts have changed: run tests/kvpress/record.py again."""
    assert json.loads(str(recording()["prints"])) == {name: print_of(name) for name in CONFIGS}


def test_every_press_ran_and_has_its_place() -> None:
    known = {key.split("-")[2] for key in recording() if "-" in key}
    assert known == {*TWINS, *ROTATED, *APART}
    assert len(known) == len(TWINS) + len(ROTATED) + len(APART)
    assert not [key for key in recording() if key.endswith("-error")]


QUICK = {"snapkv", "expected_attention", "leverage", "adakv_snapkv"}


def asked_of(backend: str) -> list[tuple[str, int, float]]:
    """All cases of torch, and of the others some: that backends keep the same is shown in tests/test_kept.py."""
    return {"torch": CASES, "reference": CASES[1:3], "flax": CASES[:1]}[backend]


def cases(presses: Iterable[str]) -> list[Any]:
    """(backend, press, model, length, ratio); flax compiles each of its cases for seconds."""
    return [
        pytest.param(
            backend,
            press,
            *case,
            marks=[pytest.mark.slow] if backend == "flax" and press not in QUICK else [],
        )
        for backend in BACKENDS
        for press in presses
        for case in asked_of(backend)
    ]


@pytest.mark.parametrize(("backend", "press", "name", "length", "ratio"), cases(TWINS))
def test_kvpress_keeps_the_same(backend: str, press: str, name: str, length: int, ratio: float) -> None:
    """Kept sets and scores, and the logits of the next token over what was kept."""
    twin, change = TWINS[press], DEVIATIONS.get(press, ("", lambda theirs, ours: theirs))[1]
    every, logits = run(backend, name, length, spelled(press, name, length, ratio))
    for ours, given in zip(every, recorded(name, length, press), strict=True):
        theirs = change(given, ours)
        assert same(mask(ours.kept[0], length), theirs, twin.scores == "equal")
        if twin.scores == "equal":
            free = ~ours.protected[0, :, :length]
            apart = np.abs(ours.scores[0, :, :length] - theirs.scores)[free].max()
            assert apart <= TOLERANCE * np.abs(theirs.scores[free]).max()
    if twin.logits and press not in DEVIATIONS:
        assert drift_of_logits(name, length, press, logits) <= TOLERANCE


@pytest.mark.parametrize(("backend", "press", "name", "length", "ratio"), cases(ROTATED))
def test_kvpress_rotates_the_same(backend: str, press: str, name: str, length: int, ratio: float) -> None:
    _, logits = run(backend, name, length, ROTATED[press].format(int(length * (1 - ratio))))
    assert drift_of_logits(name, length, press, logits) <= TOLERANCE


@pytest.mark.parametrize(("name", "length", "ratio"), CASES)
@pytest.mark.parametrize(("press", "chunk"), [("non_causal", 256), ("non_causal_chunks", 16)])
def test_the_padding_of_the_last_chunk_is_what_parts_non_causal_attention(
    press: str, chunk: int, name: str, length: int, ratio: float
) -> None:
    """The press in plain NumPy is the recorded one with the padding, and our policy without it."""
    policy = f"noncausal_attention(budget={int(length * (1 - ratio))}, chunk={chunk})"
    decisions, _ = run("reference", name, length, policy)
    taps: dict[str, np.ndarray] = {}
    built("reference", name).step(text(name, length)[:, :length], logits=None, taps=taps)
    for layer, (ours, theirs) in enumerate(zip(decisions, recorded(name, length, press), strict=True)):
        query, key, value = (
            taps[f"layers.{layer}.attention.{what}"][0] for what in ("query_rotated", "key_rotated", "value")
        )
        padded, plain = (non_causal(query, key, value, chunk, padded) for padded in (True, False))
        assert np.abs(padded - theirs.scores).max() <= TOLERANCE * np.abs(padded).max()
        assert np.abs(plain - ours.scores[0]).max() <= TOLERANCE * np.abs(plain).max()
        assert np.abs(plain - padded).max() > 1e-3


def non_causal(query: np.ndarray, key: np.ndarray, value: np.ndarray, chunk: int, padded: bool) -> np.ndarray:
    """Scores [kv_heads tokens] of [tokens heads head_dim]; padding adds queries and keys whose products are 0."""
    tokens, kv_heads = key.shape[:2]
    received = np.zeros((kv_heads, tokens))
    for head in range(query.shape[1]):
        kv_head = head * kv_heads // query.shape[1]
        for first in range(0, tokens, chunk):
            here = slice(first, min(first + chunk, tokens))
            count = here.stop - first
            logits = np.zeros((chunk, chunk)) if padded else np.zeros((count, count))
            logits[:count, :count] = query[here, head] @ key[here, kv_head].T
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            received[kv_head, here] += weights.sum(0)[:count] / (query.shape[1] // kv_heads)
    scores = np.pad(received * np.linalg.norm(value, axis=-1).T, ((0, 0), (1, 1)))
    scores = (scores[:, :-2] + scores[:, 1:-1] + scores[:, 2:]) / 3
    return (scores - scores.mean()) / scores.std(ddof=1)


@pytest.mark.parametrize(("name", "length", "ratio"), CASES)
def test_the_weights_of_the_queries_are_what_parts_finch(name: str, length: int, ratio: float) -> None:
    """In plain NumPy: both weigh a query of the question by the tokens before it, we with its own, and the press takes
    the mean where we take the sum."""
    decisions, _ = run("reference", name, length, f"finch(budget={int(length * (1 - ratio))})")
    taps: dict[str, np.ndarray] = {}
    built("reference", name).step(text(name, length)[:, :length], logits=None, taps=taps)
    before = np.arange(length - QUESTION, length)[:, None]
    for layer, (ours, theirs) in enumerate(zip(decisions, recorded(name, length, "finch"), strict=True)):
        query, key = (taps[f"layers.{layer}.attention.{what}_rotated"][0] for what in ("query", "key"))
        kv_heads, group = key.shape[1], query.shape[1] // key.shape[1]
        for kv_head in range(kv_heads):
            given = np.zeros((QUESTION, length))
            for head in range(kv_head * group, (kv_head + 1) * group):
                weights = np.exp(query[-QUESTION:, head] @ key[:, kv_head].T * query.shape[-1] ** -0.5)
                weights = np.where(np.arange(length) <= before, weights, 0)
                given += weights / weights.sum(-1, keepdims=True) / group
            given = given[:, :-QUESTION]
            right = (given * before).mean(0)
            assert np.abs(right - theirs.scores[kv_head, :-QUESTION]).max() <= TOLERANCE * right.max()
            right = (given * (before + 1)).sum(0)
            found = ours.scores[0, kv_head, : length - QUESTION]
            assert np.abs(right - found).max() <= TOLERANCE * right.max()


@pytest.mark.parametrize("press", DEVIATIONS)
def test_a_deviation_is_seen(press: str) -> None:
    """Without the change the kept sets differ somewhere, so that each entry is needed."""
    found = [
        same(mask(ours.kept[0], length), theirs)
        for name, length, ratio in CASES
        for ours, theirs in zip(
            run("reference", name, length, spelled(press, name, length, ratio))[0],
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
    cached, tokens = one.cache(f"keydiff(budget={budget})"), text(name, length)[:, :length]
    for first, end in zip([0, *range(budget, length, 11)], [*range(budget, length, 11), length], strict=True):
        _, cached = one.step(tokens[:, first:end], cached, logits=None, phase="prefill")
    assert (mask(cached.kept[0][0], length) == recorded(name, length, press)[0].kept).all()
