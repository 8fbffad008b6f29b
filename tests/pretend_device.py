"""A device that is not there, for machines without a GPU.

Inside ``PretendDevice()`` tensors on the device ``meta`` have values, which the processor computes, and refuse to mix
with tensors of the processor as those of a real device do. Unlike with ``FakeTensorMode`` values can be read, so that
whole training runs and metrics work, gradients included, and give the very numbers that the processor gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
DEVICE = torch.device("meta")
#: operations that take tensors of two devices: copies between them, and indices, which may be on the processor
_MIXING = {aten.copy_.default, aten._to_copy.default, aten._foreach_copy_.default}
_INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._unsafe_index.Tensor}


class PretendTensor(Tensor):
    """A tensor that says it is elsewhere."""

    value: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, value: Tensor) -> PretendTensor:
        return Tensor._make_wrapper_subclass(  # type: ignore[no-any-return, attr-defined]
            cls,
            value.size(),
            strides=value.stride(),
            storage_offset=value.storage_offset(),
            dtype=value.dtype,
            device=DEVICE,
        )

    def __init__(self, value: Tensor) -> None:
        self.value = value.detach()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            copy = self.detach().clone().requires_grad_(self.requires_grad)
            memo[id(self)] = torch.nn.Parameter(copy, self.requires_grad) if _is_parameter(self) else copy
        return memo[id(self)]  # type: ignore[no-any-return]

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, new: PretendTensor) -> None:
        self.value = new.value

    def tolist(self) -> Any:
        return self.value.tolist()

    def __repr__(self, **kwargs: Any) -> str:
        return f"PretendTensor({self.value})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class PretendDevice(TorchDispatchMode):
    """Where ``torch.empty(..., device="meta")`` and ``.to("meta")`` make tensors with values."""

    def __enter__(self) -> PretendDevice:
        super().__enter__()
        self._others = ExitStack()
        self._others.enter_context(_FromData())
        # autocast knows no "meta"
        self._others.enter_context(patch("torch.is_autocast_enabled", lambda kind: False))
        self._others.enter_context(patch("torch.autocast", lambda kind, enabled: nullcontext()))
        return self

    def __exit__(self, *error: Any) -> None:
        self._others.close()
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _FromData(TorchFunctionMode):
    """Tensors of Python's numbers are made on the processor first; for ``meta`` PyTorch would leave the numbers out."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and kwargs.get("device") is not None:
            device = torch.device(kwargs["device"])
            return func(*args, **kwargs | {"device": None}).to(device)
        if func is Tensor.new_tensor:
            device = torch.device(kwargs.get("device") or args[0].device)
            return torch.tensor(*args[1:], dtype=kwargs.get("dtype", args[0].dtype)).to(device)
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], PretendTensor):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(torch.tensor(part).to(DEVICE) if isinstance(part, list) else part for part in index)
            args = (args[0], index, *args[2:])
        return func(*args, **kwargs)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    pretended = [leaf for leaf in given if isinstance(leaf, PretendTensor)]
    if any(leaf.device == DEVICE for leaf in given if not isinstance(leaf, PretendTensor)):
        raise AssertionError(f"{func}: a tensor on {DEVICE} without values, which was made where nobody looked")
    device = kwargs.get("device")
    device = None if device is None else torch.device(device)
    if pretended:
        _refuse_mixture(func, args, given)
    elsewhere = device == DEVICE if device is not None else bool(pretended)
    generator = kwargs.get("generator")
    if elsewhere and generator is not None and generator.device != DEVICE:
        raise RuntimeError(f"{func}: expected a generator of the device {DEVICE}, found one of {generator.device}")
    if device == DEVICE:
        kwargs = kwargs | {"device": torch.device("cpu")}
    inner_args, inner_kwargs = pytree.tree_map_only(PretendTensor, lambda t: t.value, (args, kwargs))
    out = func(*inner_args, **inner_kwargs)
    return _returned(func, args, kwargs, out, elsewhere)


def _refuse_mixture(func: Any, args: Any, given: list[Tensor]) -> None:
    """As a real device does, which takes numbers without axes from the processor."""
    if func in _MIXING:
        return
    if func in _INDEXING and isinstance(args[0], PretendTensor):
        given = [args[0], *args[2:3]]
    if strangers := [t for t in given if not isinstance(t, PretendTensor) and t.dim()]:
        raise RuntimeError(
            f"{func}: expected all tensors on the same device, found {DEVICE} and {strangers[0].device} (of shape "
            f"{tuple(strangers[0].shape)})"
        )


def _returned(func: Any, args: Any, kwargs: dict[str, Any], out: Any, elsewhere: bool) -> Any:
    """What was written in place is returned as it was given; the rest is wrapped where it is elsewhere."""
    written = dict(_written(func, args, kwargs))
    if not func._schema.returns:
        return out
    several = isinstance(out, (tuple, list)) and len(func._schema.returns) > 1
    parts = []
    for spec, part in zip(func._schema.returns, out if several else [out], strict=True):
        names = spec.alias_info.before_set if spec.alias_info is not None and spec.alias_info.is_write else ()
        parts.append(next((written[name] for name in names if name in written), _wrapped(part, elsewhere)))
    return type(out)(parts) if several else parts[0]


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[i] if i < len(args) else kwargs.get(argument.name)
            for name in argument.alias_info.before_set:
                yield name, given
            if isinstance(given, PretendTensor) and _layout(given.value) != _layout(given):
                with torch._C._DisableTorchDispatch():  # type: ignore[attr-defined]
                    func(*args, **kwargs)  # on nothing but shapes, as squeeze_ does it


def _layout(value: Tensor) -> tuple[Any, ...]:
    return value.shape, value.stride(), value.storage_offset()


def _wrapped(out: Any, elsewhere: bool) -> Any:
    return pytree.tree_map_only(Tensor, PretendTensor, out) if elsewhere else out


def _is_parameter(value: Tensor) -> bool:
    return bool(getattr(value, "_is_param", False))
