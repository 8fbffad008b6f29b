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

    :param name: name for tables and folders.
    :param x_train, x_test: inputs, ``[N, ...]``, float32.
    :param y_train, y_test: class labels, ``[N]``, int64; or regression targets, ``[N]``, float32, standardised as
        ``(y - encoding.y_mean) / encoding.y_scale``.
    :param encoding: how the raw values became these tensors.
    :param x_ood: out-of-distribution inputs of the same shape and range, about which a good posterior is uncertain.
    :param notes: notes for the user: columns or folders that were left out, classes without a test row.
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
        """The number of outputs that a network needs for each row: the number of classes, or 1 for a regression."""
        return len(self.encoding.classes) or 1


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Context that adds the name of the file to errors about its content."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"cannot use {str(path)!r}: {error}") from error


def listed(items: list[str], most: int = 5) -> str:
    """The first few items, and how many more there are."""
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
