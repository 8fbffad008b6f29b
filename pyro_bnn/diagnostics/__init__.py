"""How good a posterior is, and whether to trust it: checks, predictive metrics, recalibration, and the way to ArviZ."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyro_bnn.diagnostics import plots
    from pyro_bnn.diagnostics.arviz.conversion import to_arviz
    from pyro_bnn.diagnostics.checking.chains import convergence
    from pyro_bnn.diagnostics.checking.checks import check
    from pyro_bnn.diagnostics.checking.findings import Finding
    from pyro_bnn.diagnostics.checking.importance import compare, loo, pareto_k
    from pyro_bnn.diagnostics.checking.prior_checks import check_prior, prior_predictive
    from pyro_bnn.diagnostics.checking.shrinkage import contraction
    from pyro_bnn.diagnostics.checking.simulation import SBCResult, sbc
    from pyro_bnn.diagnostics.checking.training import loss_verdict
    from pyro_bnn.diagnostics.pages.report import report
    from pyro_bnn.diagnostics.recalibration.conformal import ConformalIntervals, ConformalSets
    from pyro_bnn.diagnostics.recalibration.temperature import ScaledPosterior, scale_temperature
    from pyro_bnn.diagnostics.scoring.calibration import calibration_error, classwise_calibration_error, reliability
    from pyro_bnn.diagnostics.scoring.metrics import evaluate
    from pyro_bnn.diagnostics.scoring.ood import aupr, auroc, fpr95, ood_scores
    from pyro_bnn.diagnostics.scoring.scores import crps, interval_coverage, interval_width
    from pyro_bnn.diagnostics.scoring.selective import augrc, aurc, risk_at_coverage, risk_coverage
    from pyro_bnn.diagnostics.scoring.similarity import (
        agreement,
        compare_to_reference,
        disagreement,
        diversity,
        total_variation,
    )

#: where each name lives. No module has the name of a function: importing it would hide that function.
_MODULES = {
    "arviz.conversion": ("to_arviz",),
    "scoring.calibration": (
        "calibration_error",
        "classwise_calibration_error",
        "reliability",
    ),
    "checking.chains": ("convergence",),
    "checking.checks": ("check",),
    "recalibration.conformal": (
        "ConformalIntervals",
        "ConformalSets",
    ),
    "checking.findings": ("Finding",),
    "checking.importance": (
        "compare",
        "loo",
        "pareto_k",
    ),
    "scoring.metrics": ("evaluate",),
    "scoring.ood": (
        "aupr",
        "auroc",
        "fpr95",
        "ood_scores",
    ),
    "checking.prior_checks": (
        "check_prior",
        "prior_predictive",
    ),
    "recalibration.temperature": (
        "ScaledPosterior",
        "scale_temperature",
    ),
    "pages.report": ("report",),
    "scoring.scores": (
        "crps",
        "interval_coverage",
        "interval_width",
    ),
    "scoring.selective": (
        "augrc",
        "aurc",
        "risk_at_coverage",
        "risk_coverage",
    ),
    "checking.shrinkage": ("contraction",),
    "scoring.similarity": (
        "agreement",
        "compare_to_reference",
        "disagreement",
        "diversity",
        "total_variation",
    ),
    "checking.simulation": (
        "SBCResult",
        "sbc",
    ),
    "checking.training": ("loss_verdict",),
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
