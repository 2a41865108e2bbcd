"""The turns and the workers of a sweep: who gets which cell, and what becomes of the cells of the dead."""

from collections.abc import Sequence
from itertools import product

import pytest

from experiments.result import Cell, Result
from experiments.sweeps.asking import Job
from experiments.sweeps.turns import Turns, kin
from experiments.sweeps.workers import Died, Engine, Worker, answered
from framework.errors import KvtwinError

POLICIES = ("full()", "h2o()", "window()")
QUESTIONS = ("passkey(length=400)", "copy(length=400)", "mqar(length=300)")


def job(question: str, policy: str, budget: float) -> Job:
    return Job(Cell(question, "recall", "", policy, budget, "full()", "torch", "float32"), (0, 1, 2), "one")


JOBS = [job(*each) for each in product(QUESTIONS, POLICIES, (16.0, 32.0))]


def turns(jobs: Sequence[Job] = JOBS) -> Turns:
    return Turns(jobs, lambda one: one)


def taken(left: Turns, count: int) -> list[list[Cell]]:
    """What each of so many workers gets that are equally quick."""
    found: list[list[Cell]] = [[] for _ in range(count)]
    while True:
        for number, own in enumerate(found):
            others = [each[-1] for index, each in enumerate(found) if index != number and each]
            one = left.take(own[-1] if own else None, others)
            if one is None:
                return found
            own.append(one.cell)


def changes(cells: Sequence[Cell]) -> int:
    return sum(kin(one) != kin(other) for one, other in zip(cells, cells[1:], strict=False))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_every_cell_has_one_turn(count: int) -> None:
    found = [cell for each in taken(turns(), count) for cell in each]
    assert sorted(found, key=str) == sorted((each.cell for each in JOBS), key=str)


def test_one_worker_goes_on_with_what_it_has_compiled() -> None:
    [cells] = taken(turns(), 1)
    assert changes(cells) == len({kin(cell) for cell in cells}) - 1


@pytest.mark.parametrize("last", JOBS)
def test_what_is_nearest_to_the_last_cell_is_next(last: Job) -> None:
    """Also beside others that are at the very same."""
    assert kin(turns().take(last.cell, [last.cell, JOBS[0].cell]).cell) == kin(last.cell)
    others = turns([each for each in JOBS if kin(each.cell) != kin(last.cell)])
    near = kin(others.take(last.cell).cell)
    assert near[:5] == kin(last.cell)[:5]


def test_two_workers_do_not_compile_the_same() -> None:
    """Six kinds of four or two cells; only the last one may be shared, so that none waits for the other."""
    one, other = taken(turns(), 2)
    assert abs(len(one) - len(other)) <= 1
    assert len({kin(cell) for cell in one} & {kin(cell) for cell in other}) <= 1
    assert changes(one) + changes(other) <= 6 + 1 - 2


def test_the_last_kind_is_shared() -> None:
    few = [job("passkey(length=400)", "h2o()", float(budget)) for budget in range(8, 16)]
    assert [len(each) for each in taken(turns(few), 4)] == [2, 2, 2, 2]


def test_what_is_done_meanwhile_is_left_out() -> None:
    left = Turns(JOBS, lambda one: None if one.cell.policy == "h2o()" else one)
    [cells] = taken(left, 1)
    assert {cell.policy for cell in cells} == {"full()", "window()"}
    assert len(cells) == 12


class Scripted(Worker):
    """Answers at once, but for jobs of which `deaths` says that they end it."""

    def __init__(self, engine: "Script"):
        self.engine, self.closed = engine, False

    def give(self, job: Job) -> None:
        assert not self.closed
        self.job = job
        self.engine.given.append(job)

    def take(self) -> list[Result] | None:
        if self.engine.chatty and not self.engine.told:
            self.engine.told = True
            return None
        if self.engine.deaths.get(self.job, 0):
            self.engine.deaths[self.job] -= 1
            raise Died("by SIGKILL")
        return [Result(self.job.cell, seed) for seed in self.job.seeds]

    def close(self) -> None:
        self.closed = True


class Script(Engine):
    def __init__(self, deaths: dict[Job, int], chatty: bool = False):
        self.deaths, self.chatty, self.told = dict(deaths), chatty, False
        self.workers: list[Scripted] = []
        self.given: list[Job] = []

    def start(self) -> Scripted:
        self.workers.append(Scripted(self))
        return self.workers[-1]

    def ready(self, workers: Sequence[Worker]) -> list[Worker]:
        return list(workers[:1])


def test_every_cell_is_answered_by_as_many_workers() -> None:
    engine = Script({}, chatty=True)
    found = [rows[0].cell for rows in answered(engine, turns(), 3)]
    assert sorted(found, key=str) == sorted((each.cell for each in JOBS), key=str)
    assert len(engine.workers) == 3
    assert all(each.closed for each in engine.workers)


def test_the_cell_of_a_dead_worker_is_tried_once_more() -> None:
    once, always = JOBS[3], JOBS[5]
    engine = Script({once: 1, always: 9})
    found = {rows[0].cell: rows for rows in answered(engine, turns(), 2)}
    assert len(found) == len(JOBS)
    failed = found.pop(always.cell)
    assert [row.seed for row in failed] == [0, 1, 2]
    assert {row.error for row in failed} == {"the process that measured it ended twice: by SIGKILL"}
    assert {row.provenance["version"] for row in failed} == {"one"}
    assert {row.error for rows in found.values() for row in rows} == {""}
    assert engine.given.count(once) == engine.given.count(always) == 2
    assert len(engine.workers) == 2 + 3
    assert all(each.closed for each in engine.workers)


def test_workers_are_closed_when_nobody_asks_further() -> None:
    engine = Script({})
    going = answered(engine, turns(), 3)
    next(going)
    going.close()
    assert len(engine.workers) == 3
    assert all(each.closed for each in engine.workers)


def test_workers_are_closed_when_one_does_not_start() -> None:
    class Broken(Script):
        def start(self) -> Scripted:
            if len(self.workers) == 2:
                raise KvtwinError("does not start")
            return super().start()

    engine = Broken({})
    with pytest.raises(KvtwinError, match="does not start"):
        next(answered(engine, turns(), 3))
    assert [each.closed for each in engine.workers] == [True, True]
