"""What `kvtwin collapse` found, as a table for a terminal of 100 columns and a plot beside the published figures."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.collapse import FULL, PUBLISHED, Cell, agree, grouped
from experiments.record import whole

if TYPE_CHECKING:
    from rich.table import Table

WIDTH = 100  # columns, where the output is no terminal
LOST = "refused"  # what a cell says that has no perplexity


def digits(value: float) -> str:
    """Four digits, as they are written."""
    return f"{value:.{max(0, 4 - len(str(int(value))))}f}"


def title(cells: Sequence[Cell]) -> str:
    """What the table shows."""
    first, backends = cells[0], "|".join(dict.fromkeys(cell.backend for cell in cells))
    return (
        f"{first.model}, {first.rewrite}: perplexity of {first.rows} stretches of {first.tokens} tokens, "
        f"one a step, over its ratio to {FULL}; {backends}"
    )


def table(cells: Sequence[Cell]) -> "Table":
    """Codecs down, strengths across, perplexity over its ratio to the exact cache; torch|flax where they differ."""
    from rich import box
    from rich.table import Table

    found = grouped(cells)
    strengths = list(dict.fromkeys(cell.strength for cell in cells))
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    made.add_column("codec", no_wrap=True)
    for strength in strengths:
        made.add_column(f"{strength:g}", justify="right", no_wrap=True)
    made.add_column("Qwen2-7B", justify="right", no_wrap=True)
    for codec in dict.fromkeys(cell.codec for cell in cells):
        row = [entry(found[codec, strength]) for strength in strengths]
        theirs = PUBLISHED.get(codec)
        row.append("" if theirs is None else f"{theirs:.2f}\nx{theirs / PUBLISHED[FULL]:.3f}")
        made.add_row(codec, *row)
    return made


def entry(cells: Sequence[Cell]) -> str:
    """One cell of the table, from those of each backend: one text where they agree."""
    alike = agree(cells) and len({cell.silent for cell in cells}) == 1
    shown = [_shown(cell) for cell in (cells[:1] if alike else cells)]
    text = "\n".join("|".join(parts) for parts in zip(*shown, strict=True)).rstrip("\n|")
    return text if alike and not cells[0].silent else f"[red]{text}"


def _shown(cell: Cell) -> tuple[str, str]:
    if cell.perplexity is None:
        return ("NaN" if cell.silent else LOST), ""
    return digits(cell.perplexity), "" if cell.ratio is None else f"x{cell.ratio:.3f}"


def notes(cells: Sequence[Cell]) -> list[str]:
    """Why cells have no perplexity: the first error of each codec and backend."""
    found: dict[tuple[str, str], Cell] = {}
    for cell in cells:
        if cell.error is not None:
            found.setdefault((cell.codec, cell.backend), cell)
    return [
        f"{codec} at {cell.strength:g} on {backend}: {cell.error}" for (codec, backend), cell in found.items()
    ]


def plot(cells: Sequence[Cell], path: Path) -> None:
    """Ratio against strength, filled for the first backend and a ring for the others, beside the published ratios."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, NullLocator

    names = [name for name in dict.fromkeys(cell.codec for cell in cells) if name != FULL]
    colours = dict(zip(names, pyplot.get_cmap("tab20" if len(names) > 10 else "tab10").colors, strict=False))
    backends = list(dict.fromkeys(cell.backend for cell in cells))
    first = cells[0]
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(9.2, 4.6), sharey=True, gridspec_kw={"width_ratios": (4, 1)}
    )
    for name in names:
        for index, backend in enumerate(backends):
            points = [
                (cell.strength, cell.ratio)
                for cell in cells
                if cell.codec == name and cell.backend == backend and cell.ratio is not None
            ]
            if points:
                style = (
                    {"markersize": 5, "ls": "-"}
                    if index == 0
                    else {"markersize": 9, "ls": "", "fillstyle": "none"}
                )
                left.plot(*zip(*points, strict=True), color=colours[name], marker="o", **style)
        lost = [cell.strength for cell in cells if cell.codec == name and cell.perplexity is None]
        height = [0.05 + 0.05 * names.index(name)] * len(lost)  # of the panel: they have no ratio
        left.plot(lost, height, color=colours[name], marker="x", ls="", transform=left.get_xaxis_transform())
        if name in PUBLISHED:
            right.plot([0], [PUBLISHED[name] / PUBLISHED[FULL]], color=colours[name], marker="o", ls="")
    left.set_xscale("symlog" if any(cell.strength <= 0 for cell in cells) else "log")
    left.set_yscale("log")
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_minor_locator(NullLocator())
    left.yaxis.set_major_formatter("{x:g}")
    left.xaxis.set_major_formatter("{x:g}")
    left.set_xlabel("factor of the pair" if first.rewrite == "pair_rescale" else "bias added to the keys")
    left.set_ylabel("perplexity, relative to the exact cache")
    left.set_title(
        f"{first.model}, {first.rewrite}: {first.rows} stretches of {first.tokens} tokens", fontsize=11
    )
    right.set_title("published", fontsize=11)
    right.set_xticks([0], ["Qwen2-7B"])
    right.set_xlim(-1, 1)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    handles = [Line2D([], [], color=colours[name], marker="o", label=name) for name in names]
    handles += [
        Line2D([], [], color="grey", marker="o", ls="", label=backends[0]),
        *(
            Line2D([], [], color="grey", marker="o", markersize=9, fillstyle="none", ls="", label=each)
            for each in backends[1:]
        ),
        Line2D([], [], color="grey", marker="x", ls="", label=LOST),
    ]
    figure.legend(handles=handles, loc="lower center", ncols=5, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.06 + 0.04 * (len(handles) // 5), 1, 1))
    with whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    pyplot.close(figure)
