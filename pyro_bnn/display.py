"""How objects are printed: a title and a few fields, as plain text or as HTML in a notebook."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Iterable, Mapping, Sequence

#: the fields of an object, by name; fields that are ``None`` or empty are left out
Fields = Mapping[str, object]

#: number of characters to which the value of an argument is shortened
_WIDTH = 120


def call(owner: object, **arguments: object) -> str:
    """A class with its arguments, such as ``SGLD(step_size=0.1, temperature=1.0)``; programs are shown by name."""
    inside = ", ".join(f"{name}={argument(value)}" for name, value in arguments.items())
    return f"{type(owner).__name__}({inside})"


def name_of(program: object) -> str:
    """The class of an object, or the name of a function or class."""
    name = getattr(program, "__name__", None)
    return name if isinstance(name, str) else type(program).__name__


def number(value: float) -> str:
    """An integer with separators, any other number with four significant digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def plural(count: int, noun: str) -> str:
    """A count with its noun: ``1 draw``, ``1,000 draws``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def size(count: float) -> str:
    """A number of bytes in a suitable unit; 1 MB = 10^6 bytes."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} bytes" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def text(title: str, fields: Fields) -> str:
    """The title, and below it each field on its own line."""
    shown = _shown(fields)
    width = max(map(len, shown), default=0)
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in shown.items())])


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A plain-text table with headings; columns of numbers are aligned to the right."""
    rows = [list(columns), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    right = [all(row[i][:1].isdigit() or not row[i] for row in rows[1:]) for i in range(len(columns))]
    lines = [
        "  ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join(lines)


def html_text(title: str, fields: Fields, body: str = "") -> str:
    """The same as :func:`text`, as HTML for a notebook.

    :param body: HTML that follows the fields, such as a table.
    """
    rows = "".join(
        f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
        f"<td style='text-align:left'>{html.escape(value)}</td></tr>"
        for name, value in _shown(fields).items()
    )
    return f"<div><strong>{html.escape(title)}</strong><table>{rows}</table>{body}</div>"


def html_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows of text as an HTML table."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _shown(fields: Fields) -> dict[str, str]:
    return {name: str(value) for name, value in fields.items() if value is not None and str(value)}


def argument(value: object) -> str:
    """The value of an argument in one line; programs, classes and networks are shown by name."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {argument(own)}" for key, own in value.items()) + "}"
    if isinstance(value, float):
        return f"{value:.6g}"
    shown = repr(value)
    if isinstance(value, type) or " at 0x" in shown or "\n" in shown:
        return name_of(value)
    return textwrap.shorten(shown, _WIDTH, placeholder=" ...")
