"""Class probabilities in the one form that metrics read: ``[N, C]``, with rows that sum to 1."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_bnn.likelihoods import Bernoulli, Likelihood

if TYPE_CHECKING:
    from pyro_bnn.posterior import Prediction

_TOLERANCE = 1e-2  # half precision is no better for a thousand classes


def class_probabilities(probs: Tensor, likelihood: Likelihood | None) -> Tensor:
    """``[..., C]``: as they are, but the one probability of a Bernoulli becomes those of the classes 0 and 1.

    :param probs: ``Prediction.probs`` or ``Prediction.per_member``.
    """
    return torch.stack((1 - probs, probs), -1) if isinstance(likelihood, Bernoulli) else probs


def member_probabilities(prediction: Prediction) -> Tensor:
    """``[F, M, C]``: those of every draw of every member, for each of the M labels of all rows.

    :raises TypeError: for what is no prediction, and unless the likelihood is a classification.
    """
    if not hasattr(prediction, "per_member"):
        raise TypeError(
            f"expected the prediction of several functions, got {type(prediction).__name__}: give posterior.predict(x)"
        )
    prediction.probs  # noqa: B018  (refuses whatever has no classes, and says what to use)
    return class_probabilities(prediction.per_member, prediction.likelihood).flatten(0, 1).flatten(1, -2)


def require_probabilities(probs: Tensor, y: Tensor | None = None) -> None:
    """Refuses what are no class probabilities ``[N, C]`` (logits, one probability alone) and labels of another form.

    :raises TypeError: when one is no tensor, or labels are no integers.
    :raises ValueError: for everything else that is wrong.
    """
    if not isinstance(probs, Tensor):
        raise TypeError(
            f"probs is a tensor of class probabilities [N, C], got {type(probs).__name__}: give prediction.probs, or "
            "torch.as_tensor(array)"
        )
    if probs.dim() != 2 or probs.numel() == 0:
        raise ValueError(
            f"probs has shape {tuple(probs.shape)}; expected [N, C], a row of class probabilities for each of at least "
            "one datum. Give torch.stack((1 - p, p), -1) for a single probability p"
        )
    if bool(((probs < -_TOLERANCE).any(-1) | ((probs.sum(-1) - 1).abs() <= _TOLERANCE).logical_not()).any()):
        raise ValueError(
            "probs holds rows that are no distribution (negative, NaN, or with a sum other than 1); give "
            "probabilities, not logits: logits.softmax(-1)"
        )
    if y is None:
        return
    if not isinstance(y, Tensor):
        raise TypeError(f"y is a tensor of class labels, got {type(y).__name__}: give torch.as_tensor(y)")
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise TypeError(f"y has dtype {y.dtype}; class labels must be integers (y.long()), numbered from 0")
    if y.shape != probs.shape[:1]:
        raise ValueError(f"y has shape {tuple(y.shape)}; expected one label for each row of probs, {len(probs)}")
    if int(y.min()) < 0 or int(y.max()) >= probs.shape[1]:
        raise ValueError(
            f"y holds labels from {int(y.min())} to {int(y.max())}; probs has {probs.shape[1]} classes, 0 to "
            f"{probs.shape[1] - 1}"
        )
