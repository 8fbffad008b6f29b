"""Building blocks of a page of HTML in one file: nothing is loaded from elsewhere, and nothing in it can run.

Blocks are elements of ``xml.etree``, so that every tag is closed and every text and attribute escaped.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from xml.etree.ElementTree import Element, SubElement, tostring

import matplotlib
from matplotlib.figure import Figure

from pyro_bnn.diagnostics.checking.findings import SEVERITIES, Finding, Severity
from pyro_bnn.files import replacing

#: bytes of a drawing from which the page holds it as an image of 200 dots an inch
_LARGEST_DRAWING = 250_000
_SYMBOLS: Mapping[Severity, str] = {"good": "✓", "note": "i", "warning": "!", "problem": "✕"}
#: a browser that obeys this loads and runs nothing, whatever a text on the page holds
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

_STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --soft: #57606a; --page: #ffffff; --card: #f3f5f8; --line: #d0d7de;
  --good: #1a7f37; --note: #0a58ca; --warning: #8a5300; --problem: #c1121f; }
@media (prefers-color-scheme: dark) { :root { --text: #e6edf3; --soft: #9da7b3; --page: #0f1318; --card: #1a2028;
  --line: #3a434e; --good: #57c26e; --note: #79b1ff; --warning: #e0a84a; --problem: #ff8a84; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0; font-size: 1.6rem; line-height: 1.25; }
h2 { margin: 2.5rem 0 .75rem; font-size: 1.25rem; }
h3 { margin: 0 0 .5rem; font-size: 1rem; }
p { margin: .25rem 0; }
header p, footer, figcaption, caption, .meaning { color: var(--soft); }
footer { margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: .5rem; font-size: .875rem; }
.findings { list-style: none; margin: 0; padding: 0; display: grid; gap: .5rem; }
.finding { border: 1px solid var(--line); border-left: .375rem solid var(--tone); border-radius: .375rem;
  padding: .5rem .75rem; background: var(--card); }
.good { --tone: var(--good); } .note { --tone: var(--note); }
.warning { --tone: var(--warning); } .problem { --tone: var(--problem); }
.severity { color: var(--tone); font-weight: 700; white-space: nowrap; }
.topic { font-weight: 600; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: .375rem; }
.scroll:focus-visible { outline: 2px solid var(--note); }
table { border-collapse: collapse; width: 100%; overflow-wrap: normal; }
caption { text-align: left; padding: .5rem .75rem; font-size: .875rem; }
caption span { display: inline-block; position: sticky; left: .75rem; max-width: calc(100vw - 4rem); }
th, td { padding: .375rem .75rem; border-top: 1px solid var(--line); text-align: left; vertical-align: top; }
thead th { background: var(--card); vertical-align: bottom; }
thead .meaning { display: block; font-size: .8125rem; font-weight: 400; white-space: normal; }
tbody th { position: sticky; left: 0; background: var(--page); font-weight: 600; min-width: 7rem; max-width: 14rem; }
tbody th .meaning { display: block; font-size: .8125rem; font-weight: 400; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.mark { display: block; font-size: .75rem; font-weight: 700; color: var(--good); }
.mark::before { content: "★ "; }
.pictures { columns: 2 25rem; column-gap: 1.5rem; }
.pictures section { break-inside: avoid; padding-bottom: 1.25rem; }
figure { margin: 0; }
img { display: block; width: 100%; max-width: 32rem; height: auto; background: #ffffff; padding: .5rem;
  border: 1px solid var(--line); border-radius: .375rem; }
figcaption { margin-top: .375rem; font-size: .875rem; max-width: 32rem; }
@media (max-width: 30rem) { table { font-size: .875rem; } th, td { padding: .375rem .5rem; }
  tbody th { min-width: 5rem; max-width: 7.5rem; } }
@media print { body { max-width: none; padding: 0; } .scroll { overflow: visible; } tbody th { position: static; }
  .finding, figure, tr { break-inside: avoid; } h2, h3 { break-after: avoid; } }
"""


@dataclass(frozen=True)
class Cell:
    """A number in a table.

    :param text: how it is written.
    :param value: the number itself, which ``data-value`` holds to its last digit; ``None`` where there is none.
    :param data: further attributes ``data-*``, for programs that read the page.
    :param best: whether it is the best of its kind, which a word beside it says.
    """

    text: str
    value: float | None = None
    data: Mapping[str, str] | None = None
    best: bool = False


@dataclass(frozen=True)
class Head:
    """The head of a row or a column, with a note in smaller letters."""

    text: str
    meaning: str = ""


def element(tag: str, *content: str | Element, **attributes: str) -> Element:
    """An element with text and other elements in it; ``class_`` and ``data_x`` become ``class`` and ``data-x``."""
    made = Element(tag, {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()})
    for piece in content:
        if isinstance(piece, Element):
            made.append(piece)
        elif len(made):
            made[-1].tail = (made[-1].tail or "") + piece
        else:
            made.text = (made.text or "") + piece
    return made


