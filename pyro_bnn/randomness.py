"""Random numbers of a seed, which leave no trace on those that come after."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


def device_of(program: object) -> torch.device:
    """Where a Pyro program has its parameters; the processor for one without."""
    parameters = program.parameters() if isinstance(program, nn.Module) else iter(())
    return next((p.device for p in parameters), torch.device("cpu"))


@contextlib.contextmanager
def forked(device: torch.device) -> Iterator[None]:
    """Inside, random numbers on the processor and on the device leave no trace outside."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


@contextlib.contextmanager
def seeded(device: torch.device, seed: int | None) -> Iterator[None]:
    """Inside, random numbers are those of the seed, and leave no trace outside; ``None`` changes nothing."""
    if seed is None:
        yield
        return
    with forked(device):
        torch.manual_seed(seed)
        yield


def some_seed(seed: int | None) -> int:
    """The seed that was given, or one from torch's global generator: for what must use the same draws several times."""
    return int(torch.randint(2**31, ())) if seed is None else seed


def derive_seeds(seed: int | None, count: int) -> list[int | None]:
    """Seeds that have nothing to do with one another, or none."""
    if seed is None:
        return [None] * count
    return torch.randint(2**62, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
