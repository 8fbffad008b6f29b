"""Two Bayesian networks, group effects and plates of one's own in a single Pyro model.

Simulated: 8 groups with offsets of their own, a curve that all share, and a slope that depends on a second covariate::

    y_i ~ N( a[group_i] + f(x_i) + t_i * h(z_i), noise^2 ),   a_j ~ N(0, spread^2)

f and h are rank-1 networks (prefixes ``curve`` and ``slope``). Run: ``python examples/hierarchical.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import Tensor, nn

import pyro_bnn as pb

GROUPS = 8
NOISE = 0.3


class Data(NamedTuple):
    x: dict[str, Tensor]
    y: Tensor
    effects: Tensor


def simulate(n: int, seed: int = 0) -> Data:
    """Groups, covariates and a response with known group effects."""
    generator = torch.Generator().manual_seed(seed)
    effects = torch.randn(GROUPS, generator=generator)
    effects = effects - effects.mean()
    x, z, t = (torch.randn(n, 1, generator=generator) for _ in range(3))
    group = torch.randint(GROUPS, (n,), generator=generator)
    mean = effects[group] + torch.sin(2 * x[:, 0]) + t[:, 0] * torch.tanh(z[:, 0])
    y = mean + NOISE * torch.randn(n, generator=generator)
    return Data({"x": x, "z": z, "t": t[:, 0], "group": group}, y, effects)


def network(hidden: int = 16) -> nn.Module:
    return nn.Sequential(nn.Linear(1, hidden), nn.Tanh(), nn.Linear(hidden, 1))


class Hierarchical(PyroModule):
    """The model above. The members of the two networks lie on axes of their own, -2 and -3; groups and data use -1."""

    def __init__(self, n: int, hidden: int = 16) -> None:
        super().__init__()
        self.n = n
        self.curve = pb.models.Rank1(network(hidden), None, prefix="curve", members_dim=-2)
        self.slope = pb.models.Rank1(network(hidden), None, prefix="slope", members_dim=-3)

    def forward(self, x: dict[str, Tensor], y: Tensor | None = None) -> Tensor:
        spread = pyro.sample("spread", dist.HalfNormal(1.0))
        noise = pyro.sample("noise", dist.HalfNormal(1.0))
        with pyro.plate("groups", GROUPS):
            effect = pyro.sample("effect", dist.Normal(0.0, spread))
        f = self.curve(x["x"]).squeeze(-1)
        h = self.slope(x["z"]).squeeze(-1)
        # the mean effect and the curve's offset are not told apart by the data
        offset = effect - effect.mean(-1, keepdim=True)
        mean = offset[..., x["group"]] + f + x["t"] * h
        size = len(x["group"])
        with self.curve.members_plate(), self.slope.members_plate(), pyro.plate("data", self.n, subsample_size=size):
            return pyro.sample("obs", dist.Normal(mean, noise), obs=y)


class HierarchicalGuide(PyroModule):
    """The networks' own guides, called beside an AutoNormal for everything else."""

    def __init__(self, model: Hierarchical, components: int = 2) -> None:
        super().__init__()
        self.curve = pb.models.Rank1Guide(model.curve, components, init_means=pb.priors.Normal(1.0, 0.1))
        self.slope = pb.models.Rank1Guide(model.slope, components, init_means=pb.priors.Normal(1.0, 0.1))
        self.own = AutoNormal(poutine.block(model, expose=["spread", "noise", "effect"]), init_scale=0.05)

    def forward(self, x: dict[str, Tensor], y: Tensor | None = None) -> None:
        self.own(x, y)
        self.curve(x)
        self.slope(x)


def effects(posterior: pb.Posterior, draws: int = 200) -> tuple[Tensor, Tensor]:
    """Posterior mean and standard deviation of the group effects, centred as in the model."""
    effect = posterior.sample(draws, seed=0)["effect"].reshape(draws, GROUPS)
    effect = effect - effect.mean(-1, keepdim=True)
    return effect.mean(0), effect.std(0)


def fit(data: Data, epochs: int = 300) -> pb.Posterior:
    model = Hierarchical(len(data.y))
    with pyro.get_param_store().scope():
        guide = HierarchicalGuide(model)
    return pb.inference.fit(
        *(model, guide, (data.x, data.y)),
        epochs=epochs,
        batch_size=100,
        lr=2e-2,
        schedule=pb.inference.cosine(),
        kl_annealing=epochs / 3,
        seed=0,
    )


if __name__ == "__main__":
    data = simulate(400)
    mean, std = effects(fit(data))
    print("group  true   posterior")
    for j in range(GROUPS):
        print(f"{j:>5}  {data.effects[j]:+.2f}  {mean[j]:+.2f} +- {std[j]:.2f}")
