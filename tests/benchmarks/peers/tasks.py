"""Networks, data and optimisers that rows share, and how a library's layers get into a network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_bnn.models.architectures import LeNet5, resnet18
from tests.benchmarks.training_step import NUM_DATA, Optimizers, Step, images, sgd, stepper


@dataclass(frozen=True)
class Task:
    """A classification: a network, one batch, and the optimiser that every alternative has."""

    net: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    optimizer: Optimizers


def adamw(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """What ``fit`` has by default."""
    return torch.optim.AdamW([p for p in parameters if p.requires_grad and p.numel()], 1e-3, weight_decay=0.0)


def resnet() -> nn.Module:
    return resnet18(10)


def resnet_batch() -> tuple[Tensor, Tensor]:
    return images(64)


def wide() -> nn.Module:
    """784-400-400-10."""
    return nn.Sequential(nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 10))


def wide_batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(128, 784), torch.randint(10, (128,))


def small_images() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(128, 1, 28, 28), torch.randint(10, (128,))


def chain(layers: int) -> nn.Module:
    """Layers of 16 units with ReLU between them."""
    net: list[nn.Module] = []
    for _ in range(layers):
        net += [nn.Linear(16, 16), nn.ReLU()]
    return nn.Sequential(*net[:-1])


def chain_batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(64, 16), torch.randint(10, (64,))


RESNET = Task(resnet, resnet_batch, sgd)
WIDE = Task(wide, wide_batch, adamw)
LENET = Task(LeNet5, small_images, adamw)


def plain(task: Task) -> Step:
    """The step that all others are compared with."""
    net, (x, y) = task.net(), task.batch()
    return stepper(task.optimizer(net.parameters()), lambda: F.cross_entropy(net(x), y))


def step_of(task: Task, net: nn.Module, kl: Callable[[], Tensor], members: int = 1) -> Step:
    """The step of a converted network with its KL divergence; every member sees the batch."""
    x, y = task.batch()
    x, y = x.repeat(members, *(1 for _ in x.shape[1:])), y.repeat(members)
    return stepper(task.optimizer(net.parameters()), lambda: F.cross_entropy(net(x), y) + kl().sum() / NUM_DATA)


def swapped(net: nn.Module, layers: Mapping[type[nn.Module], Callable[[Any], nn.Module]]) -> nn.Module:
    """The network with each layer of these types replaced by what its function makes of it."""
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if type(child) in layers:
                setattr(module, name, layers[type(child)](child))
    return net
