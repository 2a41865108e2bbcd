"""The cache map of the page: heads down, tokens across, calls as a slider; one number per head and token."""

import numpy as np
from bokeh.layouts import column
from bokeh.models import (
    ColumnDataSource,
    CustomJS,
    CustomJSHover,
    CustomJSTickFormatter,
    FixedTicker,
    HoverTool,
    Image,
    LinearColorMapper,
    Scatter,
    Slider,
    UIElement,
)
from bokeh.plotting import figure

from experiments.pages.cache_map import REASONS, CacheMap
from experiments.pages.palette import INK, STATES

WIDTH = 1130
TIP = '<div style="max-width: 420px">$x{custom}</div>'
ROOM = 60_000  # heads times tokens up to which scores are told: 8 bytes each

# `went` and `came` in, the state of each place out, as CacheMap.state has it.
STATE = """
    const call = cb_obj.value
    const went = facts.get_array("went"), came = tokens.get_array("came")
    const state = new Uint8Array(went.length)
    for (let i = 0; i < went.length; i++) {
        const gone = went[i]
        state[i] = came[i % came.length] > call ? 0 : gone < 0 || gone > call ? 3 : gone == call && call > 0 ? 2 : 1
    }
    const before = shown.data.image[0]
    const image = new before.constructor(state.buffer, before.shape)
    shown.data = {...shown.data, image: [image]}
"""
HOVER = """
    const position = Math.floor(special_vars.x + 0.5), row = Math.floor(special_vars.y + 0.5)
    const came = tokens.get_array("came"), piece = tokens.get_array("piece")
    if (position < 0 || position >= came.length || row < 0 || row >= heads.length) return ""
    const place = row * came.length + position
    const gone = facts.get_array("went")[place]
    const when = (call) => call == 0 ? "at the end of the prompt" : `after ${call} more token${call > 1 ? "s" : ""}`
    const lines = [`${heads[row]}, position ${position}: ${JSON.stringify(piece[position])}`]
    if (came[position] > slider.value) lines.push("not come yet")
    else if (gone < 0) lines.push("stays to the end")
    else {
        lines.push(`${gone > slider.value ? "goes" : "went"} ${when(gone)}`)
        const reason = reasons[facts.get_array("reason")[place]]
        const score = scored ? facts.get_array("score")[place] : NaN
        const bar = scored ? facts.get_array("threshold")[place] : NaN
        if (reason == "window") lines.push("no later query sees it through the layer's sliding window")
        else if (reason == "protected") lines.push("protected tokens filled the budget")
        else if (scored) lines.push(`score ${score.toPrecision(4)}; the lowest that stayed: ${bar.toPrecision(4)}`)
        else lines.push("its score was below the lowest that stayed")
    }
    return lines.join("; ")
"""


def chart(one: CacheMap) -> UIElement:
    """The map under its slider. Its source is named `cache map`, the slider `call`."""
    rows, count = one.went.shape
    scored = rows * count <= ROOM
    heads = [f"layer {layer} head {head}" for layer, head in one.heads]
    data = {"went": one.went.ravel(), "reason": one.reason.ravel()}
    if scored:
        data |= {"score": one.score.ravel(), "threshold": one.threshold.ravel()}
    facts = ColumnDataSource(data, name="cache map facts")
    tokens = ColumnDataSource({"came": one.came, "piece": list(one.pieces)})
    shown = ColumnDataSource({"image": [one.state(0)]}, name="cache map")
    slider = Slider(
        start=0,
        end=max(one.calls, 1),
        value=0,
        step=1,
        width=WIDTH - 60,
        title="Tokens after the prompt",
        name="call",
    )
    slider.js_on_change(
        "value", CustomJS(args={"facts": facts, "tokens": tokens, "shown": shown}, code=STATE)
    )
    plot = _canvas(rows, count, heads)
    mapper = LinearColorMapper(palette=list(STATES.values()), low=-0.5, high=3.5)
    # Row 0 is on top: the y axis runs downwards, and an image begins at its smallest y.
    drawn = plot.add_glyph(
        shown, Image(image="image", x=-0.5, y=-0.5, dw=count, dh=rows, color_mapper=mapper)
    )
    marked = np.flatnonzero(one.answer)
    ticks = ColumnDataSource({"x": marked, "y": np.full(len(marked), -0.9)})
    plot.add_glyph(
        ticks, Scatter(x="x", y="y", marker="inverted_triangle", size=6, fill_color=INK, line_color=None)
    )
    formatter = CustomJSHover(
        args={
            "facts": facts,
            "tokens": tokens,
            "slider": slider,
            "heads": heads,
            "reasons": list(REASONS),
            "scored": scored,
        },
        code=HOVER,
    )
    plot.add_tools(HoverTool(tooltips=TIP, formatters={"$x": formatter}, renderers=[drawn]))
    return column(slider, plot)


def _canvas(rows: int, count: int, heads: list[str]) -> figure:
    plot = figure(
        width=WIDTH,
        height=min(900, max(150, 70 + 22 * rows)),
        x_range=(-0.5, count - 0.5),
        y_range=(rows - 0.5, -1.6),
        tools="xpan,xwheel_zoom,box_zoom,reset,save",
        active_scroll=None,
        toolbar_location="above",
        name="map",
    )
    plot.toolbar.logo = None
    plot.toolbar.autohide = True
    step = max(1, -(-rows // 32))
    plot.yaxis.ticker = FixedTicker(ticks=list(range(0, rows, step)))
    plot.yaxis.formatter = CustomJSTickFormatter(args={"heads": heads}, code="return heads[tick] ?? ''")
    plot.xaxis.axis_label = "position of the token"
    plot.axis.axis_label_text_font_style = "normal"
    plot.grid.grid_line_color = None
    return plot
