"""A small objective, its batches, and a loop by hand, for tests of frameworks that bring a loop of their own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_bnn as pb
from pyro_bnn.inference import Objective

ROWS, CLASSES, BATCH = 48, 3, 8
LR = 1e-2


def rows() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    y = torch.randint(CLASSES, (ROWS,), generator=generator)
    return torch.randn(ROWS, 4, generator=generator) + y[:, None], y


def loader() -> DataLoader[tuple[Tensor, ...]]:
    """Six batches, in order."""
    return DataLoader(TensorDataset(*rows()), batch_size=BATCH)


def objective(kl_annealing: float = 30.0) -> Objective:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, CLASSES))
    model = pb.models.Rank1(net, pb.likelihoods.Categorical(), ROWS, prior=pb.priors.Normal(1.0, 0.1))
    return Objective(model, pb.models.Rank1Guide(model, components=2), kl_annealing=kl_annealing)


def seeded_loss(objective: nn.Module, batch: list[Tensor], loss: int) -> Tensor:
    """The loss, whose draws depend only on its number: frameworks draw from torch's generator between losses."""
    torch.manual_seed(100 + loss)
    value: Tensor = objective(*batch)
    return value


def by_hand(
    objective: Objective, epochs: int, *, accumulate: int = 1, clip_norm: float | None = None, half: bool = False
) -> list[float]:
    """Trains by Adam, with an update after ``accumulate`` batches, and returns all losses."""
    optimizer = torch.optim.Adam(objective.parameters(), lr=LR)
    losses: list[float] = []
    for _ in range(epochs):
        for batch in loader():
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
                loss = seeded_loss(objective, batch, len(losses))
            losses.append(float(loss.detach()))
            (loss / accumulate).backward()
            if len(losses) % accumulate == 0:
                if clip_norm is not None:
                    nn.utils.clip_grad_norm_(objective.parameters(), clip_norm)
                optimizer.step()
                optimizer.zero_grad()
    return losses


def assert_same(one: nn.Module, other: nn.Module) -> None:
    expected = dict(other.named_parameters())
    for name, p in one.named_parameters():
        torch.testing.assert_close(p, expected[name], rtol=0, atol=1e-6)


class Types:
    """The types of what the layers of a network return in training: a first call also probes it, in eval mode."""

    def __init__(self, net: nn.Module) -> None:
        self.found: set[torch.dtype] = set()
        for module in net.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(self._note)

    def _note(self, module: nn.Module, args: object, result: Tensor) -> None:
        if module.training:
            self.found.add(result.dtype)
