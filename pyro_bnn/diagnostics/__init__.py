"""How good a posterior is, and whether to trust it: checks, predictive metrics, recalibration, and the way to ArviZ."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyro_bnn.diagnostics import plots
    from pyro_bnn.diagnostics.arviz import to_arviz
    from pyro_bnn.diagnostics.calibration import calibration_error, classwise_calibration_error, reliability
    from pyro_bnn.diagnostics.chains import convergence
    from pyro_bnn.diagnostics.checks import check
    from pyro_bnn.diagnostics.conformal import ConformalIntervals, ConformalSets
    from pyro_bnn.diagnostics.findings import Finding
    from pyro_bnn.diagnostics.importance import compare, loo, pareto_k
    from pyro_bnn.diagnostics.metrics import evaluate
    from pyro_bnn.diagnostics.ood import aupr, auroc, fpr95, ood_scores
    from pyro_bnn.diagnostics.prior_checks import check_prior, prior_predictive
    from pyro_bnn.diagnostics.recalibration import ScaledPosterior, scale_temperature
    from pyro_bnn.diagnostics.report_page import report
    from pyro_bnn.diagnostics.scores import crps, interval_coverage, interval_width
    from pyro_bnn.diagnostics.selective import augrc, aurc, risk_at_coverage, risk_coverage
    from pyro_bnn.diagnostics.shrinkage import contraction
    from pyro_bnn.diagnostics.similarity import (
        agreement,
        compare_to_reference,
        disagreement,
        diversity,
        total_variation,
    )
    from pyro_bnn.diagnostics.simulation import SBCResult, sbc
    from pyro_bnn.diagnostics.training import loss_verdict

#: where each name lives. No module has the name of a function: importing it would hide that function.
_MODULES = {
    "arviz": ("to_arviz",),
    "calibration": ("calibration_error", "classwise_calibration_error", "reliability"),
    "chains": ("convergence",),
    "checks": ("check",),
    "conformal": ("ConformalIntervals", "ConformalSets"),
    "findings": ("Finding",),
    "importance": ("compare", "loo", "pareto_k"),
    "metrics": ("evaluate",),
    "ood": ("aupr", "auroc", "fpr95", "ood_scores"),
    "prior_checks": ("check_prior", "prior_predictive"),
    "recalibration": ("ScaledPosterior", "scale_temperature"),
    "report_page": ("report",),
    "scores": ("crps", "interval_coverage", "interval_width"),
    "selective": ("augrc", "aurc", "risk_at_coverage", "risk_coverage"),
    "shrinkage": ("contraction",),
    "similarity": ("agreement", "compare_to_reference", "disagreement", "diversity", "total_variation"),
    "simulation": ("SBCResult", "sbc"),
    "training": ("loss_verdict",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "ConformalIntervals",
    "ConformalSets",
    "Finding",
    "SBCResult",
    "ScaledPosterior",
    "agreement",
    "augrc",
    "aupr",
    "aurc",
    "auroc",
    "calibration_error",
    "check",
    "check_prior",
    "classwise_calibration_error",
    "compare",
    "compare_to_reference",
    "contraction",
    "convergence",
    "crps",
    "disagreement",
    "diversity",
    "evaluate",
    "fpr95",
    "interval_coverage",
    "interval_width",
    "loo",
    "loss_verdict",
    "ood_scores",
    "pareto_k",
    "plots",
    "prior_predictive",
    "reliability",
    "report",
    "risk_at_coverage",
    "risk_coverage",
    "sbc",
    "scale_temperature",
    "to_arviz",
    "total_variation",
]


def __getattr__(name: str) -> Any:
    # torchmetrics, ArviZ and matplotlib take seconds to import, which a program that never calls them should not pay.
    if name == "plots":
        return import_module(f"{__name__}.plots")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
