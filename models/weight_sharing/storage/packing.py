"""Integers in as few bits as they need: fixed widths for labels, gaps for sorted positions."""

from __future__ import annotations

import torch
from torch import Tensor

#: values packed at a time
CHUNK = 2**19


def width(count: int) -> int:
    """Bits of a number below ``count``; 0 when there is only one."""
    return max(0, int(count) - 1).bit_length()


def pack(values: Tensor, bits: int) -> Tensor:
    """Non-negative integers below ``2**bits`` as uint8, ``[ceil(n bits / 8)]``: bit j of value i is bit ``i bits + j``.

    :raises ValueError: when a value does not fit.
    """
    if len(values) and not 0 <= int(values.min()) <= int(values.max()) < 2**bits:
        raise ValueError(f"values from {int(values.min())} to {int(values.max())} do not fit into {bits} bits")
    if not bits or not len(values):
        return torch.zeros(0, dtype=torch.uint8, device=values.device)
    place = torch.arange(bits, device=values.device)
    powers = 2 ** torch.arange(8, device=values.device)
    parts = []
    for part in values.split(CHUNK):  # a multiple of 8 values ends on a whole byte
        found = ((part.long()[:, None] >> place) & 1).flatten()
        found = torch.nn.functional.pad(found, (0, -len(found) % 8))
        parts.append((found.view(-1, 8) * powers).sum(1).to(torch.uint8))
    return torch.cat(parts)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The int32 values that :func:`pack` was given.

    :raises ValueError: when there are not as many bytes as ``count`` values have.
    """
    expected = (count * bits + 7) // 8
    if packed.dtype != torch.uint8 or packed.shape != (expected,):
        raise ValueError(
            f"{count} values of {bits} bits take {expected} bytes, got {tuple(packed.shape)} of {packed.dtype}"
        )
    if not bits or not count:
        return torch.zeros(count, dtype=torch.int32, device=packed.device)
    place = torch.arange(8, device=packed.device)
    powers = 2 ** torch.arange(bits, device=packed.device)
    parts = []
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        first = start * bits // 8
        part = packed[first : first + (size * bits + 7) // 8]
        found = ((part.long()[:, None] >> place) & 1).flatten()[: size * bits]
        parts.append((found.view(-1, bits) * powers).sum(1).to(torch.int32))
    return torch.cat(parts)


def pack_positions(positions: Tensor) -> tuple[Tensor, int]:
    """Sorted distinct positions as their gaps, and the bits of one."""
    start = positions.new_full((1,), -1)
    gaps = torch.cat([start, positions]).diff() - 1
    bits = width(int(gaps.max()) + 1) if len(gaps) else 0
    return pack(gaps, bits), bits


def unpack_positions(packed: Tensor, bits: int, count: int) -> Tensor:
    """The int64 positions that :func:`pack_positions` was given."""
    return (unpack(packed, bits, count).long() + 1).cumsum(0) - 1
