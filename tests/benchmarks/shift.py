"""Rank-1 networks, a deep ensemble and one network on corrupted digits: ``python -m tests.benchmarks.shift``.

All have the same budget, 80 passes of the 1,257 training digits through a network: a rank-1 network has 4 components
and 20 epochs, an ensemble 4 networks of 20 epochs each, and a deterministic network 80 epochs, or 20 if that is better.
Every method chooses its settings on a fifth of the training digits, uncorrupted, by their negative log-likelihood. The
540 test images are used once, clean and corrupted in eight ways at five severities, for five seeds.

Took 26 minutes on a core that other programs used as well.
"""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path
from typing import Any

import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

import pyro_bnn as pb
from pyro_bnn.data import Task, digits
from pyro_bnn.diagnostics import Shift
from pyro_bnn.inference import DeepEnsemble, cosine, fit
from pyro_bnn.models import Dense, PointGuide, Rank1, Rank1Guide
from pyro_bnn.models.architectures import digits_cnn
from tests.benchmarks.measure import write_results

EPOCHS, MEMBERS, DRAWS, SEEDS = 20, 4, 4, range(5)
RATES = (5e-3, 1e-2, 2e-2)
METHODS: dict[str, list[dict[str, Any]]] = {
    "rank-1": [{"lr": lr, "epochs": EPOCHS} for lr in RATES],
    "ensemble": [{"lr": lr, "epochs": EPOCHS} for lr in RATES],
    "deterministic": [
        {"lr": lr, "epochs": epochs} for lr, epochs in itertools.product(RATES, (EPOCHS, MEMBERS * EPOCHS))
    ],
}
NAMES = ("accuracy", "nll", "ece", "cA", "cNLL", "cECE")


def trained(method: str, settings: dict[str, Any], data: tuple[Tensor, Tensor], seed: int) -> pb.Posterior:
    """The settings that are not tried here are those of ``pyro-bnn fit``."""
    torch.manual_seed(seed)
    net, likelihood, size = digits_cnn(), pb.likelihoods.Categorical(), len(data[0])
    options = settings | {"batch_size": 64, "schedule": cosine(warmup=1.0), "seed": seed, "progress": False}
    if method == "ensemble":
        return DeepEnsemble(net, likelihood, size, num_networks=MEMBERS).fit(data, **options)
    if method == "deterministic":
        point = Dense(net, likelihood, size)
        return fit(point, PointGuide(point), data, **options)
    model = Rank1(net, likelihood, size, prior=pb.priors.HierarchicalCauchy(0.1))
    return fit(model, Rank1Guide(model, MEMBERS, init_dropout_rate=1e-2), data, **options)


def scored(posterior: pb.Posterior, method: str, data: tuple[Tensor, Tensor], **shift: str) -> dict[str, Any]:
    draws = {"rank-1": DRAWS, "ensemble": MEMBERS, "deterministic": 1}[method]
    return pb.diagnostics.evaluate(posterior, data, num_samples=draws, seed=0, **shift)  # type: ignore[arg-type]


def chosen(method: str, task: Task) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The settings with the lowest NLL on a fifth of the training digits, and the NLL of all."""
    rows = range(len(task.y_train))
    train, held_out = map(torch.as_tensor, train_test_split(rows, test_size=0.2, stratify=task.y_train, random_state=1))
    tried = []
    for settings in METHODS[method]:
        posterior = trained(method, settings, (task.x_train[train], task.y_train[train]), seed=100)
        found = scored(posterior, method, (task.x_train[held_out], task.y_train[held_out]))
        tried.append({"method": method, **settings, "validation_nll": found["nll"]})
        print("  ".join(f"{key}={value}" for key, value in tried[-1].items()), flush=True)
    best = min(range(len(tried)), key=lambda i: float(tried[i]["validation_nll"]))
    return METHODS[method][best], tried


def average(shifts: list[Shift]) -> Shift:
    """The mean over seeds of every number."""
    first = shifts[0]
    by_kind = {
        kind: {
            name: [sum(at) / len(at) for at in zip(*(shift[kind][name] for shift in shifts), strict=True)]
            for name in of
        }
        for kind, of in first.items()
    }
    clean = {name: statistics.mean(shift.clean[name] for shift in shifts) for name in first.clean}
    return Shift(by_kind, clean, first.rows, first.functions)


def table(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Mean and standard error over the seeds of each metric of each method, on average and by kind."""
    rows = []
    for method, results in found.items():
        row: dict[str, Any] = {"method": method}
        for name in NAMES:
            row[name] = _mean_and_error([one[name] for one in results])
        for kind, name in itertools.product(results[0]["shift"], ("accuracy", "nll", "ece")):
            row[f"{name}, {kind}"] = _mean_and_error([one["shift"].mean_of(kind, name) for one in results])
        rows.append(row)
    names = [name for name in rows[0] if name != "method"]
    print(f"{'':24}" + "".join(f"{row['method']:>20}" for row in rows))
    for name in names:
        cells = (f"{row[name][0]:.4f} ± {row[name][1]:.4f}" for row in rows)
        print(f"{name:24}" + "".join(f"{cell:>20}" for cell in cells))
    return rows


def _mean_and_error(values: list[float]) -> list[float]:
    return [statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5]


def main() -> None:
    task = digits()
    train, test = (task.x_train, task.y_train), (task.x_test, task.y_test)
    found: dict[str, list[dict[str, Any]]] = {}
    settings, tried = {}, []
    for method in METHODS:
        settings[method], rows = chosen(method, task)
        tried += rows
        found[method] = []
        for seed in SEEDS:
            posterior = trained(method, settings[method], train, seed)
            found[method].append(scored(posterior, method, test, shift="images"))
            print(method, seed, *(f"{name}={found[method][-1][name]:.4f}" for name in NAMES), flush=True)
    rows = table(found)
    runs = [
        {"method": method, "seed": seed, **one, "shift": one["shift"].to_json()}
        for method, results in found.items()
        for seed, one in zip(SEEDS, results, strict=True)
    ]
    write_results("shift", {"settings": settings, "tried": tried, "means": rows, "rows": runs}, seeds=SEEDS)
    shifts = {method: average([one["shift"] for one in results]) for method, results in found.items()}
    pb.diagnostics.plots.plot_shift(shifts).savefig(Path("docs/shift.png"), dpi=90)


if __name__ == "__main__":
    main()
