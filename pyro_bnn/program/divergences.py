"""KL divergences of factorised guides from their priors: of all sites side by side that are of one kind at once.

With ``q_i = N(loc_i, scale_i^2)`` for every element i and e a standard Normal, summed over i::

    prior N(m, s^2)         log(s / scale) + (scale^2 + (loc - m)^2) / (2 s^2) - 1/2
    prior Cauchy(m, s)      log pi - log s + E log(s^2 + (loc - m + scale e)^2) - h
    prior StudentT(v, m, s) log B(v/2, 1/2) + log(v s^2) / 2 + (v + 1)/2 E log(1 + (loc - m + scale e)^2 / (v s^2)) - h
    prior Laplace(m, s)     log 2 s + E |loc - m + scale e| / s - h

where ``h = log scale + (1 + log 2 pi) / 2`` is the entropy of ``q_i``. For a positive scale whose logarithm is
``N(loc, scale^2)``, one number for a layer, with entropy ``h + loc``::

    prior HalfCauchy(s)           log(pi s / 2) + E log(1 + exp(2 (loc + scale e)) / s^2) - h - loc
    prior of which the square is  log Gamma(a) - a log b - log 2 + 2 a loc + b exp(2 scale^2 - 2 loc) - h
    InverseGamma(a, b)

and for a point ``loc``, with the prior N(m, s^2), ``(loc - m)^2 / (2 s^2) + log s + log(2 pi) / 2``.

The expectations are exact up to the errors that :mod:`pyro_bnn.program.expectations` states. What has no closed form,
such as the many scales of a horseshoe, is left to an estimate from the draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import (
    Cauchy,
    Distribution,
    HalfCauchy,
    Independent,
    Laplace,
    Normal,
    StudentT,
    kl_divergence,
    register_kl,
)

from pyro_bnn.priors.families import RootInverseGamma
from pyro_bnn.program.expectations import expected_log, expected_softplus
from pyro_bnn.program.factorised import FactorisedLogNormal, FactorisedNormal, FactorisedPoint
from pyro_bnn.program.positive import in_cache
from pyro_bnn.program.sites import SitePrior

_ENTROPY = 0.5 * (1 + math.log(2 * math.pi))


class _ConstantNormal(torch.autograd.Function):
    """The divergence from Normals whose means and deviations have no gradient, which saves only its arguments."""

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
    n = value.shape[-1]
    return [value, *(v if v.dim() and v.shape[-1] == n else v.expand(*v.shape[:-1], n) for v in others)]


def _normal(loc: Tensor, scale: Tensor, m: Tensor, s: Tensor) -> Tensor:
    if not (m.requires_grad or s.requires_grad):
        constant: Tensor = _ConstantNormal.apply(loc, scale, m, s)
        return constant
    ratio = scale / s
    return ((ratio.square() + ((loc - m) / s).square() - 1) / 2 - ratio.log()).sum(-1)


def _cauchy(loc: Tensor, scale: Tensor, m: Tensor, s: Tensor) -> Tensor:
    return (expected_log(loc - m, scale, s) - scale.log() - s.log() + (math.log(math.pi) - _ENTROPY)).sum(-1)


def _student(loc: Tensor, scale: Tensor, df: Tensor, m: Tensor, s: Tensor) -> Tensor:
    width = s * df.sqrt()
    beta = torch.lgamma(df / 2) - torch.lgamma((df + 1) / 2) + 0.5 * math.log(math.pi)
    excess = expected_log(loc - m, scale, width) - 2 * width.log()
    return (beta + width.log() + (df + 1) / 2 * excess - scale.log() - _ENTROPY).sum(-1)


def _laplace(loc: Tensor, scale: Tensor, m: Tensor, s: Tensor) -> Tensor:
    z = (loc - m) / scale
    absolute = scale * (math.sqrt(2 / math.pi) * (-z * z / 2).exp() + z * torch.erf(z / math.sqrt(2)))
    return (absolute / s + (2 * s).log() - scale.log() - _ENTROPY).sum(-1)


def _half_cauchy(loc: Tensor, scale: Tensor, s: Tensor) -> Tensor:
    from_scale = loc - s.log()
    expected = expected_softplus(from_scale, scale)
    return (expected - from_scale - scale.log() + (math.log(math.pi / 2) - _ENTROPY)).sum(-1)


def _root_inverse_gamma(loc: Tensor, scale: Tensor, a: Tensor, b: Tensor) -> Tensor:
    inverse_square = (2 * scale.square() - 2 * loc).exp()
    constant = torch.lgamma(a) - a * b.log() - (math.log(2) + _ENTROPY)
    return (constant + 2 * a * loc + b * inverse_square - scale.log()).sum(-1)


def _point(value: Tensor, m: Tensor, s: Tensor) -> Tensor:
    return (((value - m) / s).square() / 2 + s.log() + 0.5 * math.log(2 * math.pi)).sum(-1)


#: ``divergence(*parameters of the block, *parameters of the prior)``, all ``[*batch, n]``, summed over n
_Divergence = Callable[..., Tensor]
_OF_NORMALS: dict[type[Distribution], tuple[_Divergence, tuple[str, ...]]] = {
    Normal: (_normal, ("loc", "scale")),
    Cauchy: (_cauchy, ("loc", "scale")),
    StudentT: (_student, ("df", "loc", "scale")),
    Laplace: (_laplace, ("loc", "scale")),
}
_OF_POINTS: dict[type[Distribution], tuple[_Divergence, tuple[str, ...]]] = {Normal: (_point, ("loc", "scale"))}
_OF_LOG_NORMALS: dict[type[Distribution], tuple[_Divergence, tuple[str, ...]]] = {
    HalfCauchy: (_half_cauchy, ("scale",)),
    RootInverseGamma: (_root_inverse_gamma, ("concentration", "rate")),
}


def _elements(p: Distribution, events: int) -> Distribution:
    """The distribution of single elements inside a prior whose last axes are events; itself if there is none."""
    if isinstance(p, SitePrior):
        return p.elements
    return p.base_dist if events and isinstance(p, Independent) and p.reinterpreted_batch_ndims == events else p


def closed_form(q: Distribution, p: Distribution) -> _Divergence | None:
    """The kind of closed form that the divergence of a site has; ``None`` for none."""
    found = _entry(q, p)
    return None if found is None else found[0]


def _entry(q: Distribution, p: Distribution) -> tuple[_Divergence, tuple[str, ...]] | None:
    events = len(q.event_shape)
    if not isinstance(q, (FactorisedNormal, FactorisedPoint)) or len(p.event_shape) != events:
        return None
    if isinstance(q, FactorisedPoint):
        table = _OF_POINTS
    elif isinstance(q, FactorisedLogNormal):
        # one number for a layer: for a scale of every element, 97 points cost more than a draw
        table = {} if events else _OF_LOG_NORMALS
    else:
        table = _OF_NORMALS
    elements = _elements(p, events)
    return next((entry for kind in type(elements).__mro__ if (entry := table.get(kind)) is not None), None)


def kl_of_sites(parts: Sequence[FactorisedNormal | FactorisedPoint], priors: Sequence[Distribution]) -> Tensor:
    """Sum of the divergences of sites of one block from their priors, which have one kind of closed form.

    :return: ``[*batch]``, to which the batch shape of the block broadcasts.
    """
    found = _entry(parts[0], priors[0])
    assert found is not None
    divergence, names = found
    own = parts[0].block.columns([part.index for part in parts])
    return divergence(*own, *(_side_by_side(name, parts, priors, own[0]) for name in names))


def _side_by_side(name: str, parts: Sequence[Distribution], priors: Sequence[Distribution], like: Tensor) -> Tensor:
    """A parameter of each site's prior, ``[*batch, *shape]`` or what broadcasts to it, as ``[*batch, n]``.

    One number for all, and an axis along which all numbers are equal, are not spelled out.
    """
    numbers = {p.constants.get(name) if isinstance(p, SitePrior) else None for p in priors}
    if len(numbers) == 1 and (number := numbers.pop()) is not None:
        return like.new_full((), number)
    flat = []
    for part, prior in zip(parts, priors, strict=True):
        shape = part.event_shape
        value = _compact(getattr(_elements(prior, len(shape)), name))
        batch = value.shape[: max(0, value.dim() - len(shape))]
        flat.append(value.expand(batch + shape).reshape(*batch, shape.numel()))
    if len(flat) == 1:
        return flat[0]
    batch = torch.broadcast_shapes(*{value.shape[:-1] for value in flat})
    return torch.cat([value if value.shape[:-1] == batch else value.expand(*batch, -1) for value in flat], -1)


def _compact(value: Tensor) -> Tensor:
    """A tensor with length 1 along every axis that an expansion has made."""
    if all(value.stride()):
        return value
    return value[tuple(slice(None) if stride else slice(0, 1) for stride in value.stride())]


@register_kl(FactorisedNormal, Distribution)
def _kl_of_site(q: FactorisedNormal, p: Distribution) -> Tensor:
    if closed_form(q, p) is None:
        generic: Tensor = kl_divergence(q.in_full, p)
        return generic
    return kl_of_sites([q], [p]).expand(torch.broadcast_shapes(q.batch_shape, p.batch_shape))
