"""Whether ``check`` tells wrong inclusion from right: ``python -m tests.benchmarks.inclusion_checks``.

The 24 simulated tables of :mod:`tests.benchmarks.inclusion`, each fitted twice in ways that often go wrong: by one
chain with 400 draws of warm-up of the recipe in docs/spike_slab.md, and by a spike that is too wide, without annealing
and swaps. A fit is wrong when it includes other inputs than the two that matter, and flagged when ``check``, given
1000 rows that were not trained on and the training rows, has a problem or warning about inclusion. Six minutes on one
core.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import pyro.distributions as dist
import torch
from torch import nn

import pyro_bnn as pb
from tests.benchmarks.inclusion import Table, fit, simulated_table
from tests.benchmarks.measure import report


def fit_wide(table: Table, hidden: int, activation: str, seed: int) -> pb.Posterior:
    """One chain under the prior for a thousand inputs and ten thousand rows, where the start decides."""
    x, y, n = table
    torch.manual_seed(seed)
    first, act = nn.Linear(x.shape[1], hidden), nn.Tanh() if activation == "tanh" else nn.ReLU()
    prior = {
        r"0\.weight": pb.priors.SpikeAndSlab(0.1, 0.7, dist.Beta(2.0, 50.0), "input"),
        ".*": pb.priors.Normal(0.0, 1.0),
    }
    net = nn.Sequential(first, act, nn.Linear(hidden, 1))
    model = pb.models.SpikeSlab(net, pb.likelihoods.Gaussian(), n, prior=prior)
    options: dict[str, Any] = {"swap_every": None, "anneal": None, "batch_size": min(n, 256), "thinning": 10}
    kernel = pb.inference.SGHMCEM(model, (x[:n], y[:n]), step_size=0.1, friction=0.1, **options)
    return pb.inference.sample(kernel, 60, 250, seed=seed, progress=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=int, default=24)
    tables = parser.parse_args().tables
    rows: list[dict[str, Any]] = []
    for seed in range(tables):
        table, about = simulated_table(seed)
        x, y, n = table
        form = (about["hidden"], about["activation"])
        for kind in ("wide spike", "one chain"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                whole = (
                    fit_wide(table, *form, seed) if kind == "wide spike" else fit(table, *form, 100 + seed, 400, 60, 1)
                )
                probability = whole.inclusion_probabilities()["0.weight"]
                found = pb.diagnostics.check(whole, (x[n:], y[n:]), x_train=x[:n], y_train=y[:n])
            chosen = (probability >= 0.5).nonzero().flatten().tolist()
            severities = {one.severity for one in found if one.topic == "inclusion"}
            flagged = bool(severities & {"warning", "problem"})
            rows.append({"table": seed, "fit": kind, "included": chosen, "right": chosen == about["true"]})
            rows[-1]["flagged"] = flagged
            print(rows[-1], flush=True)
    wrong, right = ([row["flagged"] for row in rows if row["right"] == kind] for kind in (False, True))
    rows.append({"table": "all", "wrong": len(wrong), "flagged of them": sum(wrong), "right": len(right)})
    rows[-1]["flagged of the right"] = sum(right)
    report("inclusion_checks", rows, range(tables))


if __name__ == "__main__":
    main()
