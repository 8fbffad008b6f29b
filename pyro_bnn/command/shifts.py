"""Test data of the command line, corrupted: what `pyro-bnn fit` and `evaluate` say about distribution shift."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import pyro_bnn as pb
from pyro_bnn.data import Task
from pyro_bnn.data.corruptions import TABLE_KINDS, Corruption, corrupt_table, image_shift

if TYPE_CHECKING:
    from pyro_bnn.diagnostics import Shift

#: the most test rows that are corrupted, chosen at random and the same for all networks
ROWS = 300
#: the least number of functions, draws of all members, that a prediction of corrupted rows averages: 40 times all draws
#: of the other metrics would take longer than the training
FUNCTIONS = 4


def shift_scores(posterior: pb.Posterior, task: Task, samples: int, seed: int) -> Shift | None:
    """Scores on corrupted test data; ``None`` if it is not known how to corrupt them, see :func:`shift_note`.

    For a regression they are in the unit of the raw target.

    :param samples: the most draws of each member.
    """
    corruptions = _corruptions(task)
    if corruptions is None:
        return None
    order = torch.randperm(len(task.x_test), generator=torch.Generator().manual_seed(0))[:ROWS]
    rows = order.sort().values
    draws = min(samples, math.ceil(FUNCTIONS / posterior.num_members))
    found: dict[str, Any] = pb.diagnostics.evaluate(
        posterior, (task.x_test[rows], task.y_test[rows]), shift=corruptions, num_samples=draws, seed=seed
    )
    shift: Shift = found["shift"]
    return shift if task.kind == "classification" else _in_unit(shift, task.encoding.y_scale)


def shift_note(task: Task) -> str | None:
    """Why the test data of a task are not corrupted; ``None`` if they are."""
    if _corruptions(task) is not None:
        return None
    if _are_images(task.x_test):
        low, high = (float(bound) for bound in (task.x_test.min(), task.x_test.max()))
        return (
            f"test images are not corrupted to see how predictions fare: their values, from {low:.4g} to {high:.4g}, "
            "are neither bytes nor in [0, 1]"
        )
    return "test inputs are not corrupted to see how predictions fare: they are neither a table nor grey or RGB images"


def _corruptions(task: Task) -> dict[str, Corruption] | None:
    if task.encoding.x_mean:
        return {kind: partial(_standardised, kind=kind) for kind in TABLE_KINDS}
    if not _are_images(task.x_test):
        return None
    in_range = all(0 <= float(x.min()) and float(x.max()) <= 1 for x in (task.x_train, task.x_test))
    return image_shift() if in_range else None


def _are_images(x: Tensor) -> bool:
    return x.dim() == 4 and x.shape[1] in (1, 3)


def _standardised(x: Tensor, severity: int, *, kind: str) -> Tensor:
    """Columns of a task have the mean 0 and the standard deviation 1 over the training rows."""
    return corrupt_table(x, kind, severity, mean=0.0, std=1.0)


def _in_unit(shift: Shift, unit: float) -> Shift:
    """The same for a target that is ``unit`` times as large: NLL + log unit, and RMSE times unit."""

    def scaled(name: str, value: float) -> float:
        return value * unit if name == "rmse" else value + math.log(unit)

    by_kind = {
        kind: {name: [scaled(name, value) for value in values] for name, values in of.items()}
        for kind, of in shift.by_kind.items()
    }
    clean = {name: scaled(name, value) for name, value in shift.clean.items()}
    return dataclasses.replace(shift, by_kind=by_kind, clean=clean)
