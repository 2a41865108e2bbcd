"""What asking does: the same text as generation, rows by themselves, the order of events, and what the cache held."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from backends import backends
from experiments.held import held_by
from experiments.question import Setting, questions
from experiments.recall import Case, Recall, Turn
from framework.arrays import FAR
from framework.backend import Model
from framework.cache import Cache
from framework.decode import Sampling
from framework.generate import prefill
from framework.models import recall_form
from tests.twins import compilations, hybrid, unchecked

pytestmark = pytest.mark.usefixtures("no_type_checks")  # rows of a hundred steps
SEEDS = (4, 0, 7)
LINE = 10  # ends an answer
every_backend = pytest.mark.parametrize("backend", ["torch", pytest.param("flax", marks=pytest.mark.slow)])
# Policies with memory, with queries, with budgets per head and per layer, and with a second pass.
POLICIES = (
    "full()",
    "window(fraction=0.25)",
    "h2o(budget=40)",
    "snapkv(budget=40, window=8)",
    "adakv(budget=40, policy=snapkv(window=8))",
    "cake(budget=40, policy=snapkv(window=8))",
    "kvzip(budget=40)",
)


@pytest.fixture
def no_type_checks() -> Iterator[None]:
    with unchecked():
        yield


@cache
def loaded(backend: str) -> Model:
    return backends.get(backend).load("bytes")


def setting(policy: str, backend: str = "torch", model: Model | None = None) -> Setting:
    return Setting(model or loaded(backend), policy, "full()", loaded)


@dataclass(frozen=True, kw_only=True)
class Ragged(Recall):
    """Contexts whose lengths differ by seed, and two turns."""

    length: int = 200

    def case(self, random: np.random.Generator, size: int) -> Case:
        count = int(random.integers(3, 9))
        words = ["def", "return", "import", "class", "print", "raise", "while", "yield", "None"]
        text = " ".join(random.choice(words, 10 * count))
        first, second = random.choice(words, 2)
        return Case(text + "\n", (Turn(first, ("x",)), Turn(f"{second} {first}", ("y",))))

    def draw(self, tokenizer: Any, seed: int) -> Case:
        return self.case(np.random.default_rng(seed), 0)


def by_hand(asked: Recall, policy: str, seed: int, room: int) -> list[str]:
    """What the model says at each turn, from one row and the parts that generation is made of."""
    model = loaded("torch")
    case = asked.draw(model.tokenizer, seed)
    context = model.tokenizer.encode(case.context)
    first = model.tokenizer.encode(case.turns[0].text, opening=False)
    question = [first] if asked.aware else None
    held, logits = prefill(model, [context], None, policy, "full()", 99, None, "prompt", None, question)
    said = []
    for number, turn in enumerate(case.turns):
        if number or not asked.aware:
            row = model.tokenizer.encode(turn.text, opening=False)
            out, held = model.step([row], held, phase="decode")
            logits = out[:, 0]
        new, _, held = model.decode(held, logits, Sampling(), [LINE], room)
        said.append(model.tokenizer.decode([int(token) for token in new[0] if token not in (-1, LINE)]))
    return said


@pytest.mark.parametrize(
    ("policy", "aware"),
    [
        ("full()", False),
        ("window(fraction=0.25)", False),
        ("adakv(budget=40, policy=snapkv(window=8))", False),
        ("finch(budget=40)", True),
        *(
            pytest.param(policy, aware, marks=pytest.mark.slow)
            for policy in POLICIES
            for aware in (False, True)
        ),
    ],
)
def test_a_batch_says_what_each_row_says_by_itself(policy: str, aware: bool) -> None:
    """Rows of other lengths, padded; a fraction is one of the longest row, so it is given as tokens to the others."""
    asked = Ragged(aware=aware, room=6)
    answers = asked.ask(setting(policy), SEEDS)
    assert answers[0].held
    assert len({answer.held.context for answer in answers if answer.held}) > 1
    if "fraction" in policy:
        longest = max(answer.held.context for answer in answers if answer.held)
        assert answers[0].held.requested == -(-longest // 4)
        policy = f"window(budget={answers[0].held.requested:.0f})"
    for answer in answers:
        assert answer.said == "\n".join(by_hand(asked, policy, answer.seed, 6))


def test_under_the_full_cache_it_is_generation() -> None:
    model, asked = loaded("torch"), questions.make("passkey(length=300, room=12)")
    [answer] = asked.ask(setting("full()"), [2])
    case = asked.draw(model.tokenizer, 2)
    made = model.generate(case.context + case.turns[0].text, max_new_tokens=12, stop=[LINE])
    assert made.text == [answer.said]


def test_aware_is_generation_with_a_question() -> None:
    model, asked = loaded("torch"), questions.make("passkey(length=300, room=12, aware=True)")
    [answer] = asked.ask(setting("finch(budget=60)"), [2])
    case = asked.draw(model.tokenizer, 2)
    made = model.generate(
        case.context,
        question=case.turns[0].text,
        policy="finch(budget=60)",
        max_new_tokens=12,
        stop=[LINE],
    )
    assert made.text == [answer.said]


@pytest.mark.slow
@pytest.mark.parametrize("policy", [POLICIES[1], POLICIES[4], POLICIES[6]])
def test_both_backends_say_the_same(policy: str) -> None:
    asked = Ragged(room=6)
    ours, theirs = (asked.ask(setting(policy, backend), SEEDS[:2]) for backend in ("torch", "flax"))
    assert [each.said for each in ours] == [each.said for each in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.held
        assert other.held
        assert replace(one.held, allocated=0) == replace(other.held, allocated=0)


# The order of events.


class Watched:
    """A model that notes every call: tokens of each row, whether it evicts, where questions begin, what stays."""

    def __init__(self, model: Model) -> None:
        self.model, self.calls = model, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def step(self, tokens: Any, cache: Cache, **options: Any) -> Any:
        marks = cache.question.tolist()
        out, after = self.model.step(tokens, cache, **options)
        given = (np.asarray(tokens) >= 0).sum(1).tolist()
        self.calls.append(("step", given, options.get("evict", True), marks, after.kept[0]))
        return out, after

    def decode(self, cache: Cache, logits: Any, sampling: Any, stop: Any, steps: int) -> Any:
        marks = cache.question.tolist()
        new, out, after = self.model.decode(cache, logits, sampling, stop, steps)
        self.calls.append(("decode", (new >= 0).sum(1).tolist(), True, marks, after.kept[0]))
        return new, out, after


def sizes(asked: Recall) -> tuple[list[int], list[list[int]]]:
    """Tokens of the contexts, and of the questions of each turn."""
    cases = [asked.draw(loaded("torch").tokenizer, seed) for seed in SEEDS]
    return [len(case.context) for case in cases], [
        [len(case.turns[number].text) for case in cases] for number in (0, 1)
    ]


def newest(kept: np.ndarray, seen: Sequence[int], budget: int) -> bool:
    """Whether every head holds the newest tokens of its row, and no others."""
    return all(
        kept[row, head].tolist() == list(range(count - budget, count))
        for row, count in enumerate(seen)
        for head in range(kept.shape[1])
    )


def test_the_context_is_compressed_before_it_is_asked_for() -> None:
    watched, asked = Watched(loaded("torch")), Ragged(room=6)
    asked.ask(setting("window(budget=20, sinks=0)", model=watched), SEEDS)
    contexts, (first, second) = sizes(asked)
    kinds = ["step", "step", "decode", "step", "decode"]
    assert [call[0] for call in watched.calls] == kinds
    assert [call[1] for call in watched.calls if call[0] == "step"] == [contexts, first, second]
    assert all(call[2] for call in watched.calls)
    assert all(call[3] == [FAR] * 3 for call in watched.calls)
    seen = np.cumsum([call[1] for call in watched.calls], axis=0)
    assert [newest(call[4], count, 20) for call, count in zip(watched.calls, seen, strict=True)] == [True] * 5


def test_an_aware_policy_sees_the_first_question_before_it_compresses() -> None:
    watched, asked = Watched(loaded("torch")), Ragged(room=6, aware=True)
    answers = asked.ask(setting("finch(budget=30)", model=watched), SEEDS)
    contexts, (first, second) = sizes(asked)
    both = [one + other for one, other in zip(contexts, first, strict=True)]
    assert [call[0] for call in watched.calls] == ["step", "decode", "step", "decode"]
    assert [call[1] for call in watched.calls if call[0] == "step"] == [both, second]
    assert all(call[3] == contexts for call in watched.calls)
    assert [answer.held.context for answer in answers if answer.held] == both
    for row, (begin, end) in enumerate(zip(contexts, both, strict=True)):
        assert all(set(range(begin, end)) <= set(head.tolist()) for head in watched.calls[0][4][row])


# What was held.


def held_of(policy: str, backend: str = "torch", codec: str = "full()", counts: Sequence[int] = (70, 90, 55)):
    """What `held_by` says after contexts of these lengths, and the cache."""
    model = loaded(backend)
    rows = [list(range(30, 30 + count)) for count in counts]
    cache, _ = prefill(model, rows, None, policy, codec, 8, None, "prompt")
    return held_by(model, cache, counts), cache


@every_backend
@pytest.mark.parametrize(
    ("policy", "codec"),
    [
        ("full()", "full()"),
        ("window(budget=20)", "full()"),
        ("h2o(budget=(20, 10, 30, (8, 16)))", "full()"),
        ("h2o(budget=20)", "int8()"),
        ("adakv(budget=20, policy=snapkv(window=8))", "full()"),
        ("threshold(budget=30, least=0.05, policy=h2o())", "full()"),
    ],
)
def test_what_was_held_is_counted_from_the_cache(backend: str, policy: str, codec: str) -> None:
    """Tokens by loops over the positions, bytes from those of the whole cache: heads are 32 wide, in 4 layers of 2."""
    found, cache = held_of(policy, backend, codec)
    one_token = (cache.bytes.payload + cache.bytes.scales) / sum((x >= 0).sum() for x in cache.kept)
    for row, held in enumerate(found):
        each = [
            sum(position >= 0 for position in head) for layer in cache.kept for head in layer[row].tolist()
        ]
        assert len(each) == 8
        assert (held.kept_min, held.kept_max) == (min(each), max(each))
        assert held.kept == pytest.approx(sum(each) / 8)
        assert held.payload == pytest.approx(sum(each) * one_token, abs=1)
        assert held.allocated == cache.bytes.capacity // 3
        assert held.context == (70, 90, 55)[row]
        assert held.full == held.context * 8 * 32 * 2 * 4
    asked = {"full()": None, "h2o(budget=(20, 10, 30, (8, 16)))": 18}
    budget = 30 if policy.startswith("threshold") else 20
    assert {held.requested for held in found} == {asked.get(policy, budget)}
    if codec == "full()":
        assert one_token == 256


@every_backend
@pytest.mark.parametrize(
    ("policy", "flags"),
    [
        ("full()", [(), (), ()]),
        ("window(budget=20)", [(), (), ()]),
        ("window(budget=55)", [(), (), ("never_fired",)]),
        ("window(budget=60)", [(), (), ("never_fired",)]),
        ("window(budget=200)", [("never_fired",)] * 3),
        ("h2o(budget=(96, 96, 96, 30))", [(), (), ()]),
        ("threshold(budget=40, least=1e9, policy=key_norm())", [("missed_budget",)] * 3),
        ("threshold(budget=40, least=-1e9, policy=key_norm())", [(), (), ()]),
        ("adakv(budget=20, policy=snapkv(window=8))", [(), (), ()]),
        ("window(budget=20, interval=4)", [(), (), ()]),
    ],
)
def test_flags(backend: str, policy: str, flags: list[tuple[str, ...]]) -> None:
    assert [held.flags for held in held_of(policy, backend)[0]] == flags


@every_backend
def test_arrays_that_are_as_large_as_without_eviction_are_masked(backend: str) -> None:
    """64 queries of 6 heads take more than the 10 tokens that went; and the same budget without them does not."""
    plain, greedy = (
        held_of(policy, backend, counts=(70, 70))[0]
        for policy in ("window(budget=48)", "snapkv(budget=60, window=48)")
    )
    assert [held.flags for held in plain] == [()] * 2
    assert [held.flags for held in greedy] == [("masked",)] * 2


@every_backend
def test_a_sliding_window_is_no_eviction_of_the_policy(backend: str) -> None:
    """The second layer of this model keeps 11 tokens under any policy."""
    model, rows = hybrid(backend), [list(range(40)), list(range(25))]

    def flags(policy: str) -> list[tuple[str, ...]]:
        cache, _ = prefill(model, rows, None, policy, "full()", 8, None, "prompt")
        return [held.flags for held in held_by(model, cache, [40, 25])]

    assert flags("full()") == [(), ()]
    assert flags("window(budget=30)") == [(), ("never_fired",)]
    assert flags("window(budget=20)") == [(), ()]


# Shapes.


def test_questions_and_budgets_of_one_length_share_what_is_compiled() -> None:
    """After one question at one budget, other budgets of the bucket and other questions compile nothing."""

    def ask(spelling: str, policy: str) -> None:
        questions.make(spelling).ask(setting(policy, model=hybrid("flax")), SEEDS)

    ask("mqar(length=300, queries=2)", "window(budget=65)")
    with compilations() as seen:
        ask("mqar(length=300, queries=2)", "window(budget=80)")
        ask("passkey(length=300)", "window(fraction=0.28)")
        ask("copy(length=300)", "window(budget=70, sinks=4)")
        ask("turns(length=300)", "window(budget=66)")
    assert not seen


# S1: a streaming window recalls a needle of one token exactly where it lies outside the evicted block.


@dataclass(frozen=True, kw_only=True)
class Needle(Recall):
    """A prompt of the constructed model `recall`: one of its pairs is asked for."""

    length: int = 140
    room: int | None = 1
    pairs: int = 2

    def case(self, random: np.random.Generator, size: int) -> Case:
        made = recall_form.prompt(random, 2 * self.pairs + 2 + size, self.pairs)
        text = bytes(made.tokens.tolist()).decode()
        return Case(text[:-1], (Turn(text[-1], (chr(made.answer),)),))


@cache
def induction(backend: str) -> Model:
    return backends.get(backend).load("recall")


def value_position(case: Case) -> int:
    """Where the answer stands: behind the key that is asked for, which comes once."""
    return case.context.index(case.turns[0].text) + 1


@every_backend
@pytest.mark.parametrize("budget", [30, 60, 90, 120])
def test_the_needle_curve_of_a_window_is_its_analytic_value(backend: str, budget: int) -> None:
    model, seeds, sinks = induction(backend), range(30), 4
    asked = Needle()
    answers = asked.ask(Setting(model, f"window(budget={budget}, sinks={sinks})", "full()", induction), seeds)
    cases = [asked.draw(model.tokenizer, seed) for seed in seeds]
    counts = [len(case.context) for case in cases]
    expected = [
        value_position(case) < sinks or value_position(case) >= count - (budget - sinks)
        for case, count in zip(cases, counts, strict=True)
    ]
    assert set(counts) == {136}
    assert 0 < sum(expected) < len(expected)
    assert [answer.measures["score"] for answer in answers] == [float(each) for each in expected]


def test_the_whole_cache_recalls_every_needle() -> None:
    answers = Needle().ask(Setting(induction("torch"), "full()", "full()", induction), range(30))
    assert [answer.measures["score"] for answer in answers] == [1.0] * 30
