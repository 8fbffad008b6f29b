"""Training and test data of one problem."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from pyro_bnn.data.encoding import Encoding

TaskKind = Literal["classification", "regression"]


@dataclass(frozen=True, eq=False)
class Task:
    """Training and test data of one problem.

    :param name: what to call it in tables and folder names.
    :param x_train: inputs, ``[N, ...]``, float32; ``x_test`` alike.
    :param y_train: class labels, ``[N]``, int64; or regression targets, ``[N]``, float32, counted from
        ``encoding.y_mean`` in units of ``encoding.y_scale``; ``y_test`` alike.
    :param encoding: how the raw values became these tensors.
    :param x_ood: inputs from elsewhere, of the same shape and range, that a good posterior is uncertain about.
    :param notes: what was decided about the file and should be known: columns or folders that were left out, classes
        that no test row has.
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    encoding: Encoding
    x_ood: Tensor | None = None
    notes: tuple[str, ...] = ()

    @property
    def kind(self) -> TaskKind:
        return "classification" if self.encoding.classes else "regression"

    @property
    def out_features(self) -> int:
        """How many numbers a network has to return for a row: the number of classes, or 1 for regression."""
        return len(self.encoding.classes) or 1


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Adds the file's name to what is wrong with its content."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"cannot use {str(path)!r}: {error}") from error


def listed(items: list[str], most: int = 5) -> str:
    """The first few, and how many more there are."""
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
