"""What the metrics are called, how they are written and which way they get better: for tables on every medium."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class MetricFormat:
    """How one metric is shown.

    :param label: its name in a table.
    :param pattern: how a value is written.
    :param better: ``"lower"``, ``"higher"``, or ``"near 0.95"`` and alike; empty for what is no merit.
    :param meaning: one sentence.
    """

    label: str
    pattern: str = "{:.4f}"
    better: str = ""
    meaning: str = ""

    def text(self, value: float | None) -> str:
        return "–" if value is None else self.pattern.format(value)

    def loss(self, value: float) -> float:
        """Smaller for what is better.

        :raises ValueError: for a metric that is no merit.
        """
        if self.better == "lower":
            return value
        if self.better == "higher":
            return -value
        if self.better.startswith("near "):
            return abs(value - float(self.better.removeprefix("near ")))
        raise ValueError(f"{self.label!r} does not tell a better value from a worse one")


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
    "ece_adaptive": MetricFormat("ECE, adaptive", better="lower", meaning="calibration error, bins of equal mass"),
    "ece_classwise": MetricFormat(
        "ECE, class-wise", better="lower", meaning="calibration error of every class, their mean"
    ),
    "coverage": MetricFormat(
        "coverage of 95 % intervals", "{:.3f}", "near 0.95", "share of rows inside the central 95 % interval"
    ),
    "width": MetricFormat(
        "width of 95 % intervals", "{:.4g}", "", "in the unit of the target; narrow is good where the coverage is right"
    ),
    "aurc": MetricFormat("AURC", "{:.3g}", "lower", "mean error of the most confident rows, over all coverages"),
    "augrc": MetricFormat("AUGRC", "{:.3g}", "lower", "mean share of rows kept and wrong, over all coverages"),
    "risk_at_80": MetricFormat(
        "error at 80 % coverage", better="lower", meaning="error of the 80 % most confident rows"
    ),
    "ood_auroc": MetricFormat(
        "OOD AUROC", better="higher", meaning="how well uncertainty tells foreign inputs, 0.5: not"
    ),
    "ood_aupr": MetricFormat("OOD AUPR", better="higher", meaning="area under precision and recall of foreign inputs"),
    "ood_fpr95": MetricFormat(
        "OOD FPR95", better="lower", meaning="false alarms where 95 % of foreign inputs are found"
    ),
    **{
        f"ood_{name}_{score}": MetricFormat(f"OOD {name.upper()}, {score.replace('_', ' ')}", better=better)
        for score in ("max_probability", "mutual_information")
        for name, better in (("auroc", "higher"), ("aupr", "higher"), ("fpr95", "lower"))
    },
    "aleatoric": MetricFormat(
        "aleatoric", "{:.4g}", meaning="uncertainty that more data would not remove: nats, or the squared unit"
    ),
    "epistemic": MetricFormat("epistemic", "{:.4g}", meaning="uncertainty about the weights, in the same unit"),
    "disagreement": MetricFormat("disagreement", meaning="share of rows on which two draws name different classes"),
    "seconds": MetricFormat("training (s)", "{:.1f}", "lower", "wall-clock time"),
    "trainable_parameters": MetricFormat("trainable parameters", "{:,}"),
    "sparsity": MetricFormat("parameters removed", "{:.1%}", "higher"),
    "bits_per_coded_weight": MetricFormat("bits a coded weight", "{:.2f}", "lower", "everything included"),
}


def formats_of(*metrics: Mapping[str, object]) -> Iterator[tuple[str, MetricFormat]]:
    """Name and format of every number in any of the metrics: known ones first, in the order of ``METRIC_FORMATS``."""
    names = {name for one in metrics for name, value in one.items() if _is_number(value)}
    unknown = sorted(names - METRIC_FORMATS.keys())
    for name in [*(name for name in METRIC_FORMATS if name in names), *unknown]:
        yield name, METRIC_FORMATS.get(name, MetricFormat(name.replace("_", " "), "{:.4g}"))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
