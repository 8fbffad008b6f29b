"""The result of a check, in plain words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Literal

import pandas as pd

Severity = Literal["good", "note", "warning", "problem"]
#: from results that need no attention to results that are wrong
SEVERITIES: tuple[Severity, ...] = ("good", "note", "warning", "problem")


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    :param severity: ``good`` needs no action, a ``note`` is worth knowing, a ``warning`` limits what the posterior can
        be used for, and with a ``problem`` it should not be used.
    :param topic: what was checked, in a word or two.
    :param message: what was found, with the value and the value that is expected.
    :param remedy: what to do; empty if nothing needs to be done.
    """

    severity: Severity
    topic: str
    message: str
    remedy: str = ""

    def __str__(self) -> str:
        remedy = f" {self.remedy}" if self.remedy else ""
        return f"[{self.severity}] {self.topic}: {self.message}{remedy}"


class Findings(list[Finding]):
    """A list of :class:`Finding`, printed with one line for each, and shown as a table in a notebook."""

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "Nothing was checked."

    __repr__ = __str__

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each finding: ``severity``, ``topic``, ``message``, ``remedy``."""
        return pd.DataFrame([asdict(finding) for finding in self], columns=[part.name for part in fields(Finding)])

    def _repr_html_(self) -> str:
        with pd.option_context("display.max_colwidth", None):  # do not truncate sentences
            return self.to_dataframe().to_html(index=False, border=0)


def gravest_first(findings: Iterable[Finding]) -> Findings:
    """Problems first, then warnings, notes and good findings; findings of equal severity keep their order."""
    return Findings(sorted(findings, key=lambda finding: -SEVERITIES.index(finding.severity)))
