"""Sums over many data in float64, where the device has it."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric

from pyro_bnn.distributed import processes


def precision(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device without float64 (mps)."""
    return torch.float32 if device.type == "mps" else torch.float64


def wide(values: Tensor) -> Tensor:
    """The same values in the precision of sums."""
    return values.to(precision(values.device))


def running_mean(device: torch.device) -> Metric:
    """A running mean of all values that processes update it with, on the device; NaN raises an error."""
    metric = MeanMetric(nan_strategy="error", sync_on_compute=processes().are_several)
    return metric.to(device).set_dtype(precision(device))
