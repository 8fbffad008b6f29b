"""A page about one posterior: findings first, then metrics, then figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_bnn.diagnostics.checking.checks import check
from pyro_bnn.diagnostics.checking.findings import SEVERITIES, Finding
from pyro_bnn.diagnostics.pages import gallery, page
from pyro_bnn.diagnostics.pages.glossary import formats_of
from pyro_bnn.diagnostics.pages.page import Cell, Head, Table
from pyro_bnn.diagnostics.pages.shifts import ShiftSection, shift_in, shift_section
from pyro_bnn.diagnostics.scoring.metrics import evaluate
from pyro_bnn.diagnostics.scoring.scored import score
from pyro_bnn.diagnostics.scoring.shift import ShiftLike
from pyro_bnn.inputs import Data
from pyro_bnn.predicting import predict_batches, require_posterior, require_repeatable
from pyro_bnn.randomness import some_seed

if TYPE_CHECKING:
    from pyro_bnn.posterior import Posterior


def report(
    posterior: Posterior,
    data: Data,
    *,
    path: str | Path,
    ood: Data = None,
    shift: ShiftLike | None = None,
    twin: Posterior | None = None,
    title: str = "Report of a posterior",
    metrics: Mapping[str, object] | None = None,
    findings: Sequence[Finding] | None = None,
    settings: Mapping[str, object] | None = None,
    num_samples: int | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
) -> Path:
    """Writes a report of a posterior as one self-contained HTML file: findings, metrics and figures.

    :param data: held-out data, as for :func:`evaluate`, but not an iterator, as it is read more than once.
    :param path: the file to write. It is written completely or not at all.
    :param ood: out-of-distribution inputs of the same form; for classification only.
    :param shift: how test inputs are corrupted, as for :func:`evaluate`; for a section about distribution shift.
    :param twin: the posterior of a deterministic network to compare with.
    :param title: heading of the page.
    :param metrics: what ``evaluate`` returned, with the metrics of the twin under ``"deterministic"``; by default they
        are computed.
    :param findings: by default those of :func:`check`.
    :param settings: how the posterior was made, for a table at the end.
    :param num_samples: draws of every member for each prediction.
    :param batch_size: the most rows in one forward pass.
    :param seed: of the draws; ``None`` takes a new one at each call.
    :returns: the path.
    :raises TypeError, ValueError: as :func:`evaluate`; TypeError also when data or ood is an iterator, and ValueError
        when both ``metrics`` and ``shift`` are given.
    :raises IsADirectoryError: when the path is a folder.
    """
    require_posterior(posterior)
    require_repeatable(data, "data")
    require_repeatable(ood, "ood")
    path = page.require_file(path)
    if metrics is not None and shift is not None:
        raise ValueError(
            "metrics= are given, so shift= has no effect: give metrics=evaluate(posterior, data, shift=shift), or "
            "leave out one of them"
        )
    num_samples, seed = posterior.draw_source.count(num_samples), some_seed(seed)
    given: dict[str, Any] = {"num_samples": num_samples, "batch_size": batch_size, "seed": seed}
    measured_here = None
    if metrics is None:
        measured_here = evaluate(posterior, data, ood, shift=shift, **given)
        metrics = dict(measured_here)
        if twin is not None:
            metrics["deterministic"] = evaluate(twin, data, ood, shift=shift, **given)
    if findings is None:
        # Given metrics may be in another unit or incomplete, so the checks use only metrics computed here.
        findings = check(posterior, data, ood=ood, metrics=measured_here, **given)
    scored = score(posterior, data, ood, **given)
    other = None if twin is None else score(twin, data, **given)
    x, prediction, y = next(predict_batches(posterior, data, **given))
    pictures = [
        gallery.calibration(scored),
        gallery.selection({"Bayesian": scored} | ({} if other is None else {"deterministic": other})),
        *([] if ood is None else [gallery.elsewhere(scored)]),
        *gallery.posterior_pictures(posterior, x, prediction, y, seed),
    ]
    html = page.render(
        "report.html",
        title=title,
        subtitle=f"{len(scored.nll):,} test rows",
        summary=summary(findings),
        findings=findings,
        metrics=metrics_table(metrics),
        shift=_shift(metrics),
        pictures=pictures,
        settings=page.settings_table("How it was made", settings) if settings else None,
    )
    return page.write(path, html)


def summary(findings: Sequence[Finding]) -> str:
    """The number of findings of each severity, the worst first."""
    counts = {severity: sum(f.severity == severity for f in findings) for severity in reversed(SEVERITIES)}
    found = [_counted(count, severity) for severity, count in counts.items() if count]
    return ", ".join(found) if found else "Nothing was checked."


def _shift(metrics: Mapping[str, Any]) -> ShiftSection | None:
    twin = metrics.get("deterministic")
    return shift_section(
        {"Bayesian": shift_in(metrics)} | ({"deterministic": shift_in(twin)} if isinstance(twin, Mapping) else {})
    )


def _counted(count: int, severity: str) -> str:
    return f"{count} good" if severity == "good" else f"{count} {severity}{'s' if count > 1 else ''}"


def metrics_table(metrics: Mapping[str, Any]) -> Table:
    """A table of the metrics of the posterior and, if there is one, of its deterministic twin."""
    twin = metrics.get("deterministic")
    columns = {"Bayesian": metrics} | ({"deterministic": twin} if twin else {})
    rows = []
    for name, shown in formats_of(metrics):
        note = f"{shown.better} is better" if shown.better else ""
        cells = [
            Cell(shown.text(of.get(name)), of.get(name), {"metric": name, "network": network})
            for network, of in columns.items()
        ]
        rows.append((Head(shown.label, "; ".join(filter(None, (shown.meaning, note)))), cells))
    return Table("On test data", [Head("metric"), *map(Head, columns)], rows)
