"""Scores of predictive distributions of numbers: the CRPS, and the coverage and width of intervals."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_bnn.diagnostics.scoring.precision import wide

if TYPE_CHECKING:
    from pyro_bnn.posterior import Prediction

#: most numbers held in memory at once
_MAX_ELEMENTS = 2**22
#: number of counts up to which the score of a Poisson mixture is summed; beyond it a Normal mixture approximates it
_MOST_COUNTS = 2**12


def crps(prediction: Prediction, y: Tensor) -> Tensor:
    r"""The continuous ranked probability score of each y, ``[N, ...]``, in the unit of y; smaller is better.

        CRPS(F, y) = integral (F(z) - [y <= z])^2 dz = E|Y - y| - E|Y - Y'| / 2,    Y, Y' ~ F independent

    where F is the mixture of the distributions of all draws and members. It is 0 if the prediction is certain of y, and
    |y - m| if it is certain of another value m.

    A Gaussian mixture has a closed form over all pairs of components. A Poisson mixture is summed over counts, with
    tails that add less than 1e-9. If it spreads over more than 4,096 counts, which takes rates of about 1e5, it is
    approximated by a Normal mixture with the same means and variances, with an error below 0.2 counts.

    :param prediction: what ``Posterior.predict`` returns, with a Gaussian or Poisson likelihood.
    :param y: targets ``[N, ...]``.
    :raises TypeError: when the prediction has no likelihood, or one whose distributions are neither Normal nor Poisson.
    :raises ValueError: when y does not fit the prediction, or the prediction is not finite.

    Source: Gneiting and Raftery (2007), equations 20 and 21; Grimit et al. (2006), equations 5 and 6.
    """
    d = _components(prediction)
    if not isinstance(d, (torch.distributions.Normal, torch.distributions.Poisson)):
        raise TypeError(
            f"crps takes mixtures of Normal or of Poisson distributions, but {type(prediction.likelihood).__name__} "
            f"gives {type(d).__name__}; use nll, coverage and width"
        )
    shape = d.batch_shape[2:]
    if len(y) != shape[0] or y.numel() != shape.numel():
        raise ValueError(f"y has shape {tuple(y.shape)}; the prediction is for targets of shape {tuple(shape)}")
    if prediction.likelihood is not None:
        prediction.likelihood.check(y, prediction.outputs[0, 0])
    mean, scale = (moment.flatten(0, 1).flatten(1) for moment in (d.mean, d.stddev))
    for name, values in (("mean", mean), ("standard deviation", scale)):
        if not bool(values.isfinite().all()):
            raise ValueError(f"the predicted {name} holds NaN or infinite values: check for parameters that diverged")
    mixture = _gaussian_mixture if isinstance(d, torch.distributions.Normal) else _poisson_mixture
    rows = max(1, _MAX_ELEMENTS // len(mean))
    parts = zip(mean.split(rows, 1), scale.split(rows, 1), y.flatten().split(rows), strict=True)
    score = torch.cat([mixture(wide(m), wide(s), wide(target)) for m, s, target in parts])
    return score.reshape(shape).to(d.mean.dtype)


def interval_coverage(interval: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
    """Whether each y lies in its interval, ends included: ``[N, ...]``, 1 if it does and 0 otherwise.

    :param interval: lower and upper bounds, ``[N, ...]`` each, such as ``Prediction.interval`` returns.
    :param y: targets ``[N, ...]``.
    """
    low, high = interval
    y = y.reshape(low.shape).to(low.dtype)
    return ((low <= y) & (y <= high)).to(low.dtype)


def interval_width(interval: tuple[Tensor, Tensor]) -> Tensor:
    """The width of each interval, upper minus lower bound: ``[N, ...]``, in the unit of y.

    :param interval: lower and upper bounds, ``[N, ...]`` each, such as ``Prediction.interval`` returns.
    """
    low, high = interval
    return high - low


def _components(prediction: Prediction) -> torch.distributions.Distribution:
    """The distributions of y under all draws and members, with batch shape ``[draws, members, N, ...]``."""
    if prediction.likelihood is None:
        raise TypeError("the prediction has no likelihood, so there is no distribution of y to score: give one")
    noise = None if prediction.noise is None else prediction.noise.unsqueeze(-1)
    d = prediction.likelihood.given(prediction.outputs, None, noise, lead=3)
    return d.base_dist if isinstance(d, torch.distributions.Independent) else d


def _gaussian_mixture(mean: Tensor, scale: Tensor, y: Tensor) -> Tensor:
    """(1/F) sum_i A(y - m_i, s_i^2) - 1/(2 F^2) sum_ij A(m_i - m_j, s_i^2 + s_j^2), for mean and scale ``[F, N]``."""
    functions, variance = len(mean), scale.square()
    step = max(1, _MAX_ELEMENTS // mean.numel())
    spread = torch.zeros_like(y)
    for m, v in zip(mean.split(step), variance.split(step), strict=True):
        spread += _absolute(m[:, None] - mean, v[:, None] + variance).sum((0, 1))
    return _absolute(y - mean, variance).mean(0) - spread / (2 * functions**2)


def _absolute(mean: Tensor, variance: Tensor) -> Tensor:
    """A(m, v) = E|X| for X ~ N(m, v): 2 sqrt(v) phi(m / sqrt(v)) + m (2 Phi(m / sqrt(v)) - 1)."""
    z = mean / variance.sqrt().clamp_min(torch.finfo(variance.dtype).tiny)
    return (2 * variance / math.pi).sqrt() * (-z.square() / 2).exp() + mean * torch.erf(z / math.sqrt(2))


def _poisson_mixture(rate: Tensor, scale: Tensor, y: Tensor) -> Tensor:
    """sum_{k >= 0} (F(k) - [y <= k])^2, with F(k) the mean over members of P(X <= k), for their rates ``[F, N]``.

    Below the range of the mixture F is 0, and above it F is 1: every count between the range and y adds 1.
    """
    # By Chernoff bounds each tail outside the range holds less than exp(-18), and the score uses its square.
    low = (rate - 7 * scale).amin(0).floor().clamp_min(0)
    counts = (rate + 7 * scale + 14).amax(0).ceil() - low
    if bool((far := counts > _MOST_COUNTS).any()):
        score = torch.empty_like(y)
        score[far] = _gaussian_mixture(rate[:, far], scale[:, far], y[far])
        score[~far] = _poisson_mixture(rate[:, ~far], scale[:, ~far], y[~far])
        return score
    if len(y) == 0:
        return y
    most = int(counts.max())
    score = (low - y).clamp_min(0) + (y - low - most).clamp_min(0)
    below = torch.zeros_like(y)
    for offsets in torch.arange(most, device=y.device).split(max(1, _MAX_ELEMENTS // rate.numel())):
        k = low + offsets[:, None]
        mass = (torch.xlogy(k, rate[:, None]) - rate[:, None] - (k + 1).lgamma()).exp().mean(0)
        cdf = below + mass.cumsum(0)
        score += (cdf - wide(y <= k)).square().sum(0)
        below = cdf[-1]
    return score
