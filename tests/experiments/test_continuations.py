"""Scores of continuations, and what is written, behind compressed contexts: against single steps by hand."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache as once
from typing import Any

import numpy as np
import pytest

from backends import backends
from experiments.harness import until
from experiments.harness.continuations import Pair, Setting, batches, followed, scored
from experiments.harness.until import cut, written
from framework.backend import Model
from framework.decode import Sampling
from framework.errors import KvtwinError
from framework.family import family
from framework.weights import random_weights

TEXT = (
    b"class Reader:\n    def __init__(self, path):\n        self.path = path\n\n"
    b"    def read(self, size=None):\n        with open(self.path) as file:\n            return file.read(size)\n"
)
SNAPKV = "snapkv(budget=12, window=3, kernel=3)"
# Four contexts of different length, one of them a single token; two with several continuations, out of order.
CONTEXTS = {"a": TEXT[:37], "b": TEXT[40:94], "c": TEXT[100:101], "d": TEXT[9:60]}
ASKED = [
    ("b", b" retu"),
    ("a", b"x"),
    ("b", b"\n"),
    ("c", b"urn"),
    ("d", b"self.p"),
    ("b", b"      s"),
    ("a", b"   "),
]
PAIRS: list[Pair] = [(list(CONTEXTS[name]), list(after)) for name, after in ASKED]
slow_flax = pytest.mark.parametrize("backend", ["torch", pytest.param("flax", marks=pytest.mark.slow)])


CONFIG = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 30,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "eos_token_id": None,
}


@once
def loaded(backend: str) -> Model:
    """A random model of ASCII."""
    spec = family(CONFIG).spec(CONFIG)
    return backends.get(backend).build(spec, random_weights(spec, 3))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64) - logits.max()
    return wide - np.log(np.exp(wide).sum())


def along(
    model: Model, cache: Any, fed: Sequence[int], wanted: Sequence[int], evict: bool
) -> tuple[float, bool]:
    """One token a step: the log-probability of what is wanted, and whether it is all that greedy choice writes."""
    nats, greedy = 0.0, True
    for token, after in zip(fed, wanted, strict=True):
        logits, cache = model.step([[token]], cache, evict=evict)
        nats += log_softmax(logits[0, 0])[after]
        greedy &= int(logits[0, 0].argmax()) == after
    return nats, greedy


def behind(model: Model, pair: Pair, policy: str, codec: str) -> tuple[float, bool]:
    """All of the context but its last token compressed, and nothing evicted any more."""
    context, continuation = pair
    cache: Any = model.cache(policy, codec)
    if len(context) > 1:
        _, cache = model.step([context[:-1]], cache)
    return along(model, cache, [context[-1], *continuation[:-1]], continuation, evict=False)


def ordered(coming: Any) -> tuple[list[Any], list[Any]]:
    """What came, in the order asked for, and what was held, where something was."""
    every = list(coming)
    found = {number: each for number, each, _ in every}
    assert sorted(found) == list(range(len(every)))
    return [found[number] for number in range(len(every))], [held for _, _, held in every if held is not None]


def assert_alike(found: Sequence[Any], expected: Sequence[tuple[float, bool]], rtol: float = 1e-5) -> None:
    np.testing.assert_allclose([one.nats for one in found], [nats for nats, _ in expected], rtol=rtol)
    assert [one.greedy for one in found] == [greedy for _, greedy in expected]


@pytest.mark.parametrize(
    ("policy", "rows"), [("full()", 3), ("h2o(budget=12)", 3), (SNAPKV, 1), (SNAPKV, 3), (SNAPKV, 8)]
)
def test_scores_are_those_of_single_steps(policy: str, rows: int) -> None:
    model = loaded("torch")
    context, text = CONTEXTS["b"], by_hand(model, CONTEXTS["b"], policy, 1).encode()
    pairs: list[Pair] = [*PAIRS, (list(context), list(text))]
    found, held = ordered(scored(Setting(model, policy, rows=rows), pairs))
    assert_alike(found, [behind(model, pair, policy, "full()") for pair in pairs])
    assert sorted(one.context for one in held) == [36, 50, 53]
    assert {one.kept_max for one in held} == ({36, 50, 53} if policy == "full()" else {12})
    assert [one.greedy for one in found[-2:]] == [False, True]


@pytest.mark.slow
def test_scores_on_flax() -> None:
    model = loaded("flax")
    found, _ = ordered(scored(Setting(model, SNAPKV, rows=3), PAIRS))
    assert_alike(found, [behind(loaded("torch"), pair, SNAPKV, "full()") for pair in PAIRS], 1e-4)


def test_the_codec_is_in_force() -> None:
    """A continuation of one token sees nothing but what was coded; float16 is near, four bits are not."""
    model = loaded("torch")
    pairs = [(context, after[:1]) for context, after in PAIRS if len(context) > 1]
    exact, half, coarse = (
        np.array([one.nats for one in ordered(scored(Setting(model, codec=codec), pairs))[0]])
        for codec in ("full()", "fp16()", "exl2_q4()")
    )
    assert_alike(
        ordered(scored(Setting(model, codec="exl2_q4()"), pairs))[0],
        [behind(model, pair, "full()", "exl2_q4()") for pair in pairs],
    )
    np.testing.assert_allclose(half, exact, rtol=1e-2)
    assert np.abs(coarse - exact).max() > 20 * np.abs(half - exact).max() > 0


def test_a_context_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, fed = loaded("torch"), []
    step = model.step

    def counted(tokens: Any, *rest: Any, **options: Any) -> Any:
        fed.append(sum(int((np.asarray(row) >= 0).sum()) for row in tokens))
        return step(tokens, *rest, **options)

    monkeypatch.setattr(model, "step", counted)
    list(scored(Setting(model, SNAPKV, rows=3), PAIRS))
    assert sum(fed) == sum(len(one) - 1 for one in CONTEXTS.values()) + sum(len(after) for _, after in PAIRS)


def test_a_fraction_is_one_of_each_context() -> None:
    """Side by side, a batch would have one budget, that of its longest context."""
    model = loaded("torch")
    together, held = ordered(scored(Setting(model, "window(fraction=0.25)", rows=8), PAIRS))
    alone = [next(scored(Setting(model, "window(fraction=0.25)"), [pair]))[1] for pair in PAIRS]
    assert_alike(together, [(one.nats, one.greedy) for one in alone])
    assert {(one.context, one.kept_max) for one in held} == {(36, 9), (50, 13), (53, 14)}


def test_batches_are_of_like_length() -> None:
    contexts = [tuple(range(length)) for length in (1, 5, 2, 9, 1, 7)]
    setting = Setting(loaded("torch"), rows=3)
    assert [list(map(len, batch)) for batch in batches(contexts, setting)] == [[9, 7, 5], [2], [1, 1]]


@pytest.mark.parametrize("policy", ["h2o(budget=7)", "snapkv(budget=9, window=3, interval=4)"])
def test_a_followed_text_is_evicted_at_each_step(policy: str) -> None:
    model = loaded("torch")
    texts = [(TEXT[:1], TEXT[1:18]), (TEXT[31:42], TEXT[42:47]), (TEXT[60:61], TEXT[61:71])]
    pairs: list[Pair] = [(list(context), list(after)) for context, after in texts]
    found, held = ordered(followed(Setting(model, policy, rows=2), pairs))
    expected = []
    for context, continuation in pairs:
        cache: Any = model.cache(policy)
        for token in context[:-1]:
            _, cache = model.step([[token]], cache)
        expected.append(along(model, cache, [context[-1], *continuation[:-1]], continuation, evict=True))
    assert_alike(found, expected)
    assert sorted(one.context for one in held) == [10, 15, 17]


def test_chunks_of_a_followed_text() -> None:
    """All at once nothing is evicted before the end; in chunks the result lies elsewhere."""
    model, pair = loaded("torch"), (list(TEXT[:1]), list(TEXT[1:30]))
    full, whole, chunks, single = (
        next(followed(Setting(model, policy), [pair], chunk))[1].nats
        for policy, chunk in (
            ("full()", 1),
            ("window(budget=6)", 64),
            ("window(budget=6)", 7),
            ("window(budget=6)", 1),
        )
    )
    assert whole == pytest.approx(full, rel=1e-5)
    assert len({round(value, 3) for value in (whole, chunks, single)}) == 3


@pytest.mark.parametrize(
    ("policy", "chunk", "message"),
    [
        ("h2o(fraction=0.5)", 1, "takes a fraction of a prompt"),
        ("kvzip(budget=9)", 1, "reads a prompt a second time"),
        ("full()", 0, "chunk is 0; expected at least 1"),
    ],
)
def test_what_cannot_be_followed(policy: str, chunk: int, message: str) -> None:
    with pytest.raises(KvtwinError, match=message):
        next(followed(Setting(loaded("torch"), policy), [(TEXT[:1], TEXT[1:9])], chunk))


@pytest.mark.parametrize("pair", [(b"", b"x"), (b"x", b"")])
@pytest.mark.parametrize("score", [scored, followed])
def test_nothing_is_no_text(score: Any, pair: Pair) -> None:
    with pytest.raises(KvtwinError, match="expected at least 1 of each"):
        list(score(Setting(loaded("torch")), [(b"ab", b"c"), pair]))


# What is written.

BEGUN = [TEXT[:37], TEXT[40:94], TEXT[100:101], TEXT[40:94]]
ROOM = 9


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a text is several."""
    monkeypatch.setattr(until, "PIECE", 4)


