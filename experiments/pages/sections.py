"""The sections of the page: what each shows, its captions, and the plots that also lie beside it as PNG and CSV."""

from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import pandas as pd
from bokeh.document import Document
from bokeh.embed import components
from bokeh.models import UIElement
from bokeh.resources import Resources

from experiments.pages import map as page_map
from experiments.pages import plots as page_plots
from experiments.pages import static_plots
from experiments.pages import tables as page_tables
from experiments.pages import words as page_words
from experiments.pages.cache_map import CacheMap
from experiments.pages.cache_map import title as map_title
from experiments.pages.palette import Look, looks
from experiments.pages.summary import (
    PANEL,
    SETUP,
    Main,
    agreement,
    cells,
    every_measure,
    failures,
    flagged,
    front,
    groups,
    mains,
    ordered,
    pairs,
    provenance,
    slug,
)
from experiments.pages.words import caption
from experiments.record import whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Draw = Callable[[], "Figure | bytes"]
INTERVAL = "Intervals are 95%, of the mean over the seeds of a cell, by the bootstrap (percentiles of 2000 resamples)"
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
    frame = ordered(frame)
    main, page = mains(frame), Page()
    every, known = cells(frame, main), looks(frame["policy"])
    long = every_measure(frame)
    page.section("ran", "What ran", _ran(frame, every, main))
    page.section("quality", "Quality against memory", _quality(page, every, main, known))
    page.section(
        "differences", "Differences on the same prompts", _differences(page, pairs(frame, main), main)
    )
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
    overview = static_plots.render(static_plots.overview(_short(panels, main), known))
    html = [
        caption(page_words.QUALITY),
        f"<noscript>{_embedded(overview)}</noscript>",
        page.files("quality", lambda: overview, drawable(every)),
    ]
    for number, (key, rows) in enumerate(panels):
        html += _curves(page, panel_title(key), rows, main[key["question"]], known, f"quality-{number}")
    return "\n".join(html)


def _curves(
    page: Page, title: str, rows: pd.DataFrame, judged: Main, known: Mapping[str, Look], name: str
) -> list[str]:
    """One panel: its heading, what it is, the plot, and its files."""
    return [
        *_heading(title, rows, judged),
        page.root(name, page_plots.quality(rows, judged, known, name)),
        page.files(f"quality-{slug(title)}", partial(static_plots.quality, title, rows, judged, known), rows),
    ]


def _heading(title: str, rows: pd.DataFrame, judged: Main) -> list[str]:
    told = page_words.PANEL.format(measure=escape(judged.told), seeds=seeds_of(rows))
    return [f"<h3>{escape(title)}</h3>", caption(told)]


def _short(
    panels: Sequence[tuple[dict[str, Any], pd.DataFrame]], main: Mapping[str, Main]
) -> list[tuple[str, pd.DataFrame, Main]]:
    """The panels with titles of the question and what differs among them."""
    differ = (one for one in ("model", "codec", "dtype") if len({key[one] for key, _ in panels}) > 1)
    names = ["question", *differ]
    return [(" · ".join(str(key[one]) for one in names), rows, main[key["question"]]) for key, rows in panels]


def _embedded(picture: bytes) -> str:
    source = f"data:image/png;base64,{b64encode(picture).decode()}"
    return f'<img alt="Quality against the kept share, all questions" src="{source}">'


def _differences(page: Page, found: pd.DataFrame, main: Mapping[str, Main]) -> str:
    if not len(found):
        return "<p>No two policies ran on the same prompts under one budget.</p>"
    html = [
        caption(page_words.DIFFERENCES.format(seeds=seeds_of(found))),
        page.root("differences", page_plots.differences(found)),
        page.files("differences", None, found),
        "<details><summary>Pictures and tables by question</summary>",
    ]
    for setup, rows in groups(found, SETUP):
        title = panel_title(setup)
        picture = partial(static_plots.differences_plot, title, rows, main[setup["question"]])
        html.append(page.files(f"differences-{slug(title)}", picture, rows))
    return "\n".join([*html, "</details>"])


