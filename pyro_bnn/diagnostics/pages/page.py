"""A page of HTML in one file: nothing is loaded from elsewhere, and nothing in it can run.

What a page looks like is in ``templates``, filled in by Jinja2, which escapes every text and attribute. Here are the
things that templates show: tables and pictures.
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

#: bytes of a drawing from which the page holds it as an image of 200 dots an inch
_LARGEST_DRAWING = 250_000


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
    data: Mapping[str, str] = field(default_factory=dict)
    best: bool = False


@dataclass(frozen=True)
class Head:
    """The head of a row or a column, with a note in smaller letters."""

    text: str
    meaning: str = ""


@dataclass(frozen=True)
class Table:
    """A table of numbers and words.

    :param columns: their heads; the first is that of the heads of rows.
    :param rows: head and cells of each.
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
        """Positions of the columns that hold numbers alone."""
        words = {i for _, cells in self.rows for i, cell in enumerate(cells, 1) if isinstance(cell, str)}
        return set(range(1, len(self.columns))) - words


@dataclass(frozen=True)
class Picture:
    """A figure under a heading.

    :param alt: what is to be seen, with the main numbers, for who does not see it.
    :raises ValueError: when ``alt`` is empty.
    """

    heading: str
    figure: Figure
    alt: str
    caption: str = ""

    def __post_init__(self) -> None:
        if not self.alt.strip():
            raise ValueError(f"the picture {self.heading!r} has no alternative text: say what is to be seen")

    @property
    def width(self) -> int:
        """In pixels of a screen, 96 an inch."""
        return round(96 * self.figure.get_size_inches()[0])

    @property
    def height(self) -> int:
        return round(96 * self.figure.get_size_inches()[1])

    @property
    def source(self) -> str:
        """The drawing itself, as a ``data:`` address."""
        drawing, kind = io.BytesIO(), "svg+xml"
        with matplotlib.rc_context({"svg.hashsalt": "pyro_bnn"}):  # the same picture gives the same bytes
            self.figure.savefig(drawing, format="svg", metadata={"Date": None})
        if drawing.tell() > _LARGEST_DRAWING:
            drawing, kind = io.BytesIO(), "png"
            self.figure.savefig(drawing, format="png", dpi=200)
        return f"data:image/{kind};base64,{base64.b64encode(drawing.getvalue()).decode()}"


def settings_table(caption: str, settings: Mapping[str, object]) -> Table:
    """Names and values."""
    rows = [(Head(name.replace("_", " ")), [str(value)]) for name, value in settings.items()]
    return Table(caption, [Head("setting"), Head("value")], rows)


def render(template: str, **content: object) -> str:
    """The page of a template.

    :param template: a file in ``templates``.
    :param content: all that the template names.
    :raises jinja2.UndefinedError: when something is missing.
    """
    return _templates().get_template(template).render(content)


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
