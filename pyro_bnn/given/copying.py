"""The copy of a network that a model works on, and the wrappers around networks.

A copy is plain: wrappers that run a network elsewhere (``torch.compile``, ``DataParallel``) are removed, and embedding
tables give dense gradients, with the same values. Networks that cannot run with other weights are refused by name.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.overrides import TorchFunctionMode

_COMPILED = "_orig_mod"  # known by this attribute: importing the class of torch.compile would load the compiler


def unwrapped(net: nn.Module) -> nn.Module:
    """The network inside ``torch.compile``, ``nn.DataParallel`` and ``DistributedDataParallel``, in any order.

    :raises TypeError, ValueError: as :func:`copy_of`.
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"net must be a torch.nn.Module, got {type(net).__name__}")
    while (name := _wrapped_as(net)) is not None:
        net = net.get_submodule(name)
    _require_plain(net)
    return net


def copy_of(net: nn.Module, share: bool = False) -> nn.Module:
    """Copies a network, even after it was used: tensors that it keeps from earlier passes lose their graph.

    :param share: whether the parameters share the storage of the given ones and take no gradient. A table with
        ``max_norm`` is copied anyway, as every pass writes to it.
    :raises TypeError: for anything that is not a module, and for networks that cannot run with other weights.
    :raises ValueError: for parameters that have no shape yet.
    """
    inner = unwrapped(net)
    if inner is not net or any(m._compiled_call_impl is not None for m in inner.modules()):
        is_parallel = _wrapped_as(net) == "module"
        kind = f"{type(net).__name__} around it" if is_parallel else "compilation"
        warnings.warn(
            f"the model works on a plain copy of the network, without the {kind}: members with different weights "
            "cannot run through it"
            + ("" if is_parallel else ". fit(..., compile=True) and posterior.compile() compile what runs instead"),
            stacklevel=4,
        )
    known: dict[int, Any] = {}
    if share:
        written = {id(p) for m in inner.modules() if getattr(m, "max_norm", None) for p in m.parameters(recurse=False)}
        known = {
            id(p): nn.Parameter(p.detach().clone() if id(p) in written else p.detach(), requires_grad=False)
            for p in inner.parameters()
        }
    with _WithoutGraphs():
        copied = copy.deepcopy(inner, known)
    for module in copied.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            module.sparse = False
    return copied


class _WithoutGraphs(TorchFunctionMode):
    """Inside, ``copy.deepcopy`` copies the values of tensors that are not leaves, which torch refuses to copy."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__ or args[0].is_leaf and not is_functorch_wrapped_tensor(args[0]):
            return func(*args, **(kwargs or {}))
        computed, known = args
        if id(computed) not in known:
            value = computed
            while is_functorch_wrapped_tensor(value):  # from a vectorised pass: the value has an axis for the members
                value = get_unwrapped(value)
            known[id(computed)] = value.detach().clone()
        return known[id(computed)]


def _wrapped_as(net: nn.Module) -> str | None:
    """The name of the wrapper's attribute that holds the network; ``None`` if there is no wrapper."""
    if isinstance(net, (DataParallel, DistributedDataParallel)):
        return "module"
    return _COMPILED if _COMPILED in net._modules else None


def _require_plain(net: nn.Module) -> None:
    for name, module in net.named_modules():
        where = f"the part {name!r} of the network" if name else "the network"
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"{where} is a {type(module).__name__}, a program of TorchScript that keeps its own weights: give the "
                "nn.Module that it was made of"
            )
        if ".quantized." in f"{type(module).__module__}.":
            raise TypeError(
                f"{where} is a quantised {type(module).__name__}, whose weights are packed integers: give the network "
                "in floating point, and quantise the plain networks of posterior.networks(n) afterwards"
            )
        if (inside := _wrapped_as(module)) is not None:
            raise TypeError(
                f"{where} is wrapped in {type(module).__name__}: replace it by what it wraps, as in "
                f"net.{name} = net.{name}.{inside}"
            )
    lazy = next((name for name, p in net.named_parameters() if nn.parameter.is_lazy(p)), None)
    if lazy is not None:
        raise ValueError(
            f"the parameter {lazy!r} has no shape yet: lazy layers need one run of the network on a batch before the "
            "model is built"
        )
