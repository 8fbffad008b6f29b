"""Tensors as xarray: the names of their axes, and how many numbers may be stored."""

from __future__ import annotations

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyro_bnn.entry import checks

Variables = dict[str, xr.DataArray]


class Budget:
    """How many numbers may still be stored."""

    def __init__(self, limit: int) -> None:
        self.limit = checks.count("max_values", limit)
        self.taken: dict[str, int] = {}
        self.left_out: dict[str, int] = {}

    def take(self, name: str, size: int) -> None:
        """Books what must be stored.

        :raises ValueError: when it does not fit.
        """
        self.taken[name] = size
        if (total := sum(self.taken.values())) > self.limit:
            largest = sorted(self.taken.items(), key=lambda item: -item[1])[:3]
            raise ValueError(
                f"the result would hold more than max_values={self.limit:,} numbers (at least {total:,}; the largest: "
                f"{', '.join(f'{key} with {value:,}' for key, value in largest)}). Give fewer rows of x, a smaller "
                "num_samples, fewer groups= or sites=, or raise max_values"
            )

    def offer(self, name: str, size: int) -> bool:
        """Books what may be left out, and says whether it fits."""
        if sum(self.taken.values()) + size > self.limit:
            self.left_out[name] = size
            return False
        self.taken[name] = size
        return True


def safe(name: str) -> str:
    # In netCDF and DataTree a slash stands between a group and what is in it.
    return name.replace("/", ".")


def plain(values: Tensor, lead: int) -> Tensor:
    """``[N, 1]`` as ``[N]``: one output needs no axis, and predictions and targets then agree."""
    return values.squeeze(-1) if values.shape[lead:] == (1,) else values


def outputs(axes: int) -> tuple[str, ...]:
    return ("output",) if axes == 1 else tuple(f"output_{axis}" for axis in range(axes))


def sampled(values: Tensor, chains: int, *event: str) -> xr.DataArray:
    """``[S, K, *event]`` with the members as a dimension, unless there is one alone."""
    dims: tuple[str, ...] = ("chain", "draw", "member", *event)
    values = values.unflatten(0, (chains, -1))
    if values.shape[2] == 1:
        dims, values = ("chain", "draw", *event), values.squeeze(2)
    return array(values, *dims)


def enumerated(values: Tensor, members: int, chains: int, *event: str) -> xr.DataArray:
    """``[S K, N, *event]`` with the members one after the other along ``draw``."""
    values = values.unflatten(0, (chains, -1))
    whole = array(values, "chain", "draw", "obs_id", *event)
    return whole.assign_coords(member=("draw", np.arange(values.shape[1]) % members))


def array(values: Tensor, *dims: str) -> xr.DataArray:
    values = values.detach().cpu()
    if values.is_floating_point():
        values = at_least_float32(values)  # numpy knows no bfloat16
    return xr.DataArray(
        values.numpy(), dims=dims, coords={d: np.arange(n) for d, n in zip(dims, values.shape, strict=True)}
    )


def at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
