"""The positions of members and samples: inside a network, as a probe finds them, and in a folded batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Use(NamedTuple):
    """One use of one parameter in a forward pass: its name, and number of earlier uses."""

    parameter: str
    occurrence: int


@dataclass(frozen=True)
class Layout:
    """Where the samples are: entry i of axis ``dim`` belongs to folded row ``(i // inner) % rows``.

    ``inner > 1`` is a batch-major flatten (windows), ``outer > 1`` one in which the batch is not the leading part
    (time-major). ``dim=None`` means that the tensor does not depend on the sample at all.
    """

    dim: int | None
    outer: int = 1
    inner: int = 1


class Fold(NamedTuple):
    """How members and samples share the batch: row ``m * rows + b`` of it is sample b seen by member m."""

    members: int
    rows: int


def of_member(values: Tensor, member: int) -> Tensor:
    """``[members | 1, ...] -> [1, ...]``: the values of one member."""
    return values.narrow(0, member if values.shape[0] > 1 else 0, 1)
