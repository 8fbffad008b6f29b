"""A regression with a gap in its data: one trained network beside a Bayesian one. Writes ``docs/gap.png``.

    python examples/gap.py [--out FILE]

The points lie at both ends of the axis. One trained network draws a line through the gap as if it knew; the posterior,
drawn by SGHMC from four starts, is wide where nothing was seen. Takes about a minute on one core.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

import pyro_bnn as pb

NOISE = 0.1
CHAINS = 4


def data(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """80 points of ``y = sin(2.5 x) + N(0, 0.1^2)`` with x in [-2, -0.7] and [0.7, 2]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.cat([torch.linspace(-2, -0.7, 40), torch.linspace(0.7, 2, 40)])[:, None]
    return x, torch.sin(2.5 * x) + NOISE * torch.randn(x.shape, generator=generator)


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(1, 50), nn.Tanh(), nn.Linear(50, 1))


def model_of(net: nn.Module, num_data: int) -> pb.models.Dense:
    prior = {"0": pb.priors.Normal(0, 2.0), ".*": pb.priors.Normal(0, 0.3)}
    return pb.models.Dense(net, pb.likelihoods.Gaussian(NOISE), num_data, prior=prior)


def deterministic(x: torch.Tensor, y: torch.Tensor, epochs: int) -> pb.Posterior:
    """The mode of the posterior: what training with weight decay finds."""
    model = model_of(network(0), len(x))
    return pb.inference.fit(model, pb.models.PointGuide(model), (x, y), epochs=epochs, lr=1e-2, seed=0, progress=False)


def bayesian(x: torch.Tensor, y: torch.Tensor, draws: int) -> list[pb.Posterior]:
    """SGHMC from networks of their own: the gap is where posteriors of different starts differ most."""
    found = []
    for seed in range(CHAINS):
        kernel = pb.inference.SGHMC(
            model_of(network(seed), len(x)), (x, y), step_size=0.02, friction=0.1, batch_size=len(x), thinning=50
        )
        found.append(pb.inference.sample(kernel, draws, warmup_steps=draws, seed=seed, progress=False))
    return found


def figure(epochs: int = 1000, draws: int = 100) -> Figure:
    x, y = data()
    grid = torch.linspace(-3, 3, 241)[:, None]
    line = deterministic(x, y, epochs).predict(grid).mean.numpy()
    functions = np.concatenate(
        [p.predict(grid, num_samples=draws).per_member[:, 0].numpy() for p in bayesian(x, y, draws)]
    )
    low, middle, high = np.quantile(functions, [0.025, 0.5, 0.975], axis=0)
    shown = Figure(figsize=(9, 3), layout="constrained")
    left, right = shown.subplots(1, 2, sharey=True)
    for axes, title in ((left, "one trained network"), (right, "the posterior: median and 95 % of functions")):
        axes.plot(x[:, 0], y[:, 0], ".", color="0.3", ms=4)
        axes.plot(grid[:, 0], torch.sin(2.5 * grid)[:, 0], ":", color="0.5", lw=1)
        axes.set(title=title, ylim=(-2.2, 2.2), xlim=(-3, 3), xlabel="x")
    left.plot(grid[:, 0], line, color="C1")
    right.fill_between(grid[:, 0], low, high, color="C0", alpha=0.25, lw=0)
    right.plot(grid[:, 0], middle, color="C0")
    left.set_ylabel("y")
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs" / "gap.png")
    out: Path = parser.parse_args().out
    figure().savefig(out, dpi=110)
    print(f"wrote {os.fspath(out)}")


if __name__ == "__main__":
    main()
