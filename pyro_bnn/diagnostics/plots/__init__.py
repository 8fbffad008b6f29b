"""Plots of a posterior, its predictions and the run that found it.

Every function returns a new ``matplotlib.figure.Figure``: ``plot_losses(losses).savefig("elbo.svg")``. Figures are
white, 5 inches wide and do not use ``pyplot``. Everything that differs in colour also differs in style or marker.

* ``posteriors``: forest plots of sites, inclusion and importance of groups, distances between members.
* ``predictions``: calibration, selective prediction, out-of-distribution scores, corrupted data, regression bands.
* ``runs``: losses, R-hat, k-hat, ranks.
* ``canvas``: helpers that all plots share.
"""

from __future__ import annotations

from pyro_bnn.diagnostics.plots.posteriors import (
    member_distances,
    plot_forest,
    plot_importance,
    plot_inclusion,
    plot_particles,
)
from pyro_bnn.diagnostics.plots.predictions import (
    plot_band,
    plot_calibration_curve,
    plot_ood,
    plot_reliability,
    plot_risk_coverage,
    plot_shift,
)
from pyro_bnn.diagnostics.plots.runs import plot_losses, plot_pareto_k, plot_ranks, plot_rhat

__all__ = [
    "member_distances",
    "plot_band",
    "plot_calibration_curve",
    "plot_forest",
    "plot_importance",
    "plot_inclusion",
    "plot_losses",
    "plot_ood",
    "plot_pareto_k",
    "plot_particles",
    "plot_ranks",
    "plot_reliability",
    "plot_rhat",
    "plot_risk_coverage",
    "plot_shift",
]
