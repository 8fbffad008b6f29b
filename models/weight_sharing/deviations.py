"""Standard deviations ``softplus(rho) + 1e-7`` of codes, the same to the last bit at every position of a tensor.

Processors round the elements after the last whole vector differently; with padding there are only whole vectors.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_bnn.program.positive import SMALLEST_SCALE


def deviations(rho: Tensor) -> Tensor:
    """``softplus(rho) + 1e-7``, ``[n]``."""
    return F.softplus(padded(rho))[: len(rho)] + SMALLEST_SCALE


def rho_of(deviation: Tensor) -> Tensor:
    """rho with ``softplus(rho) + 1e-7 = deviation``, computed in float64."""
    value = (deviation.double() - SMALLEST_SCALE).clamp_min(1e-30)
    return (value + (-(-value).expm1()).log()).to(deviation.dtype)


def padded(value: Tensor) -> Tensor:
    """``value`` with zeros appended, up to a multiple of 64 rows."""
    rest = -len(value) % 64
    return torch.cat([value, value.new_zeros((rest, *value.shape[1:]))]) if rest else value
