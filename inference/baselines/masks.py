"""Where a network drops what: the masks of its dropout modules."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from pyro_bnn.inputs import Inputs
from pyro_bnn.modes import undisturbed
from pyro_bnn.network import NORMALISATIONS, Network, batch_size, no_fused_attention
from pyro_bnn.perturb.probe import select_samples

_BY_CHANNEL = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.FeatureAlphaDropout)
#: rows of the probe: a length that an axis other than that of the rows will hardly have
_ROWS = 7
_FUNCTIONS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)


@dataclass(frozen=True)
class Masks:
    """The masks of one dropout module.

    :param rate: p, the probability that a unit is dropped.
    :param shapes: of the mask of one row, for every call of the module in a pass.
    """

    rate: float
    shapes: list[list[int]]


def dropout_modules(net: nn.Module) -> dict[str, _DropoutNd]:
    """The modules that drop something, by name."""
    return {name: m for name, m in net.named_modules() if isinstance(m, _DropoutNd) and m.p > 0}


class _DropoutFunctions(TorchFunctionMode):
    """Notes whether one of the functions is called that drop something."""

    found: str | None = None

    def __torch_function__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FUNCTIONS:
            call = inspect.signature(func).bind(*args, **(kwargs or {}))
            call.apply_defaults()
            if call.arguments["p"] > 0 and call.arguments["training"]:
                self.found = func.__name__
        return func(*args, **(kwargs or {}))


def find_masks(core: Network, x: Inputs) -> dict[str, Masks]:
    """Where a network drops what: the masks of all dropout modules that it reaches, by their names.

    :raises ValueError: when it drops by functions, reaches no dropout module, or has no samples on axis 0 there.
    """
    modules = dropout_modules(core.net)
    row = select_samples(x, batch_size(x), [0] * _ROWS)
    seen: dict[str, list[torch.Size]] = {name: [] for name in modules}

    def note(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda module, args, result: seen[name].append(result.shape)

    handles = [module.register_forward_hook(note(name)) for name, module in modules.items()]
    try:
        with no_fused_attention(), undisturbed(core.net), _DropoutFunctions() as functions:
            core.net.train()  # functions of torch drop in training alone
            for module in core.net.modules():
                if isinstance(module, (*NORMALISATIONS, _DropoutNd)):
                    module.eval()
            core(row)
    finally:
        for handle in handles:
            handle.remove()
    if functions.found is not None:
        raise ValueError(
            f"the network calls torch.nn.functional.{functions.found}, whose masks cannot be held: make it a module, "
            "self.drop = nn.Dropout(p), or set its p to 0"
        )
    wrong = next(((n, s) for n, shapes in seen.items() for s in shapes if s[:1] != (_ROWS,)), None)
    if wrong is not None:
        raise ValueError(
            f"the dropout {wrong[0]!r} gets a tensor of shape {tuple(wrong[1])} from {_ROWS} rows of x: its axis 0 "
            "must run over the rows, as every draw has one mask for all of them"
        )
    if not any(seen.values()):
        raise ValueError(f"the network's forward pass reaches none of its dropout modules: {', '.join(modules)}")
    return {
        name: Masks(float(modules[name].p), [mask_shape(modules[name], shape) for shape in shapes])
        for name, shapes in seen.items()
        if shapes
    }


def mask_shape(module: nn.Module, shape: torch.Size) -> list[int]:
    """Of one row: every unit for itself, or whole channels."""
    if isinstance(module, _BY_CHANNEL):
        return [n if axis == 0 else 1 for axis, n in enumerate(shape[1:])]
    return list(shape[1:])
