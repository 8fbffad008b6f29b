"""Mixed precision: the passes of the network in 16 bits, everything that is summed or compared in 32."""

from __future__ import annotations

import contextlib
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyro_bnn.entry import checks

#: what ``precision=`` takes
Half = Literal["bf16", "fp16"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
#: a factor of the loss below which overflow is not its fault
_LEAST_FACTOR = 2.0**-24


class Precision:
    """Autocast around the loss, and for fp16 a factor of the loss that keeps small gradients from vanishing.

    ::

        g = grad(s loss) / s,      s halved, and the update left out, where g is not finite; doubled after 2000 updates

    Parameters stay as they are, in float32.

    Source: Micikevicius et al. 2018, Mixed precision training (arXiv 1710.03740), sections 3.1 and 3.2.

    :param precision: ``None`` for no autocast.
    :param device: of the parameters.
    :raises ValueError: for another word, or float64 parameters, which autocast leaves as they are.
    """

    def __init__(self, precision: Half | None, parameters: list[Tensor]) -> None:
        if precision is not None:
            checks.choice("precision", precision, get_args(Half))
            if any(p.dtype == torch.float64 for p in parameters):
                raise ValueError(
                    f"precision={precision!r}: parameters are float64, which autocast does not touch: call .float() on "
                    "the network first, or leave precision= out"
                )
        self._device = parameters[0].device if parameters else torch.device("cpu")
        self._dtype = None if precision is None else _DTYPES[precision]
        self.scaler = torch.amp.GradScaler(self._device.type) if precision == "fp16" else None

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Inside, the network runs in the lower precision."""
        return contextlib.nullcontext() if self._dtype is None else torch.autocast(self._device.type, self._dtype)

    def factor(self) -> Tensor | float:
        """s, by which the loss is to be multiplied before the backward pass."""
        return 1.0 if self.scaler is None else self.scaler.scale(torch.ones((), device=self._device))

    def has_gradient(self, optimizer: Optimizer, step: int) -> bool:
        """Divides gradients by s; whether they are finite, always so without a factor.

        :raises FloatingPointError: when they are not, however small the factor.
        """
        if self.scaler is None:
            return True
        self.scaler.unscale_(optimizer)
        groups: list[dict[str, Any]] = optimizer.param_groups
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        if all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            return True
        if self.scaler.get_scale() < _LEAST_FACTOR:
            raise FloatingPointError(
                f"the gradient is not finite at step {step} in fp16, whatever the factor of the loss. A smaller lr, "
                "clip_norm= or precision='bf16' helps"
            )
        return False

    def update(self, optimizer: Optimizer) -> None:
        """A step of the optimiser, which is left out where gradients are not finite."""
        if self.scaler is None:
            optimizer.step()
        else:
            self.scaler.step(optimizer)
            self.scaler.update()
