"""``pyro-bnn fit`` as it is without options, over ten seeds: ``python -m tests.benchmarks.few_digits``.

Its hundred training digits, batches of 25 and 100 epochs were chosen on the training digits alone: networks for a
hundred of them, compared on the others, by the lower NLL of the deterministic network and of rank-1 (``validation`` of
the results). The ten runs then predict the 540 test images, which played no part. Takes a quarter of an hour on one
core; ``python -m tests.benchmarks.tables`` shows the runs in docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import pyro_bnn as pb
from pyro_bnn.data import digits
from pyro_bnn.inference import cosine, fit
from pyro_bnn.models import Dense, PointGuide, Rank1, Rank1Guide
from pyro_bnn.models.architectures import digits_cnn
from tests.benchmarks.measure import write_results

ROWS, SEEDS, COMPARED = 100, 10, 5
GRID: list[dict[str, int]] = [
    {"epochs": 60, "batch_size": 64},
    {"epochs": 60, "batch_size": 25},
    {"epochs": 100, "batch_size": 25},
]
METHODS = ("deterministic", "rank-1")


def held_out(method: str, settings: dict[str, Any], seed: int) -> dict[str, float]:
    """Scores on the training digits that the network does not see."""
    task = digits()
    order = torch.randperm(len(task.x_train), generator=torch.Generator().manual_seed(seed))
    seen, rest = order[:ROWS], order[ROWS:]
    torch.manual_seed(seed)
    net, likelihood = digits_cnn(), pb.likelihoods.Categorical()
    model: Any = Dense(net, likelihood, ROWS)
    guide: Any = PointGuide(model)
    if method == "rank-1":
        model = Rank1(net, likelihood, ROWS)
        guide = Rank1Guide(model, 4, init_dropout_rate=1e-2)
    common: dict[str, Any] = {"lr": 1e-2, "schedule": cosine(warmup=1.0), "seed": seed, "progress": False}
    posterior = fit(model, guide, (task.x_train[seen], task.y_train[seen]), **settings, **common)
    scores = pb.diagnostics.evaluate(posterior, (task.x_train[rest], task.y_train[rest]), num_samples=16, seed=seed)
    return {name: scores[name] for name in ("accuracy", "nll", "ece")}


def compared() -> list[dict[str, Any]]:
    """The settings of the grid, each with its means over the seeds."""
    rows = []
    for settings in GRID:
        for method in METHODS:
            found = [held_out(method, settings, seed) for seed in range(COMPARED)]
            means = {name: statistics.fmean(one[name] for one in found) for name in found[0]}
            rows.append({"method": method, **settings, **means})
            print("  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()))
    return rows


def command(seed: int, *options: str) -> list[dict[str, Any]]:
    """The metrics of both networks of one run of the command."""
    with tempfile.TemporaryDirectory() as folder:
        run = [sys.executable, "-m", "pyro_bnn", "fit", "--seed", str(seed), "--quiet", "--out", f"{folder}/run"]
        subprocess.run([*run, *options], check=True)
        metrics = json.loads((Path(folder) / "run" / "metrics.json").read_text())
    both = {"rank-1": metrics, "deterministic": metrics["deterministic"]}
    rows = []
    for method in METHODS:
        numbers = {name: value for name, value in both[method].items() if isinstance(value, (int, float))}
        rows.append({"method": method, "seed": seed, **numbers})
        print(f"seed {seed}  {method}: " + "  ".join(f"{k} {numbers[k]:.4f}" for k in ("accuracy", "nll", "cNLL")))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one run of one epoch, not written")
    if parser.parse_args().quick:
        command(0, "--epochs", "1")
        return
    torch.set_num_threads(1)
    validation = compared()
    rows = [row for seed in range(SEEDS) for row in command(seed)]
    write_results("few_digits", {"rows": rows, "validation": validation}, range(SEEDS))


if __name__ == "__main__":
    main()
