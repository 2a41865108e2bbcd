"""experiments/page.py and its parts: one file that needs no network, holds every cell and marks every flag."""

import re
import sys
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from bokeh.models import DataTable, GlyphRenderer, Scatter, Text
from bokeh.plotting import figure
from matplotlib.image import imread
from typer.testing import CliRunner

from experiments.page import build
from experiments.pages.cache_map import CacheMap, Choice, cache_map
from experiments.pages.palette import looks
from experiments.pages.sections import Page, gather, html_of, write
from experiments.pages.static_plots import curves
from experiments.pages.summary import KIB, agreement, cells, flagged, mains, ordered, pairs
from experiments.pages.tables import CELL_COLUMNS, cell_table, sentence, with_interval
from experiments.run import app
from framework.errors import KvtwinError
from tests.results_frame import HOSTILE, POLICIES, QUESTIONS, results

QUESTION = "mqar(length=120, pairs=3)"


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    made = results(
        questions=("gone()", QUESTION), budgets=(0.1, 48.0), policies=POLICIES[:3], seeds=3, seed=2
    )
    made["model"] = "recall"
    made = made[(made["backend"] == "torch") | (made["question"] == QUESTION)]
    regret = results(
        questions=("regret()",),
        policies=POLICIES[1:3],
        budgets=(0.1,),
        seeds=2,
        codecs=("full()",),
        backends=("torch",),
    )
    regret = regret.drop(columns=["measure.score", "measure.loss"]).assign(
        **{f"measure.{name}": 0.125 for name in ("regret", "mass", "future", "step")}
    )
    return ordered(pd.concat([made, regret], ignore_index=True))


@pytest.fixture(scope="module")
def every(frame: pd.DataFrame) -> pd.DataFrame:
    return cells(frame, mains(frame))


@pytest.fixture(scope="module")
def mapped() -> CacheMap:
    from backends import backends

    return cache_map(backends.get("torch").load("recall"), Choice("recall", "window(budget=40)", QUESTION, 0))


@pytest.fixture(scope="module")
def page(frame: pd.DataFrame, mapped: CacheMap) -> Page:
    return gather(frame, mapped, "")


