"""``pyro-bnn fit`` as it is without options, over ten seeds: ``python -m tests.benchmarks.few_digits``.

Epochs and batches, which both of its networks share, are those with which the deterministic one has the lowest NLL:
networks of a hundred training digits, compared on the other training digits (``validation`` of the results). The ten
runs then predict the 540 test images, which played no part. Takes some ten minutes on one core;
``python -m tests.benchmarks.tables`` shows the runs in docs/results.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import pyro_bnn as pb
from pyro_bnn.command.options import complete
from pyro_bnn.command.recipes import bayesian, deterministic
from pyro_bnn.data import digits
from pyro_bnn.inference import cosine, fit
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
    whole = digits()
    order = torch.randperm(len(whole.x_train), generator=torch.Generator().manual_seed(seed))
    x, y = whole.x_train[order], whole.y_train[order]
    task = dataclasses.replace(whole, x_train=x[:ROWS], y_train=y[:ROWS], x_test=x[ROWS:], y_test=y[ROWS:])
    options = complete("rank1", {"data": "digits", "lr": 1e-2, "seed": seed, "device": "cpu", **settings}, task)
    torch.manual_seed(seed)
    net = digits_cnn()
    model, guide = bayesian(net, task, options) if method == "rank-1" else deterministic(net, task)
    common: dict[str, Any] = {"lr": options.lr, "schedule": cosine(warmup=1.0), "seed": seed, "progress": False}
    posterior = fit(model, guide, (task.x_train, task.y_train), **settings, **common)
    test = task.x_test, task.y_test
    scores = pb.diagnostics.evaluate(posterior, test, num_samples=options.samples, seed=seed)
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
