"""One cell of a sweep, asked in this process: its seeds as one batch, and what came as results."""

import math
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from backends import backends
from experiments.question import Answer, Held, Question, Setting, questions
from experiments.result import Cell, Result
from experiments.sweeps.provenance import provenance, version
from framework.backend import Model
from framework.errors import KvtwinError
from framework.policy import Policy, policies

REMEMBERED = 2**30  # bytes of arrays that questions keep for the next cells of a process
LINES = 3  # of an error, in a result


@dataclass(frozen=True)
class Job:
    """A cell, the seeds that it is asked for, and the version that it had when the sweep began."""

    cell: Cell
    seeds: tuple[int, ...]
    version: str


class Remembered(OrderedDict[Any, Any]):
    """What questions keep; the oldest goes where arrays are more than `room` bytes, and never what came last."""

    def __init__(self, room: int = REMEMBERED):
        super().__init__()
        self.room = room

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        sizes = [size(each) for each in self.values()]
        while len(self) > 1 and sum(sizes) > self.room:
            self.popitem(last=False)
            sizes.pop(0)


def size(value: Any) -> int:
    """Bytes of the arrays in a value, also in lists, tuples and dicts."""
    if isinstance(value, dict):
        return sum(map(size, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(size, value))
    return value.nbytes if isinstance(value, np.ndarray) else 0


@dataclass
class Asker:
    """Asks cells one after the other. A model is loaded once, and goes when the turn of another one has come."""

    models: dict[tuple[str, str, str], Model] = field(default_factory=dict)
    remembered: dict[tuple[str, str, str], Remembered] = field(default_factory=dict)

    def ask(self, job: Job) -> list[Result]:
        """A result for each seed; of a cell that fails, with the first lines of its error."""
        origin, begun = provenance(job.version), time.perf_counter()
        try:
            origin["version"] = version(job.cell)  # another one where a file was edited meanwhile
            question = questions.make(job.cell.question)
            setting = self._setting(job.cell)
            begun = time.perf_counter()  # a model is loaded for many cells, and not counted
            answers = checked(question, question.ask(setting, job.seeds), job.seeds)
        except (Exception, SystemExit) as error:
            return failed(job, told(error), origin, time.perf_counter() - begun)
        seconds = (time.perf_counter() - begun) / len(job.seeds)
        return [
            Result(
                job.cell,
                seed,
                each.measures,
                each.held,
                str(each.said),
                str(each.wanted),
                seconds,
                "",
                origin,
            )
            for seed, each in zip(job.seeds, answers, strict=True)
        ]

    def _setting(self, cell: Cell) -> Setting:
        place = (cell.model, cell.backend, cell.dtype)
        if any((model, dtype) != (cell.model, cell.dtype) for model, _, dtype in self.models):
            self.models.clear()
            self.remembered.clear()
        policy = policies.spelling(with_budget(policies.make(cell.policy), cell.budget))

        def other(backend: str) -> Model:
            return self._model(cell.model, backend, cell.dtype)

        shared = self.remembered.setdefault(place, Remembered())
        return Setting(self._model(*place), policy, cell.codec, other, shared)

    def _model(self, name: str, backend: str, dtype: str) -> Model:
        place = (name, backend, dtype)
        if place not in self.models:
            self.models[place] = backends.get(backend).load(name, dtype=dtype)
        return self.models[place]


def with_budget(policy: Policy, budget: float | None) -> Policy:
    """The policy with a budget as a cell has it."""
    if budget is None:
        return policy
    return replace(policy, budget=int(budget)) if budget >= 1 else replace(policy, fraction=budget)


def told(error: BaseException) -> str:
    """The first lines of an error, with its kind where it is not one of kvtwin's own."""
    text = str(error) if isinstance(error, KvtwinError) else f"{type(error).__name__}: {error}"
    return "\n".join(line[:300] for line in text.strip().splitlines()[:LINES])


def failed(job: Job, why: str, origin: dict[str, str], seconds: float = 0.0) -> list[Result]:
    """What a cell leaves that has no answer."""
    share = seconds / len(job.seeds)
    return [Result(job.cell, seed, seconds=share, error=why, provenance=origin) for seed in job.seeds]


def checked(question: Question, answers: Sequence[Answer], seeds: Sequence[int]) -> list[Answer]:
    """The answers in plain numbers; raises unless there is one for each seed, with the measures of the question."""
    found = [each.seed for each in answers]
    if found != list(seeds):
        raise KvtwinError(
            f"{questions.spelling(question)} answered for seeds {found}; expected one answer for each of {list(seeds)}"
        )
    names = [each.name for each in question.measures]
    for each in answers:
        if sorted(each.measures) != sorted(names):
            raise KvtwinError(
                f"{questions.spelling(question)} measured {', '.join(each.measures) or 'nothing'}; "
                f"expected what its class says: {', '.join(names)}"
            )
    return [
        replace(
            each,
            measures={name: float(each.measures[name]) for name in names},
            held=None if each.held is None else _plain(each.held),
        )
        for each in answers
    ]


def _plain(held: Held) -> Held:
    """The same in Python's own numbers, as a database takes them."""
    numbers = {each.name: getattr(held, each.name) for each in fields(Held) if each.name != "flags"}
    if any(value is not None and not math.isfinite(value) for value in numbers.values()):
        raise KvtwinError(f"a cache held {numbers}; expected finite numbers")
    plain: dict[str, Any] = {
        name: value if value is None else np.asarray(value).item() for name, value in numbers.items()
    }
    return replace(held, **plain, flags=tuple(str(flag) for flag in held.flags))
