"""The columns of a table: their kinds, and the conversion of their cells to numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

import numpy as np

from pyro_bnn.data.encoding import Column
from pyro_bnn.data.task import listed

MAX_CATEGORIES = 100
#: number of different strings up to which most of them may occur in a single row
MAX_OWN = 20
#: cells that count as missing values, in lower case
MISSING = frozenset(("", "?", "na", "n/a", "#n/a", "#na", "<na>", "nan", "-nan", "null", "none"))

_INTEGER = re.compile(r"[+-]?\d+")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_DATE = re.compile(
    r"\d{4}[-/.]\d{1,2}[-/.]\d{1,2}([T ].*)?|\d{1,2}[-/.]\d{1,2}[-/.](\d{2}|\d{4})( .*)?|\d{1,2}:\d{2}(:.*)?"
)
#: numbers as people write them: 1,000 or 3,14 or $5 or 12 %
_WRITTEN = re.compile(r"[+-]?[$€£]? ?\d{1,3}([,. ]?\d{3})*([.,]\d+)? ?[%$€£]?")
_Value = TypeVar("_Value")


def column_kind(name: str, cells: Sequence[str], *, where: Callable[[int], str], taken_literally: bool) -> Column:
    """The kind of a column of the training file: numbers, booleans, or categories (a few different strings).

    The majority of its cells decides: a column of numbers with a few other cells counts as numbers with bad cells.

    :param where: maps the index of a row to its description in messages.
    :param taken_literally: whether the user said that the column holds categories, whatever its cells look like.
    :raises ValueError: for bad cells, dates, or more than :data:`MAX_CATEGORIES` different strings.
    """
    if taken_literally:
        return Column(name, "category", _categories(name, [cell for cell in cells if cell]))
    held = [cell for cell in cells if not is_missing(cell)]
    if not held:
        raise ValueError(f"column {name!r} has no value in any row: leave it out (--drop)")
    if all(is_boolean(cell) for cell in held):
        return Column(name, "boolean")
    if 2 * sum(number_of(cell) is not None for cell in held) > len(held):
        remedy = "mend them, leave the column out (--drop), or say that it holds categories (--category)"
        _require_all(name, cells, number_of, where, "holds numbers", remedy)
        return Column(name, "number")
    if 2 * sum(_DATE.fullmatch(cell) is not None for cell in held) > len(held):
        raise ValueError(
            f"column {name!r} holds dates or times, such as {held[0]!r} in {where(cells.index(held[0]))}, which are "
            "neither numbers nor categories: turn them into numbers, such as days since a fixed date, or leave the "
            "column out (--drop)"
        )
    if 2 * sum(_WRITTEN.fullmatch(cell) is not None for cell in held) > len(held):
        raise ValueError(
            f"column {name!r} holds numbers with separators or signs, such as {held[0]!r} in "
            f"{where(cells.index(held[0]))}; expected only digits and a decimal point, as in 1234.5: convert them, or "
            "leave the column out (--drop)"
        )
    return Column(name, "category", _categories(name, held))


def number_cells(cells: Sequence[str], name: str) -> np.ndarray:
    """The numbers in cells: int64 if all are whole numbers, so that no digit is lost, otherwise float64.

    :param name: name of the column, for messages.
    :raises ValueError: for whole numbers that 64 bits cannot hold.
    """
    if all(_INTEGER.fullmatch(cell) for cell in cells):
        whole = [int(cell) for cell in cells]
        if all(abs(value) < 2**63 for value in whole):
            return np.asarray(whole, np.int64)
    if long := next((cell for cell in cells if _INTEGER.fullmatch(cell) and abs(int(cell)) >= 2**63), None):
        raise ValueError(
            f"column {name!r} holds the whole number {long}, which 64 bits cannot hold; leave it out (--drop), or say "
            "that it holds categories (--category)"
        )
    return np.asarray([float(cell) for cell in cells], np.float64)


def number_of(cell: str) -> float | None:
    """The number in a cell; ``None`` if it holds none, or one that float64 cannot hold."""
    if not _NUMBER.fullmatch(cell):
        return None
    number = float(cell)
    return number if math.isfinite(number) else None


def is_boolean(cell: str) -> bool:
    return cell.lower() in ("true", "false")


def is_missing(cell: str, known: Collection[str] = ()) -> bool:
    """Whether the value of a cell is missing.

    :param known: categories of the column, which are values even if they look missing.
    """
    return cell.lower() in MISSING and cell not in known


def input_names(table: Sequence[Column]) -> tuple[str, ...]:
    """The names of the inputs that columns become, in order."""
    names: list[str] = []
    for column in table:
        names += [f"{column.name}={c}" for c in column.categories] if column.kind == "category" else [column.name]
    return (*names, *(f"{column.name} is missing" for column in table if column.imputed))


def inputs_of(column: Column, cells: Sequence[str], *, where: Callable[[int], str]) -> list[np.ndarray]:
    """The inputs of one column, ``[rows]`` each, before standardisation and without the indicator of missing cells.

    :raises ValueError: for missing values in a column that had none in training, cells that are not numbers, and
        strings that did not occur in training; the message gives their rows.
    """
    empty = np.asarray([is_missing(cell, column.categories) for cell in cells], bool)
    if empty.any() and not column.imputed:
        rows = [int(row) for row in np.flatnonzero(empty)]
        unless = {cells[row] for row in rows} - {""}
        shown = f" ({', '.join(sorted(map(repr, unless)))})" if unless else ""
        raise ValueError(
            f"values are missing in {column.name} ({len(rows)}): {listed([where(row) for row in rows])}{shown}; fill "
            "them in, leave out those rows or this column, or train with --impute (impute=True in Python) on data with "
            "missing values in this column"
        )
    if column.kind == "category":
        return _one_hot(column, cells, empty, where)
    if column.kind == "boolean" or column.low is None and all(map(is_boolean, cells)):
        truth: Callable[[str], float | None] = {"true": 1.0, "false": 0.0, "1": 1.0, "0": 0.0}.get
        _require_all(
            column.name, cells, lambda cell: truth(cell.lower()), where, "held true and false in training", "mend them"
        )
        return [np.asarray([column.median if e else truth(c.lower()) for c, e in zip(cells, empty, strict=True)])]
    _require_all(column.name, cells, number_of, where, "holds numbers", "mend them or leave those rows out")
    filled = [repr(column.median) if e else cell for cell, e in zip(cells, empty, strict=True)]
    return [number_cells(filled, column.name)]


def missing_of(column: Column, cells: Sequence[str]) -> np.ndarray:
    """``[rows]``: 1 where the value of a cell is missing."""
    return np.asarray([is_missing(cell, column.categories) for cell in cells], np.float64)


def _one_hot(column: Column, cells: Sequence[str], empty: np.ndarray, where: Callable[[int], str]) -> list[np.ndarray]:
    for row, cell in enumerate(cells):
        if not empty[row] and cell not in column.categories:
            raise ValueError(
                f"column {column.name!r} has {cell!r} in {where(row)}, which did not occur in training; expected one "
                f"of {listed(list(column.categories), 20)}"
            )
    values = np.asarray(cells, dtype=np.str_)
    return [((values == category) & ~empty).astype(np.float64) for category in column.categories]


def _categories(name: str, held: Sequence[str]) -> tuple[str, ...]:
    found = sorted(set(held))
    if len(found) > MAX_CATEGORIES:
        raise ValueError(
            f"column {name!r} has {len(found)} different strings, more than the {MAX_CATEGORIES} categories that are "
            "allowed; leave it out (--drop) or turn it into numbers"
        )
    if len(found) > MAX_OWN and 2 * len(found) > len(held):
        raise ValueError(
            f"column {name!r} has {len(found)} different strings in {len(held)} rows, too many to learn from: "
            "leave it out (--drop) or turn it into numbers"
        )
    return tuple(found)


def _require_all(
    name: str,
    cells: Sequence[str],
    read: Callable[[str], _Value | None],
    where: Callable[[int], str],
    expected: str,
    remedy: str,
) -> None:
    """Refuses cells that cannot be read as the kind of the column; missing values are checked elsewhere."""
    bad = [row for row, cell in enumerate(cells) if not is_missing(cell) and read(cell) is None]
    if bad:
        shown = listed([f"{cells[row]!r} in {where(row)}" for row in bad])
        raise ValueError(f"column {name!r} {expected}, but not in {len(bad)} of {len(cells)} rows: {shown}; {remedy}")
