"""Generation: the same text from both backends, stop tokens, ragged prompts, streams, turns, and bad input."""

from functools import cache
from typing import Any

import array_api_compat.numpy as xp
import numpy as np
import pytest

from backends import backends
from framework.backend import Model
from framework.compare import TOLERANCE, drift, token_agreement
from framework.errors import KvtwinError
from framework.generate import Generated
from framework.random import gumbel
from tests.twins import TWINS, VOCAB, hybrid, texts, unchecked

ALL = ("reference", *TWINS)
SOURCE = ["def main(", "import os\n", "class Reader:\n    def __init__(self, path):\n"]
PROMPTS = [[int(token) for token in row[:length]] for row, length in zip(texts(), (9, 4, 14), strict=True)]
POLICIES = ("full()", "snapkv(budget=64, window=16)")
FILTERS = [
    {},
    {"temperature": 0.9, "seed": 7},
    {"temperature": 1.3, "top_k": 11},
    {"temperature": 1.1, "top_p": 0.8, "seed": 1},
    {"temperature": 0.7, "min_p": 0.05, "seed": 2},
    {"temperature": 2, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "seed": 2**32 - 1},
]


@cache
def bundled(backend: str) -> Model:
    return backends.get(backend).load("bytes", dtype="float32")


@cache
def written(backend: str, policy: str, count: int, *options: tuple[str, Any]) -> Generated:
    with unchecked():
        return bundled(backend).generate(SOURCE, policy=policy, max_new_tokens=count, **dict(options))


def chosen_from(policy: str, tokens: np.ndarray, temperature: float, seed: int) -> np.ndarray:
    """The numbers of which each token was the largest [batch, steps, vocab]: logits, or heated and with noise."""
    model = bundled("torch")
    rows = [model.tokenizer.encode(text) for text in SOURCE]
    logits, cached = model.step(rows, model.cache(policy, batch=len(rows)))
    each = [logits[:, 0]]
    with unchecked():
        for place in range(tokens.shape[1] - 1):
            logits, cached = model.step(tokens[:, place : place + 1], cached)
            each.append(logits[:, 0])
    result = np.stack(each, axis=1)
    if temperature:
        noise = [gumbel(xp, seed, step, np.arange(len(rows)), model.spec.vocab) for step in range(len(each))]
        result = result / temperature + np.stack(noise, axis=1)
    return result


@pytest.mark.parametrize("sampling", FILTERS[:2], ids=["greedy", "sampled"])
@pytest.mark.parametrize("policy", [POLICIES[0], pytest.param(POLICIES[1], marks=pytest.mark.slow)])
def test_both_backends_write_the_same_256_tokens(policy: str, sampling: dict[str, Any]) -> None:
    """In float32: or they part where the two best tokens lie within the drift."""
    found, expected = (
        np.array(written(backend, policy, 256, *sampling.items()).tokens) for backend in ("flax", "torch")
    )
    assert found.shape == expected.shape == (len(SOURCE), 256)
    if (found != expected).any():
        logits = chosen_from(policy, expected, sampling.get("temperature", 0), sampling.get("seed", 0))
        agreement = token_agreement(found, expected, logits)
        assert agreement.within(TOLERANCE["float32"]), agreement


@pytest.mark.parametrize("sampling", FILTERS[:2], ids=["greedy", "sampled"])
def test_the_judge_of_a_divergence(sampling: dict[str, Any]) -> None:
    """What it takes for the numbers that tokens were chosen from has those tokens as its largest."""
    expected = np.array(written("torch", POLICIES[1], 256, *sampling.items()).tokens)[:, :30]
    heat, seed = sampling.get("temperature", 0), sampling.get("seed", 0)
    assert (chosen_from(POLICIES[1], expected, heat, seed).argmax(-1) == expected).all()


def test_what_is_written_looks_like_source() -> None:
    """The bundled model is not noise: a test of equal text would pass on an empty one."""
    text = written("torch", POLICIES[0], 256).text
    assert all(len(set(each)) > 5 for each in text)
    assert any("self" in each for each in text)


@cache
def small(backend: str, *options: tuple[str, Any]) -> Generated:
    settings = {"policy": "h2o(budget=9)", "max_new_tokens": 20, "stop": ()} | dict(options)
    return hybrid(backend).generate(PROMPTS, **settings)


