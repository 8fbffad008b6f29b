"""The part of a page about corrupted data: a table for each metric, and a figure by kind and severity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pyro_bnn import display
from pyro_bnn.diagnostics import plots
from pyro_bnn.diagnostics.pages.glossary import METRIC_FORMATS, MetricFormat, best_of
from pyro_bnn.diagnostics.pages.page import Cell, Head, Picture, Table
from pyro_bnn.diagnostics.scoring.shift import MEANS, Shift


@dataclass(frozen=True)
class ShiftSection:
    """What the template of a page shows about corrupted data."""

    note: str
    tables: list[Table]
    pictures: list[Picture]


def shift_in(metrics: Mapping[str, object]) -> Shift | None:
    """The shift among metrics: what ``evaluate`` returned, or what a file holds of it; ``None`` if there is none.

    :raises ValueError: when it is neither.
    """
    found = metrics.get("shift")
    if found is None or isinstance(found, Shift):
        return found
    try:
        return Shift.from_json(found)  # type: ignore[arg-type]
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(
            f'"shift" of the metrics is not what evaluate(..., shift=...) returns ({type(error).__name__}: {error}); '
            "leave it out, or give that"
        ) from error


def shift_section(shifts: Mapping[str, Shift | None]) -> ShiftSection | None:
    """The section about all networks that were scored on corrupted data; ``None`` if none was.

    :param shifts: ``{label: shift}``; the note names networks without one, or with one of other data.
    """
    first = next((shift for shift in shifts.values() if shift is not None), None)
    if first is None:
        return None
    # On other rows or with other kinds the means would not compare.
    known = {
        label: shift
        for label, shift in shifts.items()
        if shift is not None and set(shift) == set(first) and shift.rows == first.rows
    }
    note = _note(known, [label for label in shifts if label not in known])
    return ShiftSection(note, [_table(known, name) for name in first.clean], [_picture(known)])


def _note(shifts: Mapping[str, Shift], left_out: Sequence[str]) -> str:
    rows = next(iter(shifts.values())).rows
    counts = ", ".join(f"{label} {shift.functions:,}" for label, shift in shifts.items())
    note = (
        f"{display.plural(rows, 'test row')}, corrupted in ways that training did not have, at severities 1 to 5. Each "
        f"prediction averages a number of functions, draws of all members: {counts}. The row 'clean' is without "
        "corruption, with the same rows and functions, which may be fewer than those of the other tables of this page."
    )
    if left_out:
        note += f" Not measured on these data: {', '.join(left_out)}."
    return note


def _table(shifts: Mapping[str, Shift], metric: str) -> Table:
    shown = METRIC_FORMATS[metric]
    kinds = next(iter(shifts.values()))
    rows = [_row("clean", {label: shift.clean[metric] for label, shift in shifts.items()}, metric, shown)]
    for kind in kinds:
        rows.append(_row(kind, {label: shift.mean_of(kind, metric) for label, shift in shifts.items()}, metric, shown))
    means = {label: shift.means()[MEANS[metric]] for label, shift in shifts.items()}
    rows.append(_row("mean", means, metric, shown))
    marks = "; ★ marks the best of a row" if len(shifts) > 1 else ""
    caption = f"{shown.label} under shift, mean over the severities; {shown.better} is better{marks}"
    return Table(caption, [Head("corruption"), *map(Head, shifts)], rows)


def _row(kind: str, values: Mapping[str, float], metric: str, shown: MetricFormat) -> tuple[Head, list[Cell | str]]:
    best = best_of(shown, values.values())
    cells: list[Cell | str] = [
        Cell(shown.text(value), value, {"metric": f"shift_{metric}_{kind}", "network": label}, value == best)
        for label, value in values.items()
    ]
    return Head(kind), cells


def _picture(shifts: Mapping[str, Shift]) -> Picture:
    metric = "nll"
    said = ", ".join(
        f"{label} {shift.clean[metric]:.3f} without corruption and {shift.by_severity(metric)[-1]:.3f} at severity 5"
        for label, shift in shifts.items()
    )
    return Picture(
        "Shift by kind and severity",
        plots.plot_shift(shifts, metric),
        f"NLL in nats against the severity of each kind of corruption. On average over the kinds: {said}.",
        "A network that knows what it does not know rises slowly. Severity 0 is without corruption.",
    )
