"""A child process that is killed: forked, because a new interpreter would import for longer than most tests run."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable

import torch


def start(work: Callable[[], object]) -> int:
    """Runs ``work`` in a child process, which ends with 0, or with 1 after an exception; its number."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            work()
            status = 0
        except BaseException:  # the parent sees the exit code alone
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def wait(child: int) -> int:
    """How the child ended: its exit code, or minus the number of the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_after(work: Callable[[], object], seconds: float) -> int:
    """Runs ``work`` in a child and kills it so many seconds later; 0 where it was faster than that."""
    child = start(work)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return wait(child)


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def is_running(child: int) -> bool:
    """Whether a child has not ended by itself."""
    return os.waitpid(child, os.WNOHANG)[0] == 0


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    wait(child)
