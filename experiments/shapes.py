"""Shapes that are known of cache policies, on the model `probe`: which of them hold here, in numbers.

    python -m experiments.shapes --out docs/shapes.txt

Question: do small models, byte by byte, show what larger ones show? Expected: most of what is named below; what does
not hold stands in the text with its numbers. It goes on where it was interrupted.

Every line says what is claimed, the means with their 95% bootstrap intervals (percentile, over seeds), and whether the
claim holds: a claim about the order of two where their paired difference is not below 0 beyond its interval.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer

from experiments.interval import interval, paired
from experiments.question import questions
from experiments.recall import Recall
from experiments.record import whole
from experiments.sweep import sweep
from framework.checkpoint import open_checkpoint
from framework.policy import policies

NEEDLE, UUID, WORDS = "niah(keys=2)", "niah(keys=2, values_are='uuids')", "cwe(words=3, example=False)"
RETRIEVAL = ("passkey()", "mqar()", NEEDLE, UUID)
BUDGETS = (0.9, 0.75, 0.5, 0.25)
SEEN = "aware=True"
POLICIES = (
    "expected_attention()",
    "h2o()",
    "key_norm()",
    "keydiff()",
    "kvzip()",
    "random()",
    "snapkv(window=16)",
    "tova()",
    "window()",
    "adakv(policy=snapkv(window=16))",
)


@dataclass(frozen=True)
class Line:
    """One claim: its name in FIELD's list of shapes, what is claimed, what was found, whether it holds."""

    name: str
    claim: str
    found: str
    holds: bool

    def __str__(self) -> str:
        return f"{self.name} {'holds' if self.holds else 'DOES NOT HOLD'}: {self.claim}\n    {self.found}"


@dataclass(frozen=True)
class Scores:
    """The rows of a sweep on one model."""

    frame: pd.DataFrame
    seeds: Sequence[int]

    def of(
        self,
        question: str,
        policy: str = "full()",
        budget: float | None = None,
        measure: str = "score",
        codec: str = "full()",
    ) -> np.ndarray:
        """One number for each seed, in their order."""
        asked, named = questions.spelling(questions.make(question)), policies.spelling(policies.make(policy))
        rows = self.frame
        rows = rows[(rows.question == asked) & (rows.policy == named) & (rows.codec == codec)]
        rows = rows[rows.budget.isna()] if budget is None else rows[np.isclose(rows.budget, budget)]
        return rows.sort_values("seed")[f"measure.{measure}"].to_numpy(float)


def said(values: np.ndarray) -> str:
    """Mean and interval."""
    mean, low, high = interval(values)
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def streaming(scores: Scores) -> Line:
    """The score of a window against the share of cases whose needle lies outside the evicted block."""
    found, holds = [], True
    for budget in BUDGETS:
        values, due = scores.of(NEEDLE, "window()", budget), outside(NEEDLE, scores.seeds, budget)
        _, low, high = interval(values)
        holds &= low <= due.mean() <= high
        found.append(f"{budget}: {said(values)}, due {due.mean():.2f}")
    return Line(
        "S1", "a window finds the needles outside the evicted block, no others", "; ".join(found), holds
    )


def outside(spelled: str, seeds: Sequence[int], budget: float, sinks: int = 4) -> np.ndarray:
    """Whether the line that a case asks for is whole in a window of this share of the longest context."""
    tokenizer, question = open_checkpoint("probe").tokenizer, questions.make(spelled)
    assert isinstance(question, Recall)
    cases = [question.draw(tokenizer, seed) for seed in seeds]
    kept = math.ceil(round(budget * max(len(case.context) for case in cases), 6))
    first = []
    for case in cases:
        begin = case.context.index(case.turns[0].text)
        first.append(begin >= len(case.context) - (kept - sinks))
    return np.array(first)


