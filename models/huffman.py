"""Labels in as many bits as they deserve: canonical Huffman codes, packed and read in many lanes at once."""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

from pyro_bnn.models import packing

#: symbols of one lane, and the longest code word, in bits
LANE, LONGEST = 4096, 16
_CHUNK = 64


def code_lengths(counts: Tensor) -> Tensor:
    """Bits of the code word of each symbol, uint8 ``[K]``, at most 16; 0 for symbols that do not occur.

    Huffman's algorithm; where it makes longer words, rare symbols count as more frequent until it does not.
    """
    used = int((counts > 0).sum())
    if used > 2**LONGEST:
        raise ValueError(f"{used:,} symbols have no words of at most {LONGEST} bits: expected at most {2**LONGEST:,}")
    known = counts.tolist()
    floor = 1
    while True:
        heap: list[tuple[int, int, tuple[int, ...]]] = [
            (max(count, floor), i, (i,)) for i, count in enumerate(known) if count
        ]
        lengths = [0] * len(known)
        if len(heap) == 1:
            lengths[heap[0][1]] = 1
        heapq.heapify(heap)
        while len(heap) > 1:
            a, b = heapq.heappop(heap), heapq.heappop(heap)
            for symbol in (*a[2], *b[2]):
                lengths[symbol] += 1
            heapq.heappush(heap, (a[0] + b[0], min(a[1], b[1]), a[2] + b[2]))
        if max(lengths, default=0) <= LONGEST:
            return torch.tensor(lengths, dtype=torch.uint8, device=counts.device)
        floor *= 2


def _words(lengths: Tensor) -> list[int]:
    """Canonical code words by symbol, with their first bit lowest.

    :raises ValueError: when no code has these lengths.
    """
    known: list[int] = lengths.tolist()
    used = [n for n in known if n]
    whole = sum(2.0**-n for n in used)
    if not used or max(used) > LONGEST or (whole != 1.0 and used != [1]):
        raise ValueError("the lengths of the code words are of no Huffman code")
    words, word, before = [0] * len(known), 0, 0
    for n, symbol in sorted((n, i) for i, n in enumerate(known) if n):
        word <<= n - before
        words[symbol] = int(format(word, f"0{n}b")[::-1], 2)
        word, before = word + 1, n
    return words


def encode(values: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """``(packed uint8, bits of every lane int32)`` of symbols with these :func:`code_lengths`."""
    device = values.device
    words = torch.tensor(_words(lengths), device=device)
    size = lengths.long()
    place = torch.arange(LONGEST, device=device)
    parts, lanes = [], []
    for part in values.split(LANE * _CHUNK):
        n = size[part.long()]
        used = place < n[:, None]
        parts.append(((words[part.long()][:, None] >> place) & 1)[used].to(torch.uint8))
        lanes.append(torch.stack([lane.sum() for lane in n.split(LANE)]))
    return packing.pack(torch.cat(parts), 1), torch.cat(lanes).to(torch.int32)


def decode(packed: Tensor, lanes: Tensor, lengths: Tensor, count: int) -> Tensor:
    """The int32 symbols that :func:`encode` was given.

    :raises ValueError: when the bits are not ``count`` symbols of this code.
    """
    device = packed.device
    ends = lanes.long().cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    if len(lanes) != -(-count // LANE) or bool((lanes < 0).any()) or len(packed) != (total + 7) // 8:
        raise ValueError(f"{len(packed)} bytes in {len(lanes)} lanes are not {count} symbols")
    symbols = torch.full((2**LONGEST,), -1, dtype=torch.int32)
    steps = torch.zeros(2**LONGEST, dtype=torch.long)
    for symbol, (word, n) in enumerate(zip(_words(lengths), lengths.tolist(), strict=True)):
        if n:
            symbols[word :: 2**n] = symbol  # whatever bits follow
            steps[word :: 2**n] = n
    symbols, steps = symbols.to(device), steps.to(device)
    data = torch.cat([packed, packed.new_zeros(4)]).long()
    at = ends - lanes.long()
    left = (count - torch.arange(len(lanes), device=device) * LANE).clamp_max(LANE)
    found = torch.zeros(LANE, len(lanes), dtype=torch.int32, device=device)
    for step in range(min(LANE, count)):
        byte = (at >> 3).clamp_max(len(packed))
        window = (data[byte] | data[byte + 1] << 8 | data[byte + 2] << 16) >> (at & 7) & (2**LONGEST - 1)
        going = left > step
        found[step] = symbols[window]
        at = torch.where(going, at + steps[window], at)
    result = found.t().reshape(-1)[:count]
    if not torch.equal(at, ends) or bool((result < 0).any()):
        raise ValueError(f"the bits are not {count} symbols of this code")
    return result.contiguous()
