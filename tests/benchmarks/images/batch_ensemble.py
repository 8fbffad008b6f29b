"""BatchEnsemble (Wen, Tran and Ba 2020, arXiv 2002.06715), written out: points ``W_k = W o (r_k s_k^T)``."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Start = Callable[[torch.Size], Tensor]


class Layer(nn.Module):
    """A linear or convolutional layer of K members, whose rows lie one member after the other: ``[K N, ...]``.

    :param start: the starting values of r and s, of a shape ``[K, size]``.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, members: int, start: Start) -> None:
        super().__init__()
        self.layer = copy.deepcopy(layer)
        self.layer.bias = None
        out, inside = layer.weight.shape[:2]
        self.r, self.s = (nn.Parameter(start(torch.Size((members, size)))) for size in (out, inside))
        self.bias = None if layer.bias is None else nn.Parameter(torch.zeros(members, out))

    def forward(self, x: Tensor) -> Tensor:
        space = (1,) * (x.dim() - 2)
        members = len(self.r)
        s, r = (value.reshape(members, 1, -1, *space) for value in (self.s, self.r))
        if s.numel() == members:  # of one input: passes through the layer, and the images need no gradient
            r = r * s
        else:
            x = (x.unflatten(0, (members, -1)) * s).flatten(0, 1)
        y = self.layer(x)
        y = y.unflatten(0, (members, -1)) * r
        if self.bias is not None:
            y = y + self.bias.reshape(members, 1, -1, *space)
        return y.flatten(0, 1)

    def explicit(self) -> dict[str, Tensor]:
        """The weights ``[K, ...]`` and biases ``[K, out]`` of the members."""
        w = self.layer.weight.detach()
        outer = (self.r[:, :, None] * self.s[:, None]).detach()
        weights = {"weight": w * outer.reshape(outer.shape + (1,) * (w.dim() - 2))}
        return weights if self.bias is None else weights | {"bias": self.bias.detach().clone()}


def signs(shape: torch.Size) -> Tensor:
    """+1 or -1 with equal odds."""
    return torch.randint(2, shape) * 2.0 - 1


class BatchEnsemble(nn.Module):
    """``[N, ...] -> [K, N, classes]``: a network whose linear and convolutional layers have factors for each member.

    All members share the other parameters, those of norms, whose statistics are to be of one row at a time.
    """

    def __init__(self, net: nn.Module, members: int, start: Start) -> None:
        super().__init__()
        self.net, self.members = copy.deepcopy(net), members
        self.names = [name for name, module in net.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
        for name in self.names:
            parent, _, own = name.rpartition(".")
            module = self.net.get_submodule(parent)
            setattr(module, own, Layer(getattr(module, own), members, start))

    def forward(self, x: Tensor) -> Tensor:
        repeated = x.expand(self.members, *x.shape).flatten(0, 1)
        logits: Tensor = self.net(repeated).unflatten(0, (self.members, -1))
        return logits

    def explicit(self) -> dict[str, Tensor]:
        """``{parameter of the given network: [K, ...]}``."""
        layers = [(f"{name}.", self.net.get_submodule(name)) for name in self.names]
        found = {before + own: value for before, layer in layers for own, value in layer.explicit().items()}
        for name, value in self.net.named_parameters():
            if not name.startswith(tuple(before for before, _ in layers)):
                found[name] = value.detach().repeat(self.members, *(1,) * value.dim())
        return found

    def numbers(self) -> int:
        return sum(p.numel() for p in self.parameters())


def train(
    net: BatchEnsemble, pair: tuple[Tensor, Tensor], epochs: int, batch_size: int, lr: float, decay: float, half: bool
) -> None:
    """AdamW along half a cosine, on the mean loss of the members, which all see the same rows.

    :param decay: the weight decay of shared weights, as a penalty of the loss.
    :param half: whether the network runs in bfloat16, under ``torch.autocast``.
    """
    x, y = pair
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    steps = epochs * -(-len(y) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    shared = [layer.layer.weight for layer in net.modules() if isinstance(layer, Layer)]
    for _ in range(epochs):
        for rows in torch.randperm(len(y)).split(batch_size):
            with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
                logits = net(x[rows])
            loss = F.cross_entropy(logits.float().flatten(0, 1), y[rows].repeat(net.members))
            loss = loss + decay / 2 * torch.stack([w.square().sum() for w in shared]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
