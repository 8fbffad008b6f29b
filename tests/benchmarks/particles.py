"""Cost of particles: ``python -m tests.benchmarks.particles``.

A step of SVGD on n low-rank particles against n training steps of the plain network, on ResNet-18 (32 x 32 stem) and
ViT-B/16 (32 x 32 images, 5 tokens); its memory against n networks of their own, trained one after the other; and the
kernel's part of a step alone against that of ``pyro.infer.SVGD``.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn.inference import RBF, SVGD
from pyro_bnn.inference.stein.positions import Positions
from pyro_bnn.models import Bella, ParticleGuide
from pyro_bnn.models.architectures import resnet18
from tests.benchmarks.measure import interleaved, peak_memory, report

Step = Callable[[], Any]
PARTICLES, DIM = 20, 100_000

NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "ResNet-18": (lambda: resnet18(10), 64),
    "ViT-B/16": (lambda: torchvision.models.vit_b_16(image_size=32, num_classes=10), 32),
}


def images(n: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(n, 3, 32, 32), torch.randint(10, (n,))


def plain(name: str, networks: int = 1) -> Step:
    """One step of Adam for each of some networks."""
    make, rows = NETWORKS[name]
    x, y = images(rows)
    first = make()
    nets = [first, *(copy.deepcopy(first) for _ in range(networks - 1))]
    optimizers = [torch.optim.Adam(net.parameters(), 1e-3) for net in nets]

    def step() -> None:
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(net(x), y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    return step


def particles(name: str, n: int, method: Any = "svgd") -> Step:
    make, rows = NETWORKS[name]
    x, y = images(rows)
    model = Bella(make(), pb.likelihoods.Categorical(), 50_000)
    engine = SVGD(model, ParticleGuide(model, n), space="product", method=method)
    return lambda: engine.step(x, y)


def cloud() -> tuple[Tensor, Tensor]:
    """Particles and gradients of their energies."""
    torch.manual_seed(0)
    return torch.randn(PARTICLES, DIM), torch.randn(PARTICLES, DIM)


def ours() -> Step:
    theta, gradients = cloud()

    def update() -> Tensor:
        points = Positions([theta])
        values = points.evaluate(RBF())
        (repulsion,), _ = points.gradients(values, own=False)
        return torch.addmm(repulsion, values.value.float(), gradients, beta=-1 / PARTICLES, alpha=1 / PARTICLES)

    return update


def pyros() -> Step:
    """What ``pyro.infer.SVGD.step`` does between the gradients and the optimiser."""
    theta, gradients = cloud()
    kernel = pyro.infer.RBFSteinKernel()

    def update() -> Tensor:
        logarithm, by_particle = kernel.log_kernel_and_grad(theta)
        values = logarithm.sum(-1).exp()
        return (values @ gradients + torch.einsum("nm,nm...->n...", values, by_particle)) / PARTICLES

    return update


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 5, 10, 20])
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    times = interleaved({"ours": ours(), "pyro": pyros()}, 2 * arguments.rounds, burst=5)
    rows.append(
        {
            "step": f"the kernel's part for {PARTICLES} particles with {DIM} coordinates, times faster",
            "reference": "pyro.infer.SVGD",
            "ratio": times["pyro"] / times["ours"],
            "target": 50.0,
            "seconds": times["ours"],
            "memory_ratio": peak_memory(ours) / peak_memory(pyros),
            "memory_target": 0.1,
        }
    )
    for name in NETWORKS:
        for n in arguments.sizes:
            times = interleaved({"particles": particles(name, n), "plain": plain(name)}, arguments.rounds, 1)
            row = {
                "step": f"{n} particles of {name}",
                "reference": f"{n} training steps",
                "ratio": times["particles"] / (n * times["plain"]),
                "target": 0.82,
                "seconds": times["particles"],
            }
            if n == 5:
                ours_, theirs = (peak_memory(partial(build, name, n), 2) for build in (particles, plain))
                row["memory_ratio"] = ours_ / theirs
            rows.append(row)
    report("particles", rows)


if __name__ == "__main__":
    main()
