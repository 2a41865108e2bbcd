"""The cells of a sweep given out to workers, which answer when they are done and may die: the same for every engine."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

from experiments.result import Cell, Result
from experiments.sweeps.asking import Job, failed
from experiments.sweeps.provenance import provenance
from experiments.sweeps.turns import Turns


class Died(Exception):
    """A worker that ended without an answer; the text says how."""


class Worker(ABC):
    """Something that asks one cell at a time, elsewhere. `last`: the cell that it was given last."""

    last: Cell | None = None

    @abstractmethod
    def give(self, job: Job) -> None:
        """Let it begin; comes back at once."""

    @abstractmethod
    def take(self) -> list[Result] | None:
        """The results, where it is ready; None where it told something else. Raises Died."""

    @abstractmethod
    def close(self) -> None:
        """End it, whatever it does."""


class Engine(ABC):
    """Where workers are started."""

    @abstractmethod
    def start(self) -> Worker:
        """A new worker."""

    @abstractmethod
    def ready(self, workers: Sequence[Worker]) -> list[Worker]:
        """Those that have something to tell; waits until there is one."""


def answered(engine: Engine, turns: Turns, count: int) -> Iterator[list[Result]]:
    """The results of each cell as they come, by `count` workers.

    A worker that dies is replaced, and its cell tried once more; dies the next one too, it is a failure.
    """
    idle: list[Worker] = []
    busy: dict[Worker, Job] = {}
    fatal: set[Job] = set()
    try:
        for _ in range(count):
            idle.append(engine.start())
        while True:
            _give(idle, busy, turns)
            if not busy:
                return
            for worker in engine.ready(list(busy)):
                try:
                    results = worker.take()
                except Died as death:
                    job = busy.pop(worker)
                    worker.close()
                    idle.append(engine.start())
                    if job in fatal:
                        why = f"the process that measured it ended twice: {death}"
                        yield failed(job, why, provenance(job.version))
                    else:
                        fatal.add(job)
                        turns.again(job)
                else:
                    if results is not None:
                        del busy[worker]
                        idle.append(worker)
                        yield results
    finally:
        for worker in [*idle, *busy]:
            worker.close()


def _give(idle: list[Worker], busy: dict[Worker, Job], turns: Turns) -> None:
    """Let those begin that have nothing to do, as long as there are cells."""
    for worker in list(idle):
        job = turns.take(worker.last, [each.cell for each in busy.values()])
        if job is None:
            return
        idle.remove(worker)
        busy[worker] = job
        worker.last = job.cell
        worker.give(job)
