"""Random numbers from a seed, drawn without changing the random state of the caller."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from pyro_bnn.entry import checks
from pyro_bnn.entry.threads import one_at_a_time


def device_of(program: object) -> torch.device:
    """The device of the parameters of a Pyro program; the CPU if it has none."""
    parameters = program.parameters() if isinstance(program, nn.Module) else iter(())
    return next((p.device for p in parameters), torch.device("cpu"))


def random_states(device: torch.device) -> list[Tensor]:
    """The random state of the CPU, and that of the device if it is another."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def set_random_states(device: torch.device, states: Sequence[Tensor]) -> None:
    """Sets what :func:`random_states` returned."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


@contextlib.contextmanager
def forked(device: torch.device) -> Iterator[None]:
    """Restores the random state of the CPU and of the device afterwards."""
    with one_at_a_time, torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


@contextlib.contextmanager
def seeded(device: torch.device, seed: int | None) -> Iterator[None]:
    """Inside, random numbers come from the seed; the random state is restored afterwards. ``None`` changes nothing."""
    seed = checks.seed("seed", seed)
    if seed is None:
        yield
        return
    with forked(device):
        torch.manual_seed(seed)
        yield


def some_seed(seed: int | None) -> int:
    """The seed that was given, or one from torch's global generator: to repeat the same draws."""
    given = checks.seed("seed", seed)
    if given is not None:
        return given
    with one_at_a_time:  # a draw in between would change what another thread draws from its seed
        return int(torch.randint(2**31, ()))


def derive_seeds(seed: int | None, count: int) -> list[int | None]:
    """Independent seeds derived from one seed; all ``None`` without one."""
    seed = checks.seed("seed", seed)
    if seed is None:
        return [None] * count
    return torch.randint(2**62, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


class RandomState:
    """The random state at the time of its creation, on the CPU and on the device of ``like``."""

    def __init__(self, like: Tensor) -> None:
        self._state = torch.get_rng_state()
        self._device = like.device if like.is_cuda and torch.cuda.is_initialized() else None
        self._cuda = torch.cuda.get_rng_state(self._device) if self._device is not None else None

    def restore(self) -> None:
        torch.set_rng_state(self._state)
        if self._cuda is not None and self._device is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)
