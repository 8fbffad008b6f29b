"""What a check found, in plain words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["good", "note", "warning", "problem"]
#: from what needs no attention to what makes results wrong
SEVERITIES: tuple[Severity, ...] = ("good", "note", "warning", "problem")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    :param severity: ``good`` needs nothing, a ``note`` is to be known, a ``warning`` limits what the result can be used
        for, and with a ``problem`` it should not be used.
    :param topic: what was looked at, in a word or two.
    :param message: what was found, with the number and what is expected of it.
    :param remedy: what to do; empty when there is nothing to do.
    """

    severity: Severity
    topic: str
    message: str
    remedy: str = ""

    def __str__(self) -> str:
        remedy = f" {self.remedy}" if self.remedy else ""
        return f"[{self.severity}] {self.topic}: {self.message}{remedy}"
