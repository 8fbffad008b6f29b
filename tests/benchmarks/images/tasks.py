"""The data sets, and what is trained on each: a network, and for how long."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_bnn.inference.training.precision import Half
from tests.benchmarks import datasets, sparse_images

Settings = Mapping[str, Any]
ONE = "one network"
BLOCKS = 3


def grid(**values: tuple[Any, ...]) -> tuple[Settings, ...]:
    """All combinations."""
    found: list[Settings] = [{}]
    for name, several in values.items():
        found = [{**settings, name: value} for settings in found for value in several]
    return tuple(found)


class Task(NamedTuple):
    """What is trained on a data set.

    :param title: of the network and the data.
    :param network: from a seed and a dropout rate, 0 for none.
    :param epochs: of each training, at most.
    :param load: the images, the training images of mean 0 and deviation 1.
    :param other: the data set whose test images are out of distribution, beside notMNIST.
    :param precision: ``"bf16"`` trains networks in 16 bits (``fit(precision=)``), which two cores have time for.
    :param grids: the settings to choose among, for methods that have fewer than elsewhere: where a fit takes an hour,
        those alone that held-out images of Fashion-MNIST chose.
    :param settings_of: another data set, whose choices are taken over.
    """

    title: str
    network: Callable[[int, float], nn.Module]
    epochs: int
    load: Callable[[], datasets.Images]
    other: str
    precision: Half | None = None
    grids: Mapping[str, tuple[Settings, ...]] = {}
    settings_of: str | None = None


def lenet5(seed: int, dropout: float = 0.0) -> nn.Module:
    """LeNet-5 with a ReLU after each convolution too, where the Caffe variant has none.

    :param dropout: before each linear layer.
    """
    net = sparse_images.build("lenet5", seed)
    assert isinstance(net.layers, nn.Sequential)
    for i, layer in reversed(list(enumerate(net.layers))):
        if isinstance(layer, nn.Conv2d):
            net.layers.insert(i + 1, nn.ReLU())
        if isinstance(layer, nn.Linear) and dropout:
            net.layers.insert(i, nn.Dropout(dropout))
    return net


class Block(nn.Module):
    """``x -> relu(norm2(conv2(relu(norm1(conv1(x))))) + shortcut(x))``, with dropout before the second convolution."""

    def __init__(self, inside: int, outside: int, dropout: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, outside // inside, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(outside // 8, outside)
        self.drop = nn.Dropout(dropout) if dropout else nn.Identity()
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(outside // 8, outside)
        same = inside == outside
        self.shortcut = nn.Identity() if same else nn.Conv2d(inside, outside, 1, outside // inside, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(F.relu(self.norm1(self.conv1(x))))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def resnet20(seed: int, dropout: float = 0.0) -> nn.Module:
    """ResNet-20 for CIFAR (He et al. 2015, arXiv 1512.03385, section 4.2) with groups of eight channels for its norms.

    :param dropout: between the two convolutions of each block.
    """
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.GroupNorm(2, 16), nn.ReLU()]
    inside = 16
    for outside in (16, 32, 64):
        layers += [Block(inside if i == 0 else outside, outside, dropout) for i in range(BLOCKS)]
        inside = outside
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net


def cifar10() -> datasets.Images:
    found = datasets.cifar10()
    std, mean = torch.std_mean(found.x_train)
    return found._replace(x_train=(found.x_train - mean) / std, x_test=(found.x_test - mean) / std)


TASKS = {
    "mnist": Task("LeNet-5 on MNIST", lenet5, 10, lambda: datasets.images("mnist"), "fashion", settings_of="fashion"),
    "fashion": Task("LeNet-5 on Fashion-MNIST", lenet5, 10, lambda: datasets.images("fashion"), "mnist"),
    "cifar10": Task(
        "ResNet-20 on CIFAR-10",
        resnet20,
        5,
        cifar10,
        "fashion",
        "bf16",
        {
            ONE: grid(scale=(0.1, 0.3), epochs=(5,)),
            "BatchEnsemble": grid(spread=(0.0,), scale=(0.3,)),
            "rank-1, Normal": grid(scale=(0.3,), noise=(1e-3,), spread=(0.0,)),
            "rank-1, Cauchy": grid(scale=(0.3,), noise=(1e-3,), spread=(0.5,)),
            "MC dropout": grid(p=(0.1, 0.2), scale=(0.3,)),
        },
    ),
}
