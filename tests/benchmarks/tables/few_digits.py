"""The section of the first command, over ten seeds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.benchmarks.markdown import table
from tests.benchmarks.measure import read_results
from tests.benchmarks.tables.figures import by_method

TEXT = """\
## Few digits: what `pyro-bnn fit` prints

`python -m tests.benchmarks.few_digits`: the command without options, a small convolutional network for a hundred of
scikit-learn's digits, and 540 others to test on; photographs for the OOD AUROC, and corrupted digits for cA, cNLL and
cECE. Means over {seeds} seeds, with standard errors.
"""
Columns = Mapping[str, tuple[str, int, bool]]
#: ``{key: (title, decimal places, whether the highest is the best)}``
QUALITY: Columns = {
    "accuracy": ("accuracy", 4, True),
    "nll": ("NLL", 4, False),
    "brier": ("Brier", 4, False),
    "ece": ("ECE", 4, False),
    "aurc": ("AURC", 5, False),
}
BEYOND: Columns = {
    "ood_auroc": ("OOD AUROC", 3, True),
    "cA": ("cA", 3, True),
    "cNLL": ("cNLL", 3, False),
    "cECE": ("cECE", 3, False),
    "seconds": ("seconds", 0, False),
}


def section() -> list[str]:
    rows: list[dict[str, Any]] = read_results("few_digits").get("rows", [])
    if not rows:
        return []
    methods = list(dict.fromkeys(row["method"] for row in rows))
    text = TEXT.format(seeds=len({row["seed"] for row in rows}))
    return [
        text,
        *(table(["", *(t for t, *_ in of.values())], by_method(rows, methods, of)) for of in (QUALITY, BEYOND)),
    ]
