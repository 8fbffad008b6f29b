"""The optimiser of every engine that trains by gradients, from what a user gives as ``optim=`` and ``lr=``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyro_bnn.entry import checks

#: What ``optim=`` takes, in every engine. See :func:`build_optimizer`.
Optim = str | type[Optimizer] | Callable[[list[dict[str, Any]]], Optimizer] | Optimizer | None

_NAMED: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {"lr": 1e-3}),
    "adam": (torch.optim.Adam, {"lr": 1e-3}),
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
}


def build_optimizer(
    optim: Optim, groups: list[dict[str, Any]], lr: float | None = None, *, default: str = "adamw"
) -> Optimizer:
    """Builds the optimiser for the option ``optim=`` of every engine.

    ============================  =====================================================================================
    ``None``                      the engine's ``default``
    ``"adamw"``, ``"adam"``       of torch, with ``lr`` or 1e-3
    ``"sgd"``                     with Nesterov momentum 0.9, and ``lr`` or 0.1
    a class of ``torch.optim``    is called with the parameter groups and ``lr``; without ``lr`` it has its own default
    a function                    from parameter groups to an optimiser, as ``lambda groups: Adam(groups, lr=1e-2)``
    an optimiser                  as it is
    ============================  =====================================================================================

    :param groups: parameter groups as ``torch.optim`` takes them, ``[{"params": [...], ...}]``.
    :param lr: learning rate, for a name or a class; functions and optimisers set their own.
    :raises ValueError: for an unknown name, an ``lr`` that would not be used, an optimiser of other parameters, or a
        fused one of parameters with gaps in memory.
    :raises TypeError: for anything else, or a function that does not return an optimiser.
    """
    checks.optional(checks.positive, "lr", lr)
    optim = default if optim is None else optim
    rate: dict[str, Any] = {} if lr is None else {"lr": lr}
    if isinstance(optim, str):
        if optim not in _NAMED:
            raise ValueError(
                f"optim={optim!r}: expected {', '.join(map(repr, _NAMED))}, a class of torch.optim, a function of "
                "parameter groups or an optimiser"
            )
        kind, options = _NAMED[optim]
        return kind(groups, **(options | rate))
    if isinstance(optim, type) and issubclass(optim, Optimizer):
        return optim(groups, **rate)
    if isinstance(optim, type) or not (isinstance(optim, Optimizer) or callable(optim)):
        raise TypeError(
            f"optim={optim!r}: expected a name, a class of torch.optim, a function of parameter groups or an optimiser"
        )
    if rate:
        raise ValueError(
            f"lr={lr!r} is for the name or the class of an optimiser, but optim= sets its own learning rate: set the "
            "rate there and leave lr out"
        )
    optimizer = optim if isinstance(optim, Optimizer) else optim(groups)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optim= must return a torch.optim.Optimizer, got {type(optimizer).__name__}")
    trained: list[Tensor] = [p for group in groups for p in group["params"]]
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in held for p in trained):
        raise ValueError(
            "the optimiser has none of the parameters to train: build it from the parameters of this model and guide, "
            "or give a function of parameter groups such as lambda groups: torch.optim.Adam(groups, lr=1e-3)"
        )
    _require_rows_of_memory(optimizer)
    return optimizer


def _require_rows_of_memory(optimizer: Optimizer) -> None:
    """Refuses what torch's fused optimisers update wrongly, and without a word: tensors with gaps in memory."""
    of_fused: list[Tensor] = [p for group in optimizer.param_groups if group.get("fused") for p in group["params"]]
    gaps = next((p for p in of_fused if _has_gaps(p)), None)
    if gaps is not None:
        raise ValueError(
            f"fused=True: a parameter of shape {tuple(gaps.shape)} has the strides {gaps.stride()}, with gaps between "
            "its numbers, as particles have that several processes divide; fused optimisers of torch run through "
            "memory and change what lies between. Leave out fused=True"
        )


def _has_gaps(parameter: Tensor) -> bool:
    size = 1
    for stride, count in sorted(zip(parameter.stride(), parameter.shape, strict=True)):
        if count > 1 and stride != size:
            return True
        size *= count
    return False
