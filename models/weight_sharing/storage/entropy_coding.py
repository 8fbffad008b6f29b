"""Labels in as many bits as they deserve: asymmetric numeral systems (Duda 2013, arXiv 1311.2540), many lanes at once.

A lane is one integer x, the state, that holds all its symbols so far. With integer frequencies f_s that sum to M = 2^16
and c_s the sum of those before s, a symbol goes in and out of x by

    in    x -> floor(x / f_s) M + x mod f_s + c_s
    out   s is the symbol with c_s <= x mod M < c_s + f_s,   x -> f_s floor(x / M) + x mod M - c_s

which costs log2(M / f_s) bits. x stays in [2^16, 2^32): its low 16 bits go to the stream before it grows beyond, and
come back when it falls below. Symbols go in last to first, and so come out first to last.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: symbols of one lane; bits of the frequencies, of a word of the stream, and of the least state
LANE, BITS = 4096, 16
_TOTAL = 2**BITS


def frequencies(counts: Tensor) -> Tensor:
    """Integers that sum to 2^16, in proportion to the counts, at least 1 for symbols that occur; int32 ``[K]``.

    :raises ValueError: when no symbol occurs, or more than 2^16 do.
    """
    used = counts > 0
    if not 0 < int(used.sum()) <= _TOTAL:
        raise ValueError(f"{int(used.sum()):,} symbols occur: expected from 1 to {_TOTAL:,}")
    share = counts.double() / counts.sum() * _TOTAL
    found = share.floor().long().clamp_min(1).where(used, 0)
    while (rest := _TOTAL - int(found.sum())) != 0:
        price = counts.double() / found.clamp_min(1)  # what one more, or less, changes the length by
        if rest > 0:
            found[price.topk(min(rest, int(used.sum()))).indices] += 1
            continue
        large = torch.where(found > 1, found, 0)  # rare symbols were raised to 1: others give what that took
        give = (large.double() * (-rest / int(large.sum()))).long()
        if int(give.sum()) == 0:
            give[
                price.masked_fill(found < 2, torch.inf).topk(min(-rest, int((large > 0).sum())), largest=False).indices
            ] = 1
        found -= give
    return found.to(torch.int32)


def coded_bits(counts: Tensor, freq: Tensor) -> float:
    """Bits that symbols with these counts take: ``sum_s counts_s log2(2^16 / f_s)``, without the states of lanes."""
    used = counts > 0
    return float((counts[used].double() * (BITS - freq[used].double().log2())).sum())


def encode(symbols: Tensor, freq: Tensor) -> tuple[Tensor, Tensor]:
    """``(stream uint8, states int64 [lanes])`` of symbols in 0 to K - 1 whose frequency is not 0."""
    f, ends = freq.long(), freq.long().cumsum(0)
    lanes = -(-len(symbols) // LANE)
    state = torch.full((lanes,), _TOTAL, dtype=torch.long, device=symbols.device)
    rows = _rows(symbols.long(), lanes)
    words = torch.zeros(rows.shape, dtype=torch.int32, device=symbols.device)
    spilt = torch.zeros(rows.shape, dtype=torch.bool, device=symbols.device)
    counts = _counts(len(symbols), lanes, symbols.device)
    for step in reversed(range(len(rows))):
        symbol, going = rows[step], counts > step
        own = f[symbol]
        full = going & (state >= own << BITS)
        words[step], spilt[step] = (state % _TOTAL).to(torch.int32), full
        state = torch.where(full, state >> BITS, state)
        state = torch.where(going, (state // own << BITS) + state % own + ends[symbol] - own, state)
    stream = words[spilt]
    return torch.stack([stream & 255, stream >> 8], 1).flatten().to(torch.uint8), state


def decode(stream: Tensor, states: Tensor, freq: Tensor, count: int) -> Tensor:
    """The int32 symbols that :func:`encode` was given.

    :raises ValueError: when these are not ``count`` symbols with these frequencies.
    """
    lanes = -(-count // LANE)
    if int(freq.sum()) != _TOTAL or bool((freq < 0).any()):
        raise ValueError(f"the frequencies of the symbols must sum to {_TOTAL}, and are {int(freq.sum())}")
    if len(states) != lanes or len(stream) % 2 or bool(((states < _TOTAL) | (states >= _TOTAL**2)).any()):
        raise ValueError(f"{len(stream)} bytes and {len(states)} states are not {count} symbols")
    f, starts = freq.long(), freq.long().cumsum(0) - freq.long()
    symbol_at = torch.repeat_interleave(torch.arange(len(freq), device=stream.device), f)
    words = stream.long().view(-1, 2)
    words = torch.cat([words[:, 0] | words[:, 1] << 8, words.new_zeros(1)])
    counts = _counts(count, lanes, stream.device)
    found = torch.zeros(min(LANE, count), lanes, dtype=torch.int32, device=stream.device)
    at = torch.zeros((), dtype=torch.long, device=stream.device)
    state = states
    for step in range(len(found)):
        going = counts > step
        place = state % _TOTAL
        symbol = symbol_at[place]
        found[step] = symbol
        state = torch.where(going, f[symbol] * (state >> BITS) + place - starts[symbol], state)
        empty = state < _TOTAL
        word = words[(at + empty.cumsum(0) - 1).clamp(0, len(words) - 1)]
        state = torch.where(empty, state << BITS | word, state)
        at = at + empty.sum()
    if int(at) != len(words) - 1 or bool((state != _TOTAL).any()):
        raise ValueError(f"the stream is not {count} symbols with these frequencies")
    return found.t().reshape(-1)[:count].contiguous()


def _counts(count: int, lanes: int, device: torch.device) -> Tensor:
    """How many symbols each lane has, ``[lanes]``."""
    return (count - torch.arange(lanes, device=device) * LANE).clamp_max(LANE)


def _rows(symbols: Tensor, lanes: int) -> Tensor:
    """``[symbols of a lane, lanes]``, filled up with the last symbol."""
    fill = symbols[-1:].expand(lanes * LANE - len(symbols))
    return torch.cat([symbols, fill]).view(lanes, LANE).t()[: min(LANE, len(symbols))].contiguous()
