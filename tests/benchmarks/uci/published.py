"""What others have reported on the same splits, with networks of the same size: RMSE and NLL, in the units of y."""

from __future__ import annotations

TABLES = ("boston", "concrete", "naval", "power", "protein", "wine", "yacht")

#: PBP: Hernandez-Lobato and Adams (2015). MC dropout: Gal and Ghahramani (2016). Deep ensembles of 5: Lakshminarayanan
#: et al. (2017). Horseshoe: Ghosh, Yao and Doshi-Velez (2018), NLL alone.
RMSE: dict[str, tuple[float, ...]] = {
    "PBP": (3.01, 5.67, 0.01, 4.12, 4.73, 0.64, 1.02),
    "MC dropout": (2.97, 5.23, 0.01, 4.02, 4.36, 0.62, 1.11),
    "deep ensembles": (3.28, 6.03, 0.00, 4.11, 4.71, 0.64, 1.58),
}
NLL: dict[str, tuple[float, ...]] = {
    "PBP": (2.57, 3.16, -3.73, 2.84, 2.97, 0.97, 1.63),
    "MC dropout": (2.46, 3.04, -3.80, 2.80, 2.89, 0.93, 1.55),
    "deep ensembles": (2.41, 3.06, -5.63, 2.79, 2.83, 0.94, 1.18),
    "horseshoe": (2.54, 3.09, -5.52, 2.81, 2.89, 0.95, 2.33),
}
#: those that our best method is compared with
RIVALS = ("PBP", "MC dropout", "deep ensembles")


def best(figures: dict[str, tuple[float, ...]], table: str) -> float:
    """The lowest of the rivals' figures for a table."""
    return min(figures[rival][TABLES.index(table)] for rival in RIVALS)
