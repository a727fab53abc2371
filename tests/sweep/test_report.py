"""The page is one file that holds everything, escapes what it shows, and says what the cells hold."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
import tomllib
from fnmatch import fnmatch
from html.parser import HTMLParser
from pathlib import Path

import pytest

from jquant.core.errors import InputError
from jquant.sweep.report import report_html, write_report
from jquant.sweep.results import Sweep

VOID = {"meta", "input", "br", "link", "img"}


class Page(HTMLParser):
    """Elements as (tag, attributes) and text as a reader sees it; checks that tags nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" in self._open:
            self.scripts[-1] += data
            return
        if "style" in self._open:
            return
        self.text.append(data)
        if "td" in self._open or "th" in self._open:
            self.rows[-1][-1] += data

    def ids(self) -> set[str]:
        return {attributes["id"] or "" for _, attributes in self.elements if "id" in attributes}


def test_the_page_stands_alone(sweep: Sweep, tmp_path: Path) -> None:
    write_report(sweep, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert not [
        a for tag, a in page.elements if tag in ("link", "img", "iframe", "object") or "src" in a or "href" in a
    ]
    policy = next(a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a)
    assert policy is not None
    assert "default-src 'none'" in policy
    assert not re.search(r"https?:|//[a-z]|\*", policy)
    own = html.replace(page.scripts[1], "")
    assert "plotly.js v" in page.scripts[1][:100]
    assert "http://" not in own
    assert "https://" not in own
    assert "@import" not in own
    assert "url(" not in own


def test_the_page_has_the_elements_that_its_script_works_on(sweep: Sweep) -> None:
    ids = Page(report_html(sweep)).ids()
    assert {"cells", "plot-perplexity", "plot-kl", "frontier-only", "filter", "shown", "kl-log", "model-note"} <= ids
    assert "perplexity-whole" in ids
    tame = tuple(cell for cell in sweep.cells if cell.perplexity < 50)
    assert "perplexity-whole" not in Page(report_html(dataclasses.replace(sweep, cells=tame))).ids()


def test_the_table_holds_the_reference_and_every_cell(sweep: Sweep) -> None:
    page = Page(report_html(sweep))
    head, reference, *rows = page.rows[: len(sweep.cells) + 2]
    assert head[:3] == ["Scheme", "Bits/weight", "Model MB"]
    assert reference[:3] == ["float", "32.000", "538.1"]
    assert [row[0].lstrip("●◆■⬟") for row in rows] == [cell.scheme for cell in sweep.cells]
    row = next(row for row in rows if row[0].endswith("nf4:dq"))
    assert row[1:] == [
        "4.127",
        "168.2",
        "20.80",
        "38.703 ± 2.8",
        "+7.50",
        "0.0951 ± 0.0038",
        "71.23 ± 0.40",
        "0.6",
        "7.1",
        "perplexity, KL",
    ]


def test_the_manifest_is_shown_to_its_leaves(sweep: Sweep) -> None:
    manifest = sweep.manifest | {"created": "today", "grid": {"seeds": [1, 2], "empty": [], "deep": [{"a": None}]}}
    page = Page(report_html(dataclasses.replace(sweep, manifest=manifest)))
    facts = [row for row in page.rows if len(row) == 2]
    for row in (
        ["name", "SmolLM2-135M-Instruct"],
        ["parameters", "134,515,008"],
        ["sha256", sweep.manifest["text"]["sha256"]],
        ["add_bos", "no"],
        ["device.kind", "cpu"],
        ["created", "today"],
        ["seeds", "1, 2"],
        ["empty", "none"],
        ["deep.0.a", "none"],
    ):
        assert row in facts


def test_the_sentence_about_the_weights_is_there_when_given(sweep: Sweep) -> None:
    note = sweep.manifest["model"]["note"]
    assert note in Page(report_html(sweep)).text
    silent = dataclasses.replace(sweep, manifest={"model": "a string", "text": {}})
    assert "model-note" not in Page(report_html(silent)).ids()


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;<!--"


def test_every_string_is_escaped(sweep: Sweep) -> None:
    cell = dataclasses.replace(
        sweep.cells[0], scheme=HOSTILE, method=HOSTILE, element=HOSTILE, granularity=HOSTILE, id=HOSTILE
    )
    manifest = {
        key: {HOSTILE: HOSTILE, "name": HOSTILE, "note": HOSTILE, "windows": HOSTILE, "window": [HOSTILE]}
        for key in ("model", "text", "protocol", HOSTILE)
    }
    hostile = Sweep(
        manifest=manifest | {"loose" + HOSTILE: HOSTILE},
        reference=dataclasses.replace(sweep.reference, scheme=HOSTILE),
        cells=(cell, *sweep.cells[1:]),
    )
    page, plain = Page(report_html(hostile)), Page(report_html(sweep))
    assert len(page.scripts) == len(plain.scripts) == 3
    assert {tag for tag, _ in page.elements} == {tag for tag, _ in plain.elements}
    assert not [a for _, a in page.elements if "onerror" in a]
    assert page.scripts[1:] == plain.scripts[1:]
    assert json.loads(page.scripts[0])["cells"][0]["tooltip"][0] == f"{HOSTILE} {HOSTILE}"
    assert f"Quantization of {HOSTILE}" in page.text
    assert [HOSTILE, HOSTILE] in page.rows


def test_the_data_is_strict_json_that_agrees_with_the_cells(sweep: Sweep) -> None:
    odd = dataclasses.replace(sweep.cells[3], perplexity=math.inf, nll=math.inf, kl=math.nan)
    sweep = dataclasses.replace(sweep, cells=(*sweep.cells[:3], odd, *sweep.cells[4:]))
    page = Page(report_html(sweep))
    data = json.loads(page.scripts[0], parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert (data["cells"][3]["perplexity"], data["cells"][3]["kl"]) == (None, None)
    assert 3 not in data["frontier"]["perplexity"] + data["frontier"]["kl"]
    assert [cell["bits"] for cell in data["cells"]] == [cell.bits_per_weight for cell in sweep.cells]
    assert data["ceiling"] == 2 * sweep.reference.perplexity
    assert data["cells"][4]["tooltip"] == [
        "int4:tensor",
        "4.000 bits per weight",
        "perplexity 145.359 ± 13 (+303.75 %)",
        "KL 1.86 ± 0.075",
        "top-1 22.28 % ± 0.40",
    ]
    sortable = [a["data-value"] for tag, a in page.elements if tag == "td" and "data-value" in a]
    assert "Infinity" in sortable
    assert "NaN" in sortable


def test_mistakes_are_named_and_leave_no_file(sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="without cells"):
        write_report(dataclasses.replace(sweep, cells=()), tmp_path / "report.html")
    monkeypatch.setitem(sys.modules, "plotly.offline", None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"pip install 'jquant\[report\]'"):
        write_report(sweep, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_the_wheel_carries_the_pages_style_and_script() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    declared = project["tool"]["setuptools"]["package-data"]
    patterns = [f"{package.replace('.', '/')}/{name}" for package, names in declared.items() for name in names]
    for asset in ("jquant/sweep/report.css", "jquant/sweep/report.js"):
        assert any(fnmatch(asset, pattern) for pattern in patterns), f"pyproject.toml ships {patterns}, not {asset}"
