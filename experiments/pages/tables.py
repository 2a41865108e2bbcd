"""The tables and the words of the page: what ran, all cells, what was flagged, how backends agree."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import pandas as pd
from bokeh.models import (
    ColumnDataSource,
    DataTable,
    NumberFormatter,
    StringFormatter,
    TableColumn,
)

from experiments.pages.summary import KIB, budget_label, cell_label

SHOWN = 4  # different values of a fact of the head that are named
# Titles, widths and formats of the table of cells; a format of None is text.
CELL_COLUMNS: dict[str, tuple[str, int, str | None]] = {
    "question": ("question", 185, None),
    "policy": ("policy", 165, None),
    "budget": ("budget", 54, "0.[000]"),
    "codec": ("codec", 75, None),
    "backend": ("backend", 64, None),
    "measure": ("measure", 64, None),
    "mean": ("mean", 56, "0.0000"),
    "low": ("low", 56, "0.0000"),
    "high": ("high", 56, "0.0000"),
    "n": ("seeds", 48, "0"),
    "flagged": ("flags", 130, None),
    "kept": ("kept", 52, "0.0"),
    "requested": ("requested", 74, "0.0"),
    "payload_kib": ("held KiB", 66, "0.0"),
    "allocated_kib": ("allocated", 70, "0.0"),
    "full_kib": ("of full", 56, "0.0"),
    "failed": ("failed", 48, "0"),
    "model": ("model", 80, None),
}
CELLS_WIDTH, CELLS_HEIGHT = 1240, 480


def number(value: Any, digits: int = 4) -> str:
    """So many digits that count; nothing for what is no number."""
    if isinstance(value, str) or value is None:
        return str(value or "")
    return f"{value:.{digits}g}" if np.isfinite(value) else ""


def with_interval(one: Mapping[str, Any], digits: int = 3) -> str:
    """A mean with its interval in brackets."""
    if not np.isfinite(one["mean"]):
        return "none"
    if not np.isfinite(one["low"]):
        return f"{number(one['mean'], digits)} (one seed)"
    return f"{number(one['mean'], digits)} [{number(one['low'], digits)}, {number(one['high'], digits)}]"


def html_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A plain table; numbers to the right."""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join("<tr>" + "".join(map(_entry, row)) + "</tr>\n" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def _entry(value: Any) -> str:
    if isinstance(value, str):
        return f"<td>{escape(value)}</td>"
    return f'<td class="number">{number(value)}</td>'


def head(frame: pd.DataFrame, cells: pd.DataFrame, facts: Mapping[str, Sequence[str]]) -> str:
    """What ran, where, and how much of it."""
    seeds = sorted(frame["seed"].unique())
    told = {
        "rows": f"{len(frame)} rows in {len(cells)} cells, {sum(cells['failed'])} rows failed",
        "seeds": f"{len(seeds)}: {_listed([str(seed) for seed in seeds], 24)}",
        "models": _named(frame, ["model", "weights", "dtype"]),
        "backends": _named(frame, ["backend"]),
        "policies": _listed(sorted(frame["policy"].unique()), 99),
        "codecs": _listed(sorted(frame["codec"].unique()), 99),
        "questions": _listed(list(dict.fromkeys(frame["question"])), 99),
        "seconds": f"{frame['seconds'].astype(float).sum():.0f} of running, all cells together",
    }
    told |= {name: _listed(values, SHOWN) for name, values in facts.items() if values}
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in told.items()) + "</dl>"


def _named(frame: pd.DataFrame, keys: Sequence[str]) -> str:
    different = frame[list(keys)].drop_duplicates().fillna("")
    return "; ".join(" ".join(str(each)[:60] for each in row if each) for row in different.to_numpy())


def _listed(values: Sequence[str], most: int) -> str:
    more = f" and {len(values) - most} more" if len(values) > most else ""
    if len(values) > most and most <= SHOWN:
        return f"{values[0]} to {values[-1]} ({len(values)} different)"
    return ", ".join(values[:most]) + more


def failed(found: pd.DataFrame) -> str:
    """Each failed cell with its error."""
    if not len(found):
        return "<p>No cell failed.</p>"
    items = "".join(
        f"<li><b>{escape(cell_label(one))}</b>: {one['count']} of {one['seeds']} seeds failed: "
        f"<code>{escape(one['error'])}</code></li>\n"
        for one in found.to_dict("records")
    )
    return f'<ul class="wrong">{items}</ul>'


