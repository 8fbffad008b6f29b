"""How raw values become tensors: learned from the training data, and applied to every later file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

ColumnKind = Literal["number", "boolean", "category"]


@dataclass(frozen=True)
class Column:
    """One column of a table that a network reads.

    :param name: name of the column.
    :param kind: ``"number"`` and ``"boolean"`` (true and false as 1 and 0) become one input, ``"category"`` one input
        for each category, which is 1 if the cell holds it and 0 otherwise.
    :param categories: the categories, for the kind ``"category"``.
    :param low, high: range of a number in the training rows; ``None`` in the encoding of an older run.
    :param imputed: whether values may be missing; a further input is then 1 where a value is missing, otherwise 0.
    :param median: replaces a missing number: the median of the training rows.
    """

    name: str
    kind: ColumnKind
    categories: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    imputed: bool = False
    median: float = 0.0


@dataclass(frozen=True)
class ArrayForm:
    """The form of training inputs that are arrays, such as images and sequences.

    :param dtype: NumPy's name of the dtype, such as ``"uint8"``; ``"image"`` for image files.
    :param unit: divisor of the values: 255 for bytes, 65535 for unsigned integers of 16 bits, otherwise 1.
    :param low, high: range of the training values before the division.
    :param shape: shape of one row, channels first.
    """

    dtype: str
    unit: float
    low: float
    high: float
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Encoding:
    """How raw values became tensors: learned from the training rows, and used to read new data in the same way.

    The inputs of a table are standardised, ``(x - mean) / scale``, in float64, before they become float32.

    :param columns: names of the inputs of a table; categories are one-hot, as ``"column=value"``. Empty for arrays and
        images.
    :param x_mean: mean of each input of a table; empty where inputs are used as they are.
    :param x_scale: standard deviation of each input of a table.
    :param classes: names of the classes in the order of their labels; empty for regression.
    :param y_mean: mean of a regression target, in the target's own unit.
    :param y_scale: standard deviation of a regression target, in the target's own unit.
    :param table: the columns of a table that are read: numbers first, then categories, each in the order of the file.
    :param target: name of the target column.
    :param left_out: columns of the training file that are not inputs.
    :param split: the column that says which rows are for testing, or their share; ``None`` for the default share.
    :param array: form of the arrays; ``None`` for tables, and in the encoding of an older run.
    """

    columns: tuple[str, ...] = ()
    x_mean: tuple[float, ...] = ()
    x_scale: tuple[float, ...] = ()
    classes: tuple[str, ...] = ()
    y_mean: float = 0.0
    y_scale: float = 1.0
    table: tuple[Column, ...] = ()
    target: str | None = None
    left_out: tuple[str, ...] = ()
    split: str | float | None = None
    array: ArrayForm | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Encoding:
        """The inverse of ``dataclasses.asdict``, after a round trip through JSON, which turns tuples into lists.

        Older encodings have no ``table``; it is then derived from the names of their inputs.

        :raises TypeError, KeyError: when a field is missing, unknown or malformed.
        """
        fields = _tuples(values)
        columns: tuple[str, ...] = fields.get("columns", ())
        if "table" in fields:
            fields["table"] = tuple(Column(**_tuples(column)) for column in fields["table"])
        else:
            fields["table"] = _columns_of_inputs(columns)
        if fields.get("array") is not None:
            fields["array"] = ArrayForm(**_tuples(fields["array"]))
        found = cls(**fields)
        if not len(found.columns) == len(found.x_mean) == len(found.x_scale) and found.columns:
            raise TypeError(
                f"{len(found.columns)} inputs have {len(found.x_mean)} means and {len(found.x_scale)} scales"
            )
        return found


def moments(values: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each column of ``[rows, columns]``; 1 instead of a standard deviation of 0.

    Both are computed in float64 from differences to the first row, so that a small spread far from 0 is not lost. For
    integers of 2^52 and more the mean is rounded to a whole number and kept exact.
    """
    means, scales = [], []
    for column in values.T:
        first: int | float = column[0].item()
        shifted = centred(column, first)
        largest = float(np.abs(shifted).max()) or 1.0
        about, scale = (largest * float(part) for part in ((shifted / largest).mean(), (shifted / largest).std()))
        mean = first + (round(about) if isinstance(first, int) and abs(first) >= 2**52 else about)
        noise = 4 * np.finfo(np.float64).eps * abs(mean)
        means.append(mean)
        scales.append(1.0 if scale == 0 or isinstance(first, float) and scale <= noise else scale)
    return tuple(means), tuple(scales)


def centred(column: np.ndarray, mean: float) -> np.ndarray:
    """``column - mean`` in float64; exact for integers of any size if the mean is a whole number."""
    if column.dtype.kind in "iu" and isinstance(mean, int):
        wrapped = np.uint64(mean % 2**64)
        return (column.astype(np.int64).astype(np.uint64) - wrapped).astype(np.int64).astype(np.float64)
    return column.astype(np.float64) - float(mean)


def standardised(columns: list[np.ndarray], mean: tuple[float, ...], scale: tuple[float, ...]) -> np.ndarray:
    """Standardises columns in float64, and stacks them to ``[rows, columns]`` in float32.

    :raises ValueError: for values too far from the mean for float32.
    """
    parts = [centred(column, m) / s for column, m, s in zip(columns, mean, scale, strict=True)]
    return in_float32(np.stack(parts, 1))


def in_float32(values: np.ndarray) -> np.ndarray:
    """Converts values to float32.

    :raises ValueError: for values that float32 cannot hold.
    """
    if values.size and float(np.abs(values).max()) > float(np.finfo(np.float32).max):
        row = int(np.argmax(np.abs(values).reshape(len(values), -1).max(1)))
        raise ValueError(f"row {row + 1} holds a number too large for float32, which networks use; scale it")
    return values.astype(np.float32)


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _columns_of_inputs(inputs: tuple[str, ...]) -> tuple[Column, ...]:
    """Columns from the names of inputs: ``("size", "colour=red", "colour=green")`` are a number and a category."""
    categories: dict[str, list[str]] = {}
    numbers = [Column(name, "number") for name in inputs if "=" not in name]
    for name in inputs:
        column, equals, category = name.partition("=")
        if equals:
            categories.setdefault(column, []).append(category.strip())
    return (*numbers, *(Column(name, "category", tuple(found)) for name, found in categories.items()))
