"""kvzip from its definition: what the model gives to its prompt while it repeats it, and who then stays."""

import numpy as np
import pytest

from experiments.compare import free_run, run, same_sets
from framework.errors import KvtwinError
from framework.policies.kvzip import LEAD, PART, WHOLE, KVzip
from framework.policy import policies
from tests.twins import hybrid

CHUNK, SINKS, BUDGET = 13, 2, 7
POLICY = f"kvzip(budget={BUDGET}, sinks={SINKS}, chunk={CHUNK})"
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


def expected(row: list[int], layer: int) -> list[list[int]]:
    """The kept positions of each head: one full forward per pass, attention by hand."""
    model = hybrid("reference")
    spec = model.spec.layers[layer]
    peak = np.zeros((spec.kv_heads, len(row)))
    for part in KVzip(chunk=CHUNK).passes(row, model.tokenizer.encode):
        taps: dict[str, np.ndarray] = {}
        model.step([row + part], logits=None, taps=taps)
        queries = taps[f"layers.{layer}.attention.query_rotated"][0]
        keys = taps[f"layers.{layer}.attention.key_rotated"][0]
        for place in range(len(row), len(row) + len(part)):
            first = 0 if spec.window is None else max(0, place - spec.window + 1)
            for head in range(spec.heads):
                kv_head = head // spec.group
                logits = keys[first : place + 1, kv_head] @ queries[place, head] * spec.scale
                weights = np.exp(logits - logits.max())
                weights /= weights.sum()
                for slot in range(first, min(place + 1, len(row))):
                    peak[kv_head, slot] = max(peak[kv_head, slot], weights[slot - first])
    alive = [p for p in range(len(row)) if spec.window is None or p > len(row) - spec.window]
    result = []
    for kv_head in range(spec.kv_heads):
        ranked = sorted(
            alive, key=lambda p: (p < SINKS, 0 if p < SINKS else peak[kv_head, p], p), reverse=True
        )
        result.append(sorted(ranked[:BUDGET]))
    return result


@pytest.mark.parametrize("chunk", [None, 10])
@pytest.mark.parametrize("backend", ["reference", "torch", "flax"])
def test_generate_keeps_what_the_repetition_attends_to(backend: str, chunk: int | None) -> None:
    """Layer 0 sees every token; what is read leaves no trace, so that the first token is that of the full cache."""
    model = hybrid(backend)
    out = model.generate(ROWS, policy=POLICY, max_new_tokens=1, chunk=chunk, stop=())
    full = model.generate(ROWS, max_new_tokens=1, stop=())
    assert out.tokens == full.tokens
    for index, row in enumerate(ROWS):
        for head, kept in enumerate(expected(row, 0)):
            held = [int(p) for p in out.kept[0][index, head] if p >= 0]
            assert set(held) - {len(row)} <= set(kept)
            assert len(held) == BUDGET
            assert len(row) in held  # the new token is above what was read, and pushes one out
            (lost,) = set(kept) - set(held)
            assert lost >= SINKS


def test_eviction_by_chunk_is_refused() -> None:
    with pytest.raises(KvtwinError, match='reads the whole prompt a second time; expected evict="prompt"'):
        hybrid("torch").generate(ROWS, policy=POLICY, max_new_tokens=1, chunk=5, evict="chunk")


@pytest.mark.parametrize("fields", ["chunk=0", "sinks=-1"])
def test_bad_fields_are_refused(fields: str) -> None:
    with pytest.raises(KvtwinError, match="expected chunk >= 1 and sinks >= 0"):
        hybrid("torch").cache(f"kvzip(budget=9, {fields})")


def test_what_puts_policies_side_by_side_refuses_a_second_pass() -> None:
    spelling = "prefill_decode(budget=9, prefill=adakv(policy=kvzip()), decode=window())"
    with pytest.raises(KvtwinError, match="reads the prompt a second time"):
        policies.make(spelling)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_comparisons_run_the_passes(backend: str) -> None:
    """A led run and a free one hold after the prompt and one token what `generate` holds."""
    model = hybrid(backend)
    prompt = np.array([ROWS[0], ROWS[1] + [-1] * (len(ROWS[0]) - len(ROWS[1]))], np.int32)
    out = model.generate(ROWS, policy=POLICY, max_new_tokens=3, stop=())
    trace = run(model, prompt, POLICY, 3)
    assert trace.fed.tolist() == out.tokens
    assert same_sets(trace.kept, out.kept)[0] == same_sets(trace.kept, out.kept)[1]
    tokens, _, kept = free_run(model, prompt, POLICY, 3)
    assert tokens.tolist() == out.tokens
    assert same_sets(kept, out.kept)[0] == same_sets(kept, out.kept)[1]
