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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, get_args

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_bnn.entry import checks
from pyro_bnn.priors.families import Prior, location, require_numbers, root_of_inverse_gamma

Group = Literal["weight", "kernel", "input", "output"]
Spike = Literal["normal", "laplace"]


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


class SpikeAndSlabDistribution(dist.TorchDistribution):
    """The density of :class:`SpikeAndSlab` as a Pyro distribution, whose event is one whole weight tensor.

    :param loc: centre of spike and slab.
    :param inclusion: theta, ``[*batch]``.
    :param spike_scale, slab_scale: see :class:`SpikeAndSlab`.
    :param shape: event shape, at least one axis.
    :param group, spike: see :class:`SpikeAndSlab`.
    :param scale: sigma ``[*batch]``, which multiplies both scales; ``None`` for 1.
    :param batch_shape: by default that to which ``inclusion`` and ``scale`` broadcast.
    :raises ValueError: for an empty shape.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = False

    def __init__(
        self,
        loc: float | Tensor,
        inclusion: Tensor,
        spike_scale: float,
        slab_scale: float,
        shape: torch.Size,
        group: Group = "weight",
        spike: Spike = "normal",
        scale: Tensor | None = None,
        *,
        batch_shape: torch.Size | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if not shape:
            raise ValueError("shape=(): expected the shape of a weight with at least one axis")
        self.loc, self.inclusion, self.scale = loc, inclusion, scale
        self.spike_scale, self.slab_scale, self.group, self.spike = spike_scale, slab_scale, group, spike
        batch = torch.broadcast_shapes(inclusion.shape, () if scale is None else scale.shape)
        kept = {"weight": range(len(shape)), "kernel": range(min(2, len(shape))), "input": (1,), "output": (0,)}[group]
        #: the axes of an event that are summed over within a group, and the shape of the groups
        self.axes = tuple(axis - len(shape) for axis in range(len(shape)) if axis not in kept)
        self.groups = torch.Size(shape[axis] for axis in kept)
        self.group_size = shape.numel() // max(1, self.groups.numel())
        super().__init__(batch if batch_shape is None else batch_shape, shape, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, len(self.event_shape))

    def at(self, inclusion: Tensor, scale: Tensor | None) -> SpikeAndSlabDistribution:
        """The same groups with another inclusion probability and scale."""
        parts = (self.spike_scale, self.slab_scale, self.event_shape, self.group, self.spike)
        return SpikeAndSlabDistribution(self.loc, inclusion, *parts, scale, validate_args=False)

    def of_one_group(self) -> SpikeAndSlabDistribution:
        """The density of ``w_g - loc`` for a single group, whose event has length 1 along the axes of the groups."""
        event = self.event_shape
        shape = torch.Size(n if axis - len(event) in self.axes else 1 for axis, n in enumerate(event))
        parts = (self.spike_scale, self.slab_scale, shape, self.group, self.spike, self.scale)
        return SpikeAndSlabDistribution(0.0, self.inclusion, *parts, validate_args=False)

    def one_group(self, index: int) -> tuple[slice[int | None], ...]:
        """Where the weights of a group are in an event, as a view; groups are counted along the flat ``groups``."""
        kept = iter(np.unravel_index(index, self.groups))
        axes = range(-len(self.event_shape), 0)
        return tuple(slice(None) if axis in self.axes else slice(at := int(next(kept)), at + 1) for axis in axes)

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> SpikeAndSlabDistribution:
        parts = (self.spike_scale, self.slab_scale, self.event_shape, self.group, self.spike, self.scale)
        return SpikeAndSlabDistribution(self.loc, self.inclusion, *parts, batch_shape=torch.Size(batch_shape))

    # Below, values of groups keep all axes of the event, with length 1 for those within a group: they broadcast.

    def _per_group(self, value: Tensor) -> Tensor:
        """``[*batch] -> [*batch, 1 ...]``."""
        return value.reshape(value.shape + (1,) * len(self.event_shape))

    @cached_property
    def _scales(self) -> tuple[Tensor, Tensor]:
        """Scales of spike and slab."""
        scale = self._per_group(self.inclusion.new_ones(()) if self.scale is None else self.scale)
        return scale * self.spike_scale, scale * self.slab_scale

    def _moved(self, value: Tensor) -> Tensor:
        return value - self.loc if isinstance(self.loc, Tensor) or self.loc else value

    def _sum(self, value: Tensor) -> Tensor:
        return value.sum(self.axes, keepdim=True) if self.axes else value

    def _log_densities(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Log densities of every group under the slab and under the spike."""
        s0, s1 = self._scales
        moved, n, root = self._moved(value), self.group_size, 0.5 * math.log(2 * math.pi)
        squares = self._sum(moved.square())
        slab = squares * (-0.5 / s1**2) - n * (s1.log() + root)
        if self.spike == "normal":
            return slab, squares * (-0.5 / s0**2) - n * (s0.log() + root)
        return slab, self._sum(moved.abs()) / -s0 - n * (2 * s0).log()

    @cached_property
    def _log_shares(self) -> tuple[Tensor, Tensor]:
        """log(theta) and log(1 - theta)."""
        limits = torch.finfo(self.inclusion.dtype)
        share = self.inclusion.clamp(limits.tiny, 1 - limits.eps)
        return self._per_group(share.log()), self._per_group((-share).log1p())

    @cached_property
    def _odds(self) -> tuple[Tensor, Tensor]:
        """Log odds of a group with all weights at the centre, and their increase for each unit of squared distance."""
        s0, s1 = self._scales
        prior_odds = self._log_shares[0] - self._log_shares[1]
        if self.spike == "normal":
            return prior_odds + self.group_size * (s0 / s1).log(), 0.5 / s0**2 - 0.5 / s1**2
        return prior_odds + self.group_size * (2 * s0 / (s1 * math.sqrt(2 * math.pi))).log(), -0.5 / s1**2

    def _log_odds(self, value: Tensor) -> Tensor:
        constant, slope = self._odds
        moved = self._moved(value)
        odds = torch.addcmul(constant, self._sum(moved.square()), slope)
        return odds if self.spike == "normal" else odds + self._sum(moved.abs()) / self._scales[0]

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        included, excluded = self._log_shares
        slab, spike = self._log_densities(value)
        # the larger term plus the other's contribution: a difference of the two would lose precision
        other = (-self._log_odds(value).abs()).exp().log1p()
        terms = torch.maximum(included + slab, excluded + spike) + other
        result = terms.sum(tuple(range(-len(self.event_shape), 0)))
        return result.expand(torch.broadcast_shapes(result.shape, self.batch_shape))

    def log_odds(self, value: Tensor) -> Tensor:
        """``log P(included | w) - log P(excluded | w)`` of every group, ``[*batch, *groups]``, in nats."""
        odds = self._log_odds(value)
        return odds.squeeze(self.axes) if self.axes else odds

    def mean_square(self, value: Tensor) -> Tensor:
        """Mean of ``(w - loc)^2`` over every group, ``[*batch, *groups]``."""
        squares = self._sum(self._moved(value).square()) / self.group_size
        return squares.squeeze(self.axes) if self.axes else squares

    def within_groups(self, value: Tensor) -> Tensor:
        """``[*batch, *groups]`` with axes of length 1 for those within a group, so that it broadcasts to weights."""
        lead = value.shape[: value.dim() - len(self.groups)]
        event = self.event_shape
        return value.reshape(*lead, *(1 if a - len(event) in self.axes else n for a, n in enumerate(event)))

    def add_force_(self, out: Tensor, value: Tensor, included: Tensor) -> None:
        """Adds ``-d/dw log p(w | indicators)`` with the indicators replaced by probabilities ``[*batch, *groups]``.

        With :meth:`log_odds` of these weights it is minus the gradient of :meth:`log_prob`, by Fisher's identity.
        """
        p, moved = self.within_groups(included), self._moved(value)
        slab, spike = self._pulls
        if self.spike == "normal":
            out.addcmul_(moved, torch.lerp(spike, slab, p))
        else:
            out.addcmul_(moved, p * slab).addcmul_(moved.sign(), (1 - p) * spike)

    def scale_statistics(self, value: Tensor, included: Tensor) -> tuple[Tensor, Tensor]:
        """``(A, B)`` of the density as a function of sigma.

        For n weights it is ``sigma^-n exp(-A / (2 sigma^2) - B / sigma)`` times a constant. A is the sum of squares, B
        that of the absolute values under a Laplace spike, each weighted by the probability of its group (``included``,
        ``[*batch, *groups]``) and by its scale at sigma = 1. Both are ``[*batch]``.
        """
        p, moved = self.within_groups(included), self._moved(value)
        event = tuple(range(-len(self.event_shape), 0))
        of_slab, squares = self.slab_scale**-2, moved.square()
        if self.spike == "normal":
            weighed = (p * of_slab + (1 - p) * self.spike_scale**-2) * squares
            return weighed.sum(event), weighed.new_zeros(())
        return (p * of_slab * squares).sum(event), ((1 - p) * moved.abs()).sum(event) / self.spike_scale

    @cached_property
    def _pulls(self) -> tuple[Tensor, Tensor]:
        """Precision of the slab, and precision of a Normal spike or inverse scale of a Laplace spike."""
        s0, s1 = self._scales
        return s1**-2, s0**-2 if self.spike == "normal" else 1 / s0

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        shape = torch.Size(sample_shape) + self.batch_shape
        s0, s1 = self._scales
        with torch.no_grad():
            share = self.inclusion.reshape(self.inclusion.shape + (1,) * len(self.groups)).expand(shape + self.groups)
            included = self.within_groups(torch.bernoulli(share))
            normal = s0.new_empty(shape + self.event_shape).normal_()
            narrow = normal
            if self.spike == "laplace":
                narrow = dist.Laplace(s0.new_zeros(()), s0.new_ones(())).sample(normal.shape)
            return torch.where(included.bool(), normal * s1, narrow * s0) + self.loc

    @property
    def mean(self) -> Tensor:
        return location(None, self.loc, self.inclusion).expand(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        s0, s1 = self._scales
        share = self._per_group(self.inclusion)
        narrow = s0**2 if self.spike == "normal" else 2 * s0**2
        return (share * s1**2 + (1 - share) * narrow).expand(self.batch_shape + self.event_shape)
