"""Numbers of a training run for TensorBoard, Weights & Biases, MLflow, a CSV file, or a function."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from pyro_bnn import display
from pyro_bnn.entry import checks


class HasLog(Protocol):
    """Such as a run of Weights & Biases."""

    def log(self, values: dict[str, float], step: int) -> object: ...


class HasLogMetrics(Protocol):
    """Such as ``mlflow``, and the loggers of PyTorch Lightning."""

    def log_metrics(self, values: dict[str, float], step: int) -> object: ...


class HasAddScalar(Protocol):
    """Such as the ``SummaryWriter`` of TensorBoard."""

    def add_scalar(self, name: str, value: float, step: int) -> object: ...


#: what ``log=`` takes
Log = Callable[[dict[str, float], int], object] | HasLog | HasLogMetrics | HasAddScalar


def writer_of(log: Log | None) -> Callable[[dict[str, float], int], object]:
    """A function ``(values, step)`` that writes to what the user gave; one that does nothing for ``None``.

    :raises TypeError: for anything else.
    """
    if log is None:
        return lambda values, step: None
    for name in ("log_metrics", "log"):
        if callable(method := getattr(log, name, None)):
            return lambda values, step: method(values, step=step)
    if callable(add := getattr(log, "add_scalar", None)):
        return lambda values, step: [add(name, value, step) for name, value in values.items()]
    if callable(log) and not isinstance(log, type):
        return log
    raise TypeError(
        f"log={log!r}: expected a function (values, step), an object with log(values, step), log_metrics(values, step) "
        "or add_scalar(name, value, step), such as a SummaryWriter, or pyro_bnn.inference.CSVLog('log.csv')"
    )


class CSVLog:
    """Appends to a file with the columns ``step, name, value``: ``fit(..., log=CSVLog("log.csv"))``.

    A run that resumes goes on in the same file. Steps between the checkpoint and an interruption are then there twice;
    the later row counts.

    :param path: of the file; folders above it are made.
    :raises TypeError: for a path that is none.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(checks.path("path", path))

    def __repr__(self) -> str:
        return display.call(self, path=str(self.path))

    def __call__(self, values: dict[str, float], step: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not self.path.exists() or not self.path.stat().st_size
        with self.path.open("a", newline="") as file:
            writer = csv.writer(file)
            if is_new:
                writer.writerow(["step", "name", "value"])
            writer.writerows([step, name, repr(float(value))] for name, value in values.items())
