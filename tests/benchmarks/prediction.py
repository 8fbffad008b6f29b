"""Prediction with 100 draws against ``pyro.infer.Predictive``: ``python -m tests.benchmarks.prediction``.

A 784-400-400-10 network. The reference runs Predictive with an AutoNormal guide of the same network, one draw after
the other (its default) and in parallel.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn.models import Dense, MeanFieldGuide, Rank1, Rank1Guide
from tests.benchmarks.measure import interleaved, report

DRAWS = 100
ROWS = (1, 64, 256, 1000)
TARGET = {64: 8.0}


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 10))


def reference(model: Dense, guide: AutoNormal, x: Tensor, parallel: bool) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad(), pyro.get_param_store().scope():
            predictive = Predictive(model, guide=guide, num_samples=DRAWS, return_sites=("obs",), parallel=parallel)
            result: Tensor = predictive(x)["obs"]
        return result

    return run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    likelihood = pb.likelihoods.Categorical()
    dense = Dense(network(), likelihood, 60_000)
    auto = AutoNormal(dense)
    auto(torch.randn(2, 784), torch.tensor([0, 1]))  # with y: its first call must not meet a discrete latent
    mean_field = pb.Posterior(dense, MeanFieldGuide(dense))
    rank1 = Rank1(network(), likelihood, 60_000)
    # one component: 100 draws are 100 passes, as for the others
    factors = pb.Posterior(rank1, Rank1Guide(rank1, components=1))
    rows: list[dict[str, Any]] = []
    for n in ROWS:
        x = torch.randn(n, 784)
        alternatives: dict[str, Callable[[], Any]] = {
            "Predictive": reference(dense, auto, x, parallel=False),
            "Predictive(parallel=True)": reference(dense, auto, x, parallel=True),
            "Rank1": lambda x=x: factors.predict(x, num_samples=DRAWS).probs,  # type: ignore[misc]
            "Dense": lambda x=x: mean_field.predict(x, num_samples=DRAWS).probs,  # type: ignore[misc]
        }
        seconds = interleaved(alternatives, rounds)
        for name in ("Rank1", "Dense", "Predictive(parallel=True)"):
            rows.append(
                {
                    "rows": n,
                    "prediction": name,
                    "times_faster": seconds["Predictive"] / seconds[name],
                    "target": TARGET.get(n) if name in ("Rank1", "Dense") else None,
                    "seconds": seconds[name],
                    "reference_seconds": seconds["Predictive"],
                }
            )
    report("prediction", rows)


if __name__ == "__main__":
    main()
