"""The quality of predictions: one metric per question, computed batch by batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torchmetrics import MeanSquaredError, Metric

from pyro_bnn.diagnostics.scoring.calibration import BINS, ClasswiseCalibrationError, bin_confidence
from pyro_bnn.diagnostics.scoring.gathering import all_rows
from pyro_bnn.diagnostics.scoring.ood import aupr, auroc, fpr95, ood_scores
from pyro_bnn.diagnostics.scoring.precision import precision, running_mean, wide
from pyro_bnn.diagnostics.scoring.probabilities import class_probabilities
from pyro_bnn.diagnostics.scoring.scores import crps, interval_coverage, interval_width
from pyro_bnn.diagnostics.scoring.selective import augrc, aurc, risk_at_coverage
from pyro_bnn.diagnostics.scoring.shift import ShiftedScores, ShiftLike
from pyro_bnn.diagnostics.scoring.similarity import disagreement
from pyro_bnn.distributed import processes
from pyro_bnn.inputs import Data, Inputs
from pyro_bnn.predicting import kept, labelled, predict_batches, predict_inputs, row_density, with_draws
from pyro_bnn.randomness import some_seed

if TYPE_CHECKING:
    from pyro_bnn.posterior import Posterior
    from pyro_bnn.posterior.prediction import Prediction

#: probability of the central intervals
LEVEL = 0.95
#: share of the data that ``risk_at_80`` keeps
KEPT = 0.8


def evaluate(
    posterior: Posterior,
    data: Data,
    ood: Data = None,
    *,
    shift: ShiftLike | None = None,
    num_samples: int | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    r"""Metrics of the predictions of a posterior on data that it has not seen.

    p_n is the predictive density or probability of datum n, averaged over S draws and K members:

    ===================  ==================================================================================
    for every kind
    -------------------  ----------------------------------------------------------------------------------
    ``nll``              -(1/N) sum_n log p_n(y_n), in nats per datum
    classification
    -------------------  ----------------------------------------------------------------------------------
    ``accuracy``         share of data whose most probable class is y_n, in [0, 1]
    ``brier``            (1/N) sum_n sum_c (p_n(c) - [y_n = c])^2, in [0, 2]
    ``ece``              sum_b (N_b / N) abs(accuracy_b - confidence_b) over 15 bins of equal width of the
                         confidence, the probability of the most probable class, in [0, 1]
    ``ece_adaptive``     the same over 15 bins of equal numbers of data, in [0, 1]
    ``ece_classwise``    the same, equal widths, for the probability of every class, mean over classes, in
                         [0, 2 / C]
    ``aurc``             area under the risk-coverage curve: the error rate of the k most confident data, mean
                         over k = 1 ... N, in [0, 1]; equals the error rate if confidence is uninformative
    ``augrc``            the same with the errors divided by N instead of k, in [0, 1/2]; equals half the error
                         rate if confidence is uninformative
    ``risk_at_80``       error rate among the 80 % most confident data (0.8 N rounded up), in [0, 1]
    ``aleatoric``        mean expected entropy of one function, in nats, in [0, log C]
    ``epistemic``        mean mutual information of label and weights, in nats, in [0, log C]; the two add up
                         to the mean entropy of p_n
    ``disagreement``     share of data on which two distinct functions (draws or members) have different most
                         probable classes, over all pairs, in [0, 1]; 0 with a single function
    with ``ood``
    -------------------  ----------------------------------------------------------------------------------
    ``ood_auroc``        probability that a datum of ``ood`` has a larger predictive entropy than one of
                         ``data``, ties counting half, in [0, 1]
    ``ood_aupr``         average precision in detecting ``ood`` by the entropy, in (0, 1]; by chance it is the
                         share of ``ood`` among all data
    ``ood_fpr95``        share of ``data`` at or above the entropy that 95 % of ``ood`` reach, in [0, 1]
    ``ood_..._<score>``  all three by another score: ``max_probability`` (1 minus it) or
                         ``mutual_information``, as in ``ood_auroc_mutual_information``
    regression, counts
    -------------------  ----------------------------------------------------------------------------------
    ``rmse``             sqrt((1/N) sum_n (mean_n - y_n)^2), in the unit of y
    ``crps``             (1/N) sum_n integral (F_n(z) - [y_n <= z])^2 dz, in the unit of y, at least 0; equals
                         the absolute error if a prediction is certain
    ``coverage``         share of data inside the central 95 % interval of the prediction, ends included
    ``width``            mean width of that interval, in the unit of y
    ``aleatoric``        mean expected variance of y under one function, in the squared unit of y
    ``epistemic``        mean variance of the means of the functions, in the squared unit of y
    with ``shift``
    -------------------  ----------------------------------------------------------------------------------
    ``cNLL``             mean of ``nll`` over all kinds of corruption and the severities 1 to 5
    ``cA``, ``cECE``     the same of ``accuracy`` and ``ece``; for a classification
    ``cRMSE``            the same of ``rmse``; for a regression or counts
    ``shift``            these metrics by kind and severity, a :class:`Shift`: ``found["shift"]["noise"]["nll"]``
                         are five numbers, and ``print(found["shift"])`` is a table
    ===================  ==================================================================================

    A Bernoulli likelihood counts as a classification with the classes 0 and 1. If a target has several numbers, each of
    them counts as a datum, except in ``nll``, where a datum is a row, and in the scores of ``ood``, which are averaged
    over them. Labels that ``Categorical(ignore_index=)`` masks count nowhere, not among the data by whose number sums
    are divided either, and neither does a row without any label; ``ood`` leaves them out where it comes with labels.
    Ties in confidence are averaged over their order, so the order of the rows does not matter.

    Under ``torchrun`` the rows of every batch are divided between processes, all of which have to call this and get the
    same metrics; inside :func:`~pyro_bnn.inference.alone` one process scores all rows.

    Every batch is predicted with the same draws. Of each batch at most two numbers for each label and three for each
    row stay in memory, whatever the number of draws and classes.

    :param data: a ``DataLoader`` of pairs ``(x, y)`` or of dicts with ``labels``, a ``Dataset`` of such, or one pair or
        dict; :mod:`pyro_bnn.inputs` says what x and y may be. Everything runs on the device of the model.
    :param ood: out-of-distribution inputs: a loader, a dataset, or x itself; labels in it are ignored.
    :param shift: how x is corrupted: ``"images"`` for all kinds of :func:`pyro_bnn.data.corruptions.corrupt`, or names
        of some, for pixels in [0, 1]; or a mapping ``{name: f}`` of functions ``f(x, severity)`` of a batch of inputs
        and a severity from 1 to 5, such as ``pb.data.corruptions.image_shift(mean=..., std=...)`` for normalised images
        and ``pb.data.corruptions.table_shift(x_train)`` for tables. Each kind takes five times as long as ``data``.
    :param num_samples: number S of draws from every member. By default 16 from a guide or from the stored draws of a
        sampler (all of them if there are fewer), all stored networks of an ensemble, and 1 of particles and points.
    :param batch_size: the most rows in one forward pass. By default a loader keeps its own batches, and other data are
        cut into batches of 256.
    :param seed: of the draws, the same for all batches; ``None`` takes a new one at each call, from torch's global
        generator.
    :returns: ``{metric: value}`` with the names in the table.
    :raises TypeError: when ``posterior`` is not a posterior, data, ood or shift has none of the forms above, or y has
        the wrong dtype.
    :raises ValueError: when data or ood is empty, the model has no likelihood, y does not fit the likelihood, y or a
        prediction holds NaN, ood is given for a regression, or a corruption does not fit x, such as pixels that are not
        in [0, 1].

    Source: Gneiting and Raftery (2007) for NLL, Brier score and CRPS; Depeweg et al. (2018) for the split into
    aleatoric and epistemic; Dusenberry et al. (2020, arXiv 2005.07186), for images, the names cA, cNLL and cECE. The
    sources of the other metrics are in the modules ``calibration``, ``selective``, ``ood``, ``scores`` and
    ``similarity``, which compute each of them from tensors.
    """
    return evaluate_with(
        lambda x, prediction, y: None,
        *(posterior, data, ood, shift),
        num_samples=num_samples,
        batch_size=batch_size,
        seed=seed,
    )


def evaluate_with(
    each: Callable[[Inputs, Prediction, Tensor], None],
    posterior: Posterior,
    data: Data,
    ood: Data = None,
    shift: ShiftLike | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """As :func:`evaluate`, and ``each(x, prediction, y)`` is called with every batch of data that this process has.

    :param settings: ``num_samples``, ``batch_size`` and ``seed``.
    """
    together = processes()
    settings["seed"] = some_seed(together.shared_seed(settings["seed"]))
    posterior = with_draws(posterior, settings["num_samples"], settings["seed"])
    quality: ClassificationMetrics | RegressionMetrics | None = None
    shifted = None if shift is None else ShiftedScores(posterior, shift, settings)
    example: Inputs = None
    for x, prediction, y in predict_batches(posterior, data, **settings, together=together):
        if quality is None:
            quality, example = _quality(prediction, ood is not None), x
        quality.update(prediction, y)
        each(x, prediction, y)
        if shifted is not None:
            shifted.update(x, y)
    without = together.total([float(quality is None)])[0]
    if 0 < without < together.size:
        raise ValueError(
            f"data has fewer rows than the {together.size} processes that divide them: evaluate it inside "
            "pyro_bnn.inference.alone(), in one or all of them"
        )
    if quality is None:
        raise ValueError("data is empty: evaluate needs at least one row; look at the filter or split that made it")
    if ood is not None and isinstance(quality, ClassificationMetrics):
        rows = counted = 0
        for prediction, there in predict_inputs(posterior, ood, like=example, **settings, together=together):
            counted += quality.update_ood(prediction, there)
            rows += prediction.mean.shape[0]
        if together.any(rows == 0):
            raise ValueError("ood is empty: give at least one row of inputs, or leave out ood=")
        if not together.total([counted])[0]:
            raise ValueError("ood holds no label but ignore_index: leave the labels out, or check how they were masked")
    found: dict[str, Any] = {**quality.compute()}
    if shifted is not None:
        result = shifted.compute(found)
        found |= {**result.means(), "shift": result}
    return found


def _quality(prediction: Prediction, with_ood: bool) -> ClassificationMetrics | RegressionMetrics:
    kind = getattr(prediction.likelihood, "kind", None)
    device = prediction.per_member.device
    if kind == "classification":
        classes = class_probabilities(prediction.probs, prediction.likelihood).shape[-1]
        return ClassificationMetrics(classes, device, with_ood)
    if kind not in ("regression", "count"):
        raise ValueError(
            f"likelihood={prediction.likelihood!r}: evaluate needs a model with a likelihood of pyro_bnn.likelihoods"
        )
    if with_ood:
        raise ValueError(
            "ood= ranks inputs by the entropy of their class probabilities, which a regression does not have: leave "
            "out ood="
        )
    return RegressionMetrics(device)


class ClassificationMetrics:
    """The metrics of :func:`evaluate` for a classification, computed batch by batch.

    Each batch leaves two numbers for each label in memory (``confidence``, ``correct``) and, with ``with_ood``, three
    for each row (``inside``, and ``outside`` for out-of-distribution inputs), because these must be sorted at the end.
    Everything else is a running mean.

    :param classes: number C of classes.
    :param device: device of the predictions.
    :param with_ood: whether out-of-distribution inputs follow.
    """

    def __init__(self, classes: int, device: torch.device, with_ood: bool) -> None:
        self.classes, self.with_ood = classes, with_ood
        self.means = {
            name: running_mean(device)
            for name in ("accuracy", "nll", "brier", "aleatoric", "epistemic", "disagreement")
        }
        self.classwise = ClasswiseCalibrationError(classes, BINS).to(device).set_dtype(precision(device))
        self.confidence: list[Tensor] = []
        self.correct: list[Tensor] = []
        self.inside: dict[str, list[Tensor]] = defaultdict(list)
        self.outside: dict[str, list[Tensor]] = defaultdict(list)

    def update(self, prediction: Prediction, y: Tensor) -> None:
        """Adds one batch and its targets."""
        there = labelled(prediction, y)
        self.means["nll"].update(-row_density(prediction, y))
        labels = kept(y.flatten().long(), there)
        probs = kept(class_probabilities(prediction.probs, prediction.likelihood).flatten(0, -2), there)
        confidence, predicted = probs.max(-1)
        correct = predicted == labels
        self.means["accuracy"].update(wide(correct))
        self.means["brier"].update((probs - one_hot(labels, self.classes)).square().sum(-1))
        self.means["aleatoric"].update(kept(prediction.aleatoric.flatten(), there))
        self.means["epistemic"].update(kept(prediction.epistemic.flatten(), there))
        self.means["disagreement"].update(kept(disagreement(prediction), there))
        self.classwise.update(probs, labels)
        self.confidence.append(confidence)
        self.correct.append(correct)
        if self.with_ood:
            _append(self.inside, ood_scores(prediction, there))

    def update_ood(self, prediction: Prediction, there: Tensor | None = None) -> int:
        """Adds one batch of out-of-distribution inputs.

        :param there: which of their labels count, see :func:`~pyro_bnn.diagnostics.scoring.ood.ood_scores`.
        :return: the number of rows that have any.
        """
        scores = ood_scores(prediction, there)
        _append(self.outside, scores)
        return len(scores["entropy"])

    def compute(self) -> dict[str, float]:
        """``{metric: number}`` over all batches.

        :raises ValueError: when every label was masked.
        """
        confidence, correct = all_rows(self.confidence), all_rows(self.correct)
        if not len(correct):
            raise ValueError(
                "data holds no label but ignore_index, so there is nothing to score: check how the labels were masked"
            )
        error = wide(~correct)
        result = {name: float(metric.compute()) for name, metric in self.means.items()}
        result |= {
            "ece": bin_confidence(confidence, correct, BINS).error,
            "ece_adaptive": bin_confidence(confidence, correct, BINS, adaptive=True).error,
            "ece_classwise": float(self.classwise.compute()),
            "aurc": aurc(confidence, error),
            "augrc": augrc(confidence, error),
            "risk_at_80": risk_at_coverage(confidence, error, KEPT),
        }
        for score, parts in self.inside.items():
            inside, outside = all_rows(parts), all_rows(self.outside[score])
            suffix = "" if score == "entropy" else f"_{score}"
            for metric in (auroc, aupr, fpr95):
                result[f"ood_{metric.__name__}{suffix}"] = metric(inside, outside)
        return result


class RegressionMetrics:
    """The metrics of :func:`evaluate` for a regression or counts, all of them running means over batches.

    :param device: device of the predictions.
    """

    def __init__(self, device: torch.device) -> None:
        squares = MeanSquaredError(squared=False, sync_on_compute=processes().are_several)
        self.metrics: dict[str, Metric] = {
            "nll": running_mean(device),
            "rmse": squares.to(device).set_dtype(precision(device)),
            **{name: running_mean(device) for name in ("crps", "coverage", "width", "aleatoric", "epistemic")},
        }

    def update(self, prediction: Prediction, y: Tensor) -> None:
        """Adds one batch and its targets."""
        self.metrics["nll"].update(-row_density(prediction, y))
        mean, interval = prediction.mean, prediction.interval(LEVEL)
        self.metrics["rmse"].update(mean.flatten(), y.reshape(mean.shape).to(mean.dtype).flatten())
        self.metrics["crps"].update(crps(prediction, y))
        self.metrics["coverage"].update(interval_coverage(interval, y))
        self.metrics["width"].update(interval_width(interval))
        self.metrics["aleatoric"].update(prediction.aleatoric)
        self.metrics["epistemic"].update(prediction.epistemic)

    def compute(self) -> dict[str, float]:
        """``{metric: number}`` over all batches."""
        return {name: float(metric.compute()) for name, metric in self.metrics.items()}


def _append(scores: dict[str, list[Tensor]], batch: dict[str, Tensor]) -> None:
    for name, values in batch.items():
        scores[name].append(values)