@pytest.fixture(scope="module")
def place(page: Page, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the page."""
    made = tmp_path_factory.mktemp("report")
    assert write(page, "kvtwin: results.sqlite", made) == made / "report.html"
    return made


@pytest.fixture(scope="module")
def html(place: Path) -> str:
    return (place / "report.html").read_text()


class Tags(HTMLParser):
    """Every tag with its attributes, and the texts of scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.errors: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags:
            self.texts.setdefault(self.tags[-1][0], []).append(data)


def parsed(text: str) -> Tags:
    found = Tags()
    found.feed(text)
    return found


def points(roots):
    """The scatter glyphs of cells below these models, with their sources."""
    return [
        one for root in roots for one in root.select({"name": "points"}) if isinstance(one.glyph, Scatter)
    ]


# One file


def test_nothing_is_loaded_from_elsewhere(html):
    found = parsed(html)
    loads = [
        (tag, name, value)
        for tag, given in found.tags
        for name, value in given.items()
        if name in ("src", "srcset", "data", "poster", "action") or (name == "href" and tag == "link")
    ]
    assert loads
    assert [each for each in loads if not str(each[2]).startswith("data:")] == []
    links = [str(given["href"]) for tag, given in found.tags if tag == "a" and "href" in given]
    assert all(re.fullmatch(r"#[a-z]+|[a-z0-9-]+\.(png|csv)", each) for each in links)
    styles = "".join(found.texts["style"])
    assert not re.search(r"@import|url\(\s*['\"]?(https?:)?//", styles)


def test_the_page_is_below_five_megabytes(html):
    assert 10**6 < len(html.encode()) < 5 * 10**6


def test_every_section_is_there_and_named_above(html, page):
    anchors = [anchor for anchor, *_ in page.sections]
    assert anchors == "ran quality differences bytes cells regret accounting backends map".split()
    found = parsed(html)
    assert [given["id"] for tag, given in found.tags if tag == "section"] == anchors
    assert [given["href"] for tag, given in found.tags if tag == "a"][: len(anchors)] == [
        f"#{a}" for a in anchors
    ]
    for name in page.roots:
        assert f"@@{name}@@" not in html


def test_text_of_others_is_no_part_of_the_page(html, frame):
    assert (frame["error"] == HOSTILE).any()
    assert "<script>alert" not in html
    assert html.count("alert(&#x27;x&#x27;)") >= 1


def test_the_main_plot_is_there_without_a_script(html):
    pictures = [given["src"] for tag, given in parsed(html).tags if tag == "img"]
    assert len(pictures) == 1
    assert str(pictures[0]).startswith("data:image/png;base64,")
    assert f'<noscript><img alt="Quality against the kept share, all questions" src="{pictures[0]}"' in html


# Every cell


def test_the_table_holds_every_cell(every):
    table = cell_table(every)
    assert isinstance(table, DataTable)
    assert table.sortable
    data = table.source.data
    assert {column.field for column in table.columns} == set(CELL_COLUMNS) == set(data)
    assert {len(values) for values in data.values()} == {len(every)}
    for name in ("question", "policy", "codec", "backend", "flagged"):
        assert data[name] == every[name].tolist()
    for name in ("mean", "low", "high", "kept", "requested", "budget"):
        np.testing.assert_array_equal(data[name], every[name].to_numpy(float))
    np.testing.assert_allclose(data["payload_kib"] * KIB, every["payload"])


def test_the_table_without_a_script_holds_every_cell(html, every):
    (text,) = [
        each for each in re.findall(r"<noscript>(.*?)</noscript>", html, re.DOTALL) if "<table" in each
    ]
    rows = re.findall(r"<tr><td>.*?</tr>", text, re.DOTALL)
    assert len(rows) == len(every)
    for row, one in zip(rows, every.to_dict("records"), strict=True):
        entries = re.findall(r"<td[^>]*>(.*?)</td>", row)
        assert entries[1] == one["policy"]
        assert entries[9] == one["flagged"]
        assert entries[6] == f"{one['measure']} {escape(with_interval(one))}"
        assert (f"{one['mean']:.3g}" in entries[6]) == (one["n"] > 0)


def test_every_drawable_cell_is_a_point_of_its_panel(page, every):
    drawable = every[(every["n"] > 0) & every["share"].notna()]
    roots = [root for name, root in page.roots.items() if name.startswith("quality-")]
    drawn = [
        (policy, round(float(mean), 5))
        for one in points(roots)
        for policy, mean in zip(one.data_source.data["policy"], one.data_source.data["mean"], strict=True)
    ]
    wanted = [
        (one["policy"], round(np.float32(one["mean"]).item(), 5)) for one in drawable.to_dict("records")
    ]
    assert sorted(drawn) == sorted(wanted * 2)  # against the kept share, and against bytes


# Flags


def test_flagged_cells_are_hollow_in_every_plot(page, frame):
    known = looks(frame["policy"])
    found = points([root for name, root in page.roots.items() if name not in ("cells", "map", "differences")])
    hollow, labelled = (
        0,
        {
            id(each.data_source)
            for name, root in page.roots.items()
            if name not in ("cells", "map", "differences")
            for each in root.select({"type": GlyphRenderer})
            if isinstance(each.glyph, Text)
        },
    )
    for one in found:
        data = one.data_source.data
        for policy, flags, fill, letters in zip(
            data["policy"], data["flags"], data["fill"], data["letters"], strict=True
        ):
            assert (fill == "white") == (flags != "none") == bool(letters)
            hollow += fill == "white"
            assert one.glyph.line_color == known[policy].colour
        assert (id(one.data_source) in labelled) == any(data["letters"])
    assert hollow > 10


def test_flagged_cells_are_hollow_in_pictures(every):
    from matplotlib.figure import Figure

    rows = every[(every["question"] == QUESTION) & (every["codec"] == "int8()") & (every["n"] > 0)]
    rows = rows[~rows["method"].eq("full")]
    axis = Figure().subplots()
    main = mains(results(questions=(QUESTION,), seeds=1))[QUESTION]
    curves(axis, rows, "share", main, looks(POLICIES))
    drawn = [line for line in axis.lines if line.get_marker() not in ("None", None, "")]
    assert len(drawn) == len(rows)
    assert sum(line.get_markerfacecolor() == "white" for line in drawn) == sum(map(bool, rows["flags"])) > 0
    assert len(axis.texts) == sum(map(bool, rows["flags"]))


def test_every_flagged_cell_is_told_in_words(html, frame):
    text = html[html.index('id="accounting"') : html.index('id="backends"')]
    told = flagged(frame)
    assert text.count("<li>") == len(told) > 5
    for one in told.to_dict("records"):
        assert sentence(one) in text


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("missed_budget", "kept 3 to 9 tokens (mean 5) where 7 were requested"),
        ("never_fired", "nothing was evicted from 20 tokens under a budget of 7"),
        ("masked", "5 of 20 tokens were kept, and 4.0 KiB stayed allocated where all tokens take 3.0 KiB"),
        ("<new>", "is flagged &lt;new&gt;"),
    ],
)
def test_the_words_of_a_flag(flag, words):
    one = {
        "policy": "a()",
        "budget": 0.5,
        "codec": "c()",
        "backend": "torch",
        "dtype": "float32",
        "question": "q()",
    }
    one |= {"model": "m", "flag": flag, "count": 2, "seeds": 3, "kept_min": 3, "kept_max": 9, "kept": 5.0}
    one |= {"requested": 7.0, "context": 20.0, "allocated": 4096, "full": 3072}
    told = sentence(one)
    assert words in told
    assert told.startswith("<b>a() at 50%, c(), torch float32, q(), m</b>")
    assert told.endswith("2 of 3 seeds.")


