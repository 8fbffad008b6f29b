"""BatchEnsemble (Wen, Tran and Ba 2020, arXiv 2002.06715), written out: points ``W_k = W o (r_k s_k^T)``."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Layer(nn.Module):
    """A linear or convolutional layer of K members, whose rows lie one member after the other: ``[K N, ...]``.

    :param spread: deviation of the starting values of r and s around 1; 0 draws signs, +1 or -1 with equal odds.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, members: int, spread: float) -> None:
        super().__init__()
        self.layer = copy.deepcopy(layer)
        self.layer.bias = None
        out, inside = layer.weight.shape[:2]
        self.r, self.s = (nn.Parameter(_start(members, size, spread)) for size in (out, inside))
        self.bias = nn.Parameter(torch.zeros(members, out))

    def forward(self, x: Tensor) -> Tensor:
        space = (1,) * (x.dim() - 2)
        members = len(self.r)
        by_member = [value.reshape(members, 1, -1, *space) for value in (self.s, self.r, self.bias)]
        s, r, bias = by_member
        if s.numel() == members:  # of one input: passes through the layer, and the images need no gradient
            r = r * s
        else:
            x = (x.unflatten(0, (members, -1)) * s).flatten(0, 1)
        y = self.layer(x)
        result: Tensor = (y.unflatten(0, (members, -1)) * r + bias).flatten(0, 1)
        return result

    def explicit(self) -> tuple[Tensor, Tensor]:
        """The weights ``[K, ...]`` and biases ``[K, out]`` of the members."""
        w = self.layer.weight.detach()
        outer = (self.r[:, :, None] * self.s[:, None]).detach()
        return w * outer.reshape(outer.shape + (1,) * (w.dim() - 2)), self.bias.detach().clone()


def _start(members: int, size: int, spread: float) -> Tensor:
    if spread:
        return 1 + spread * torch.randn(members, size)
    return torch.randint(2, (members, size)) * 2.0 - 1


class BatchEnsemble(nn.Module):
    """``[N, ...] -> [K, N, classes]``: a network whose linear and convolutional layers have factors for each member."""

    def __init__(self, net: nn.Module, members: int, spread: float) -> None:
        super().__init__()
        self.net, self.members = copy.deepcopy(net), members
        self.names = [name for name, module in net.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
        for name in self.names:
            parent, _, own = name.rpartition(".")
            module = self.net.get_submodule(parent)
            setattr(module, own, Layer(getattr(module, own), members, spread))

    def forward(self, x: Tensor) -> Tensor:
        repeated = x.expand(self.members, *x.shape).flatten(0, 1)
        logits: Tensor = self.net(repeated).unflatten(0, (self.members, -1))
        return logits

    def explicit(self) -> dict[str, Tensor]:
        """``{parameter of the given network: [K, ...]}``."""
        found = {}
        for name in self.names:
            layer = self.net.get_submodule(name)
            assert isinstance(layer, Layer)
            found[f"{name}.weight"], found[f"{name}.bias"] = layer.explicit()
        return found

    def numbers(self) -> int:
        return sum(p.numel() for p in self.parameters())


def train(net: BatchEnsemble, x: Tensor, y: Tensor, epochs: int, batch_size: int, lr: float, decay: float) -> None:
    """AdamW along half a cosine, on the mean loss of the members, which all see the same rows.

    :param decay: the weight decay of shared weights, as a penalty of the loss.
    """
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    steps = epochs * -(-len(y) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    shared = [layer.layer.weight for layer in net.modules() if isinstance(layer, Layer)]
    for _ in range(epochs):
        for rows in torch.randperm(len(y)).split(batch_size):
            logits = net(x[rows])
            loss = F.cross_entropy(logits.flatten(0, 1), y[rows].repeat(net.members))
            loss = loss + decay / 2 * torch.stack([w.square().sum() for w in shared]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
