"""Turns draws into plain networks, without Pyro."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyro_bnn import display
from pyro_bnn.given.copying import copy_of
from pyro_bnn.modes import evaluating
from pyro_bnn.posterior.draw_source import DrawSource
from pyro_bnn.program.model import BayesianNetwork


def plain_networks(source: DrawSource, members: Tensor, seed: int | None) -> list[nn.Module]:
    """n networks: network i has the weights of draw i of member ``members[i]``, with the statistics of that draw.

    :param members: ``[n]``.
    :raises TypeError: when the draws are not weights, or the model is not from this package.
    """
    model, made = source.model, list[nn.Module]()
    if not isinstance(model, BayesianNetwork):
        raise TypeError(
            f"networks() is for models of this package, which know their network, not {display.name_of(model)}: "
            "posterior.sample(n) gives values of its sites"
        )
    with torch.no_grad(), evaluating(model):
        for group, index in source.indexed_groups(len(members), seed):
            for part in source.statistics.parts(model, group, index):
                for i in range(len(next(iter(part.values())))):
                    member = int(members[len(made)])
                    latents = {name: value[i, member % value.shape[1]] for name, value in part.items()}
                    made.append(_with_weights_of(model, latents))
    return made


def _with_weights_of(model: BayesianNetwork, latents: dict[str, Tensor]) -> nn.Module:
    """A copy of the model's network, with the weights of one draw of one member."""
    net = copy_of(model.core().net).eval().requires_grad_()
    parameters = dict(net.named_parameters())
    for name, value in model.core().held(model.weights_of(latents)).items():
        parameters[name].data.copy_(value)
    return net
