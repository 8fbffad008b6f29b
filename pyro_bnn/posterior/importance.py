"""Which groups of a spike-and-slab prior a posterior includes, by chain, and what they are worth to predictions."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from pyro_bnn.entry import checks
from pyro_bnn.inputs import Inputs, inputs, require_finite, targets
from pyro_bnn.modes import evaluating
from pyro_bnn.network import batch_size as count_samples
from pyro_bnn.posterior.draw_source import POSTERIOR_DRAWS, DrawSource
from pyro_bnn.posterior.network_outputs import predict_network
from pyro_bnn.posterior.stored_draws import DrawsGuide
from pyro_bnn.program.model import BayesianNetwork
from pyro_bnn.sparsity.inclusion import group_densities, inclusion_log_odds

#: difference of inclusion probabilities above which chains disagree
APART = 0.5
#: nats per row by which leaving out what is probably in the spike may raise the NLL of the training data
EXCESS = 0.05


@dataclass(frozen=True)
class ChainInclusion:
    """Inclusion probabilities of the groups of one parameter, by each chain alone.

    :param probability: ``[chains, *groups]``; their mean over chains is ``posterior.inclusion_probabilities()``.
    :param error: Monte Carlo standard error of that mean, ``[*groups]``: the standard deviation between chains over the
        square root of their number; NaN for one chain, which cannot tell.
    """

    probability: Tensor
    error: Tensor

    @property
    def apart(self) -> Tensor:
        """The largest difference between two chains, ``[*groups]``."""
        return self.probability.amax(0) - self.probability.amin(0)


@dataclass(frozen=True)
class Importance:
    """What the groups of one parameter are worth, each ``[*groups]``.

    :param inclusion: ``P(slab | data)``.
    :param loss: fall of the log predictive density without the group, in nats per row.
    :param error: standard error of the loss, from the rows; NaN for a single row.
    """

    inclusion: Tensor
    loss: Tensor
    error: Tensor


def chain_inclusion(source: DrawSource, args: tuple[object, ...] = ()) -> dict[str, ChainInclusion]:
    """Inclusion probabilities by each chain alone, with a warning where chains differ by more than ``APART``."""
    chains = []
    for one in source.by_chain():
        draws = one.groups(one.count_all(None, POSTERIOR_DRAWS))
        odds = inclusion_log_odds(source.model, draws, args)
        chains.append({name: value.sigmoid() for name, value in odds.items()})
    found = {}
    for name in chains[0]:
        probability = torch.stack([chain[name] for chain in chains])
        several = len(chains) > 1
        deviation = probability.std(0) if several else torch.full_like(probability[0], torch.nan)
        found[name] = ChainInclusion(probability, deviation / math.sqrt(len(chains)))
    counts = {name: count for name, of in found.items() if (count := int((of.apart > APART).sum()))}
    if counts:
        where = ", ".join(f"{count} of {found[name].error.numel()} of {name!r}" for name, count in counts.items())
        warnings.warn(
            f"chains differ by more than {APART} in the inclusion probability of some groups ({where}): they have not "
            "found the same groups, and their mean is no posterior probability. Use more warmup_steps or more chains; "
            "posterior.inclusion_by_chain() has each chain",
            stacklevel=4,
        )
    return found


def row_losses(
    source: DrawSource,
    x: Inputs,
    y: object,
    chosen: dict[str, Tensor],
    batch_size: int | None = None,
    order: Tensor | None = None,
) -> dict[str, Tensor]:
    """Fall of the log predictive density of every row without one group, ``{parameter: [chosen groups, rows]}``.

    :param source: stored draws of a network whose weights are sites.
    :param chosen: the groups that are left out one by one, True in ``[*groups]``.
    :param order: a permutation of the rows. Groups of a layer that reads x itself then keep their weights, and their
        input is shuffled among the rows, which leaves its values as they are: 0 may be a value that never occurs.
    """
    model, guide = source.model, source.stored
    assert isinstance(model, BayesianNetwork) and guide is not None
    draws, found = guide.draws(), {}
    x, y = inputs(x, model.like()), targets(y, model.like())
    require_finite(x)
    count_samples(x, y)
    whole = log_predictive(source, x, y, batch_size)
    for name, density in group_densities(model, list(chosen)).items():
        site, losses = model.site(name), []
        read = None if order is None else input_as_read(model, name, x)
        for index in chosen[name].flatten().nonzero().flatten().tolist():
            if read is not None and order is not None and isinstance(x, Tensor):
                values, axis = read
                shuffled = values.clone()
                shuffled.select(axis, index).copy_(values.select(axis, index)[order.to(y.device)])
                density_without = log_predictive(source, shuffled.reshape(x.shape), y, batch_size)
            else:
                value = draws[site].clone()
                value[(slice(None), slice(None), *density.one_group(index))] = float(density.loc)
                left = DrawsGuide(draws | {site: value}, model, 1, guide.statistics())
                density_without = log_predictive(DrawSource(model, left), x, y, batch_size)
            losses.append(whole - density_without)
        found[name] = torch.stack(losses) if losses else whole.new_empty((0, len(whole)))
    return found


def input_as_read(model: BayesianNetwork, name: str, x: Inputs) -> tuple[Tensor, int] | None:
    """x as the layer of a weight reads it, a view, and the axis along which the columns of the weight multiply it.

    ``None`` where the layer reads something else than x, or is called more than once.
    """
    net = model.core().net
    weight, owner = net.get_parameter(name), net.get_submodule(name.rpartition(".")[0])
    if not isinstance(x, Tensor) or not isinstance(owner, (nn.Linear, _ConvNd)):
        return None
    some, seen = x[:8], list[Tensor]()
    hook = owner.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        with torch.no_grad(), evaluating(model):
            net(some)
    finally:
        hook.remove()
    axis = -1 if isinstance(owner, nn.Linear) else 1
    if len(seen) != 1 or seen[0].shape[axis] != weight.shape[1]:
        return None
    if len(seen[0]) != len(some) or seen[0].numel() != some.numel():
        return None
    as_read = x.reshape(len(x), *seen[0].shape[1:])
    return (as_read, axis) if torch.equal(as_read[: len(some)], seen[0]) else None


def importance(
    source: DrawSource, x: Inputs, y: object, least: float = 0.0, batch_size: int | None = None
) -> dict[str, Importance]:
    """See :meth:`pyro_bnn.Posterior.importance`."""
    checks.fraction("least", least)
    batch_size = checks.optional(checks.count, "batch_size", batch_size)
    guide = source.stored
    assert guide is not None
    odds = inclusion_log_odds(source.model, source.groups(len(guide)))
    inclusion = {name: value.sigmoid() for name, value in odds.items()}
    chosen = {name: value >= least for name, value in inclusion.items()}
    found = {}
    for name, losses in row_losses(source, x, y, chosen, batch_size).items():
        where = chosen[name].to(losses.device)
        loss = losses.new_full(where.shape, torch.nan)
        error = loss.clone()
        if losses.shape[1] > 1 and len(losses):
            error[where] = losses.std(1) / math.sqrt(losses.shape[1])
        loss[where] = losses.mean(1)
        found[name] = Importance(inclusion[name], loss, error)
    return found


def log_predictive(source: DrawSource, x: Inputs, y: Tensor, batch_size: int | None = None) -> Tensor:
    """Log of the mean density of each row over stored draws and members, ``[rows]``, in nats."""
    guide = source.stored
    assert guide is not None
    density = predict_network(source, x, len(guide), batch_size).log_prob(y).flatten(0, 1).double()
    return density.logsumexp(0) - math.log(len(density))


def excess_loss(full: DrawSource, pruned: DrawSource, data: tuple[Inputs, object]) -> float:
    """By how much the NLL of data grows from one posterior to the other, in nats per row.

    It warns above ``EXCESS``: what was left out is then needed.
    """
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        raise TypeError(f"data must be the pair (x, y) of training data, got {type(data).__name__}")
    assert isinstance(full.model, BayesianNetwork)
    like = full.model.like()
    x, y = inputs(data[0], like), targets(data[1], like)
    excess = float((log_predictive(full, x, y) - log_predictive(pruned, x, y)).mean())
    if excess > EXCESS:
        warnings.warn(
            f"without the groups that are probably in the spike the NLL of the data grows by {excess:.2f} nats per row "
            f"(more than {EXCESS}): they hold effects that the network needs, and inclusion does not tell what "
            "matters. Use a narrower spike (SpikeAndSlab.for_inputs), or more warmup_steps and chains",
            stacklevel=4,
        )
    return excess
