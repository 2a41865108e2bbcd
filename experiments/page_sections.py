"""The sections of the page: what each shows, its captions, and the plots that also lie beside it as PNG and CSV."""

from base64 import b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import pandas as pd
from bokeh.embed import components
from bokeh.models import UIElement
from bokeh.resources import Resources

from experiments import page_map, page_plots, page_tables, static_plots
from experiments.cache_map import CacheMap
from experiments.cache_map import title as map_title
from experiments.palette import FLAG_NOTE, Look, looks
from experiments.record import whole
from experiments.summary import (
    PANEL,
    SETUP,
    Main,
    agreement,
    cells,
    every_measure,
    failures,
    flagged,
    groups,
    mains,
    pairs,
    provenance,
    slug,
    told_apart,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Draw = Callable[[], "Figure | bytes"]
INTERVAL = (
    "Intervals are 95%, of the mean over the seeds of a cell, by the bootstrap (percentiles of 2000 resamples)"
)
PARETO = ["question", "model", "weights", "dtype", "backend"]


@dataclass
class Page:
    """What is gathered: HTML of the sections, bokeh's roots by name, and what lies beside the page.

    `pictures`: name of a PNG file and what draws it; `tables`: name of a CSV file and what it holds.
    """

    sections: list[tuple[str, str, str]] = field(default_factory=list)
    roots: dict[str, UIElement] = field(default_factory=dict)
    pictures: dict[str, Draw] = field(default_factory=dict)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)

    def section(self, anchor: str, title: str, html: str) -> None:
        """The next section."""
        self.sections.append((anchor, title, html))

    def root(self, name: str, model: UIElement) -> str:
        """Where an interactive element goes."""
        self.roots[name] = model
        return f'<div class="plot">@@{name}@@</div>'

    def files(self, name: str, picture: Draw | None, table: pd.DataFrame | None) -> str:
        """A PNG and a CSV beside the page, and a line that names them; a name that is taken gets a number."""
        number = 2
        while name in self.pictures or name in self.tables:
            name, number = f"{name.removesuffix(f'-{number - 1}')}-{number}", number + 1
        links = []
        if picture is not None:
            self.pictures[name] = picture
            links.append(f'<a href="{name}.png">{name}.png</a>')
        if table is not None:
            self.tables[name] = table
            links.append(f'<a href="{name}.csv">{name}.csv</a>')
        return f'<p class="files">{" ".join(links)}</p>'


def gather(frame: pd.DataFrame, one: CacheMap | None, without_map: str) -> Page:
    """All sections of the page. `without_map` says why there is no map where there is none."""
    frame = told_apart(frame)
    main, page = mains(frame), Page()
    every, known = cells(frame, main), looks(frame["policy"])
    long = every_measure(frame)
    page.section("ran", "What ran", _ran(frame, every, main))
    page.section("quality", "Quality against memory", _quality(page, every, main, known))
    page.section("differences", "Differences on the same prompts", _differences(page, pairs(frame, main), main))
    page.section("bytes", "Quality against bytes", _bytes(page, every, main, known))
    page.section("cells", "All cells", _cells(page, every, long))
    page.section("regret", "Regret against the oracles", _regret(page, long[long["task"] == "regret"], known))
    page.section("accounting", "Honest accounting", _accounting(page, flagged(frame)))
    drift = long[long["task"] == "drift"]
    page.section("backends", "Agreement of the backends", _backends(page, agreement(frame, main), drift))
    page.section("map", "The cache map", _map(page, one, without_map))
    return page


def seeds_of(rows: pd.DataFrame) -> str:
    """How many seeds the points stand for."""
    least, most = int(rows["n"].min()), int(rows["n"].max())
    return f"n = {most} seeds" if least == most else f"n = {least} to {most} seeds"


def panel_title(key: Mapping[str, Any]) -> str:
    """What one plot shows."""
    parts = [key["question"], key["model"], key.get("codec", ""), key["dtype"], key.get("backend", "")]
    return " · ".join(str(part) for part in parts if part)


def drawable(every: pd.DataFrame) -> pd.DataFrame:
    """Cells with a measure, and a cache that it was measured on."""
    return every[(every["n"] > 0) & every["share"].notna()]


def _ran(frame: pd.DataFrame, every: pd.DataFrame, main: Mapping[str, Main]) -> str:
    unknown = [question for question, one in main.items() if not one.known]
    note = "".join(
        f'<p class="caption">{escape(question)} cannot be made any more by this version: its first measure, '
        f"{escape(main[question].name)}, is shown, and more is taken to be better.</p>"
        for question in unknown
    )
    facts = page_tables.head(frame, every, provenance(frame))
    return f"{facts}{note}<h3>Failed cells</h3>{page_tables.failed(failures(frame))}"


