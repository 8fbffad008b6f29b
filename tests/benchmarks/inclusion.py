"""Which inputs of a small table are included, where the answer is known: ``python -m tests.benchmarks.inclusion``.

``known``: 220 rows, ten inputs of which two matter, by log evidence the pattern {0, 1} by 3.5 nats or more; five seeds.
``simulated``: 24 tables of 100 to 1000 rows, 5 to 20 inputs, 8 or 16 units, tanh or ReLU, two inputs that matter.
All by the recipe of docs/spike_slab.md. NLL is that of 500 or 1000 rows that were not trained on, in nats, with all
weights and with those that are probably in the spike removed. About a quarter of an hour on one core.
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import pyro_bnn as pb
from tests.benchmarks.measure import report

Table = tuple[Tensor, Tensor, int]


def standardised(x: np.ndarray, y: np.ndarray, n: int) -> Table:
    """x ``[rows, p]``, y ``[rows, 1]`` by mean and standard deviation of the first n rows, which train."""
    x, y = (x - x[:n].mean(0)) / x[:n].std(0), (y - y[:n].mean()) / y[:n].std()
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)[:, None], n


def known_table() -> Table:
    r = np.random.default_rng(11)
    n, m, p = 220, 500, 10
    x = r.normal(size=(n + m, p))
    x[:, 3:8] = r.random((n + m, 5)) < 0.4
    y = 0.9 * np.tanh(1.2 * x[:, 0]) + 0.45 * x[:, 1] + 0.3 * r.normal(size=n + m)
    return standardised(x, y, n)


def simulated_table(seed: int) -> tuple[Table, dict[str, Any]]:
    """A table, with its size and the network that it is fitted by; the true inputs are any two."""
    r = np.random.default_rng(1000 + seed)
    n, p = int(r.choice([100, 220, 500, 1000])), int(r.choice([5, 10, 20]))
    hidden, activation = int(r.choice([8, 16])), str(r.choice(["tanh", "relu"]))
    x = r.normal(size=(n + 1000, p))
    binary = r.random(p) < 0.3
    x[:, binary] = r.random((n + 1000, int(binary.sum()))) < 0.4
    first, second = r.choice(p, 2, replace=False).tolist()
    sizes = r.uniform(0.4, 0.9, 2)
    y = sizes[0] * np.tanh(1.2 * x[:, first]) + sizes[1] * x[:, second] + r.uniform(0.2, 0.4) * r.normal(size=len(x))
    about = {"rows": n, "inputs": p, "hidden": hidden, "activation": activation, "true": sorted([first, second])}
    return standardised(x, y, n), about


def fit(table: Table, hidden: int, activation: str, seed: int, warmup: int, samples: int, chains: int) -> pb.Posterior:
    x, y, n = table
    p = x.shape[1]
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(p, hidden), nn.Tanh() if activation == "tanh" else nn.ReLU(), nn.Linear(hidden, 1))
    prior = {
        r"0\.weight": pb.priors.SpikeAndSlab.for_inputs(p, n),
        r"2\.weight": pb.priors.Normal(0.0, 1 / math.sqrt(hidden)),
        ".*": pb.priors.Normal(0.0, 1.0),
    }
    model = pb.models.SpikeSlab(net, pb.likelihoods.Gaussian(), n, prior=prior)
    kernel = pb.inference.SGHMCEM(
        model, (x[:n], y[:n]), step_size=0.1, friction=0.1, batch_size=min(n, 256), thinning=10
    )
    return pb.inference.sample(kernel, samples, warmup, num_chains=chains, seed=seed, progress=False)


def nll(posterior: pb.Posterior, x: Tensor, y: Tensor) -> float:
    """Minus the mean log predictive density, in nats."""
    density = posterior.log_likelihood(x, y, posterior.num_stored).flatten(0, 1)
    return -float((density.double().logsumexp(0) - math.log(len(density))).mean())


def measured(table: Table, true: list[int], posterior: pb.Posterior, seconds: float) -> dict[str, Any]:
    x, y, n = table
    probability = posterior.inclusion_probabilities()["0.weight"]
    chosen = set((probability >= 0.5).nonzero().flatten().tolist())
    pruned = posterior.sparsify(example=x[:1]).posterior
    others = x.shape[1] - len(true)
    return {
        "true positives": len(chosen & set(true)) / len(true),
        "false positives": len(chosen - set(true)) / others,
        "exact": chosen == set(true),
        "nll": nll(posterior, x[n:], y[n:]),
        "pruned nll": nll(pruned, x[n:], y[n:]),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=750, help="draws, of 10 steps each")
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--chains", type=int, default=4)
    options = parser.parse_args()
    settings = (options.warmup, options.samples, options.chains)
    rows: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        start = time.perf_counter()
        posterior = fit(known_table(), 16, "tanh", seed, *settings)
        about = {"table": "known", "seed": seed}
        rows.append(about | measured(known_table(), [0, 1], posterior, time.perf_counter() - start))
        print(rows[-1], flush=True)
    for seed in range(options.tables):
        table, about = simulated_table(seed)
        start = time.perf_counter()
        posterior = fit(table, about["hidden"], about["activation"], seed, *settings)
        about = {"table": "simulated", "seed": seed} | about
        rows.append(about | measured(table, about["true"], posterior, time.perf_counter() - start))
        print(rows[-1], flush=True)
    for name in ("known", "simulated"):
        found = [row for row in rows if row["table"] == name and "exact" in row]
        if found:
            keys = ("true positives", "false positives", "nll", "pruned nll", "seconds")
            means = {key: float(np.mean([row[key] for row in found])) for key in keys}
            rows.append(
                {"table": f"{name}, means"} | means | {"exact": f"{sum(r['exact'] for r in found)} of {len(found)}"}
            )
    report("inclusion", rows, range(max(options.seeds, options.tables)))


if __name__ == "__main__":
    main()
