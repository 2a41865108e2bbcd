"""`kvtwin bench`: how fast the backends are beside Hugging Face and kvpress, and how near the machine's bandwidth."""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Annotated

import typer

from experiments.benches import report as bench_report
from experiments.benches.case import GPU, SUITES, Group, title
from experiments.benches.engine import METER, Engine, Failed, foreign_place, gpu_of, known, versions
from experiments.benches.model import SHAPES, Subject, cache_folder, subject
from experiments.benches.result import results
from experiments.benches.row import append, fitting, machine, newest, read
from experiments.benches.run import Bench, say
from experiments.benches.worker import Meter, Workers
from experiments.record import folder
from framework.errors import KvtwinError

ROWS = "bench.jsonl"


def command(
    suite: Annotated[
        str,
        typer.Option(
            help="quick: two minutes; table: what the targets are about, an hour or more; sweep: by context, batch, "
            "policy and codec; gpu: some minutes on a GPU, in bfloat16."
        ),
    ] = "quick",
    model: Annotated[
        str | None,
        typer.Option(
            help=f"{' or '.join(SHAPES)}, with random weights, or what kvtwin loads. Each suite has its own."
        ),
    ] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(help=f"One of {', '.join(known())}; may be given several times. All by default."),
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="Of the suite, what has this text in its name, as in prefill.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Blocks of each engine, in turns.", min=1)] = 5,
    out: Annotated[
        Path, typer.Option(help=f"Folder for {ROWS}, which is gone on from, plots and logs.")
    ] = Path("results/bench"),
    models: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the models of random weights, up to 2 GB each; by default ~/.cache/kvtwin/bench."
        ),
    ] = None,
    kvpress_python: Annotated[
        str | None,
        typer.Option(
            help="The interpreter of an environment that has kvpress, which needs another transformers."
        ),
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Measure nothing; report the rows that are there.")
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print tables for the README.")] = False,
) -> None:
    """Time the backends beside their peers, in turns, and how near they come to the read bandwidth of the machine.

    Every round is written to bench.jsonl as it is measured: an interrupted run goes on when it is started again. A peer
    that is not installed is named and left out; one that fails gets a row that says why. Float32, on the CPU alone, but
    for the suite gpu, which measures nothing where there is none.
    """
    if suite not in SUITES:
        raise KvtwinError(f"no suite {suite!r}; expected one of {', '.join(SUITES)}")
    place = folder(out)
    if not report:
        make, usual = SUITES[suite]
        groups = chosen(make(model or usual), engine, only)
        engines, gpu = known(kvpress_python), None
        if suite == GPU:
            engines, gpu = seeing(engines)
            if gpu is None:
                return
        _measure(groups, engines, rounds, place, models or cache_folder(), gpu)
    _report(place, markdown, None if report else f"kvtwin bench --suite {suite}")


def chosen(groups: Sequence[Group], engines: Sequence[str] | None, only: str | None) -> list[Group]:
    """The groups that have this text in their name, with these engines alone; None: all. Raises where none is left."""
    if unknown := sorted(set(engines or ()) - set(known())):
        raise KvtwinError(f"no engine {', '.join(unknown)}; expected some of {', '.join(known())}")
    named = [group for group in groups if only is None or only in title(group)]
    some = [[entry for entry in group if engines is None or entry.engine in engines] for group in named]
    if not any(some):
        names = "\n".join(dict.fromkeys(title(group) for group in groups))
        raise KvtwinError(f"nothing to measure for --only {only!r} on these engines; the suite has\n{names}")
    return [group for group in some if group]


def present(engines: Mapping[str, Engine], names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Versions of those engines that are installed; the others are named on standard error."""
    found = {}
    for name in names:
        try:
            found[name] = versions(engines[name])
        except Failed as error:
            say(f"{name} is left out: {error}")
    return found


def seeing(engines: Mapping[str, Engine]) -> tuple[dict[str, Engine], str | None]:
    """Those engines whose library sees a GPU, and its name; None where torch, which reads the bandwidth, sees none."""
    try:
        name = gpu_of("torch")
    except Failed as error:
        say(f"nothing is measured: {error}")
        return {}, None
    try:
        gpu_of("jax")
    except Failed as error:
        say(f"flax is left out: {error}")
        return {key: each for key, each in engines.items() if "jax" not in each.packages}, name
    return dict(engines), name


def _measure(
    groups: Sequence[Group],
    engines: Mapping[str, Engine],
    rounds: int,
    place: Path,
    models: Path,
    gpu: str | None = None,
) -> None:
    """Run the groups; `gpu`: the name of one that the engines are to use."""
    path, here = place / ROWS, machine() | ({} if gpu is None else {"gpu": gpu})
    asked = dict.fromkeys(entry.engine for group in groups for entry in group)
    there = present(engines, [name for name in asked if name in engines])
    every = read(path)
    rows = fitting(every, here, there)
    if other := sum(row.engine in there for row in every) - len(rows):
        say(f"{other} rows in {path} are of another machine or of other versions: they are measured again")

    @cache
    def model(name: str) -> Subject:
        return subject(name, models, say)

    with ExitStack() as stack:
        workers = Workers(place, stack.enter_context(foreign_place()), gpu is not None)
        stack.callback(lambda: workers.end(list(workers.running)))
        meter = Meter(lambda: workers.new(METER))
        stack.callback(meter.close)
        bench = Bench(
            {name: engines[name] for name in there}, there, here, model, workers, meter.read,
            lambda row: append(path, row), time.strftime("%Y-%m-%dT%H:%M:%S"), rounds, {row.key: row for row in rows},
        )  # fmt: skip
        try:
            bench.run(groups)
        except KeyboardInterrupt:
            say(f"interrupted; the rows are in {path}, and the same command goes on from them")
            raise typer.Exit(130) from None


def _report(place: Path, markdown: bool, command: str | None) -> None:
    """Tables on standard output, plots in the folder. `command`: what measured the rows, where that is known."""
    from rich.console import Console

    every = read(place / ROWS)
    if not every:
        raise KvtwinError(f"{place / ROWS} holds no rows; run kvtwin bench without --report first")
    rows = newest(every)
    if other := len(every) - len(rows):
        say(f"{other} rows are of another machine or of other versions than the last ones, and are left out")
    found = results(rows)
    if markdown:
        typer.echo(bench_report.markdown(found, rows, command))
    else:
        console = Console(highlight=False)
        console = console if console.is_terminal else Console(highlight=False, width=bench_report.WIDTH)
        console.print(bench_report.machine_line(rows), style="bold", markup=False)
        console.print(bench_report.versions_line(rows), markup=False)
        for model, some in bench_report.by_model(found).items():
            console.print(f"\n{model}", markup=False)
            console.print(bench_report.table(some))
            for line in bench_report.notes(some):
                console.print(line, markup=False)
    for kind in ("decode", "prefill"):
        path = place / f"bench-{kind}.png"
        if bench_report.plot(found, path, kind, bench_report.machine_line(rows)):
            say(f"wrote {path}")
