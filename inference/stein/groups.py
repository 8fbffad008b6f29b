"""Which coordinates of particles have a kernel together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from pyro_bnn.inference.stein.particles import Segment


class Group(NamedTuple):
    """The coordinates of one kernel: columns of blocks that lie side by side, and pairs of segments."""

    columns: list[tuple[int, int, int]]
    pairs: list[tuple[Segment, Segment, float]]


def divide(segments: list[Segment], pairs: list[tuple[str, str, float]], scope: str) -> Iterator[Group]:
    """The coordinates of each kernel; pairs stay together."""
    by_name = {segment.name: segment for segment in segments}
    of_pair = {name: a for a, b, _ in pairs for name in (a, b)}
    missing = next((name for name in of_pair if name not in by_name), None)
    if missing is not None:
        raise ValueError(f"pairs() of the guide names {missing!r}, which is none of its sites")

    def key(name: str) -> str:
        if scope == "joint":
            return ""
        return of_pair.get(name, name) if scope == "tensor" else name.rpartition(".")[0] or name

    keys = dict.fromkeys(key(of_pair.get(segment.name, segment.name)) for segment in segments)
    groups = {k: Group([], []) for k in keys}
    for segment in segments:
        if segment.name in of_pair:
            continue
        columns = groups[key(segment.name)].columns
        if columns and columns[-1][0] == segment.block and columns[-1][2] == segment.start:
            columns[-1] = (segment.block, columns[-1][1], segment.stop)
        else:
            columns.append((segment.block, segment.start, segment.stop))
    for a, b, scale in pairs:
        groups[key(a)].pairs.append((by_name[a], by_name[b], scale))
    yield from groups.values()
