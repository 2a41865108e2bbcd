"""Which cell of a sweep is next: a worker goes on with what it has compiled and loaded, then with what nobody has."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile

from experiments.question import questions
from experiments.result import Cell
from experiments.sweeps.asking import Job
from experiments.sweeps.grid import length

Kin = tuple[str | int, ...]


def kin(cell: Cell) -> Kin:
    """What cells have in common that share compiled code, the most costly to have twice first."""
    tokens = length(questions.make(cell.question))
    return cell.model, cell.dtype, cell.backend, tokens, cell.codec, cell.policy


class Turns:
    """The cells that are left. `still` gives what of one is left to do when its turn comes, None where nothing is."""

    def __init__(self, jobs: Iterable[Job], still: Callable[[Job], Job | None]):
        self.still = still
        self.left: dict[Kin, deque[Job]] = {}
        for job in jobs:
            self.left.setdefault(kin(job.cell), deque()).append(job)

    def take(self, last: Cell | None = None, others: Sequence[Cell] = ()) -> Job | None:
        """The next cell for a worker: one that is nearest to its `last`, and of these furthest from those that the
        others are at. None where no cell is left."""
        own, theirs = None if last is None else kin(last), [kin(each) for each in others]

        def worth(one: Kin) -> tuple[int, int]:
            return (
                0 if own is None else _common(one, own),
                -max((_common(one, each) for each in theirs), default=0),
            )

        while self.left:
            best = max(self.left, key=worth)
            jobs = self.left[best]
            job = self.still(jobs.popleft())
            if not jobs:
                del self.left[best]
            if job is not None:
                return job
        return None

    def again(self, job: Job) -> None:
        """Put back a cell whose worker died: it is the next of its kin."""
        self.left.setdefault(kin(job.cell), deque()).appendleft(job)


def _common(one: Kin, other: Kin) -> int:
    """How many of the first entries are the same."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=True)))