def cliff(scores: Scores) -> Line:
    """Random eviction at 0.9 and 0.5 against the full cache."""
    full = scores.of(UUID)
    most, half = (scores.of(UUID, "random()", budget) for budget in (0.9, 0.5))
    found = f"full {said(full)}; 0.9: {said(most)}; 0.5: {said(half)}"
    holds = most.mean() >= 0.9 * full.mean() and half.mean() <= 0.1 * full.mean()
    return Line("S2", "random eviction costs little at 0.9 and all of a long value at 0.5", found, holds)


def seeing(scores: Scores) -> Line:
    """snapkv that sees the question against snapkv that does not."""
    found, holds, gaps = [], True, {}
    for question in RETRIEVAL:
        each = []
        for budget in BUDGETS:
            difference, _, high = paired(
                scores.of(with_question(question), "snapkv(window=16)", budget),
                scores.of(question, "snapkv(window=16)", budget),
            )
            holds &= high >= 0
            each.append(difference)
        gaps[question] = max(each)
        found.append(f"{question}: " + ", ".join(f"{one:+.2f}" for one in each))
    holds &= gaps[UUID] >= max(gaps[question] for question in RETRIEVAL if question != UUID)
    text = f"difference at {', '.join(map(str, BUDGETS))}: " + "; ".join(found)
    return Line("S3", "snapkv that sees the question is never worse, most of all for uuids", text, holds)


def with_question(spelled: str) -> str:
    """The same question, seen by the policy before it compresses; spelled as the registry spells it."""
    inside = spelled[spelled.index("(") + 1 : -1]
    return questions.spelling(questions.make(f"{spelled[:-1]}{', ' if inside else ''}{SEEN})"))


def counting(scores: Scores) -> Line:
    """Common words against needles, under eviction of half."""
    words, needles = WORDS, NEEDLE
    found, lost = [], {}
    for question in (words, needles):
        full = scores.of(question)
        rest = scores.of(question, "h2o()", 0.5)
        lost[question] = paired(rest, full)[0]
        found.append(f"{question}: full {said(full)}, h2o at 0.5 {said(rest)}")
    able = scores.of(words).mean() >= 0.5
    holds = bool(able and abs(lost[words]) < abs(lost[needles]))
    why = "" if able else "; with the full cache the model does not count words, so that this says nothing"
    return Line("S4", "counting common words loses less than retrieval", "; ".join(found) + why, holds)


def rising(scores: Scores) -> Line:
    """No policy is worse with more budget, beyond the interval of the paired difference."""
    wrong = []
    for question in RETRIEVAL:
        for policy in POLICIES:
            for more, less in zip(BUDGETS[:-1], BUDGETS[1:], strict=True):
                _, _, high = paired(scores.of(question, policy, more), scores.of(question, policy, less))
                if high < 0:
                    wrong.append(f"{question} {policy}: {less} beats {more}")
    count = len(RETRIEVAL) * len(POLICIES) * (len(BUDGETS) - 1)
    return Line("S5", "more budget is never worse", "; ".join(wrong) or f"none of {count} pairs", not wrong)


def oracle(scores: Scores) -> Line:
    """Attention that policies keep, against the oracle that sees the future, with as many tokens."""
    found, holds = [], True
    for policy in POLICIES:
        values = scores.of("regret()", policy, 0.25, "regret")
        holds &= interval(values)[2] >= 0
        found.append(f"{policy} {said(values)}")
    return Line(
        "S6", "no policy keeps more attention than the oracle: regret at 0.25", "; ".join(found), holds
    )


def knee(scores: Scores) -> Line:
    """kvzip along the budgets."""
    full = np.mean([scores.of(question).mean() for question in RETRIEVAL])
    means = {
        budget: np.mean([scores.of(question, "kvzip()", budget).mean() for question in RETRIEVAL])
        for budget in (*BUDGETS, 0.1)
    }
    found = f"full {full:.2f}; " + ", ".join(f"{budget}: {mean:.2f}" for budget, mean in means.items())
    holds = means[0.5] >= full - 0.05 and means[0.1] < full - 0.1
    return Line("S7", "kvzip is flat down to a half, then falls", found, bool(holds))


