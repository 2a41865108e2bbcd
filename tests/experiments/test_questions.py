"""Every question: its cases by the rules of the benchmark that it follows, read back from the text, and bad input."""

import json
import re
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from uuid import UUID

import numpy as np
import pytest
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from backends import backends
from experiments.question import Setting, questions
from experiments.recall import Case, Recall, Turn, fitted, found
from experiments.text import held_out
from framework.backend import Model
from framework.errors import KvtwinError
from framework.tokenizer import ByteTokenizer, Tokenizer, tokenizer
from framework.weights import write
from tests.tiny import tiny_config, tiny_model

NOISE = {
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
}
# What is asked of a context, each at a length that it needs in bytes.
RECALLS = (
    "passkey(length=400)",
    "mqar(length=300, queries=3)",
    "niah(length=400)",
    "niah(length=600, haystack='text', keys=4, queries=4)",
    "niah(length=600, haystack='text', values=4, values_are='uuids')",
    "niah(length=700, haystack='needles', keys_are='uuids', values_are='uuids')",
    "copy(length=300)",
    "vt(length=600)",
    "vt(length=900, chains=3, hops=2)",
    "cwe(length=2000)",
    "cwe(length=600, words=3, example=False)",
    "fwe(length=700)",
    "turns(length=300)",
    "instructions(length=500)",
)
READINGS = ("perplexity", "fidelity", "memory", "speed", "drift", "regret")
FILLER = 130  # bytes of the longest unit of filler: a needle with two uuids, or a line of text

every_recall = pytest.mark.parametrize("spelling", RECALLS)


def recall(spelling: str) -> Recall:
    made = questions.make(spelling)
    assert isinstance(made, Recall)
    return made