def test_a_page_without_flags_and_failures_says_so():
    clean = results(
        questions=QUESTIONS[:1], flags=0, failures=0, seeds=2, codecs=("full()",), backends=("torch",)
    )
    text = html_of(gather(clean, None, "The cache map was left out."), "clean")
    for words in (
        "No cell is flagged",
        "No cell failed",
        "No cell ran on two backends",
        "regret did not run",
    ):
        assert words in text
    assert "The cache map was left out." in text


# Beside the page


def test_pictures_and_tables_lie_beside_the_page(page, place, frame, every):
    names = {path.name for path in place.iterdir()}
    assert "report.html" in names
    assert not [name for name in names if name.startswith(".")]
    pictures = {f"{name}.png" for name in page.pictures}
    tables = {f"{name}.csv" for name in page.tables}
    assert names == pictures | tables | {"report.html"}
    assert {name.removesuffix(".png") for name in pictures} <= {name.removesuffix(".csv") for name in tables}
    for name in pictures:
        picture = imread(place / name)
        assert min(picture.shape[:2]) > 150
        assert picture.std() > 0.02
    read = pd.read_csv(place / "cells.csv", keep_default_na=False, na_values=[""])
    shown = every.assign(flags=[" ".join(flags) for flags in every["flags"]])
    assert read["policy"].tolist() == shown["policy"].tolist()
    for name in ("flags", "flagged", "error"):
        assert read[name].fillna("").tolist() == shown[name].tolist()
    for name in ("budget", "mean", "low", "high", "share", "kept", "allocated", "payload"):
        np.testing.assert_allclose(read[name].to_numpy(float), shown[name].to_numpy(float))
    differences = pd.read_csv(place / "differences.csv")
    wanted = pairs(frame, mains(frame))
    assert differences[["a", "b"]].to_numpy().tolist() == wanted[["a", "b"]].to_numpy().tolist()
    np.testing.assert_allclose(differences["mean"], wanted["mean"])
    agreed = pd.read_csv(place / "agreement.csv")
    np.testing.assert_allclose(agreed["largest"], agreement(frame, mains(frame))["largest"])
    front = pd.read_csv(next(place.glob("bytes-mqar-length-120*torch.csv")))
    assert front["front_allocated"].any()


def test_names_of_files_do_not_collide():
    page = Page()
    for _ in range(3):
        page.files("same", None, pd.DataFrame())
    assert list(page.tables) == ["same", "same-2", "same-3"]


