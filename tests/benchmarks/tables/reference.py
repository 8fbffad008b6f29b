"""The section of posteriors that are known: every method against Hamiltonian Monte Carlo."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.benchmarks.markdown import table
from tests.benchmarks.measure import read_results
from tests.benchmarks.tables.figures import mean_and_error

TEXT = """\
## Against Hamiltonian Monte Carlo

`python -m tests.benchmarks.reference`: posteriors of a network with one hidden layer, sampled for long by Hamiltonian
Monte Carlo that is written out in the benchmark. *Agreement* is the share of test digits with the same most probable
class, *total variation* the distance of the predictive distributions, from 0 to 1, and *variance ratio* the variance of
predictions over draws by that of the reference: below 1 a method is too sure. The first line compares the halves of the
reference. Methods other than SGHMC have settings of their own, chosen by validation, so that they are as users have
them, and not the reference's prior.
"""
TITLES = {
    "digits": "1,000 digits of MNIST, 784-20-10, and 2,000 others to test on",
    "boston": "boston, 50 units, one noise",
    "wine": "wine, 50 units, one noise",
}
#: ``{key: (title, decimal places)}``
COLUMNS = {
    "agreement": ("agreement", 3),
    "total_variation": ("total variation", 3),
    "variance_ratio": ("variance ratio", 2),
    "nll": ("NLL", 3),
    "seconds": ("seconds", 0),
}


def section() -> list[str]:
    rows = read_results("reference").get("rows", [])
    found = {name: [row for row in rows if row["problem"] == name] for name in TITLES}
    found = {name: of for name, of in found.items() if of}
    return (
        [TEXT, *(part for name, of in found.items() for part in (f"**{TITLES[name]}**", of_problem(of)))]
        if found
        else []
    )


def of_problem(rows: list[Mapping[str, Any]]) -> str:
    keys = [key for key in COLUMNS if any(row[key] is not None for row in rows)]
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = []
        for key in keys:
            mean, _ = mean_and_error([row[key] for row in rows if row["method"] == method])
            cells.append(f"{mean:.{COLUMNS[key][1]}f}")
        lines.append([method, *cells])
    return table(["", *(COLUMNS[key][0] for key in keys)], lines)
