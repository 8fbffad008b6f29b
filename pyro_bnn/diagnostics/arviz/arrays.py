"""Conversion of tensors to xarray: the names of their axes, and the limit on how many numbers are stored."""

from __future__ import annotations

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyro_bnn.entry import checks

Variables = dict[str, xr.DataArray]


class Budget:
    """Counts the numbers that will be stored, up to a limit."""

    def __init__(self, limit: int) -> None:
        self.limit = checks.count("max_values", limit)
        self.taken: dict[str, int] = {}
        self.left_out: dict[str, int] = {}

    def take(self, name: str, size: int) -> None:
        """Reserves space for a variable that must be stored.

        :raises ValueError: when the limit is exceeded.
        """
        self.taken[name] = size
        if (total := sum(self.taken.values())) > self.limit:
            largest = sorted(self.taken.items(), key=lambda item: -item[1])[:3]
            raise ValueError(
                f"the result would hold more than max_values={self.limit:,} numbers (at least {total:,}; the largest: "
                f"{', '.join(f'{key} with {value:,}' for key, value in largest)}). Give fewer rows of x, a smaller "
                "num_samples, fewer groups= or sites=, or a larger max_values"
            )

    def offer(self, name: str, size: int) -> bool:
        """Reserves space for a variable that may be left out. Returns whether it fits."""
        if sum(self.taken.values()) + size > self.limit:
            self.left_out[name] = size
            return False
        self.taken[name] = size
        return True


def safe(name: str) -> str:
    # netCDF and DataTree use a slash to separate a group from its contents.
    return name.replace("/", ".")


def plain(values: Tensor, lead: int) -> Tensor:
    """``[N, 1] -> [N]``: a single output needs no axis, and predictions then have the shape of their targets."""
    return values.squeeze(-1) if values.shape[lead:] == (1,) else values


def outputs(axes: int) -> tuple[str, ...]:
    return ("output",) if axes == 1 else tuple(f"output_{axis}" for axis in range(axes))


def sampled(values: Tensor, chains: int, *event: str) -> xr.DataArray:
    """``[S, K, *event]`` with a dimension ``member``, unless there is only one member."""
    dims: tuple[str, ...] = ("chain", "draw", "member", *event)
    values = values.unflatten(0, (chains, -1))
    if values.shape[2] == 1:
        dims, values = ("chain", "draw", *event), values.squeeze(2)
    return array(values, *dims)


def enumerated(values: Tensor, members: int, chains: int, *event: str) -> xr.DataArray:
    """``[S K, N, *event]`` with the members flattened into ``draw``; the coordinate ``member`` tells them apart."""
    values = values.unflatten(0, (chains, -1))
    whole = array(values, "chain", "draw", "obs_id", *event)
    return whole.assign_coords(member=("draw", np.arange(values.shape[1]) % members))


def array(values: Tensor, *dims: str) -> xr.DataArray:
    values = values.detach().cpu()
    if values.is_floating_point():
        values = at_least_float32(values)  # numpy has no bfloat16
    return xr.DataArray(
        values.numpy(), dims=dims, coords={d: np.arange(n) for d, n in zip(dims, values.shape, strict=True)}
    )


def at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
