"""`kvtwin run`: questions asked of a model under policies, budgets and codecs; a sweep that goes on where it stopped.

Cells that the file of results has for every seed, computed by the same text and the same libraries, are not asked
again. Each other one is written as soon as it is measured, all seeds at once; only this process writes.
"""

import operator
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from experiments.question import questions as known_questions
from experiments.result import Cell, Result
from experiments.sweeps.asking import Asker, Job
from experiments.sweeps.grid import Asked, grid
from experiments.sweeps.local_workers import Processes
from experiments.sweeps.provenance import version
from experiments.sweeps.ray_workers import Cluster
from experiments.sweeps.results import Results, cells_of, read
from experiments.sweeps.turns import Turns
from experiments.sweeps.workers import answered
from framework.errors import KvtwinError

if TYPE_CHECKING:
    from pandas import DataFrame

ENGINES = ("local", "ray")
Several = str | Sequence[str]


def sweep(
    questions: Several,
    model: Several,
    policies: Several,
    budgets: Sequence[float] = (),
    codecs: Several = "full()",
    backends: Several = "torch",
    dtypes: Several = "float32",
    seeds: Sequence[int] = range(20),
    out: str | Path = "results.sqlite",
    jobs: int = 1,
    engine: str = "local",
) -> "DataFrame":
    """Ask every question of every model under every policy, budget and codec, on every backend and in every dtype;
    the rows of `out` that this is about, as `experiments.sweeps.results.read` gives them.

    `budgets`: for policies whose spelling has none; below 1 a share of the longest context of the batch, else tokens
    per kv head. `seeds`: the cases, one batch per cell. `jobs`: processes, 1 being this one. `engine`: "ray" asks on
    the cluster that RAY_ADDRESS names, or on `jobs` cores of this machine. A cell that fails leaves rows with `error`,
    and is tried again by the next sweep. Raises KvtwinError before anything runs where a cell cannot be run, and where
    `out` cannot be written.
    """
    asked = Asked(
        questions=_several(questions),
        models=_several(model),
        policies=_several(policies),
        budgets=tuple(budgets),
        codecs=_several(codecs),
        backends=_several(backends),
        dtypes=_several(dtypes),
    )
    cells, path = grid(asked), Path(out)
    wanted = {cell: _seeds_of(cell, _checked(seeds)) for cell in cells}
    _check_engine(jobs, engine)
    _measure(wanted, path, jobs, engine)
    return _rows(path, wanted)


def _several(value: Several) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(str(each) for each in value)


def _checked(seeds: Sequence[int]) -> tuple[int, ...]:
    try:
        found = tuple(dict.fromkeys(operator.index(each) for each in seeds))
    except TypeError:
        found = ()
    if not found or min(found) < 0:
        raise KvtwinError(
            f"seeds are {seeds!r}; expected at least one integer, and none below 0, as range(20)"
        )
    return found


def _seeds_of(cell: Cell, seeds: tuple[int, ...]) -> tuple[int, ...]:
    """A question whose answer stands for all seeds is asked once."""
    return seeds if known_questions.make(cell.question).seeded else (0,)


def _check_engine(jobs: int, engine: str) -> None:
    if isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1:
        raise KvtwinError(f"jobs is {jobs!r}; expected a number of processes of at least 1")
    if engine not in ENGINES:
        raise KvtwinError(f"no engine {engine!r}; expected one of {', '.join(ENGINES)}")


def _measure(wanted: Mapping[Cell, tuple[int, ...]], path: Path, jobs: int, engine: str) -> None:
    """Ask what the file does not have yet, and write it there."""
    versions = {cell.key: version(cell) for cell in wanted}
    with Results(path, versions) as results:

        def still(job: Job) -> Job | None:
            """Without the seeds that are there: another sweep may write into the same file."""
            done = results.done(job.cell)
            left = tuple(seed for seed in job.seeds if seed not in done)
            return replace(job, seeds=left) if left else None

        ahead = [Job(cell, seeds, versions[cell.key]) for cell, seeds in wanted.items()]
        left = [job for job in map(still, ahead) if job is not None]
        if len(left) < len(ahead):
            say(f"{len(ahead) - len(left)} of {len(ahead)} cells are in {path} already")
        if not left:
            return
        with (
            _telling(len(left)) as tell,
            closing(_asked(Turns(left, still), jobs, len(left), engine)) as came,
        ):
            for rows in came:
                results.add(rows)
                tell(rows)


