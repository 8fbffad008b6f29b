"""A posterior without the weights that are probably spikes: masks, and a smaller network where channels vanish."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyro_bnn.entry import checks
from pyro_bnn.inputs import Inputs, inputs
from pyro_bnn.modes import undisturbed
from pyro_bnn.network import batch_size
from pyro_bnn.perturb.samples import select_samples
from pyro_bnn.program.model import BayesianNetwork
from pyro_bnn.sparsity.channels import Channels, Size, count
from pyro_bnn.sparsity.inclusion import group_densities, keep_highest
from pyro_bnn.sparsity.walk import Block, Dead

#: values by site or parameter, ``[draws, members, *shape]``
Draws = dict[str, Tensor]
Masks = dict[str, Tensor]


class Sparse(NamedTuple):
    """A model without the removed weights, draws for it, and how much was removed."""

    model: BayesianNetwork
    draws: Draws
    statistics: dict[str, Tensor]
    masks: Masks
    before: Size
    after: Size


def with_weight_sites(model: object) -> BayesianNetwork:
    """The model itself.

    :raises TypeError: when it is not one whose weights are sites.
    """
    if not isinstance(model, BayesianNetwork) or any(site.role == "factor" for site in model.sites()):
        raise TypeError(
            f"sparsify() is for networks whose weights are sites (pb.models.SpikeSlab), not {type(model).__name__}"
        )
    return model


def sparsify(
    model: BayesianNetwork,
    draws: Draws,
    statistics: dict[str, Tensor],
    odds: dict[str, Tensor],
    sparsity: float | None = None,
    *,
    example: Inputs = None,
    shrink: bool = True,
) -> Sparse:
    """The model and its draws without the groups that are probably spikes; see :meth:`pyro_bnn.Posterior.sparsify`.

    :param draws: ``{site: [n, members, *event]}``.
    :param statistics: of normalisation layers, ``{buffer: [n, *shape]}``; empty if all draws share the network's.
    :param odds: of the slab, as of :func:`~pyro_bnn.sparsity.inclusion.inclusion_log_odds`.
    """
    if sparsity is not None and not 0 <= checks.finite("sparsity", sparsity) < 1:
        raise ValueError(f"sparsity={sparsity!r}: expected the share of weights to remove, in [0, 1), or None")
    network, example = model.core().net, inputs(example, model.like())
    masks = _masks(model, odds, sparsity)
    before = _size(network, by_parameter(model, draws), example)
    draws = {name: _masked(value, masks.get(_parameter(model, name))) for name, value in draws.items()}
    smaller = copy.deepcopy(network)
    if shrink:
        channels, draws = _without_constants(model, masks, draws, statistics, example)
        masks, smaller = channels.kept, channels.smaller()
        draws = {name: _cut(channels, _parameter(model, name), value) for name, value in draws.items()}
        statistics = {name: channels.cut(name, value) for name, value in statistics.items()}
    new = model.on(smaller)
    after = _size(new.core().net, by_parameter(new, draws), example)
    return Sparse(new, draws, statistics, masks, before, after)


def network_of_draw(
    model: BayesianNetwork, draws: Draws, statistics: dict[str, Tensor], draw: int | None = None
) -> nn.Module:
    """A plain network in eval mode, with the weights of one draw of the first member, or with the mean weights."""
    net = copy.deepcopy(model.core().net).eval().requires_grad_()
    tensors = dict([*net.named_parameters(), *net.named_buffers()])
    parameters = {
        name: value.mean(1) if draw is None else value[:, 0] for name, value in by_parameter(model, draws).items()
    }
    with torch.no_grad():
        for name, value in (parameters | statistics).items():
            tensors[name].copy_(value.to(torch.float64).mean(0) if draw is None else value[draw])
    return net


def _masks(model: BayesianNetwork, odds: dict[str, Tensor], sparsity: float | None) -> Masks:
    """Masks of the weights of spike-and-slab sites that stay: the likelier groups. Removed weights stay removed."""
    parameters = model.core().parameters_by_name()
    densities = group_densities(model, odds)
    for name, density in densities.items():
        if density.loc:
            raise ValueError(f"the prior of {name!r} is centred at {density.loc}: only weights around 0 can be removed")
    if sparsity is None:
        stays = {name: value >= 0 for name, value in odds.items()}
    else:
        highest = keep_highest(list(odds.values()), list(densities.values()), sparsity)
        stays = {name: keep & ~odds[name].isneginf() for name, keep in zip(odds, highest, strict=True)}
    return {
        name: densities[name].within_groups(value).expand(parameters[name].shape).to(parameters[name].device).clone()
        for name, value in stays.items()
    }


def _without_constants(
    model: BayesianNetwork, masks: Masks, draws: Draws, statistics: dict[str, Tensor], example: Inputs
) -> tuple[Channels, Draws]:
    """The channels to remove, and draws in which those that have no weights left pass nothing on.

    Such a channel is a constant (of its bias, or the shift of a normalisation layer). It goes when every layer that
    reads it can take the constant into its own bias; where one cannot, as a convolution whose padding would show, or a
    layer without a random bias, the channel stays.
    """
    network = model.core().net
    channels = Channels(network, masks)
    if not channels.dead:
        return channels, draws
    if example is None:
        raise ValueError(
            "some channels have no weights left, and an input is needed to find their constant output: give example=, "
            "one or more inputs, or shrink=False to mask weights without cutting channels"
        )
    inputs = _inputs(model, channels.dead, draws, statistics, example)
    held: Masks = {}
    while _hold_needed(model, channels.dead, inputs, draws, held):
        channels = Channels(network, masks, held)
    folded = dict(draws)
    for dead in channels.dead:
        for block in dead.readers:
            _fold(model, dead.channels, block, inputs, draws, folded)
    return channels, {name: _masked(v, channels.kept.get(_parameter(model, name))) for name, v in folded.items()}


def _inputs(
    model: BayesianNetwork, found: list[Dead], draws: Draws, statistics: dict[str, Tensor], example: Inputs
) -> dict[str, tuple[Tensor, Tensor]]:
    """The least and the largest value of every input channel (of a linear layer: of every feature) of the layers that
    read dead channels, ``{layer: [draws, members, channels]}``, for the first row of the example."""
    network = model.core().net
    names = {block.name.rpartition(".")[0] for dead in found for block in dead.readers}
    number, members = next(iter(draws.values())).shape[:2]
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}

    def note(name: str) -> Any:
        def hook(layer: nn.Module, args: Any) -> None:
            x = args[0].flatten(2) if isinstance(layer, nn.modules.conv._ConvNd) else args[0].flatten(0, -2).T[None]
            seen[name].append((x.amin((0, -1)), x.amax((0, -1))))

        return hook

    handles = [network.get_submodule(name).register_forward_pre_hook(note(name)) for name in names]
    row = select_samples(example, batch_size(example), [0])
    parameters = {_parameter(model, name): value for name, value in draws.items()}
    own = [name for name, _ in network.named_parameters() if name in parameters]
    try:
        with undisturbed(network):
            for draw in range(number):
                buffers = {name: value[draw] for name, value in statistics.items()}
                for member in range(members):
                    model.core()(row, {name: parameters[name][draw, member] for name in own} | buffers)
    finally:
        for handle in handles:
            handle.remove()
    lead = (number, members)
    return {
        name: (
            torch.stack([low for low, _ in values]).unflatten(0, lead),
            torch.stack([high for _, high in values]).unflatten(0, lead),
        )
        for name, values in seen.items()
    }


def _entries(block: Block, channels: Tensor) -> Tensor:
    """The entries along the axis of the block that belong to these channels, ``[channels, run]``."""
    return block.start + channels[:, None] * block.run + torch.arange(block.run)


def _takes_constants(model: BayesianNetwork, name: str, draws: Draws) -> bool:
    """Whether a layer can absorb a constant input in its bias, and has a bias in every draw."""
    layer: Any = model.core().net.get_submodule(name)
    if model.site(f"{name}.bias") not in draws:
        return False
    if isinstance(layer, nn.Linear):
        return True
    padded = layer.padding_mode == "zeros" and (isinstance(layer.padding, str) or any(layer.padding))
    return not layer.transposed and not padded


def _hold_needed(
    model: BayesianNetwork, found: list[Dead], inputs: dict[str, tuple[Tensor, Tensor]], draws: Draws, held: Masks
) -> bool:
    """Marks the dead channels that cannot be removed as held; False if there is none."""
    network = model.core().net
    some = False
    for dead in found:
        goes = torch.full(dead.channels.shape, dead.traced)
        for block in dead.readers:
            name = block.name.rpartition(".")[0]
            low, high = (value[..., _entries(block, dead.channels).to(value.device)] for value in inputs[name])
            nothing = ((low == 0) & (high == 0)).all(-1)
            constant = (high - low <= 1e-6 * high.abs().amax()).all(-1)
            takes = constant if _takes_constants(model, name, draws) else nothing
            goes &= (nothing | takes).flatten(0, 1).all(0).cpu()
        if not goes.all():
            some, maker = True, dead.makers[0]
            size = network.get_parameter(maker.name).shape[maker.axis]
            rows = held.setdefault(maker.name, torch.zeros(size, dtype=torch.bool))
            maker.of(rows)[dead.channels[~goes]] = True
    return some


def _fold(
    model: BayesianNetwork,
    channels: Tensor,
    block: Block,
    inputs: dict[str, tuple[Tensor, Tensor]],
    draws: Draws,
    folded: Draws,
) -> None:
    """Moves the constants that dead channels pass to one layer into its bias."""
    name = block.name.rpartition(".")[0]
    entries = _entries(block, channels).flatten()
    constant = inputs[name][0][..., entries.to(inputs[name][0].device)]
    if not bool(constant.any()):
        return
    weight = draws.get(model.site(block.name), model.core().net.get_parameter(block.name).detach()[None, None])
    read = weight.index_select(block.axis + 2, entries.to(weight.device))
    bias = model.site(f"{name}.bias")
    over_kernel = read.flatten(4).sum(-1) if read.dim() > 4 else read
    folded[bias] = folded[bias] + (over_kernel @ constant[..., None]).squeeze(-1)


def _parameter(model: BayesianNetwork, site: str) -> str:
    return site.removeprefix(f"{model.prefix}.") if model.prefix else site


def by_parameter(model: BayesianNetwork, draws: Draws) -> Draws:
    """Draws of the network's own parameters, by their names, without draws of inclusion probabilities and scales."""
    own = model.core().parameters_by_name()
    named = {_parameter(model, name): value for name, value in draws.items()}
    return {name: value for name, value in named.items() if name in own}


def _masked(value: Tensor, mask: Tensor | None) -> Tensor:
    return value if mask is None or bool(mask.all()) else value.masked_fill(~mask.to(value.device), 0)


def _cut(channels: Channels, name: str, value: Tensor) -> Tensor:
    """Draws of a parameter, or of what belongs to each of its elements."""
    name = name.removesuffix("_lambda")
    return channels.cut(name, value) if name in channels.index else value


def _size(net: nn.Module, draws: Mapping[str, Tensor], example: Inputs) -> Size:
    nonzero = sum(int((value != 0).flatten(0, 1).any(0).sum()) for value in draws.values())
    fixed = sum(int((p != 0).sum()) for name, p in net.named_parameters() if name not in draws)
    return replace(count(net, example), nonzero=nonzero + fixed)
