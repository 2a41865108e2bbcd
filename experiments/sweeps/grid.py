"""The grid of a sweep: what is asked for, as the cells that answer it, each once; what cannot be is refused here."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from backends import backends
from experiments.question import Question, questions
from experiments.recall import Recall
from experiments.result import Cell
from experiments.sweeps.asking import with_budget
from framework.checkpoint import BUNDLED, WANTED, locate, open_checkpoint
from framework.codec import Codec, codecs
from framework.errors import KvtwinError
from framework.eviction import layer_budgets, resolved
from framework.footprint import check
from framework.policy import Policy, policies
from framework.spec import ModelSpec


@dataclass(frozen=True)
class Asked:
    """What a sweep is asked for, in any spelling. `budgets`: shares of the context below 1, tokens from 1 on."""

    questions: tuple[str, ...]
    models: tuple[str, ...]
    policies: tuple[str, ...]
    budgets: tuple[float, ...] = ()
    codecs: tuple[str, ...] = ("full()",)
    backends: tuple[str, ...] = ("torch",)
    dtypes: tuple[str, ...] = ("float32",)


@dataclass(frozen=True)
class _Subject:
    name: str
    weights: str
    spec: ModelSpec


def grid(asked: Asked) -> tuple[Cell, ...]:
    """The cells, each once, in an order in which those that share what is compiled follow each other.

    Raises KvtwinError on the first that cannot be run; nothing is run and no weights are read but to hash them.
    """
    for what, each in vars(asked).items():
        if not each and what != "budgets":
            raise KvtwinError(f"no {what}; expected at least one of each: nothing would be run")
    for name in asked.backends:
        for dtype in asked.dtypes:
            backends.get(name).check_dtype(dtype)
    shares = [_budget(each) for each in asked.budgets]
    made = [questions.make(text) for text in asked.questions]
    rules = [budgeted for text in asked.policies for budgeted in _budgeted(text, shares)]
    formats = [codecs.make(text) for text in asked.codecs]
    found: dict[str, Cell] = {}
    for subject in [_subject(name) for name in dict.fromkeys(asked.models)]:
        _check(subject.spec, rules, formats, made)
        for cell in _cells(asked, subject, made, rules, formats):
            found.setdefault(cell.key, cell)
    return tuple(found.values())


def _cells(
    asked: Asked,
    subject: _Subject,
    made: list[Question],
    rules: list[tuple[Policy, float | None]],
    formats: list[Codec],
) -> Iterator[Cell]:
    ways = [(dtype, backend) for dtype in asked.dtypes for backend in asked.backends]
    lengths = sorted({length(question) for question in made})
    names = list(dict.fromkeys(policies.spelling(policy) for policy, _ in rules))
    for dtype, backend in ways:
        for tokens in lengths:
            for codec in formats:
                for name in names:
                    for question in [each for each in made if length(each) == tokens]:
                        for budget in [one for policy, one in rules if policies.spelling(policy) == name]:
                            yield Cell(
                                questions.spelling(question), subject.name, subject.weights, name, budget,
                                codecs.spelling(codec), backend, dtype,
                            )  # fmt: skip


def length(question: Question) -> int:
    """Tokens of its prompts, where it has a field that says so, else 0: equal ones share what is compiled."""
    tokens = getattr(question, "length", 0)
    return tokens if isinstance(tokens, int) else 0


def _budget(value: float) -> float:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or value <= 0 or (value > 1 and value != int(value)):
        raise KvtwinError(
            f"budget {value!r}; expected a share of the context between 0 and 1, or a whole number of tokens"
        )
    return float(value)


def _budgeted(text: str, shares: list[float]) -> list[tuple[Policy, float | None]]:
    """The policy without its budget, beside each budget that it is run under.

    One number for all heads in its spelling is taken out of it, so that it is one cell with the same from `shares`.
    """
    made = policies.make(text)
    if not made.evicts:
        return [(made, None)]
    if made.budget is not None or made.fraction is not None:
        number = _number(made)
        return [(made, None) if number is None else (replace(made, budget=None, fraction=None), number)]
    if not shares:
        raise KvtwinError(
            f"policy {policies.spelling(made)} has no budget; expected one in its spelling, as in budget=64, or "
            "some for all policies: --budget 0.25,64"
        )
    return [(made, budget) for budget in shares]


def _number(policy: Policy) -> float | None:
    """The budget that a policy comes with, as a cell has it; None where it is not one number, or one to be refused."""
    if policy.fraction is None:
        return float(policy.budget) if type(policy.budget) is int and policy.budget >= 1 else None
    alone = policy.budget is None and type(policy.fraction) is float and 0 < policy.fraction < 1
    return policy.fraction if alone else None


def _check(
    spec: ModelSpec,
    rules: list[tuple[Policy, float | None]],
    formats: list[Codec],
    made: list[Question],
) -> None:
    """Raises where no cache could have these."""
    for policy in {policies.spelling(policy): policy for policy, _ in rules}.values():
        policy.constants(spec)
    for policy, budget in rules:
        for codec in formats:
            check(spec, policy, codec)
        for question in made:
            _check_budget(spec, with_budget(policy, budget), question)


def _check_budget(spec: ModelSpec, policy: Policy, question: Question) -> None:
    # Of other questions it is not known here how long a context can be.
    tokens = question.length if isinstance(question, Recall) else None
    ready = resolved(policy, tokens or 1)
    try:
        if policy.fraction is None or tokens:
            layer_budgets(ready, spec)
    except KvtwinError as error:
        share = f"\nthat is {policy.fraction} of the most tokens that {questions.spelling(question)} has"
        raise KvtwinError(f"{error}{share if policy.fraction is not None else ''}") from error


def _subject(name: str) -> _Subject:
    folder = locate(name).resolve()
    spec = open_checkpoint(name).spec
    files = sorted({file for pattern in WANTED for file in folder.glob(pattern) if file.is_file()})
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(file.name.encode() + hashlib.file_digest(opened, "sha256").digest())
    return _Subject(_name(name, folder), digest.hexdigest()[:32], spec)


def _name(name: str, folder: Path) -> str:
    """One name for each folder: the bundled one, its path from here where it lies below, or org/name as it came."""
    if folder.parent == BUNDLED.resolve():
        return folder.name
    if not Path(name).expanduser().is_dir():
        return str(name)
    here = Path.cwd()
    return f"./{folder.relative_to(here)}" if folder.is_relative_to(here) else str(folder)