# Differences and map


def test_the_heat_table_shows_every_pair_and_marks_what_excludes_zero(page, frame):
    root, found = page.roots["differences"], pairs(frame, mains(frame))
    (menu,) = root.select({"name": "compared"})
    callback = menu.js_property_callbacks["change:value"][0]
    data, places = callback.args["every"].data, callback.args["places"]
    assert list(places) == list(menu.options)
    assert [end for _, end in places.values()][:-1] == [begin for begin, _ in places.values()][1:]
    assert len(data["a"]) == len(found) == list(places.values())[-1][1]
    assert sorted(zip(data["a"], data["b"], data["style"], strict=True)) == sorted(
        zip(found["a"], found["b"], np.where(found["excludes"], "bold", "normal"), strict=True)
    )
    assert {"bold", "normal"} == set(data["style"])
    begin, end = places[menu.value]
    assert callback.args["shown"].data["text"] == data["text"][begin:end]
    assert max(np.abs(data["scaled"])) == 1


def test_the_map_of_the_page_has_a_number_for_each_place_and_none_for_each_call(page, mapped):
    root = page.roots["map"]
    (slider,) = root.select({"name": "call"})
    assert (slider.start, slider.value, slider.end) == (0, 0, mapped.calls)
    args = slider.js_property_callbacks["change:value"][0].args
    np.testing.assert_array_equal(args["facts"].data["went"], mapped.went.ravel())
    np.testing.assert_array_equal(args["shown"].data["image"][0], mapped.state(0))
    assert args["tokens"].data["piece"] == list(mapped.pieces)
    assert {len(values) for values in args["facts"].data.values()} == {mapped.went.size}
    (plot,) = root.select({"type": figure})
    assert plot.y_range.start > plot.y_range.end  # the first head is on top


# The command


@pytest.fixture
def command(monkeypatch, tmp_path):
    """`kvtwin report` on a small frame, whatever the file is called."""
    small = results(
        questions=(QUESTION,), policies=("full()", "h2o()"), budgets=(0.25,), seeds=2, codecs=("full()",)
    )
    small["model"] = "recall"
    monkeypatch.setitem(sys.modules, "experiments.sweeps.results", SimpleNamespace(read=lambda path: small))
    monkeypatch.setattr("experiments.pages.static_plots.render", lambda figure: b"drawn elsewhere")
    monkeypatch.chdir(tmp_path)
    return lambda *words: CliRunner().invoke(app, ["report", "r.sqlite", "--out", "made", *words])


def test_the_command_draws_the_map_of_the_smallest_budget(command):
    done = command()
    assert (done.exit_code, done.output) == (0, "made/report.html\n")
    text = Path("made/report.html").read_text()
    assert "h2o(budget=" in text
    assert "<title>kvtwin: r.sqlite</title>" in text
    assert Path("made/cache-map.png").exists()


def test_the_command_draws_another_map_or_none(command):
    assert command("--map", "window(budget=17)").exit_code == 0
    assert "window(budget=17) on recall" in Path("made/report.html").read_text()
    assert command("--no-map").exit_code == 0
    assert "The cache map was left out." in Path("made/report.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [(("--map", "nosuch(budget=4)"), "no policy is called"), (("--map", "h2o", "--no-map"), "both")],
)
def test_what_the_command_refuses(command, words, message):
    done = command(*words)
    assert isinstance(done.exception, KvtwinError)
    assert message in str(done.exception)
    assert not Path("made/report.html").exists()


def test_no_rows_are_refused(tmp_path):
    with pytest.raises(KvtwinError, match="hold no rows"):
        build(results().iloc[:0], tmp_path, "empty")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_gone_leaves_the_rest_of_the_page(command, monkeypatch):
    gone = results(questions=(QUESTION,), policies=("h2o()",), budgets=(0.25,), seeds=2, codecs=("full()",))
    monkeypatch.setitem(
        sys.modules,
        "experiments.sweeps.results",
        SimpleNamespace(read=lambda path: gone.assign(model="./nowhere")),
    )
    assert command().exit_code == 0
    assert "The cache map could not be drawn: " in Path("made/report.html").read_text()
