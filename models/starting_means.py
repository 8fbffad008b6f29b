"""Where the factors of rank-1 components start: draws of a distribution, its strata, or values of a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from pyro_bnn.entry import checks
from pyro_bnn.priors import Prior

StartingMeans: TypeAlias = Prior | dist.TorchDistribution | Callable[[torch.Size], Tensor]


def starting_means(loc: Tensor, means: StartingMeans, stratified: bool) -> Tensor:
    """Values of the shape ``[K, ...]``, dtype and device of loc: ``init_means`` and ``init_stratified`` of
    :class:`~pyro_bnn.models.Rank1Guide`.

    :raises TypeError: when means is none of the three, or a function that gives no tensor of real numbers.
    :raises ValueError: when they do not fit the shape or are not finite, or when strata are asked of what has none.
    """
    if isinstance(means, Prior):
        means = means.elements(1.0, loc, None)
    if isinstance(means, TorchDistributionMixin):
        try:
            distribution = means.expand(loc.shape)
        except RuntimeError:
            raise ValueError(
                f"init_means is {means} of the shape {list(means.batch_shape)}, where {list(loc.shape)} was asked for: "
                "expected a distribution of one number, such as Normal(1, 1)"
            ) from None
        return fitting(loc, of_strata(distribution, loc, means) if stratified else distribution.sample())
    checks.function("init_means", means)
    if stratified:
        raise ValueError(
            "init_stratified=True, but init_means is a function, which has no strata: expected a distribution or a "
            "class of pyro_bnn.priors with quantiles, such as Normal(1, 1)"
        )
    values = means(loc.shape)
    if not isinstance(values, Tensor) or values.is_complex():
        given = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"init_means gave {given}: expected a tensor of real numbers")
    return fitting(loc, values)


def of_strata(distribution: dist.TorchDistribution, loc: Tensor, means: StartingMeans) -> Tensor:
    """Quantiles of one place in each of K equally likely strata, in a random order along the first axis."""
    dtype = torch.promote_types(loc.dtype, torch.float32)
    order, within = (torch.rand(loc.shape, dtype=dtype, device=loc.device) for _ in range(2))
    share = (order.argsort(0) + within) / len(loc)
    try:
        return distribution.icdf(share.clamp(1e-6, 1 - 1e-6))  # the ends have no finite quantile
    except NotImplementedError:
        raise ValueError(
            f"init_stratified=True, but init_means is {means}, whose quantiles are not known: expected a distribution "
            "with icdf, such as Normal(1, 1), or init_stratified=False"
        ) from None


def fitting(loc: Tensor, values: Tensor) -> Tensor:
    """The values as they will be in loc.

    :raises ValueError: when they do not broadcast to its shape, or are not finite in its dtype.
    """
    try:
        found = values.to(loc).expand(loc.shape)
    except RuntimeError:
        raise ValueError(
            f"init_means gave a tensor of the shape {list(values.shape)} where {list(loc.shape)} was asked for: "
            "expected that shape, which the function gets as its argument, or one that broadcasts to it"
        ) from None
    if not found.isfinite().all():
        raise ValueError(
            f"init_means gave values that are not finite in {loc.dtype}: expected finite means; narrower tails, or "
            "another dtype of the network, may be what is missing"
        )
    return found
