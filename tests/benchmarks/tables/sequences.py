"""The section of recurrent networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.benchmarks.markdown import table
from tests.benchmarks.measure import read_results
from tests.benchmarks.tables.figures import by_method, mean_and_error

TEXT = """\
## Sequences of differing lengths

`python -m tests.benchmarks.sequences`: a GRU of 32 units; as they are, with a third of a deviation of noise, and with
the first half of each sequence. Rank-1 has four components, an ensemble four networks, each with all the epochs of one
network. Means over seeds, with standard errors.
"""
TITLES = {
    "vowels": "Vowels of nine speakers, 270 utterances to train on and 370 to test on",
    "watch": "Seven exercises by a sensor at the wrist, two of ten subjects to test on",
}
#: ``{key: (title, decimal places, whether the highest is the best)}``
COLUMNS = {
    "accuracy": ("accuracy", 3, True),
    "nll": ("NLL", 3, False),
    "ece": ("ECE", 3, False),
    "nll, noise": ("NLL, noise", 3, False),
    "accuracy, half": ("accuracy, half", 3, True),
    "nll, half": ("NLL, half", 3, False),
}


def section() -> list[str]:
    rows = read_results("sequences").get("rows", [])
    parts = []
    for name, title in TITLES.items():
        if of := [row for row in rows if row["set"] == name]:
            parts += [f"**{title}** ({len({row['seed'] for row in of})} seeds)", of_set(of)]
    return [TEXT, *parts] if parts else []


def of_set(rows: list[Mapping[str, Any]]) -> str:
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lines = by_method(rows, methods, COLUMNS)
    for line in lines:
        mean, _ = mean_and_error([row["parameters"] for row in rows if row["method"] == line[0]])
        line.append(f"{mean:,.0f}")
    return table(["", *(title for title, *_ in COLUMNS.values()), "numbers"], lines)