def _quality(page: Page, every: pd.DataFrame, main: Mapping[str, Main], known: Mapping[str, Look]) -> str:
    panels = list(groups(drawable(every), PANEL))
    if not panels:
        return "<p>No cell has both a measure and a cache: nothing to draw.</p>"
    shown = [(panel_title(key), rows, main[key["question"]]) for key, rows in panels]
    overview = static_plots.render(static_plots.overview(shown, known))
    html = [
        f'<p class="caption">Left against the kept share of the context that was achieved, right against all bytes that '
        f"the cache allocated for a sequence, each a mean over the seeds. {INTERVAL}; the vertical lines. The dashed "
        f"line is full(). A second backend is dotted. {FLAG_NOTE} Oracles, where they ran, are grey: they see the "
        "future. A click on a policy in the legend hides it.</p>",
        f"<noscript>{_embedded(overview)}</noscript>",
        page.files("quality", lambda: overview, drawable(every)),
    ]
    for number, (title, rows, judged) in enumerate(shown):
        picture = partial(static_plots.quality, title, rows, judged, known)
        html += [
            f"<h3>{escape(title)}</h3>",
            f'<p class="caption">{escape(judged.label)}; {seeds_of(rows)}; whiskers: 95% interval of the mean.</p>',
            page.root(f"quality-{number}", page_plots.quality(rows, judged, known, f"quality-{number}")),
            page.files(f"quality-{slug(title)}", picture, rows),
        ]
    return "\n".join(html)


def _embedded(picture: bytes) -> str:
    source = f"data:image/png;base64,{b64encode(picture).decode()}"
    return f'<img alt="Quality against the kept share, all questions" src="{source}">'


def _differences(page: Page, found: pd.DataFrame, main: Mapping[str, Main]) -> str:
    if not len(found):
        return "<p>No two policies ran on the same prompts under one budget.</p>"
    html = [
        '<p class="caption">Mean of the row\'s policy less the column\'s, seed by seed on the same prompts under the same '
        f"budget ({seeds_of(found)}); policies without a budget stand in each. Below it the 95% interval of that mean, "
        "by the bootstrap; bold where it excludes 0. Blue: the row is better; orange: the column is; scaled to the "
        "largest difference shown. The intervals are not corrected for the number of comparisons.</p>",
        page.root("differences", page_plots.differences(found)),
        page.files("differences", None, found),
    ]
    for setup, rows in groups(found, SETUP):
        title = panel_title(setup)
        picture = partial(static_plots.differences_plot, title, rows, main[setup["question"]])
        html.append(page.files(f"differences-{slug(title)}", picture, rows))
    return "\n".join(html)


def _bytes(page: Page, every: pd.DataFrame, main: Mapping[str, Main], known: Mapping[str, Look]) -> str:
    html = [
        '<p class="caption">Every policy (colour) under every codec (marker), against all bytes allocated for a sequence '
        "(left) and against those of the kept keys and values alone (right). The black line is the Pareto front: no cell "
        f"takes as little and is better. Oracles are never on it, masked cells not on the right one. {INTERVAL}. "
        f"{FLAG_NOTE}</p>"
    ]
    for number, (key, rows) in enumerate(groups(drawable(every), PARETO)):
        title, judged = panel_title(key), main[key["question"]]
        if not judged.sign:
            continue
        on = {f"front_{cost}": static_plots.front(rows, cost, judged.sign) for cost in static_plots.COSTS}
        picture = partial(static_plots.pareto_plot, title, rows, judged, known)
        html += [
            f"<h3>{escape(title)}</h3>",
            f'<p class="caption">{escape(judged.label)}; {seeds_of(rows)}; whiskers: 95% interval of the mean.</p>',
            page.root(f"bytes-{number}", page_plots.pareto(rows, judged, known)),
            page.files(f"bytes-{slug(title)}", picture, rows.assign(**on)),
        ]
    return "\n".join(html)


def _cells(page: Page, every: pd.DataFrame, long: pd.DataFrame) -> str:
    return "\n".join(
        [
            '<p class="caption">A click on a column sorts by it. low and high bound the 95% interval of the mean over the '
            "seeds, by the bootstrap; tokens are per kv head and bytes per sequence, means over the seeds. A flag "
            "stands with the number of seeds that have it.</p>",
            page.root("cells", page_tables.cell_table(every)),
            f"<noscript>{page_tables.cells_without_script(every)}</noscript>",
            page.files("cells", None, every),
            page.files("measures", None, long),
        ]
    )


