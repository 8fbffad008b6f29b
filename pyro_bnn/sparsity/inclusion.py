"""The posterior probability that a group of weights comes from the slab."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pyro import poutine
from torch import Tensor

from pyro_bnn.entry.threads import one_at_a_time
from pyro_bnn.modes import training_mode
from pyro_bnn.priors import SpikeAndSlab, SpikeAndSlabDistribution
from pyro_bnn.program.model import BayesianNetwork
from pyro_bnn.program.sites import Program

Draws = dict[str, Tensor]


def has_inclusion(model: object) -> bool:
    """Whether a network of this package has a spike-and-slab prior."""
    return any(isinstance(prior, SpikeAndSlab) for prior in getattr(model, "priors", {}).values())


def group_densities(model: BayesianNetwork, names: Iterable[str]) -> dict[str, SpikeAndSlabDistribution]:
    """Of each parameter a density with its groups; its rate and scale stand for any."""
    parameters, some = model.core().parameters_by_name(), model.like().new_full((), 0.5)
    found = {}
    for name in names:
        density = model.priors[name].with_share(some).elements(0.0, parameters[name].detach(), None)
        assert isinstance(density, SpikeAndSlabDistribution)
        found[name] = density
    return found


def keep_highest(scores: Sequence[Tensor], densities: Sequence[SpikeAndSlabDistribution], share: float) -> list[Tensor]:
    """Masks, false for the groups with the lowest scores over all sites, until a share of all weights is removed.

    :param scores: of every group, ``[*lead, *groups]`` for each site; each entry of ``lead`` is ranked on its own.
    """
    shapes = [density.groups for density in densities]
    flat = [score.flatten(-len(shape)) for score, shape in zip(scores, shapes, strict=True)]
    counts = [(score.shape[-1], density.group_size) for score, density in zip(flat, densities, strict=True)]
    sizes = torch.cat([torch.full((n,), size, device=flat[0].device) for n, size in counts])
    order = torch.cat(flat, -1).argsort(-1)
    # with a tolerance, as 0.29 of 100 is slightly less than 29 in floating point
    gone = sizes[order].cumsum(-1) <= math.floor(share * sum(n * size for n, size in counts) + 1e-6)
    keep = torch.ones_like(gone).scatter_(-1, order, ~gone)
    parts = keep.split([n for n, _ in counts], -1)
    return [part.unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True)]


@one_at_a_time
def inclusion_log_odds(model: Program, groups: Iterable[Draws], args: tuple[object, ...] = ()) -> dict[str, Tensor]:
    """``log (p / (1 - p))`` in nats, with p as of ``posterior.inclusion_probabilities()``, which may round to 0 or 1.

    Groups that were removed have minus infinity.

    :param groups: draws ``{site: [n, members, *event]}``, some at a time.
    :param args: the arguments of a user's own Pyro model.
    :raises ValueError: when the model has no spike-and-slab site.
    """
    sums: dict[str, Tensor] = {}
    for name, odds in _of_every_draw(model, groups, args):
        odds = odds.double()
        both = torch.stack([F.logsigmoid(odds), F.logsigmoid(-odds)]).logsumexp(1)
        sums[name] = torch.logaddexp(sums[name], both) if name in sums else both
    if not sums:
        raise ValueError(
            "the model has no spike-and-slab site: give it the prior pyro_bnn.priors.SpikeAndSlab (pb.models.SpikeSlab)"
        )
    return {name: (included - excluded).float() for name, (included, excluded) in sums.items()}


def _of_every_draw(model: Program, groups: Iterable[Draws], args: tuple[object, ...]) -> Iterator[tuple[str, Tensor]]:
    """Log odds ``[several, *groups]`` of each site, until every draw was used."""
    for draws in groups:
        if isinstance(model, BayesianNetwork):
            prefix = f"{model.prefix}." if model.prefix else ""
            plated = {name: model.plated(value) for name, value in draws.items()}
            for name, odds in _log_odds(model.sample_latents, (), plated):
                yield name.removeprefix(prefix), odds
            continue
        for i in range(len(next(iter(draws.values())))):
            yield from _log_odds(model, args, {name: value[i, 0] for name, value in draws.items()})


def _log_odds(program: Program, args: tuple[object, ...], values: Draws) -> Iterator[tuple[str, Tensor]]:
    with torch.no_grad(), training_mode(False):
        trace = poutine.trace(poutine.condition(program, values)).get_trace(*args)
    nodes: dict[str, Any] = trace.nodes
    for name, site in nodes.items():
        density = site.get("fn")
        if isinstance(density, SpikeAndSlabDistribution):
            value = site["value"]
            odds = density.log_odds(value).masked_fill(density.mean_square(value) == 0, -torch.inf)
            yield name, odds.reshape((-1,) + density.groups)
