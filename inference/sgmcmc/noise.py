"""Standard normals added to a buffer, without a second buffer for them; on the CPU, by all of torch's threads.

``Tensor.normal_`` draws on one thread, which takes longer than all the rest of an update of a large network.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

#: numbers that one generator draws: the draws do not depend on how many threads there are
SHARE = 2**20
#: numbers drawn at a time: on the CPU they stay in its cache, and are too few for torch to start threads of its own
PIECE, DEVICE_PIECE = 2**15, 2**22


class Noise:
    """Draws for buffers of one size.

    :param like: a buffer. A large one on the CPU has generators of its own, seeded here from torch's.
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
        """``buffer += scale * xi`` with xi ~ N(0, I) fresh, written to ``kept`` if that is given."""
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
