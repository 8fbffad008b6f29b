"""Sums over many data are kept in float64, wherever the data came from."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric


def precision(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that has no other (mps)."""
    return torch.float32 if device.type == "mps" else torch.float64


def wide(values: Tensor) -> Tensor:
    """The same numbers in the precision of sums."""
    return values.to(precision(values.device))


def running_mean(device: torch.device) -> Metric:
    """A mean over everything that it is updated with, on the device; NaN is an error."""
    return MeanMetric(nan_strategy="error").to(device).set_dtype(precision(device))
