"""What a row of the comparison is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Step = Callable[[], Any]
#: the steps of an alternative by what they are; most have one, :data:`STEP`
Parts = Mapping[str, Step]
Seconds = Mapping[str, float]
#: makes an alternative; picklable, since its memory is measured in a process of its own
Build = Callable[[], Step | Parts]
#: the seconds of an alternative's parts and those of the reference -> a number
Figure = Callable[[Seconds, Seconds], float]

STEP = "step"
PLAIN = "plain"
OURS = "ours"
#: after ours, where `torch.compile` makes its steps
COMPILED = "compile=True"
#: ours, of another checkout
BEFORE = f"{OURS} (before)"
TIME, MEMORY = "time / plain step", "memory / plain"


class Cannot(Exception):
    """A library that cannot do the work of a row; the text says why."""


@dataclass(frozen=True)
class Row:
    """Alternatives that do the same work.

    :param title: what is measured, and what one plain step is.
    :param ways: the alternatives; :data:`PLAIN` is the reference, and names that begin with :data:`OURS` are ours.
    :param figures: what is computed from the seconds of each alternative.
    :param targets: of figures, for ours: at most that much.
    :param has_memory: whether peak memory is measured too.
    :param facts: what else is to be known of the alternatives, as texts under the title ``fact``.
    :param rounds: turns of each alternative in a process, of ``burst`` runs each.
    """

    name: str
    title: str
    ways: Mapping[str, Build]
    figures: Mapping[str, Figure] = field(default_factory=lambda: {TIME: over_plain()})
    targets: Mapping[str, float] = field(default_factory=dict)
    has_memory: bool = False
    fact: str = ""
    facts: Callable[[], Mapping[str, str]] = dict
    rounds: int = 12
    burst: int = 1


def is_ours(way: str) -> bool:
    return way.startswith(OURS)


def over_plain(steps: float = 1.0, part: str = STEP, plain: str = STEP) -> Figure:
    """The ratio to a number of plain steps."""
    return lambda own, reference: own[part] / (steps * reference[plain])


def over_part(part: str, other: str) -> Figure:
    """The ratio to another part of the same alternative."""
    return lambda own, _: own[part] / own[other]
