"""Cost of one training step, as a ratio to the plain network's: ``python -m tests.benchmarks.training_step``.

ResNet-18 with the 32 x 32 stem. Rank-1: 16 images x 4 members against the plain network on 64 images, and against the
same rank-1 network written by hand without Pyro. Dense mean field: 64 images, also against Pyro's AutoNormal; on a
small network against a step written by hand.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import pyro
import torch
import torch.nn.functional as F
from pyro.infer import TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.func import functional_call

import pyro_bnn as pb
from pyro_bnn.inference import MixtureELBO, Objective
from pyro_bnn.models import Dense, MeanFieldGuide, Rank1, Rank1Guide
from pyro_bnn.models.architectures import resnet18
from pyro_bnn.priors import Normal
from tests.benchmarks.measure import interleaved, peak_memory, report

Step = Callable[[], Any]
Optimizers = Callable[[Any], torch.optim.Optimizer]
NUM_DATA = 50_000
MEMBERS = 4
#: calls after which a compiled function is compared with its model once in 100 calls, and no longer at 2, 4, 8, ...
COMPARED = 128


def images(n: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(n, 3, 32, 32), torch.randint(10, (n,))


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in parameters if p.requires_grad and p.numel()], 1e-3, momentum=0.9, nesterov=True)


def stepper(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> Step:
    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()

    return step


def plain() -> Step:
    x, y = images(64)
    net = resnet18(10)
    return stepper(sgd(net.parameters()), lambda: F.cross_entropy(net(x), y))


def pyro_step(model: Any, guide: Any, x: Tensor, y: Tensor, elbo: Any, optimizer_of: Optimizers = sgd) -> Step:
    with pyro.get_param_store().scope():
        guide(x, y)  # an AutoGuide gets its parameters on the first call
    optimizer = optimizer_of([*model.parameters(), *guide.parameters()])

    def loss() -> Tensor:
        with pyro.validation_enabled(False), pyro.get_param_store().scope():
            return elbo.differentiable_loss(model, guide, x, y) / NUM_DATA

    return stepper(optimizer, loss)


def compiled_pyro_step(model: Any, guide: Any, x: Tensor, y: Tensor, optimizer_of: Optimizers = sgd) -> Step:
    """A step of ``fit(..., compile=True)`` between two comparisons with the model, each of which costs some steps."""
    from pyro_bnn.inference.training.compiled import CompiledStep  # which an older checkout does not have

    objective = Objective(model, guide).train()
    objective(x, y)  # validates
    optimizer = optimizer_of(objective.parameters())

    def differentiate(x: Tensor, y: Tensor) -> Tensor:
        loss = objective.loss(x, y)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    compiled = CompiledStep(differentiate, objective.trained(), [model, guide], verifies_epochs=False)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        if compiled(x, y) is None:
            raise RuntimeError("the step was not compiled")
        optimizer.step()

    for _ in range(COMPARED):
        step()
    return step


def rank1(draws: str) -> Step:
    x, y = images(64 // MEMBERS)
    model = Rank1(resnet18(10), pb.likelihoods.Categorical(), NUM_DATA, prior=Normal(1.0, 0.1), weight_prior=None)
    guide = Rank1Guide(model, MEMBERS, draws=draws)  # type: ignore[arg-type]
    return pyro_step(model, guide, x, y, MixtureELBO())


def rank1_row() -> Step:
    return rank1("row")


def rank1_member() -> Step:
    return rank1("member")


class HandRank1(nn.Module):
    """The same network without Pyro or modes: convolutions and the classifier swapped for modules with factors."""

    def __init__(self, layer: nn.Module, rows: int) -> None:
        super().__init__()
        self.layer, self.rows = layer, rows
        weight = layer.weight
        assert isinstance(weight, Tensor)
        for name, size in (("r", weight.shape[0]), ("s", weight.shape[1])):
            self.register_parameter(f"{name}_loc", nn.Parameter(1 + 0.5 * torch.randn(MEMBERS, 1, size)))
            self.register_parameter(f"{name}_rho", nn.Parameter(torch.full((MEMBERS, 1, size), -3.4)))
        self.kl = torch.zeros(())

    def factor(self, name: str, batch: int) -> Tensor:
        loc, scale = getattr(self, f"{name}_loc"), F.softplus(getattr(self, f"{name}_rho"))
        noise = torch.randn(MEMBERS, batch if self.rows else 1, loc.shape[-1])
        draws = loc + scale * noise
        self.kl = self.kl + self.divergence(loc, scale, draws) / MEMBERS
        return draws.expand(MEMBERS, batch, -1).reshape(MEMBERS * batch, -1)

    def divergence(self, loc: Tensor, scale: Tensor, draws: Tensor) -> Tensor:
        """The KL divergence to N(1, 0.1^2), summed over members and elements."""
        return ((scale**2 + (loc - 1) ** 2) / 0.02 - 0.5 - (scale / 0.1).log()).sum()

    def forward(self, x: Tensor) -> Tensor:
        self.kl = torch.zeros(())
        ones = (1,) * (x.dim() - 2)
        batch = x.shape[0] // MEMBERS
        r, s = self.factor("r", batch), self.factor("s", batch)
        bias, self.layer.bias = self.layer.bias, None  # type: ignore[assignment]
        y = self.layer(x * s.view(*s.shape, *ones)) * r.view(*r.shape, *ones)
        self.layer.bias = bias
        return y + bias.view(-1, *ones) if isinstance(bias, Tensor) else y


def hand_rank1(rows: bool) -> Step:
    x, y = images(64 // MEMBERS)
    net = resnet18(10)
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, (nn.Conv2d, nn.Linear)):
                setattr(module, name, HandRank1(child, rows))
    layers = [m for m in net.modules() if isinstance(m, HandRank1)]

    def loss() -> Tensor:
        nll = F.cross_entropy(net(x.repeat(MEMBERS, 1, 1, 1)), y.repeat(MEMBERS))
        return nll + torch.stack([layer.kl for layer in layers]).sum() / NUM_DATA

    return stepper(sgd(net.parameters()), loss)


def hand_rank1_row() -> Step:
    return hand_rank1(True)


def hand_rank1_member() -> Step:
    return hand_rank1(False)


def dense() -> Step:
    x, y = images(64)
    model = Dense(resnet18(10), pb.likelihoods.Categorical(), NUM_DATA)
    return pyro_step(model, MeanFieldGuide(model), x, y, MixtureELBO())


def dense_autonormal() -> Step:
    x, y = images(64)
    model = Dense(resnet18(10), pb.likelihoods.Categorical(), NUM_DATA)
    return pyro_step(model, AutoNormal(model), x, y, TraceMeanField_ELBO())


def small_data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(128, 64), torch.randint(10, (128,))


def small_net() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))


def small_hand() -> Step:
    """Mean field on the small network, by hand: one draw, closed-form KL to N(0, 1)."""
    x, y = small_data()
    net = small_net()
    loc = {n: nn.Parameter(p.detach().clone()) for n, p in net.named_parameters()}
    rho = {n: nn.Parameter(torch.full_like(p, -4.6)) for n, p in loc.items()}

    def loss() -> Tensor:
        weights, kl = {}, torch.zeros(())
        for n in loc:
            scale = F.softplus(rho[n])
            weights[n] = loc[n] + scale * torch.randn_like(scale)
            kl = kl + (0.5 * (scale**2 + loc[n] ** 2 - 1) - scale.log()).sum()
        return F.cross_entropy(functional_call(net, weights, (x,)), y) + kl / NUM_DATA

    return stepper(sgd([*loc.values(), *rho.values()]), loss)


def small_dense() -> Step:
    x, y = small_data()
    model = Dense(small_net(), pb.likelihoods.Categorical(), NUM_DATA)
    return pyro_step(model, MeanFieldGuide(model), x, y, MixtureELBO())


def small_autonormal() -> Step:
    x, y = small_data()
    model = Dense(small_net(), pb.likelihoods.Categorical(), NUM_DATA)
    return pyro_step(model, AutoNormal(model), x, y, TraceMeanField_ELBO())


def deep_net() -> nn.Module:
    """ResNet-50's depth (54 products) with so little arithmetic that what is left is Python."""
    layers: list[nn.Module] = []
    for _ in range(53):
        layers += [nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))


