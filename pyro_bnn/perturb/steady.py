"""Runs a network so that random numbers do not make two samples differ."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: the value that random tensors of these operations are filled with
_MADE = dict.fromkeys(("rand", "rand_like", "randn", "randn_like"), 0.5)
#: operations that fill a tensor; ``bernoulli_`` fills it with 1, because dropout to zeros would make samples alike
_FILLED = ("normal_", "uniform_", "exponential_", "cauchy_", "log_normal_", "geometric_", "random_")


class Steady(TorchDispatchMode):
    """Inside, all entries of a random tensor are equal, and equal in every run.

    A network may draw noise in eval mode too. Inside, two runs differ only where their inputs or weights do.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **(kwargs or {}))
        torch.manual_seed(0)  # `undisturbed`, inside which this runs, restores the state
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if name in _MADE:
            return result.fill_(_MADE[name])
        if name == "bernoulli_":
            return result.fill_(1)
        if name in _FILLED:  # with a single draw: the first of many depends on how many there are
            torch.manual_seed(0)
            return result.fill_(func(result.new_empty(1), *args[1:], **(kwargs or {})).item())
        if name in ("randint", "randint_like"):
            return result.fill_(result.flatten()[0]) if result.numel() else result
        centre = args[0] if args and isinstance(args[0], Tensor) else None
        if centre is None:
            return result
        if name == "normal":
            return result.copy_(centre)
        if name == "bernoulli":
            return result.copy_(centre > 0.5)
        if name == "native_dropout":
            return centre.clone(), torch.ones_like(centre, dtype=torch.bool)
        return result
