"""Cost of an SGHMC step, alone and within EM: ``python -m tests.benchmarks.sghmc``.

ResNet-18 (32 x 32 stem, 64 images) against a step of torch's SGD with momentum on the plain network; within EM with an
E-step before every step and kernels as groups. On a 13-50-1
network: steps a second against a loop over named sites that traces the model at every step, and 16 vectorised chains
against one.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import pyro
import torch
import torch.nn.functional as F
from pyro import poutine
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn.inference import SGHMC, SGHMCEM
from pyro_bnn.models import Dense
from pyro_bnn.models.architectures import mlp, resnet18
from tests.benchmarks.measure import interleaved, peak_memory, report

Step = Callable[[], Any]
NUM_DATA, CHAINS = 400, 16


def plain() -> Step:
    torch.manual_seed(0)
    x, y, net = torch.randn(64, 3, 32, 32), torch.randint(10, (64,)), resnet18(10)
    optimizer = torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(net(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def stepper(kernel: SGHMC, chains: int | None = None) -> Step:
    """One step of a chain that has been set up; ``sample`` would also copy the state."""
    kernel.chains = chains
    kernel.setup(0)
    kernel.begin_at(kernel.initial_params)
    return kernel.step


def sghmc() -> Step:
    torch.manual_seed(0)
    x, y = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))
    model = Dense(resnet18(10), pb.likelihoods.Categorical(), 64, prior=pb.priors.Normal(0, 1.0))
    return stepper(SGHMC(model, (x, y), step_size=1e-2, friction=0.1, batch_size=64))


def sghmc_em() -> Step:
    torch.manual_seed(0)
    x, y = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))
    prior = {".*weight": pb.priors.SpikeAndSlab(0.01, 1.0, inclusion=0.5, group="kernel"), ".*": pb.priors.Normal()}
    model = Dense(resnet18(10), pb.likelihoods.Categorical(), 64, prior=prior)
    return stepper(SGHMCEM(model, (x, y), step_size=1e-2, friction=0.1, batch_size=64))


def regression() -> tuple[Dense, Tensor, Tensor]:
    torch.manual_seed(0)
    x, y = torch.randn(NUM_DATA, 13), torch.randn(NUM_DATA)
    net: nn.Module = mlp(13, (50,), 1)
    return Dense(net, pb.likelihoods.Gaussian(0.5), NUM_DATA, output=squeezed), x, y


def squeezed(f: Tensor) -> Tensor:
    return f.squeeze(-1)


def small(chains: int | None = None) -> Step:
    model, x, y = regression()
    return stepper(SGHMC(model, (x, y), step_size=1e-2, friction=0.1, batch_size=32), chains)


def small_chains() -> Step:
    return small(CHAINS)


def small_loop() -> Step:
    """The same step over a dictionary of named sites, tracing the model every time."""
    model, x, y = regression()
    z = {site.name: torch.zeros(1, 1, *site.shape) + 0.1 for site in model.sites()}
    momentum = {name: torch.zeros_like(value) for name, value in z.items()}
    h = 1e-2 / math.sqrt(NUM_DATA)

    def step() -> None:
        index = torch.randint(NUM_DATA, (32,))
        leaves = {name: value.requires_grad_() for name, value in z.items()}
        with pyro.validation_enabled(False):
            trace = poutine.trace(poutine.condition(model, leaves)).get_trace(x[index], y[index])
            gradients = torch.autograd.grad(-trace.log_prob_sum(), list(leaves.values()))
        with torch.no_grad():
            for (name, value), gradient in zip(leaves.items(), gradients, strict=True):
                momentum[name] = 0.9 * momentum[name] - h * gradient + math.sqrt(0.2) * torch.randn_like(value)
                z[name] = (value + h * momentum[name]).detach()

    return step


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    rows: list[dict[str, Any]] = []
    big = interleaved({"sghmc": sghmc(), "em": sghmc_em(), "plain": plain()}, rounds, burst=2)
    plain_memory = peak_memory(plain)
    for name, key, build, target in (("SGHMC", "sghmc", sghmc, 1.05), ("SGHMCEM", "em", sghmc_em, 1.1)):
        rows.append(
            {
                "step": f"{name} on ResNet-18",
                "reference": "SGD with momentum",
                "ratio": big[key] / big["plain"],
                "target": target,
                "seconds": big[key],
                "memory_ratio": peak_memory(build) / plain_memory,
                "memory_target": 1.1,
            }
        )
    little = interleaved({"one": small(), "chains": small_chains(), "loop": small_loop()}, 6 * rounds, 20, burst=20)
    rows.append(
        {
            "step": "SGHMC on 13-50-1, times faster",
            "reference": "loop over named sites",
            "ratio": little["loop"] / little["one"],
            "target": 5.0,
            "seconds": little["one"],
        }
    )
    rows.append(
        {
            "step": f"{CHAINS} vectorised chains on 13-50-1",
            "reference": "one chain",
            "ratio": little["chains"] / little["one"],
            "target": 3.0,
            "seconds": little["chains"],
        }
    )
    report("sghmc", rows)


if __name__ == "__main__":
    main()