def sinks(scores: Scores) -> Line:
    """Perplexity of a window with and without its sinks."""
    with_sinks, without = (
        scores.of("perplexity()", policy, 0.25, "perplexity") for policy in ("window()", "window(sinks=0)")
    )
    found = f"4 sinks {said(with_sinks)}, none {said(without)}"
    return Line(
        "S8", "a window without sinks loses the text", found, bool(without.mean() > 1.5 * with_sinks.mean())
    )


def heads(scores: Scores) -> Line:
    """Budgets that a layer's heads share by need, against equal ones."""
    found, holds = [], True
    for question in RETRIEVAL:
        each = []
        for budget in BUDGETS:
            mean, _, high = paired(
                scores.of(question, "adakv(policy=snapkv(window=16))", budget),
                scores.of(question, "snapkv(window=16)", budget),
            )
            holds &= high >= 0
            each.append(f"{mean:+.2f}")
        found.append(f"{question}: {', '.join(each)}")
    text = f"adakv less snapkv at {', '.join(map(str, BUDGETS))}: " + "; ".join(found)
    return Line("S11", "head budgets by need are never worse than equal ones", text, holds)


def second(scores: Scores) -> Line:
    """The last turn less the first, for a policy that saw the first question and one that saw none."""
    found, drops = [], []
    for question in ("turns()", with_question("turns()")):
        first, last = (scores.of(question, "snapkv(window=16)", 0.25, name) for name in ("first", "last"))
        drops.append(last - first)
        found.append(f"{question}: first {said(first)}, last {said(last)}")
    _, low, _ = paired(drops[0], drops[1])
    return Line(
        "S12", "a later question suffers where the policy saw the first", "; ".join(found), bool(low > 0)
    )


CLAIMS: tuple[Callable[[Scores], Line], ...] = (
    streaming,
    cliff,
    seeing,
    counting,
    rising,
    oracle,
    knee,
    sinks,
    heads,
    second,
)


def swept(model: str, seeds: Sequence[int], backend: str, out: Path, jobs: int) -> Scores:
    """Everything that the claims read."""
    aware = [with_question(question) for question in RETRIEVAL]
    turns = ["turns()", with_question("turns()")]
    snap = ["snapkv(window=16)"]
    asked = (
        (RETRIEVAL, ("full()", *POLICIES), BUDGETS),
        (RETRIEVAL, ("kvzip()",), (0.1,)),
        (aware, snap, BUDGETS),
        ([WORDS], ("full()", "h2o()"), (0.5,)),
        (["regret()"], POLICIES, (0.25,)),
        (["perplexity()"], ("window()", "window(sinks=0)"), (0.25,)),
        (turns, snap, (0.25,)),
    )
    frames = [
        sweep(names, model, among, budgets, backends=backend, seeds=seeds, out=out, jobs=jobs)
        for names, among, budgets in asked
    ]
    return Scores(pd.concat(frames), seeds)


def lines(scores: Scores) -> Iterator[Line]:
    """Every claim, judged."""
    for claim in CLAIMS:
        yield claim(scores)


def main(
    out: Annotated[Path, typer.Option(help="Text to write.")] = Path("results/shapes.txt"),
    results: Annotated[Path, typer.Option(help="Results to go on from.")] = Path("results/shapes.sqlite"),
    model: Annotated[str, typer.Option(help="A bundled name, or a folder.")] = "probe",
    backend: Annotated[str, typer.Option(help="torch or flax.")] = "flax",
    seeds: Annotated[int, typer.Option(help="Cases of each question.", min=2)] = 40,
    jobs: Annotated[int, typer.Option(help="Processes.", min=1)] = 1,
) -> None:
    """Judge the shapes and write them down."""
    scores = swept(model, range(seeds), backend, results, jobs)
    text = f"{model}, {backend}, {seeds} cases of 512 bytes each; mean [95% interval]\n\n"
    text += "\n".join(map(str, lines(scores))) + "\n"
    with whole(out) as temporary:
        temporary.write_text(text)
    typer.echo(text)


if __name__ == "__main__":
    typer.run(main)
