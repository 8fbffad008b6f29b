"""The density of groups of weights under a mixture of spike and slab, with the indicator of every group summed out.

:mod:`pyro_bnn.priors.spike_and_slab` has the equations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar, Literal

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_bnn.priors.families import location

#: the weights that are included together, and the family of the spike
Group = Literal["weight", "kernel", "input", "output"]
Spike = Literal["normal", "laplace"]


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
