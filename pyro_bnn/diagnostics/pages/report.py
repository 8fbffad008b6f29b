"""One page about one posterior: verdicts first, then its metrics, then pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_bnn.diagnostics.checking.checks import check
from pyro_bnn.diagnostics.checking.findings import SEVERITIES, Finding
from pyro_bnn.diagnostics.pages import gallery, page
from pyro_bnn.diagnostics.pages.glossary import formats_of
from pyro_bnn.diagnostics.pages.page import Cell, Head, Table
from pyro_bnn.diagnostics.scoring.metrics import evaluate
from pyro_bnn.diagnostics.scoring.scored import score
from pyro_bnn.diagnostics.scoring.stream import predict_batches, require_posterior, require_repeatable
from pyro_bnn.inputs import Data
from pyro_bnn.randomness import some_seed

if TYPE_CHECKING:
    from pyro_bnn.posterior import Posterior


def report(
    posterior: Posterior,
    data: Data,
    *,
    path: str | Path,
    ood: Data = None,
    twin: Posterior | None = None,
    title: str = "Report of a posterior",
    metrics: Mapping[str, object] | None = None,
    findings: Sequence[Finding] | None = None,
    settings: Mapping[str, object] | None = None,
    num_samples: int | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
) -> Path:
    """Writes one HTML file that needs nothing else: findings, metrics, and what the posterior looks like.

    :param data: as for :func:`evaluate`, and no iterator, as it is passed over more than once; data that the posterior
        has not seen.
    :param path: of the page, which appears whole or not at all.
    :param ood: inputs from elsewhere, of the same form; for classification.
    :param twin: the deterministic network to compare with.
    :param metrics: ``evaluate(posterior, data, ood)``, and under ``"deterministic"`` that of the twin; by default they
        are measured here.
    :param findings: by default what :func:`check` finds.
    :param settings: how the posterior came about, for a table at the end.
    :param num_samples: draws of every member for each prediction.
    :returns: the path.
    :raises TypeError, ValueError: as :func:`evaluate`; for an iterator as data or ood.
    :raises IsADirectoryError: when the path is that of a folder.
    """
    require_posterior(posterior)
    require_repeatable(data, "data")
    require_repeatable(ood, "ood")
    path = page.require_file(path)
    num_samples, seed = posterior.draw_source.count(num_samples), some_seed(seed)
    given: dict[str, Any] = {"num_samples": num_samples, "batch_size": batch_size, "seed": seed}
    measured_here = None
    if metrics is None:
        measured_here = evaluate(posterior, data, ood, **given)
        metrics = dict(measured_here)
        if twin is not None:
            metrics["deterministic"] = evaluate(twin, data, ood, **given)
    if findings is None:
        # Metrics that were given may be in another unit, or lack what is looked at.
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
        pictures=pictures,
        settings=page.settings_table("How it came about", settings) if settings else None,
    )
    return page.write(path, html)


def summary(findings: Sequence[Finding]) -> str:
    """How many findings of each severity there are, the gravest first."""
    counts = {severity: sum(f.severity == severity for f in findings) for severity in reversed(SEVERITIES)}
    found = [_counted(count, severity) for severity, count in counts.items() if count]
    return ", ".join(found) if found else "Nothing was looked at."


def _counted(count: int, severity: str) -> str:
    return f"{count} good" if severity == "good" else f"{count} {severity}{'s' if count > 1 else ''}"


def metrics_table(metrics: Mapping[str, Any]) -> Table:
    """The metrics of the posterior, beside those of its twin where there are any."""
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
