"""What a sweep found, as a table in the terminal: a row for each cell."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from experiments.interval import interval
from experiments.question import questions
from experiments.result import Cell
from experiments.sweeps.results import cells_of

if TYPE_CHECKING:
    from pandas import DataFrame

WIDTH = 140  # where the terminal does not say
FIELDS = ("model", "question", "policy", "budget", "codec", "backend", "dtype")
RIGHT = ("budget", "mean", "kept", "KiB")


def table(frame: "DataFrame") -> Table:
    """The mean of each cell's main measure with its interval of 95%, and what the cache held.

    What all cells share stands in the title. `kept`: tokens per kv head, of those that the budget asks for. `KiB`: keys
    and values of one row. A flag with a number holds for so many of the seeds, one without for all.
    """
    places: dict[Cell, list[int]] = {}
    for place, cell in enumerate(cells_of(frame)):
        places.setdefault(cell, []).append(place)
    cells = list(places)
    shown = [name for name in FIELDS if name in ("policy", "budget") or _differ(cells, name)]
    shared = [_field(cells[0], name) for name in FIELDS if name not in shown] if cells else []
    found = Table(box=None, pad_edge=False, title=Text(", ".join(shared)), title_justify="left")
    for name in (*shown, "measure", "mean", "95%", "seeds", "kept", "KiB", "flags"):
        found.add_column(name, justify="right" if name in RIGHT else "left", overflow="fold")
    for cell, those in places.items():
        texts = (*(_field(cell, name) for name in shown), *_told(cell, frame.iloc[those]))
        found.add_row(*(Text(each) for each in texts))
    return found


def _differ(cells: Sequence[Cell], name: str) -> bool:
    return len({getattr(cell, name) for cell in cells}) > 1


def _field(cell: Cell, name: str) -> str:
    value = getattr(cell, name)
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _told(cell: Cell, rows: "DataFrame") -> tuple[str, ...]:
    """Measure, mean, interval, seeds, kept, KiB and flags of a cell; in their place the error of one that failed."""
    [error, *_] = sorted(rows["error"], reverse=True)
    if error:
        return ("", "", "", str(len(rows)), "", "", f"failed: {error.splitlines()[0]}")
    main = questions.make(cell.question).measures[0]
    mean, low, high = interval(rows[f"measure.{main.name}"])
    spread = f"{low:.3g} to {high:.3g}" if len(rows) > 1 else ""
    kept, asked = rows["kept"].mean(), rows["requested"].mean()
    held = "" if kept != kept else f"{kept:g}" if asked != asked else f"{kept:g} of {asked:g}"
    size = rows["payload"].mean() / 1024
    flags = Counter(flag for each in rows["flags"] for flag in each)
    marks = [flag if count == len(rows) else f"{flag} ({count})" for flag, count in flags.items()]
    unit = f" ({main.unit})" if main.unit else ""
    return (
        f"{main.name}{unit}", f"{mean:.3g}", spread, str(len(rows)), held, "" if size != size else f"{size:.4g}",
        ", ".join(marks),
    )  # fmt: skip
