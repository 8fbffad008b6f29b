"""Variance that SVGD recovers under wider kernels: ``python -m tests.benchmarks.bandwidths``.

The target is N(0, I) in 15 dimensions, with one kernel for all of them. Every row is the mean variance over its
coordinates, which should be 1, when 200 particles have come to rest under RBF and IMQ with the bandwidth of the median
rule times a factor. Takes about two minutes on two cores.
"""

from __future__ import annotations

import argparse
from typing import Any

import pyro
import pyro.distributions as dist
import torch

from pyro_bnn.inference import IMQ, RBF, SVGD, AutoParticles, ScaledMedian
from tests.benchmarks.measure import write_results

DIMENSIONS, PARTICLES = 15, 200
FACTORS = (1.0, 5.0, 25.0)


def gaussian() -> None:
    pyro.sample("z", dist.Normal(torch.zeros(DIMENSIONS, dtype=torch.float64), 1.0).to_event(1))


def recovered(kernel: RBF | IMQ, steps: int, seed: int = 0) -> float:
    torch.manual_seed(seed)
    guide = AutoParticles(gaussian, PARTICLES)
    engine = SVGD(gaussian, guide, torch.optim.Adagrad, kernel=kernel, scope="joint", num_data=1, lr=0.3)
    for _ in range(steps):
        engine.step()
    return float(guide.particles()["z"].var(0, correction=0).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=2000)
    steps: int = parser.parse_args().steps
    rows: list[dict[str, Any]] = []
    for factor in FACTORS:
        row: dict[str, Any] = {"factor": factor}
        for kernel in (RBF(ScaledMedian(factor)), IMQ(ScaledMedian(factor))):
            row[type(kernel).__name__] = recovered(kernel, steps)
        rows.append(row)
        print("  ".join(f"{name}={value:.3f}" for name, value in row.items()), flush=True)
    write_results("bandwidths", {"dimensions": DIMENSIONS, "particles": PARTICLES, "rows": rows}, seeds=[0])


if __name__ == "__main__":
    main()
