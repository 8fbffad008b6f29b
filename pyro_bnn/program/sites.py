"""Latent sites: their description for guides, and how a model samples weights given the scales of their priors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_bnn.priors import Normal, Prior
from pyro_bnn.program.positive import LARGE, in_cache
from pyro_bnn.program.statements import sample

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


def sample_local(prior: Prior, like: Tensor, name: str) -> Tensor | None:
    """Samples the element-wise ``<name>_lambda``, with the shape of the site; ``None`` if the prior has none."""
    if not prior.has_lambda:
        return None
    return sample(f"{name}_lambda", prior.local(like).expand(like.shape).to_event(like.dim()))


def sample_share(prior: Prior, like: Tensor, name: str) -> tuple[Prior, Tensor | None]:
    """Samples the layer's ``<name>_inclusion``; returns the prior given this value, and the value or ``None``."""
    if not prior.has_inclusion:
        return prior, None
    share = sample(f"{name}_inclusion", prior.share(like))
    return prior.with_share(share), share


def site_distribution(
    prior: Prior, center: float | Tensor, like: Tensor, tau: Tensor | None, local: Tensor | None
) -> dist.TorchDistribution:
    """The prior of a site with the shape of ``like``, given its scales (whose leading axes are the plates)."""
    scale = local
    if tau is not None:
        tau = tau.reshape(tau.shape + (1,) * like.dim())
        scale = tau if local is None else tau * local
    elements = prior.elements(center, like, scale)
    if len(elements.event_shape) == like.dim():
        return elements
    return SitePrior(elements, like.shape, {} if isinstance(center, Tensor) else prior.constants(center))


def log_density(prior: Prior, values: Sequence[Tensor]) -> Tensor:
    """Sum of the log densities of all elements of some tensors, under a prior without latent scales.

    For ``N(m, s^2)`` it is ``-sum (w - m)^2 / (2 s^2) - n log(s sqrt(2 pi))``, of which no element is kept.
    """
    if not isinstance(prior, Normal):
        return torch.stack([prior.elements(0.0, v.detach(), None).log_prob(v).sum() for v in values]).sum()
    m = prior.loc or 0.0
    squares = torch.stack([_squares_from(value, m) for value in values]).sum()
    count = sum(value.numel() for value in values)
    return squares * (-0.5 / prior.scale**2) - count * math.log(prior.scale * math.sqrt(2 * math.pi))


def _squares_from(value: Tensor, m: float) -> Tensor:
    """``sum (w - m)^2``."""
    if value.numel() < LARGE:
        return F.mse_loss(value, value.new_full((), m).expand_as(value), reduction="sum")
    squares: Tensor = _SquaresFrom.apply(value, m)
    return squares


class _SquaresFrom(torch.autograd.Function):
    """``sum (w - m)^2`` of a large tensor, with one pass over memory in each direction."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, m: float) -> Tensor:
        total = value.new_zeros(())
        for part in in_cache(value.reshape(-1)):
            difference = part - m if m else part
            total = total + torch.dot(difference, difference)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        value, ctx.m = inputs
        ctx.save_for_backward(value)
        ctx.save_for_forward(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (value,) = ctx.saved_tensors
        return (value - ctx.m if ctx.m else value) * (2 * grad), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: object) -> Tensor:
        (value,) = ctx.saved_tensors
        return 2 * ((value - ctx.m) * tangent).sum()


class SitePrior(dist.Independent):
    """The prior of one site given its scales: its elements, or groups of them, are independent.

    The parameters stay as small as they are given. ``base_dist``, which has one for each element, is built where
    something asks for it, and the last expansion is kept, as plates expand a prior at every call.

    For Normals with one mean and one standard deviation, ``log_prob`` sums the squares first, which takes half the
    passes over memory that a sum of log densities takes.

    :param elements: the distribution of an element or group, with parameters that broadcast to ``[*batch, *shape]``.
    :param shape: the shape of the site.
    :param constants: the parameters that are known to be one number for all elements, by name.
    :param batch: batch shape; by default that of the parameters.
    """

    def __init__(
        self,
        elements: dist.TorchDistribution,
        shape: Sequence[int],
        constants: Mapping[str, float] = MappingProxyType({}),
        batch: torch.Size | None = None,
    ) -> None:
        self.elements, self.constants = elements, constants
        elements._validate_args = elements._validate_args  # as now, also where base_dist is first asked for later
        self._expanded: SitePrior | None = None
        self.reinterpreted_batch_ndims = len(shape) - len(elements.event_shape)
        if batch is None:
            batch = elements.batch_shape[: max(0, len(elements.batch_shape) - self.reinterpreted_batch_ndims)]
        torch.distributions.Distribution.__init__(self, batch, torch.Size(shape))

    @cached_property
    def base_dist(self) -> dist.TorchDistribution:
        return self.elements.expand(self.batch_shape + self.event_shape[: self.reinterpreted_batch_ndims])

    @property
    def _validate_args(self) -> bool:
        validates: bool = self.elements._validate_args
        return validates

    @_validate_args.setter
    def _validate_args(self, value: bool) -> None:
        self.elements._validate_args = value

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        reparametrised: bool = self.elements.has_rsample
        return reparametrised

    @cached_property
    def _same_normal(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """``m, -1 / (2 s^2), -n log(s sqrt(2 pi))`` if all elements are N(m, s^2)."""
        base = self.elements
        if not isinstance(base, torch.distributions.Normal) or any((*base.loc.stride(), *base.scale.stride())):
            return None
        m, s = (v[(0,) * v.dim()] for v in (base.loc, base.scale))
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
        if result.shape == self.batch_shape:
            return result
        return result.expand(torch.broadcast_shapes(result.shape, self.batch_shape))

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> SitePrior:
        batch = torch.Size(batch_shape)
        if batch == self.batch_shape:
            return self
        if self._expanded is None or self._expanded.batch_shape != batch:
            self._expanded = SitePrior(self.elements, self.event_shape, self.constants, batch)
        return self._expanded
