"""Spike-and-slab priors for groups of weights, with the indicator of every group summed out.

A group g of G weights comes from the slab with probability theta, else from the spike (George and McCulloch 1993; for
groups Xu and Ghosh 2015; under EM Rockova and George 2014)::

    p(w_g) = theta prod_i N(w_gi; loc, v1) + (1 - theta) prod_i spike(w_gi),    spike = N(loc, v0) or Laplace(loc, s0)

Given w, the probability that the group is included (from the slab) is, with ss_g = sum_i (w_gi - loc)^2 and a Normal
spike, the sigmoid of its log odds ``log(theta / (1 - theta)) + (G / 2) log(v0 / v1) + ss_g (1 / v0 - 1 / v1) / 2``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, get_args

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_bnn.entry import checks
from pyro_bnn.priors.families import Prior, require_numbers, root_of_inverse_gamma
from pyro_bnn.priors.spike_and_slab_density import Group, Spike, SpikeAndSlabDistribution


@dataclass(frozen=True)
class BetaHyperprior:
    """The parameters of ``Beta(a, b)`` over a probability; with ``a, b > 1`` the mode is strictly between 0 and 1.

    :raises TypeError: for a parameter that is not a number.
    :raises ValueError: for a parameter that is not positive.
    """

    a: float
    b: float

    def __post_init__(self) -> None:
        require_numbers(self, a=self.a, b=self.b)


@dataclass(frozen=True)
class InverseGammaHyperprior:
    """The parameters of ``InverseGamma(concentration, rate)`` over a variance.

    :raises TypeError: for a parameter that is not a number.
    :raises ValueError: for a parameter that is not positive.
    """

    concentration: float
    rate: float

    def __post_init__(self) -> None:
        require_numbers(self, concentration=self.concentration, rate=self.rate)


Inclusion = float | BetaHyperprior | torch.distributions.Beta | Mapping[str, float] | Tensor
VariancePrior = InverseGammaHyperprior | dist.TorchDistribution | Mapping[str, float] | None


@dataclass(frozen=True)
class SpikeAndSlab(Prior):
    """A spike-and-slab prior of groups of weights: each group comes from a wide slab or a narrow spike::

        p(w_g) = theta prod_i N(w_gi; loc, slab_scale^2) + (1 - theta) prod_i spike(w_gi)

    :param spike_scale: standard deviation of a Normal spike, or the scale of a Laplace spike.
    :param slab_scale: standard deviation of the slab.
    :param inclusion: theta, or a ``pyro.distributions.Beta(a, b)`` over it (kept as :class:`BetaHyperprior`), which
        makes ``<name>_inclusion`` a latent site.
    :param group: the weights that are included or excluded together: each ``"weight"``, each ``"kernel"`` (all axes
        after the first two; in a matrix each weight), all weights of an ``"input"`` (axis 1 of the stored weight) or of
        an ``"output"`` (axis 0).
    :param spike: ``"normal"`` or ``"laplace"``, independent within a group. A Laplace spike has heavier tails than the
        slab: weights beyond about ``2 slab_scale^2 / spike_scale`` are assigned to the spike again.
    :param variance_prior: ``pyro.distributions.InverseGamma(concentration, rate)`` over sigma^2 (kept as
        :class:`InverseGammaHyperprior`), a factor on both variances. It makes the square root ``<name>_tau`` a latent
        site. By default the factor is 1.
    :param loc: the centre of spike and slab; ``None`` for the one that the model sets: 1 for a factor, 0 for a weight.
    :raises TypeError: for a parameter that is not a number.
    :raises ValueError: for numbers out of range, unknown names, a spike that is not narrower than the slab, or a
        hyperprior of another family or with more than one number for each parameter.
    """

    spike_scale: float = 0.01
    slab_scale: float = 1.0
    inclusion: Inclusion = BetaHyperprior(2.0, 2.0)
    group: Group = "weight"
    spike: Spike = "normal"
    variance_prior: VariancePrior = None
    loc: float | None = None
    has_heavy_tails: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_numbers(self, spike_scale=self.spike_scale, slab_scale=self.slab_scale)
        if self.spike_scale >= self.slab_scale:
            raise ValueError(
                f"SpikeAndSlab(spike_scale={self.spike_scale}, slab_scale={self.slab_scale}): the spike must be "
                "narrower than the slab"
            )
        for name, value, known in (("group", self.group, Group), ("spike", self.spike, Spike)):
            if value not in get_args(known):
                raise ValueError(f"SpikeAndSlab({name}={value!r}): expected one of {', '.join(get_args(known))}")
        # the fields must be describable as JSON, so distributions and mappings are converted
        object.__setattr__(self, "inclusion", _inclusion(self.inclusion))
        object.__setattr__(self, "variance_prior", _variance_prior(self.variance_prior))
        object.__setattr__(self, "has_tau", self.variance_prior is not None)
        object.__setattr__(self, "has_inclusion", isinstance(self.inclusion, BetaHyperprior))

    @classmethod
    def for_inputs(cls, num_inputs: int, num_data: int, expected: float = 2.0) -> SpikeAndSlab:
        """The prior of a first layer whose inputs are to be selected: columns, with scales that the data give::

            slab 1,   spike 1 / (2 sqrt(num_data)),   theta = expected / num_inputs

        A column of H weights in the spike changes y by about ``spike sqrt(H) s``, with s the standard deviation of the
        weights of the next layer. Next to ``Normal(0, 1 / sqrt(H))`` there, that is half of ``1 / sqrt(num_data)``, the
        smallest effect that the rows can show: a spike that is wider holds effects that are real, and what is included
        then says little. Inputs and y are assumed to have mean 0 and standard deviation 1.

        :param num_inputs: number of inputs of the layer.
        :param num_data: number N of rows.
        :param expected: how many inputs are expected to matter, above 0 and below ``num_inputs``.
        :raises ValueError: for numbers out of range.
        """
        num_inputs, num_data = checks.count("num_inputs", num_inputs, 2), checks.count("num_data", num_data)
        if not 0 < checks.finite("expected", expected) < num_inputs:
            raise ValueError(
                f"expected={expected!r}: expected a number of inputs above 0 and below num_inputs={num_inputs}"
            )
        return cls(0.5 / math.sqrt(num_data), 1.0, expected / num_inputs, "input")

    @classmethod
    def from_weight_decay(
        cls,
        num_data: int,
        spike: float,
        slab: float,
        inclusion: Inclusion = 0.5,
        group: Group = "weight",
    ) -> SpikeAndSlab:
        """The prior whose components pull a weight as hard as the weight decays with which a network trains well::

            spike_scale = 1 / sqrt(num_data spike),    slab_scale = 1 / sqrt(num_data slab)

        Minus the log density of N(0, s^2), over N, is ``w^2 / (2 N s^2)``: the weight decay ``1 / (N s^2)`` of the mean
        loss. A scale that looks wide may pull hard: with 50,000 rows a spike of .01 is a weight decay of .2, under
        which no network keeps its accuracy, and a weight decay of 5e-4 is a scale of .2.

        :param num_data: number N of rows.
        :param spike, slab: weight decays of the mean loss per row, that of the spike the larger; 1e-3 and 1e-4, say.
        :param inclusion, group: see :class:`SpikeAndSlab`.
        :raises ValueError: for numbers out of range.
        """
        num_data = checks.count("num_data", num_data)
        spike, slab = checks.positive("spike", spike), checks.positive("slab", slab)
        if spike <= slab:
            raise ValueError(
                f"spike={spike}, slab={slab}: expected the weight decay of the spike to be the larger, because its "
                "scale is the smaller"
            )
        return cls(1 / math.sqrt(num_data * spike), 1 / math.sqrt(num_data * slab), inclusion, group)

    def threshold(self, group_size: int) -> float:
        """The norm ``T = |w_g - loc|`` of a group above which the slab is the likelier component, with a Normal spike::

            T^2 = 2 (G log(slab / spike) - log(theta / (1 - theta))) / (1 / spike^2 - 1 / slab^2)

        An inclusion probability says how often the norm is above T, not whether the group matters. theta is
        the mean of its prior where it is learned, sigma is 1, and T is 0 where the slab is the likelier at the centre.

        :param group_size: G, the number of weights in a group: of an input the number of units in the layer.
        :raises ValueError: for a Laplace spike, under which the threshold is no norm.
        """
        if self.spike != "normal":
            raise ValueError("threshold() is for spike='normal': under a Laplace spike the threshold is no norm")
        group_size = checks.count("group_size", group_size)
        share = self.typical_share() if isinstance(self.inclusion, BetaHyperprior) else float(self._fixed_inclusion())
        odds = math.log(share / (1 - share)) - group_size * math.log(self.slab_scale / self.spike_scale)
        return math.sqrt(max(0.0, -2 * odds) / (self.spike_scale**-2 - self.slab_scale**-2))

    def require_fit(self, name: str, like: Tensor) -> None:
        if not like.dim():
            raise ValueError(f"SpikeAndSlab is for weights with at least one axis, {name!r} is a single number")
        if self.group == "input" and like.dim() < 2:
            raise ValueError(
                f"SpikeAndSlab(group='input') is for weights with at least two axes, {name!r} has the shape "
                f"{tuple(like.shape)}: give it another prior, in a mapping {{pattern: prior}}"
            )

    def tau(self, like: Tensor) -> dist.TorchDistribution:
        assert isinstance(self.variance_prior, InverseGammaHyperprior)
        return root_of_inverse_gamma(like, self.variance_prior.concentration, self.variance_prior.rate)

    def typical_tau(self) -> float:
        assert isinstance(self.variance_prior, InverseGammaHyperprior)
        return math.sqrt(self.variance_prior.rate / self.variance_prior.concentration)

    def share(self, like: Tensor) -> dist.TorchDistribution:
        assert isinstance(self.inclusion, BetaHyperprior)
        return dist.Beta(like.new_full((), self.inclusion.a), like.new_full((), self.inclusion.b))

    def typical_share(self) -> float:
        assert isinstance(self.inclusion, BetaHyperprior)
        return self.inclusion.a / (self.inclusion.a + self.inclusion.b)

    def with_share(self, share: Tensor) -> SpikeAndSlab:
        given = copy.copy(self)
        object.__setattr__(given, "inclusion", share)
        return given

    def _fixed_inclusion(self) -> float:
        assert isinstance(self.inclusion, float), "the share of the slab is a site of its own: see with_share()"
        return self.inclusion

    def elements(self, center: float | Tensor, like: Tensor, scale: Tensor | None) -> SpikeAndSlabDistribution:
        if scale is not None:  # it has the axes to multiply elements; here one scale applies to groups
            scale = scale.reshape(scale.shape[: scale.dim() - like.dim()])
        share = self.inclusion if isinstance(self.inclusion, Tensor) else like.new_full((), self._fixed_inclusion())
        loc = center if self.loc is None else self.loc
        return SpikeAndSlabDistribution(
            loc, share, self.spike_scale, self.slab_scale, like.shape, self.group, self.spike, scale
        )


def _inclusion(given: Inclusion) -> float | BetaHyperprior:
    if isinstance(given, torch.distributions.Beta):
        return BetaHyperprior(_number(given.concentration1), _number(given.concentration0))
    if isinstance(given, Mapping):
        return BetaHyperprior(**given)
    if isinstance(given, BetaHyperprior) or isinstance(given, (int, float)) and checks.share("inclusion", given):
        return given
    raise ValueError(
        f"SpikeAndSlab(inclusion={given!r}): expected a number in (0, 1), or pyro.distributions.Beta(a, b)"
    )


def _variance_prior(given: VariancePrior) -> InverseGammaHyperprior | None:
    if isinstance(given, (dist.InverseGamma, torch.distributions.InverseGamma)):
        return InverseGammaHyperprior(_number(given.concentration), _number(given.rate))
    if isinstance(given, Mapping):
        return InverseGammaHyperprior(**given)
    if given is None or isinstance(given, InverseGammaHyperprior):
        return given
    raise ValueError(
        f"SpikeAndSlab(variance_prior={given!r}): expected pyro.distributions.InverseGamma(concentration, rate) over "
        "sigma^2, or None"
    )


def _number(value: Tensor) -> float:
    if value.numel() != 1:
        raise ValueError(
            f"SpikeAndSlab takes one number for each parameter of a hyperprior, got a tensor of shape "
            f"{tuple(value.shape)}: for different hyperpriors, use a mapping {{pattern: prior}}"
        )
    return float(value)
