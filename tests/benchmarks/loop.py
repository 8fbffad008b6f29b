"""What the loop of ``fit`` costs beside a loop by hand: ``python -m tests.benchmarks.loop``.

The same objective, optimiser and batches, on small networks where Python's part is largest: 800 steps of ``fit``, with
a progress bar and without, over those of a loop around ``pb.inference.Objective``, which is made anew each time, as in
``fit``. Target: at most 1.05.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import pyro_bnn as pb
from tests.benchmarks.measure import interleaved, report

ROWS, BATCH, EPOCHS, ROUNDS = 1280, 32, 20, 7
TARGET = 1.05
FORMS: dict[str, Callable[[nn.Module], tuple[Any, Any]]] = {}


def form(function: Callable[[nn.Module], tuple[Any, Any]]) -> Callable[[nn.Module], tuple[Any, Any]]:
    FORMS[function.__name__.replace("_", " ")] = function
    return function


@form
def mean_field(net: nn.Module) -> tuple[Any, Any]:
    model = pb.models.Dense(net, pb.likelihoods.Categorical(), ROWS)
    return model, pb.models.MeanFieldGuide(model)


@form
def rank_1(net: nn.Module) -> tuple[Any, Any]:
    model = pb.models.Rank1(net, pb.likelihoods.Categorical(), ROWS)
    return model, pb.models.Rank1Guide(model, components=2)


@form
def point(net: nn.Module) -> tuple[Any, Any]:
    model = pb.models.Dense(net, pb.likelihoods.Categorical(), ROWS)
    return model, pb.models.PointGuide(model)


def alternatives(name: str) -> dict[str, Callable[[], Any]]:
    """Training of a 16-50-10 network in each way."""
    torch.manual_seed(0)
    x, y = torch.randn(ROWS, 16), torch.randint(10, (ROWS,))

    def programs() -> tuple[Any, Any]:
        return FORMS[name](nn.Sequential(nn.Linear(16, 50), nn.ReLU(), nn.Linear(50, 10)))

    by_fit, by_hand = programs(), programs()

    def hand() -> None:
        objective = pb.inference.Objective(*by_hand, example=(x[:BATCH], y[:BATCH])).train()
        optimizer = torch.optim.AdamW(objective.trained(), lr=1e-3, weight_decay=0.0)
        losses = []
        for _ in range(EPOCHS):
            for rows in torch.randperm(ROWS).split(BATCH):
                optimizer.zero_grad()
                loss = objective.loss(x[rows], y[rows])
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))

    def fit(**options: Any) -> None:
        pb.inference.fit(*by_fit, (x, y), epochs=EPOCHS, batch_size=BATCH, **options)

    return {"by hand": hand, "fit": lambda: fit(progress=False), "fit with a bar": lambda: fit(progress=True)}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in FORMS:
        seconds = interleaved(alternatives(name), ROUNDS)
        row: dict[str, Any] = {
            "form": name,
            "target": TARGET,
            "milliseconds a step by hand": 1e3 * seconds["by hand"] / EPOCHS / (ROWS // BATCH),
        }
        rows.append(row | {f"{way} / by hand": seconds[way] / seconds["by hand"] for way in ("fit", "fit with a bar")})
    report("loop", rows, seeds=[0])


if __name__ == "__main__":
    main()
