"""How probable draws are: under the prior, log p(theta), and under the guide that made them, log q(theta)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from pyro_bnn.diagnostics.scoring.precision import wide
from pyro_bnn.entry.threads import one_at_a_time
from pyro_bnn.inputs import Inputs
from pyro_bnn.modes import training_mode
from pyro_bnn.program.guide import MixtureGuide
from pyro_bnn.program.model import BayesianNetwork

if TYPE_CHECKING:
    from pyro_bnn.posterior import Posterior


def log_prior(model: BayesianNetwork, draws: dict[str, Tensor]) -> Tensor:
    """The log prior density ``log p(theta)`` of each draw of each member, ``[n, members]``, in nats.

    :param draws: ``{site: [n, members, *event]}``.
    """
    n = len(next(iter(draws.values())))
    members = max(value.shape[1] for value in draws.values())
    values = {name: model.plated(value) for name, value in draws.items()}
    device = model.like().device
    plate = pyro.plate(
        model.site("members"),
        1,
        subsample=torch.arange(members, device=device),
        dim=model.members_dim,
        device=str(device),
    )
    lead = pyro.plate("_draws", n, dim=model.members_dim - 1, device=str(device))
    with torch.no_grad(), training_mode(False), poutine.block(), lead, plate:
        trace = poutine.trace(poutine.condition(model.sample_latents, values)).get_trace()
    nodes: dict[str, Any] = trace.nodes
    total = wide(torch.zeros(n, members, device=device))
    for name, value in values.items():
        total += wide(nodes[name]["fn"].log_prob(value)).reshape(n, -1)
    return total


@one_at_a_time
def log_densities(
    posterior: Posterior, n: int, seed: int | None = None, *, example: Inputs = None
) -> tuple[Tensor, Tensor | None]:
    r"""``log p(theta)`` and ``log q(theta)`` of the draws of ``posterior.draws(n, seed)``, each ``[n, members]``.

    q is the density of the whole guide. For a mixture with K members it is ``q(theta) = (1/K) sum_k q_k(theta)``,
    whichever member made the draw. A site that the guide holds at a point adds its prior density to log p and nothing
    to log q.

    :returns: both in nats. log q is ``None`` for a posterior without a density: one of stored draws, particles or
        points, or one whose guide is a function with auxiliary sites.
    :raises TypeError: when the model is not one of this package.
    """
    model = posterior.model
    if not isinstance(model, BayesianNetwork):
        raise TypeError(
            f"densities of draws need a model of pyro_bnn.models, got {type(model).__name__}: trace your own model "
            "with pyro.poutine"
        )
    prior, guide = [], []
    for draws, traces in _groups(posterior, n, seed, example):
        prior.append(log_prior(model, draws))
        if traces and all(_has_density(posterior.guide, trace) for trace in traces):
            with torch.no_grad():
                guide.append(log_guide(posterior, draws, traces))
    return torch.cat(prior), torch.cat(guide) if guide else None


def has_density(posterior: Posterior, example: Inputs = None) -> bool:
    """Whether draws come from a guide with a density."""
    if posterior.num_stored is not None:
        return False
    source = posterior.draw_source
    return all(
        _has_density(posterior.guide, trace) for _, traces in source.traces(1, 0, example=example) for trace in traces
    )


def _groups(
    posterior: Posterior, n: int, seed: int | None, example: Inputs
) -> Iterator[tuple[dict[str, Tensor], list[poutine.Trace]]]:
    if posterior.num_stored is None:
        yield from posterior.draw_source.traces(n, seed, example=example)
    else:
        yield from ((draws, []) for draws in posterior.draw_source.groups(n, seed))


def _sampled(trace: poutine.Trace) -> Iterator[tuple[str, Any]]:
    nodes: dict[str, Any] = trace.nodes
    for name, site in nodes.items():
        if site["type"] == "sample" and not site["is_observed"] and not poutine.util.site_is_subsample(site):
            yield name, site


def _has_density(guide: object, trace: poutine.Trace) -> bool:
    if isinstance(guide, (MixtureGuide, AutoGuide)):
        return any(not _is_point(site["fn"]) for _, site in _sampled(trace))
    # If a guide has auxiliary sites, its trace gives their joint density with the latent sites, not q(theta).
    sites = dict(_sampled(trace))
    return any(not _is_point(site["fn"]) for site in sites.values()) and not any(
        site["infer"].get("is_auxiliary") for site in sites.values()
    )


def _is_point(fn: object) -> bool:
    while not isinstance(fn, Delta) and hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, Delta)


def log_guide(posterior: Posterior, draws: dict[str, Tensor], traces: list[poutine.Trace]) -> Tensor:
    """``log q(theta)`` of draws, from the traces that made them, ``[n, members]``."""
    guide, model = posterior.guide, posterior.model
    if isinstance(guide, MixtureGuide) and isinstance(model, BayesianNetwork):
        return _log_mixture(model, dict(_sampled(traces[0])), draws)
    n = len(next(iter(draws.values()))) if len(traces) == 1 else 1  # a single trace holds all draws in a plate
    rows = [
        sum(wide(site["fn"].log_prob(site["value"])).reshape(n, -1).sum(1) for _, site in _sampled(trace))
        for trace in traces
    ]
    return torch.cat([torch.as_tensor(row) for row in rows]).unsqueeze(1)


def _log_mixture(model: BayesianNetwork, sites: dict[str, Any], draws: dict[str, Tensor]) -> Tensor:
    """The mixture density of each draw, ``log (1/K) sum_k q_k``; sites are independent within a member."""
    columns = []
    for j in range(max(value.shape[1] for value in draws.values())):
        under = wide(torch.zeros((), device=model.like().device))
        for name, value in draws.items():
            own = model.plated(value[:, j : j + 1] if value.shape[1] > 1 else value)
            fn = sites[name]["fn"]
            under = under + wide(fn.log_prob(own)).reshape(len(value), -1)
        columns.append(under.logsumexp(1) - math.log(under.shape[1]))
    return torch.stack(columns, 1)