def by_hand(model: Model, context: bytes, policy: str, room: int = ROOM) -> str:
    """The largest logit at each step, under the policy."""
    cache, new = model.cache(policy), []
    if len(context) > 1:
        _, cache = model.step([list(context[:-1])], cache)
    token = context[-1]
    for _ in range(room):
        logits, cache = model.step([[token]], cache)
        token = int(logits[0, 0].argmax())
        new.append(token)
    return bytes(new).decode(errors="replace")


@slow_flax
@pytest.mark.parametrize("policy", ["full()", SNAPKV])
def test_what_is_written_is_what_single_steps_choose(policy: str, backend: str) -> None:
    model = loaded(backend)
    texts, held = ordered(written(Setting(model, policy, rows=2), BEGUN, [], ROOM))
    assert texts == [by_hand(loaded("torch"), context, policy) for context in BEGUN]
    assert sorted(one.context for one in held) == [36, 53, 53]


def test_a_stop_string_ends_a_text() -> None:
    """Each text ends where it meets a stop string first, and only that one."""
    model = loaded("torch")
    texts = [by_hand(model, context, SNAPKV, 14) for context in BEGUN]
    stops = [texts[0][2:4], texts[1][9:12], "never written"]
    found, _ = ordered(written(Setting(model, SNAPKV, rows=3), BEGUN, stops, 14))
    assert found == [cut(text, stops) for text in texts]
    assert len(found[0]) <= 2
    assert len(found[1]) < len(texts[1])


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        ([], "ab\ncd"),
        (["\n"], "ab"),
        (["d", "b"], "a"),
        ([""], "ab\ncd"),
        (["x", "cd"], "ab\n"),
        (["ab"], ""),
    ],
)
def test_cutting(stops: list[str], expected: str) -> None:
    assert cut("ab\ncd", stops) == expected


