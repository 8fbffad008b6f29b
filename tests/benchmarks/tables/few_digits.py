"""The section of the first command, over ten seeds."""

from __future__ import annotations

from typing import Any

from tests.benchmarks.markdown import table
from tests.benchmarks.measure import read_results
from tests.benchmarks.tables.figures import by_method
from tests.benchmarks.tables.images import BEYOND as SHIFTED
from tests.benchmarks.tables.images import QUALITY

TEXT = """\
## Few digits: what `pyro-bnn fit` prints

`python -m tests.benchmarks.few_digits`: the command without options, a small convolutional network for a hundred of
scikit-learn's digits, and 540 others to test on; photographs for the OOD AUROC, and corrupted digits for cA, cNLL and
cECE. Means over {seeds} seeds, with standard errors.
"""
#: columns as those of the section of images
BEYOND = {
    "ood_auroc": ("OOD AUROC", 3, True),
    **{key: SHIFTED[key] for key in ("cA", "cNLL", "cECE")},
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
