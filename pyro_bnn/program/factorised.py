"""Independent Normals over the elements of many sites, with few passes over memory, for networks of 1e7 weights.

Sites stored side by side in one tensor are drawn together, and their KL divergences are computed together. Drawing
takes one pass after the noise; the KL divergence from constant Normal priors saves only its arguments for the backward
pass. The generic expressions take about three times as many passes, and one call for each site.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, constraints, kl_divergence, register_kl

from pyro_bnn.program.positive import in_cache


def split(block: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """``[*batch, n] -> [*batch, *shape]`` for each of the shapes, which have n elements in total."""
    parts = block.split([shape.numel() for shape in shapes], -1)
    return [part.reshape(part.shape[:-1] + shape) for part, shape in zip(parts, shapes, strict=True)]


class NormalBlock:
    """``N(loc, scale^2)`` for all elements of several sites that are stored side by side.

    :param loc, scale: ``[*batch, n]``, of the same shape.
    :param shapes: event shape of each site; n elements in total.
    """

    def __init__(self, loc: Tensor, scale: Tensor, shapes: Sequence[torch.Size]) -> None:
        self.loc, self.scale, self.shapes = loc, scale, shapes
        self._draws: dict[object, list[Tensor | None]] = {}

    def parts(self) -> list[FactorisedNormal]:
        """The distribution of each site."""
        return [FactorisedNormal(self, i, self.loc.shape[:-1]) for i in range(len(self.shapes))]

    @cached_property
    def locs(self) -> list[Tensor]:
        return split(self.loc, self.shapes)

    @cached_property
    def scales(self) -> list[Tensor]:
        return split(self.scale, self.shapes)

    def draw(self, index: int, batch: torch.Size) -> Tensor:
        """``[*batch, *shape]``: a draw of one site, new for every call; the sites next to it are drawn with it."""
        key = batch, torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        parts = self._draws.get(key)
        if parts is None or parts[index] is None:
            noise = torch.randn(batch + self.loc.shape[-1:], dtype=self.loc.dtype, device=self.loc.device)
            parts = self._draws[key] = [*split(torch.addcmul(self.loc, self.scale, noise), self.shapes)]
        value, parts[index] = parts[index], None
        assert value is not None
        return value


class FactorisedNormal(dist.TorchDistribution):
    """One site of a :class:`NormalBlock`: ``N(loc, scale^2)`` with the axes of the site as event axes.

    :param batch: batch shape, to which the batch shape of the block broadcasts.
    """

    has_rsample = True
    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(self, block: NormalBlock, index: int, batch: torch.Size) -> None:
        self.block, self.index = block, index
        super().__init__(batch, block.shapes[index], validate_args=False)

    @cached_property
    def normal(self) -> dist.TorchDistribution:
        """The same distribution in Pyro's usual form, ``Normal(loc, scale).to_event(...)``."""
        shape = self.batch_shape + self.event_shape
        loc, scale = (v[self.index].expand(shape) for v in (self.block.locs, self.block.scales))
        return dist.Normal(loc, scale, validate_args=False).to_event(len(self.event_shape))

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> FactorisedNormal:
        batch = torch.Size(batch_shape)
        return self if batch == self.batch_shape else FactorisedNormal(self.block, self.index, batch)

    def rsample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        return self.block.draw(self.index, torch.Size(sample_shape) + self.batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        result: Tensor = self.normal.log_prob(value)
        return result

    def entropy(self) -> Tensor:
        result: Tensor = self.normal.entropy()
        return result

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, len(self.event_shape))

    @property
    def mean(self) -> Tensor:
        return self.block.locs[self.index].expand(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        return self.block.scales[self.index].square().expand(self.batch_shape + self.event_shape)


class _KLToNormal(torch.autograd.Function):
    """sum_i [ log(s_i / scale_i) + (scale_i^2 + (loc_i - m_i)^2) / (2 s_i^2) - 1/2 ] over the last axis."""

    @staticmethod
    def forward(ctx: Any, loc: Tensor, scale: Tensor, m: Tensor, s: Tensor) -> Tensor:
        ctx.save_for_backward(loc, scale, m, s)
        # |loc - m|^2 is not expanded into sums, which would cancel where loc is near m
        total: Any = -loc.shape[-1] / 2
        for own, width, centre, spread in zip(*map(in_cache, _alike(loc, scale, m, s)), strict=True):
            ratio = width / spread
            squares = (own - centre).div_(spread).square_().sum(-1)
            squares += (ratio * ratio).sum(-1)  # a norm of 1e7 floats is off by 1e-3
            total = total + (squares / 2 - ratio.log_().sum(-1))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        loc, scale, m, s = ctx.saved_tensors
        grad = grad.unsqueeze(-1)
        weight = grad / (s * s)
        if torch.is_grad_enabled():  # for second derivatives
            return (loc - m) * weight, weight * scale - grad / scale, None, None
        of_loc, of_scale = torch.empty_like(loc), torch.empty_like(scale)
        for own, width, centre, factor, first, second in zip(
            *map(in_cache, (*_alike(loc, scale, m, weight), of_loc, of_scale)), strict=True
        ):
            torch.sub(own, centre, out=first).mul_(factor)
            torch.reciprocal(width, out=second).mul_(-grad).addcmul_(factor, width)
        return of_loc, of_scale, None, None


def _alike(value: Tensor, *others: Tensor) -> list[Tensor]:
    """The value, and others with an axis for every one of its own, as long as the last."""
    return [value, *(other.expand(torch.broadcast_shapes(other.shape, value.shape[-1:])) for other in others)]


def _constants(q: FactorisedNormal, p: Distribution) -> tuple[Tensor, Tensor] | None:
    """Mean and standard deviation of a Normal prior that is the same for all elements and has no gradient."""
    events = len(q.event_shape)
    prior = p.base_dist if events and isinstance(p, Independent) and p.reinterpreted_batch_ndims == events else p
    if not isinstance(prior, torch.distributions.Normal) or len(p.event_shape) != events:
        return None
    m, s = prior.loc, prior.scale
    if not (_same_for_all(m) and _same_for_all(s)) or m.requires_grad or s.requires_grad:
        return None
    return m.as_strided((), ()), s.as_strided((), ())


def _same_for_all(value: Tensor) -> bool:
    strides = value.stride()
    return not any(strides) or all(t == 0 or n == 1 for t, n in zip(strides, value.shape, strict=True))


def kl_of_block(parts: Sequence[FactorisedNormal], priors: Sequence[Distribution]) -> Tensor | None:
    """Sum of the closed-form KL divergences of all sites of a block from their priors, ``[*batch of the block]``.

    :return: ``None`` unless these are all its sites in order, and every prior a Normal that is the same for all
        elements and has no gradient.
    """
    block = parts[0].block
    if [p.index for p in parts] != list(range(len(block.shapes))) or any(p.block is not block for p in parts):
        return None
    constants = [_constants(q, p) for q, p in zip(parts, priors, strict=True)]
    if any(c is None for c in constants):
        return None
    if len(parts) == 1:
        (m, s) = constants[0]  # type: ignore[misc]
    else:
        sizes = [shape.numel() for shape in block.shapes]
        m, s = (torch.cat([c[i].expand(n) for c, n in zip(constants, sizes, strict=True)]) for i in (0, 1))  # type: ignore[index]
    kl: Tensor = _KLToNormal.apply(block.loc, block.scale, m, s)
    return kl


@register_kl(FactorisedNormal, Distribution)
def _kl_of_site(q: FactorisedNormal, p: Distribution) -> Tensor:
    constants = _constants(q, p)
    if constants is None:
        generic: Tensor = kl_divergence(q.normal, p)
        return generic
    batch = q.block.loc.shape[:-1]
    loc, scale = (v[q.index].reshape(*batch, -1) for v in (q.block.locs, q.block.scales))
    kl: Tensor = _KLToNormal.apply(loc, scale, *constants)
    return kl.expand(q.batch_shape)
