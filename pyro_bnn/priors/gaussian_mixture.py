"""Mixtures of Gaussians as priors of weights: fixed ones, and the codebook of a guide as a prior."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_bnn.entry import checks
from pyro_bnn.priors.families import Prior, require_numbers


class CodeMixture(dist.MixtureSameFamily):
    """``pi_0 N(0, slab^2) + sum_k pi_k N(m_k, s_k^2)``, with the codes of a guide as components 1 to K.

    :param codebook: the codebook of these codes; for a guide with the same one the KL divergence is a code length.
    """

    codebook: object = None

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> CodeMixture:
        new: CodeMixture = super().expand(batch_shape, _instance)
        new.codebook = self.codebook
        return new


@dataclass(frozen=True)
class GaussianMixture(Prior):
    """``w_i ~ sum_j pi_j N(m_j, s_j^2)``, independent elements.

    :param locs: m, J numbers.
    :param scales: s, J positive numbers.
    :param weights: pi, J positive numbers, which are normalised to sum to 1; equal by default.
    :raises TypeError: for an element that is not a number.
    :raises ValueError: for numbers out of range, or lists that are empty or of different lengths.
    """

    locs: Sequence[float]
    scales: Sequence[float]
    weights: Sequence[float] | None = None
    is_constant: ClassVar[bool] = True
    has_heavy_tails: ClassVar[bool] = False

    def __post_init__(self) -> None:
        weights = [1.0] * len(self.locs) if self.weights is None else self.weights
        if not len(self.locs) == len(self.scales) == len(weights) > 0:
            raise ValueError(
                f"GaussianMixture: {len(self.locs)} locs, {len(self.scales)} scales and {len(weights)} weights; "
                "expected the same number of each, at least one"
            )
        for name, values in (("scales", self.scales), ("weights", weights)):
            for value in values:
                checks.positive(f"GaussianMixture.{name}", value)
        for value in self.locs:
            checks.finite("GaussianMixture.locs", value)
        total = math.fsum(weights)
        # tuples are hashable, and come back from JSON unchanged
        for name, values in (("locs", self.locs), ("scales", self.scales), ("weights", [w / total for w in weights])):
            object.__setattr__(self, name, tuple(float(v) for v in values))

    def elements(self, center: float | Tensor, like: Tensor, scale: Tensor | None) -> dist.TorchDistribution:
        assert self.weights is not None
        locs, scales, weights = (like.new_tensor(v) for v in (self.locs, self.scales, self.weights))
        return dist.MixtureSameFamily(dist.Categorical(logits=weights.log()), dist.Normal(locs, scales))


@dataclass(frozen=True)
class CodebookPrior(Prior):
    """A prior whose components are the codes of the model's :class:`~pyro_bnn.models.CodebookGuide`.

    Soft weight sharing (Nowlan and Hinton 1992; Ullrich, Meeds and Welling 2017), with a wide Gaussian for weights
    without a code::

        p(w_i) = pi_0 N(w_i; 0, slab^2) + sum_k pi_k N(w_i; m_k, s_k^2),    1 / s_k^2 ~ Gamma(concentration, rate)

    where pi_k is the share of the weights with code k, and pi_0 that of the weights without one. Then KL(q || p) is at
    most ``sum_i KL(r_i || pi)``, in nats, where r_i are the probabilities of the codes for weight i: the length of an
    optimal code for the labels. The prior of the precisions keeps codes from collapsing to points, which the code
    length alone would not penalise. A model with this prior cannot run before the guide is built (RuntimeError).

    :param slab: standard deviation of the component for weights without a code.
    :param concentration, rate: parameters of the prior of the precisions. By default its mode
        ``(concentration - 1) / rate`` corresponds to a standard deviation of 0.01.
    :raises TypeError: for a parameter that is not a number.
    :raises ValueError: for a parameter that is not positive.
    """

    slab: float = 1.0
    concentration: float = 2.0
    rate: float = 1e-4
    has_heavy_tails: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_numbers(self, slab=self.slab, concentration=self.concentration, rate=self.rate)

    def elements(self, center: float | Tensor, like: Tensor, scale: Tensor | None) -> dist.TorchDistribution:
        raise RuntimeError(
            "the prior CodebookPrior is the codebook of a guide: build a CodebookGuide for this model first "
            "(pyro_bnn.models.WeightSharing), or use a fixed prior, such as GaussianMixture(locs, scales)"
        )

    def with_codes(self, log_weights: Tensor, locs: Tensor, scales: Tensor, codebook: object) -> Prior:
        """The prior given the codes of a guide.

        :param log_weights: log pi, ``[K + 1]``, the slab first.
        :param locs, scales: means and standard deviations of the codes, ``[K]``.
        :param codebook: the codebook of these codes.
        """
        locs = torch.cat([locs.new_zeros(1), locs])
        scales = torch.cat([scales.new_full((1,), self.slab), scales])
        components = CodeMixture(dist.Categorical(logits=log_weights), dist.Normal(locs, scales))
        components.codebook = codebook
        return _GivenCodes(components)

    def log_density_of_precisions(self, scales: Tensor) -> Tensor:
        """``log Gamma(s_k^-2; concentration, rate)`` of each code, ``[K]``, in nats."""
        gamma = torch.distributions.Gamma(
            scales.new_full((), self.concentration), scales.new_full((), self.rate), validate_args=False
        )
        return gamma.log_prob(scales**-2)


class _GivenCodes(Prior):
    """A :class:`CodebookPrior` with the codes that a guide has now."""

    has_heavy_tails: ClassVar[bool] = False

    def __init__(self, components: CodeMixture) -> None:
        self.components = components

    def elements(self, center: float | Tensor, like: Tensor, scale: Tensor | None) -> dist.TorchDistribution:
        return self.components
