"""The name, number format and direction of each metric, for all tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class MetricFormat:
    """How one metric is shown.

    :param label: its name in a table.
    :param pattern: the format of a value.
    :param better: ``"lower"``, ``"higher"``, or ``"near <value>"``; empty if no direction is better.
    :param meaning: a short explanation.
    """

    label: str
    pattern: str = "{:.4f}"
    better: str = ""
    meaning: str = ""

    def text(self, value: float | None) -> str:
        return "–" if value is None else self.pattern.format(value)

    def loss(self, value: float) -> float:
        """A number that is smaller for better values.

        :raises ValueError: for a metric without a better direction.
        """
        if self.better == "lower":
            return value
        if self.better == "higher":
            return -value
        if self.better.startswith("near "):
            return abs(value - float(self.better.removeprefix("near ")))
        raise ValueError(f"{self.label!r} has no better direction")


METRIC_FORMATS: dict[str, MetricFormat] = {
    "accuracy": MetricFormat("accuracy", better="higher", meaning="share of rows whose most probable class is right"),
    "rmse": MetricFormat("RMSE", "{:.4g}", "lower", "root of the mean squared error, in the unit of the target"),
    "nll": MetricFormat(
        "NLL (nats)", better="lower", meaning="mean negative log predictive density or probability of a row"
    ),
    "crps": MetricFormat("CRPS", "{:.4g}", "lower", "continuous ranked probability score, in the unit of the target"),
    "brier": MetricFormat(
        "Brier score", better="lower", meaning="mean squared distance of probabilities from the truth"
    ),
    "ece": MetricFormat("ECE", better="lower", meaning="calibration error, 15 bins of equal width"),
    "ece_adaptive": MetricFormat("ECE, adaptive", better="lower", meaning="calibration error, bins of equal size"),
    "ece_classwise": MetricFormat(
        "ECE, class-wise", better="lower", meaning="calibration error of each class, averaged over classes"
    ),
    "coverage": MetricFormat(
        "coverage of 95 % intervals", "{:.3f}", "near 0.95", "share of rows inside the central 95 % interval"
    ),
    "width": MetricFormat(
        "width of 95 % intervals", "{:.4g}", "", "in the unit of the target; narrow is good where the coverage is right"
    ),
    "aurc": MetricFormat(
        "AURC", "{:.3g}", "lower", "error rate of the most confident rows, averaged over all coverages"
    ),
    "augrc": MetricFormat("AUGRC", "{:.3g}", "lower", "share of rows kept and wrong, averaged over all coverages"),
    "risk_at_80": MetricFormat(
        "error at 80 % coverage", better="lower", meaning="error rate of the 80 % most confident rows"
    ),
    "ood_auroc": MetricFormat(
        "OOD AUROC", better="higher", meaning="how well uncertainty detects out-of-distribution inputs; 0.5 is chance"
    ),
    "ood_aupr": MetricFormat(
        "OOD AUPR", better="higher", meaning="area under the precision-recall curve for out-of-distribution inputs"
    ),
    "ood_fpr95": MetricFormat(
        "OOD FPR95",
        better="lower",
        meaning="false positive rate at which 95 % of out-of-distribution inputs are detected",
    ),
    **{
        f"ood_{name}_{score}": MetricFormat(f"OOD {name.upper()}, {score.replace('_', ' ')}", better=better)
        for score in ("max_probability", "mutual_information")
        for name, better in (("auroc", "higher"), ("aupr", "higher"), ("fpr95", "lower"))
    },
    "cA": MetricFormat("accuracy under shift, cA", better="higher", meaning="mean over all kinds of corruption"),
    "cRMSE": MetricFormat("RMSE under shift, cRMSE", "{:.4g}", "lower", "mean over all kinds of corruption"),
    "cNLL": MetricFormat("NLL under shift, cNLL", better="lower", meaning="mean over all kinds of corruption, in nats"),
    "cECE": MetricFormat("ECE under shift, cECE", better="lower", meaning="mean over all kinds of corruption"),
    "aleatoric": MetricFormat(
        "aleatoric", "{:.4g}", meaning="uncertainty that more data would not remove: nats, or the squared unit"
    ),
    "epistemic": MetricFormat("epistemic", "{:.4g}", meaning="uncertainty about the weights, in the same unit"),
    "disagreement": MetricFormat("disagreement", meaning="share of rows on which two draws predict different classes"),
    "seconds": MetricFormat("training (s)", "{:.1f}", "lower", "wall-clock time"),
    "trainable_parameters": MetricFormat("trainable parameters", "{:,}"),
    "sparsity": MetricFormat("parameters removed", "{:.1%}", "higher"),
    "bits_per_coded_weight": MetricFormat("bits per coded weight", "{:.2f}", "lower", "everything included"),
}


def formats_of(*metrics: Mapping[str, object]) -> Iterator[tuple[str, MetricFormat]]:
    """Yields name and format of each metric that is a number: known ones first, in the order of ``METRIC_FORMATS``."""
    names = {name for one in metrics for name, value in one.items() if _is_number(value)}
    unknown = sorted(names - METRIC_FORMATS.keys())
    for name in [*(name for name in METRIC_FORMATS if name in names), *unknown]:
        yield name, METRIC_FORMATS.get(name, MetricFormat(name.replace("_", " "), "{:.4g}"))


def best_of(shown: MetricFormat, values: Iterable[float | None]) -> float | None:
    """The best of the values that are given; ``None`` if the metric has no better direction or all values are equal."""
    known = [value for value in values if value is not None]
    if not shown.better or len(set(known)) < 2:
        return None
    return min(known, key=shown.loss)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
