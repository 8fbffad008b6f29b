"""The building blocks of a page: escaped, closed, accessible, and with nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import tomllib
from pathlib import Path
from typing import Any

import jinja2
import pytest
from html_page import Reader, require_self_contained
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from pyro_bnn.diagnostics.checking.findings import SEVERITIES, Finding
from pyro_bnn.diagnostics.pages import page
from pyro_bnn.diagnostics.pages.page import Cell, Head, Picture, Table


def drawn(points: int = 2) -> Figure:
    figure = Figure(figsize=(5, 3))
    figure.subplots().plot(range(points), [i * i % 7 for i in range(points)], "o")
    return figure


def report_of(title: str = "t", **content: Any) -> str:
    """A page of the given content and nothing else."""
    table = Table("numbers", [Head("name")], [])
    lists: dict[str, Any] = {"findings": [], "pictures": []}
    nothing = lists | {"subtitle": "", "summary": "", "metrics": table, "shift": None, "settings": None}
    return page.render("report.html", title=title, **(nothing | content))


def test_document_says_its_language_its_encoding_and_how_wide_it_is() -> None:
    """Proves that a browser shows the page as it is meant, on a phone too, and in both colour schemes."""
    html = report_of("A title", subtitle="below", summary="text", settings=page.settings_table("end", {}))
    assert html.startswith('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">')
    reader = require_self_contained(html)
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in reader.all("meta")
    assert {"name": "color-scheme", "content": "light dark"} in reader.all("meta")
    assert "@media (prefers-color-scheme: dark)" in html and "@media print" in html
    words = "A title A title below Findings text Metrics numbers name Pictures Settings end setting value"
    assert " ".join(reader.texts).split() == words.split()


@settings(deadline=None, max_examples=50)
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1))
def test_whatever_a_text_holds_it_stays_text(text: str) -> None:
    """Proves that no string opens a tag or leaves an attribute, wherever it stands."""

    def filled(text: str) -> str:
        rows: list[Any] = [(Head(text, text), [Cell(text, 1.0, {"metric": text}), text])]
        table = Table(text, [Head(text, text), Head(text), Head(text)], rows)
        return report_of(text, subtitle=text, summary=text, findings=[Finding("note", text, text, text)], metrics=table)

    reader, expected = Reader(filled(text)), Reader(filled("x"))
    assert [tag for tag, _ in reader.tags] == [tag for tag, _ in expected.tags]
    assert [set(attributes) for _, attributes in reader.tags] == [set(attributes) for _, attributes in expected.tags]
    assert sum(piece == text for piece in reader.texts) >= 12 or len(text.strip()) < 2
    (cell,) = (td for td in reader.all("td") if "data-metric" in td)
    assert cell["data-metric"] == text


def test_a_script_in_a_title_is_shown_and_not_run() -> None:
    """Proves it for the text that would do the most harm, also as the alternative text of a picture."""
    evil = "</title><script>alert('x')</script>\"><img src=x onerror=alert(1)>"
    html = report_of(evil, pictures=[Picture(evil, drawn(), evil, evil)], subtitle=evil, summary=evil)
    reader = require_self_contained(html)
    assert len(reader.all("img")) == 1 and reader.all("img")[0]["alt"] == evil
    assert reader.text.count(evil) == 6


def test_pictures_say_what_they_show_and_lie_in_the_page() -> None:
    """Proves that a picture without words is refused, and that one with them is a drawing of known size in the page."""
    with pytest.raises(ValueError, match="'Curve' has no alternative text"):
        Picture("Curve", drawn(), "  ")
    html = report_of(pictures=[Picture("Curve", drawn(), "a curve of 2 points", "Up.")])
    (image,) = require_self_contained(html).all("img")
    assert (image["alt"], image["width"], image["height"]) == ("a curve of 2 points", "480", "288")
    kind, _, content = image["src"].partition(",")
    assert kind == "data:image/svg+xml;base64" and base64.b64decode(content).startswith(b"<?xml")


def test_a_drawing_of_many_points_is_held_as_an_image() -> None:
    """Proves that the page stays small whatever is drawn: 40,000 points as a drawing would take megabytes."""
    html = report_of(pictures=[Picture("Points", drawn(40_000), "many points")])
    assert "data:image/png;base64," in html and len(html) < 400_000


def test_the_same_picture_gives_the_same_bytes() -> None:
    """Proves that a page changes only when what it shows does."""
    first, second = (report_of(pictures=[Picture("p", drawn(), "p")]) for _ in range(2))
    assert first == second


def test_numbers_in_a_table_keep_all_their_digits() -> None:
    """Proves that what is rounded for the eye is exact for a program, and that the best one says so in a word."""
    rows: list[Any] = [(Head("a"), [Cell("0.333", 1 / 3, {"metric": "nll"}, best=True)]), (Head("b"), [Cell("–")])]
    reader = Reader(report_of(metrics=Table("numbers", [Head("name"), Head("NLL")], rows)))
    first, second = reader.all("td")
    assert float(first["data-value"]) == 1 / 3 and first["data-metric"] == "nll" and "data-value" not in second
    assert "0.333best" in reader.text and reader.text.count("best") == 1
    assert [head["scope"] for head in reader.all("th")] == ["col", "col", "row", "row"]
    (container,) = (div for div in reader.all("div") if div.get("class") == "scroll")
    assert container == {"class": "scroll", "role": "region", "aria-label": "numbers", "tabindex": "0"}
    with pytest.raises(ValueError, match="the row 'a' has 1 cells, expected 2"):
        Table("numbers", [Head("name"), Head("x"), Head("y")], rows)


def test_findings_stand_gravest_first_with_a_word_and_a_symbol() -> None:
    """Proves that colour is never the only sign of how grave a finding is."""
    found = [
        Finding(severity, f"topic {severity}", "message", "remedy" * (severity != "good")) for severity in SEVERITIES
    ]
    text = Reader(report_of(findings=found)).text
    order = [
        text.index(f"{symbol} {severity}")
        for symbol, severity in (("✕", "problem"), ("!", "warning"), ("i", "note"), ("✓", "good"))
    ]
    assert order == sorted(order) and text.count("What to do: ") == 3


def test_an_installed_package_has_all_templates_and_the_style_sheet() -> None:
    """Proves that ``pyproject.toml`` lists every file that pages are made of, so that a wheel has them too."""
    folder = Path(page.__file__).parent
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["pyro_bnn.diagnostics.pages"]
    listed = {path for pattern in patterns for path in folder.glob(pattern)}
    assert listed == {path for path in folder.rglob("*") if path.suffix not in (".py", ".pyc") and path.is_file()}
    assert {path.name for path in listed} >= {"page.html", "page.css"}


def test_a_page_that_lacks_a_part_is_refused() -> None:
    """Proves that a misspelt or forgotten part is an error, and never an empty place on the page."""
    with pytest.raises(jinja2.UndefinedError, match="'subtitle' is undefined"):
        page.render("report.html", title="t")


def test_a_page_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that a failed writing leaves the former page, and no temporary file."""
    path = page.write(tmp_path / "new" / "page.html", "former")

    def fail(self: Path, *_: object, **__: object) -> int:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="disk full"):
        page.write(path, "latter")
    assert path.read_text() == "former" and list(path.parent.iterdir()) == [path]
