"""Self-contained HTML pages: they load nothing from elsewhere, and no script in them can run.

The layout is in ``templates``, rendered by Jinja2, which escapes every text and attribute. This module has what the
templates show: tables and figures.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import jinja2
import matplotlib
from matplotlib.figure import Figure

from pyro_bnn.diagnostics.checking.findings import gravest_first
from pyro_bnn.files import replacing

#: size in bytes of an SVG above which the page holds a PNG of 200 dots per inch instead
_LARGEST_DRAWING = 250_000


@dataclass(frozen=True)
class Cell:
    """A number in a table.

    :param text: the number as it is shown.
    :param value: the number itself, stored with all digits as the attribute ``data-value``; ``None`` if there is none.
    :param data: further attributes ``data-*``, for programs that read the page.
    :param best: whether it is marked as the best of its row.
    """

    text: str
    value: float | None = None
    data: Mapping[str, str] = field(default_factory=dict)
    best: bool = False


@dataclass(frozen=True)
class Head:
    """The heading of a row or a column, with a note in smaller letters."""

    text: str
    meaning: str = ""


@dataclass(frozen=True)
class Table:
    """A table of numbers and words.

    :param columns: headings of the columns; the first is for the column of row headings.
    :param rows: heading and cells of each row.
    :raises ValueError: when a row does not have one cell for each column after the first.
    """

    caption: str
    columns: Sequence[Head]
    rows: Sequence[tuple[Head, Sequence[Cell | str]]]

    def __post_init__(self) -> None:
        for head, cells in self.rows:
            if len(cells) != len(self.columns) - 1:
                raise ValueError(f"the row {head.text!r} has {len(cells)} cells, expected {len(self.columns) - 1}")

    @property
    def number_columns(self) -> set[int]:
        """Positions of the columns that hold only numbers."""
        words = {i for _, cells in self.rows for i, cell in enumerate(cells, 1) if isinstance(cell, str)}
        return set(range(1, len(self.columns))) - words


@dataclass(frozen=True)
class Picture:
    """A figure under a heading.

    :param alt: alternative text: a description with the main numbers, for readers who cannot see the figure.
    :raises ValueError: when ``alt`` is empty.
    """

    heading: str
    figure: Figure
    alt: str
    caption: str = ""

    def __post_init__(self) -> None:
        if not self.alt.strip():
            raise ValueError(f"the picture {self.heading!r} has no alternative text: describe what it shows in alt")

    @property
    def width(self) -> int:
        """Width in CSS pixels, 96 per inch."""
        return round(96 * self.figure.get_size_inches()[0])

    @property
    def height(self) -> int:
        return round(96 * self.figure.get_size_inches()[1])

    @property
    def source(self) -> str:
        """The image as a ``data:`` URL."""
        drawing, kind = io.BytesIO(), "svg+xml"
        with matplotlib.rc_context({"svg.hashsalt": "pyro_bnn"}):  # the same figure gives the same bytes
            self.figure.savefig(drawing, format="svg", metadata={"Date": None})
        if drawing.tell() > _LARGEST_DRAWING:
            drawing, kind = io.BytesIO(), "png"
            self.figure.savefig(drawing, format="png", dpi=200)
        return f"data:image/{kind};base64,{base64.b64encode(drawing.getvalue()).decode()}"


def settings_table(caption: str, settings: Mapping[str, object]) -> Table:
    """A table of names and values."""
    rows = [(Head(name.replace("_", " ")), [str(value)]) for name, value in settings.items()]
    return Table(caption, [Head("setting"), Head("value")], rows)


def render(template: str, **content: object) -> str:
    """Renders a template.

    :param template: name of a file in ``templates``.
    :param content: values of all variables of the template.
    :raises jinja2.UndefinedError: when a variable is missing.
    """
    return _templates().get_template(template).render(content)


def require_file(path: str | Path) -> Path:
    """Checks that a page can be written to a path.

    :raises IsADirectoryError: when the path is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(
            f"{str(path)!r} is a folder: give the name of a file, such as {str(path / 'page.html')!r}"
        )
    return path


def write(path: Path, html: str) -> Path:
    """Writes the page completely or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(html, encoding="utf-8", errors="replace")
    return path


@cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["gravest_first"] = gravest_first
    return environment
