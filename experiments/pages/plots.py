"""The plots of the page, interactive: by bokeh, with one legend for two plots side by side.

Models are made sparingly (one source and three glyphs for a policy), since each takes half a kilobyte of the page.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from bokeh.layouts import column, row
from bokeh.models import (
    BasicTicker,
    ColorBar,
    ColumnDataSource,
    CustomJS,
    FactorRange,
    Glyph,
    GlyphRenderer,
    HoverTool,
    Legend,
    LegendItem,
    Line,
    LinearColorMapper,
    Rect,
    Scatter,
    Segment,
    Select,
    Step,
    Text,
    UIElement,
)
from bokeh.plotting import figure

from experiments.pages.palette import (
    DIVERGING,
    INK,
    QUIET,
    Look,
    bounds,
    codec_markers,
    is_full,
    letters,
)
from experiments.pages.static_plots import AXES, COSTS, along
from experiments.pages.summary import KIB, SETUP, Main, budget_label, front, groups

HEIGHT, WIDTH, LEGEND = 330, 455, 250
TOOLS = "pan,box_zoom,wheel_zoom,reset,save"
TIPS = [
    ("policy", "@policy"),
    ("budget", "@budget"),
    ("codec", "@codec"),
    ("backend", "@backend"),
    ("measure", "@mean{0.0000} [@low{0.0000}, @high{0.0000}], @n seeds"),
    ("tokens kept of requested", "@kept{0.0} of @requested{0.0}, context @context{0.0}"),
    ("KiB held, allocated, full", "@payload_kib{0.0}, @allocated_kib{0.0}, @full_kib{0.0}"),
    ("flags", "@flags"),
]


def source_of(rows: pd.DataFrame, **more: Any) -> ColumnDataSource:
    """What the plots and their tooltips read of cells."""
    data: dict[str, Any] = {name: rows[name].tolist() for name in ("policy", "codec", "backend")}
    data["budget"] = [budget_label(budget) or "none" for budget in rows["budget"]]
    data["flags"] = [", ".join(flags) or "none" for flags in rows["flags"]]
    data |= {
        name: rows[name].to_numpy(np.float32)
        for name in ("mean", "low", "high", "n", "kept", "requested", "context", "share")
    }
    data |= {
        f"{name}_kib": (rows[name].to_numpy(float) / KIB).astype(np.float32)
        for name in ("payload", "allocated", "full")
    }
    return ColumnDataSource(data | more)


def columns_of(x: str) -> str:
    """The column of a source that holds what an axis shows."""
    return f"{x}_kib" if x in COSTS else x


def canvas(x: str, rows: pd.DataFrame, main: Main, y_label: str, **options: Any) -> Any:
    """An empty plot with its axes."""
    start, end, scale = bounds(rows[["mean", "low", "high"]].to_numpy(float).ravel())
    far = 1.03 if x == "share" else 1.05 * (float(np.nanmax(along(rows, x), initial=0)) or 1.0)
    made = figure(
        height=HEIGHT,
        tools=TOOLS,
        toolbar_location="above",
        x_range=(0, far),
        y_axis_type=scale,
        **({"width": WIDTH, "y_range": (start, end)} | options),
    )
    made.toolbar.logo = None
    made.toolbar.autohide = True
    made.xaxis.axis_label, made.yaxis.axis_label = AXES[x], y_label
    made.axis.axis_label_text_font_style = "normal"
    made.grid.grid_line_alpha = 0.5
    made.outline_line_color = None
    return made


def quality(rows: pd.DataFrame, main: Main, looks: Mapping[str, Look], name: str) -> UIElement:
    """The main measure against the kept share and against bytes: one line per policy and backend. The two plots are
    called by `name` and `share` or `allocated`."""
    left = canvas("share", rows, main, main.label)
    right = canvas("allocated", rows, main, "", y_range=left.y_range, width=WIDTH + LEGEND)
    backends, items = list(dict.fromkeys(rows["backend"])), []
    for policy, each in _ordered(rows):
        look = looks[policy]
        shown: tuple[list[GlyphRenderer], list[GlyphRenderer]] = ([], [])
        for backend, lines in each.groupby("backend", sort=False):
            dash = "solid" if backend == backends[0] else "dotted"
            lines = lines.sort_values("share", kind="stable")
            source = source_of(lines, **_looks_of(lines, look))
            for axis, x, found in ((left, "share", shown[0]), (right, "allocated", shown[1])):
                found += _curve(axis, source, lines, columns_of(x), look, dash, is_full(policy))
        _together(shown[1], shown[0])
        items.append(LegendItem(label=policy, renderers=shown[1], index=_clean(each)))
    for axis in (left, right):
        points = [each for each in axis.renderers if each.name == "points"]
        axis.add_tools(HoverTool(tooltips=TIPS, renderers=points))
        axis.name = f"{name} {'share' if axis is left else 'allocated'}"
    _legend(right, items)
    return row(left, right)


def _ordered(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The policies by name, `full` first."""
    found = [(str(policy), each) for policy, each in rows.groupby("policy", sort=True)]
    return sorted(found, key=lambda each: not is_full(each[0]))