def test_a_stop_token_ends_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded("torch")
    texts = [by_hand(model, context, "full()") for context in BEGUN]
    stop = texts[1][6]
    monkeypatch.setattr(model, "spec", replace(model.spec, stop=(ord(stop),)))
    found, _ = ordered(written(Setting(model), BEGUN, [], ROOM))
    assert found == [text.partition(stop)[0] for text in texts]


def test_nothing_is_written_behind_a_stop_string(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first piece of four tokens has one, so that no second piece is asked for."""
    model, steps = loaded("torch"), []
    [whole] = ordered(written(Setting(model), BEGUN[:1], [], ROOM))[0]
    decode = model.decode

    def counted(cache: Any, logits: Any, sampling: Any, stop: Any, count: int, **options: Any) -> Any:
        steps.append(count)
        return decode(cache, logits, sampling, stop, count, **options)

    monkeypatch.setattr(model, "decode", counted)
    assert ordered(written(Setting(model), BEGUN[:1], [whole[2]], ROOM))[0] == [whole.partition(whole[2])[0]]
    assert steps == [4]


def test_sampling_is_the_same_on_both_calls_and_not_greedy(monkeypatch: pytest.MonkeyPatch) -> None:
    model, hot = loaded("torch"), Sampling(temperature=1.5, seed=3)
    first, second, other = (
        ordered(written(Setting(model, SNAPKV), BEGUN, [], ROOM, sampling))[0]
        for sampling in (hot, hot, Sampling(temperature=1.5, seed=4))
    )
    assert first == second
    assert first != other
    monkeypatch.setattr(until, "PIECE", 64)
    assert ordered(written(Setting(model, SNAPKV), BEGUN, [], ROOM, hot))[0] == first
    assert first != ordered(written(Setting(model, SNAPKV), BEGUN, [], ROOM))[0]
    assert ordered(written(Setting(model, SNAPKV), BEGUN, [], ROOM, Sampling(temperature=1.5, top_k=1)))[
        0
    ] == [by_hand(model, context, SNAPKV) for context in BEGUN]


@pytest.mark.parametrize(
    ("contexts", "room", "message"), [([b"ab"], 0, "room for 0"), ([b"ab", b""], 3, "no token")]
)
def test_nothing_to_write(contexts: list[bytes], room: int, message: str) -> None:
    with pytest.raises(KvtwinError, match=message):
        next(written(Setting(loaded("torch")), contexts, [], room))