def _bytes(page: Page, every: pd.DataFrame, main: Mapping[str, Main], known: Mapping[str, Look]) -> str:
    html = [caption(page_words.BYTES)]
    for number, (key, rows) in enumerate(groups(drawable(every), PARETO)):
        title, judged = panel_title(key), main[key["question"]]
        if not judged.sign:
            continue
        on = {f"front_{cost}": front(rows, cost, judged.sign) for cost in static_plots.COSTS}
        picture = partial(static_plots.pareto_plot, title, rows, judged, known)
        html += [
            *_heading(title, rows, judged),
            page.root(f"bytes-{number}", page_plots.pareto(rows, judged, known)),
            page.files(f"bytes-{slug(title)}", picture, rows.assign(**on)),
        ]
    return "\n".join(html)


def _cells(page: Page, every: pd.DataFrame, long: pd.DataFrame) -> str:
    parts = [
        caption(page_words.CELLS),
        page.root("cells", page_tables.cell_table(every)),
        f"<noscript>{page_tables.cells_without_script(every)}</noscript>",
        page.files("cells", None, every),
        page.files("measures", None, long),
    ]
    return "\n".join(parts)


def _regret(page: Page, long: pd.DataFrame, known: Mapping[str, Look]) -> str:
    if not len(long):
        return "<p>The question regret did not run.</p>"
    html = [caption(page_words.REGRET), page_tables.measures(long), page.files("regret", None, long)]
    shown = long[(long["measure"] == "regret") & long["share"].notna() & (long["n"] > 0)]
    for number, (key, rows) in enumerate(groups(shown, PANEL)):
        judged = Main("regret", "lower", "share of attention")
        html += _curves(page, f"regret: {panel_title(key)}", rows, judged, known, f"regret-{number}")
    return "\n".join(html)


def _accounting(page: Page, found: pd.DataFrame) -> str:
    return page_tables.accounting(found) + page.files("flags", None, found)


def _backends(page: Page, found: pd.DataFrame, drift: pd.DataFrame) -> str:
    html = [
        caption(page_words.BACKENDS),
        page_tables.agreement(found),
        page.files("agreement", None, found),
    ]
    if len(drift):
        html += ["<h3>drift</h3>", caption(page_words.INTERVAL), page_tables.measures(drift)]
        html.append(page.files("drift", None, drift))
    return "\n".join(html)


def _map(page: Page, one: CacheMap | None, without: str) -> str:
    if one is None:
        return f"<p>{escape(without)}</p>"
    counts = one.kept(0).sum(-1)
    told = page_words.MAP.format(
        least=counts.min(), most=counts.max(), prompt=int((one.came == 0).sum()), evicted=one.evicted
    )
    parts = [
        f"<h3>{escape(map_title(one))}</h3>",
        caption(told),
        page.root("map", page_map.chart(one)),
        page.files("cache-map", partial(static_plots.map_plot, one), one.frame()),
    ]
    return "\n".join(parts)


def html_of(page: Page, title: str) -> str:
    """The whole page, with all that it needs inside."""
    document = Document()
    with document.models.freeze():  # else each root is searched again for each that comes
        for root in page.roots.values():
            document.add_root(root)
    script, divs = components(page.roots, theme=None) if page.roots else ("", {})
    resources = Resources(mode="inline", components=["bokeh", "bokeh-widgets", "bokeh-tables"]).render()
    body = []
    for anchor, heading, html in page.sections:
        for name, div in divs.items():
            html = html.replace(f"@@{name}@@", div)
        body.append(f'<section id="{anchor}">\n<h2>{escape(heading)}</h2>\n{html}\n</section>')
    nav = "".join(f'<a href="#{anchor}">{anchor}</a> ' for anchor, *_ in page.sections)
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
