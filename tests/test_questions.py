"""Questions behind prompts: where they begin, on every path of a cache; and finch from its definition, by loops."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from backends import backends
from experiments import run as commands
from framework.arrays import FAR
from framework.backend import Model
from framework.cache import Cache
from framework.errors import KvtwinError
from framework.generate import prefill
from framework.policy import Policy, View
from framework.weights import random_weights
from tests.twins import compilations, hybrid, hybrid_spec, texts, unchecked

BACKENDS = ("reference", "torch", "flax")
every_backend = pytest.mark.parametrize("backend", BACKENDS)
flax_later = pytest.mark.parametrize(
    "backend", ["reference", "torch", pytest.param("flax", marks=pytest.mark.slow)]
)
Rows = list[list[int]]
Questions = list[list[int] | None]

# Prompts and questions of other lengths in every row, together at most 16 tokens: one compiled shape.
CONTEXT, ASKED = (12, 9, 11), (4, 5, None)
WINDOW = 3  # of finch, for the row without a question
BUDGET = 8


def rows_of(contexts: Sequence[int], asked: Sequence[int | None], first: int = 0) -> tuple[Rows, Questions]:
    """Token ids of prompts and questions of these lengths, taken from the texts one after the other."""
    ids = [[int(token) for token in row[first:]] for row in texts(len(contexts))]
    prompts = [row[:count] for row, count in zip(ids, contexts, strict=True)]
    questions = [
        None if more is None else row[count : count + more]
        for row, count, more in zip(ids, contexts, asked, strict=True)
    ]
    return prompts, questions


def joined(prompt: list[int], question: list[int] | None) -> list[int]:
    return prompt + (question or [])


def fed(
    model: Model,
    policy: str | Policy,
    prompts: Rows,
    questions: Questions | None,
    chunk: int | None = None,
    evict: Any = "prompt",
    cache: Cache | None = None,
) -> Cache:
    """The cache after the prompts."""
    return prefill(model, prompts, cache, policy, "full()", 3, chunk, evict, None, questions)[0]


def held(positions: np.ndarray) -> list[int]:
    return [int(p) for p in positions if p >= 0]


# The mark.


@dataclass(frozen=True, kw_only=True)
class Before(Policy):
    """Keeps what comes before the question, the newest of it first."""

    @property
    def order_free(self) -> bool:
        return True

    def score(self, view: View) -> Any:
        return view.xp.astype(view.positions < view.question[:, None, None], view.xp.float32)


def kept_before(length: int, mark: int, steps: int, window: int | None, budget: int) -> list[int]:
    """What `Before` keeps of a row after these decode steps."""
    own = list(range(length))
    for step in range(steps + 1):
        own += [length + step - 1] if step else []
        living = [p for p in own if window is None or p > length + step - window]
        own = sorted(sorted(living, key=lambda p: (p < mark, p))[-budget:])
    return own


def assert_before(cache: Cache, marks: Sequence[int], lengths: Sequence[int], steps: int) -> None:
    assert cache.question.dtype == np.int32
    assert cache.question.tolist() == list(marks)
    assert cache.seen.tolist() == [length + steps for length in lengths]
    for kept, layer in zip(cache.kept, cache.spec.layers, strict=True):
        for row, head in np.ndindex(kept.shape[:2]):
            expected = kept_before(lengths[row], marks[row], steps, layer.window, 5)
            assert held(kept[row, head]) == expected, (row, head)


MARKS, LENGTHS = [12, 9, FAR], [16, 14, 11]


def going(backend: str, cache: Cache, steps: Sequence[int], rows: Sequence[int] = (0, 1, 2)) -> Cache:
    for step in steps:
        tokens = texts()[list(rows)][np.arange(len(rows)), [100 + step] * len(rows)][:, None]
        _, cache = hybrid(backend).step(tokens, cache, logits=None)
    return cache


@pytest.mark.parametrize("chunk", [None, 5])
@every_backend
def test_policies_see_where_questions_begin(backend: str, chunk: int | None) -> None:
    cache = fed(hybrid(backend), Before(budget=5), *rows_of(CONTEXT, ASKED), chunk)
    assert_before(cache, MARKS, LENGTHS, 0)
    assert_before(going(backend, cache, range(6)), MARKS, LENGTHS, 6)


@every_backend
def test_the_mark_goes_with_the_rows(backend: str) -> None:
    cache = fed(hybrid(backend), Before(budget=5), *rows_of(CONTEXT, ASKED))
    copy, some = cache.fork(), cache.rows([2, -3])
    one = cache.rows([1]).fork(rows=2)
    cache.mark([1, 2, 3])
    assert_before(going(backend, copy, range(3)), MARKS, LENGTHS, 3)
    assert_before(going(backend, some, range(3), (2, 0)), [FAR, 12], [11, 16], 3)
    assert_before(going(backend, one, range(3), (1, 1)), [9, 9], [14, 14], 3)


@pytest.mark.parametrize(
    ("source", "target"), [("reference", "torch"), ("torch", "flax"), ("flax", "reference")]
)
def test_the_mark_is_saved(source: str, target: str, tmp_path: Path) -> None:
    cache = fed(hybrid(source), "finch(budget=6, window=3)", *rows_of(CONTEXT, ASKED))
    cache.save(tmp_path / "cache")
    restored = hybrid(target).restore(tmp_path / "cache")
    assert restored.question.tolist() == restored.snapshot().question.tolist() == MARKS
    straight, restored = (going(*pair, range(4)) for pair in ((source, cache), (target, restored)))
    for one, other in zip(straight.snapshot().layers, restored.snapshot().layers, strict=True):
        np.testing.assert_array_equal(one.positions, other.positions)
        np.testing.assert_allclose(other.memory["asked"], one.memory["asked"], atol=1e-10)


@every_backend
def test_a_mark_is_rolled_back_with_its_tokens(backend: str) -> None:
    """One that begins after what is left is gone."""
    cache = fed(hybrid(backend), "full()", *rows_of((7, 5, 8), (4, 2, None)))
    assert cache.fork().roll_back(1).question.tolist() == [7, 5, FAR]
    assert cache.fork().roll_back(2).question.tolist() == [7, FAR, FAR]
    assert cache.roll_back(4).question.tolist() == [FAR, FAR, FAR]


def test_another_mark_is_not_compiled_again() -> None:
    model, policy = hybrid("flax"), "finch(budget=8, window=3)"
    options = {"policy": policy, "max_new_tokens": 3, "stop": ()}

    def write(asked: Sequence[int | None]) -> list[int]:
        prompts, questions = rows_of([16 - (more or 0) for more in asked], asked)
        return model.generate(prompts, question=questions, **options).cache.question.tolist()

    assert write((4, 2, None)) == [12, 14, FAR]
    with compilations() as seen:
        assert write((None, 7, 1)) == [FAR, 9, 15]
    assert not seen


@pytest.mark.parametrize(
    ("marks", "words"),
    [
        ([1, 2], "for each of 3 rows"),
        ([1, -1, 2], "at least 0"),
        ([1.5, 2, 3], "a position"),
        ([[1], [2], [3]], "each"),
    ],
)
def test_marks_that_cannot_be_are_refused(marks: Any, words: str) -> None:
    cache = hybrid("reference").cache(batch=3)
    with unchecked(), pytest.raises(KvtwinError, match=f"questions begin at .*{words}"):
        cache.mark(marks)


# Finch.


def weights(
    spec: Any, layer: int, taps: dict, kv_head: int, own: Sequence[int], asked: int
) -> dict[int, float]:
    """What the query at position `asked` gives to the tokens held, times their number: the mean of the group."""
    one, at = spec.layers[layer], f"layers.{layer}.attention"
    queries, keys = taps[f"{at}.query_rotated"][0], taps[f"{at}.key_rotated"][0]
    sees = [p for p in own if p <= asked and (one.window is None or p > asked - one.window)]
    result = dict.fromkeys(sees, 0.0)
    for head in range(kv_head * one.group, (kv_head + 1) * one.group):
        logits = [float(keys[p, kv_head] @ queries[asked, head]) * one.scale for p in sees]
        if one.softcap is not None:
            logits = [one.softcap * np.tanh(x / one.softcap) for x in logits]
        total = sum(np.exp(x) for x in logits)
        for p, x in zip(sees, logits, strict=True):
            result[p] += np.exp(x) / total * len(sees) / one.group
    return result


def tapped(model: Model, text: list[int]) -> dict[str, np.ndarray]:
    taps: dict[str, np.ndarray] = {}
    model.step([text], logits=None, taps=taps)
    return taps


def asked_by(
    spec: Any, layer: int, taps: dict, kv_head: int, own: Sequence[int], queries: Sequence[int]
) -> dict[int, float]:
    """The score of each token held."""
    score = dict.fromkeys(own, 0.0)
    for asked in queries:
        for p, x in weights(spec, layer, taps, kv_head, own, asked).items():
            score[p] += x
    return score


def stay(score: dict[int, float], begin: int, seen: int, window: int | None, budget: int) -> list[int]:
    """What is above the context by age, the context by score."""
    living = [p for p in score if window is None or p > seen - window]
    living.sort(key=lambda p: (p >= begin, 0.0 if p >= begin else score[p], p))
    return sorted(living[-budget:])


def assert_finch(
    cache: Cache, layer: int, row: int, begin: int, kept: Sequence[list[int]], scores: Sequence[dict]
) -> None:
    """The tokens held, and what is remembered of those of the context."""
    snapshot = cache.snapshot().layers[layer]
    for head in range(cache.spec.layers[layer].kv_heads):
        own = held(snapshot.positions[row, head])
        assert own == kept[head], (layer, row, head)
        before = [slot for slot, p in enumerate(own) if p < begin]
        found = snapshot.memory["asked"][row, head][before]
        np.testing.assert_allclose(found, [scores[head][own[slot]] for slot in before], rtol=1e-9, atol=1e-12)


@cache
def capped(backend: str) -> Model:
    """The model with soft-capped attention."""
    spec = hybrid_spec()
    spec = replace(spec, layers=tuple(replace(layer, softcap=0.8, scale=1.5) for layer in spec.layers))
    return backends.get(backend).build(spec, random_weights(spec, 4, np.float64), "float64")


def check_whole(made: Any, backend: str, chunk: int | None) -> None:
    prompts, questions = rows_of(CONTEXT, ASKED)
    cache = fed(made(backend), f"finch(budget={BUDGET}, window={WINDOW})", prompts, questions, chunk)
    spec, steps, expected = cache.spec, 7, {}
    for row, (prompt, question) in enumerate(zip(prompts, questions, strict=True)):
        text = joined(prompt, question)
        seen, taps = len(text), tapped(made("reference"), text)
        begin = len(prompt) if question else seen - WINDOW
        # Without a question it is the last call that asks.
        first = begin if question or not chunk else max(begin, (seen - 1) // chunk * chunk)
        for layer, one in enumerate(spec.layers):
            scores = [
                asked_by(spec, layer, taps, head, range(seen), range(first, seen))
                for head in range(one.kv_heads)
            ]
            kept = [stay(score, begin, seen, one.window, BUDGET) for score in scores]
            assert_finch(cache, layer, row, begin, kept, scores)
            expected[row, layer] = (begin, seen, scores, kept)
    if chunk:
        return
    for step in range(steps):  # decode: the context by what it was worth to the question, then the oldest
        tokens = texts()[np.arange(3), [100 + step] * 3][:, None]
        _, cache = made(backend).step(tokens, cache, logits=None)
        for (row, layer), (begin, seen, scores, kept) in expected.items():
            for head, score in enumerate(scores):
                now = {p: score.get(p, 0.0) for p in [*kept[head], seen + step]}
                kept[head] = stay(now, begin, seen + step + 1, spec.layers[layer].window, BUDGET)
            assert_finch(cache, layer, row, begin, kept, scores)


@pytest.mark.parametrize("chunk", [None, 5])
@every_backend
def test_finch_keeps_what_the_question_attends_to(backend: str, chunk: int | None) -> None:
    """Of a prompt at once or in pieces, and then step by step until only the newest tokens are left."""
    check_whole(hybrid, backend, chunk)


@flax_later
def test_finch_under_a_soft_cap(backend: str) -> None:
    check_whole(capped, backend, None)


def by_chunks(
    prompt: list[int], question: list[int], size: int, budget: int, kv_head: int
) -> tuple[list[int], dict[int, float]]:
    """What a head of the first layer keeps, and its scores, when the question is read behind every chunk."""
    model, text, mark = hybrid("reference"), prompt + question, len(prompt)
    spec, own, score = model.spec, [], {}
    straight, asking = tapped(model, text), False
    for start in range(0, len(text), size):
        end = min(start + size, len(text))
        own = [*own, *range(start, end)]
        if mark >= start + size:
            taps = tapped(model, text[:end] + question)
            read = list(range(end, end + len(question)))
            score = asked_by(spec, 0, taps, kv_head, [*own, *read], read)
            score = {p: score[p] for p in own}
            begin = end
        else:
            now = asked_by(spec, 0, straight, kv_head, own, range(max(mark, start), end))
            score = {p: x + (score.get(p, 0.0) if asking else 0.0) for p, x in now.items()}
            begin, asking = mark, True
        own = stay(score, begin, end, None, budget)
    return own, score


@flax_later
def test_the_question_is_read_behind_every_chunk(backend: str) -> None:
    """In rows whose question begins within a chunk, with one, and within the first."""
    prompts, questions = rows_of((23, 10, 3), (6, 4, 5))
    cache = fed(hybrid(backend), "finch(budget=9)", prompts, questions, 5, "chunk")
    assert cache.seen.tolist() == [29, 14, 8]
    assert cache.question.tolist() == [23, 10, 3]
    for row, (prompt, question) in enumerate(zip(prompts, questions, strict=True)):
        assert question
        pairs = [by_chunks(prompt, question, 5, 9, head) for head in range(2)]
        assert_finch(cache, 0, row, len(prompt), *([pair[which] for pair in pairs] for which in (0, 1)))


@flax_later
def test_without_a_question_chunks_are_compressed_by_their_own_end(backend: str) -> None:
    (prompt,), _ = rows_of((13,), (None,))
    cache, model = (
        fed(hybrid(backend), "finch(budget=4, window=2)", [prompt], None, 5, "chunk"),
        hybrid("reference"),
    )
    taps, own = tapped(model, prompt), [[], []]
    for start, end in ((0, 5), (5, 10), (10, 13)):
        own = [[*each, *range(start, end)] for each in own]
        scores = [asked_by(model.spec, 0, taps, head, own[head], range(end - 2, end)) for head in range(2)]
        own = [stay(score, end - 2, end, None, 4) for score in scores]
    assert_finch(cache, 0, 0, 11, own, scores)


@flax_later
def test_a_second_question_counts_anew(backend: str) -> None:
    """Or the end of a second prompt that has none; what was a question and an answer is then context."""
    model, policy = hybrid(backend), f"finch(budget={BUDGET}, window={WINDOW})"
    prompts, questions = rows_of(CONTEXT, ASKED)
    out = model.generate(prompts, question=questions, policy=policy, max_new_tokens=3, stop=())
    later, again = rows_of((6, 2, 5), (None, 3, 4), first=40)
    old, before = out.kept[0], out.cache.seen
    cache = fed(model, policy, later, again, cache=out.cache)
    assert cache.question.tolist() == [FAR, before[1] + 2, before[2] + 5]
    for row, question in enumerate(again):
        text = joined(prompts[row], questions[row]) + out.tokens[row] + joined(later[row], question)
        assert len(text) == cache.seen[row]
        begin = len(text) - (len(question) if question else WINDOW)
        taps = tapped(hybrid("reference"), text)
        own = [[*held(kept), *range(before[row], len(text))] for kept in old[row]]
        scores = [
            asked_by(cache.spec, 0, taps, head, own[head], range(begin, len(text))) for head in range(2)
        ]
        kept = [stay(score, begin, len(text), None, BUDGET) for score in scores]
        assert_finch(cache, 0, row, begin, kept, scores)


@every_backend
def test_more_question_than_budget_keeps_its_end(backend: str) -> None:
    prompts, questions = rows_of((5, 9, 11), (11, 3, None))
    cache = fed(hybrid(backend), "finch(budget=4)", prompts, questions)
    for row, head in np.ndindex(3, 2):
        own = held(cache.kept[0][row, head])
        assert (
            own == [12, 13, 14, 15]
            if row == 0
            else own[-3:] == [9, 10, 11]
            if row == 1
            else own == [7, 8, 9, 10]
        )


@flax_later
def test_finch_within_reposition(backend: str) -> None:
    """After the prompt alone ranks are positions; after more of it the reference says what is kept."""
    prompts, questions = rows_of(CONTEXT, ASKED)
    policy = f"reposition(budget={BUDGET}, policy=finch(window={WINDOW}))"
    caches = [fed(hybrid(one), policy, prompts, questions) for one in (backend, "reference")]
    plain = fed(hybrid(backend), f"finch(budget={BUDGET}, window={WINDOW})", prompts, questions)
    for one, other in zip(caches[0].kept, plain.kept, strict=True):
        np.testing.assert_array_equal(one, other)
    later, again = rows_of((6, 2, 5), (None, 3, 4), first=40)
    found, expected = (
        fed(hybrid(one), policy, later, again, 5, "chunk", cached)
        for one, cached in zip((backend, "reference"), caches, strict=True)
    )
    for one, other in zip(found.snapshot().layers, expected.snapshot().layers, strict=True):
        np.testing.assert_array_equal(one.positions, other.positions)
        np.testing.assert_allclose(one.memory["asked"], other.memory["asked"], atol=1e-10)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_policies_beside_it_do_not_hear_what_is_read_ahead(backend: str) -> None:
    """h2o has received from every real query once."""
    policy = "prefill_decode(budget=30, prefill=finch(), decode=h2o())"
    cache = fed(hybrid(backend), policy, *rows_of((12, 9, 11), (4, 5, 3)), 5, "chunk")
    mass = cache.snapshot().layers[0].memory["decode_mass"].sum(-1)
    np.testing.assert_allclose(mass, np.array([[16.0], [14.0], [14.0]]) * np.ones(2), rtol=1e-9)


# Generation.


@flax_later
def test_text_with_a_question_is_the_text_of_both(backend: str) -> None:
    """Under a policy that does not care; one question for all, or one for each prompt, as text or ids."""
    model = hybrid(backend)
    options: dict[str, Any] = {"max_new_tokens": 4, "stop": ()}
    whole = model.generate(["ab?!", "cde?!"], **options)
    for question in ("?!", ["?!", "?!"], [63, 33], [[63, 33], "?!"], np.array([63, 33])):
        with unchecked():
            out = model.generate(["ab", "cde"], question=question, **options)
        assert out.tokens == whole.tokens
        assert out.cache.question.tolist() == [2, 3]
    assert model.generate(["ab?!", "cde?!"], question=[None, None], **options).tokens == whole.tokens
    assert whole.cache.question.tolist() == [FAR, FAR]
    assert "".join(model.stream("cde", question="?!", **options)) == whole.text[1]


def test_the_next_turn_has_its_own_question_or_none() -> None:
    model = hybrid("torch")
    first = model.generate("ab", question="?!", max_new_tokens=2, stop=())
    assert first.cache.question.tolist() == [2]
    second = model.generate("cd", cache=first.cache, max_new_tokens=2, stop=())
    assert second.cache.question.tolist() == [FAR]
    third = model.generate("cd", question="!", cache=second.cache, max_new_tokens=2, stop=())
    assert third.cache.question.tolist() == [12]


CHAT = [{"role": "user", "content": "hello"}]
BAD = [
    ("a", "", "question 0 is empty; expected at least one token, or None"),
    (["a", "b"], ["c", ""], "question 1 is empty"),
    (["a", "b"], [[3], []], "question 1 is empty"),
    (["a", "b"], ["c"], "1 questions came; expected one, or one for each of 2 prompts"),
    ("a", ["c", "d"], "2 questions came; expected one, or one for each of 1 prompts"),
    ("a", [], "0 questions came"),
    (["a", "b"], [["c", 1.5], "d"], "expected a text, token ids"),
    ([[5, 6]], CHAT, "a question came with a chat"),
    ([[5, 6]], [CHAT], "a question came with a chat"),
]


@pytest.mark.parametrize(("prompts", "question", "message"), BAD, ids=[repr(one[:2]) for one in BAD])
def test_bad_questions_are_one_clear_error(prompts: Any, question: Any, message: str) -> None:
    with unchecked(), pytest.raises(KvtwinError, match=message) as raised:
        hybrid("torch").generate(prompts, question=question)
    assert len(str(raised.value).splitlines()) == 1
    if len(prompts) == 1:
        with unchecked(), pytest.raises(KvtwinError, match=message):
            list(hybrid("torch").stream(prompts[0], question=question))


class Chatting:
    """A tokenizer with a chat template."""

    def encode(self, text: str, opening: bool = True) -> list[int]:
        return [1] * opening + list(text.encode())

    def chat(self, messages: Any) -> list[int]:
        return [1, 2, 3]

    def decode(self, tokens: Any) -> str:
        return ""


@pytest.mark.parametrize("prompts", [CHAT, [CHAT], [CHAT, "a"]])
def test_a_chat_takes_no_question(prompts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = hybrid("reference")
    monkeypatch.setattr(model, "tokenizer", Chatting())
    with (
        unchecked(),
        pytest.raises(KvtwinError, match="a question came with a chat, whose template ends it; expected"),
    ):
        model.generate(prompts, question="why")


def test_a_question_has_no_opening_token(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hybrid("reference")
    monkeypatch.setattr(model, "tokenizer", Chatting())
    out = model.generate("ab", question="?!", max_new_tokens=1, stop=())
    assert (out.cache.seen.tolist(), out.cache.question.tolist()) == ([6], [3])


def test_finch_needs_a_window() -> None:
    with pytest.raises(KvtwinError, match="finch has window=0; expected at least 1"):
        hybrid("reference").cache("finch(budget=4, window=0)")


def test_the_command_takes_a_question() -> None:
    options = ["--policy", "finch(budget=16)", "--max-new-tokens", "3"]
    result = CliRunner().invoke(
        commands.app, ["generate", "bytes", "def f(x): ", "--question", "return", *options]
    )
    assert result.exit_code == 0
    assert result.output.startswith("def f(x): return")
    assert "16, 16, 16, 16 of 19" in result.output
