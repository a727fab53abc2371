"""The report in a real browser: it is quiet, fetches nothing, sorts, filters and shows tooltips."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from jquant.sweep.pareto import frontier
from jquant.sweep.report import write_report
from jquant.sweep.results import Cell, Sweep

pytestmark = pytest.mark.browser

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,1000",
)
HOSTILE = "<script>alert(1)</script><b>x</b><a href='javascript:alert(2)'>&lt;"


def _program(*names: str) -> str:
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.fail(f"no {' or '.join(names)} on PATH: apt-get install chromium chromium-driver", pytrace=False)
    return found


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = _program("chromium", "chromium-browser", "google-chrome")
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(_program("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def _open(browser, sweep: Sweep, path: Path) -> None:
    write_report(sweep, path)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.get(path.as_uri())


def _assert_quiet(browser, path: Path) -> None:
    """Nothing stands in the console, and the page asked for nothing but itself."""
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"]["params"] for entry in browser.get_log("performance")]
    asked = [e["request"]["url"] for e in events if "request" in e and e.get("documentURL") == path.as_uri()]
    assert path.as_uri() in asked  # the log does record requests
    assert [url for url in asked if url != path.as_uri() and not url.startswith(("data:", "blob:"))] == []


@pytest.fixture
def page(browser, sweep: Sweep, tmp_path: Path):
    _open(browser, sweep, tmp_path / "report.html")
    yield browser
    _assert_quiet(browser, tmp_path / "report.html")


def _all(page, selector: str) -> list:
    return page.find_elements("css selector", selector)


def _one(page, selector: str):
    return page.find_element("css selector", selector)


def _shown(page) -> list[str]:
    rows = _all(page, "#cells tbody:not(.reference) tr")
    return [row.find_element("css selector", "th").text.lstrip("●◆■⬟ ") for row in rows if row.is_displayed()]


def _schemes(sweep: Sweep, key) -> list[str]:
    return [cell.scheme for cell in sorted(sweep.cells, key=key)]


def _points(page, metric: str) -> list:
    return _all(page, f"#plot-{metric} .scatterlayer .points path")


@pytest.mark.parametrize("column", ["bits_per_weight", "perplexity", "kl", "top1", "sqnr_db", "perplexity_change"])
def test_numeric_columns_sort_both_ways_and_keep_the_grid_order_of_equals(page, sweep: Sweep, column: str) -> None:
    def value(cell: Cell) -> float:
        return getattr(cell, "perplexity" if column == "perplexity_change" else column)

    header = _one(page, f"#cells [data-key={column}]")
    button = header.find_element("css selector", "button")
    assert header.get_attribute("aria-sort") == "none"
    assert _shown(page) == [cell.scheme for cell in sweep.cells]
    button.click()
    assert header.get_attribute("aria-sort") == "ascending"
    assert _shown(page) == _schemes(sweep, value)
    button.send_keys("\ue007")  # the Enter key
    assert header.get_attribute("aria-sort") == "descending"
    # A descending sort of distinct values: compare values, since equals may come in either order.
    by_scheme = {cell.scheme: value(cell) for cell in sweep.cells}
    assert [by_scheme[scheme] for scheme in _shown(page)] == sorted(by_scheme.values(), reverse=True)
    assert _one(page, "#cells tbody.reference").text.startswith("float")
    assert len(_all(page, "#cells [aria-sort=ascending], #cells [aria-sort=descending]")) == 1


def test_schemes_sort_by_the_numbers_in_their_names(page) -> None:
    _one(page, "#cells [data-key=scheme] button").click()
    shown = _shown(page)
    assert [s for s in shown if s in ("int4:g32", "int4:g64", "int4:g128")] == ["int4:g32", "int4:g64", "int4:g128"]


def test_the_filter_and_the_frontier_box_choose_rows_and_points(page, sweep: Sweep) -> None:
    count = _one(page, "#shown")
    assert len(_points(page, "kl")) == len(_points(page, "perplexity")) == 24
    _one(page, "#filter").send_keys("INT4 group")
    expected = [c.scheme for c in sweep.cells if c.element == "int4" and c.granularity == "group"]
    assert _shown(page) == expected
    assert count.text == f"{len(expected)} of 24 schemes"
    assert len(_points(page, "kl")) == len(expected)
    _one(page, "#frontier-only").click()
    front = {i for metric in ("perplexity", "kl") for i in frontier(sweep.cells, metric)}
    assert _shown(page) == [s for s in expected if s in {sweep.cells[i].scheme for i in front}]
    _one(page, "#filter").clear()
    _one(page, "#filter").send_keys(" ")
    assert _shown(page) == [sweep.cells[i].scheme for i in sorted(front)]
    _one(page, "#frontier-only").click()
    assert len(_shown(page)) == 24


def _hover(page, metric: str, index: int) -> list[str]:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.support.ui import WebDriverWait

    ActionChains(page).move_to_element(_points(page, metric)[index]).perform()
    WebDriverWait(page, 10).until(lambda _: _all(page, f"#plot-{metric} .hoverlayer .hovertext"))
    return [span.text for span in _all(page, f"#plot-{metric} .hovertext tspan.line")]


@pytest.mark.parametrize("metric", ["perplexity", "kl"])
def test_hovering_a_point_shows_its_figures(page, sweep: Sweep, metric: str) -> None:
    index = next(i for i, cell in enumerate(sweep.cells) if cell.scheme == "int5:g64")
    assert _hover(page, metric, index) == [
        "int5:g64",
        "5.500 bits per weight",
        "perplexity 36.705 ± 2.6 (+1.95 %)",
        "KL 0.0262 ± 0.0010",
        "top-1 83.70 % ± 0.40",
    ]


def test_markup_in_names_is_shown_and_not_run(browser, sweep: Sweep, tmp_path: Path) -> None:
    cell = dataclasses.replace(sweep.cells[0], scheme=HOSTILE)
    manifest = {"model": {"name": HOSTILE, HOSTILE: HOSTILE}}
    hostile = Sweep(
        manifest=manifest,
        reference=dataclasses.replace(sweep.reference, scheme=HOSTILE),
        cells=(cell, *sweep.cells[1:]),
    )
    _open(browser, hostile, tmp_path / "report.html")
    assert browser.title == f"Quantization of {HOSTILE}"
    assert _hover(browser, "kl", 0)[0] == HOSTILE
    assert _shown(browser)[0] == HOSTILE
    assert HOSTILE in [text.text for text in _all(browser, "#plot-kl .annotation-text")]
    assert len(_all(browser, "script")) == 3
    assert not _all(browser, "a[href]")
    _assert_quiet(browser, tmp_path / "report.html")


def _axis(page, metric: str) -> dict:
    return page.execute_script(
        f"const a = document.getElementById('plot-{metric}')._fullLayout.yaxis; return {{type: a.type, range: a.range}}"
    )


def test_the_axes_change_with_their_boxes(page, sweep: Sweep) -> None:
    assert _axis(page, "kl")["type"] == "log"
    _one(page, "#kl-log").click()
    kl = _axis(page, "kl")
    assert kl["type"] == "linear"
    assert kl["range"][0] < 0 < max(cell.kl for cell in sweep.cells) < kl["range"][1]
    assert _axis(page, "perplexity")["range"][1] < 2 * sweep.reference.perplexity
    _one(page, "#perplexity-whole").click()
    perplexity = _axis(page, "perplexity")
    assert perplexity["type"] == "log"
    assert perplexity["range"][1] > math.log10(max(cell.perplexity for cell in sweep.cells))


def test_the_page_follows_the_readers_colours_and_width(page) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    background = "return getComputedStyle(document.querySelector('#plot-kl .main-svg')).background"
    for scheme, colour in (("dark", "rgb(20, 23, 27)"), ("light", "rgb(255, 255, 255)")):
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        WebDriverWait(page, 10).until(lambda _, colour=colour: colour in page.execute_script(background))
    metrics = {"width": 700, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    page.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    assert page.execute_script("return document.documentElement.scrollWidth") <= 700
    width, drawn = page.execute_script(
        "const node = document.getElementById('plot-kl'); "
        "return [node.clientWidth, node.querySelector('.main-svg').clientWidth]"
    )
    assert drawn == width > 630  # the whole column; beside each other the charts are narrower


def test_the_charts_offer_no_way_to_send_data_away(page) -> None:
    titles = {button.get_attribute("data-title") for button in _all(page, ".modebar-btn")}
    assert len(titles) == 6
    assert not [title for title in titles if title and ("share" in title.lower() or "cloud" in title.lower())]
