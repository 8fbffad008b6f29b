"""Finds the channels that a network does not need once some weights are fixed at zero, and removes them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pyro_bnn.inputs import Inputs
from pyro_bnn.modes import undisturbed
from pyro_bnn.network import no_fused_attention
from pyro_bnn.sparsity.channel_rules import ONE, SEVERAL
from pyro_bnn.sparsity.walk import Walk, all_true


class Channels:
    """The channels that a network does not need when some of its weights are fixed at zero.

    :param net: a module that ``torch.fx`` can trace, with every optional argument at its default; axis 0 of all inputs
        runs over the samples. It is never changed, and :meth:`masked` and :meth:`smaller` copy it as it is then.
    :param kept: by parameter name (tied ones under their first name) a bool mask of the parameter's shape, true where
        a weight is kept. Parameters that it leaves out are kept whole.
    :param held: by name of a layer's weight, true for the outputs of the layer that are never taken for dead.
    :ivar kept: such a mask for every parameter: a channel whose weights are all masked where it is made, or where it
        is read, also loses its other weights, its biases, and its scale and shift in batch normalisation.
    :ivar index: for every parameter and buffer, the entries of each axis that stay; None where all do.
    :ivar dead: the channels that are removed because everything that makes them is masked. What they pass on without
        weights (a bias, a shift of batch normalisation) is taken as zero: :mod:`pyro_bnn.sparsity.sparsify` moves it
        elsewhere.
    :raises TypeError: when ``net`` is not a module, or a mask is not a bool tensor.
    :raises ValueError: on an unknown name, a mask of another shape, or a network that cannot be traced.

    In a linear layer's output the last axis holds the channels. ``BatchNorm1d`` after it is taken to be over
    ``[N, features]`` when it has as many features.
    """

    kept: dict[str, Tensor]
    index: dict[str, tuple[Tensor | None, ...]]

    def __init__(self, net: nn.Module, kept: Mapping[str, Tensor], held: Mapping[str, Tensor] | None = None) -> None:
        if not isinstance(net, nn.Module):
            raise TypeError(f"net must be a torch.nn.Module, got {type(net).__name__}")
        parameters = dict(net.named_parameters())
        for name, mask in kept.items():
            if name not in parameters:
                raise ValueError(f"there is no parameter {name!r}; the network has {', '.join(parameters) or '(none)'}")
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                raise TypeError(f"the mask of {name!r} must be a bool tensor, got {getattr(mask, 'dtype', type(mask))}")
            if mask.shape != parameters[name].shape:
                shapes = f"{tuple(mask.shape)}, the parameter has {tuple(parameters[name].shape)}"
                raise ValueError(f"the mask of {name!r} has shape {shapes}")
        masks = {n: kept[n].to("cpu", copy=True) if n in kept else all_true(p.shape) for n, p in parameters.items()}
        walk = Walk(net, masks, held or {}, ONE, SEVERAL)
        walk.settle()
        self.net = net
        self.kept = {name: masks[name].to(p.device) for name, p in parameters.items()}
        self._shapes = {name: t.shape for name, t in [*parameters.items(), *net.named_buffers()]}
        self.index = walk.index(self._shapes)
        self.dead = walk.dead()
        self._sizes = walk.sizes

    def mask(self, name: str, tensor: Tensor) -> Tensor:
        """A parameter's values ``[..., *shape]`` with zeros where they are not kept. Those of a buffer are all kept.

        :param name: name of a parameter or buffer.
        :raises ValueError: when there is no such name, or the values do not have its shape.
        """
        self._check(name, tensor)
        return tensor.masked_fill(~self.kept[name].to(tensor.device), 0) if name in self.kept else tensor

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """The values of a parameter or buffer that stay: ``[..., *shape] -> [..., *smaller shape]``.

        :raises ValueError: when there is no such name, or the values do not have its shape.
        """
        self._check(name, tensor)
        for axis, stays in enumerate(self.index[name], tensor.dim() - len(self._shapes[name])):
            tensor = tensor if stays is None else tensor.index_select(axis, stays.to(tensor.device))
        return tensor

    def masked(self) -> nn.Module:
        """A copy of the network in which weights that are not kept are zero."""
        net = copy.deepcopy(self.net)
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                if not self.kept[name].all():
                    parameter.copy_(self.mask(name, parameter))
        return net

    def smaller(self) -> nn.Module:
        """A copy without the removable channels: in eval mode it predicts as :meth:`masked` does, up to rounding."""
        net = self.masked()
        for name in (name for name, axes in self.index.items() if any(stays is not None for stays in axes)):
            prefix, _, own = name.rpartition(".")
            module = net.get_submodule(prefix)
            old = getattr(module, own)
            new = self.cut(name, old.detach())
            setattr(module, own, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
        for prefix, attribute, own, axis in self._sizes:
            module = net.get_submodule(prefix)
            setattr(module, attribute, getattr(module, own).shape[axis])
        return net

    def _check(self, name: str, tensor: Tensor) -> None:
        if name not in self._shapes:
            raise ValueError(f"there is no parameter or buffer {name!r}; the network has {', '.join(self._shapes)}")
        shape = self._shapes[name]
        if tensor.shape[max(0, tensor.dim() - len(shape)) :] != shape:
            raise ValueError(f"values of {name!r} are [..., {tuple(shape)}], got {tuple(tensor.shape)}")


@dataclass(frozen=True)
class Size:
    """The size of a network, see :func:`count`.

    :param parameters: number of parameters as stored.
    :param nonzero: number of parameters that are not zero.
    :param bytes: bytes of parameters and buffers.
    :param multiply_adds: number of multiply-adds of one pass; ``None`` without an input.
    """

    parameters: int
    nonzero: int
    bytes: int
    multiply_adds: int | None = None


def count(net: nn.Module, x: Inputs = None, kept: Mapping[str, Tensor] | None = None) -> Size:
    """The size of a network. Tied parameters count once, and the bytes are those of a dense tensor, zeros included.

    :param x: an input; a tuple is taken as the arguments, a dict as keyword arguments. The multiply-adds are those of
        matrix products and convolutions in eval mode, for all samples in it; fused recurrent kernels are not counted.
    :param kept: masks by parameter name; what they do not keep counts as zero.
    """
    parameters = dict(net.named_parameters())
    masks = {name: mask.to(parameters[name].device) for name, mask in (kept or {}).items()}
    multiply_adds = None
    if x is not None:
        args, kwargs = ((), x) if isinstance(x, dict) else (x if isinstance(x, (tuple, list)) else (x,), {})
        # the counter does not know the fused kernels for attention
        with undisturbed(net), no_fused_attention(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as f:
            net(*args, **kwargs)
        multiply_adds = f.get_total_flops() // 2
    return Size(
        parameters=sum(p.numel() for p in parameters.values()),
        nonzero=sum(int(((p != 0) & masks.get(name, True)).sum()) for name, p in parameters.items()),
        bytes=sum(t.numel() * t.element_size() for t in [*parameters.values(), *net.buffers()]),
        multiply_adds=multiply_adds,
    )