def cell_table(cells: pd.DataFrame) -> DataTable:
    """All cells; a click on a column's name sorts by it."""
    source = ColumnDataSource(_cell_data(cells), name="cells")
    columns = [
        TableColumn(
            field=name,
            title=title,
            width=width,
            formatter=StringFormatter() if form is None else NumberFormatter(format=form, text_align="right"),
        )
        for name, (title, width, form) in CELL_COLUMNS.items()
    ]
    return DataTable(
        source=source,
        columns=columns,
        width=CELLS_WIDTH,
        height=CELLS_HEIGHT,
        index_position=None,
        reorderable=False,
        autosize_mode="none",
        row_height=22,
        name="cell table",
    )


def _cell_data(cells: pd.DataFrame) -> dict[str, Any]:
    kib = {f"{name}_kib": cells[name].to_numpy(float) / KIB for name in ("payload", "allocated", "full")}
    every = {name: cells[name] for name in CELL_COLUMNS if name in cells} | kib
    return {
        name: list(every[name]) if form is None else np.asarray(every[name], np.float64)
        for name, (_, _, form) in CELL_COLUMNS.items()
    }


def cells_without_script(cells: pd.DataFrame) -> str:
    """All cells as a plain table, for a reader without JavaScript."""
    columns = ("question", "policy", "budget", "codec", "model", "backend", "measure", "kept of requested")
    rows = (
        (
            one["question"],
            one["policy"],
            budget_label(one["budget"]),
            one["codec"],
            one["model"],
            one["backend"],
            f"{one['measure']} {with_interval(one)}",
            f"{number(one['kept'])} of {number(one['requested'])}",
            f"{number(one['payload'] / KIB)} of {number(one['full'] / KIB)}",
            one["flagged"],
        )
        for one in cells.to_dict("records")
    )
    return html_table([*columns, "held KiB of full", "flags"], rows)


def accounting(found: pd.DataFrame) -> str:
    """Every flagged cell in words."""
    if not len(found):
        return "<p>No cell is flagged: every budget was met, every eviction freed memory.</p>"
    items = "".join(f"<li>{sentence(one)}</li>\n" for one in found.to_dict("records"))
    return f'<ul class="flags">{items}</ul>'


def sentence(one: Mapping[str, Any]) -> str:
    """What a flag means for its cell, as HTML."""
    requested, kept = number(one["requested"]), number(one["kept"])
    words = {
        "missed_budget": f"missed the budget: a head kept {number(one['kept_min'])} to {number(one['kept_max'])} "
        f"tokens (mean {kept}) where {requested} were requested",
        "never_fired": f"never fired: nothing was evicted from {number(one['context'])} tokens under a budget of "
        f"{requested}, so that this is the full cache",
        "masked": f"masked: {kept} of {number(one['context'])} tokens were kept, and {_kib(one['allocated'])} stayed "
        f"allocated where all tokens take {_kib(one['full'])}",
    }.get(one["flag"], f"is flagged {escape(str(one['flag']))}")
    return f"<b>{escape(cell_label(one))}</b> {words}; {one['count']} of {one['seeds']} seeds."


def _kib(count: float) -> str:
    return f"{count / KIB:.1f} KiB" if np.isfinite(count) else "unknown bytes"


def agreement(found: pd.DataFrame) -> str:
    """Cells that ran on two backends, those that differ first."""
    if not len(found):
        return "<p>No cell ran on two backends.</p>"
    order = found.sort_values(
        ["same_kept", "same_said", "largest"], ascending=[True, True, False], kind="stable"
    )
    equal = int(((found["same_kept"] == 1) & (found["same_said"] == 1)).sum())
    rows = (
        (
            one["question"],
            one["policy"],
            budget_label(one["budget"]),
            one["codec"],
            one["model"],
            f"{one['first']}, {one['second']}",
            one["n"],
            f"{100 * one['same_kept']:.0f}%",
            f"{100 * one['same_said']:.0f}%",
            one["largest"],
        )
        for one in order.to_dict("records")
    )
    columns = ["question", "policy", "budget", "codec", "model", "backends", "seeds"]
    table = html_table([*columns, "same kept counts", "same text", "largest difference"], rows)
    return f"<p>{equal} of {len(found)} pairs kept as many tokens and wrote the same text for every seed.</p>{table}"


def measures(found: pd.DataFrame) -> str:
    """Cells down, their measures across."""
    keys = ["question", "model", "policy", "budget", "codec", "backend"]
    names = list(dict.fromkeys(found["measure"]))
    rows = []
    for key, each in found.groupby(keys, sort=False, dropna=False):
        by_name = {one["measure"]: with_interval(one) for one in each.to_dict("records")}
        label = [
            budget_label(part) if name == "budget" else str(part)
            for name, part in zip(keys, key, strict=True)
        ]
        rows.append([*label, *(by_name.get(name, "") for name in names)])
    return html_table([*keys, *names], rows)