def _asked(turns: Turns, jobs: int, cells: int, engine: str) -> Generator[list[Result]]:
    """The results of each cell, as they come."""
    count = min(jobs, cells)
    if engine == "ray":
        with closing(Cluster(count)) as cluster:
            yield from answered(cluster, turns, count)
    elif jobs > 1:  # also for one cell: it may end its process
        yield from answered(Processes(count), turns, count)
    else:
        asker, last = Asker(), None
        while job := turns.take(last):
            last = job.cell
            yield asker.ask(job)


def _rows(path: Path, wanted: Mapping[Cell, tuple[int, ...]]) -> "DataFrame":
    """The rows of a file that were asked for."""
    frame = read(path)
    pairs = zip(cells_of(frame), frame["seed"], strict=True)
    return frame[[seed in wanted.get(cell, ()) for cell, seed in pairs]].reset_index(drop=True)


@contextmanager
def _telling(total: int) -> Iterator[Callable[[Sequence[Result]], None]]:
    """Tells of each cell that is done: a bar with the time left on a terminal, else lines, on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, highlight=False)
    columns: tuple[Any, ...] = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    # Cells take seconds to minutes: the time left is judged by the last ten minutes.
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal, speed_estimate_period=600
    ) as bar:
        task, done = bar.add_task("cells", total=total), 0

        def tell(rows: Sequence[Result]) -> None:
            nonlocal done
            done += 1
            cell, error = rows[0].cell, rows[0].error
            if not console.is_terminal or error:
                seconds = sum(row.seconds for row in rows)
                shown = error.splitlines()[0] if error else f"{seconds:.1f} s"
                say(f"{done}/{total} {title(cell)}: {shown}")
            bar.update(task, completed=done, description=f"{cell.question} {cell.policy}")

        yield tell


def title(cell: Cell) -> str:
    """A cell in one line."""
    budget = "" if cell.budget is None else f" {cell.budget:g}"
    codec = "" if cell.codec == "full()" else f" {cell.codec}"
    return f"{cell.question} {cell.model} {cell.policy}{budget}{codec} {cell.backend} {cell.dtype}"


def say(text: str) -> None:
    """One line of progress on standard error."""
    print(f"kvtwin run: {text}", file=sys.stderr, flush=True)


def command(
    question: Annotated[
        list[str], typer.Argument(help='As in "passkey(length=256)"; a bundled name or a file.')
    ],
    model: Annotated[
        list[str],
        typer.Option(help="A bundled name, a folder on disk, or org/name; may be given several times."),
    ],
    policy: Annotated[list[str], typer.Option(help='As in "snapkv(window=16)"; may be given several times.')],
    budget: Annotated[
        str | None,
        typer.Option(help="As in 0.1,0.25,64: a share of the context, or tokens; for policies without one."),
    ] = None,
    codec: Annotated[
        list[str] | None, typer.Option(help="As in exl2_q4(); may be given several times.")
    ] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="torch, flax or reference; may be given several times.")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="As in float32; may be given several times.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Cases of each question: seeds 0, 1, ...", min=1)] = 20,
    jobs: Annotated[int, typer.Option(help="Processes that measure at once.", min=1)] = 1,
    engine: Annotated[str, typer.Option(help="local, or ray: a cluster, see RAY_ADDRESS.")] = "local",
    out: Annotated[Path, typer.Option(help="File of results, which is gone on from.")] = Path(
        "results.sqlite"
    ),
) -> None:
    """Ask questions of a model under policies and budgets; prints means with intervals, and keeps every row in a file.

    Stopped at any moment, the same command goes on. Exit code 1 if cells failed, 130 after Ctrl-C.
    """
    from rich.console import Console

    from experiments.sweeps.table import WIDTH, table

    try:
        frame = sweep(
            question,
            model,
            policy,
            _numbers(budget),
            codec or "full()",
            backend or "torch",
            dtype or "float32",
            range(seeds),
            out,
            jobs,
            engine,
        )
    except KeyboardInterrupt:
        say(f"interrupted; what was measured is in {out}, and the same command goes on from there")
        raise typer.Exit(130) from None
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=WIDTH)
    console.print(table(frame))
    if (frame["error"] != "").any():
        raise typer.Exit(1)


def _numbers(text: str | None) -> list[float]:
    try:
        return [] if text is None else [float(each) for each in text.split(",")]
    except ValueError:
        raise KvtwinError(
            f"--budget {text!r} is no list of numbers; expected shares of the context and tokens, as 0.1,0.25,64"
        ) from None
