"""Findings about predictions: better than knowing nothing, as confident as right, and less certain elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_bnn.diagnostics.checking.findings import Finding
from pyro_bnn.diagnostics.scoring.precision import wide
from pyro_bnn.diagnostics.scoring.probabilities import member_probabilities
from pyro_bnn.diagnostics.scoring.scores import interval_coverage

if TYPE_CHECKING:
    from pyro_bnn.posterior import Prediction

#: what a central interval holds
LEVEL = 0.95
#: standard errors beyond which a number differs from its expectation
ERRORS = 3.0
#: share of the baseline's loss that a network must spare at least, with any luck, to have learned something
LITTLE = 0.1
#: AUROC from which foreign inputs are told well
FOREIGN = 0.9


@dataclass
class Predicted:
    """What the findings are made of: sums over the M labels of all rows, and the loss of each.

    :param kind: of the likelihood.
    :param hits: labels that were right, or inside the interval.
    :param expected: their expectation, by the predictive probability of each hit.
    :param variance: sum of p (1 - p) over those probabilities.
    :param by_function: ``[F]``, the expectation under each function alone.
    :param y: targets of each batch, ``[N, L]``.
    :param loss: 1 for a wrong class, or the squared error, ``[N, L]``.
    """

    kind: str
    hits: float = 0.0
    expected: float = 0.0
    variance: float = 0.0
    by_function: Tensor | float = 0.0
    y: list[Tensor] = field(default_factory=list)
    loss: list[Tensor] = field(default_factory=list)

    def add(self, prediction: Prediction, y: Tensor) -> None:
        """Takes in a batch."""
        if self.kind == "classification":
            probs = member_probabilities(prediction)
            predicted = probs.mean(0).argmax(-1)
            right = predicted == y.flatten()
            hits, loss = wide(right), wide(~right)
            each = wide(probs.gather(-1, predicted.expand(len(probs), -1).unsqueeze(-1)).squeeze(-1))
        else:
            low, high = prediction.interval(LEVEL)
            hits = interval_coverage((low, high), y)
            below = low - 1 if self.kind == "count" else low  # the lowest count belongs to the interval
            each = wide((prediction.cdf(high) - prediction.cdf(below)).flatten(0, 1).flatten(1))
            loss = (wide(prediction.mean) - y.reshape(prediction.mean.shape)).square()
        p = each.mean(0)
        self.hits += float(hits.sum())
        self.expected += float(p.sum())
        self.variance += float((p * (1 - p)).sum())
        self.by_function = self.by_function + each.sum(1).cpu()
        self.y.append(y.reshape(len(y), -1).cpu())
        self.loss.append(loss.reshape(len(y), -1).cpu())

    @property
    def rows(self) -> int:
        return sum(len(y) for y in self.y)

    def findings(self) -> Iterator[Finding]:
        """Of the accuracy and the calibration."""
        y, loss = torch.cat(self.y), torch.cat(self.loss)
        yield _better_than_a_class(y, loss) if self.kind == "classification" else _better_than_the_mean(y, loss)
        yield self._calibration(y.numel())

    def _calibration(self, count: int) -> Finding:
        """The share of hits against its expectation.

        Given one function hits are independent, and all of them share it: with the probability ``c_s`` of a hit under
        function s, mean over data, ``Var(share) = E[Var(share | s)] + Var(c_s)``, the first of which is at most that of
        independent hits. The mean over S functions adds ``Var(c_s) / S``.
        """
        share, expected, functions = self.hits / count, self.expected / count, torch.as_tensor(self.by_function) / count
        several = float(functions.var()) * (1 + 1 / len(functions)) if len(functions) > 1 else 0.0
        error = math.sqrt(max(self.variance, 0.25) / count**2 + several)
        if self.kind == "classification":
            text = f"Mean confidence is {expected:.1%} at an accuracy of {share:.1%} (standard error {error:.2%})."
            narrow = (
                "Too certain: scale_temperature or conformal sets, more members, or a prior that lets weights vary "
                "more."
            )
            wider = (
                "Too uncertain: train longer, look at the temperature and at the scale of the prior, or "
                "scale_temperature."
            )
        else:
            text = f"Intervals that should hold {expected:.1%} of y hold {share:.1%} (standard error {error:.2%})."
            narrow = (
                "Too narrow: learn the noise (Gaussian(scale=None)), look for outliers, or use conformal intervals."
            )
            wider = "Too wide: the noise or the epistemic part is too large; train longer, or use conformal intervals."
        if abs(share - expected) <= ERRORS * error:
            return Finding("good", "calibration", text)
        return Finding("warning", "calibration", text, narrow if share < expected else wider)


def _better_than_a_class(y: Tensor, loss: Tensor) -> Finding:
    """Against always the most frequent class, of each label of a row where it has several."""
    if y.shape[1] == 1:
        guess = y.mode(0).values.expand_as(y)
    else:  # of the other half of the rows: the most frequent of few would fit their noise, in every place anew
        guess = torch.empty_like(y)
        guess[::2] = y[1::2].mode(0).values if len(y) > 1 else -1
        guess[1::2] = y[::2].mode(0).values
    base = wide(guess != y)
    text = f"Accuracy is {1 - float(loss.mean()):.1%}; always the most frequent class has {1 - float(base.mean()):.1%}"
    remedy = "look at the labels, the learning rate and the prior's scale."
    return _better(base, loss, text, "", remedy)


def _better_than_the_mean(y: Tensor, loss: Tensor) -> Finding:
    base = (wide(y) - wide(y).mean(0)).square()
    scale = max(float(base.mean()), 1e-30)
    text = f"The mean squared error is {float(loss.mean()) / scale:.1%} of that of always the mean of y"
    remedy = "look at the scale of y, the learning rate and the prior."
    return _better(base / scale, loss / scale, text, " of it", remedy)


def _better(base: Tensor, loss: Tensor, text: str, unit: str, remedy: str) -> Finding:
    """Whether the loss is below that of knowing nothing, by the differences of each row."""
    gain = (base - loss).mean(1)
    mean, least = float(gain.mean()), LITTLE * float(base.mean())
    if len(gain) < 2 or least == 0:
        same = "one row" if len(gain) < 2 else "targets that are all the same"
        return Finding("note", "accuracy", f"{text}: {same} cannot show whether anything was learned.")
    error = float(gain.std()) / math.sqrt(len(gain))
    text = f"{text} (standard error of the difference {error:.1%}{unit})."
    if mean > ERRORS * error:
        return Finding("good", "accuracy", text)
    if mean + ERRORS * error < least:
        return Finding("problem", "accuracy", text, f"Nothing was learned: {remedy}")
    return Finding("note", "accuracy", text, f"Give more data, which could tell; if it stays, {remedy}")


def out_of_domain(metrics: Mapping[str, float], own: int, foreign: int) -> Iterator[Finding]:
    """Whether foreign inputs are found by their entropy.

    By chance alone the AUROC of n own and m foreign inputs has the variance ``(n + m + 1) / (12 n m)`` around 1/2.
    """
    auroc = metrics["ood_auroc"]
    error = math.sqrt((own + foreign + 1) / (12 * own * foreign))
    text = f"The entropy ranks foreign inputs above own ones with an AUROC of {auroc:.3f}."
    if auroc >= FOREIGN:
        yield Finding("good", "out of domain", text)
    elif auroc >= 0.5 - ERRORS * error:
        yield Finding(
            "note",
            "out of domain",
            text,
            "Look at the other scores of evaluate(); more members or particles often help.",
        )
    else:
        yield Finding(
            "warning",
            "out of domain",
            f"{text} It is more certain of foreign inputs than of its own.",
            "Do not use its uncertainty to reject inputs; look at the normalisation of both data sets.",
        )
