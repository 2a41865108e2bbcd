"""What the model `probe` is trained on: rows of text, of repeated segments, and of recall questions with their answers.

Each row is a line of bytes with a weight for each byte to come: 1 where it can be known, 0 where it cannot.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experiments.question import questions
from experiments.recall import Case, Recall

PRINTABLE = np.arange(32, 127)


@dataclass(frozen=True)
class Mixture:
    """A batch of `rows` rows of `tokens` bytes. `text` and `repeated` are their shares; the rest asks questions."""

    tokens: int
    rows: int
    text: float
    repeated: float


@dataclass(frozen=True)
class Batch:
    """`tokens` [rows, tokens + 1] and the weight of predicting each of the last `tokens` of a row."""

    tokens: np.ndarray
    weights: np.ndarray


def draw(mixture: Mixture, text: np.ndarray, seed: int, step: int) -> Batch:
    """The batch of a step; the same for the same seed and step."""
    random = np.random.default_rng([seed, step])
    wide = mixture.tokens + 1
    rows = []
    for row in range(mixture.rows):
        kind = (row + random.random()) / mixture.rows  # in fixed proportion, so that steps are alike
        if kind < mixture.text:
            rows.append(text_row(random, text, wide))
        elif kind < mixture.text + mixture.repeated:
            rows.append(repeated_row(random, wide))
        else:
            rows.append(question_row(random, text, wide))
    return Batch(np.stack([row for row, _ in rows]), np.stack([weights[1:] for _, weights in rows]))


def text_row(random: np.random.Generator, text: np.ndarray, wide: int) -> tuple[np.ndarray, np.ndarray]:
    """A window of the training text; every byte counts."""
    begin = int(random.integers(len(text) - wide))
    return text[begin : begin + wide].astype(np.int32), np.ones(wide, np.float32)


def repeated_row(random: np.random.Generator, wide: int) -> tuple[np.ndarray, np.ndarray]:
    """Random segments of 6 to 24 bytes, each of them several times; what counts is a segment that came before, from its
    third byte on."""
    letters = PRINTABLE if random.random() < 0.7 else np.arange(256)
    segments = [random.choice(letters, random.integers(6, 25)) for _ in range(max(2, wide // 48))]
    row: list[int] = []
    weights: list[float] = []
    seen: set[int] = set()
    while len(row) < wide:
        which = int(random.integers(len(segments)))
        row += segments[which].tolist()
        known = 1.0 if which in seen else 0.0
        weights += [0.0, 0.0, *[known] * (len(segments[which]) - 2)]
        seen.add(which)
    return np.array(row[:wide], np.int32), np.array(weights[:wide], np.float32)


def asked(random: np.random.Generator, length: int) -> Recall:
    """One of the recall questions, from easy to hard."""
    pairs = int(random.choice([1, 2, 4, 8, 8, 8, 12, 16]))
    keys = int(random.integers(1, 5))
    spelled = random.choice(
        [
            "passkey()",
            f"mqar(pairs={pairs}, queries={min(pairs, int(random.integers(1, 7)))})",
            f"mqar(pairs={pairs}, queries={min(pairs, int(random.integers(1, 7)))})",
            f"mqar(pairs={pairs}, queries={min(pairs, int(random.integers(1, 7)))}, width={random.integers(3, 6)})",
            f"niah(keys={keys}, queries={random.integers(1, keys + 1)})",
            f"niah(haystack='needles', keys={keys}, queries={random.integers(1, keys + 1)})",
            f"niah(values={random.integers(1, 5)})",
            "niah(values_are='uuids')" if random.random() < 0.5 else "niah(values_are='words', keys=2)",
            f"copy(words={random.integers(2, 9)})",
            "vt()" if random.random() < 0.7 else "vt(hops=2)",
        ]
    )
    return questions.make(f"{spelled[:-1]}{', ' if '=' in spelled else ''}length={length})")


def question_row(random: np.random.Generator, text: np.ndarray, wide: int) -> tuple[np.ndarray, np.ndarray]:
    """A context, its questions and answers; answers count, and the context a little where it is text."""
    length = int(random.integers(min(wide, max(240, wide // 3)), wide + 1))
    question = asked(random, length)
    case = question.case(random, fit(question, random, length))
    if "copy" not in type(question).__module__ and random.random() < 0.35:
        case = scattered(random, question.case(random, 0), text, length)
    row = list(case.context.encode())
    weights = [0.02] * len(row)
    for turn in case.turns:
        question_bytes, answer = turn.text.encode(), (turn.wanted + "\n").encode()
        row += [*question_bytes, *answer]
        weights += [*[0.0] * len(question_bytes), *[1.0] * len(answer)]
    filled = np.zeros(wide, np.int32)
    counted = np.zeros(wide, np.float32)
    used = min(wide, len(row))
    filled[:used], counted[:used] = row[:used], weights[:used]
    return filled, counted


def fit(question: Recall, random: np.random.Generator, length: int) -> int:
    """About how much filler fills the length: from the bytes of two sizes, which is near enough here."""
    state = random.bit_generator.state
    sizes = []
    for size in (0, 16):
        random.bit_generator.state = state
        sizes.append(bytes_of(question.case(random, size)))
    random.bit_generator.state = state
    return max(0, int((length - sizes[0]) / max(1, (sizes[1] - sizes[0]) / 16)) - 1)


def bytes_of(case: Case) -> int:
    """Bytes of a case with its answers."""
    return len(case.context) + sum(len(turn.text) + len(turn.wanted) + 1 for turn in case.turns)


def scattered(random: np.random.Generator, case: Case, text: np.ndarray, length: int) -> Case:
    """The lines of a context without filler, in their order, at random places among lines of the training text."""
    room = length - bytes_of(case) - 1
    if room < 32:
        return case
    begin = int(random.integers(len(text) - room))
    lines = text[begin : begin + room].tobytes().decode("ascii", "replace").replace("�", "?").split("\n")
    return Case(between(random, case.context.strip("\n").split("\n"), lines), case.turns)


def between(random: np.random.Generator, needles: Sequence[str], lines: Sequence[str]) -> str:
    """Both, each in its order, mixed at random."""
    places, text, used = np.sort(random.integers(len(lines) + 1, size=len(needles))), [], 0
    for needle, place in zip(needles, places, strict=True):
        text += [*lines[used:place], needle]
        used = place
    return "\n".join([*text, *lines[used:]]) + "\n"