def deep_data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(4, 4, 2, 2), torch.randint(10, (4,))


def deep(rank_one: bool) -> Step:
    x, y = deep_data()
    net = deep_net()
    if not rank_one:
        return stepper(sgd(net.parameters()), lambda: F.cross_entropy(net(x), y))
    model = Rank1(net, pb.likelihoods.Categorical(), NUM_DATA)
    return pyro_step(model, Rank1Guide(model, MEMBERS), x, y, MixtureELBO())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=12)
    rounds = parser.parse_args().rounds
    rows: list[dict[str, Any]] = []

    big = [plain, rank1_row, rank1_member, hand_rank1_row, hand_rank1_member, dense, dense_autonormal]
    seconds = interleaved({f.__name__: f() for f in big}, rounds)
    memory = {f.__name__: peak_memory(f) for f in big}
    comparisons = [
        ("rank1_row", "plain", 1.25),
        ("rank1_member", "plain", 1.10),
        ("rank1_row", "hand_rank1_row", 1.05),
        ("rank1_member", "hand_rank1_member", 1.05),
        ("dense", "plain", 1.10),
        ("dense_autonormal", "plain", None),
    ]
    for name, reference, target in comparisons:
        row = {"step": name, "reference": reference, "ratio": seconds[name] / seconds[reference], "target": target}
        row |= {"seconds": seconds[name]}
        row |= {"memory_ratio": memory[name] / memory[reference], "peak_mb": memory[name]}
        rows.append(row | ({"memory_target": 1.6} if reference == "plain" else {}))

    small = interleaved({f.__name__: f() for f in (small_hand, small_dense, small_autonormal)}, 20 * rounds, 20)
    for name, target in (("small_dense", 1.5), ("small_autonormal", None)):
        ratio = small[name] / small["small_hand"]
        rows.append({"step": name, "reference": "small_hand", "ratio": ratio, "target": target, "seconds": small[name]})

    python = interleaved({"deep_plain": deep(False), "deep_rank1": deep(True)}, 3 * rounds, 5)
    overhead = python["deep_rank1"] - python["deep_plain"]
    rows.append(
        {
            "step": "python overhead at ResNet-50 depth",
            "reference": "rank1_row",
            "ratio": overhead / seconds["rank1_row"],
            "target": 0.10,
            "seconds": overhead,
        }
    )
    report("training_step", rows)


if __name__ == "__main__":
    main()
