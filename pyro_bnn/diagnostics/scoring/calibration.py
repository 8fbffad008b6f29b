"""Calibration: whether predictions with confidence p are right in a share p of the cases."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torchmetrics import Metric

from pyro_bnn.diagnostics.scoring.precision import precision, wide
from pyro_bnn.diagnostics.scoring.probabilities import require_probabilities
from pyro_bnn.diagnostics.scoring.selective import mean_over_ties
from pyro_bnn.distributed import processes
from pyro_bnn.entry import checks

BINS = 15


@dataclass(frozen=True)
class ReliabilityBins:
    """The data of a reliability diagram: B bins of the confidence, the probability of the most probable class.

    :param confidence: ``[B]``, mean confidence in each bin; 0 in a bin without data.
    :param accuracy: ``[B]``, share of right predictions in each bin; 0 in a bin without data.
    :param count: ``[B]``, number of data in each bin.
    :param edges: ``[B + 1]``, bounds of the bins.
    """

    confidence: Tensor
    accuracy: Tensor
    count: Tensor
    edges: Tensor

    @property
    def error(self) -> float:
        """The expected calibration error, sum_b (N_b / N) abs(accuracy_b - confidence_b), in [0, 1]."""
        gaps = (self.accuracy - self.confidence).abs()
        return float((self.count * gaps).sum() / self.count.sum())


def reliability(probs: Tensor, y: Tensor, bins: int = BINS, adaptive: bool = False) -> ReliabilityBins:
    """Mean confidence and accuracy in bins of the confidence, the probability of the most probable class.

    Bins of equal width are [b / B, (b + 1) / B); the last one includes 1. With ``adaptive`` bins hold equal numbers of
    data: the datum with rank i = 0 ... N - 1 in confidence is in bin floor(i B / N), so all sizes are N / B rounded up
    or down. Data with equal confidence share their right predictions evenly (each counts as their mean), so the order
    of the rows does not matter even if a bound separates them.

    :param probs: class probabilities ``[N, C]``; for a Bernoulli the two columns 1 - p and p.
    :param y: labels ``[N]``, integers starting at 0.
    :param bins: number B of bins.
    :param adaptive: whether bins hold equal numbers of data instead of having equal width.
    :returns: ``confidence``, ``accuracy`` and ``count`` of each bin ``[B]``, the ``edges`` ``[B + 1]``, and ``error``,
        the expected calibration error.
    :raises TypeError: when probs or y is not a tensor, or y does not hold integers.
    :raises ValueError: when the rows of probs are not probabilities, y does not fit them, or bins is below 1.

    Source: Naeini, Cooper and Hauskrecht (2015); for equal mass Nguyen and O'Connor (2015), section 4, and Nixon et al.
    (2019), section 3.
    """
    require_probabilities(probs, y)
    confidence, predicted = probs.max(-1)
    return bin_confidence(confidence, predicted == y, bins, adaptive)


def bin_confidence(confidence: Tensor, correct: Tensor, bins: int = BINS, adaptive: bool = False) -> ReliabilityBins:
    """The bins of :func:`reliability`, from the confidence ``[N]`` of predictions and whether each is right ``[N]``."""
    _require_bins(bins)
    confidence, correct, size = wide(confidence), wide(correct), len(confidence)
    if adaptive:
        # b N / B rounded up is the rank of the first datum in bin b.
        first = -(-torch.arange(bins, device=confidence.device) * size // bins)
        correct = mean_over_ties(confidence, correct)
        confidence, order = confidence.sort()
        correct = correct[order]
        edges = torch.cat((confidence[first.clamp_max(size - 1)], confidence[-1:]))
        index = torch.arange(size, device=confidence.device) * bins // size
    else:
        edges = _even_edges(bins, confidence)
        index = torch.bucketize(confidence, edges[1:-1], right=True)
    count = torch.bincount(index, minlength=bins)
    mean_confidence, accuracy = (torch.bincount(index, v, bins) / count.clamp_min(1) for v in (confidence, correct))
    return ReliabilityBins(mean_confidence, accuracy, count, edges)


def calibration_error(probs: Tensor, y: Tensor, bins: int = BINS, adaptive: bool = False) -> float:
    """The expected calibration error (ECE) over the bins of :func:`reliability`, in [0, 1].

        sum_b (N_b / N) abs(accuracy_b - confidence_b)

    Arguments, errors and sources as for :func:`reliability`.
    """
    return reliability(probs, y, bins, adaptive).error


def classwise_calibration_error(probs: Tensor, y: Tensor, bins: int = BINS) -> float:
    """The calibration error of the probability of each class, not only of the most probable one, averaged over classes.

        (1/C) sum_c sum_b (N_cb / N) abs(share of [y = c] in bin b of p(c) - mean of p(c) in that bin)

    It lies in [0, 2 / C]; bins have equal width. It is also known as the static calibration error. Arguments and errors
    as for :func:`reliability`.

    Source: Kull et al. (2019), equation 3; Nixon et al. (2019), equation 2.
    """
    require_probabilities(probs, y)
    metric = ClasswiseCalibrationError(probs.shape[1], bins).to(probs.device).set_dtype(precision(probs.device))
    metric.update(probs, y)
    return float(metric.compute())


class ClasswiseCalibrationError(Metric):
    """:func:`classwise_calibration_error` over batches; keeps one number per class and bin in memory.

    N_cb drops out of each summand, which leaves (1/N) abs(sum over the data of the bin of [y = c] - p(c)).
    """

    excess: Tensor
    size: Tensor

    def __init__(self, classes: int, bins: int = BINS) -> None:
        super().__init__(sync_on_compute=processes().are_several)
        _require_bins(bins)
        self.bins = bins
        self.add_state("excess", torch.zeros(classes, bins), dist_reduce_fx="sum")
        self.add_state("size", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, probs: Tensor, y: Tensor) -> None:
        """Adds a batch of probabilities ``[N, C]`` and labels ``[N]``."""
        classes = len(self.excess)
        probs = probs.to(self.excess.dtype)
        inside = _even_edges(self.bins, probs)[1:-1]
        index = torch.bucketize(probs, inside, right=True)
        index += self.bins * torch.arange(classes, device=index.device)
        excess = one_hot(y, classes) - probs
        self.excess += torch.bincount(index.flatten(), excess.flatten(), self.excess.numel()).view_as(self.excess)
        self.size += len(y)

    def compute(self) -> Tensor:
        return self.excess.abs().sum() / (self.size * len(self.excess))


def _even_edges(bins: int, like: Tensor) -> Tensor:
    return torch.arange(bins + 1, dtype=like.dtype, device=like.device) / bins


def _require_bins(bins: int) -> None:
    checks.count("bins", bins)
