"""What a check found, in plain words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Literal

import pandas as pd

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


class Findings(list[Finding]):
    """A list of findings that is printed as one line for each, and as a table in a notebook."""

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "Nothing was looked at."

    __repr__ = __str__

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each finding: ``severity``, ``topic``, ``message``, ``remedy``."""
        return pd.DataFrame([asdict(finding) for finding in self], columns=[part.name for part in fields(Finding)])

    def _repr_html_(self) -> str:
        with pd.option_context("display.max_colwidth", None):  # sentences are shown whole
            return self.to_dataframe().to_html(index=False, border=0)


def gravest_first(findings: Iterable[Finding]) -> Findings:
    """Problems, then warnings, notes and what is good; in the given order among equals."""
    return Findings(sorted(findings, key=lambda finding: -SEVERITIES.index(finding.severity)))
