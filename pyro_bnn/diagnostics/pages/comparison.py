"""One page about several posteriors of the same data: a table of their metrics, paired differences, pictures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from pyro_bnn.diagnostics.pages import gallery, page
from pyro_bnn.diagnostics.pages.glossary import MetricFormat, formats_of
from pyro_bnn.diagnostics.pages.page import Cell, Head, Picture, Table
from pyro_bnn.diagnostics.scoring.scored import Scored, score
from pyro_bnn.diagnostics.scoring.stream import require_repeatable
from pyro_bnn.inputs import Data
from pyro_bnn.randomness import some_seed

if TYPE_CHECKING:
    from pyro_bnn.posterior import Posterior


@dataclass(frozen=True)
class Candidate:
    """One of the posteriors that are compared.

    :param metrics: what ``evaluate`` says of it.
    :param num_samples: draws of every member, as many as its metrics are of.
    :param description: a few words beside its name.
    """

    posterior: Posterior
    metrics: Mapping[str, float | None]
    num_samples: int | None = None
    description: str = ""


@dataclass(frozen=True)
class PairedDifference:
    """By how much more nats per datum a posterior misses the data than the best one.

    :param mean: (1/N) sum_n d_n with d_n = -log p(y_n) + log p_best(y_n); 0 for the best itself.
    :param se: its standard error, sqrt(var(d) / N), as the data are paired.
    """

    mean: float
    se: float

    def __str__(self) -> str:
        return f"{self.mean:.4f} ± {self.se:.4f}" if self.mean or self.se else "best"


def differences(nll: Mapping[str, Tensor]) -> dict[str, PairedDifference]:
    """Paired differences of test NLL from the posterior with the lowest, in nats per datum.

    Data on which all do alike drop out, so that the standard error is far below that of each NLL.

    :param nll: ``{name: [N]}``, of the same data in the same order.
    :raises ValueError: when there are fewer than two data, or the numbers of data differ.

    Source: Vehtari, Gelman and Gabry (2017), section 5.1, there for leave-one-out densities.
    """
    lengths = {name: len(values) for name, values in nll.items()}
    if len(set(lengths.values())) != 1 or min(lengths.values()) < 2:
        raise ValueError(f"expected the same data, at least two, for all: their numbers are {lengths}")
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
    """Writes one HTML file about all candidates, that needs nothing else.

    :param data: as for :func:`evaluate`, in an order that stays the same, and no iterator, as it is passed over for
        each candidate; data that none has seen.
    :param path: of the page, which appears whole or not at all.
    :param ood: inputs from elsewhere, of the same form; for classification.
    :param settings: what they have in common, for a table at the end.
    :returns: the paired differences of their test NLL.
    :raises TypeError: for an iterator as data or ood.
    :raises ValueError: with fewer than two candidates.
    :raises IsADirectoryError: when the path is that of a folder.
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
        pictures=list(_pictures(scored, ood is not None)),
        settings=page.settings_table("What all have in common", settings) if settings else None,
    )
    page.write(path, html)
    return gaps


def verdict(gaps: Mapping[str, PairedDifference]) -> str:
    """Which is best by test NLL, and which cannot be told from it."""
    best = min(gaps, key=lambda name: gaps[name].mean)
    close = [name for name, gap in gaps.items() if name != best and gap.mean <= 2 * gap.se]
    if not close:
        return f"By test NLL {best} is best, by more than two standard errors of the paired differences."
    are = "is" if len(close) == 1 else "are"
    return (
        f"By test NLL {best} is best; {', '.join(close)} {are} within two standard errors of it, so these data do not "
        "tell them apart."
    )


def best_of(shown: MetricFormat, values: Iterable[float | None]) -> float | None:
    """The best of the values that are there; ``None`` for what is no merit, or when all are the same."""
    known = [value for value in values if value is not None]
    if not shown.better or len(set(known)) < 2:
        return None
    return min(known, key=shown.loss)


def metrics_table(candidates: Mapping[str, Candidate], gaps: Mapping[str, PairedDifference]) -> Table:
    """One column for each candidate; the best of each row says so."""
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
