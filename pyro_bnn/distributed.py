"""Several processes that ``torchrun`` started: which one this is, and what all of them do together.

``torchrun --nproc-per-node 4 script.py`` runs the same script in four processes. Engines find this out here, divide
their work, and every process returns the same posterior. The first process alone shows progress and writes files.
gloo connects processors, NCCL connects GPUs, of which process i of a machine uses the i-th.
"""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

_alone: ContextVar[bool] = ContextVar("alone", default=False)


@dataclass(frozen=True)
class Processes:
    """The processes that work together.

    :param rank: the number of this one, from 0.
    :param size: how many there are; 1 for one that works alone.
    """

    rank: int = 0
    size: int = 1

    @property
    def are_several(self) -> bool:
        return self.size > 1

    @property
    def is_first(self) -> bool:
        """Whether this process shows progress and writes files."""
        return self.rank == 0

    def mine(self, count: int) -> range:
        """Which of so many pieces of work are those of this process: every ``size``-th."""
        return range(self.rank, count, self.size)

    def sum_(self, *tensors: Tensor) -> None:
        """Replaces tensors by their sums over all processes, in place."""
        if self.are_several:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def copy_from_first(self, tensor: Tensor) -> None:
        """Writes the first process's values into a tensor of all."""
        if self.are_several:
            dist.broadcast(tensor, 0)

    def total(self, values: Sequence[float]) -> list[float]:
        """Numbers, added up over all processes."""
        if not self.are_several:
            return list(values)
        together = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(together)
        return [float(value) for value in together]

    def any(self, flag: bool) -> bool:
        """Whether a flag is up in some process: what all have to decide alike."""
        return self.total([float(flag)])[0] > 0

    def gather(self, value: T) -> list[T]:
        """The value of every process, in all of them, in order."""
        if not self.are_several:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def from_first(self, value: T) -> T:
        """The value of the first process, in all of them."""
        if not self.are_several:
            return value
        found = [value]
        dist.broadcast_object_list(found, 0)
        return found[0]

    def shared_seed(self, seed: int | None) -> int | None:
        """The seed that was given; several processes without one get one that all have."""
        return self.common_seed() if seed is None and self.are_several else seed

    def own_seed(self, seed: int | None) -> int | None:
        """A seed of this process alone, from one that all have; processes without a seed get one."""
        if not self.are_several:
            return seed
        return ((self.common_seed() if seed is None else seed) + self.rank) % 2**63

    def common_seed(self) -> int:
        """A seed from torch's generator of the first process, in all of them."""
        return self.from_first(int(torch.randint(2**62, ())))


#: a process that works alone
ALONE = Processes()


def processes() -> Processes:
    """The processes that work together now; joins them if ``torchrun`` started this one and nobody else has."""
    if _alone.get() or not dist.is_available():
        return ALONE
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
            return ALONE
        _join()
    return Processes(dist.get_rank(), dist.get_world_size())


def _join() -> None:
    backend = "gloo"
    if torch.cuda.is_available() and dist.is_nccl_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(backend)
    # waits for all: one that is refused now and ends would leave those that still connect with an error of the network
    dist.all_reduce(torch.zeros(()))
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside, this process works alone, on a part of what all of them have divided."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def require_one_process(what: str, instead: str) -> None:
    """Refuses what is not divided over processes, before each of them does all of it.

    :raises RuntimeError: under ``torchrun`` with several processes.
    """
    if (size := processes().size) > 1:
        raise RuntimeError(f"{what} is not distributed: each of the {size} processes would do all of it. {instead}")
