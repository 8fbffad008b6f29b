"""Out-of-distribution detection: whether out-of-distribution inputs get less certain predictions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

from pyro_bnn.diagnostics.scoring.precision import wide
from pyro_bnn.diagnostics.scoring.probabilities import class_probabilities

if TYPE_CHECKING:
    from pyro_bnn.posterior import Prediction


def ood_scores(prediction: Prediction, there: Tensor | None = None) -> dict[str, Tensor]:
    """Out-of-distribution scores ``[N]`` of each input; larger means less like the training data.

    ======================  =====================================================================================
    ``entropy``             entropy of the averaged class probabilities, in nats, in [0, log C]
    ``max_probability``     1 - max_c p(c) of the averaged probabilities, in [0, 1 - 1/C]
    ``mutual_information``  mutual information of label and weights, in nats, in [0, log C]: the part of the entropy
                            that comes from the disagreement of the functions; 0 with a single function
    ======================  =====================================================================================

    If a target has several labels, each score is the mean over them.

    :param prediction: what ``Posterior.predict`` returns for N inputs.
    :param there: which labels count, booleans of the shape of y or flat; rows without any have no score. By default
        all of them.
    :returns: ``{score: [N]}`` with the names in the table.
    :raises TypeError: unless the likelihood is a classification.

    Source: Hendrycks and Gimpel (2017) for the maximum probability; Depeweg et al. (2018) for the split of the entropy.
    """
    probs = class_probabilities(prediction.probs, prediction.likelihood)
    scores = {
        "entropy": prediction.entropy,
        "max_probability": 1 - probs.amax(-1),
        "mutual_information": prediction.mutual_information,
    }
    if there is None:
        return {name: score.reshape(len(score), -1).mean(1) for name, score in scores.items()}
    there = there.reshape(len(probs), -1)
    count = there.sum(1)
    sums = {name: score.reshape(len(score), -1).masked_fill(~there, 0).sum(1) for name, score in scores.items()}
    return {name: (total / count)[count > 0] for name, total in sums.items()}


def auroc(inside: Tensor, outside: Tensor) -> float:
    """Area under the ROC curve: the probability that an out-of-distribution input outscores an in-distribution one.

    Ties count half. It lies in [0, 1]; 0.5 is chance.

    :param inside: scores ``[N]`` of in-distribution data.
    :param outside: scores ``[M]`` of out-of-distribution inputs, the positives.
    :raises ValueError: when either is empty, not one-dimensional, or holds NaN.
    """
    return float(binary_auroc(*_ranked(inside, outside)))


def aupr(inside: Tensor, outside: Tensor) -> float:
    """Area under the precision-recall curve, as average precision: sum_t (recall_t - recall_{t-1}) precision_t.

    It lies in (0, 1]; chance is M / (N + M), the share of the positives. Arguments and errors as for :func:`auroc`.

    Source: Davis and Goadrich (2006); every distinct score is a threshold t, without interpolation.
    """
    return float(binary_average_precision(*_ranked(inside, outside)))


def fpr95(inside: Tensor, outside: Tensor) -> float:
    """The false positive rate when 95 % of out-of-distribution inputs are detected, in [0, 1]; 0 is best.

    It is the share of in-distribution scores at or above the threshold, the k-th largest of the M out-of-distribution
    scores with k = 0.95 M rounded up. Arguments and errors as for :func:`auroc`.

    Source: Liang, Li and Srikant (2018), section 4.
    """
    _require_scores(inside, outside)
    found = math.ceil(19 * len(outside) / 20)
    threshold = outside.sort(descending=True).values[found - 1]
    return float(wide(inside >= threshold).mean())


def _ranked(inside: Tensor, outside: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks of all scores, in [0, 1), and labels: 1 for out-of-distribution inputs.

    Ranks replace scores because torchmetrics applies a sigmoid if a score lies outside [0, 1], which rounds large
    scores to ties.
    """
    _require_scores(inside, outside)
    values, rank = torch.cat((inside, outside)).unique(return_inverse=True)
    label = torch.cat((torch.zeros_like(inside), torch.ones_like(outside))).long()
    return wide(rank) / len(values), label


def _require_scores(inside: Tensor, outside: Tensor) -> None:
    for name, scores in (("inside", inside), ("outside", outside)):
        if scores.dim() != 1 or len(scores) == 0 or bool(scores.isnan().any()):
            raise ValueError(
                f"{name} is a tensor of shape {tuple(scores.shape)}, {int(scores.isnan().sum())} of its entries NaN; "
                "expected one score for each input, at least one input, and no NaN"
            )
