"""kvzip and kvgrad from their definitions: what a repetition makes of each token of its prompt, and who then stays."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from experiments.checks.case import Case
from experiments.checks.outcome import libraries, moved, moved_block
from experiments.compare import free_run, run, same_sets
from framework.cache import Cache
from framework.errors import KvtwinError
from framework.generate import prefill
from framework.policies.kvzip import LEAD, PART, WHOLE, KVzip
from framework.policy import policies
from tests.twins import hybrid, hybrid_weights, snapshot_drift

CHUNK, SINKS, BUDGET = 13, 2, 7
FIELDS = f"budget={BUDGET}, sinks={SINKS}, chunk={CHUNK}"
POLICY, GRADIENT = f"kvzip({FIELDS})", f"kvgrad({FIELDS})"
both = pytest.mark.parametrize("policy", [POLICY, GRADIENT], ids=["kvzip", "kvgrad"])
later = pytest.mark.slow  # what flax compiles here shows nothing that the other test of the policy does not
random = np.random.default_rng(11)
ROWS = [random.integers(0, 256, count).tolist() for count in (29, 18)]


def test_passes_are_the_request_and_the_prompt_in_parts() -> None:
    prompt = list(range(40, 69))
    whole, part = list(WHOLE.encode()), list(PART.encode())
    assert KVzip(chunk=CHUNK).passes(prompt, lambda text: list(text.encode())) == [
        whole + prompt[:13],
        part + prompt[13 - LEAD : 13] + prompt[13:26],
        part + prompt[26 - LEAD : 26] + prompt[26:],
    ]
    assert KVzip().passes(prompt, lambda text: list(text.encode())) == [whole + prompt]


@cache
def peaks(policy: str, number: int, layer: int) -> np.ndarray:
    """The score of each token of a row, per head: one full forward per pass, attention by hand.

    For kvgrad a weight counts by the length of what the value adds through the head, and of the gradient at the query.
    """
    model, row = hybrid("reference"), ROWS[number]
    spec = model.spec.layers[layer]
    output = hybrid_weights()[f"layers.{layer}.attention.output.weight"].astype(np.float64)
    _, held = model.step([row], logits=None)
    peak = np.zeros((spec.kv_heads, len(row)))
    for part in KVzip(chunk=CHUNK).passes(row, model.tokenizer.encode):
        taps: dict[str, np.ndarray] = {}
        model.step([row + part], logits=None, taps=taps)
        queries = taps[f"layers.{layer}.attention.query_rotated"][0]
        keys = taps[f"layers.{layer}.attention.key_rotated"][0]
        values = taps[f"layers.{layer}.attention.value"][0]
        slopes = model.gradients(np.array([part], np.int32), held)[layer][0]
        for place in range(len(row), len(row) + len(part)):
            first = 0 if spec.window is None else max(0, place - spec.window + 1)
            for head in range(spec.heads):
                kv_head = head // spec.group
                logits = keys[first : place + 1, kv_head] @ queries[place, head] * spec.scale
                weights = np.exp(logits - logits.max())
                weights /= weights.sum()
                through = output[:, head * spec.head_dim : (head + 1) * spec.head_dim]
                for slot in range(first, min(place + 1, len(row))):
                    given = weights[slot - first]
                    if policy == GRADIENT:
                        given *= np.linalg.norm(through @ values[slot, kv_head])
                        given *= np.linalg.norm(slopes[place - len(row)])
                    peak[kv_head, slot] = max(peak[kv_head, slot], given)
    return peak


def expected(policy: str, number: int, layer: int) -> list[list[int]]:
    """The kept positions of each head."""
    window = hybrid("reference").spec.layers[layer].window
    peak, tokens = peaks(policy, number, layer), len(ROWS[number])
    alive = [p for p in range(tokens) if window is None or p > tokens - window]
    return [
        sorted(sorted(alive, key=lambda p: (p < SINKS, p < SINKS or one[p], p), reverse=True)[:BUDGET])
        for one in peak
    ]


@pytest.mark.parametrize("chunk", [None, 10])
@pytest.mark.parametrize(
    ("backend", "policy"),
    [(backend, policy) for policy in (POLICY, GRADIENT) for backend in ("reference", "torch")]
    + [pytest.param("flax", policy, marks=later) for policy in (POLICY, GRADIENT)],
)
def test_generate_keeps_what_the_repetition_asks_for(backend: str, chunk: int | None, policy: str) -> None:
    """Layer 0 sees every token; what is read leaves no trace, so that the first token is that of the full cache."""
    model = hybrid(backend)
    out = model.generate(ROWS, policy=policy, max_new_tokens=1, chunk=chunk, stop=())
    full = model.generate(ROWS, max_new_tokens=1, stop=())
    assert out.tokens == full.tokens
    for index, row in enumerate(ROWS):
        for head, kept in enumerate(expected(policy, index, 0)):
            held = [int(p) for p in out.kept[0][index, head] if p >= 0]
            assert set(held) - {len(row)} <= set(kept)
            assert len(held) == BUDGET
            assert len(row) in held  # the new token is above what was read, and pushes one out
            (lost,) = set(kept) - set(held)
            assert lost >= SINKS


def prefilled(backend: str, policy: str) -> Cache:
    """The rows and their passes, compressed."""
    model = hybrid(backend)
    held, _ = prefill(model, ROWS, None, policy, "full()", 1, None, "prompt")
    return held


@pytest.mark.parametrize(
    ("backend", "policy"),
    [(backend, policy) for policy in (POLICY, GRADIENT) for backend in ("reference", "torch")]
    + [pytest.param("flax", policy, marks=later) for policy in (POLICY, GRADIENT)],
)
def test_prefill_keeps_and_remembers_what_the_definition_says(backend: str, policy: str) -> None:
    held = prefilled(backend, policy)
    for layer, found in enumerate(held.snapshot().layers):
        for row, head in np.ndindex(found.positions.shape[:2]):
            kept = found.positions[row, head][found.positions[row, head] >= 0]
            assert kept.tolist() == expected(policy, row, layer)[head]
            right = peaks(policy, row, layer)[head, kept]
            np.testing.assert_allclose(found.memory["peak"][row, head, : len(kept)], right, rtol=1e-9)


@pytest.mark.parametrize("backend", ["torch", "flax"])
def test_kvgrad_goes_on_from_a_file_of_another_backend(backend: str, tmp_path: Path) -> None:
    """What was read goes first, the weakest of it; then the oldest token that was not."""
    prefilled("reference", GRADIENT).save(tmp_path / "held")
    held, model = hybrid(backend).restore(tmp_path / "held"), hybrid(backend)
    for step in range(BUDGET):
        tokens = np.array([[step + 1], [step + 40]], np.int32)
        _, held = model.step(tokens, held.fork(), logits=None)
        for index, row in enumerate(ROWS):
            for head, before in enumerate(expected(GRADIENT, index, 0)):
                peak = peaks(GRADIENT, index, 0)[head]
                read = sorted((p for p in before if p >= SINKS), key=lambda p: (peak[p], p))
                new = range(len(row), len(row) + step + 1)
                every = list(range(SINKS)) + (read + list(new))[step + 1 :]
                assert [int(p) for p in held.kept[0][index, head] if p >= 0] == sorted(every)


@pytest.mark.parametrize("library", ["NumPy", "torch", "jax", "array-api-strict"])
def test_kvgrad_reads_a_pass_in_every_library(library: str) -> None:
    """One random layer of the kit, in the phase that the kit does not have."""
    policy, case = policies.make(GRADIENT), Case(tokens=12)
    step = next(case.every(policy))
    assert step.block is not None
    random = np.random.default_rng(2)
    slopes = random.normal(size=step.block.hidden.shape)
    block, view = replace(step.block, gradients=slopes), replace(step.view, phase="pass")
    xp = libraries()[library]
    own = moved_block(block, xp)
    assert own is not None
    found = np.asarray(policy.stream(moved(view, xp), own)["peak"])
    attention = np.asarray(view.attention(block))
    for row, head, slot in np.argwhere(view.positions >= 0):
        lengths = np.linalg.norm(view.values[row, head, slot] @ view.output[head], axis=-1)
        through = attention[row, head, :, :, slot] * lengths[:, None] * np.linalg.norm(slopes[row], axis=-1)
        assert found[row, head, slot] == pytest.approx(max(through.max(), -1.0), rel=1e-5)


@pytest.mark.parametrize("backend", ["torch", pytest.param("flax", marks=later)])
def test_kvgrad_inside_adakv_divides_by_what_was_read(backend: str) -> None:
    policy = f"adakv(budget={BUDGET}, floor=0.2, policy=kvgrad(sinks=2, chunk=13))"
    truth, held = prefilled("reference", policy), prefilled(backend, policy)
    assert snapshot_drift(held, truth) <= 1e-9
    assert any(len({*(row >= 0).sum(-1).tolist()}) > 1 for row in held.kept[0])


@both
def test_eviction_by_chunk_is_refused(policy: str) -> None:
    with pytest.raises(KvtwinError, match='reads the whole prompt a second time; expected evict="prompt"'):
        hybrid("torch").generate(ROWS, policy=policy, max_new_tokens=1, chunk=5, evict="chunk")


@pytest.mark.parametrize("name", ["kvzip", "kvgrad"])
@pytest.mark.parametrize("fields", ["chunk=0", "sinks=-1"])
def test_bad_fields_are_refused(fields: str, name: str) -> None:
    with pytest.raises(KvtwinError, match=f"{name} has chunk=.*; expected chunk >= 1 and sinks >= 0"):
        hybrid("torch").cache(f"{name}(budget=9, {fields})")


@pytest.mark.parametrize("name", ["kvzip", "kvgrad"])
def test_what_puts_policies_side_by_side_refuses_a_second_pass(name: str) -> None:
    spelling = f"prefill_decode(budget=9, prefill=adakv(policy={name}()), decode=window())"
    with pytest.raises(KvtwinError, match="reads the prompt a second time"):
        policies.make(spelling)


@both
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_comparisons_run_the_passes(backend: str, policy: str) -> None:
    """A led run and a free one hold after the prompt and one token what `generate` holds."""
    model = hybrid(backend)
    prompt = np.array([ROWS[0], ROWS[1] + [-1] * (len(ROWS[0]) - len(ROWS[1]))], np.int32)
    out = model.generate(ROWS, policy=policy, max_new_tokens=3, stop=())
    trace = run(model, prompt, policy, 3)
    assert trace.fed.tolist() == out.tokens
    assert same_sets(trace.kept, out.kept)[0] == same_sets(trace.kept, out.kept)[1]
    tokens, _, kept = free_run(model, prompt, policy, 3)
    assert tokens.tolist() == out.tokens
    assert same_sets(kept, out.kept)[0] == same_sets(kept, out.kept)[1]


class Opening:
    """A tokenizer that begins texts with an opening token."""

    def encode(self, text: str, opening: bool = True) -> list[int]:
        return [300] * opening + list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        return ""


def test_what_is_read_has_no_opening_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether `generate` or a comparison reads it: the model sees the bytes of the request and no more."""
    model = hybrid("reference")
    plain = model.generate(ROWS, policy=POLICY, max_new_tokens=1, stop=())
    prompt = np.array([ROWS[1]], np.int32)
    expected = run(model, prompt, POLICY, 1).kept
    monkeypatch.setattr(model, "tokenizer", Opening())
    found = model.generate(ROWS, policy=POLICY, max_new_tokens=1, stop=()).cache.snapshot()
    for one, other in zip(found.layers, plain.cache.snapshot().layers, strict=True):
        np.testing.assert_array_equal(one.memory["peak"], other.memory["peak"])
    assert same_sets(run(model, prompt, POLICY, 1).kept, expected)[0] == same_sets(expected, expected)[1]