def _looks_of(rows: pd.DataFrame, look: Look) -> dict[str, list[str]]:
    """Hollow where there are flags, with their letters."""
    return {
        "fill": ["white" if flags else look.colour for flags in rows["flags"]],
        "letters": [letters(flags) for flags in rows["flags"]],
    }


def _curve(
    axis: Any, source: ColumnDataSource, rows: pd.DataFrame, x: str, look: Look, dash: str, across: bool
) -> list[Any]:
    """The glyphs of one policy: a line, whiskers, points, and letters where there are flags."""
    colour = look.colour
    found = []
    if across:
        mean = float(rows["mean"].mean())
        level = ColumnDataSource({"x": [0, axis.x_range.end], "y": [mean, mean]})
        style = "dashed" if dash == "solid" else "dotted"
        found.append(_glyph(axis, level, Line(x="x", y="y", line_color=colour, line_dash=style)))
    else:
        found.append(
            _glyph(axis, source, Line(x=x, y="mean", line_color=colour, line_width=1.8, line_dash=dash))
        )
    found.append(
        _glyph(
            axis,
            source,
            Segment(x0=x, x1=x, y0="low", y1="high", line_color=colour, line_alpha=0.6, line_width=1.4),
        )
    )
    points = Scatter(
        x=x, y="mean", size=8, marker=look.marker, line_color=colour, fill_color="fill", line_width=1.5
    )
    found.append(_glyph(axis, source, points, name="points"))
    if any(rows["flags"]):
        found.append(_glyph(axis, source, _letters(x, colour)))
    return found


def _clean(rows: pd.DataFrame) -> int:
    """The point that stands in the legend: one without flags, if there is one."""
    return next((number for number, flags in enumerate(rows["flags"]) if not flags), 0)


def _glyph(axis: Any, source: ColumnDataSource, glyph: Glyph, **options: Any) -> GlyphRenderer:
    """The glyph on a plot whose renderers share one view: each brings two more models otherwise."""
    first = next((each.view for each in axis.renderers), None)
    shared = {} if first is None else {"view": first}
    return axis.add_glyph(source, glyph, **shared, **options)


def _whiskers(x: str, colour: str) -> Segment:
    return Segment(x0=x, x1=x, y0="low", y1="high", line_color=colour, line_alpha=0.6, line_width=1.4)


def _letters(x: str, colour: str) -> Text:
    return Text(
        x=x, y="mean", text="letters", x_offset=5, y_offset=-3, text_font_size="10px", text_color=colour
    )


def _together(clicked: Sequence[Any], others: Sequence[Any]) -> None:
    """What the legend hides in one plot goes from the other too."""
    clicked[0].js_on_change(
        "visible",
        CustomJS(
            args={"others": list(others)}, code="for (const each of others) each.visible = cb_obj.visible"
        ),
    )


def _legend(axis: Any, items: Sequence[LegendItem]) -> None:
    legend = Legend(
        items=list(items), click_policy="hide", label_text_font_size="11px", border_line_color=None
    )
    legend.spacing, legend.padding, legend.margin, legend.glyph_height = 0, 2, 4, 15
    axis.add_layout(legend, "right")


def pareto(rows: pd.DataFrame, main: Main, looks: Mapping[str, Look]) -> UIElement:
    """The main measure against allocated bytes and against the payload, with the front of each."""
    left = canvas("allocated", rows, main, main.label)
    right = canvas("payload", rows, main, "", y_range=left.y_range, width=WIDTH + LEGEND)
    markers, items = codec_markers(rows["codec"]), []
    for policy, each in _ordered(rows):
        look = looks[policy]
        source = source_of(each, marker=[markers[codec] for codec in each["codec"]], **_looks_of(each, look))
        shown = [_dots(axis, source, columns_of(x), look, each) for axis, x in _sides(left, right)]
        _together(shown[1], shown[0])
        items.append(LegendItem(label=policy, renderers=shown[1], index=_clean(each)))
    for axis, cost in _sides(left, right):
        on = rows[front(rows, cost, main.sign)].sort_values([cost, "mean"])
        steps = ColumnDataSource({"x": along(on, cost), "y": on["mean"].to_numpy(float)})
        drawn = _glyph(
            axis, steps, Step(x="x", y="y", mode="after", line_color=INK, line_width=1.4), level="underlay"
        )
        points = [one for one in axis.renderers if one.name == "points"]
        axis.add_tools(HoverTool(tooltips=TIPS, renderers=points))
    items.append(LegendItem(label="Pareto front", renderers=[drawn]))
    nothing = ColumnDataSource({"x": [np.nan], "y": [np.nan]})
    for codec, marker in markers.items():
        shape = Scatter(x="x", y="y", marker=marker, size=8, line_color=QUIET, fill_color=QUIET)
        items.append(LegendItem(label=f"codec {codec}", renderers=[right.add_glyph(nothing, shape)]))
    _legend(right, items)
    return row(left, right)


