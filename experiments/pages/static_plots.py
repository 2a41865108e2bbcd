"""The plots of a report as pictures and tables: a PNG by matplotlib and a CSV of what it shows."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.pages.cache_map import CacheMap
from experiments.pages.cache_map import title as map_title
from experiments.pages.palette import (
    DIVERGING,
    INK,
    MARKERS,
    QUIET,
    STATES,
    Look,
    bounds,
    codec_markers,
    is_full,
    letters,
)
from experiments.pages.summary import KIB, Main, budget_label, front
from experiments.record import whole

DPI = 110
SHADES = LinearSegmentedColormap.from_list("differences", DIVERGING)
NUMBERS = 8  # policies up to which a table of differences has room for numbers
COSTS = {"allocated": "KiB allocated per sequence", "payload": "KiB of kept keys and values per sequence"}
AXES = {"share": "kept share of the context"} | COSTS


def render(figure: Figure) -> bytes:
    """The figure as a PNG."""
    FigureCanvasAgg(figure)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def save_csv(frame: pd.DataFrame, path: Path) -> None:
    """The frame as a CSV file; flags are joined by spaces."""
    shown = frame.assign(flags=[" ".join(each) for each in frame["flags"]]) if "flags" in frame else frame
    with whole(path) as temporary:
        shown.to_csv(temporary, index=False)


def along(rows: pd.DataFrame, x: str) -> np.ndarray:
    """The column as it is drawn: bytes in KiB."""
    return rows[x].to_numpy(float) / (KIB if x in COSTS else 1)


def quality(title: str, rows: pd.DataFrame, main: Main, looks: Mapping[str, Look]) -> Figure:
    """The main measure of one panel, against the kept share and against the bytes."""
    figure = Figure(figsize=(10.6, 4.4))
    left, right = figure.subplots(1, 2, sharey=True)
    for axis, x in ((left, "share"), (right, "allocated")):
        curves(axis, rows, x, main, looks)
    left.set_ylabel(main.label)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    _legend(figure, rows, looks)
    return figure


def overview(panels: Sequence[tuple[str, pd.DataFrame, Main]], looks: Mapping[str, Look]) -> Figure:
    """The main plot: the measure of every panel against the kept share, side by side."""
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    every = pd.concat([rows for _, rows, _ in panels])
    foot = 0.45 + 0.22 * -(-every["policy"].nunique() // 4)
    height = 2.8 * lines + foot
    figure = Figure(figsize=(3.6 * columns + 0.4, height))
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis, (title, rows, main) in zip(axes, panels, strict=False):
        curves(axis, rows, "share", main, looks)
        axis.set_title("\n".join(wrap(title, 48)), fontsize=8.5, loc="left")
        axis.set_ylabel(main.label, fontsize=8)
        axis.set_xlabel(AXES["share"], fontsize=8)
        axis.tick_params(labelsize=8)
    for axis in axes[len(panels) :]:
        axis.remove()
    _handles(figure, every, looks, columns=4)
    figure.subplots_adjust(
        left=0.07 + 0.03 * (columns < 3),
        right=0.985,
        top=1 - 0.35 / height,
        bottom=(foot + 0.35) / height,
        wspace=0.28,
        hspace=0.5,
    )
    return figure


def curves(axis: Axes, rows: pd.DataFrame, x: str, main: Main, looks: Mapping[str, Look]) -> None:
    """One line per policy and backend with whiskers; `full` as a line across; flagged points hollow, with letters."""
    backends = list(dict.fromkeys(rows["backend"]))
    for (policy, backend), each in rows.groupby(["policy", "backend"], sort=False):
        look, style = looks[str(policy)], "-" if backend == backends[0] else ":"
        if is_full(str(policy)):
            axis.axhline(each["mean"].mean(), color=INK, lw=1, ls="--" if style == "-" else ":", zorder=1)
            if x == "share":
                continue
        _line(axis, each.iloc[np.argsort(along(each, x))], x, look, style)
    values = rows[["mean", "low", "high"]].to_numpy(float).ravel()
    start, end, scale = bounds(values)
    axis.set_yscale(scale)
    axis.set_ylim(start, end)
    axis.set_xlim(0, 1.03 if x == "share" else 1.05 * (np.nanmax(along(rows, x), initial=0) or 1))
    axis.set_xlabel(AXES[x])
    _plain(axis)


def _line(axis: Axes, rows: pd.DataFrame, x: str, look: Look, style: str) -> None:
    places, mean = along(rows, x), rows["mean"].to_numpy(float)
    axis.plot(places, mean, color=look.colour, lw=1.4, ls=style, zorder=2)
    _whiskers(axis, rows, places, look.colour)
    _points(axis, rows, places, look.colour, [look.marker] * len(rows))


def _whiskers(axis: Axes, rows: pd.DataFrame, places: np.ndarray, colour: str) -> None:
    axis.vlines(places, rows["low"], rows["high"], color=colour, lw=1.4, alpha=0.6, zorder=2)


def _points(axis: Axes, rows: pd.DataFrame, places: np.ndarray, colour: str, markers: Sequence[str]) -> None:
    for place, marker, mean, flags in zip(places, markers, rows["mean"], rows["flags"], strict=True):
        axis.plot(
            [place],
            [mean],
            marker=MARKERS[marker],
            ms=9 if marker == "star" else 5.5,
            color=colour,
            mfc="white" if flags else colour,
            ls="",
            zorder=3,
        )
        if flags:
            axis.annotate(
                letters(flags),
                (place, mean),
                (4, 4),
                textcoords="offset points",
                fontsize=7,
                color=colour,
            )


def pareto_plot(title: str, rows: pd.DataFrame, main: Main, looks: Mapping[str, Look]) -> Figure:
    """The main measure against bytes, all policies and codecs, with the front."""
    figure = Figure(figsize=(10.6, 4.4))
    axes = figure.subplots(1, 2, sharey=True)
    markers = codec_markers(rows["codec"])
    for axis, cost in zip(axes, COSTS, strict=True):
        for policy, each in rows.groupby("policy", sort=False):
            places, colour = along(each, cost), looks[str(policy)].colour
            _whiskers(axis, each, places, colour)
            _points(axis, each, places, colour, [markers[codec] for codec in each["codec"]])
        on = rows[front(rows, cost, main.sign)].sort_values([cost, "mean"])
        axis.step(along(on, cost), on["mean"], where="post", color=INK, lw=1, zorder=1)
        start, end, scale = bounds(rows[["mean", "low", "high"]].to_numpy(float).ravel())
        axis.set_yscale(scale)
        axis.set_ylim(start, end)
        axis.set_xlim(0, 1.05 * (np.nanmax(along(rows, cost), initial=0) or 1))
        axis.set_xlabel(COSTS[cost])
        _plain(axis)
    axes[0].set_ylabel(main.label)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    _legend(figure, rows, looks, markers)
    return figure


def differences_plot(title: str, rows: pd.DataFrame, main: Main) -> Figure:
    """Mean paired differences, row less column, one square for each budget; bold, or a dot where there are too many
    policies for numbers, where the interval excludes 0."""
    budgets, names = sorted(rows["budget"].unique()), list(dict.fromkeys(rows["a"]))
    side = (0.42 if len(names) <= NUMBERS else 0.22) * len(names) + 0.3
    left = 0.4 + 0.062 * max(map(len, names))
    width, height = left + len(budgets) * (side + 0.15), side + left + 0.9
    figure = Figure(figsize=(width, height))
    axes = figure.subplots(1, len(budgets), squeeze=False)[0]
    most = float(np.nanmax(np.abs(rows["gain"]), initial=0)) or 1.0
    for number, (axis, budget) in enumerate(zip(axes, budgets, strict=True)):
        each = rows[(rows["budget"] == budget) | (np.isnan(budget) & rows["budget"].isna())]
        grid, marks = np.full((len(names), len(names)), np.nan), []
        for one in each.itertuples():
            y, x = names.index(one.a), names.index(one.b)
            grid[y, x] = one.gain
            if len(names) > NUMBERS:
                marks.append((x, y, "white" if abs(one.gain) > 0.6 * most else INK) if one.excludes else None)
                continue
            axis.text(
                x,
                y,
                f"{one.mean:+.2g}",
                ha="center",
                va="center",
                fontsize=6.5,
                weight="bold" if one.excludes else "normal",
                color="white" if abs(one.gain) > 0.6 * most else INK,
            )
        if spots := [mark for mark in marks if mark]:
            xs, ys, colours = zip(*spots, strict=True)
            axis.scatter(xs, ys, s=7, c=colours)
        axis.imshow(
            grid,
            cmap=SHADES,
            vmin=-most,
            vmax=most,
            aspect="equal",
        )
        axis.set_title(budget_label(budget) or "no budget", fontsize=9)
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axis.set_yticks(range(len(names)), names if number == 0 else [""] * len(names), fontsize=7)
        axis.tick_params(length=0)
    told = "bold" if len(names) <= NUMBERS else "a dot"
    note = f"row less column; blue: the row is better; {told}: the 95% interval excludes 0"
    figure.suptitle(
        "\n".join(wrap(f"{title}: {main.name}, {note}", int(13 * width))), fontsize=9, x=0.01, ha="left"
    )
    figure.subplots_adjust(
        left=left / width, right=0.995, top=1 - 0.75 / height, bottom=left / height, wspace=0.06
    )
    return figure


def map_plot(one: CacheMap) -> Figure:
    """Which tokens each head holds after the prompt, midway and at the end."""
    calls = (0, one.calls // 2, one.calls)
    rows = len(one.heads)
    panel = min(max(0.16 * rows, 0.9), 4.0)
    height = 3 * (panel + 0.55) + 0.8
    figure = Figure(figsize=(10.6, height))
    axes = figure.subplots(3, 1, sharex=True)
    palette = ListedColormap(list(STATES.values()))
    step = max(1, rows // 8)
    for axis, call in zip(axes, calls, strict=True):
        state = one.state(call)
        extent = (-0.5, state.shape[1] - 0.5, rows - 0.5, -0.5)
        axis.imshow(
            state, cmap=palette, vmin=0, vmax=3, aspect="auto", interpolation="nearest", extent=extent
        )
        marked = np.flatnonzero(one.answer)
        axis.plot(marked, np.full(len(marked), -0.75), ls="", marker="|", ms=5, color=INK, clip_on=False)
        axis.set_yticks(
            range(0, rows, step), [f"L{layer} H{head}" for layer, head in one.heads[::step]], fontsize=7
        )
        held = one.kept(call).sum(-1)
        when = "after the prompt" if call == 0 else f"after {call} more tokens"
        axis.set_title(
            f"{when}: {held.min()} to {held.max()} of {int((one.came <= call).sum())} tokens held",
            fontsize=9,
            loc="left",
            pad=8,
        )
    axes[-1].set_xlabel("position of the token; ticks above a map mark the answer in the context")
    handles = [
        Line2D([], [], ls="", marker="s", color=colour, mec=QUIET, label=label)
        for label, colour in STATES.items()
    ]
    figure.suptitle(map_title(one), fontsize=10, x=0.01, ha="left")
    figure.legend(handles=handles, loc="lower right", ncols=4, frameon=False, fontsize=8)
    figure.subplots_adjust(
        left=0.06, right=0.99, top=1 - 0.65 / height, bottom=0.75 / height, hspace=0.55 / panel
    )
    return figure


def _plain(axis: Axes) -> None:
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _legend(
    figure: Figure, rows: pd.DataFrame, looks: Mapping[str, Look], codecs: Mapping[str, str] | None = None
) -> None:
    """The legend below, with room for it."""
    lines = _handles(figure, rows, looks, 4, codecs)
    height = figure.get_figheight()
    figure.subplots_adjust(
        left=0.07, right=0.985, top=1 - 0.42 / height, bottom=(0.62 + 0.2 * lines) / height, wspace=0.06
    )


def _handles(
    figure: Figure,
    rows: pd.DataFrame,
    looks: Mapping[str, Look],
    columns: int,
    codecs: Mapping[str, str] | None = None,
) -> int:
    """Draws the legend; how many lines it has."""

    def entry(label: Any, colour: str, marker: str, **more: Any) -> Line2D:
        return Line2D([], [], color=colour, marker=MARKERS[marker], ms=5.5, label=str(label), **more)

    names = sorted(set(rows["policy"]), key=lambda name: (not is_full(name), name))
    plain = codecs is not None
    handles = [
        entry(each, looks[each].colour, "circle" if plain else looks[each].marker, lw=0 if plain else 1.4)
        for each in names
    ]
    handles += [entry(f"codec {codec}", QUIET, marker, lw=0) for codec, marker in (codecs or {}).items()]
    if plain:
        handles.append(Line2D([], [], color=INK, lw=1, label="Pareto front"))
    elif len(set(rows["backend"])) > 1:
        for number, backend in enumerate(dict.fromkeys(rows["backend"])):
            handles.append(Line2D([], [], color=QUIET, ls=":" if number else "-", label=backend))
    if any(rows["flags"]):
        handles.append(entry("flagged", QUIET, "circle", mfc="white", lw=0))
    figure.legend(handles=handles, loc="lower center", ncols=columns, frameon=False, fontsize=8)
    return -(-len(handles) // columns)
