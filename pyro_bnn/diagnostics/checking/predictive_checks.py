"""Findings about predictions: accuracy against a constant guess, calibration, and out-of-distribution detection."""

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
from pyro_bnn.predicting import kept, labelled

if TYPE_CHECKING:
    from pyro_bnn.posterior import Prediction

#: probability of the central intervals
LEVEL = 0.95
#: standard errors beyond which a number counts as different from its expectation
ERRORS = 3.0
#: if the loss is below the baseline's by less than this share, within the error, nothing was learned
LITTLE = 0.1
#: AUROC from which out-of-distribution inputs count as well detected
FOREIGN = 0.9


@dataclass
class Predicted:
    """Sums over all labels, and the targets and losses of each batch, from which the findings are made.

    :param kind: kind of the likelihood, that of the first batch unless it is given.
    :param hits: number of labels that were predicted right, or lay inside the interval.
    :param expected: expected number of hits, the sum of their predictive probabilities p.
    :param variance: sum of p (1 - p).
    :param by_function: ``[F]``, the expected number of hits under each function alone.
    :param y: targets of each batch, ``[N, L]``.
    :param loss: losses of each batch, ``[N, L]``: 1 for a wrong class, or the squared error; 0 without a label.
    :param there: where each batch has labels, ``[N, L]``.
    """

    kind: str = ""
    hits: float = 0.0
    expected: float = 0.0
    variance: float = 0.0
    by_function: Tensor | float = 0.0
    y: list[Tensor] = field(default_factory=list)
    loss: list[Tensor] = field(default_factory=list)
    there: list[Tensor] = field(default_factory=list)

    def add(self, prediction: Prediction, y: Tensor) -> None:
        """Adds a batch."""
        self.kind = self.kind or str(getattr(prediction.likelihood, "kind", ""))
        there = labelled(prediction, y)
        there = torch.ones_like(y.flatten(), dtype=torch.bool) if there is None else there
        if self.kind == "classification":
            probs = kept(member_probabilities(prediction), there, axis=1)
            predicted = probs.mean(0).argmax(-1)
            right = predicted == y.flatten()[there]
            hits, loss = wide(right), wide(torch.zeros_like(y.flatten())).masked_scatter(there, wide(~right))
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
        self.there.append(there.reshape(len(y), -1).cpu())

    @property
    def rows(self) -> int:
        return sum(int(there.any(1).sum()) for there in self.there)

    def findings(self) -> Iterator[Finding]:
        """One finding about the accuracy, and one about the calibration."""
        y, loss, there = (_of_one_length(parts) for parts in (self.y, self.loss, self.there))
        labels = there.any(1)
        y, loss, there = y[labels], loss[labels], there[labels]
        if self.kind == "classification":
            yield _better_than_a_class(y, loss, there)
        else:
            yield _better_than_the_mean(y, loss)
        yield self._calibration(int(there.sum()))

    def _calibration(self, count: int) -> Finding:
        """Compares the share of hits with its expectation.

        Hits are independent given one function s, but all hits share that function. If ``c_s`` is the mean probability
        of a hit under s, then ``Var(share) = E[Var(share | s)] + Var(c_s)``, and the first term is at most the variance
        of independent hits. Estimating the expectation from S functions adds ``Var(c_s) / S``.
        """
        share, expected, functions = self.hits / count, self.expected / count, torch.as_tensor(self.by_function) / count
        several = float(functions.var()) * (1 + 1 / len(functions)) if len(functions) > 1 else 0.0
        error = math.sqrt(max(self.variance, 0.25) / count**2 + several)
        if self.kind == "classification":
            text = f"Mean confidence is {expected:.1%} at an accuracy of {share:.1%} (standard error {error:.2%})."
            narrow = (
                "Overconfident: use scale_temperature or conformal sets, more members, or a wider prior on the weights."
            )
            wider = (
                "Underconfident: train longer, check the temperature and the scale of the prior, or use "
                "scale_temperature."
            )
        else:
            text = f"Intervals that should hold {expected:.1%} of y hold {share:.1%} (standard error {error:.2%})."
            narrow = (
                "Too narrow: learn the noise (Gaussian(scale=None)), check for outliers, or use conformal intervals."
            )
            wider = "Too wide: the noise or the epistemic part is too large. Train longer, or use conformal intervals."
        if abs(share - expected) <= ERRORS * error:
            return Finding("good", "calibration", text)
        return Finding("warning", "calibration", text, narrow if share < expected else wider)


