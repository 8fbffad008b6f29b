"""One row of the results: a method on one split, with the settings that validation chose."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

import pyro_bnn as pb
from tests.benchmarks.datasets import Table, uci, uci_gap
from tests.benchmarks.measure import read_results, write_results
from tests.benchmarks.uci.methods import METHODS

#: the tables whose published results stand beside ours, and their splits
SPLITS = {"yacht": 20, "boston": 20, "concrete": 20, "wine": 20, "power": 20, "naval": 20, "protein": 5}
#: share of the training rows on which settings are compared
HELD_OUT = 0.2


def table_of(name: str, part: str) -> Table:
    """``"split 3"``, or ``"gap 3"`` without the middle third of input 3."""
    kind, index = part.split()
    return (uci if kind == "split" else uci_gap)(name, int(index))


def for_validation(table: Table, seed: int) -> Table:
    """The training rows alone: four fifths to train on, and a fifth in the place of the test rows."""
    order = torch.randperm(len(table.x_train), generator=torch.Generator().manual_seed(seed))
    held, rest = order.tensor_split([round(HELD_OUT * len(order))])
    x, y = table.x_train, table.y_train
    return table._replace(x_train=x[rest], y_train=y[rest], x_test=x[held], y_test=y[held])


def scores(posterior: pb.Posterior, table: Table, draws: int) -> dict[str, float]:
    """RMSE and NLL of the test rows, in the units of y."""
    count = min(draws, posterior.num_stored or draws)
    found = pb.diagnostics.evaluate(posterior, (table.x_test, table.y_test), num_samples=count, seed=0)
    return {"rmse": found["rmse"] * table.scale, "nll": found["nll"] + math.log(table.scale)}


def tried(method: str, table: Table, settings: Any, seed: int, share: float) -> dict[str, float]:
    """The scores that settings reach; infinite ones, if a run of theirs diverges, so that they are not chosen."""
    how = METHODS[method]
    torch.manual_seed(seed)  # of the network's starting values
    try:
        return scores(how.fit(table, settings, seed, share), table, how.draws)
    except FloatingPointError:
        return {"rmse": math.inf, "nll": math.inf}


def measure(name: str, part: str, method: str, share: float = 1.0) -> dict[str, Any]:
    """A row.

    :param share: of the usual number of steps.
    """
    table, seed = table_of(name, part), int(part.split()[1])
    grid = METHODS[method].settings(table)
    start = time.perf_counter()
    inner = for_validation(table, seed)
    validation = {str(dict(settings)): tried(method, inner, settings, seed, share)["nll"] for settings in grid}
    chosen = min(grid, key=lambda settings: validation[str(dict(settings))])
    began = time.perf_counter()
    found = tried(method, table, chosen, seed, share)
    seconds = {"seconds of the last fit": time.perf_counter() - began, "seconds": time.perf_counter() - start}
    return {"part": part, "method": method, "settings": dict(chosen), "validation": validation, **found, **seconds}


def known(name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_results(f"uci_{name}").get("rows", [])
    return rows


def is_measured(name: str, part: str, method: str) -> bool:
    """Whether there is a row of it, whose settings are the best of today's by its validation."""
    asked = {str(dict(settings)) for settings in METHODS[method].settings(table_of(name, part))}
    of = [row for row in known(name) if (row["part"], row["method"]) == (part, method)]
    return any(asked <= set(row["validation"]) and str(row["settings"]) in asked for row in of)


def add(name: str, row: dict[str, Any]) -> None:
    """Adds a row, in the place of one of the same method and part, whose settings were chosen among others."""
    key = (row["part"], row["method"])
    rows = [*(old for old in known(name) if (old["part"], old["method"]) != key), row]
    seeds = sorted({int(row["part"].split()[1]) for row in rows})
    write_results(f"uci_{name}", {"rows": rows}, seeds)
