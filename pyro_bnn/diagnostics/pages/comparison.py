"""A page that compares posteriors on the same data: a table of metrics, paired differences and figures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pyro_bnn.diagnostics.pages import gallery, page
from pyro_bnn.diagnostics.pages.glossary import best_of, formats_of
from pyro_bnn.diagnostics.pages.page import Cell, Head, Picture, Table
from pyro_bnn.diagnostics.pages.shifts import shift_in, shift_section
from pyro_bnn.diagnostics.scoring.scored import Scored, score
from pyro_bnn.inputs import Data
from pyro_bnn.predicting import require_repeatable
from pyro_bnn.randomness import some_seed

if TYPE_CHECKING:
    from pyro_bnn.posterior import Posterior


@dataclass(frozen=True)
class Candidate:
    """One of the posteriors that are compared.

    :param metrics: what ``evaluate`` returned for it; a shift among them has a section of its own.
    :param num_samples: draws of every member; the same number as for the metrics.
    :param description: a few words that stand below its name.
    """

    posterior: Posterior
    metrics: Mapping[str, Any]
    num_samples: int | None = None
    description: str = ""


@dataclass(frozen=True)
class PairedDifference:
    """Difference of the test NLL of a posterior from that of the best one, in nats per datum.

    :param mean: (1/N) sum_n d_n with d_n = -log p(y_n) + log p_best(y_n); 0 for the best itself.
    :param se: its standard error for paired data, sqrt(var(d) / N).
    """

    mean: float
    se: float

    def __str__(self) -> str:
        return f"{self.mean:.4f} ± {self.se:.4f}" if self.mean or self.se else "best"


def differences(nll: Mapping[str, Tensor]) -> dict[str, PairedDifference]:
    """Paired differences of the test NLL from that of the best posterior, in nats per datum.

    Data that all posteriors predict equally well cancel out, so the standard error of a difference is usually far below
    that of each NLL.

    :param nll: ``{name: [N]}``, for the same data in the same order.
    :raises ValueError: when there are fewer than two data, or the numbers of data differ.

    Source: Vehtari, Gelman and Gabry (2017), section 5.1, there for leave-one-out densities.
    """
    lengths = {name: len(values) for name, values in nll.items()}
    if len(set(lengths.values())) != 1 or min(lengths.values()) < 2:
        raise ValueError(f"expected the same data, at least two, for all posteriors: got {lengths} data")
    best = min(nll.values(), key=lambda values: float(values.mean()))
    gaps = {name: values - best for name, values in nll.items()}
    return {
        name: PairedDifference(float(gap.mean()), float(gap.std()) / math.sqrt(len(gap))) for name, gap in gaps.items()
    }


def comparison(
    candidates: Mapping[str, Candidate],
    data: Data,
    *,
    path: str | Path,
    ood: Data = None,
    title: str = "Comparison of posteriors",
    settings: Mapping[str, object] | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
) -> dict[str, PairedDifference]:
    """Writes one self-contained HTML file that compares all candidates.

    :param data: held-out data, as for :func:`evaluate`. Its order must be fixed, and it cannot be an iterator, as it
        is read once for each candidate.
    :param path: the file to write. It is written completely or not at all.
    :param ood: out-of-distribution inputs of the same form; for classification only.
    :param settings: settings that all candidates share, for a table at the end.
    :returns: the paired differences of their test NLL.
    :raises TypeError: when data or ood is an iterator.
    :raises ValueError: for fewer than two candidates.
    :raises IsADirectoryError: when the path is a folder.
    """
    require_repeatable(data, "data")
    require_repeatable(ood, "ood")
    path = page.require_file(path)
    if len(candidates) < 2:
        raise ValueError(f"a comparison takes at least two posteriors, got {len(candidates)}")
    seed = some_seed(seed)
    scored = {
        name: score(one.posterior, data, ood, num_samples=one.num_samples, batch_size=batch_size, seed=seed)
        for name, one in candidates.items()
    }
    gaps = differences({name: one.nll for name, one in scored.items()})
    rows = len(next(iter(scored.values())).nll)
    html = page.render(
        "comparison.html",
        title=title,
        subtitle=f"{len(candidates)} networks on {rows:,} test rows",
        verdict=verdict(gaps),
        metrics=metrics_table(candidates, gaps),
        shift=shift_section({name: shift_in(one.metrics) for name, one in candidates.items()}),
        pictures=list(_pictures(scored, ood is not None)),
        settings=page.settings_table("Settings that all share", settings) if settings else None,
    )
    page.write(path, html)
    return gaps


def verdict(gaps: Mapping[str, PairedDifference]) -> str:
    """Which posterior is best by test NLL, and which cannot be distinguished from it."""
    best = min(gaps, key=lambda name: gaps[name].mean)
    close = [name for name, gap in gaps.items() if name != best and gap.mean <= 2 * gap.se]
    if not close:
        return f"By test NLL {best} is best, by more than two standard errors of the paired differences."
    are = "is" if len(close) == 1 else "are"
    return (
        f"By test NLL {best} is best; {', '.join(close)} {are} within two standard errors of it, so these data cannot "
        "tell them apart."
    )


def metrics_table(candidates: Mapping[str, Candidate], gaps: Mapping[str, PairedDifference]) -> Table:
    """A table with one column for each candidate, in which the best value of each row is marked."""
    formats = dict(formats_of(*(one.metrics for one in candidates.values())))
    differing = [
        Cell(
            str(gaps[label]),
            gaps[label].mean,
            {"metric": "nll_difference", "network": label, "se": repr(gaps[label].se)},
        )
        for label in candidates
    ]
    rows: list[tuple[Head, Sequence[Cell | str]]] = [(Head("NLL − best ± SE", "paired, lower is better"), differing)]
    for name, shown in formats.items():
        values = {label: one.metrics.get(name) for label, one in candidates.items()}
        best = best_of(shown, values.values())
        cells = [
            Cell(shown.text(value), value, {"metric": name, "network": label}, value is not None and value == best)
            for label, value in values.items()
        ]
        rows.append((Head(shown.label, f"{shown.better} is better" if shown.better else ""), cells))
    columns = [Head("metric"), *(Head(label, one.description) for label, one in candidates.items())]
    return Table("On the same test data; ★ marks the best of a row", columns, rows)


def _pictures(scored: Mapping[str, Scored], with_ood: bool) -> Iterable[Picture]:
    yield gallery.selection(scored)
    for name, one in scored.items():
        yield gallery.calibration(one, f": {name}")
    for name, one in scored.items():
        if with_ood:
            yield gallery.elsewhere(one, f": {name}")
