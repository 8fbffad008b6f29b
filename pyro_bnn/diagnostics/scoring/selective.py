"""Selective prediction: how much lower the loss is on the data that a model is most confident about."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_bnn.diagnostics.scoring.precision import wide
from pyro_bnn.entry import checks


def risk_coverage(confidence: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
    r"""The risk-coverage curve: the mean loss of the k most confident data, for k = 1 ... N.

        coverage_k = k / N        risk_k = (1/k) sum_{i <= k} loss_(i)

    with the data sorted by decreasing confidence. Each loss in a tie is replaced by the mean over the tie, which is the
    expectation over a random order, so the order of the rows does not change the curve.

    :param confidence: ``[N]``, larger if the model is more certain; only the order matters.
    :param loss: ``[N]``, any loss: 0 and 1 for errors, a squared error, a negative log-likelihood.
    :returns: coverage ``[N]`` in (0, 1] and risk ``[N]`` in the unit of the loss.
    :raises ValueError: when confidence and loss are empty, differ in shape, or hold NaN.

    Source: Geifman and El-Yaniv (2017), equation 2; El-Yaniv and Wiener (2010).
    """
    if confidence.dim() != 1 or confidence.shape != loss.shape or len(loss) == 0:
        raise ValueError(
            f"confidence has shape {tuple(confidence.shape)} and loss {tuple(loss.shape)}; expected [N] for both, with "
            "at least one datum"
        )
    for name, values in (("confidence", confidence), ("loss", loss)):
        if bool(values.isnan().any()):
            raise ValueError(f"{name} holds NaN, which cannot be ordered: drop these data, or fix the model")
    ordered = mean_over_ties(confidence, loss)[confidence.argsort(descending=True)]
    k = wide(torch.arange(1, len(loss) + 1, device=loss.device))
    return k / len(loss), ordered.cumsum(0) / k


def aurc(confidence: Tensor, loss: Tensor) -> float:
    """Area under the risk-coverage curve (AURC), (1/N) sum_k risk_k, in the unit of the loss; lower is better.

    If confidence is uninformative about the loss, this is the mean loss. The minimum is reached if confidence decreases
    with the loss, and is above 0 unless all losses are 0.

    Arguments and errors as for :func:`risk_coverage`. Source: Geifman, Uziel and El-Yaniv (2019), section 2.
    """
    return float(risk_coverage(confidence, loss)[1].mean())


def augrc(confidence: Tensor, loss: Tensor) -> float:
    """Area under the generalised risk-coverage curve (AUGRC), in the unit of the loss; lower is better.

    The generalised risk coverage_k risk_k = (1/N) sum_{i <= k} loss_(i) is the sum of the losses of the predictions
    that are kept, divided by the number of all data. The area is that of trapezoids starting at (0, 0). If confidence
    is uninformative, it is half the mean loss. For losses of 0 and 1 with accuracy a it is (1 - AUROC) a (1 - a) +
    (1 - a)^2 / 2, where AUROC is the probability that a right prediction has a higher confidence than a wrong one.
    Unlike AURC it does not give the few most confident data more weight than all others.

    Arguments and errors as for :func:`risk_coverage`. Source: Traub et al. (2024), equations 4 to 6.
    """
    coverage, risk = risk_coverage(confidence, loss)
    generalised = coverage * risk
    return float((generalised.sum() - generalised[-1] / 2) / len(loss))


def risk_at_coverage(confidence: Tensor, loss: Tensor, coverage: float) -> float:
    """Mean loss of the k most confident data, for the smallest k with k / N >= coverage, in the unit of the loss.

    :param confidence, loss: as for :func:`risk_coverage`.
    :param coverage: share of the data to keep, in (0, 1].
    :raises ValueError: when coverage is outside (0, 1], and as for :func:`risk_coverage`.
    """
    checks.share_or_all_of_it("coverage", coverage)
    kept, risk = risk_coverage(confidence, loss)
    return float(risk[torch.searchsorted(kept, coverage)])


def mean_over_ties(key: Tensor, values: Tensor) -> Tensor:
    """``[N]``: each value replaced by the mean over all data with the same key."""
    _, tie, count = key.unique(return_inverse=True, return_counts=True)
    total = wide(torch.zeros_like(count)).index_add(0, tie, wide(values))
    return (total / count)[tie]