def drawn(spelling: str, seed: int = 0) -> Case:
    return recall(spelling).draw(ByteTokenizer(), seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny Llama with a byte-level BPE tokenizer of 400 tokens, which begins every text with <s>."""
    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator([held_out()[:20_000]], trainer)
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder = tmp_path_factory.mktemp("models") / "tiny"
    config = tiny_config("llama", 0) | {"vocab_size": 400}
    write(folder, *tiny_model("llama", 5, config, np.float32))
    fast.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(params=["bytes", "bpe"])
def text_to_tokens(request: pytest.FixtureRequest, folder: Path) -> Tokenizer:
    return ByteTokenizer() if request.param == "bytes" else tokenizer(folder)


def test_every_file_is_tested() -> None:
    named = {spelling.partition("(")[0] for spelling in RECALLS}
    assert named | set(READINGS) == set(questions.names())


@pytest.mark.parametrize("name", questions.names())
def test_measures_have_names_and_only_some_are_not_drawn_by_seed(name: str) -> None:
    made = questions.get(name)
    names = [measure.name for measure in made.measures]
    assert names
    assert len(set(names)) == len(names)
    assert {measure.better for measure in made.measures} <= {"higher", "lower", None}
    assert made.measures[0].better is not None
    assert made.seeded == (name not in ("memory", "speed"))


# Cases.


@every_recall
def test_a_seed_gives_one_case_and_others_give_others(spelling: str) -> None:
    assert drawn(spelling, 3) == drawn(spelling, 3)
    contexts = {drawn(spelling, seed).context for seed in range(6)}
    assert len(contexts) == 6


def test_questions_of_one_form_draw_apart() -> None:
    one, other = drawn("mqar(length=300, queries=4)"), drawn("turns(length=300)")
    assert one.context != other.context


@every_recall
def test_the_length_is_nearly_reached_and_never_exceeded(spelling: str, text_to_tokens: Tokenizer) -> None:
    """Counted by hand: the context with its opening token, and what follows it without, each answer with its line."""
    asked = recall(spelling)
    case = asked.draw(text_to_tokens, 1)
    count = len(text_to_tokens.encode(case.context))
    for turn in case.turns:
        for text in (turn.text, turn.wanted + "\n"):
            count += len(text_to_tokens.encode(text, opening=False))
    assert asked.length - FILLER < count <= asked.length


@every_recall
@pytest.mark.parametrize("seed", range(3))
def test_answers_are_in_the_context_and_not_in_the_question(spelling: str, seed: int) -> None:
    case = drawn(spelling, seed)
    asked = "".join(turn.text for turn in case.turns)
    for turn in case.turns:
        assert turn.answers
        assert len(set(turn.answers)) == len(turn.answers)
        for answer in turn.answers:
            assert answer in case.context
            assert answer not in asked
        assert found(turn, turn.wanted) == 1
        assert turn.wanted.startswith(" ")
        assert not turn.text.startswith("\n")
    assert case.context.endswith("\n")  # so that a question begins a line


@pytest.mark.parametrize("seed", range(4))
def test_fitted_finds_the_largest_case(seed: int) -> None:
    random = np.random.default_rng(seed)
    counts = np.cumsum(random.integers(1, 9, 1000)) + 50

    def case(size: int) -> Case:
        return Case(str(size), ())

    for length in (counts[0], counts[0] + 1, *random.integers(counts[0], counts[400], 20)):
        best = fitted(case, lambda one: int(counts[int(one.context)]), int(length))
        assert int(best.context) == np.flatnonzero(counts <= length)[-1]
    with pytest.raises(KvtwinError, match=f"has {counts[0]} tokens; expected at most length={counts[0] - 1}"):
        fitted(case, lambda one: int(counts[int(one.context)]), int(counts[0] - 1))


@pytest.mark.parametrize(
    ("said", "score"),
    [
        (" 1234567.\nabc-def", 1.0),
        ("ABC-DEF", 0.5),
        ("1234567", 0.5),
        ("123456", 0.0),
        ("abc-de f", 0.0),
        ("xx1234567yABC-defz", 1.0),
        ("", 0.0),
    ],
)
def test_the_score_is_the_share_of_answers_that_occur(said: str, score: float) -> None:
    assert found(Turn("", ("1234567", "abc-def")), said) == score


@pytest.mark.parametrize(
    ("turn", "wanted"),
    [
        (Turn("", ("a", "b")), " a b"),
        (Turn("", ("a", "b"), ", "), " a, b"),
        (Turn("", ("a", "b"), numbered=True), " 1. a 2. b"),
    ],
)
def test_what_a_model_that_knows_would_write(turn: Turn, wanted: str) -> None:
    assert turn.wanted == wanted


# Rules of the benchmarks, read back from the text.


@pytest.mark.parametrize("seed", range(3))
def test_passkey(seed: int) -> None:
    case = drawn("passkey(length=400)", seed)
    task, *lines = case.context.splitlines()
    assert task == (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it."
    )
    [key] = [line for line in lines if line not in NOISE]
    number = re.fullmatch(r"The pass key is (\d+)\. Remember it\. (\d+) is the pass key\.", key)
    assert number
    assert number[1] == number[2] == case.turns[0].answers[0]
    assert 1 <= int(number[1]) <= 50_000
    assert [turn.text for turn in case.turns] == ["What is the pass key? The pass key is"]


def check_pairs(case: Case, pairs: int, queries: int) -> None:
    lines = case.context.splitlines()
    held = dict(line.split(": ") for line in lines if ":" in line)
    assert len(held) == sum(":" in line for line in lines) == pairs
    assert all(re.fullmatch("[a-z]{4}", word) for pair in held.items() for word in pair)
    assert all(re.fullmatch("[a-z]{4}( [a-z]{4}){2}", line) for line in lines if ":" not in line)
    keys = [turn.text.removesuffix(":") for turn in case.turns]
    assert len(set(keys)) == len(keys) == queries
    assert [turn.answers for turn in case.turns] == [(held[key],) for key in keys]


@pytest.mark.parametrize("seed", range(3))
def test_mqar(seed: int) -> None:
    check_pairs(drawn("mqar(length=300, queries=3)", seed), 8, 3)


@pytest.mark.parametrize("seed", range(3))
def test_turns(seed: int) -> None:
    asked = recall("turns(length=300)")
    case = asked.draw(ByteTokenizer(), seed)
    check_pairs(case, 8, 4)
    assert asked.marks(case, [1.0, 0.0, 0.0, 0.5]) == {"score": 0.375, "first": 1.0, "last": 0.5}


KIND = {"numbers": r"\d{7}", "words": "[a-z]+-[a-z]+", "uuids": "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"}
NEEDLE = r"One of the special magic {values} for ({key}) is: ({value})\."


@pytest.mark.parametrize(
    ("options", "haystack", "keys", "values", "queries", "key", "value"),
    [
        ("", "noise", 1, 1, 1, "words", "numbers"),
        ("haystack='text'", "text", 1, 1, 1, "words", "numbers"),
        ("haystack='text', values_are='uuids'", "text", 1, 1, 1, "words", "uuids"),
        ("haystack='text', keys=4", "text", 4, 1, 1, "words", "numbers"),
        ("haystack='needles'", "needles", 1, 1, 1, "words", "numbers"),
        (
            "haystack='needles', keys_are='uuids', values_are='uuids'",
            "needles",
            1,
            1,
            1,
            "uuids",
            "uuids",
        ),
        ("haystack='text', values=4", "text", 1, 4, 1, "words", "numbers"),
        ("haystack='text', keys=4, queries=4", "text", 4, 1, 4, "words", "numbers"),
    ],
)
def test_needles(
    options: str, haystack: str, keys: int, values: int, queries: int, key: str, value: str
) -> None:
    """RULER's eight tasks: needles of a form, in a haystack of a kind, and what is asked for."""
    case = drawn(f"niah(length=900, {options})", 2)
    form = re.compile(NEEDLE.format(values=value, key=KIND[key], value=KIND[value]))
    lines = case.context.splitlines()
    needles = [match.groups() for line in lines if (match := form.fullmatch(line))]
    hay = [line for line in lines if not form.fullmatch(line)]
    held: dict[str, list[str]] = {}
    for name, number in needles:
        held.setdefault(name, []).append(number)
    asked = [re.search(f"for ({KIND[key]}) (?:is|are):$", turn.text) for turn in case.turns]
    names = [match[1] for match in asked if match]
    assert len(set(names)) == len(names) == len(case.turns) == queries
    assert [list(turn.answers) for turn in case.turns] == [held[name] for name in names]
    assert all(len(held[name]) == values for name in names)
    if haystack == "needles":
        assert not hay
        assert len(held) == len(needles) > 5
    else:
        assert len(needles) == keys * values
        assert len(held) == keys
    if haystack == "noise":
        assert set(hay) == NOISE
    if haystack == "text":
        every = [line for line in held_out().splitlines() if line.strip()]
        places = [number for number, line in enumerate(every) if line == hay[0]]
        assert any((every + every)[place : place + len(hay)] == hay for place in places)
    if value == "uuids":
        assert {UUID(number).version for _, number in needles} == {4}


def test_no_needle_of_the_haystack_has_a_key_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments.questions import niah

    few = [f"key-{letter}" for letter in "abcdefghijklmnop"]
    monkeypatch.setitem(niah.MADE, "words", lambda random, count: random.choice(few, count).tolist())
    for seed in range(20):
        case = drawn("niah(length=900, haystack='needles')", seed)
        [name] = re.findall(r"for (key-\w) is:$", case.turns[0].text)
        assert case.context.count(f"for {name} is:") == 1


@pytest.mark.parametrize(("chains", "hops"), [(1, 4), (3, 2)])
@pytest.mark.parametrize("seed", range(3))
def test_variables_are_those_that_a_reader_of_the_text_finds(chains: int, hops: int, seed: int) -> None:
    case = drawn(f"vt(length=900, chains={chains}, hops={hops})", seed)
    known: dict[str, str] = {}
    for line in case.context.splitlines():
        if line in NOISE:
            continue
        match = re.fullmatch(r"VAR ([A-Z]{5}) = (?:VAR ([A-Z]{5})|(\d{5}))", line)
        assert match
        assert match[1] not in known
        known[match[1]] = match[3] or known[match[2]]  # what is assigned was said before
    [turn] = case.turns
    number = re.search(r"assigned the value (\d{5}) in the text above", turn.text)
    assert number
    assert len(known) == chains * (hops + 1)
    assert list(turn.answers) == [name for name, value in known.items() if value == number[1]]
    assert len(turn.answers) == hops + 1


CWE = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n"
)