def _regret(page: Page, long: pd.DataFrame, known: Mapping[str, Look]) -> str:
    if not len(long):
        return "<p>The question regret did not run.</p>"
    html = [
        '<p class="caption">mass: the share of later attention that goes to kept tokens; future and step: what two oracles '
        "have with as many tokens, without and with a way back; regret: future less mass, below 0 where a policy does "
        f"better than the greedy oracle. {INTERVAL}. {FLAG_NOTE}</p>",
        page_tables.measures(long),
        page.files("regret", None, long),
    ]
    for key, rows in groups(long[long["share"].notna() & (long["n"] > 0)], PANEL):
        by_name = dict(iter(rows.groupby("measure", sort=False)))
        if "regret" in by_name:
            title = f"{panel_title(key)}: regret"
            judged = Main("regret", "lower", "share of attention")
            name = f"regret-{slug(title)}"
            html += [
                f"<h3>{escape(title)}</h3>",
                f'<p class="caption">{escape(judged.label)}; {seeds_of(by_name["regret"])}; whiskers: 95% interval of the '
                "mean.</p>",
                page.root(name, page_plots.quality(by_name["regret"], judged, known, name)),
                page.files(
                    name, partial(static_plots.quality, title, by_name["regret"], judged, known), by_name["regret"]
                ),
            ]
    return "\n".join(html)


def _accounting(page: Page, found: pd.DataFrame) -> str:
    return page_tables.accounting(found) + page.files("flags", None, found)


def _backends(page: Page, found: pd.DataFrame, drift: pd.DataFrame) -> str:
    html = [
        '<p class="caption">The same cell on two backends, seed by seed: the share of seeds that kept the same number of '
        "tokens (fewest, most and mean of a head) and wrote the same text, and the largest difference of the main "
        "measure.</p>",
        page_tables.agreement(found),
        page.files("agreement", None, found),
    ]
    if len(drift):
        html += ["<h3>drift</h3>", f'<p class="caption">{INTERVAL}.</p>', page_tables.measures(drift)]
        html.append(page.files("drift", None, drift))
    return "\n".join(html)


def _map(page: Page, one: CacheMap | None, without: str) -> str:
    if one is None:
        return f"<p>{escape(without)}</p>"
    counts = one.kept(0).sum(-1)
    return "\n".join(
        [
            f"<h3>{escape(map_title(one))}</h3>",
            '<p class="caption">One run again, on torch, when this page was made: the prompt, then the question and the '
            "right answer (or the next text) one token a call. Rows are the kv heads of all layers, columns the tokens. "
            '<span style="color:#0072b2">Blue</span> is held, <span style="color:#d55e00">orange</span> goes at this call, '
            "grey went before, white has not come yet; triangles mark the answer in the context. Hover for a token's "
            f"text, and when and why it goes. After the prompt a head holds {counts.min()} to {counts.max()} of "
            f"{int((one.came == 0).sum())} tokens; {one.evicted} evictions in all. No interval: it is one run.</p>",
            page.root("map", page_map.chart(one)),
            page.files("cache-map", partial(static_plots.map_plot, one), one.frame()),
        ]
    )


def html_of(page: Page, title: str) -> str:
    """The whole page, with all that it needs inside."""
    script, divs = components(page.roots) if page.roots else ("", {})
    resources = Resources(mode="inline", components=["bokeh", "bokeh-widgets", "bokeh-tables"]).render()
    body = []
    for anchor, heading, html in page.sections:
        for name, div in divs.items():
            html = html.replace(f"@@{name}@@", div)
        body.append(f'<section id="{anchor}">\n<h2>{escape(heading)}</h2>\n{html}\n</section>')
    nav = "".join(f'<a href="#{anchor}">{escape(heading)}</a> ' for anchor, heading, _ in page.sections)
    form = Template(Path(__file__).with_name("page.html").read_text())
    return form.substitute(
        title=escape(title), resources=resources, nav=nav, body="\n".join(body), script=script
    )


def write(page: Page, title: str, out: Path) -> Path:
    """The pictures and tables, then the page itself, each written whole or not at all; the path of the page."""
    for name, table in page.tables.items():
        static_plots.save_csv(table, out / f"{name}.csv")
    for name, picture in page.pictures.items():
        drawn = picture()
        with whole(out / f"{name}.png") as temporary:
            temporary.write_bytes(drawn if isinstance(drawn, bytes) else static_plots.render(drawn))
    target = out / "report.html"
    with whole(target) as temporary:
        temporary.write_text(html_of(page, title))
    return target

