"""Class probabilities in the form that metrics expect: ``[N, C]``, with rows that sum to 1."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_bnn.likelihoods import Bernoulli, Likelihood

if TYPE_CHECKING:
    from pyro_bnn.posterior import Prediction

_TOLERANCE = 1e-2  # the accuracy of half precision with a thousand classes


def class_probabilities(probs: Tensor, likelihood: Likelihood | None) -> Tensor:
    """Class probabilities ``[..., C]``; the single probability p of a Bernoulli becomes (1 - p, p).

    :param probs: ``Prediction.probs`` or ``Prediction.per_member``.
    """
    return torch.stack((1 - probs, probs), -1) if isinstance(likelihood, Bernoulli) else probs


def member_probabilities(prediction: Prediction) -> Tensor:
    """Class probabilities ``[F, M, C]`` of F functions (draws of all members), for the M labels of all rows.

    :raises TypeError: when ``prediction`` is not a prediction of several functions, or the likelihood is not a
        classification.
    """
    if not hasattr(prediction, "per_member"):
        raise TypeError(
            f"expected the prediction of several functions, got {type(prediction).__name__}: give posterior.predict(x)"
        )
    prediction.probs  # noqa: B018  (raises if there are no classes, and says what to use)
    return class_probabilities(prediction.per_member, prediction.likelihood).flatten(0, 1).flatten(1, -2)


def require_probabilities(probs: Tensor, y: Tensor | None = None) -> None:
    """Checks that ``probs`` holds class probabilities ``[N, C]``, not logits, and that ``y`` holds labels ``[N]``.

    :raises TypeError: when one of them is not a tensor, or the labels are not integers.
    :raises ValueError: for anything else that is wrong.
    """
    if not isinstance(probs, Tensor):
        raise TypeError(
            f"probs must be a tensor of class probabilities [N, C], got {type(probs).__name__}: give prediction.probs, "
            "or torch.as_tensor(array)"
        )
    if probs.dim() != 2 or probs.numel() == 0:
        raise ValueError(
            f"probs has shape {tuple(probs.shape)}; expected [N, C], a row of class probabilities for each datum, and "
            "at least one datum. Give torch.stack((1 - p, p), -1) for a single probability p"
        )
    if bool(((probs < -_TOLERANCE).any(-1) | ((probs.sum(-1) - 1).abs() <= _TOLERANCE).logical_not()).any()):
        raise ValueError(
            "probs has rows that are not distributions (negative, NaN, or not summing to 1); give probabilities, not "
            "logits: logits.softmax(-1)"
        )
    if y is None:
        return
    if not isinstance(y, Tensor):
        raise TypeError(f"y must be a tensor of class labels, got {type(y).__name__}: give torch.as_tensor(y)")
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise TypeError(f"y has dtype {y.dtype}; class labels must be integers (y.long()), numbered from 0")
    if y.shape != probs.shape[:1]:
        raise ValueError(f"y has shape {tuple(y.shape)}; expected one label for each row of probs, {len(probs)}")
    if int(y.min()) < 0 or int(y.max()) >= probs.shape[1]:
        raise ValueError(
            f"y holds labels from {int(y.min())} to {int(y.max())}; probs has {probs.shape[1]} classes, 0 to "
            f"{probs.shape[1] - 1}"
        )
