"""Keeping memory that was freed, which the GNU C library otherwise gives back to the system and fetches again."""

from __future__ import annotations

from functools import cache

import torch


@cache
def keep_freed_memory() -> None:
    """Raises two thresholds of the allocator of the GNU C library to their largest values, once for a process.

    The library returns every freed block above ``M_MMAP_THRESHOLD`` (128 KB at first), and the end of its heap above
    ``M_TRIM_THRESHOLD``. The next tensor then gets fresh pages, which the system must clear: up to half of the time of
    a step with tensors of about a megabyte. Freeing a block of almost 32 MB raises the first to that size and the
    second to twice of it, as the library does by itself for a program that uses such blocks. The block is never
    written, so that it takes no memory. A process keeps up to 64 MB more than it uses. Who sets the environment's
    ``MALLOC_MMAP_THRESHOLD_`` or ``MALLOC_TRIM_THRESHOLD_`` has the say; other allocators know nothing of this.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8)