@pytest.mark.parametrize("sampling", FILTERS, ids=str)
@pytest.mark.parametrize("backend", TWINS)
def test_tokens_equal_the_reference(backend: str, sampling: dict[str, Any]) -> None:
    """In float64, for every filter: tokens, kept positions, what each row has seen."""
    found, expected = (small(one, *sampling.items()) for one in (backend, "reference"))
    assert found.tokens == expected.tokens
    for ours, theirs in zip(found.kept, expected.kept, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert found.cache.seen.tolist() == [len(row) + 20 for row in PROMPTS]


def test_seeds_differ_and_repeat() -> None:
    one, two = (small("torch", ("temperature", 1.0), ("seed", seed)).tokens for seed in (3, 4))
    again = hybrid("torch").generate(
        PROMPTS, policy="h2o(budget=9)", max_new_tokens=20, temperature=1.0, seed=3, stop=()
    )
    assert one != two
    assert again.tokens == one


@pytest.mark.parametrize("backend", ALL)
def test_a_stop_token_ends_its_row_only(backend: str) -> None:
    """It is the last token of the row, and part of the cache."""
    free = small("reference").tokens
    stop = (free[0][4], free[2][11])
    found = small(backend, ("stop", stop))
    ends = [next((place + 1 for place, token in enumerate(row) if token in stop), 20) for row in free]
    assert min(ends) < max(ends)
    assert found.tokens == [row[:end] for row, end in zip(free, ends, strict=True)]
    assert found.cache.seen.tolist() == [len(row) + end for row, end in zip(PROMPTS, ends, strict=True)]


def test_the_stop_token_is_not_in_the_text() -> None:
    model, free = bundled("torch"), written("torch", POLICIES[0], 256)
    stop = free.tokens[0][10]
    found = model.generate(SOURCE[0], policy=POLICIES[0], max_new_tokens=40, stop=[stop])
    end = free.tokens[0].index(stop)
    assert found.tokens == [free.tokens[0][: end + 1]]
    assert found.text == [bytes(free.tokens[0][:end]).decode(errors="replace")]


@pytest.mark.parametrize("backend", ALL)
def test_ragged_prompts_equal_each_alone(backend: str) -> None:
    together = small(backend)
    for index, prompt in enumerate(PROMPTS):
        alone = hybrid(backend).generate(prompt, policy="h2o(budget=9)", max_new_tokens=20, stop=())
        assert alone.tokens == [together.tokens[index]]


@pytest.mark.parametrize("sampling", FILTERS[:2], ids=["greedy", "hot"])
@pytest.mark.parametrize("backend", TWINS)
def test_a_stream_joins_to_the_text(backend: str, sampling: dict[str, Any]) -> None:
    model, options = bundled(backend), {"policy": POLICIES[1], "max_new_tokens": 40} | sampling
    pieces = list(model.stream(SOURCE[2], **options))
    assert "".join(pieces) == model.generate(SOURCE[2], **options).text[0]
    assert len(pieces) > 20
    assert all(pieces)


def test_a_stream_never_cuts_a_character() -> None:
    """Very hot, so that bytes are random: replacement characters come where the bytes are no text, and only there."""
    model = bundled("torch")
    options = {"max_new_tokens": 200, "temperature": 1e6, "seed": 5}
    pieces, whole = list(model.stream("é", **options)), model.generate("é", **options)
    assert "".join(pieces) == whole.text[0]
    assert any(ord(letter) > 127 and letter != "�" for letter in whole.text[0])


@pytest.mark.parametrize("backend", TWINS)
def test_a_stream_ends_before_the_stop_token(backend: str) -> None:
    free = written(backend, POLICIES[1], 256)
    stop = free.tokens[2][12]
    pieces = bundled(backend).stream(SOURCE[2], policy=POLICIES[1], max_new_tokens=40, stop=[stop])
    before = free.tokens[2][: free.tokens[2].index(stop)]
    assert "".join(pieces) == bytes(before).decode(errors="replace")


@pytest.mark.parametrize("policy", ["full()", "h2o(budget=9)"])
@pytest.mark.parametrize("backend", TWINS)
def test_several_turns_on_one_cache(backend: str, policy: str) -> None:
    """Each turn is as the reference has it."""
    turns = [
        [list(map(int, row[20 + 9 * turn :][: 3 + turn + n])) for n, row in enumerate(texts())]
        for turn in (0, 1)
    ]
    found, expected = (small(one, ("policy", policy)).cache.fork() for one in (backend, "reference"))
    for turn in turns:
        ours = hybrid(backend).generate(turn, cache=found, max_new_tokens=5, stop=())
        theirs = hybrid("reference").generate(turn, cache=expected, max_new_tokens=5, stop=())
        assert ours.tokens == theirs.tokens
        assert all((one == two).all() for one, two in zip(ours.kept, theirs.kept, strict=True))
        found, expected = ours.cache, theirs.cache


def test_turns_equal_one_long_prompt() -> None:
    """Under the full policy."""
    first = small("torch", ("policy", "full()"))
    turn = [[5, 6, 7], [8], [9, 10]]
    long = [one + two + three for one, two, three in zip(PROMPTS, first.tokens, turn, strict=True)]
    whole = hybrid("torch").generate(long, max_new_tokens=6, stop=())
    later = hybrid("torch").generate(turn, cache=first.cache.fork(), max_new_tokens=6, stop=())
    assert later.tokens == whole.tokens


@pytest.mark.parametrize("evict", ["prompt", "chunk"])
@pytest.mark.parametrize("backend", TWINS)
def test_prompts_in_chunks(backend: str, evict: str) -> None:
    found, expected = (small(one, ("chunk", 5), ("evict", evict)) for one in (backend, "reference"))
    assert found.tokens == expected.tokens
    assert (found.tokens == small("reference").tokens) or evict == "chunk"
    assert all((one == two).all() for one, two in zip(found.kept, expected.kept, strict=True))


def test_a_progress_bar_changes_nothing(capfd: pytest.CaptureFixture) -> None:
    assert small("torch", ("progress", True)).tokens == small("torch").tokens
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("backend", TWINS)
def test_a_call_without_a_cache_gives_one(backend: str) -> None:
    model, tokens = hybrid(backend), np.array(PROMPTS[:1], np.int32)
    logits, made = model.step(tokens)
    again, _ = model.step(tokens, model.cache())
    assert drift(logits, again) == 0
    assert made.seen.tolist() == [9]


BAD = [
    ("", {}, "prompt 0 is empty"),
    ([], {}, "no prompts"),
    (["a", ""], {}, "prompt 1 is empty"),
    ([[3], []], {}, "prompt 1 is empty"),
    ([[1.5, 2.0]], {}, "expected a text, token ids or a chat"),
    ([[VOCAB]], {}, f"token {VOCAB} .* expected 0 to {VOCAB - 1}"),
    ([{"role": "user", "content": "hello"}], {}, "no chat template"),
    ("a", {"max_new_tokens": 0}, "max_new_tokens is 0"),
    ("a", {"max_new_tokens": -3}, "max_new_tokens is -3"),
    ("a", {"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
    ("a", {"policy": "snapkw(budget=64)"}, "snapkv"),
    ("a", {"policy": "h2o(budgets=64)"}, "budget"),
    ("a", {"policy": "h2o(budget=0)"}, "budget 0 .* expected at least 1"),
    ("a", {"policy": "h2o"}, "has no budget"),
    ("a", {"codec": "fool()"}, "full"),
    ("a", {"temperature": -0.5}, "temperature is -0.5"),
    ("a", {"top_p": 0.0}, "top_p is 0.0"),
    ("a", {"top_k": -1}, "top_k is -1"),
    ("a", {"min_p": 1.5}, "min_p is 1.5"),
    ("a", {"seed": -1}, "seed is -1"),
    ("a", {"chunk": 0}, "chunk is 0"),
    ("a", {"evict": "never"}, 'expected "prompt" or "chunk"'),
]


@pytest.mark.parametrize(("prompts", "options", "message"), BAD, ids=[repr((*one[:2],)) for one in BAD])
@pytest.mark.parametrize("backend", ALL)
def test_bad_input_is_one_clear_error(
    backend: str, prompts: Any, options: dict[str, Any], message: str
) -> None:
    with unchecked(), pytest.raises(KvtwinError, match=message) as raised:
        hybrid(backend).generate(prompts, **options)
    assert len(str(raised.value).splitlines()) <= 3


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "prompt 0 is empty"),
        (["a", "b"], {}, "2 prompts came; expected one"),
        ("a", {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ("a", {"top_p": 2.0}, "top_p is 2.0"),
    ],
)
def test_bad_input_of_a_stream(prompt: Any, options: dict[str, Any], message: str) -> None:
    with unchecked(), pytest.raises(KvtwinError, match=message):
        list(hybrid("torch").stream(prompt, **options))


@pytest.mark.parametrize("backend", ALL)
def test_a_cache_of_another_batch_or_used_up_or_full_is_refused(backend: str) -> None:
    model = hybrid(backend)
    with pytest.raises(KvtwinError, match="3 rows; expected 2"):
        model.generate(PROMPTS, cache=model.cache(batch=2))
    with pytest.raises(KvtwinError, match="exceed the capacity 8"):
        model.generate(PROMPTS, cache=model.cache(batch=3, capacity=8))
    used = model.cache()
    model.step([[1, 2]], used)
    with pytest.raises(KvtwinError, match="consumed by a step"):
        model.generate([[3]], cache=used)


@pytest.mark.parametrize(("fraction", "budget"), [(0.5, 7), (0.1, 2), (1, 14), (2 / 14, 2)])
def test_a_fraction_is_of_the_longest_prompt_and_shown_as_tokens(fraction: float, budget: int) -> None:
    """Rounded up; 2 / 14 of 14 is 2 although the product is not exactly so."""
    out = hybrid("torch").generate(PROMPTS, policy=f"tova(fraction={fraction})", max_new_tokens=3)
    assert f"tova(budget={budget})" in repr(out.cache)
    assert max(layer.shape[-1] for layer in out.kept) == min(budget, 17)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("tova(fraction=0)", "fraction is 0; expected above 0"),
        ("tova(fraction=1.5)", "fraction is 1.5"),
        ("tova(fraction=0.5, budget=4)", "a budget and a fraction"),
        ("full(fraction=0.5)", "expected no budget"),
    ],
)
def test_fractions_that_cannot_be_are_refused(policy: str, message: str) -> None:
    with pytest.raises(KvtwinError, match=message):
        hybrid("torch").generate(PROMPTS, policy=policy)


def test_a_cache_needs_a_budget_in_tokens() -> None:
    with pytest.raises(KvtwinError, match="expected a budget in tokens"):
        hybrid("torch").cache("tova(fraction=0.5)")