def _of_one_length(parts: list[Tensor]) -> Tensor:
    """All rows of batches ``[N, L]`` whose L may differ, as one ``[N, L]``; there are no labels beyond their ends."""
    longest = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, longest - part.shape[1])) for part in parts])


def _better_than_a_class(y: Tensor, loss: Tensor, there: Tensor) -> Finding:
    """Compares the accuracy with that of the most frequent class, separately for each label of a row."""
    # where there is no label stands a class of its own, so that it is never the most frequent one
    alone = y.max() + 1 + torch.arange(len(y))[:, None].expand_as(y)
    y = torch.where(there, y, alone.to(y.dtype))
    if y.shape[1] == 1:
        guess = y.mode(0).values.expand_as(y)
    else:  # from the other half of the rows: with many labels, the most frequent classes would overfit the rows
        guess = torch.empty_like(y)
        guess[::2] = y[1::2].mode(0).values if len(y) > 1 else -1
        guess[1::2] = y[::2].mode(0).values
    base = wide((guess != y) & there)
    count = there.sum()
    right, usual = (1 - float(errors.sum() / count) for errors in (loss, base))
    text = f"Accuracy is {right:.1%}; the most frequent class alone has {usual:.1%}"
    remedy = "check the labels, the learning rate and the scale of the prior."
    return _better(base, loss, text, "", remedy, there)


def _better_than_the_mean(y: Tensor, loss: Tensor) -> Finding:
    base = (wide(y) - wide(y).mean(0)).square()
    scale = max(float(base.mean()), 1e-30)
    text = f"The mean squared error is {float(loss.mean()) / scale:.1%} of that of predicting the mean of y"
    remedy = "check the scale of y, the learning rate and the prior."
    return _better(base / scale, loss / scale, text, " of it", remedy)


def _better(base: Tensor, loss: Tensor, text: str, unit: str, remedy: str, there: Tensor | None = None) -> Finding:
    """Whether the loss is below that of a constant guess, judged by the paired differences of the rows.

    Rows with more labels weigh more: the mean is the ratio r = sum_n g_n / sum_n m_n of the gains and numbers of labels
    of all rows, and its standard error that of the mean of (g_n - r m_n) / mean m (Cochran 1977, section 6.4).
    """
    size = wide(torch.ones_like(base).sum(1) if there is None else there.sum(1)).to(base.dtype)
    total = (base - loss).sum(1)
    mean, least = float(total.sum() / size.sum()), LITTLE * float(base.sum() / size.sum())
    gain = (total - mean * size) / size.mean()
    if len(gain) < 2 or least == 0:
        same = "one row" if len(gain) < 2 else "targets that are all the same"
        return Finding("note", "accuracy", f"{text}: {same} cannot show whether anything was learned.")
    error = float(gain.std()) / math.sqrt(len(gain))
    text = f"{text} (standard error of the difference {error:.1%}{unit})."
    if mean > ERRORS * error:
        return Finding("good", "accuracy", text)
    if mean + ERRORS * error < least:
        return Finding("problem", "accuracy", text, f"Nothing was learned: {remedy}")
    return Finding("note", "accuracy", text, f"Give more data to tell. If the difference stays small, {remedy}")


def out_of_domain(metrics: Mapping[str, float], own: int, foreign: int) -> Iterator[Finding]:
    """Whether the predictive entropy detects out-of-distribution inputs.

    By chance alone the AUROC of n in-distribution and m out-of-distribution inputs has mean 1/2 and variance
    ``(n + m + 1) / (12 n m)``.
    """
    auroc = metrics["ood_auroc"]
    error = math.sqrt((own + foreign + 1) / (12 * own * foreign))
    text = f"The entropy separates out-of-distribution inputs from the data with an AUROC of {auroc:.3f}."
    if auroc >= FOREIGN:
        yield Finding("good", "out of domain", text)
    elif auroc >= 0.5 - ERRORS * error:
        yield Finding(
            "note",
            "out of domain",
            text,
            "Look at the other scores of evaluate(). More members or particles often help.",
        )
    else:
        yield Finding(
            "warning",
            "out of domain",
            f"{text} The posterior is more certain about out-of-distribution inputs than about the data.",
            "Do not use its uncertainty to reject inputs, and check that both data sets are normalised alike.",
        )
