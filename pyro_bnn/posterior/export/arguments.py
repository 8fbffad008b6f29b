"""How an exported module is called: as the network is, with the tensors of an example as its arguments."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pyro_bnn.inputs import Inputs, describe
from pyro_bnn.perturb.samples import batched


@dataclass(frozen=True)
class Arguments:
    """The arguments of a network, ``net(x)``, ``net(*x)`` or ``net(**x)``, of which some are tensors with samples.

    What is not a tensor (``None``, a number, a word) is a setting, which stays as it is in the example.

    :param names: of the tensors, in the order of the call.
    :param example: the tensors of the example, with its samples on axis 0.
    :param spec: how x is made of all arguments.
    :param every: all arguments, with ``None`` in the place of the tensors.
    :param places: of the tensors among them.
    """

    names: tuple[str, ...]
    example: tuple[Tensor, ...]
    spec: pytree.TreeSpec
    every: tuple[object, ...]
    places: tuple[int, ...]

    @classmethod
    def of(cls, x: Inputs, net: nn.Module, size: int) -> Arguments:
        """
        :param x: an input with ``size`` samples, as :func:`~pyro_bnn.inputs.inputs` returns it.
        :raises TypeError: for containers in containers, and keys that are not names of arguments.
        :raises ValueError: for a tensor without the axis of the samples.
        """
        every, spec = pytree.tree_flatten(x)
        if isinstance(x, dict):
            names = list(x)
        else:
            names = _positions(net, len(every))
        if odd := [name for name in names if not isinstance(name, str) or not name.isidentifier()]:
            raise TypeError(f"example has the key {odd[0]!r}, which cannot be the name of an argument: rename it")
        if any(not child.is_leaf() for child in spec.children()):
            raise TypeError(
                f"example is {describe(x)} with containers inside: expected a tensor, or a tuple or dict of tensors, "
                "which become the arguments of the exported module. Give the network a forward() that takes these"
            )
        places = [i for i, value in enumerate(every) if isinstance(value, Tensor)]
        for i in places:
            if not batched(every[i], size):
                raise ValueError(
                    f"{names[i]!r} of example has shape {list(every[i].shape)}, without the {size} samples on axis 0 "
                    "that the first tensor has: make it a buffer of the network, or repeat it for every sample"
                )
        example = tuple(every[i] for i in places)
        settings = tuple(None if isinstance(value, Tensor) else value for value in every)
        return cls(tuple(names[i] for i in places), example, spec, settings, tuple(places))

    def input(self, tensors: Iterable[Tensor]) -> Inputs:
        """The x of these tensors."""
        every = list(self.every)
        for place, tensor in zip(self.places, tensors, strict=True):
            every[place] = tensor
        return pytree.tree_unflatten(every, self.spec)

    def rows(self, size: int) -> tuple[Tensor, ...]:
        """The tensors with ``size`` samples: the first ones of the example, over again if it has fewer."""
        have = self.example[0].shape[0]
        return tuple(t[torch.arange(size, device=t.device) % have] for t in self.example)


class Expected(nn.Module):
    """Refuses tensors that are not like those of the example. Inside ``torch.export`` and ``torch.compile`` it is void.

    :param arguments: of the exported module.
    """

    _is_impure = True  # for torch.fx, which would remove a call without a result

    def __init__(self, arguments: Arguments) -> None:
        super().__init__()
        self.names = arguments.names
        self.shapes = [list(t.shape[1:]) for t in arguments.example]
        self.dtypes = [t.dtype for t in arguments.example]

    def forward(self, *given: Tensor) -> None:
        """
        :raises TypeError: for an argument that is not a tensor, or of another dtype.
        :raises ValueError: for another shape, or tensors with different numbers of samples.
        """
        if torch.compiler.is_compiling():
            return
        for name, t, shape, dtype in zip(self.names, given, self.shapes, self.dtypes, strict=True):
            like = f"[samples, {', '.join(map(str, shape))}]" if shape else "[samples]"
            if not isinstance(t, Tensor) or t.dtype != dtype:
                found = t.dtype if isinstance(t, Tensor) else type(t).__name__
                raise TypeError(
                    f"{name} is {found}: this module was exported for a tensor {like} of {dtype}; convert it, or "
                    "export with such an example"
                )
            if t.dim() != len(shape) + 1 or list(t.shape[1:]) != shape or t.shape[0] != given[0].shape[0]:
                raise ValueError(
                    f"{name} has shape {list(t.shape)}: this module was exported for {like}, with as many samples in "
                    "all arguments; for another shape export with an example of it"
                )


def _positions(net: nn.Module, count: int) -> list[str]:
    """The names of the first ``count`` positional arguments of a network; ``x_0``, ``x_1`` ... where it has none."""
    parameters = inspect.signature(net.forward).parameters.values()
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in parameters if p.kind in plain][:count]
    return names + [f"x_{i}" for i in range(len(names), count)]
