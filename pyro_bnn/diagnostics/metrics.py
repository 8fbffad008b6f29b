"""Predictive quality: one number per question, streamed over the data through ``torchmetrics``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torchmetrics import MeanMetric, MeanSquaredError, Metric
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy, MulticlassCalibrationError

from pyro_bnn.diagnostics.stream import log_density, predictions, predictions_of_inputs

if TYPE_CHECKING:
    from pyro_bnn.posterior import Posterior, Prediction

BINS = 15
LEVEL = 0.95


def evaluate(
    posterior: Posterior,
    data: Any,
    ood: Any = None,
    *,
    num_samples: int = 16,
    batch_size: int | None = None,
    seed: int = 0,
) -> dict[str, float]:
    r"""How good the predictions of a posterior are on data that it has not seen.

    With p_n the mean over S draws and K members of the predictive density or probability of datum n:

    ==============  ======================================================================================
    for every kind
    --------------  --------------------------------------------------------------------------------------
    ``nll``         -(1/N) sum_n log p_n(y_n), in nats per datum
    classification
    --------------  --------------------------------------------------------------------------------------
    ``accuracy``    share of data whose most probable class is y_n, in [0, 1]
    ``brier``       (1/N) sum_n sum_c (p_n(c) - [y_n = c])^2, in [0, 2]
    ``ece``         sum_b (N_b / N) |accuracy_b - confidence_b| over 15 bins of equal width of the
                    probability of the most probable class, in [0, 1]
    ``ood_auroc``   probability that a datum of ``ood`` has the larger predictive entropy than one of
                    ``data``, ties counting half; only with ``ood``
    regression      (counts alike)
    --------------  --------------------------------------------------------------------------------------
    ``rmse``        sqrt((1/N) sum_n (mean_n - y_n)^2), in the unit of y
    ``coverage``    share of data inside the central 95 % interval of the prediction, ends included
    ==============  ======================================================================================

    A Bernoulli likelihood counts as a classification with the two classes 0 and 1. A target of several numbers counts
    each of them in every metric but ``nll``, where a datum is a row, and in the entropy, which is their mean.

    Every batch sees the same draws. Of a batch that is done, at most four numbers for each row stay in memory.

    :param data: a ``DataLoader`` of ``(x, y)``, a ``Dataset`` of such pairs, or one pair of tensors; x may be any
        nesting of dicts and tuples of tensors. Everything runs on the device of the model.
    :param ood: inputs from elsewhere: a loader, a dataset, or x itself; labels beside them are left out.
    :param num_samples: draws from every member, S.
    :param batch_size: the most rows in one forward pass; a loader keeps its own batches otherwise, and other data are
        cut into batches of 256.
    :param seed: of the draws.
    :raises TypeError: when data or ood is none of the forms above, or y has the wrong dtype.
    :raises ValueError: when data or ood is empty, y does not fit the likelihood, y or a prediction holds NaN, or ood
        is given for a regression.

    Source: Gneiting and Raftery (2007) for NLL and Brier score; Naeini, Cooper and Hauskrecht (2015) for the ECE.
    """
    settings: dict[str, Any] = {"num_samples": num_samples, "batch_size": batch_size, "seed": seed}
    quality: _Classification | _Regression | None = None
    example: Any = None
    for x, prediction, y in predictions(posterior, data, **settings):
        if quality is None:
            quality, example = _quality(prediction, y, ood is not None), x
        quality.update(prediction, y)
    if quality is None:
        raise ValueError("data is empty: evaluate needs at least one row; look at the filter or split that made it")
    if ood is not None and isinstance(quality, _Classification):
        rows = 0
        for prediction in predictions_of_inputs(posterior, ood, like=example, **settings):
            quality.update_ood(prediction)
            rows += prediction.mean.shape[0]
        if rows == 0:
            raise ValueError("ood is empty: give at least one row of inputs, or leave out ood=")
    return {name: float(metric.compute()) for name, metric in quality.metrics.items()}


def log_predictive_density(prediction: Prediction, y: Tensor) -> Tensor:
    """log p(y_n) with the densities of all draws and members averaged: ``[N]``, in nats.

    log (1 / (S K)) sum_sk p_sk(y_n) = logsumexp_sk log p_sk(y_n) - log (S K)
    """
    log_prob = log_density(prediction, y)
    draws, members, _ = log_prob.shape
    return log_prob.logsumexp((0, 1)) - math.log(draws * members)


def class_probabilities(probs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities ``[M, C]`` and labels ``[M]``, one row for every label in y.

    The single probability of a Bernoulli becomes those of the classes 0 and 1.
    """
    if probs.dim() > y.dim() and probs.shape[-1] > 1:
        return probs.flatten(0, -2), y.flatten().long()
    p = probs.flatten()
    return torch.stack((1 - p, p), -1), y.flatten().long()


