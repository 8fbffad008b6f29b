"""Freed memory is kept: a step does not fetch fresh pages for its temporary tensors."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

_SCRIPT = """
import resource, torch
from pyro_bnn.network import Network

def faults():
    start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        a = torch.ones(2**20)
        b = a + 1
        del a, b
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start

torch.set_num_threads(1)
first = faults()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
Network(torch.nn.Linear(2, 2))
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
faults()
print(first, faults(), grown)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is about the allocator of the GNU C library")
def test_temporary_tensors_get_the_same_pages_again() -> None:
    """In a process of its own: twenty times two tensors of 1024 pages take none once a network was made, and making it
    takes no memory."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    command = [sys.executable, "-W", "ignore", "-c", _SCRIPT]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    first, later, grown = map(int, printed.split())
    assert first > 1024, "the allocator keeps its memory by itself: keep_freed_memory is no longer needed"
    assert later < 100
    assert grown < 8 * 1024  # kilobytes
