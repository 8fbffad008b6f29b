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
from pyro_bnn.diagnostics.scoring.stream import require_posterior
from pyro_bnn.entry import checks
from pyro_bnn.inputs import Inputs
from pyro_bnn.posterior import Posterior
from pyro_bnn.posterior.draw_source import TAIL_DRAWS
from pyro_bnn.program.model import BayesianNetwork
from pyro_bnn.randomness import some_seed

#: contraction below which an element counts as not informed by the data
UNINFORMED = 0.05
#: standard deviation of the ratio of two squared widths, of n Normal draws each, times sqrt(n)
NOISE = 2.5
#: numbers that are kept of the draws of all sites together
_MAX_ELEMENTS = 2**24


@dataclass(frozen=True)
class Contraction:
    """How much narrower a posterior is than its prior.

    :param mean: mean contraction over the elements: 0 as wide as the prior, 1 a point, negative wider.
    :param uninformed: share of elements that the data say nothing about, as far as n draws can tell: those whose
        contraction is not above 0.05 by two of its standard errors, which are ``(1 - contraction) 2.5 / sqrt(n)``.
    :param elements: number of elements that were looked at.
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
    """Posterior contraction ``1 - (s_posterior / s_prior)^2`` of every latent site, and with x of ``function``.

    s is the distance between the 5 % and 95 % quantiles, of all draws of all members together. For two Normals this is
    ``1 - var_posterior / var_prior``. It is the same rule for all priors: a Cauchy has no variance, and an
    interquartile range would see only the spike of a spike-and-slab prior. An element whose posterior is its Normal
    prior has an estimated contraction of 0 with a standard deviation of about ``2.5 / sqrt(n)`` for n draws over all
    members.

    Sites of the hierarchy may contract while weights, whose posterior has many equivalent modes, do not: ``function``,
    the raw outputs of the network at x, says whether the data were learned from. A site that the guide holds at a point
    has a contraction of 1.

    :param x: N rows for ``function``. For a model that is not of this package: what it is called with, and there is no
        ``function``.
    A temperature of the predictions (:class:`~pyro_bnn.diagnostics.ScaledPosterior`) is left out.

    :param num_samples: draws of each member of the posterior; by default as many as it stores, or 1000. Of the prior
        there are as many over all members, since a width of few draws comes out too small. Large sites are judged by a
        random part of their elements, so that memory stays bounded.
    :param batch_size: the most rows of x in one forward pass.
    :raises TypeError: for what is no posterior.
    :raises ValueError: when fewer draws are stored, there are fewer than 2, the prior is improper, or it holds a site
        at a point.

    Source: Schad, Betancourt and Vasishth (2021), "Toward a principled Bayesian workflow in cognitive science",
    Psychological Methods 26.
    """
    require_posterior(posterior)
    # Points are drawn as often as others: quantiles of few draws of the prior would lie too close together.
    checks.optional(checks.count, "num_samples", num_samples)
    n = posterior.num_stored or TAIL_DRAWS if num_samples is None else num_samples
    if n < 2:
        raise ValueError(f"num_samples={n}: a width takes at least 2 draws, and a good one some hundred")
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
    """Which elements of each site to look at: all, or a random part that keeps draws of all sites within the budget."""
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
            raise ValueError(f"the {which} of {name!r} holds NaN: check_prior tells whether the prior overflows")
    before = central_width(prior)
    if not bool((before > 0).all()):
        raise ValueError(f"the prior of {name!r} holds it at a point: there is nothing to contract")
    ratio = (central_width(posterior) / before).square()
    most = ratio * (1 + 2 * NOISE / math.sqrt(len(posterior)))
    return Contraction(1 - float(ratio.mean()), float((1 - most < UNINFORMED).double().mean()), ratio.numel())
