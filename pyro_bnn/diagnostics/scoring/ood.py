"""Out-of-distribution detection: whether inputs from elsewhere get predictions that are less certain."""

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


def ood_scores(prediction: Prediction) -> dict[str, Tensor]:
    """Scores ``[N]`` of how foreign each input looks, larger for more foreign.

    ======================  =====================================================================================
    ``entropy``             of the averaged class probabilities, in nats, in [0, log C]
    ``max_probability``     1 - max_c p(c) of the averaged probabilities, in [0, 1 - 1/C]
    ``mutual_information``  between label and weights, in nats, in [0, log C]: the part of the entropy on which the
                            members disagree; 0 with a single function
    ======================  =====================================================================================

    For a target of several labels, the mean over them.

    :raises TypeError: unless the likelihood is a classification.

    Source: Hendrycks and Gimpel (2017) for the maximum probability; Depeweg et al. (2018) for the split of the entropy.
    """
    probs = class_probabilities(prediction.probs, prediction.likelihood)
    scores = {
        "entropy": prediction.entropy,
        "max_probability": 1 - probs.amax(-1),
        "mutual_information": prediction.mutual_information,
    }
    return {name: score.reshape(len(score), -1).mean(1) for name, score in scores.items()}


def auroc(inside: Tensor, outside: Tensor) -> float:
    """Probability that an input from elsewhere has the larger score, ties counting half, in [0, 1]; 0.5 is chance.

    :param inside: scores ``[N]`` of data as the model was trained on.
    :param outside: scores ``[M]`` of inputs from elsewhere, the positives.
    :raises ValueError: when either is empty, not one-dimensional, or holds NaN.
    """
    return float(binary_auroc(*_ranked(inside, outside)))


def aupr(inside: Tensor, outside: Tensor) -> float:
    """Area under the precision-recall curve, as average precision: sum_t (recall_t - recall_{t-1}) precision_t.

    In (0, 1]; chance is M / (N + M), the share of the positives. Arguments and errors as for :func:`auroc`.

    Source: Davis and Goadrich (2006); every distinct score is a threshold t, without interpolation.
    """
    return float(binary_average_precision(*_ranked(inside, outside)))


def fpr95(inside: Tensor, outside: Tensor) -> float:
    """Share of the inside data at or above the largest threshold that finds 95 % of the others, in [0, 1]; 0 is best.

    The threshold is the k-th largest score from outside, with k = 0.95 M rounded up. Arguments and errors as for
    :func:`auroc`.

    Source: Liang, Li and Srikant (2018), section 4.
    """
    _require_scores(inside, outside)
    found = math.ceil(19 * len(outside) / 20)
    threshold = outside.sort(descending=True).values[found - 1]
    return float(wide(inside >= threshold).mean())


def _ranked(inside: Tensor, outside: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks of the scores, in [0, 1), and 1 for those from outside.

    torchmetrics takes the sigmoid of scores when one lies outside [0, 1], which rounds large ones to ties.
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
                "expected one score, a number, for each of at least one input"
            )
