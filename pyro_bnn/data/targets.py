"""Targets: whether they are classes or numbers, and their conversion to labels or standardised numbers."""

from __future__ import annotations

from typing import get_args

import numpy as np
from torch import Tensor

from pyro_bnn.data.encoding import Encoding, centred, in_float32
from pyro_bnn.data.task import TaskKind, listed

#: number of different whole numbers up to which they count as classes by default
MAX_INTEGER_CLASSES = 20
#: most classes of a classification
MAX_CLASSES = 1000

_SAY = "say which with --task classification or --task regression (task= in Python)"


def is_classification(y: np.ndarray, task: TaskKind | None, name: str) -> bool:
    """Whether targets are classes: as ``task`` says or, without it, as their values say if they are unambiguous.

    Strings and booleans are classes, and so are at most 20 different whole numbers that are written as integers.
    Whole numbers written as floats, such as 0.0 and 1.0, are classes if there are two, or at most 20 that count from 0
    or 1 without a gap. Other numbers are numbers.

    :param y: raw targets ``[N]``: strings, booleans, integers or floats.
    :param name: what messages call the targets.
    :raises ValueError: when ``task`` does not fit the values, or they could mean either.
    """
    if task not in (None, *get_args(TaskKind)):
        raise ValueError(f"task={task!r}: expected 'classification' or 'regression'")
    numeric = y.dtype.kind in "iuf"
    if task == "regression" and not numeric:
        raise ValueError(
            f"{name} holds {'booleans' if y.dtype.kind == 'b' else 'strings'}; expected numbers to predict"
        )
    if task is not None or not numeric:
        return task != "regression"
    if y.dtype.kind == "f" and (y != np.floor(y)).any():
        return False
    values = np.unique(y)
    consecutive = bool(values[0] in (0, 1) and (np.diff(values) == 1).all())
    if len(values) <= MAX_INTEGER_CLASSES:
        if y.dtype.kind != "f" or consecutive or len(values) == 2:
            return True
        if len(values) > 1 and len(y) >= 5 * len(values):
            raise ValueError(
                f"{name} holds {len(values)} different whole numbers ({listed([f'{v:g}' for v in values])}), written "
                f"as floats, which could be classes or numbers: {_SAY}"
            )
        return False
    if consecutive and len(y) >= 5 * len(values):
        raise ValueError(
            f"{name} holds the whole numbers from {values[0]:g} to {values[-1]:g}, each several times, which could be "
            f"{len(values)} classes or numbers such as counts: {_SAY}"
        )
    return False


def class_names(y: np.ndarray, name: str) -> tuple[str, ...]:
    """The names of the classes among raw targets, in the order of their labels: numbers by size, strings by letters.

    :raises ValueError: for a single class, more than :data:`MAX_CLASSES`, or nearly as many classes as rows.
    """
    names = tuple(_name_of(value) for value in np.unique(y).tolist())
    if len(names) < 2:
        raise ValueError(
            f"a classification needs at least two classes, but there is only {', '.join(map(repr, names))}"
        )
    if len(names) > MAX_CLASSES or len(names) > 20 and len(names) > len(y) / 2:
        raise ValueError(
            f"{name} has {len(names)} different values in {len(y)} rows, such as {', '.join(names[:3])}; "
            f"expected at most {MAX_CLASSES} classes with several rows each. To predict numbers use --task regression "
            "(task= in Python)"
        )
    return names


def labels(y: np.ndarray, classes: tuple[str, ...], name: str) -> np.ndarray:
    """The position of each raw target among the classes, ``[N]`` int64.

    :raises ValueError: for a target that is not among them; the message gives its row.
    """
    numbers = {known: number for number, known in enumerate(classes)}
    found = np.empty(len(y), np.int64)
    for row, value in enumerate(y.tolist()):
        own = _known_name(value, numbers)
        if own is None:
            raise ValueError(
                f"class {_name_of(value)!r} is not among the training classes {listed(list(classes), 20)} ({name}, row "
                f"{row + 1})"
            )
        found[row] = numbers[own]
    return found


def absent_classes(y: Tensor, classes: tuple[str, ...]) -> tuple[str, ...]:
    """A note about classes without a test row.

    :param y: labels ``[N]`` of the test rows.
    """
    present = set(y.tolist())
    none = [repr(name) for label, name in enumerate(classes) if label not in present]
    return (f"no test row has class {listed(none)}: the scores say nothing about it",) if none else ()


def numbers(y: np.ndarray, encoding: Encoding, name: str) -> np.ndarray:
    """Raw targets standardised with the mean and standard deviation of the training targets, ``[N]`` float32.

    :raises ValueError: for strings and booleans.
    """
    if y.dtype.kind not in "iuf":
        raise ValueError(f"{name} holds labels ({y.dtype}); expected numbers to predict")
    return in_float32(centred(y, encoding.y_mean) / encoding.y_scale)


def _name_of(value: object) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _known_name(value: object, known: dict[str, int]) -> str | None:
    """The name of a class, in whichever way this file writes it: 1, 1.0 or "1", True or "TRUE"."""
    name = _name_of(value)
    if name in known:
        return name
    if name.strip().capitalize() in ("True", "False") and name.strip().capitalize() in known:
        return name.strip().capitalize()
    try:
        number = _name_of(float(name))
    except ValueError:
        return None
    return number if number in known else None
