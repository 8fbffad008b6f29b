"""Independent Normals over the elements of a site, with the passes over memory that a network of 1e7 weights can pay.

Drawing takes one pass beyond the noise, and the KL divergence to a Normal prior that is the same for all elements
reads each parameter twice and stores nothing. The generic expressions take about three times as many passes.
"""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributions import Independent, kl_divergence, register_kl


class FactorisedNormal(dist.Independent):
    """``N(loc, scale^2)`` with all but the first axes as event axes.

    :param loc, scale: ``[*batch, *event]``, of the same shape.
    :param event_dim: number of event axes.
    """

    def __init__(self, loc: Tensor, scale: Tensor, event_dim: int) -> None:
        super().__init__(dist.Normal(loc, scale, validate_args=False), event_dim, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> FactorisedNormal:
        shape = torch.Size(batch_shape) + self.event_shape
        base = self.base_dist
        return FactorisedNormal(base.loc.expand(shape), base.scale.expand(shape), self.reinterpreted_batch_ndims)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        loc, scale = self.base_dist.loc, self.base_dist.scale
        noise = torch.randn(torch.Size(sample_shape) + loc.shape, dtype=loc.dtype, device=loc.device)
        return torch.addcmul(loc, scale, noise)


class _KLToNormal(torch.autograd.Function):
    """sum_i [ log(s / scale_i) + (scale_i^2 + (loc_i - m)^2) / (2 s^2) - 1/2 ] over the event axes."""

    @staticmethod
    def forward(ctx: Any, loc: Tensor, scale: Tensor, m: Tensor, s: Tensor, events: int) -> Tensor:
        ctx.save_for_backward(loc, scale, m, s)
        ctx.events = events
        dims = tuple(range(-events, 0))
        n = math.prod(loc.shape[loc.dim() - events :])
        # |loc - m|^2 is not expanded into sums, which would cancel where loc is near m
        distance, spread = (torch.linalg.vector_norm(v, dim=dims).square() for v in (loc - m, scale))
        return (distance + spread) / (2 * s * s) - scale.log().sum(dims) + n * (s.log() - 0.5)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        loc, scale, m, s = ctx.saved_tensors
        grad = grad.reshape(grad.shape + (1,) * ctx.events)
        weight = grad / (s * s)
        return (loc - m).mul_(weight), torch.addcmul(-grad / scale, weight, scale), None, None, None


def _same_for_all(value: Tensor) -> bool:
    return all(stride == 0 or size == 1 for stride, size in zip(value.stride(), value.shape, strict=True))


@register_kl(FactorisedNormal, Independent)
def _kl_factorised_independent(q: FactorisedNormal, p: Independent) -> Tensor:
    prior = p.base_dist
    events = q.reinterpreted_batch_ndims
    if isinstance(prior, torch.distributions.Normal) and p.reinterpreted_batch_ndims == events:
        m, s = prior.loc, prior.scale
        if _same_for_all(m) and _same_for_all(s) and not (m.requires_grad or s.requires_grad):
            loc, scale = q.base_dist.loc, q.base_dist.scale
            kl: Tensor = _KLToNormal.apply(loc, scale, m.flatten()[0], s.flatten()[0], events)
            return kl
    generic: Tensor = kl_divergence(dist.Independent(q.base_dist, events), p)
    return generic