def document(title: str, *blocks: Element, subtitle: str = "", footer: str = "") -> str:
    """The page: a heading, blocks, and a line at the end."""
    html = element("html", lang="en")
    head = SubElement(html, "head")
    SubElement(head, "meta", charset="utf-8")
    SubElement(head, "meta", {"http-equiv": "Content-Security-Policy", "content": _POLICY})
    SubElement(head, "meta", name="viewport", content="width=device-width, initial-scale=1")
    SubElement(head, "meta", {"name": "color-scheme", "content": "light dark"})
    head.append(element("title", title))
    head.append(element("style", _STYLE))
    header = element("header", element("h1", title), *([element("p", subtitle)] if subtitle else []))
    body = element("body", header, element("main", *blocks))
    if footer:
        body.append(element("footer", element("p", footer)))
    html.append(body)
    return "<!DOCTYPE html>\n" + tostring(html, encoding="unicode", method="html") + "\n"


def require_file(path: str | Path) -> Path:
    """Where a page can be written to.

    :raises IsADirectoryError: when a folder is there.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(
            f"{str(path)!r} is a folder: give the name of a file, such as {str(path / 'page.html')!r}"
        )
    return path


def write(path: Path, html: str) -> Path:
    """Writes the page, which appears whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(html, encoding="utf-8", errors="replace")
    return path


def section(heading: str, *blocks: Element, level: Literal[2, 3] = 2) -> Element:
    return element("section", element(f"h{level}", heading), *blocks)


def paragraph(text: str) -> Element:
    return element("p", text)


def findings(found: Iterable[Finding]) -> Element:
    """A list of findings, the gravest first; its severity is a word, a symbol and a colour."""
    ranked = sorted(found, key=lambda finding: SEVERITIES.index(finding.severity), reverse=True)
    return element("ul", *(_finding(finding) for finding in ranked), class_="findings")


def _finding(finding: Finding) -> Element:
    symbol = element("span", _SYMBOLS[finding.severity], aria_hidden="true")
    severity = element("span", symbol, f" {finding.severity}", class_="severity")
    topic = element("span", finding.topic, class_="topic")
    lines = [element("p", severity, " ", topic), element("p", finding.message)]
    if finding.remedy:
        lines.append(element("p", element("strong", "What to do: "), finding.remedy))
    return element("li", *lines, class_=f"finding {finding.severity}")


def table(
    caption: str, columns: Sequence[Head], rows: Iterable[tuple[Head, Sequence[Cell | str]]], label: str | None = None
) -> Element:
    """A table that scrolls sideways within itself where it is wider than the page.

    :param columns: their heads; the first is that of the heads of rows.
    :param rows: head and cells of each.
    :raises ValueError: when a row does not have one cell for each column after the first.
    """
    first, *others = columns
    rows = list(rows)
    text = {i for _, cells in rows for i, cell in enumerate(cells) if isinstance(cell, str)}
    heads = [_head(first, "col"), *(_head(c, "col", "" if i in text else "number") for i, c in enumerate(others))]
    body = element("tbody")
    for row_head, cells in rows:
        if len(cells) != len(others):
            raise ValueError(f"the row {row_head.text!r} has {len(cells)} cells, expected {len(others)}")
        body.append(element("tr", _head(row_head, "row"), *map(_cell, cells)))
    made = element("table", element("caption", element("span", caption)), element("thead", element("tr", *heads)), body)
    return element("div", made, class_="scroll", role="region", aria_label=label or caption, tabindex="0")


def settings_table(caption: str, settings: Mapping[str, object]) -> Element:
    """Names and values."""
    rows = [(Head(name.replace("_", " ")), [str(value)]) for name, value in settings.items()]
    return table(caption, [Head("setting"), Head("value")], rows)


def _head(head: Head, scope: str, kind: str = "") -> Element:
    made = element("th", head.text, scope=scope, **({"class_": kind} if kind else {}))
    if head.meaning:
        made.append(element("span", head.meaning, class_="meaning"))
    return made


def _cell(cell: Cell | str) -> Element:
    if isinstance(cell, str):
        return element("td", cell)
    made = element("td", class_="number")
    made.attrib.update({f"data-{name}": value for name, value in (cell.data or {}).items()})
    if cell.value is not None:
        made.set("data-value", repr(cell.value))
    if cell.best:
        made.append(element("strong", cell.text))
        made.append(element("span", "best", class_="mark"))
    else:
        made.text = cell.text
    return made


def picture(heading: str, figure: Figure, alt: str, caption: str = "") -> Element:
    """A figure under a heading.

    :param alt: what is to be seen, with the main numbers, for who does not see it.
    :raises ValueError: when ``alt`` is empty.
    """
    if not alt.strip():
        raise ValueError(f"the picture {heading!r} has no alternative text: say what is to be seen")
    width, height = (str(round(96 * inches)) for inches in figure.get_size_inches())
    image = element("img", src=_embedded(figure), alt=alt, width=width, height=height)
    note = [element("figcaption", caption)] if caption else []
    return section(heading, element("figure", image, *note), level=3)


def pictures(heading: str, shown: Sequence[Element]) -> Element:
    return section(heading, element("div", *shown, class_="pictures"))


def _embedded(figure: Figure) -> str:
    drawing, kind = io.BytesIO(), "svg+xml"
    with matplotlib.rc_context({"svg.hashsalt": "pyro_bnn"}):  # the same picture gives the same bytes
        figure.savefig(drawing, format="svg", metadata={"Date": None})
    if drawing.tell() > _LARGEST_DRAWING:
        drawing, kind = io.BytesIO(), "png"
        figure.savefig(drawing, format="png", dpi=200)
    return f"data:image/{kind};base64,{base64.b64encode(drawing.getvalue()).decode()}"
