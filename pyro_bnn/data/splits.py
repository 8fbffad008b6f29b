"""Which rows are for training and which for testing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pyro_bnn.entry import checks

TEST_SHARE = 0.3
#: names of folders, and of cells in a column that splits, in lower case
PARTS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "valid": "validation",
    "val": "validation",
    "validation": "validation",
}


def by_share(rows: int, share: float | None, strata: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training and the test rows of a fixed random split.

    :param share: share of the rows for testing; ``None`` for :data:`TEST_SHARE`.
    :param strata: class of each row, ``[rows]``; each class then has the same share in both parts.
    :raises ValueError: when a part would be empty, or cannot hold every class.
    """
    from sklearn.model_selection import train_test_split  # takes a second to import

    share = TEST_SHARE if share is None else checks.share("split", share)
    test_rows = math.ceil(share * rows)
    if rows - test_rows < 1:
        raise ValueError(f"{share:g} of {rows} rows for testing leaves none for training")
    if strata is not None:
        _require_every_class(strata, rows - test_rows, test_rows)
    train, test = train_test_split(np.arange(rows), test_size=share, stratify=strata, random_state=0)
    return train, test


def _require_every_class(strata: np.ndarray, train_rows: int, test_rows: int) -> None:
    classes, counts = np.unique(strata, return_counts=True)
    if counts.min() < 2:
        raise ValueError(
            f"class {str(classes[counts.argmin()])!r} has one row; training and testing need one each: add rows, or "
            "leave this class out"
        )
    for part, size in (("training", train_rows), ("testing", test_rows)):
        if size < len(classes):
            raise ValueError(
                f"there are {len(classes)} classes, but only {size} of the {train_rows + test_rows} rows are for "
                f"{part}, so not every class can have one: add rows, choose another share (--split), or name a column "
                "that says which rows are for testing"
            )


def by_column(cells: Sequence[str], name: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Indices of the rows that a column marks as train and test, and a note about rows that are left out.

    :raises ValueError: for other cells, or when a part has no row.
    """
    parts = [PARTS.get(cell.lower()) for cell in cells]
    if None in parts:
        row = parts.index(None)
        raise ValueError(
            f"column {name!r} should say which rows are for testing, but row {row + 1} has {cells[row]!r}; expected "
            "'train' or 'test' in every row"
        )
    tested = "test" if "test" in parts else "validation"
    train = np.flatnonzero([part == "train" for part in parts])
    test = np.flatnonzero([part == tested for part in parts])
    for part, rows in (("train", train), ("test", test)):
        if not len(rows):
            raise ValueError(f"column {name!r} has no row with {part!r}; both 'train' and 'test' are needed")
    left = len(parts) - len(train) - len(test)
    return train, test, (f"{left} rows for validation were left out",) if left else ()
