"""How good a posterior is, and whether it can be trusted.

Six folders, each of which may import only those listed before it:

* ``scoring``: metrics of predictions.
* ``recalibration``: temperature scaling and conformal prediction, fitted on held-out data.
* ``arviz``: conversion of a posterior to an ArviZ object.
* ``checking``: whether the posterior itself can be trusted.
* ``plots``: matplotlib figures of the above.
* ``pages``: reports and comparisons, each a single HTML file.

``_MODULES`` says which module defines each public name. A module is imported when one of its names is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # repeats ``_MODULES`` for static type checkers
    from pyro_bnn.diagnostics import plots as plots
    from pyro_bnn.diagnostics.arviz.conversion import to_arviz as to_arviz
    from pyro_bnn.diagnostics.checking.chains import convergence as convergence
    from pyro_bnn.diagnostics.checking.checks import check as check
    from pyro_bnn.diagnostics.checking.findings import Finding as Finding
    from pyro_bnn.diagnostics.checking.findings import Findings as Findings
    from pyro_bnn.diagnostics.checking.importance import compare_loo as compare_loo
    from pyro_bnn.diagnostics.checking.importance import loo as loo
    from pyro_bnn.diagnostics.checking.importance import pareto_k as pareto_k
    from pyro_bnn.diagnostics.checking.prior_checks import check_prior as check_prior
    from pyro_bnn.diagnostics.checking.prior_checks import prior_predictive as prior_predictive
    from pyro_bnn.diagnostics.checking.ranks import SBCResult as SBCResult
    from pyro_bnn.diagnostics.checking.shrinkage import contraction as contraction
    from pyro_bnn.diagnostics.checking.simulation import sbc as sbc
    from pyro_bnn.diagnostics.checking.training import loss_verdict as loss_verdict
    from pyro_bnn.diagnostics.pages.report import report as report
    from pyro_bnn.diagnostics.recalibration.conformal import ConformalIntervals as ConformalIntervals
    from pyro_bnn.diagnostics.recalibration.conformal import ConformalSets as ConformalSets
    from pyro_bnn.diagnostics.recalibration.temperature import ScaledPosterior as ScaledPosterior
    from pyro_bnn.diagnostics.recalibration.temperature import scale_temperature as scale_temperature
    from pyro_bnn.diagnostics.scoring.calibration import calibration_error as calibration_error
    from pyro_bnn.diagnostics.scoring.calibration import classwise_calibration_error as classwise_calibration_error
    from pyro_bnn.diagnostics.scoring.calibration import reliability as reliability
    from pyro_bnn.diagnostics.scoring.metrics import evaluate as evaluate
    from pyro_bnn.diagnostics.scoring.ood import aupr as aupr
    from pyro_bnn.diagnostics.scoring.ood import auroc as auroc
    from pyro_bnn.diagnostics.scoring.ood import fpr95 as fpr95
    from pyro_bnn.diagnostics.scoring.ood import ood_scores as ood_scores
    from pyro_bnn.diagnostics.scoring.scores import crps as crps
    from pyro_bnn.diagnostics.scoring.scores import interval_coverage as interval_coverage
    from pyro_bnn.diagnostics.scoring.scores import interval_width as interval_width
    from pyro_bnn.diagnostics.scoring.selective import augrc as augrc
    from pyro_bnn.diagnostics.scoring.selective import aurc as aurc
    from pyro_bnn.diagnostics.scoring.selective import risk_at_coverage as risk_at_coverage
    from pyro_bnn.diagnostics.scoring.selective import risk_coverage as risk_coverage
    from pyro_bnn.diagnostics.scoring.shift import Shift as Shift
    from pyro_bnn.diagnostics.scoring.similarity import agreement as agreement
    from pyro_bnn.diagnostics.scoring.similarity import compare_to_reference as compare_to_reference
    from pyro_bnn.diagnostics.scoring.similarity import disagreement as disagreement
    from pyro_bnn.diagnostics.scoring.similarity import diversity as diversity
    from pyro_bnn.diagnostics.scoring.similarity import total_variation as total_variation

#: the names that each module defines. No module is named like a function: importing it would hide that function.
_MODULES = {
    "arviz.conversion": "to_arviz",
    "checking.chains": "convergence",
    "checking.checks": "check",
    "checking.findings": "Finding Findings",
    "checking.importance": "compare_loo loo pareto_k",
    "checking.prior_checks": "check_prior prior_predictive",
    "checking.ranks": "SBCResult",
    "checking.shrinkage": "contraction",
    "checking.simulation": "sbc",
    "checking.training": "loss_verdict",
    "pages.report": "report",
    "recalibration.conformal": "ConformalIntervals ConformalSets",
    "recalibration.temperature": "ScaledPosterior scale_temperature",
    "scoring.calibration": "calibration_error classwise_calibration_error reliability",
    "scoring.metrics": "evaluate",
    "scoring.ood": "aupr auroc fpr95 ood_scores",
    "scoring.scores": "crps interval_coverage interval_width",
    "scoring.selective": "augrc aurc risk_at_coverage risk_coverage",
    "scoring.shift": "Shift",
    "scoring.similarity": "agreement compare_to_reference disagreement diversity total_variation",
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = sorted([*_HOMES, "plots"])


def __getattr__(name: str) -> object:
    # torchmetrics, ArviZ and matplotlib take seconds to import; programs that do not use them should not wait.
    if name == "plots":
        return import_module(f"{__name__}.plots")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
