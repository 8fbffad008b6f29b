"""Positive numbers from real ones, ``softplus(rho) + 1e-7``: the standard deviations of every guide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST_SCALE = 1e-7
#: elements from which on what works in the cache of a CPU is faster than one pass after the other
LARGE = 4096
#: where softplus(rho) is rho, for ``torch.nn.functional.softplus`` and here
_THRESHOLD = 20.0
#: elements of a part of a tensor that stays in the cache of a processor from one operation to the next
_PART = 2**16


def positive(rho: Tensor) -> Tensor:
    """``softplus(rho) + 1e-7``, element by element."""
    large = rho.device.type == "cpu" and rho.numel() >= LARGE
    value: Tensor = _Softplus.apply(rho) if large else F.softplus(rho)
    return value.add_(SMALLEST_SCALE)


def inverse_softplus(value: float) -> float:
    """rho with ``softplus(rho) = value``."""
    return float(torch.tensor(value, dtype=torch.float64).expm1().log())


def in_cache(value: Tensor) -> Sequence[Tensor]:
    """Views of a tensor along its last axis, to work on part by part; of one on a GPU, the tensor itself.

    On a CPU a dozen passes over a large tensor take longer to fetch memory, and fresh pages for every result, than to
    compute.
    """
    if value.shape[-1] <= _PART or value.device.type != "cpu":
        return (value,)
    return value.split(_PART, -1)


class _Softplus(torch.autograd.Function):
    """``log(1 + e^rho)`` in a third of the time of torch's own on a CPU, which computes ``log1p`` one by one.

    With e = e^rho and u = 1 + e rounded, the logarithm of u lacks what rounding has cut off, which is known exactly::

        log(1 + e) = log(u) + log(1 + (e - (u - 1)) / u) = log(u) + (e - (u - 1)) / u

    up to the square of a rounding error.
    """

    @staticmethod
    def forward(rho: Tensor) -> Tensor:
        value = torch.empty_like(rho, memory_format=torch.contiguous_format)
        for part, result in zip(in_cache(rho.reshape(-1)), in_cache(value.view(-1)), strict=True):
            e = part.clamp(max=_THRESHOLD).exp_()
            u = e + 1
            e.sub_(u - 1).div_(u).add_(u.log_())
            torch.maximum(e, part, out=result)
        return value

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (rho,) = ctx.saved_tensors
        return grad * torch.sigmoid(rho)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        (rho,) = ctx.saved_tensors
        return tangent * torch.sigmoid(rho)

    @staticmethod
    def vmap(info: Any, dims: tuple[int], rho: Tensor) -> tuple[Tensor, int]:
        value: Tensor = _Softplus.apply(rho)
        return value, dims[0]
