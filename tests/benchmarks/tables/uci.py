"""The section of UCI tables: NLL and RMSE, gaps, wins over published figures, and a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.markdown import table
from tests.benchmarks.tables.figures import mean_and_error, shown
from tests.benchmarks.uci import published
from tests.benchmarks.uci.methods import METHODS
from tests.benchmarks.uci.rows import SPLITS, known

#: chosen on each split among our methods by the NLL of the validation rows
BEST = "best of ours, by validation"

UCI = """\
## Regression: UCI

One hidden layer of 50 ReLU units (100 for protein), on the published splits. NLL and RMSE of the test rows are in the
units of y. Each method chooses among four settings by the NLL of a fifth of the training rows, the likelihood among
them: one noise for all rows, or a noise that the network predicts. Chains choose the prior scale of the first layer of
small tables among two; half of the draws of SGHMC are of chains that predict the noise, half of chains with one noise
for all rows, and the line before it has the first alone. Trainings have up to 5,000 steps, and 20,000 of tables with
more than 5,000 rows. The last row of ours takes on each split the method of ours whose validation NLL was lowest, among
those that were measured on that split; half of SGHMC is among them only where the whole was not measured. Published
rows are those of their papers, which have one noise for all rows, but for deep ensembles, whose networks predict it. A
table counts as won where ours is lower after rounding to the two digits of the published figures; naval's RMSE, 0.00 in
one of them, cannot be. How to run the chains on a table of your own is in [sghmc.md](sghmc.md).
"""

GAPS = """\
### Gaps

