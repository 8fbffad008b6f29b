"""Inputs of a network, any nesting of tensors: whether they are finite, and where they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def require_finite(x: Any, name: str = "x") -> None:
    """Raises ValueError when a floating tensor in x holds NaN or infinite values."""
    for leaf in pytree.tree_leaves(x):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()):
            bad = int((~torch.isfinite(leaf)).sum())
            raise ValueError(f"{name} holds {bad} NaN or infinite values; drop or impute these samples first")


def to_device(x: Any, like: Tensor) -> Any:
    """x on the device of ``like``; dtypes stay."""
    return pytree.tree_map(lambda t: t.to(like.device) if isinstance(t, Tensor) else t, x)
