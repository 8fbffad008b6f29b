"""SGHMC without a setting on small tables, beside mean field: ``python -m tests.benchmarks.tuned_tables``.

Networks of 50 ReLU units with the default prior and a noise that is learned, on the first published splits of tables of
UCI: RMSE and NLL of the test rows in the units of y. SGHMC has four chains and nothing set; mean field has 1,000 epochs
of Adam. What warm-up found, R-hat and effective draws are in the rows. About three minutes a split on one core.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from typing import Any

import torch
from torch import nn

import pyro_bnn as pb
from tests.benchmarks.datasets import Table, uci
from tests.benchmarks.measure import report

EPOCHS = 1000


def infer(engine: str, table: Table, draws: int, seed: int) -> pb.Posterior:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(table.x_train.shape[1], 50), nn.ReLU(), nn.Linear(50, 1))
    model = pb.models.Dense(net, pb.likelihoods.Gaussian(), len(table.x_train))
    pair = (table.x_train, table.y_train)
    if engine == "SGHMC":
        return pb.inference.sample(pb.inference.SGHMC(model, pair), draws, seed=seed, progress=False)
    guide = pb.models.MeanFieldGuide(model)
    return pb.inference.fit(model, guide, pair, epochs=EPOCHS, batch_size=128, seed=seed, progress=False)


def measure(name: str, split: int, engine: str, draws: int) -> dict[str, Any]:
    table = uci(name, split)
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        posterior = infer(engine, table, draws, split)
    seconds = time.perf_counter() - start
    found = pb.diagnostics.evaluate(
        posterior, (table.x_test, table.y_test), num_samples=posterior.num_stored or 200, seed=0
    )
    row = {"table": name, "split": split, "engine": engine, "seconds": seconds}
    row |= {"rmse": found["rmse"] * table.scale, "nll": found["nll"] + math.log(table.scale)}
    row |= {"told": any("chains" in str(one.message) for one in told)}
    return row | {f"found {key}": value for key, value in (posterior.sampler or {}).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("tables", nargs="*", default=["yacht", "boston"])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in asked.tables:
        for split in range(asked.splits):
            for engine in ("SGHMC", "mean field"):
                rows.append(measure(name, split, engine, asked.draws))
                shown = "  ".join(f"{key} {rows[-1][key]:.3f}" for key in ("rmse", "nll", "seconds"))
                print(f"{name} {split} {engine:10} {shown}", flush=True)
    report("tuned_tables", rows, range(asked.splits))


if __name__ == "__main__":
    main()
