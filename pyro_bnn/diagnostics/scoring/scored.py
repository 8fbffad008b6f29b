"""The scores of every datum, from which plots and comparisons of posteriors are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_bnn.diagnostics.scoring.ood import ood_scores
from pyro_bnn.diagnostics.scoring.precision import wide
from pyro_bnn.diagnostics.scoring.probabilities import class_probabilities
from pyro_bnn.inputs import Data, Inputs
from pyro_bnn.predicting import kept, labelled, predict_batches, predict_inputs, row_density

if TYPE_CHECKING:
    from pyro_bnn.posterior import Posterior, Prediction

#: least number of draws of y from which the predictive distribution function is estimated
_DRAWS_OF_Y = 400


@dataclass(frozen=True)
class Scored:
    """Scores of N rows with M targets in total, on the CPU; masked labels and rows without any are left out.

    :param y: targets, ``[M]``.
    :param nll: negative log predictive density or probability of every row, ``[N]``, in nats.
    :param confidence: probability of the most probable class, or minus the predictive standard deviation, ``[M]``.
    :param loss: 1 for a wrong class and 0 for a right one, or the squared error, ``[M]``.
    :param probs: class probabilities ``[M, C]``; ``None`` for regression and counts.
    :param pit: for regression and counts the predictive distribution function at y, ``[M]``, estimated from draws. At a
        count it is a random point of the jump (the randomised probability integral transform). ``None`` for
        classification.
    :param inside: predictive entropy of every row, ``[N]``, in nats; ``None`` without out-of-distribution inputs.
    :param outside: predictive entropy of the out-of-distribution inputs, in nats.
    """

    y: Tensor
    nll: Tensor
    confidence: Tensor
    loss: Tensor
    probs: Tensor | None = None
    pit: Tensor | None = None
    inside: Tensor | None = None
    outside: Tensor | None = None


def score(
    posterior: Posterior, data: Data, ood: Data = None, *, num_samples: int | None, batch_size: int | None, seed: int
) -> Scored:
    """Scores every datum, with the same draws as ``evaluate`` with the same settings.

    :raises ValueError: when data or ood is empty, or ``ood`` is given for a regression.
    """
    settings: dict[str, Any] = {"num_samples": num_samples, "batch_size": batch_size, "seed": seed}
    rows: list[dict[str, Tensor]] = []
    example: Inputs = None
    for batch, (x, prediction, y) in enumerate(predict_batches(posterior, data, **settings)):
        example = x
        found = {"nll": -row_density(prediction, y)}
        if prediction.likelihood is not None and prediction.likelihood.kind == "classification":
            found |= _classified(prediction, y)
            if ood is not None:
                found["inside"] = ood_scores(prediction, labelled(prediction, y))["entropy"]
        else:
            found |= _regressed(prediction, y, seed=seed + 1000 * batch)
        rows.append(
            {name: wide(values).cpu() if values.is_floating_point() else values.cpu() for name, values in found.items()}
        )
    if not rows:
        raise ValueError("data is empty: a report needs at least one row; check the filter or split that made it")
    if ood is not None and "inside" not in rows[0]:
        raise ValueError(
            "ood= ranks inputs by the entropy of their class probabilities, which a regression does not have: leave "
            "out ood="
        )
    outside = None
    if ood is not None:
        entropies = [
            wide(ood_scores(prediction, there)["entropy"]).cpu()
            for prediction, there in predict_inputs(posterior, ood, like=example, **settings)
        ]
        if not entropies:
            raise ValueError("ood is empty: give at least one row of inputs, or leave out ood=")
        outside = torch.cat(entropies)
    return Scored(**{name: torch.cat([row[name] for row in rows]) for name in rows[0]}, outside=outside)


def _classified(prediction: Prediction, y: Tensor) -> dict[str, Tensor]:
    there = labelled(prediction, y)
    probs = kept(class_probabilities(prediction.probs, prediction.likelihood).flatten(0, -2), there)
    labels = kept(y.flatten().long(), there)
    confidence, predicted = probs.max(-1)
    return {"y": labels, "probs": probs, "confidence": confidence, "loss": wide(predicted != labels)}


def _regressed(prediction: Prediction, y: Tensor, seed: int) -> dict[str, Tensor]:
    mean = prediction.mean
    y = y.reshape(mean.shape).to(mean.dtype)
    variance = prediction.aleatoric + prediction.epistemic  # the law of total variance
    times = -(-_DRAWS_OF_Y // prediction.per_member.shape[:2].numel())
    below, split = torch.zeros_like(mean), _uniform(mean, seed)
    for i in range(times):
        drawn = prediction.sample(seed + i)
        below += ((drawn < y).to(mean.dtype) + split * (drawn == y)).mean((0, 1)) / times
    return {
        "y": y.flatten(),
        "confidence": -variance.sqrt().reshape(mean.shape).flatten(),
        "loss": (mean - y).square().flatten(),
        "pit": below.flatten(),
    }


def _uniform(like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(like.shape, generator=generator).to(like)
