"""Where the samples are inside a network: what a probe finds for each use of a weight, and what a rule reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Use(NamedTuple):
    """One use of one parameter in a forward pass: its name, and how many uses came before."""

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
