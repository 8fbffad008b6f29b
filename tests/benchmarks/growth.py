"""How time and memory grow with the size of the work: ``python -m tests.benchmarks.growth``.

A training step against layers, members and rows, ``predict`` against draws, layers and rows, and a step of SVGD against
particles; of a chain of layers with 64 units, AdamW. ``slope`` is that of the line of least squares through the
logarithms: 1 is growth in proportion, 0 none. ``last slope`` is that between the two largest sizes, where the fixed
part of a step weighs least.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn.inference import SVGD, MixtureELBO
from tests.benchmarks.measure import interleaved, peak_memory, report
from tests.benchmarks.training_step import NUM_DATA, Step, pyro_step, stepper

UNITS = 64


@dataclass(frozen=True)
class Size:
    """The size of the work, of which one number varies."""

    layers: int = 10
    members: int = 1
    rows: int = 64
    draws: int = 10
    particles: int = 5


def net(layers: int) -> nn.Module:
    torch.manual_seed(0)
    stack: list[nn.Module] = []
    for _ in range(layers):
        stack += [nn.Linear(UNITS, UNITS), nn.ReLU()]
    return nn.Sequential(*stack[:-1])


def batch(rows: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(rows, UNITS), torch.randint(UNITS, (rows,))


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in parameters if p.requires_grad and p.numel()], 1e-3, weight_decay=0.0)


def programs(form: str, size: Size) -> tuple[Any, Any]:
    likelihood = pb.likelihoods.Categorical()
    if form == "Rank1":
        rank1 = pb.models.Rank1(net(size.layers), likelihood, NUM_DATA)
        return rank1, pb.models.Rank1Guide(rank1, size.members)
    if form == "Bella":
        bella = pb.models.Bella(net(size.layers), likelihood, NUM_DATA)
        return bella, pb.models.ParticleGuide(bella, size.particles)
    dense = pb.models.Dense(net(size.layers), likelihood, NUM_DATA)
    return dense, pb.models.MeanFieldGuide(dense, components=size.members)


def train(form: str, size: Size) -> Step:
    x, y = batch(size.rows)
    if form == "plain":
        network = net(size.layers)
        return stepper(adamw(network.parameters()), lambda: F.cross_entropy(network(x), y))
    model, guide = programs(form, size)
    if form == "Bella":
        engine = SVGD(model, guide)
        return lambda: engine.step(x, y)
    return pyro_step(model, guide, x, y, MixtureELBO(), adamw)


def predict(form: str, size: Size) -> Step:
    x, _ = batch(size.rows)
    posterior = pb.Posterior(*programs(form, size))
    return lambda: posterior.predict(x, num_samples=size.draws).probs


#: what is done, by which forms, and which number of :class:`Size` varies over which values
LINES: tuple[tuple[str, Callable[[str, Size], Step], tuple[str, ...], str, tuple[int, ...]], ...] = (
    ("training step", train, ("plain", "Dense", "Rank1", "Bella"), "layers", (10, 40, 160)),
    ("training step", train, ("Dense", "Rank1"), "members", (1, 4, 16)),
    ("training step", train, ("plain", "Dense", "Rank1", "Bella"), "rows", (64, 512, 4096)),
    ("SVGD step", train, ("Bella",), "particles", (2, 5, 10, 20)),
    ("predict", predict, ("Dense", "Rank1"), "draws", (1, 10, 100)),
    ("predict", predict, ("Dense", "Rank1"), "layers", (10, 40, 160)),
    ("predict", predict, ("Dense", "Rank1"), "rows", (64, 512, 4096)),
)


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Of the line of least squares through (log size, log value)."""
    return statistics.linear_regression([math.log(s) for s in sizes], [math.log(v) for v in values]).slope


def line(
    what: str, make: Callable[[str, Size], Step], form: str, over: str, sizes: Sequence[int], rounds: int
) -> dict[str, Any]:
    builds = {str(n): partial(make, form, replace(Size(), **{over: n})) for n in sizes}
    seconds = interleaved({name: build() for name, build in builds.items()}, rounds)
    megabytes = {name: peak_memory(build) for name, build in builds.items()}
    return {
        "step": what,
        "form": form,
        "over": over,
        "sizes": list(sizes),
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "seconds": list(seconds.values()),
        "megabytes": list(megabytes.values()),
        "slope": slope(sizes, list(seconds.values())),
        "last slope": slope(sizes[-2:], list(seconds.values())[-2:]),
        "memory slope": slope(sizes, list(megabytes.values())),
        "last memory slope": slope(sizes[-2:], list(megabytes.values())[-2:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    rows = []
    for what, make, forms, over, sizes in LINES:
        for form in forms:
            rows.append(line(what, make, form, over, sizes, asked.rounds))
            print(f"{what} of {form} over {over}: {rows[-1]['slope']:.2f}", flush=True)
    report("growth", rows)


if __name__ == "__main__":
    main()