def _quality(prediction: Prediction, y: Tensor, with_ood: bool) -> _Classification | _Regression:
    kind = getattr(prediction.likelihood, "kind", None)
    device = prediction.members.device
    if kind == "classification":
        return _Classification(class_probabilities(prediction.probs, y)[0].shape[-1], device, with_ood)
    if kind not in ("regression", "count"):
        raise ValueError(
            f"evaluate needs a model with a likelihood of pyro_bnn.likelihoods; this one has {prediction.likelihood!r}"
        )
    if with_ood:
        raise ValueError(
            "ood= ranks inputs by the entropy of their class probabilities, which a regression does not have: leave "
            "out ood="
        )
    return _Regression(device)


class _Classification:
    def __init__(self, classes: int, device: torch.device, with_ood: bool) -> None:
        self.classes = classes
        self.metrics: dict[str, Metric] = {
            "accuracy": MulticlassAccuracy(classes, average="micro").to(device),
            "nll": _mean(device),
            "brier": _mean(device),
            "ece": MulticlassCalibrationError(classes, n_bins=BINS, norm="l1").to(device),
        }
        if with_ood:
            self.metrics["ood_auroc"] = BinaryAUROC().to(device)

    def update(self, prediction: Prediction, y: Tensor) -> None:
        self.metrics["nll"].update(-log_predictive_density(prediction, y))
        probs, labels = class_probabilities(prediction.probs, y)
        self.metrics["brier"].update((probs - one_hot(labels, self.classes)).square().sum(-1))
        # One probability above 1 by a rounding error makes torchmetrics take all of them for logits, and it puts those
        # of exactly 1 into a bin of their own.
        probs = probs.clamp(0, 1 - 2**-24)
        self.metrics["accuracy"].update(probs, labels)
        self.metrics["ece"].update(probs, labels)
        if "ood_auroc" in self.metrics:
            self._rank(prediction, 0)

    def update_ood(self, prediction: Prediction) -> None:
        self._rank(prediction, 1)

    def _rank(self, prediction: Prediction, label: int) -> None:
        entropy = prediction.entropy.flatten(1).mean(1) if prediction.entropy.dim() > 1 else prediction.entropy
        # torchmetrics takes the sigmoid of a batch with a score outside [0, 1], and of no other batch.
        score = (entropy / math.log(self.classes)).clamp(0, 1)
        self.metrics["ood_auroc"].update(score, torch.full_like(score, label, dtype=torch.long))


class _Regression:
    def __init__(self, device: torch.device) -> None:
        self.metrics: dict[str, Metric] = {
            "nll": _mean(device),
            "rmse": MeanSquaredError(squared=False).to(device).set_dtype(_precision(device)),
            "coverage": _mean(device),
        }

    def update(self, prediction: Prediction, y: Tensor) -> None:
        self.metrics["nll"].update(-log_predictive_density(prediction, y))
        mean, (low, high) = prediction.mean, prediction.interval(LEVEL)
        y = y.reshape(mean.shape).to(mean.dtype)
        self.metrics["rmse"].update(mean.flatten(), y.flatten())
        self.metrics["coverage"].update(((low <= y) & (y <= high)).to(mean.dtype))


def _precision(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _mean(device: torch.device) -> Metric:
    return MeanMetric(nan_strategy="error").to(device).set_dtype(_precision(device))
