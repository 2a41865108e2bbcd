"""The report in a real Chromium: no errors, no network, a slider that moves the map, a table that sorts."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.page import build
from experiments.pages.tables import CELL_COLUMNS
from tests.results_frame import results

pytestmark = pytest.mark.browser

QUESTION = "mqar(length=240, pairs=6)"
SCREENSHOTS = Path(__file__).parents[2] / "results" / "screenshots"
FIND = "const found = (name) => Bokeh.documents[0].get_model_by_name(name);"
IMAGE = f"() => {{ {FIND} return Array.from(found('cache map').data.image[0]) }}"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of two questions with a map, made as the command makes it."""
    frame = results(
        questions=(QUESTION, "passkey(length=256)"), codecs=("full()",), backends=("torch",), seeds=6
    ).assign(model="recall")
    return build(frame, tmp_path_factory.mktemp("report"), "kvtwin: results.sqlite", "h2o(budget=60)")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert path, "no chromium here: install it, for example by apt-get install chromium"
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def seen() -> dict[str, list[str]]:
    """What the page said and asked for."""
    return {"errors": [], "requests": []}


@pytest.fixture
def page(chromium: Any, report: Path, seen: dict[str, list[str]]) -> Iterator[Any]:
    """The page, drawn to its end, without a network."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900}, offline=True)
    opened = context.new_page()
    opened.on(
        "console",
        lambda said: seen["errors"].append(said.text) if said.type in ("error", "warning") else None,
    )
    opened.on("pageerror", lambda error: seen["errors"].append(str(error)))
    opened.on("request", lambda request: seen["requests"].append(request.url))
    opened.goto(report.as_uri())
    opened.wait_for_function("() => window.Bokeh && Bokeh.documents.length && Bokeh.documents[0].is_idle")
    yield opened
    context.close()


def test_it_loads_without_errors_and_without_a_network(
    page: Any, seen: dict[str, list[str]], report: Path
) -> None:
    assert seen["errors"] == []
    assert [url for url in seen["requests"] if not url.startswith("data:")] == [report.as_uri()]
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / "report.png", full_page=True)
    assert (SCREENSHOTS / "report.png").stat().st_size > 100_000


def test_the_slider_changes_the_map(page: Any, seen: dict[str, list[str]]) -> None:
    before = np.array(page.evaluate(IMAGE))
    handle = page.locator("#map .noUi-handle")
    handle.scroll_into_view_if_needed()
    handle.focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    after = np.array(page.evaluate(IMAGE))
    assert page.evaluate(f"() => {{ {FIND} return found('call').value }}") == 5
    state = np.array(page.evaluate(f"() => {{ {FIND} return found('cache map').data.image[0].shape }}"))
    assert after.size == before.size == state.prod()
    assert (before != after).any()
    assert (after == 0).sum() == (before == 0).sum() - 5 * state[0]  # five tokens came, to each head
    assert (after == 2).any()
    page.locator("#map").screenshot(path=SCREENSHOTS / "cache_map.png")
    assert seen["errors"] == []


def test_a_hover_tells_the_token_and_why_it_went(page: Any, seen: dict[str, list[str]]) -> None:
    canvas = page.locator("#map canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + 300, box["y"] + box["height"] / 2)
    page.mouse.move(box["x"] + 304, box["y"] + box["height"] / 2)
    tip = page.locator(".bk-tooltip-content").first
    tip.wait_for(state="visible")
    assert "layer " in tip.inner_text()
    assert "position " in tip.inner_text()
    assert seen["errors"] == []


def test_a_click_on_a_column_sorts_the_table(page: Any, seen: dict[str, list[str]]) -> None:
    header = page.locator("#cells .slick-header-column", has_text="mean").first
    header.scroll_into_view_if_needed()
    column = list(CELL_COLUMNS).index("mean")
    shown = [_column(page, column)]
    for _ in range(2):
        header.click()
        page.wait_for_timeout(200)
        shown.append(_column(page, column))
    before, up, down = shown
    every = sorted(page.evaluate(f"() => {{ {FIND} return Array.from(found('cells').data.mean) }}"))
    assert len(up) > 10
    assert before != up
    assert up == pytest.approx(every[: len(up)], abs=1e-4)
    assert down == pytest.approx(every[::-1][: len(down)], abs=1e-4)
    assert seen["errors"] == []


def _column(page: Any, number: int) -> list[float]:
    """The numbers of a column as they stand on the page, from the top."""
    rows = page.locator("#cells .slick-row")
    found = [
        (float(one.evaluate("row => parseFloat(row.style.top) || row.offsetTop")), one) for one in rows.all()
    ]
    texts = [
        one.locator(".slick-cell").nth(number).inner_text()
        for _, one in sorted(found, key=lambda each: each[0])
    ]
    return [float(text) for text in texts if text.strip() not in ("", "-")]


def test_the_menu_changes_the_heat_table(page: Any, seen: dict[str, list[str]]) -> None:
    menu = page.locator("#differences select")
    options = menu.locator("option").all_inner_texts()
    assert len(options) == 2 * 4
    text = f"() => {{ {FIND} return found('differences').renderers[1].data_source.data.text.join() }}"
    before = page.evaluate(text)
    menu.select_option(options[-1])
    assert page.evaluate(text) != before
    assert seen["errors"] == []


def test_a_legend_hides_a_policy_in_both_plots(page: Any, seen: dict[str, list[str]]) -> None:
    hidden = f"""() => {{ {FIND}
        const plots = [found('quality-0 share'), found('quality-0 allocated')]
        return plots.map((plot) => plot.renderers.filter((each) => !each.visible).length)
    }}"""
    assert page.evaluate(hidden) == [0, 0]
    page.evaluate(
        f"() => {{ {FIND} const plot = found('quality-0 allocated');"
        " const item = plot.right[0].items[1]; for (const each of item.renderers) each.visible = false }"
    )
    left, right = page.evaluate(hidden)
    assert left == right > 2
    assert seen["errors"] == []


def test_without_scripts_the_main_plot_and_all_cells_are_there(chromium: Any, report: Path) -> None:
    context = chromium.new_context(java_script_enabled=False, offline=True)
    opened = context.new_page()
    opened.goto(report.as_uri())
    picture = opened.locator("#quality img")
    assert picture.is_visible()
    assert picture.bounding_box()["width"] > 400
    assert opened.locator("#cells tbody tr").count() == 2 * (1 + 4 * 4)
    context.close()
