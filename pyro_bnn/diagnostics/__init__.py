"""How good a posterior is, and whether to trust it: predictive metrics, and the way to ArviZ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyro_bnn.diagnostics.arviz import to_arviz
    from pyro_bnn.diagnostics.metrics import evaluate

__all__ = ["evaluate", "to_arviz"]


def __getattr__(name: str) -> Any:
    # torchmetrics and ArviZ take seconds to import, which a program that never calls them should not pay.
    if name == "evaluate":
        from pyro_bnn.diagnostics.metrics import evaluate

        return evaluate
    if name == "to_arviz":
        from pyro_bnn.diagnostics.arviz import to_arviz

        return to_arviz
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
