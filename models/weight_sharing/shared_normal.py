"""Weights that share Gaussians: one site of a codebook as a distribution, with a KL divergence in O(K)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributions import Distribution, Independent, constraints, kl_divergence, register_kl

from pyro_bnn.priors.gaussian_mixture import CodeMixture


@dataclass
class Pairs:
    """Weights of one site that two codes share.

    :param place: their positions in the site, ``[e]``.
    :param codes: their two codes, ``[e, 2]``, int64.
    :param alpha: the probability of the first code, ``[e]``.
    :param entries: their entries in the table, ``[e]``.
    """

    place: Tensor
    codes: Tensor
    alpha: Tensor
    entries: Tensor


@dataclass
class Table:
    """The Gaussians of one site, and which weight has which.

    The entries are the K codes, then one for each outlier of the site, then one for each weight between codes.

    :param loc, scale: ``[T]``.
    :param labels: entry of each weight, ``[n]``.
    :param counts: number of weights with each entry, ``[T]``. With ``pairs`` the expected number, and 0 for the entries
        of pairs.
    :param pairs: the weights between codes, where a draw takes one of their two codes at random; ``None`` where their
        entries are Gaussians.
    :param num_codes: K.
    :param codebook: the codebook that the codes belong to.
    """

    loc: Tensor
    scale: Tensor
    labels: Tensor
    counts: Tensor
    pairs: Pairs | None
    num_codes: int
    codebook: object


class _Draw(torch.autograd.Function):
    """``loc[label_i] + scale[label_i] noise_i``; the gradient of an entry is the sum of those of its weights.

    :param loc, scale: ``[rows | 1, T]``; noise ``[rows, n]``.
    """

    @staticmethod
    def forward(ctx: Any, loc: Tensor, scale: Tensor, labels: Tensor, noise: Tensor) -> Tensor:
        ctx.save_for_backward(labels, noise)
        ctx.shape = loc.shape
        found = [v.index_select(1, labels) for v in (loc, scale)]
        return torch.addcmul(found[0], found[1], noise)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        labels, noise = ctx.saved_tensors
        weighed = grad * noise
        if ctx.shape[0] == 1 and len(grad) > 1:
            grad, weighed = grad.sum(0, keepdim=True), weighed.sum(0, keepdim=True)
        wide = torch.promote_types(grad.dtype, torch.float32)  # bfloat16 has too few digits for long sums
        zeros = grad.new_zeros(ctx.shape[1], dtype=wide)
        sums = [  # row by row, because a sum along one axis is thirty times faster
            torch.stack([zeros.index_add(0, labels, row) for row in g.to(wide)]).to(grad.dtype) for g in (grad, weighed)
        ]
        return sums[0], sums[1], None, None


class SharedNormal(dist.TorchDistribution):
    """``w_i = m_a(i) + s_a(i) eps_i`` with independent eps: weights share means and standard deviations, but no noise.

    A weight of ``table.pairs`` comes from the first of its codes with probability alpha_i, otherwise from the second.

    :param table: the Gaussians, and which weight has which.
    :param shape: event shape, that of the site.
    :param batch: batch shape.
    """

    has_rsample = True
    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(self, table: Table, shape: torch.Size, batch: torch.Size = torch.Size()) -> None:  # noqa: B008
        self.table = table
        super().__init__(batch, shape, validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> SharedNormal:
        batch = torch.Size(batch_shape)
        return self if batch == self.batch_shape else SharedNormal(self.table, self.event_shape, batch)

    def rsample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        batch = torch.Size(sample_shape) + self.batch_shape
        table, n = self.table, self.event_shape.numel()
        noise = torch.randn(batch.numel(), n, dtype=table.loc.dtype, device=table.loc.device)
        loc, scale = table.loc[None], table.scale[None]
        if table.pairs is not None:
            loc, scale = self._chosen(table.pairs, batch.numel())
        drawn: Tensor = _Draw.apply(loc, scale, table.labels, noise)
        return drawn.view(batch + self.event_shape)

    def _chosen(self, pairs: Pairs, rows: int) -> tuple[Tensor, Tensor]:
        """Means and standard deviations ``[rows, T]``, where each pair has one of its two codes, drawn at random."""
        first = torch.rand(rows, len(pairs.alpha), dtype=pairs.alpha.dtype, device=pairs.alpha.device) < pairs.alpha
        code = torch.where(first, pairs.codes[:, 0], pairs.codes[:, 1])
        one, two = (
            values.expand(rows, -1).index_copy(1, pairs.entries, values[code.flatten()].view(code.shape))
            for values in (self.table.loc, self.table.scale)
        )
        return one, two

    @cached_property
    def _elements(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of every weight, ``[n]``; for a pair those of its first code."""
        table = self.table
        loc, scale = (v.index_select(0, table.labels) for v in (table.loc, table.scale))
        if table.pairs is not None:
            first = table.pairs.codes[:, 0]
            loc = loc.index_copy(0, table.pairs.place, table.loc[first])
            scale = scale.index_copy(0, table.pairs.place, table.scale[first])
        return loc, scale

    @cached_property
    def normal(self) -> dist.TorchDistribution:
        """The same distribution as independent Normals of Pyro.

        :raises NotImplementedError: where weights are mixtures of two codes.
        """
        if self.table.pairs is not None:
            raise NotImplementedError("weights that come from one of two codes are mixtures, not Normals")
        shape = self.batch_shape + self.event_shape
        loc, scale = (v.view(self.event_shape).expand(shape) for v in self._elements)
        return dist.Normal(loc, scale, validate_args=False).to_event(len(self.event_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        pairs, table = self.table.pairs, self.table
        flat = value.reshape(value.shape[: value.dim() - len(self.event_shape)] + (-1,))
        density = _log_normal(flat, *self._elements)
        if pairs is not None:
            x = flat.index_select(-1, pairs.place)
            one, two = (_log_normal(x, table.loc[k], table.scale[k]) for k in pairs.codes.unbind(1))
            both = torch.logaddexp(one + pairs.alpha.log(), two + (-pairs.alpha).log1p())
            density = density.index_copy(-1, pairs.place, both)
        total = density.sum(-1)
        return total.expand(torch.broadcast_shapes(total.shape, self.batch_shape))

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, len(self.event_shape))

    @property
    def mean(self) -> Tensor:
        loc, pairs = self._elements[0], self.table.pairs
        if pairs is not None:
            one, two = self.table.loc[pairs.codes].unbind(1)
            loc = loc.index_copy(0, pairs.place, torch.lerp(two, one, pairs.alpha))
        return loc.view(self.event_shape).expand(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        squares, pairs = self._elements[1].square(), self.table.pairs
        if pairs is not None:
            (m1, m2), (s1, s2) = (v[pairs.codes].unbind(1) for v in (self.table.loc, self.table.scale))
            a = pairs.alpha
            own = torch.lerp(s2.square(), s1.square(), a) + a * (1 - a) * (m1 - m2).square()
            squares = squares.index_copy(0, pairs.place, own)
        return squares.view(self.event_shape).expand(self.batch_shape + self.event_shape)


def _log_normal(x: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    return -0.5 * ((x - loc) / scale).square() - scale.log() - 0.5 * math.log(2 * math.pi)


# -------------------------------------------------------------------------------------------- KL divergences


def _first(value: Tensor, events: int) -> Tensor | None:
    """``[*batch]`` of a parameter that is the same for all elements of an event; ``None`` where it is not."""
    for axis in range(value.dim() - events, value.dim()):
        if value.shape[axis] > 1 and value.stride(axis):
            return None
    for _ in range(events):
        value = value[..., 0]
    return value


def _scalar_prior(p: Distribution, events: int) -> Distribution | None:
    """The prior of one element, where all elements have the same: a Normal, Laplace or mixture of Normals."""
    base = p
    while isinstance(base, Independent):
        base = base.base_dist
    if len(p.event_shape) != events or base.event_shape:
        return None
    if isinstance(base, (torch.distributions.Normal, torch.distributions.Laplace)):
        loc, scale = _first(base.loc, events), _first(base.scale, events)
        if loc is None or scale is None:
            return None
        return type(base)(loc.unsqueeze(-1), scale.unsqueeze(-1), validate_args=False)
    if isinstance(base, torch.distributions.MixtureSameFamily):
        normal = base.component_distribution
        if isinstance(normal, torch.distributions.Normal):
            values = [base.mixture_distribution.logits, normal.loc, normal.scale]
            parts = [_first(v.movedim(-1, 0), events) for v in values]
            if all(v is not None for v in parts):
                logits, loc, scale = (v.movedim(0, -1).unsqueeze(-2) for v in parts if v is not None)
                component = dist.Normal(loc, scale, validate_args=False)
                return dist.MixtureSameFamily(dist.Categorical(logits=logits), component, validate_args=False)
    return None


def code_length(table: Table, log_weights: Tensor, slab: float | Tensor) -> Tensor:
    """``sum_i KL(r_i || pi)``, which is at least KL(q || p) when p has q's own codes as components; in nats.

    A weight with code k costs ``-log pi_k``; one that comes from one of two codes ``alpha log(alpha / pi_1) +
    (1 - alpha) log((1 - alpha) / pi_2)``; one with a Gaussian that is not a code (an outlier, or between two codes)
    ``-log pi_0 + KL(q_i || N(0, slab^2))``.

    :param log_weights: log pi, ``[K + 1]``, the slab first.
    """
    k = table.num_codes
    total = -(table.counts[:k] * log_weights[1:].where(table.counts[:k] > 0, 0.0)).sum()
    wide = _kl_normal(table.loc[k:], table.scale[k:], 0.0, torch.as_tensor(slab, device=table.loc.device))
    bound = wide - log_weights[0]
    between = table.pairs
    if between is not None:  # the counts of codes already contain the cross entropy
        total = total - (torch.special.entr(between.alpha) + torch.special.entr(1 - between.alpha)).sum()
    return total + (table.counts[k:] * bound.where(table.counts[k:] > 0, 0.0)).sum()


def _kl_normal(loc: Tensor, scale: Tensor, m: Tensor | float, s: Tensor) -> Tensor:
    ratio = scale / s
    return (((loc - m) / s).square() + ratio.square() - 1) / 2 - ratio.log()


@register_kl(SharedNormal, Distribution)
def _kl_of_site(q: SharedNormal, p: Distribution) -> Tensor:
    """``sum_t n_t KL(N(m_t, s_t^2) || p)`` over the entries of the table.

    For weights that are mixtures of two codes, and for priors that are mixtures, this is an upper bound by convexity.
    For a mixture prior it is ``KL(N || sum_j pi_j p_j) <= -log sum_j pi_j exp(-KL(N || p_j))``.
    """
    table = q.table
    prior = _scalar_prior(p, len(q.event_shape))
    base: Any = p
    while isinstance(base, Independent):
        base = base.base_dist
    if prior is None:
        generic: Tensor = kl_divergence(q.normal, p)
        return generic
    if isinstance(base, CodeMixture) and base.codebook is not table.codebook:
        raise ValueError(
            "the CodebookPrior is the codebook of another guide: a model uses that of the last CodebookGuide made for "
            "it. Make one model for each guide, and copy both together"
        )
    if isinstance(base, CodeMixture):
        logits = prior.mixture_distribution.logits.reshape(-1)  # type: ignore[attr-defined]
        slab = prior.component_distribution.scale.reshape(-1)[0]  # type: ignore[attr-defined]
        return code_length(table, logits, slab).expand(q.batch_shape)
    if isinstance(prior, torch.distributions.MixtureSameFamily):
        parts: Any = prior.component_distribution
        to_each = _kl_normal(table.loc[:, None], table.scale[:, None], parts.loc, parts.scale)
        each = -(prior.mixture_distribution.logits - to_each).logsumexp(-1)
    else:
        each = kl_divergence(dist.Normal(table.loc, table.scale, validate_args=False), prior)
    total = (table.counts * each).sum(-1)
    return total.expand(torch.broadcast_shapes(total.shape, q.batch_shape))
