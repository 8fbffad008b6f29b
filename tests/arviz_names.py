"""What ArviZ 0.x and 1.x name differently."""

from __future__ import annotations

from typing import Any


def groups(data: Any) -> list[str]:
    """Names of the groups of an ``InferenceData`` or a ``DataTree``."""
    return list(data.groups()) if callable(data.groups) else [name.strip("/") for name in data.groups if name != "/"]


def elpd(result: Any) -> float:
    """The expected log pointwise predictive density that ``loo`` found, in nats."""
    return float(result.elpd_loo if hasattr(result, "elpd_loo") else result.elpd)
