"""Tables in CSV files, read by the names of their columns."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pyro_bnn.data import splits
from pyro_bnn.data.columns import (
    column_kind,
    input_names,
    inputs_of,
    is_boolean,
    is_missing,
    missing_of,
    number_cells,
    number_of,
)
from pyro_bnn.data.encoding import Column, Encoding, moments, standardised
from pyro_bnn.data.targets import absent_classes, class_names, is_classification, labels, numbers
from pyro_bnn.data.task import Task, TaskKind, listed, reading


@dataclass(frozen=True)
class Table:
    """The cells of a file as strings, without surrounding blanks.

    :param names: names of the columns.
    :param rows: the cells of each row.
    :param lines: the line of the file in which each row ends; the header is in line 1.
    """

    names: tuple[str, ...]
    rows: list[list[str]]
    lines: list[int]

    def cells(self, name: str) -> list[str]:
        """The cells of one column."""
        place = self.names.index(name)
        return [row[place] for row in self.rows]

    def where(self, row: int) -> str:
        return f"row {row + 1} (line {self.lines[row]})"

    def row_numbers(self) -> list[str]:
        """A first column without a name that counts the rows, as pandas and R write it."""
        first = self.names[0]
        if first and first != "Unnamed: 0":
            return []
        counts = self.cells(first)
        return [first] if any(counts == [str(start + i) for i in range(len(counts))] for start in (0, 1)) else []

    def keep(self, rows: np.ndarray) -> Table:
        return Table(self.names, [self.rows[i] for i in rows], [self.lines[i] for i in rows])


def read_table(path: str | Path) -> Table:
    """The cells of a file with a header line, in UTF-8, with commas between the cells.

    :raises OSError: when the file cannot be read.
    :raises ValueError: when it is empty or not text in UTF-8, a quote is not closed, a row has more or fewer cells than
        the header, or two columns have the same name; the message gives the line.
    """
    raw = Path(path).read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ValueError(
            f"line {line} is not UTF-8 (byte {raw[error.start]:#04x}); save the file as UTF-8: iconv -f latin1 -t utf-8"
        ) from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise ValueError(f"line {line} holds a zero byte: it is not a text file, is damaged, or is not in UTF-8")
    text = text.replace("\r\n", "\n").replace("\r", "\n")  # concatenated files may mix kinds of line ends
    reader = csv.reader(io.StringIO(text), strict=True, skipinitialspace=True)
    found: list[tuple[int, list[str]]] = []
    try:
        found.extend((reader.line_num, [cell.strip() for cell in row]) for row in reader)
    except csv.Error as error:
        raise ValueError(
            f"line {reader.line_num} is not comma-separated values ({error}); is a quote open, or the file truncated?"
        ) from error
    while found and not found[-1][1]:
        found.pop()
    if not found or not any(found[0][1]):
        raise ValueError("it is empty: a header line with the names of the columns was expected")
    names = tuple(found[0][1])
    _require_names(names)
    # In a table with one column an empty line is a row with an empty cell; in other tables it is ignored.
    rows = [(line, row or [""]) for line, row in found[1:] if row or len(names) == 1]
    for line, row in rows:
        if len(row) != len(names):
            cut = ", or is the file truncated" if line == found[-1][0] and len(row) < len(names) else ""
            raise ValueError(
                f"line {line} has {len(row)} cells, the header {len(names)}: quote cells that hold a comma{cut}"
            )
    return Table(names, [row for _, row in rows], [line for line, _ in rows])


def _require_names(names: tuple[str, ...]) -> None:
    repeated = sorted({name for name in names if name and names.count(name) > 1})
    if repeated:
        raise ValueError(f"two columns have the name {', '.join(map(repr, repeated))}: rename or remove one of them")
    if names.count("") > 1:
        places = [str(place + 1) for place, name in enumerate(names) if not name]
        raise ValueError(f"columns {listed(places)} have no name in the header: name them or remove them")
    if len(names) == 1 and (other := next((s for s in ";\t|" if s in names[0]), None)):
        raise ValueError(f"the header has no comma, but {other!r}: expected commas between the cells")


def from_csv(
    path: str | Path,
    target: str | None,
    encoding: Encoding | None = None,
    *,
    task: TaskKind | None = None,
    drop: Sequence[str] = (),
    split: str | float | None = None,
    category: Sequence[str] = (),
    impute: bool = False,
) -> Task:
    """Reads a table with a header line, in which the column ``target`` is to be predicted from all others.

    By default a fixed random 30 % of the rows are for testing, stratified by class in a classification. Inputs are
    standardised in float64 with the mean and standard deviation of the training rows; before that, strings become
    one-hot columns, and true and false become 1 and 0. If more than half of the cells of a column are numbers, it is a
    column of numbers. Blanks around cells are ignored, and so is a first column without a name that counts the rows.

    With an ``encoding``, columns are found by name, in any order, and read as they were in training.

    :param target: name of the target column; by default that of the encoding.
    :param encoding: the encoding of an earlier task, with which this file is read; by default it is learned.
    :param task: whether the target is a class or a number, if its values leave that open;
        see :func:`~pyro_bnn.data.targets.is_classification`.
    :param drop: columns that are not inputs.
    :param split: the share of the rows for testing, or the column that has ``train`` or ``test`` in every row.
    :param category: columns that hold categories, though they look like numbers or dates.
    :param impute: whether values may be missing: a missing number is replaced by the median of the training rows, a
        missing category by zeros, and a further input says where values are missing.
    :raises FileNotFoundError: when there is no such file.
    :raises ValueError: when it is not a table, there is no such column, values are missing, a column holds more than
        100 different strings, or a class has too few rows; and for columns, categories and classes that the encoding
        does not have.
    """
    drop, category = _several(drop), _several(category)
    with reading(path):
        if encoding is not None and not encoding.table:
            raise ValueError("the network was not trained on a .csv file; give a file of the kind that training had")
        table = read_table(path)
        columns = f"its columns are: {', '.join(table.names)}"
        target = target.strip() if target is not None else encoding.target if encoding else None
        if target is None:
            raise ValueError(f"a target column is needed (--target); {columns}")
        for name in (target, *drop, *category, *([split] if isinstance(split, str) else [])):
            if name not in table.names:
                raise ValueError(f"there is no column {name!r}; {columns}")
        if target in drop:
            raise ValueError(f"column {target!r} is both the target and left out")
        if len(table.rows) < 4 or len(table.names) < 2:
            raise ValueError(
                f"at least 4 rows and 2 columns are needed, but it has {len(table.rows)} and {len(table.names)}"
            )
        notes: tuple[str, ...] = ()
        if split is None and encoding is not None:
            split = encoding.split
        if isinstance(split, str) and split not in table.names:
            raise ValueError(f"column {split!r}, which marked the test rows in training, is missing; give --split")
        left_out = {*drop, *table.row_numbers(), *([split] if isinstance(split, str) else [])} - {target}
        y = _target(table, target)
        if encoding is None:
            classes = is_classification(y, task, f"column {target!r}")
        else:
            classes = bool(encoding.classes)
        if isinstance(split, str):
            train, test, notes = splits.by_column(table.cells(split), split)
        else:
            train, test = splits.by_share(len(y), split, y if classes else None)
        if encoding is None:
            encoding = _learned(table, y, train, target, classes, left_out, split, set(category), impute)
            if dropped := [name for name in encoding.left_out if name not in (*drop, split)]:
                notes += (f"column {dropped[0]!r} counts the rows and was left out",)
        x = inputs_of_table(table, encoding, ignored=left_out | {target})
        if encoding.classes:
            found = torch.from_numpy(labels(y, encoding.classes, f"column {target!r}"))
            notes += absent_classes(found[test], encoding.classes)
        else:
            found = torch.from_numpy(numbers(y, encoding, f"column {target!r}"))
        return Task(Path(path).stem, x[train], found[train], x[test], found[test], encoding, notes=notes)


def inputs_of_table(table: Table, encoding: Encoding, ignored: set[str]) -> torch.Tensor:
    """The inputs ``[rows, inputs]`` in float32 of a table, read as the training data were.

    :param ignored: columns of this file that are not inputs, besides those that training left out.
    :raises ValueError: for columns that are missing or that training did not see, and cells that cannot be read.
    """
    names = [column.name for column in encoding.table]
    if absent := [name for name in names if name not in table.names]:
        raise ValueError(
            f"column {listed([repr(name) for name in absent])}, on which the network was trained, is missing; its "
            f"columns are: {', '.join(table.names)}"
        )
    known = {*names, *ignored, *encoding.left_out, encoding.target}
    if isinstance(encoding.split, str):
        known.add(encoding.split)
    if extra := [name for name in table.names if name not in known]:
        raise ValueError(
            f"column {listed([repr(name) for name in extra])} did not occur in training: leave it out (--drop), or "
            f"rename it; the network reads: {', '.join(names)}"
        )
    return torch.from_numpy(standardised(_raw_inputs(table, encoding.table), encoding.x_mean, encoding.x_scale))


def _raw_inputs(table: Table, columns: Sequence[Column]) -> list[np.ndarray]:
    inputs: list[np.ndarray] = []
    for column in columns:
        inputs += inputs_of(column, table.cells(column.name), where=table.where)
    return inputs + [missing_of(column, table.cells(column.name)) for column in columns if column.imputed]


def _learned(
    table: Table,
    y: np.ndarray,
    train: np.ndarray,
    target: str,
    classes: bool,
    left_out: set[str],
    split: str | float | None,
    category: set[str],
    impute: bool,
) -> Encoding:
    """The encoding of a training file; medians, means and scales come from its training rows."""
    names = [name for name in table.names if name != target and name not in left_out]
    if not names:
        raise ValueError(f"no column is left from which to predict {target!r}: drop fewer columns")
    found = [_column(table, name, train, name in category, impute) for name in names]
    goal = table.cells(target)
    if copies := [name for name in names if table.cells(name) == goal]:
        raise ValueError(f"column {copies[0]!r} equals the target in every row: leave it out (--drop)")
    columns = sorted(found, key=lambda column: column.kind == "category")
    inputs = _raw_inputs(table.keep(train), columns)
    centre, scale = zip(*(moments(values[:, None]) for values in inputs), strict=True)
    x_mean, x_scale = (tuple(value for (value,) in part) for part in (centre, scale))
    order = tuple(name for name in table.names if name in left_out)
    about = (input_names(columns), x_mean, x_scale)
    if classes:
        known = class_names(y, f"column {target!r}")
        trained = set(labels(y[train], known, "").tolist())
        if absent := [name for i, name in enumerate(known) if i not in trained]:
            raise ValueError(f"class {listed([repr(name) for name in absent])} is in no training row")
        return Encoding(*about, known, table=tuple(columns), target=target, left_out=order, split=split)
    (y_mean,), (y_scale,) = moments(y[train][:, None])
    return Encoding(*about, (), y_mean, y_scale, tuple(columns), target, order, split)


def _column(table: Table, name: str, train: np.ndarray, literal: bool, impute: bool) -> Column:
    if not name:
        place = table.names.index(name) + 1
        raise ValueError(f"column {place} has no name in the header: name it, remove it, or leave it out (--drop '')")
    cells = table.cells(name)
    column = column_kind(name, cells, where=table.where, taken_literally=literal)
    empty = missing_of(column, cells) > 0
    imputed = impute and bool(empty.any())
    if column.kind == "category":
        return dataclasses.replace(column, imputed=imputed)
    if not imputed:
        values = inputs_of(column, cells, where=table.where)[0][train]
        return dataclasses.replace(column, low=float(values.min()), high=float(values.max()))
    held = [cells[row] for row in train if not empty[row]]
    if not held:
        raise ValueError(f"column {name!r} has no value in any training row: leave it out (--drop)")
    values = inputs_of(column, held, where=str)[0]
    low, high, median = float(values.min()), float(values.max()), float(np.median(values))
    return dataclasses.replace(column, low=low, high=high, imputed=True, median=median)


def _several(names: Sequence[str]) -> Sequence[str]:
    return (names,) if isinstance(names, str) else names


def _target(table: Table, name: str) -> np.ndarray:
    """The cells of the target: booleans, integers, floats or strings."""
    cells = table.cells(name)
    if empty := [row for row, cell in enumerate(cells) if is_missing(cell)]:
        shown = listed([f"{cells[row]!r} in {table.where(row)}" for row in empty])
        raise ValueError(
            f"values are missing in {name} ({len(empty)}), the target: {shown}; leave those rows out, or predict them "
            "with `pyro-bnn predict`"
        )
    if all(map(is_boolean, cells)):
        return np.asarray([cell.lower() == "true" for cell in cells])
    bad = [row for row, cell in enumerate(cells) if number_of(cell) is None]
    if not bad:
        return number_cells(cells, name)
    if 2 * len(bad) < len(cells):
        shown = listed([f"{cells[row]!r} in {table.where(row)}" for row in bad])
        raise ValueError(f"column {name!r}, the target, holds numbers, but not in {len(bad)} rows: {shown}; fix them")
    return np.asarray(cells)
