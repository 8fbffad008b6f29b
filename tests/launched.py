"""Work in two processes that are started as torchrun starts them, with what each of them found."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp


def together(work: Callable[..., Any], folder: Path, *args: object, size: int = 2, method: str = "fork") -> list[Any]:
    """What ``work(*args)`` returns in each of the processes, in order.

    :param work: a function of a module, which all processes import.
    :param method: how processes start: "spawn" where the parent has used a GPU.
    :raises torch.multiprocessing.ProcessRaisedException: when it raises in one of them.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_one, (work, size, port, str(folder), args), nprocs=size, start_method=method)
    return [torch.load(folder / f"found-{rank}.pt", weights_only=False) for rank in range(size)]


def _one(rank: int, work: Callable[..., Any], size: int, port: int, folder: str, args: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }
    found = work(*args)
    torch.save(found, Path(folder) / f"found-{rank}.pt")
    sys.stdout.flush()
