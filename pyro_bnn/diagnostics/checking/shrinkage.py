"""How far a posterior has moved from its prior: contraction of every latent site, and of the function."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_bnn.diagnostics.checking.prior_checks import central_width, prior_draws, prior_predictive
from pyro_bnn.diagnostics.recalibration.temperature import ScaledPosterior
from pyro_bnn.entry import checks
from pyro_bnn.inputs import Inputs
from pyro_bnn.posterior import Posterior
from pyro_bnn.posterior.draw_source import TAIL_DRAWS
from pyro_bnn.predicting import require_posterior
from pyro_bnn.program.model import BayesianNetwork
from pyro_bnn.randomness import some_seed

#: contraction below which an element counts as not informed by the data
UNINFORMED = 0.05
#: standard deviation of the ratio of two squared widths, of n Normal draws each, times sqrt(n)
NOISE = 2.5
#: most numbers kept in memory, over the draws of all sites
_MAX_ELEMENTS = 2**24


@dataclass(frozen=True)
class Contraction:
    """How much narrower a posterior is than its prior.

    :param mean: mean contraction over the elements: 0 if as wide as the prior, 1 for a point, negative if wider.
    :param uninformed: share of elements that the data say nothing about, as far as n draws can tell: those whose
        contraction does not exceed 0.05 by two standard errors of ``(1 - contraction) 2.5 / sqrt(n)``.
    :param elements: number of elements that were used.
    """

    mean: float
    uninformed: float
    elements: int


def contraction(
    posterior: Posterior,
    x: Inputs = None,
    *,
    num_samples: int | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
) -> dict[str, Contraction]:
    """Posterior contraction ``1 - (s_posterior / s_prior)^2`` of every latent site and, with x, of ``function``.

    s is the distance between the 5 % and 95 % quantiles over all draws of all members. If prior and posterior are
    Normal, the contraction is ``1 - var_posterior / var_prior``. Quantiles work for all priors: a Cauchy has no
    variance, and an interquartile range would see only the spike of a spike-and-slab prior. If the posterior of an
    element equals its Normal prior, the estimated contraction is 0 with a standard deviation of about ``2.5 / sqrt(n)``
    for n draws over all members.

    Hyper-parameters may contract while the weights, whose posterior has many equivalent modes, do not. ``function``,
    the raw outputs of the network at x, shows whether the data were learned from. A site that the guide holds at a
    point has a contraction of 1. The temperature of a :class:`~pyro_bnn.diagnostics.ScaledPosterior` is ignored.

    :param x: N rows at which ``function`` is evaluated. For a model that is not of this package, the input that it is
        called with; there is no ``function`` then.
    :param num_samples: draws of each member of the posterior; by default as many as are stored, or 1,000 from a guide.
        The prior gets as many draws as all members together, because the width of few draws is biased towards small
        values. For large sites a random subset of the elements is used, so that memory stays bounded.
    :param batch_size: the most rows of x in one forward pass.
    :param seed: of the draws; ``None`` takes a new one at each call.
    :returns: ``{site: Contraction}`` with the fields ``mean``, ``uninformed`` and ``elements``.
    :raises TypeError: when ``posterior`` is not a posterior.
    :raises ValueError: when fewer draws are stored than asked for, ``num_samples`` is below 2, the prior is improper or
        holds a site at a point, or a draw is NaN.

    Source: Schad, Betancourt and Vasishth (2021), "Toward a principled Bayesian workflow in cognitive science",
    Psychological Methods 26.
    """
    require_posterior(posterior)
    # Point estimates get as many draws as others, since the prior gets the same number and needs many.
    checks.optional(checks.count, "num_samples", num_samples)
    n = posterior.num_stored or TAIL_DRAWS if num_samples is None else num_samples
    if n < 2:
        raise ValueError(f"num_samples={n}: expected at least 2, and a few hundred for an accurate width")
    seed = some_seed(seed)
    if isinstance(posterior, ScaledPosterior):
        posterior = posterior.posterior
    model, draws = posterior.model, n * posterior.num_members
    chosen = _chosen_elements(next(prior_draws(model, 1, seed, example=x)), draws, seed)
    before = _some_elements(prior_draws(model, draws, seed, example=x), chosen)
    after = _some_elements(posterior.draw_source.groups(n, seed, example=x), chosen)
    result = {name: _contraction(name, after[name], before[name]) for name in chosen if name in after}
    if x is not None and isinstance(model, BayesianNetwork):
        settings: dict[str, Any] = {"batch_size": batch_size, "seed": seed}
        f = (
            posterior.predict(x, n, **settings).outputs.flatten(0, 1),
            prior_predictive(model, x, num_samples=draws, **settings).outputs.flatten(0, 1),
        )
        result["function"] = _contraction("function", *(values.flatten(1) for values in f))
    return result


def _chosen_elements(one: dict[str, Tensor], draws: int, seed: int) -> dict[str, Tensor]:
    """The elements of each site to use: all, or a random subset that keeps the draws of all sites within the budget."""
    limit = max(1, _MAX_ELEMENTS // (draws * len(one)))
    generator = torch.Generator().manual_seed(seed)
    sizes = {name: value.numel() for name, value in one.items()}
    return {name: torch.randperm(size, generator=generator)[:limit] for name, size in sizes.items() if size}


def _some_elements(groups: Iterable[dict[str, Tensor]], chosen: dict[str, Tensor]) -> dict[str, Tensor]:
    """``{site: [draws of all members, chosen elements]}``."""
    parts: dict[str, list[Tensor]] = {name: [] for name in chosen}
    for group in groups:
        for name in chosen.keys() & group.keys():
            values = group[name].flatten(0, 1)
            parts[name].append(values.reshape(len(values), -1)[:, chosen[name].to(values.device)])
    return {name: torch.cat(part) for name, part in parts.items() if part}


def _contraction(name: str, posterior: Tensor, prior: Tensor) -> Contraction:
    """From draws ``[n, elements]`` of each."""
    for which, values in (("posterior", posterior), ("prior", prior)):
        if values.isnan().any():
            raise ValueError(f"the {which} of {name!r} holds NaN: use check_prior to see whether the prior overflows")
    before = central_width(prior)
    if not bool((before > 0).all()):
        raise ValueError(f"the prior of {name!r} is a point: contraction needs a prior with a width")
    ratio = (central_width(posterior) / before).square()
    most = ratio * (1 + 2 * NOISE / math.sqrt(len(posterior)))
    return Contraction(1 - float(ratio.mean()), float((1 - most < UNINFORMED).double().mean()), ratio.numel())