def listed(text: str) -> list[str]:
    """The words of a numbered list, whose numbers are checked."""
    parts = text.split(" ")
    assert parts[::2] == [f"{number}." for number in range(1, len(parts) // 2 + 1)]
    return parts[1::2]


@pytest.mark.parametrize(
    ("spelling", "often", "seldom", "shown"),
    [
        ("cwe(length=2000)", 6, 1, (20, 3, 1)),
        ("cwe(length=9000)", 30, 3, (40, 10, 3)),
        ("cwe(length=700, words=4, example=False)", 6, 1, None),
    ],
)
def test_common_words(spelling: str, often: int, seldom: int, shown: tuple[int, int, int] | None) -> None:
    places = []
    for seed in (0, 5):
        case = drawn(spelling, seed)
        [turn] = case.turns
        empty, *front, last = case.context.split(CWE)
        every = listed(last.removesuffix("\n"))
        counts = Counter(every)
        common = sorted(word for word, count in counts.items() if count == often)
        assert common == sorted(turn.answers)
        assert set(counts.values()) == {often, seldom}
        assert len(common) == int(re.findall(r"the (\d+) most common", turn.text)[0])
        places.append([word in common for word in every])
        assert empty == ""
        assert len(front) == (shown is not None)
        if shown:
            text, answer = front[0].removesuffix("\n").split(turn.text)
            example = Counter(listed(text.removesuffix("\n")))
            assert len(example) == shown[0]
            assert sorted(listed(answer.strip())) == sorted(
                word for word, count in example.items() if count == shown[1]
            )
            assert set(example.values()) == {shown[1], shown[2]}
    count = min(map(len, places))
    assert len(places[0]) != len(places[1]) or places[0][:count] == places[1][:count]  # one order for all


@pytest.mark.parametrize("length", [520, 700, 1500])
@pytest.mark.parametrize("seed", range(3))
def test_frequent_words(length: int, seed: int) -> None:
    """Counts fall as n k^-2 / zeta(2), for one n; the dots are rank 1, the answer ranks 2 to 4."""
    case = drawn(f"fwe(length={length})", seed)
    head = (
        "Read the following coded text and track the frequency of each coded word. "
        "Find the three most frequently appeared coded words. "
    )
    assert case.context.startswith(head)
    counts = Counter(case.context.removeprefix(head).removesuffix("\n").split(" "))
    zeta = sum(k**-2.0 for k in range(1, 100_000)) + 1e-5
    ranks = range(1, length // 50 + 1)

    def falling(total: int) -> list[int]:
        return [count for k in ranks if (count := int(total * k**-2.0 / zeta)) > 0]

    every = sorted(counts.values(), reverse=True)
    assert every in [falling(total) for total in range(4, length)]
    assert every[3] > (every + [0])[4]
    assert counts["..."] == every[0]
    ranked = sorted(counts, key=lambda word: -counts[word])
    assert set(case.turns[0].answers) == set(ranked[1:4])
    assert all(re.fullmatch("[a-z]{6}", word) for word in counts if word != "...")


def test_the_fourth_word_is_never_as_frequent_as_the_fifth() -> None:
    """Whatever the amount of filler: between 41 and 52 words in all both would come once."""
    asked = recall("fwe(length=520)")
    for size in range(40):
        case = asked.case(np.random.default_rng(size), size)
        counts = Counter(case.context.strip().partition(" coded words. ")[2].split(" "))
        every = [*sorted(counts.values(), reverse=True), 0]
        assert every[3] > every[4]


def test_one_order_for_all_frequent_words() -> None:
    """The words differ by seed, their places do not."""
    first, second = (
        drawn("fwe(length=700)", seed).context.strip().partition(" coded words. ")[2].split(" ")
        for seed in (0, 4)
    )
    assert [first.index(word) for word in first] == [second.index(word) for word in second]
    assert first != second


@pytest.mark.parametrize("seed", range(3))
def test_copies(seed: int) -> None:
    case = drawn("copy(length=300, words=5, given=3, width=6)", seed)
    [turn] = case.turns
    cue, words = turn.text.split(" "), case.context.strip().split(" ")
    assert len(cue) == 3
    assert len(set(words)) == len(words)
    begin = words.index(cue[0])
    assert words[begin : begin + 8] == [*cue, *turn.answers]


@pytest.mark.parametrize("rules", [2, 5, 6])
def test_instructions_ask_for_one_rule_of_each_half(rules: int) -> None:
    asked, orders = recall(f"instructions(length=500, rules={rules})"), set()
    for seed in range(8):
        case = asked.draw(ByteTokenizer(), seed)
        stated = dict(re.findall(r"^Rule (\d+): always answer (\w+-\w+)\.$", case.context, re.MULTILINE))
        lines = case.context.splitlines()
        assert [line[:6] for line in lines[:rules]] == [f"Rule {number}" for number in range(1, rules + 1)]
        numbers = [re.findall(r"Rule (\d+): always answer$", turn.text)[0] for turn in case.turns]
        assert [turn.answers for turn in case.turns] == [(stated[number],) for number in numbers]
        early = [int(number) <= rules // 2 for number in numbers]
        assert sorted(early) == [False, True]
        orders.add(tuple(early))
        scores = [1.0, 0.0]
        marks = asked.marks(case, scores)
        assert marks == {
            "score": 0.5,
            "first_half": scores[early.index(True)],
            "second_half": scores[early.index(False)],
        }
    assert len(orders) == 2


# Bad input.


@pytest.mark.parametrize(
    ("spelling", "words"),
    [
        ("mqar(queries=9)", "pairs=8, queries=9"),
        ("mqar(queries=0)", "queries=0"),
        ("turns(pairs=3)", "pairs=3, queries=4"),
        ("copy(given=0)", "given=0"),
        ("vt(chains=0)", "chains=0"),
        ("niah(keys=2, queries=3)", "queries=3"),
        ("niah(haystack='hay')", "haystack='hay'"),
        ("cwe(words=0)", "words=0"),
        ("instructions(rules=1)", "rules=1"),
        ("perplexity(length=64)", "length=64, context=None"),
        ("perplexity(length=100, context=99)", "length=100, context=99"),
        ("fidelity(length=100, context=100)", "context=100"),
        ("regret(length=100, context=0)", "context=0"),
        ("drift(length=100, context=84)", "context=84"),
        ("speed(length=100, context=90)", "context=90"),
    ],
)
def test_what_cannot_be_asked_is_refused(spelling: str, words: str) -> None:
    with pytest.raises(KvtwinError, match=re.escape(words)):
        questions.make(spelling)


@every_recall
def test_a_length_too_short_is_refused(spelling: str) -> None:
    asked = replace(recall(spelling), length=30)
    with pytest.raises(
        KvtwinError, match=r"a case without filler has \d+ tokens; expected at most length=30"
    ):
        asked.draw(ByteTokenizer(), 0)


@cache
def loaded(folder: Path) -> Model:
    return backends.get("torch").load(folder)


def tiny(folder: Path, policy: str = "full()") -> Setting:
    return Setting(loaded(folder), policy, "full()", backends.get)


@pytest.mark.parametrize("name", questions.names())
def test_more_tokens_than_the_model_has_positions_for(name: str, folder: Path) -> None:
    setting = tiny(folder)
    length = setting.model.spec.positions + 1
    with pytest.raises(KvtwinError, match=rf"length={length}; expected at most {length - 1}, the positions"):
        questions.make(f"{name}(length={length})").ask(setting, [0])


@pytest.mark.parametrize("name", READINGS)
def test_more_tokens_than_the_held_out_text(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments import reading

    reading._encoded.cache_clear()
    monkeypatch.setattr(reading, "held_out", lambda: held_out()[:300])
    setting = tiny(folder)
    with pytest.raises(KvtwinError, match=r"length=400; expected 2 to \d+, the tokens of the held-out text"):
        questions.make(f"{name}(length=400)").ask(setting, [0])
    reading._encoded.cache_clear()


def test_no_room_is_refused(folder: Path) -> None:
    with pytest.raises(KvtwinError, match="room=0"):
        questions.make("copy(length=300, room=0)").ask(tiny(folder), [0])


# Any folder.


@pytest.mark.parametrize(
    "spelling",
    [
        "passkey(length=300)",
        "turns(length=300)",
        "instructions(length=400)",
        "perplexity(length=120, context=100)",
        "fidelity(length=120, context=100)",
        "regret(length=120, context=100)",
        "memory(length=120)",
        "speed(length=120, context=100)",
    ],
)
def test_a_folder_with_a_tokenizer_of_its_own(spelling: str, folder: Path) -> None:
    setting, asked = tiny(folder, "window(fraction=0.25)"), questions.make(spelling)
    answers = asked.ask(setting, [3, 1])
    assert [answer.seed for answer in answers] == [3, 1]
    for answer in answers:
        assert set(answer.measures) >= {measure.name for measure in asked.measures}
        assert all(np.isfinite(value) for value in answer.measures.values())
        assert answer.held
        assert answer.held.flags == ()
        assert answer.held.requested
        assert 0.2 * asked.length < answer.held.requested == answer.held.kept < 0.3 * asked.length


def test_places_of_a_needle_vary() -> None:
    """The answer stands at every depth of the context: in each third within 30 seeds."""
    depths = [
        (case := drawn("niah(length=400)", seed)).context.index(case.turns[0].answers[0]) / len(case.context)
        for seed in range(30)
    ]
    assert {int(3 * depth) for depth in depths} == {0, 1, 2}
