"""What a posterior says about new data: one network output for every draw, member and sample."""

from __future__ import annotations

from functools import cached_property

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_bnn.likelihoods import Bernoulli, Categorical, Likelihood, Poisson
from pyro_bnn.randomness import seeded

_BISECTIONS = 60  # halvings of an interval: beyond the resolution of float64


class Prediction:
    """The posterior predictive distribution at N inputs.

    :param outputs: network outputs, ``[draws, members, N, *output]``.
    :param likelihood: what they mean; ``None`` for raw function values.
    :param noise: learned noise scale, ``[draws, members]``.
    """

    def __init__(self, outputs: Tensor, likelihood: Likelihood | None, noise: Tensor | None = None) -> None:
        self.outputs, self.likelihood, self.noise = outputs, likelihood, noise

    def _distribution(self, y: Tensor | None = None) -> dist.TorchDistribution:
        if self.likelihood is None:
            raise TypeError("these are values of a function without a likelihood: there is no distribution of y")
        noise = None if self.noise is None else self.noise.unsqueeze(-1)
        return self.likelihood.given(self.outputs, y, noise, lead=3)

    @cached_property
    def per_member(self) -> Tensor:
        """``[draws, members, N, ...]``: class probabilities, or the mean of y, of every member."""
        if self.likelihood is None:
            return self.outputs
        d = _base(self._distribution())
        return d.probs if isinstance(self.likelihood, (Categorical, Bernoulli)) else d.mean

    @property
    def mean(self) -> Tensor:
        """``[N, ...]``: the members' average; of probabilities in classification, never of logits."""
        return self.per_member.mean((0, 1))

    @property
    def probs(self) -> Tensor:
        """``[N, ..., C]`` class probabilities (for Bernoulli: of 1).

        :raises TypeError: unless the likelihood is a classification.
        """
        self._require(classification=True, what="probs")
        return self.mean

    @property
    def entropy(self) -> Tensor:
        """``[N, ...]``: entropy of the averaged probabilities, in nats."""
        self._require(classification=True, what="entropy")
        return self._entropy(self.mean)

    @property
    def aleatoric(self) -> Tensor:
        """``[N, ...]``: expected entropy of a member, in nats; for regression and counts the expected variance of y."""
        if self._classifies:
            return self._entropy(self.per_member).mean((0, 1))
        return _base(self._distribution()).variance.mean((0, 1))

    @property
    def epistemic(self) -> Tensor:
        """``[N, ...]``: entropy minus expected entropy; for regression and counts the variance of members' means."""
        if self._classifies:
            return (self.entropy - self.aleatoric).clamp_min(0)
        return self.per_member.flatten(0, 1).var(0, correction=0)

    @property
    def mutual_information(self) -> Tensor:
        """``[N, ...]``: I(y; weights), in nats.

        :raises TypeError: unless the likelihood is a classification.
        """
        self._require(classification=True, what="mutual_information")
        return self.epistemic

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Bounds ``[N, ...]`` of the central interval that holds y with probability ``level``.

        They are quantiles of the mixture of all members' distributions (for raw function values, of the members).

        :raises TypeError: for classification.
        :raises ValueError: unless ``0 < level < 1``.
        """
        if not 0 < level < 1:
            raise ValueError(f"level={level!r}: expected a probability strictly between 0 and 1")
        if self.likelihood is None:
            values = self.outputs.flatten(0, 1)
            return values.quantile((1 - level) / 2, 0), values.quantile((1 + level) / 2, 0)
        self._require(classification=False, what="interval")
        return self.quantile((1 - level) / 2), self.quantile((1 + level) / 2)

    def quantile(self, q: float) -> Tensor:
        """``[N, ...]``: the q-quantile of the mixture, by bisection of its distribution function."""
        d = _base(self._distribution())
        spread = 40 * d.variance.sqrt() + 1
        low, high = (d.mean - spread).amin((0, 1)), (d.mean + spread).amax((0, 1))
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            below = self.cdf(middle).mean((0, 1)) < q
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return high.floor().clamp_min(0) if isinstance(self.likelihood, Poisson) else high

    def cdf(self, y: Tensor) -> Tensor:
        """``[draws, members, N, ...]``: probability of values up to y ``[N, ...]``, under every member.

        :raises TypeError: for classification, and for values of a function.
        """
        self._require(classification=False, what="cdf")
        d = _base(self._distribution())
        if isinstance(self.likelihood, Poisson):
            return torch.special.gammaincc(y.floor().clamp_min(0) + 1, d.rate) * (y >= 0)
        return d.cdf(y)

    def log_prob(self, y: Tensor) -> Tensor:
        """``[draws, members, N]``: log density of y under every member, in nats."""
        return self._distribution(y).log_prob(y)

    def sample(self, seed: int | None = None) -> Tensor:
        """``[draws, members, N, ...]``: one y from every member."""
        with seeded(self.outputs.device, seed):
            return self._distribution().sample()

    @property
    def _classifies(self) -> bool:
        return isinstance(self.likelihood, (Categorical, Bernoulli))

    def _require(self, classification: bool, what: str) -> None:
        if self._classifies != classification:
            kind = type(self.likelihood).__name__ if self.likelihood is not None else "raw function values"
            other = (
                "use .mean, .interval(level), .aleatoric and .epistemic"
                if classification
                else "use .probs and .entropy"
            )
            raise TypeError(f"{what} is not defined for {kind}; {other}")

    def _entropy(self, p: Tensor) -> Tensor:
        if isinstance(self.likelihood, Bernoulli):
            return -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p))
        return -torch.xlogy(p, p).sum(-1)


def _base(d: dist.TorchDistribution) -> dist.TorchDistribution:
    return d.base_dist if isinstance(d, torch.distributions.Independent) else d
