"""Rank-1 networks: ours, by hand, and BatchEnsemble, whose factors are points."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn.inference import MixtureELBO
from pyro_bnn.models import Rank1, Rank1Guide
from pyro_bnn.priors import HierarchicalCauchy, Normal, Prior
from tests.benchmarks.peers.row import COMPILED, OURS, PLAIN, Build
from tests.benchmarks.peers.tasks import Task, plain, step_of, swapped
from tests.benchmarks.training_step import MEMBERS, NUM_DATA, HandRank1, Step, compiled_pyro_step, pyro_step

PRIORS: dict[str, Prior] = {"default prior": HierarchicalCauchy(), "Normal(1, .1)": Normal(1.0, 0.1)}


class HandCauchy(HandRank1):
    """Factors under Cauchy(1, tau) with tau ~ HalfCauchy(.1), whose posterior is a LogNormal: a KL from the draws."""

    def __init__(self, layer: nn.Module, rows: int) -> None:
        super().__init__(layer, rows)
        self.tau_loc = nn.Parameter(torch.full((MEMBERS, 1, 1), math.log(0.1)))
        self.tau_rho = nn.Parameter(torch.full((MEMBERS, 1, 1), -2.25))

    def forward(self, x: Tensor) -> Tensor:
        scale = F.softplus(self.tau_rho)
        noise = torch.randn_like(scale)
        log_tau = self.tau_loc + scale * noise
        self.tau = log_tau.exp()
        entropies = scale.log() + 0.5 * noise**2 + log_tau
        y = super().forward(x)
        prior = math.log(2 / (math.pi * 0.1)) - torch.log1p((self.tau / 0.1) ** 2)
        self.kl = self.kl - (entropies + 0.5 * math.log(2 * math.pi) + prior).sum() / MEMBERS
        return y

    def divergence(self, loc: Tensor, scale: Tensor, draws: Tensor) -> Tensor:
        """log q - log p, averaged over the rows' draws."""
        posterior = -scale.log() - 0.5 * ((draws - loc) / scale) ** 2 - 0.5 * math.log(2 * math.pi)
        prior = -self.tau.log() - math.log(math.pi) - torch.log1p(((draws - 1) / self.tau) ** 2)
        return (posterior - prior).sum() / draws.shape[1]


def ours(task: Task, prior: str) -> Step:
    model = Rank1(task.net(), pb.likelihoods.Categorical(), NUM_DATA, prior=PRIORS[prior])
    return pyro_step(model, Rank1Guide(model, MEMBERS), *task.batch(), MixtureELBO(), task.optimizer)


def ours_compiled(task: Task, prior: str) -> Step:
    model = Rank1(task.net(), pb.likelihoods.Categorical(), NUM_DATA, prior=PRIORS[prior])
    return compiled_pyro_step(model, Rank1Guide(model, MEMBERS), *task.batch(), task.optimizer)


def by_hand(task: Task, layer: type[HandRank1]) -> Step:
    net = swapped(task.net(), dict.fromkeys((nn.Linear, nn.Conv2d), partial(layer, rows=True)))
    layers = [m for m in net.modules() if isinstance(m, layer)]

    def kl() -> Tensor:
        weights = torch.stack([p.square().sum() for m in layers for p in m.layer.parameters() if p.dim() > 1]).sum() / 2
        return torch.stack([m.kl for m in layers]).sum() + weights

    return step_of(task, net, kl, MEMBERS)


def batch_ensemble(task: Task) -> Step:
    from torch_uncertainty.layers import BatchConv2d, BatchLinear

    layers = {
        nn.Linear: lambda one: BatchLinear.from_linear(one, MEMBERS),
        nn.Conv2d: lambda one: BatchConv2d.from_conv2d(one, MEMBERS),
    }
    return step_of(task, swapped(task.net(), layers), partial(torch.zeros, ()), MEMBERS)


def rows_of_a_member(task: Task) -> tuple[Tensor, Tensor]:
    x, y = task.batch()
    return x[::MEMBERS], y[::MEMBERS]


def ways(task: Task, compiles: bool = False) -> dict[str, Build]:
    """A plain step sees all rows of the task, each member its share of them.

    :param compiles: whether ours is measured with ``compile=True`` too.
    """
    found: dict[str, Build] = {PLAIN: partial(plain, task)}
    task = replace(task, batch=partial(rows_of_a_member, task))
    found |= {f"{OURS}, {prior}": partial(ours, task, prior) for prior in PRIORS}
    if compiles:
        found |= {f"{OURS}, {prior}, {COMPILED}": partial(ours_compiled, task, prior) for prior in PRIORS}
    found |= {f"by hand, {p}": partial(by_hand, task, h) for p, h in zip(PRIORS, (HandCauchy, HandRank1), strict=True)}
    return found | {"BatchEnsemble (torch-uncertainty), no prior": partial(batch_ensemble, task)}
