"""New starting values for the parameters of a network."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from pyro_bnn.given.copying import copy_of


def fresh_copy(net: nn.Module, movable: Collection[str] | None = None) -> nn.Module:
    """A copy of a network whose modules have reset their parameters with ``reset_parameters``.

    :param movable: names of the parameters that get new values, the others stay; by default those that take a gradient.
    :raises ValueError: when one of them still has its old value, and that may not be the value that it starts with.
    """
    net = copy_of(net)
    if movable is None:
        movable = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    stuck = _unchanged_by_reset(net, before, movable)
    if stuck:  # perhaps it was made from the very random state that it was reset from: that state has moved on now
        stuck = _unchanged_by_reset(net, before, movable)
    for name, parameter in net.named_parameters():
        if name not in movable:
            parameter.data.copy_(before[name])
    if stuck:
        raise ValueError(
            f"the modules of the network cannot give {stuck[0]!r} a new starting value"
            + (f" (nor {len(stuck) - 1} others: {', '.join(stuck[1:4])} ...)" if len(stuck) > 1 else "")
        )
    return net


def _unchanged_by_reset(net: nn.Module, before: dict[str, Tensor], movable: Collection[str]) -> list[str]:
    """Resets the modules. The names of parameters that still have the values before, unless they always start there."""
    owned: set[int] = set()
    for module in net.modules():
        # attention and nn.Transformer have the underscore
        reset = getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None))
        if callable(reset):
            reset()
            owned.update(id(p) for p in module.parameters(recurse=False))
    return [
        name
        for name, parameter in net.named_parameters()
        if name in movable
        and torch.equal(parameter, before[name])
        and (id(parameter) not in owned or _varies(parameter))
    ]


def _varies(value: Tensor) -> bool:
    """Whether the elements differ: a constant is what biases and gains start with."""
    return value.numel() > 0 and bool((value != value.flatten()[0]).any())
