"""Latent sites: their description for guides, and how a model samples weights given the scales of their priors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_bnn.priors import Prior

#: A Pyro model or guide, with any arguments and any return value.
Program: TypeAlias = Callable[..., object]


@dataclass(frozen=True)
class Site:
    """The description of a latent site that a guide needs.

    :param name: as in a trace.
    :param shape: event shape.
    :param role: ``weight`` and ``factor`` are the random weights, ``bias`` a parameter that each member has its own
        value of and that is not random in a rank-1 guide, ``scale`` a positive hyper-parameter or the noise, ``share``
        a probability.
    :param center: value at which the network equals the one that the user gave (for ``scale`` and ``share``: a typical
        value).
    """

    name: str
    shape: torch.Size
    role: Literal["weight", "factor", "bias", "scale", "share"]
    center: Tensor | float


def sample_scales(prior: Prior, like: Tensor, name: str) -> Tensor | None:
    """Samples the layer's ``<name>_tau``; ``None`` if the prior has none."""
    return pyro.sample(f"{name}_tau", prior.tau(like)) if prior.has_tau else None


def sample_local(prior: Prior, like: Tensor, name: str) -> Tensor | None:
    """Samples the element-wise ``<name>_lambda``, with the shape of the site; ``None`` if the prior has none."""
    if not prior.has_lambda:
        return None
    return pyro.sample(f"{name}_lambda", prior.local(like).expand(like.shape).to_event(like.dim()))


def sample_share(prior: Prior, like: Tensor, name: str) -> tuple[Prior, Tensor | None]:
    """Samples the layer's ``<name>_inclusion``; returns the prior given this value, and the value or ``None``."""
    if not prior.has_inclusion:
        return prior, None
    share = pyro.sample(f"{name}_inclusion", prior.share(like))
    return prior.with_share(share), share


def site_distribution(
    prior: Prior, center: float | Tensor, like: Tensor, tau: Tensor | None, local: Tensor | None
) -> dist.TorchDistribution:
    """The prior of a site with the shape of ``like``, given its scales (whose leading axes are the plates)."""
    scale = local
    if tau is not None:
        tau = tau.reshape(tau.shape + (1,) * like.dim())
        scale = tau if local is None else tau * local
    d = prior.elements(center, like, scale)
    batch = d.batch_shape[: max(0, len(d.batch_shape) + len(d.event_shape) - like.dim())]
    inner = like.dim() - len(d.event_shape)
    return d.expand(batch + like.shape[:inner]).to_event(inner)


class ConstantPrior(dist.Independent):
    """A distribution that never changes and caches its last expansion, as plates expand it at every call.

    For Normals with one mean and one standard deviation, ``log_prob`` sums the squares first, which takes half the
    passes over memory that a sum of log densities takes.
    """

    _expanded: ConstantPrior | None = None

    @cached_property
    def _same_normal(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """``m, -1 / (2 s^2), -n log(s sqrt(2 pi))`` if all elements are N(m, s^2)."""
        base, zeros = self.base_dist, (0,) * (len(self.batch_shape) + len(self.event_shape))
        if not isinstance(base, torch.distributions.Normal) or any((*base.loc.stride(), *base.scale.stride())):
            return None
        m, s = base.loc[zeros], base.scale[zeros]
        n = self.event_shape.numel()
        return m, -0.5 / (s * s), -n * (s.log() + 0.5 * math.log(2 * math.pi))

    def log_prob(self, value: Tensor) -> Tensor:
        if self._same_normal is None:
            general: Tensor = super().log_prob(value)
            return general
        if self._validate_args:
            self._validate_sample(value)
        m, factor, constant = self._same_normal
        squares = F.mse_loss(value, m.expand_as(value), reduction="none")  # keeps no difference for its gradient
        if self.event_shape:
            squares = squares.sum(tuple(range(-len(self.event_shape), 0)))
        result = torch.addcmul(constant, factor, squares)
        return result.expand(torch.broadcast_shapes(result.shape, self.batch_shape))

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> ConstantPrior:
        batch = torch.Size(batch_shape)
        if batch == self.batch_shape:
            return self
        if self._expanded is None or self._expanded.batch_shape != batch:
            elements = self.base_dist.expand(batch + self.event_shape)
            self._expanded = ConstantPrior(elements, self.reinterpreted_batch_ndims)
        return self._expanded
