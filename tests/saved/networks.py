"""Tiny networks and data for the saved files, the same to the last bit on every machine: no random number is drawn."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

ROWS = 12


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Numbers between -1 and 1 without order, by arithmetic that does not round."""
    i = torch.arange(math.prod(shape)) + 5003 * seed
    return (((31 * i * i + 7919 * i) % 1021 - 510).float() / 512).reshape(shape)


def filled(net: nn.Module, seed: int) -> nn.Module:
    """The same network with weights, gains and statistics of the given seed."""
    with torch.no_grad():
        for i, (name, value) in enumerate([*net.named_parameters(), *net.named_buffers()]):
            if value.is_floating_point():
                around_one = name.endswith(("norm.weight", "running_var"))
                value.copy_(around_one + numbers(*value.shape, seed=100 * seed + i) / 2)
    return net


def table(seed: int = 1, outputs: int = 2) -> nn.Module:
    """Fully connected, 3-4-2."""
    return filled(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)), seed)


def images(seed: int = 1) -> nn.Module:
    """A convolution with batch normalisation, for 1 x 4 x 4 pixels."""
    layers = {"conv": nn.Conv2d(1, 3, 3), "norm": nn.BatchNorm2d(3), "tanh": nn.Tanh(), "flat": nn.Flatten()}
    return filled(nn.Sequential(OrderedDict(layers | {"head": nn.Linear(12, 2)})), seed)


class Words(nn.Module):
    """An embedding, a recurrent layer and a linear one; the logits are one of two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.gru, self.head = nn.Embedding(6, 3), nn.GRU(3, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        states, _ = self.gru(self.embedding(x))
        return {"states": states, "logits": self.head(states[:, -1])}


class Dropping(nn.Module):
    """Fully connected, with one dropout module that is called twice and one that is called once."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, outputs)
        self.twice, self.once = nn.Dropout(0.25), nn.AlphaDropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(torch.tanh(self.first(x)))
        return self.last(self.once(self.twice(torch.tanh(self.second(x)))))


def sparse(seed: int = 1) -> nn.Module:
    """Fully connected, 3-16-16-2, with nearly all weights close to zero."""
    net = filled(nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2)), seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter[parameter.abs() < 0.45] /= 512
    return net


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "table": table,
    "table with one output": lambda seed: table(seed, 1),
    "table in double precision": lambda seed: table(seed, 1).double(),
    "images": images,
    "words": lambda seed: filled(Words(), seed),
    "dropping": lambda seed: filled(Dropping(2), seed),
    "dropping with one output": lambda seed: filled(Dropping(1), seed),
    "sparse": sparse,
}

TARGETS: dict[str, Tensor] = {
    "labels": torch.arange(ROWS) % 2,
    "numbers": numbers(ROWS, seed=7),
    "counts": torch.arange(ROWS).float() % 3,
    "zeros and ones": torch.arange(ROWS).float() % 2,
}


def inputs(network: str, rows: int = ROWS, seed: int = 0) -> Tensor:
    """Rows for a network of :data:`NETWORKS`."""
    if network == "words":
        return (torch.arange(rows * 4) * 5 + seed).reshape(rows, 4) % 7 % 6
    if network == "images":
        return numbers(rows, 1, 4, 4, seed=seed)
    x = numbers(rows, 3, seed=seed)
    return x.double() if network == "table in double precision" else x
