"""`kvtwin report`: one HTML file of what a sweep found, which needs no network, with a PNG and a CSV of each plot."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from experiments.record import folder
from framework.errors import KvtwinError

if TYPE_CHECKING:
    import pandas as pd

    from experiments.pages.cache_map import CacheMap

BACKEND = "torch"  # that the cache map is run on


def drawn_map(frame: "pd.DataFrame", policy: str | None) -> "CacheMap | str":
    """The cache map of one run, made now; or why there is none, but for a policy that was asked for, which raises."""
    from backends import backends
    from experiments.pages.cache_map import cache_map, choose

    try:
        choice = choose(frame, policy)
        if choice is None:
            return "No cell evicted anything: there is no cache map to draw."
        return cache_map(backends.get(BACKEND).load(choice.model), choice)
    except KvtwinError as error:
        if policy is not None:
            raise
        return f"The cache map could not be drawn: {error}"


def build(
    frame: "pd.DataFrame", out: Path, title: str, policy: str | None = None, with_map: bool = True
) -> Path:
    """Write the page and what lies beside it into a folder, made if need be; the path of the page."""
    from experiments.pages.sections import gather, write

    if not len(frame):
        raise KvtwinError("the results hold no rows; expected some: run kvtwin run first")
    found = drawn_map(frame, policy) if with_map else "The cache map was left out."
    page = gather(frame, None, found) if isinstance(found, str) else gather(frame, found, "")
    return write(page, title, folder(out))


def command(
    results: Annotated[Path, typer.Argument(help="What kvtwin run wrote, as results.sqlite.")],
    out: Annotated[
        Path, typer.Option(help="Folder for report.html, and a PNG and a CSV of each plot.")
    ] = Path("results/report"),
    policy: Annotated[
        str | None,
        typer.Option(
            "--map", help='Policy of the cache map, as in "h2o(budget=64)"; else that of least budget.'
        ),
    ] = None,
    no_map: Annotated[bool, typer.Option("--no-map", help="Leave the cache map out.")] = False,
) -> None:
    """Make a page of curves, differences, tables and the cache map."""
    from experiments.sweeps.results import read

    if policy is not None and no_map:
        raise KvtwinError("--map and --no-map were both given; expected one of them")
    frame = read(results)
    typer.echo(build(frame, out, f"kvtwin: {results.name}", policy, not no_map))