The test rows are the middle third by one input, which is missing in training; a figure is the mean over the inputs.
"""

Rows = Sequence[Mapping[str, Any]]


def of_parts(rows: Rows, kind: str) -> dict[str, dict[str, Mapping[str, Any]]]:
    """``{method: {part: row}}`` of the splits or of the gaps, with the best of ours as a method of its own.

    Half of a method is not among those that it is chosen from, where the whole is measured.
    """
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        if row["part"].startswith(kind):
            found.setdefault(row["method"], {})[row["part"]] = row
    ours = [name for name, method in METHODS.items() if method.is_ours and name in found]
    if not ours:
        return found
    measured: dict[str, list[Mapping[str, Any]]] = {}
    for name in ours:
        for part, row in found[name].items():
            if part not in found.get(METHODS[name].half_of, {}):
                measured.setdefault(part, []).append(row)
    best = {part: min(own, key=validated) for part, own in sorted(measured.items())}
    return {name: found[name] for name in METHODS if name in found} | {BEST: best}


def validated(row: Mapping[str, Any]) -> float:
    return min(row["validation"].values())


def digits(figure: str, table: str) -> int:
    return 4 if (figure, table) == ("rmse", "naval") else 2


def columns(kind: str) -> dict[str, dict[str, dict[str, Mapping[str, Any]]]]:
    """What was measured of each table that has rows."""
    found = {name: of_parts(known(name), kind) for name in SPLITS}
    return {name: methods for name, methods in found.items() if methods}


def uci_table(
    figure: str, kind: str, theirs: Mapping[str, Sequence[float]], among: Sequence[str] = (*METHODS, BEST)
) -> str:
    """One row for each method, and one column for each table."""
    measured = columns(kind)
    methods = [name for name in among if any(name in of for of in measured.values())]
    counts = {name: max(map(len, of.values())) for name, of in measured.items()}
    texts: dict[str, list[str]] = {method: [] for method in methods}
    for name, of in measured.items():
        found = {m: mean_and_error([row[figure] for row in parts.values()]) for m, parts in of.items() if m in methods}
        lowest, error = min((found[m] for m in found if len(of[m]) == counts[name]), default=(-math.inf, math.nan))
        reach = lowest + (0.0 if math.isnan(error) else error)
        if len({len(of[method]) for method in found}) > 1:  # means over other splits are not compared
            reach = -math.inf
        for method in methods:
            if method not in found:
                texts[method].append("")
                continue
            text, number = shown(*found[method], digits(figure, name)), len(of[method])
            text = f"**{text}**" if found[method][0] <= reach and number == counts[name] else text
            texts[method].append(text if number == counts[name] else f"{text} ({number} of them)")
    lines = [[method, *cells] for method, cells in texts.items()]
    order = [published.TABLES.index(name) for name in measured]
    for rival, values in theirs.items():
        numbers = [f"{values[i]:.2f}" for i in order]
        lines.append([f"published: {rival}", *numbers])
    what = "split" if kind == "split" else "input"
    heads = [f"{name} ({n} {what}{'s' * (n > 1)})" for name, n in counts.items()]
    return table(["", *heads], lines)


def wins() -> str:
    """How often the best of ours is better than the best published figure of the rivals."""
    texts = []
    sides: tuple[tuple[str, dict[str, tuple[float, ...]]], ...] = (("NLL", published.NLL), ("RMSE", published.RMSE))
    for title, theirs in sides:
        better = []
        measured = {name: of for name, of in columns("split").items() if of.get(BEST)}
        for name, of in measured.items():
            own, _ = mean_and_error([row[title.lower()] for row in of[BEST].values()])
            if round(own, 2) < published.best(theirs, name):  # which has two digits
                better.append(name)
        texts.append(f"{title} of {len(better)} of {len(measured)} tables ({', '.join(better) or 'none'})")
    rivals = ", ".join(published.RIVALS)
    return f"The best of ours is better than the best published figure of {rivals}: {'; '.join(texts)}."


def chosen() -> str:
    """How often validation chose each of our methods as the best of ours."""
    lines = []
    for name, of in columns("split").items():
        names = [row["method"] for row in of.get(BEST, {}).values()]
        lines.append([name, ", ".join(f"{method} {names.count(method)}" for method in METHODS if method in names)])
    return table(["table", "the best of ours, by splits"], lines)


def seconds() -> str:
    """What the last fit of each method took."""
    measured = columns("split")
    lines = []
    for method in METHODS:
        cells = []
        for of in measured.values():
            times = [row["seconds of the last fit"] for row in of.get(method, {}).values()]
            cells.append(f"{statistics.median(times):.0f}" if times else "")
        if any(cells):
            lines.append([method, *cells])
    return table(["seconds of a fit, one core", *measured], lines)


def progress() -> str:
    """How much of the comparison has been run."""
    done = sum(row["part"].startswith("split") for name in SPLITS for row in known(name))
    whole = len(METHODS) * sum(SPLITS.values())
    text = f"{done} of {whole} pairs of a method and a split are measured."
    return text if done == whole else f"{text} What stands here is a first look: one split decides nothing."


def section() -> list[str]:
    texts = [UCI, progress(), wins(), "**NLL**", uci_table("nll", "split", published.NLL)]
    texts += ["**RMSE**", uci_table("rmse", "split", published.RMSE), "![NLL beside the ensemble](uci.png)"]
    texts += [chosen(), seconds()]
    if columns("gap"):
        texts += [GAPS, "**NLL**", uci_table("nll", "gap", {}), "**RMSE**", uci_table("rmse", "gap", {})]
    return texts


def draw(path: Path) -> None:
    """The NLL of each method less that of the ensemble on the same split: means and standard errors."""
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    control = "ensemble of 5"
    measured = {name: of for name, of in columns("split").items() if control in of}
    others = [name for name in METHODS if name != control and any(name in of for of in measured.values())]
    size = (2.2 * len(measured), 3.2)
    figure, axes = pyplot.subplots(1, len(measured), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, (name, of) in zip(axes[0], measured.items(), strict=True):
        for i, method in enumerate(others):
            parts = set(of.get(method, {})) & set(of[control])
            gaps = [of[method][part]["nll"] - of[control][part]["nll"] for part in parts]
            if gaps and all(map(math.isfinite, gaps)):
                value, error = mean_and_error(gaps)
                axis.errorbar(value, i, xerr=None if math.isnan(error) else error, fmt="o", color=f"C{i}")
        axis.axvline(0.0, color="grey", linewidth=0.8)
        axis.xaxis.set_major_locator(MaxNLocator(3))
        axis.margins(0.15)
        axis.set_title(name)
        axis.set_yticks(range(len(others)), others)
    figure.supxlabel("NLL less that of the ensemble of 5, in nats (left is better)")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
