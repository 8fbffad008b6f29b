"""Adds standard normal noise to a buffer without a second buffer of that size; on the CPU with all of torch's threads.

``Tensor.normal_`` draws on one thread, which takes longer than the rest of an update of a large network.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

#: number of values that one generator draws; fixed, so that the draws do not depend on the number of threads
SHARE = 2**20
#: number of values drawn at a time; on the CPU they fit in its cache, and are too few for torch to start threads
PIECE, DEVICE_PIECE = 2**15, 2**22


class Noise:
    """Standard normal noise for buffers of one size.

    :param like: a buffer of that size. For a large one on the CPU, generators are seeded here from torch's global one.
    """

    def __init__(self, like: Tensor) -> None:
        size, on_cpu = like.numel(), like.device.type == "cpu"
        self._piece = PIECE if on_cpu else DEVICE_PIECE
        self._generators: list[torch.Generator | None] = [None]
        self._share = size
        self._pool: ThreadPoolExecutor | None = None
        if on_cpu and size > SHARE:
            self._share = SHARE
            seeds = torch.randint(2**62, (-(-size // SHARE),), device="cpu").tolist()
            self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            self._pool = ThreadPoolExecutor(torch.get_num_threads())

    def add_to(self, buffer: Tensor, scale: float, kept: Tensor | None = None) -> None:
        """``buffer += scale * xi`` with new draws xi ~ N(0, I), which are also written to ``kept`` if that is given."""
        if len(self._generators) == 1 and buffer.numel() <= self._piece:
            buffer.add_(torch.randn_like(buffer) if kept is None else kept.normal_(), alpha=scale)
            return
        buffer, kept = buffer.view(-1), None if kept is None else kept.view(-1)

        def share(number: int) -> None:
            begin = number * self._share
            end = min(begin + self._share, len(buffer))
            scratch = buffer.new_empty(min(self._piece, end - begin) if kept is None else 0)
            for start in range(begin, end, self._piece):
                part = buffer[start : min(start + self._piece, end)]
                xi = scratch[: len(part)] if kept is None else kept[start : start + len(part)]
                part.add_(xi.normal_(generator=self._generators[number]), alpha=scale)

        numbers = range(len(self._generators))
        for _ in map(share, numbers) if self._pool is None else self._pool.map(share, numbers):
            pass
