"""Variance that particles recover in many dimensions: ``python -m tests.benchmarks.variance``.

The target is N(0, I) in D dimensions, written as ten layers of two tensors each (fewer where D < 20). Every row is the
mean variance over coordinates, which should be 1, when 20 particles have come to rest under kernels on everything, on
each layer, or on each tensor. Under a kernel on functions it is the variance of the outputs of a linear network with D
weights at 5 inputs, whose prior is N(0, I), again over its true value.
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import nn

import pyro_bnn as pb
from pyro_bnn.inference import RBF, SVGD, AutoParticles
from pyro_bnn.program.guide import MixtureGuide
from tests.benchmarks.measure import write_results

PARTICLES = 20
DIMENSIONS = (2, 10, 100, 1_000, 10_000)


def gaussian(dim: int) -> Any:
    """N(0, I) over sites ``layer.a`` and ``layer.b``."""
    layers = max(1, min(10, dim // 2))
    sizes = [dim // (2 * layers)] * (2 * layers)
    sizes[-1] += dim - sum(sizes)

    def model() -> None:
        for i, size in enumerate(sizes):
            zeros = torch.zeros(size, dtype=torch.float64)
            pyro.sample(f"layer{i // 2}.{'ab'[i % 2]}", dist.Normal(zeros, 1.0).to_event(1))

    return model


def recovered(dim: int, scope: Any, method: Any, steps: int, seed: int = 0) -> float:
    torch.manual_seed(seed)
    model = gaussian(dim)
    guide = AutoParticles(model, PARTICLES)
    engine = SVGD(model, guide, torch.optim.Adagrad, kernel=RBF(), scope=scope, method=method, num_data=1, lr=0.3)
    for _ in range(steps):
        engine.step()
    values = torch.cat([v.flatten(1) for v in guide.particles().values()], 1)
    return float(values.var(0, correction=0).mean())


def of_functions(dim: int, steps: int, seed: int = 0) -> float:
    """The network w . x at 5 orthonormal inputs, under repulsion of its outputs; data that say nothing."""
    torch.manual_seed(seed)
    net = nn.Linear(dim, 1, bias=False).double()
    rows = min(5, dim)
    x = torch.linalg.qr(torch.randn(dim, rows, dtype=torch.float64))[0].t()
    y = torch.zeros(rows, 1, dtype=torch.float64)
    model = pb.models.Dense(net, pb.likelihoods.Gaussian(scale=1e6), rows, prior=pb.priors.Normal(0.0, 1.0))
    guide = MixtureGuide(model, PARTICLES, family="point")
    with torch.no_grad():
        for weights in guide.coordinates().values():
            weights.normal_()
    engine = SVGD(model, guide, torch.optim.Adagrad, method="wgd", space="function", num_data=1, lr=0.3)
    for _ in range(steps):
        engine.step(x, y)
    f = guide.coordinates()["weight"].flatten(1) @ x.t()
    return float(f.var(0, correction=0).mean())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=600)
    steps = parser.parse_args().steps
    rows = []
    for method in ("svgd", "wgd"):
        for dim in DIMENSIONS:
            start = time.perf_counter()
            row: dict[str, Any] = {"method": method, "dimensions": dim}
            for scope in ("joint", "layer", "tensor"):
                row[scope] = recovered(dim, scope, method, steps)
            if method == "wgd":
                row["function"] = of_functions(dim, steps)
            row["seconds"] = time.perf_counter() - start
            rows.append(row)
            print("  ".join(f"{k}={v:.3f}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
    assert all(math.isfinite(row["joint"]) for row in rows)
    write_results("variance", {"particles": PARTICLES, "rows": rows}, seeds=[0])


if __name__ == "__main__":
    main()
