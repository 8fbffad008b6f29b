"""Converts the data of users to the tensors that a network takes; this happens only here.

Data are tensors, NumPy arrays (and whatever NumPy can convert to one), pandas frames and series, or nested lists of
numbers; x may be any nesting of dicts, tuples and lists of these. Row i of x belongs to row i of y: the index of a
frame is ignored.

===============  =====================================================================================================
floats           are converted to the dtype of the network
integers, bools  stay, as indices of embeddings and masks must; those of y become int64
frames as x      become a matrix of floats, in the order of their columns
lists            of numbers become tensors; beside tensors or arrays they are settings of the network, and stay
mappings         such as the ``BatchEncoding`` of a tokenizer become dicts: a network is called as ``net(**x)``
a batch          is a pair (x, y), or a mapping with the key ``labels``, which is y
===============  =====================================================================================================

Everything goes to the device of the network. A tensor that already has this device and dtype is not copied.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

#: The input of a network, in any nesting of dicts, tuples and lists. Networks differ in their inputs, so the type is
#: unknown until :func:`inputs` has checked the value.
Inputs: TypeAlias = object
#: What a user trains or scores on: a ``DataLoader``, a ``Dataset``, a pair (x, y), or one mapping with labels. The
#: type is unknown until an engine has checked the value.
Data: TypeAlias = object
#: what y is called in a batch that is one mapping, as data loaders for transformers make them
LABELS = "labels"
EXPECTED = "expected tensors, NumPy arrays, pandas frames or nested lists of numbers"
#: names of the NumPy dtype kinds that are not numeric
_KINDS = {"O": "objects", "U": "strings", "S": "bytes", "M": "dates", "m": "time spans", "V": "records", "T": "strings"}


def inputs(x: object, like: Tensor | None, name: str = "x") -> object:
    """Converts x to tensors for the network, in the same nesting.

    :param like: a tensor on the device and with the dtype of the network. ``None`` for a model that is not of this
        package: tensors then stay as they are, and floats of anything else get torch's default dtype.
    :param name: what messages call x.
    :raises TypeError: for arrays, frames and lists that do not hold numbers.
    :raises ValueError: for ragged lists, and missing or infinite values in a frame.
    """
    return _nested(x, name, lambda value, own: _fitting(value, tensor(value, own), like))


def targets(y: object, like: Tensor | None, name: str = "y") -> Tensor:
    """Converts y for a likelihood: floats to the dtype of the network, integers to int64.

    :param like, name: see :func:`inputs`.
    :raises TypeError: when y does not hold numbers.
    :raises ValueError: for ragged lists, missing values of a frame or series, and a single number.
    """
    found = _fitting(y, labels(y, name), like)
    if found.dim() == 0:
        raise ValueError(f"{name} is a single number; axis 0 must run over the samples")
    integers = not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
    return found.long() if integers and (like is not None or not isinstance(y, Tensor)) else found


def tensors(x: object, name: str = "x") -> object:
    """Converts arrays, frames and lists in x to CPU tensors of their own dtype; tensors stay as they are.

    For data that are cut into batches first. Raises as :func:`inputs`.
    """
    return _nested(x, name, tensor)


def labels(y: object, name: str = "y") -> Tensor:
    """Converts y to a CPU tensor of its own dtype; a tensor stays as it is. A frame keeps the dtypes of its columns.

    For data that are cut into batches first. Raises as :func:`targets`.
    """
    pandas = sys.modules.get("pandas")
    if pandas is not None and isinstance(y, pandas.DataFrame):
        y = np.column_stack([_from_series(column, name, pandas) for _, column in y.items()])
    return tensor(y, name)


def tensor(value: object, name: str) -> Tensor:
    """One array, frame, series or nested list of numbers as a tensor of its own dtype, without a copy where it can be.

    :param name: what messages call it.
    :raises TypeError: when it does not hold numbers.
    :raises ValueError: for ragged lists, and missing or infinite values in a frame.
    """
    if isinstance(value, Tensor):
        return value
    pandas = sys.modules.get("pandas")  # a frame exists only where pandas was imported
    if pandas is not None:
        if isinstance(value, (pandas.Index, pandas.api.extensions.ExtensionArray)):
            value = pandas.Series(value)
        if isinstance(value, pandas.DataFrame):
            value = _from_frame(value, name, pandas)
        elif isinstance(value, pandas.Series):
            value = _from_series(value, name, pandas)
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise ValueError(f"{name} holds {int(value.mask.sum())} masked values; drop or impute these samples first")
    if isinstance(value, str) or not (is_array(value) or isinstance(value, (list, tuple))):
        raise TypeError(f"{name} is {describe(value)}; {EXPECTED}")
    try:
        array = np.asarray(value)
    except ValueError as error:
        if not isinstance(value, (list, tuple)):
            raise
        lengths = sorted({len(row) if isinstance(row, (list, tuple)) else 1 for row in value})
        raise ValueError(
            f"{name} is a ragged list: its rows have lengths from {lengths[0]} to {lengths[-1]}, or differ further "
            "inside; expected as many numbers in every row. Pad them first"
            if len(lengths) > 1
            else f"{name} is a ragged list; expected as many numbers in every row at every depth. Pad them first"
        ) from error
    return _from_array(array, value, name)


def is_array(value: object) -> bool:
    """Whether a value is a tensor, an array, a frame or a series, rather than a number or a container of them."""
    return isinstance(value, Tensor) or hasattr(value, "__array__") and not isinstance(value, (np.generic, type))


def is_numbers(value: object) -> bool:
    """Whether a value is a list of numbers, or of such lists."""
    return isinstance(value, list) and bool(value) and all(_is_number(item) or is_numbers(item) for item in value)


def split(batch: object) -> tuple[object, Any] | None:
    """``(x, y)`` of a batch, a pair or a mapping with the key ``labels``; ``None`` for anything else."""
    if isinstance(batch, Mapping) and LABELS in batch:
        return {key: value for key, value in batch.items() if key != LABELS}, batch[LABELS]
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and not is_numbers(batch):
        return batch[0], batch[1]
    return None


def without_labels(batch: object) -> object:
    """The inputs of a batch: x alone, or the part before the labels."""
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key != LABELS}
    return batch[0] if isinstance(batch, (tuple, list)) and not is_numbers(batch) else batch


def require_finite(x: object, name: str = "x") -> None:
    """Raises ValueError when a floating tensor in x holds NaN or infinite values."""
    for leaf in pytree.tree_leaves(x):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()):
            bad = int((~torch.isfinite(leaf)).sum())
            raise ValueError(f"{name} holds {bad} NaN or infinite values; drop or impute these samples first")


def integers_in(x: object) -> list[str]:
    """The dtypes of the integer tensors in x, without repeats."""
    found = (leaf.dtype for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor))
    return sorted({str(d) for d in found if not (d.is_floating_point or d.is_complex or d == torch.bool)})


@contextlib.contextmanager
def naming_shapes(x: object) -> Iterator[None]:
    """Inside, errors that a network raises get a note with the shapes of its inputs."""
    try:
        yield
    except Exception as error:
        found = (leaf for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor))
        held = ", ".join(f"{list(leaf.shape)} of {str(leaf.dtype).removeprefix('torch.')}" for leaf in found)
        error.add_note(f"x is {held}, with the samples on axis 0; the network was called with rows of it")
        raise


def describe(value: object) -> str:
    """Describes a value for messages: its type, and for a list or tuple the types of its first items."""
    if isinstance(value, (list, tuple)):
        kinds = dict.fromkeys(type(item).__name__ for item in value[:100])
        return f"{type(value).__name__} of {', '.join(list(kinds)[:4]) or 'nothing'}"
    return type(value).__name__


# ------------------------------------------------------------------------------------------------------- nestings


def _nested(x: object, name: str, convert: Callable[[object, str], Tensor]) -> object:
    if is_array(x):
        return convert(x, name)
    settings = any(is_array(leaf) for leaf in _leaves(x))

    def part(path: pytree.KeyPath, leaf: object) -> object:
        own = name + pytree.keystr(path)
        if isinstance(leaf, Mapping):
            return _nested(dict(leaf), own, convert)
        if is_array(leaf) or isinstance(leaf, list) and not settings and is_numbers(leaf):
            return convert(leaf, own)
        return leaf

    return pytree.tree_map_with_path(part, x, is_leaf=is_numbers)


def _leaves(x: object) -> Iterator[object]:
    for leaf in pytree.tree_leaves(x):
        if isinstance(leaf, Mapping):  # one that torch does not know as a container
            yield from _leaves(dict(leaf))
        else:
            yield leaf


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, complex, np.number, np.bool_))


def _fitting(given: object, value: Tensor, like: Tensor | None) -> Tensor:
    """The converted tensor on the device of ``like``, and with its dtype if it is floating point."""
    if like is not None:
        return value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)
    if isinstance(given, Tensor) or not value.is_floating_point():
        return value
    return value.to(torch.get_default_dtype())


# --------------------------------------------------------------------------------------------- arrays and frames


def _from_array(array: np.ndarray, given: object, name: str) -> Tensor:
    kind = array.dtype.kind
    if kind not in "fiubc":
        held = _KINDS.get(kind, str(array.dtype))
        remedy = f"Turn them into numbers first: {name}.astype(float) where they are, codes or columns of 0 and 1 else"
        if kind == "O" and array.size:
            first = next((item for item in array.flat if not _is_number(item)), array.flat[0])
            held = f"objects, such as {describe(first)}"
        raise TypeError(f"{name} is {describe(given)} that holds {held}; {EXPECTED}. {remedy}")
    if kind == "u" and array.dtype.itemsize > 1:  # torch supports almost no operations on these dtypes
        array = array.astype(np.int64)
    elif array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    array = np.require(array.astype(array.dtype.newbyteorder("="), copy=False), requirements=["C", "W"])
    return torch.from_numpy(array)


def _from_frame(frame: Any, name: str, pandas: ModuleType) -> np.ndarray:
    """``[rows, columns]`` in float64."""
    is_number = pandas.api.types.is_numeric_dtype
    other = [(column, dtype) for column, dtype in frame.dtypes.items() if not is_number(dtype)]
    if other:
        raise TypeError(
            f"{name} has columns that do not hold numbers: {_listed(f'{c!r} ({d})' for c, d in other)}. Encode them "
            f"(pandas.get_dummies({name}) makes columns of 0 and 1) or drop them first"
        )
    array: np.ndarray = frame.to_numpy(dtype=np.float64, na_value=np.nan)
    counts = (~np.isfinite(array)).sum(0)
    if counts.any():
        bad = (f"{frame.columns[i]!r} ({counts[i]})" for i in np.flatnonzero(counts))
        raise ValueError(
            f"{name} holds NaN, missing or infinite values in the columns {_listed(bad)}; drop or impute these samples "
            "first"
        )
    return array


def _from_series(series: Any, name: str, pandas: ModuleType) -> np.ndarray:
    called = name if series.name is None else f"{name} (column {series.name!r})"
    types = pandas.api.types
    if isinstance(series.dtype, pandas.CategoricalDtype):
        raise TypeError(
            f"{called} is categorical: give its codes, {name}.cat.codes, and keep {name}.cat.categories, which says "
            "what each code means, the same for all data"
        )
    if not types.is_numeric_dtype(series.dtype):
        raise TypeError(
            f"{called} holds {series.dtype}, not numbers: labels are integers numbered from 0, such as "
            f"codes, names = pandas.factorize({name})"
        )
    whole = types.is_integer_dtype(series.dtype) or types.is_bool_dtype(series.dtype)
    if whole and series.isna().any():
        raise ValueError(
            f"{called} holds {int(series.isna().sum())} missing values; drop or impute these samples first"
        )
    if isinstance(series.dtype, np.dtype):
        array: np.ndarray = series.to_numpy()
    elif whole:
        array = series.to_numpy(dtype=np.bool_ if types.is_bool_dtype(series.dtype) else np.int64)
    else:
        array = series.to_numpy(dtype=np.float64, na_value=np.nan)
    return array


def _listed(items: Iterator[str]) -> str:
    every = list(items)
    return ", ".join(every[:5]) + (f" and {len(every) - 5} more" if len(every) > 5 else "")