def _sides(left: Any, right: Any) -> tuple[tuple[Any, str], tuple[Any, str]]:
    first, second = COSTS
    return (left, first), (right, second)


def _dots(axis: Any, source: ColumnDataSource, x: str, look: Look, rows: pd.DataFrame) -> list[Any]:
    colour = look.colour
    points = Scatter(
        x=x, y="mean", size=9, marker="marker", line_color=colour, fill_color="fill", line_width=1.5
    )
    found = [
        _glyph(axis, source, points, name="points"),
        _glyph(
            axis,
            source,
            Segment(x0=x, x1=x, y0="low", y1="high", line_color=colour, line_alpha=0.6, line_width=1.4),
        ),
    ]
    if any(rows["flags"]):
        found.append(_glyph(axis, source, _letters(x, colour)))
    return found


def setup_label(setup: Mapping[str, Any], budget: float) -> str:
    """What is compared, where it is chosen."""
    parts = [setup["question"], budget_label(budget) or "no budget", setup["model"], setup["codec"]]
    return " | ".join([*parts, f"{setup['backend']} {setup['dtype']}"])


def differences(found: pd.DataFrame) -> UIElement:
    """A heat table of paired differences for one question, budget and setup, which a menu chooses."""
    names = sorted(set(found["a"]) | set(found["b"]), key=lambda name: (not is_full(name), name))
    columns: dict[str, list[Any]] = {
        key: [] for key in ("a", "b", "text", "bounds", "style", "scaled", "ink")
    }
    places: dict[str, list[int]] = {}
    for setup, rows in groups(found, [*SETUP, "budget"]):
        begin = len(columns["a"])
        for key, values in _squares(rows).items():
            columns[key] += values
        places[setup_label(setup, setup["budget"])] = [begin, len(columns["a"])]
    every = ColumnDataSource(columns)
    first = next(iter(places))
    shown = ColumnDataSource({key: values[slice(*places[first])] for key, values in columns.items()})
    side = max(62, min(84, 940 // len(names)))
    room = 30 + 6 * max(map(len, names))
    table = figure(
        width=room + side * len(names) + 70,
        height=round(0.62 * side * len(names)) + min(room, 190) + 20,
        x_range=FactorRange(*names),
        y_range=FactorRange(*reversed(names)),
        tools="",
        toolbar_location=None,
        name="differences",
    )
    mapper = LinearColorMapper(palette=DIVERGING, low=-1, high=1)
    table.add_glyph(
        shown,
        Rect(
            x="b",
            y="a",
            width=0.97,
            height=0.96,
            line_color=None,
            fill_color={"field": "scaled", "transform": mapper},
        ),
    )
    shared = {"x": "b", "y": "a", "text_align": "center", "text_color": "ink"}
    table.add_glyph(
        shown,
        Text(text="text", y_offset=0, text_font_size="11px", text_font_style={"field": "style"}, **shared),
    )
    table.add_glyph(shown, Text(text="bounds", y_offset=11, text_font_size="8px", **shared))
    table.xaxis.major_label_orientation = 0.8
    table.grid.grid_line_color = None
    table.axis.major_tick_line_color = None
    table.outline_line_color = None
    bar = ColorBar(color_mapper=mapper, width=8, ticker=BasicTicker(desired_num_ticks=3), title="")
    bar.major_label_overrides = {-1: "worse", 0: "0", 1: "better"}
    table.add_layout(bar, "right")
    menu = Select(title="Compared:", value=first, options=list(places), width=720, name="compared")
    menu.js_on_change(
        "value",
        CustomJS(
            args={"every": every, "shown": shown, "places": places},
            code="""
            const place = places instanceof Map ? places.get(cb_obj.value) : places[cb_obj.value]
            const [begin, end] = place
            const data = {}
            for (const name of Object.keys(shown.data)) data[name] = every.get_array(name).slice(begin, end)
            shown.data = data
            """,
        ),
    )
    return column(menu, table)


def _squares(rows: pd.DataFrame) -> dict[str, list[Any]]:
    most = float(np.nanmax(np.abs(rows["gain"]), initial=0)) or 1.0
    scaled = (rows["gain"] / most).round(3)
    largest = float(np.nanmax(np.abs(rows["mean"]), initial=0)) or 1.0
    digits = max(0, 2 - math.floor(math.log10(largest)))  # three that count of the largest
    return {
        "a": rows["a"].tolist(),
        "b": rows["b"].tolist(),
        "text": [f"{mean:+.{digits}f}" for mean in rows["mean"]],
        "bounds": [
            f"{low:+.{digits}f}, {high:+.{digits}f}" if np.isfinite(low) else "one seed"
            for low, high in zip(rows["low"], rows["high"], strict=True)
        ],
        "style": ["bold" if each else "normal" for each in rows["excludes"]],
        "scaled": scaled.tolist(),
        "ink": ["white" if abs(each) > 0.75 else INK for each in scaled],
    }
