"""How a figure of several splits or seeds is written."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error, which is NaN for a single value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def shown(value: float, error: float, places: int) -> str:
    if not math.isfinite(value):
        return "diverges"
    return f"{value:.{places}f}" if math.isnan(error) else f"{value:.{places}f} ± {error:.{places}f}"


def with_best(
    columns: Sequence[Sequence[tuple[float, float] | None]], places: Sequence[int], highest: Sequence[bool]
) -> list[list[str]]:
    """The texts of a table by columns; the best of a column, and what is within a standard error of it, is bold.

    :param columns: a mean and its error for each line, or ``None`` for an empty cell.
    :param highest: whether the highest of a column is its best.
    """
    texts = []
    for column, digits, up in zip(columns, places, highest, strict=True):
        sign = -1 if up else 1
        best, error = min(((sign * value, error) for value, error in filter(None, column)), default=(0.0, math.nan))
        reach = best + (0.0 if math.isnan(error) else error)
        cells = []
        for cell in column:
            text = "" if cell is None else shown(*cell, digits)
            cells.append(f"**{text}**" if cell is not None and sign * cell[0] <= reach else text)
        texts.append(cells)
    return texts


def by_method(
    rows: Sequence[Mapping[str, Any]], methods: Sequence[str], columns: Mapping[str, tuple[str, int, bool]]
) -> list[list[str]]:
    """The lines of a table: each method, and its means over seeds.

    The best of a column is bold among the methods that share the most seeds, where these are several.

    :param columns: ``{key: (title, decimal places, whether the highest is the best)}``.
    """
    own = {method: [row for row in rows if row["method"] == method] for method in methods}
    seeds = {method: sorted(row["seed"] for row in found) for method, found in own.items()}
    most = max(seeds.values(), key=len)
    whole = [method for method in methods if seeds[method] == most]
    values = [[mean_and_error([row[key] for row in own[method]]) for method in methods] for key in columns]
    places = [places for _, places, _ in columns.values()]
    texts = [[shown(*cell, digits) for cell in column] for column, digits in zip(values, places, strict=True)]
    if len(whole) > 1:  # means over other seeds are not compared
        compared = [
            [cell if method in whole else None for method, cell in zip(methods, column, strict=True)]
            for column in values
        ]
        marked = with_best(compared, places, [up for *_, up in columns.values()])
        texts = [[a or b for a, b in zip(*both, strict=True)] for both in zip(marked, texts, strict=True)]
    counts = {method: f" ({len(own[method])} seed{'s' * (len(own[method]) > 1)})" for method in methods}
    heads = [method + (counts[method] if len(whole) < len(methods) else "") for method in methods]
    return [[head, *cells] for head, cells in zip(heads, zip(*texts, strict=True), strict=True)]


def difference(
    rows: Sequence[Mapping[str, Any]], key: str, method: str, control: str, places: int, highest: bool
) -> str:
    """The mean over seeds of what a method has more than its control has with the same seed, and its standard error.

    :param highest: whether more is better. The text is bold where the method is better by more than a standard error.
    """
    of = {name: {row["seed"]: row[key] for row in rows if row["method"] == name} for name in (method, control)}
    mean, error = mean_and_error([of[method][seed] - of[control][seed] for seed in of[method] if seed in of[control]])
    text = f"{mean:+.{places}f}" if math.isnan(error) else f"{mean:+.{places}f} ± {error:.{places}f}"
    return f"**{text}**" if (mean if highest else -mean) > error else text
