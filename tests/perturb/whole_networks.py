"""Whole networks, of torchvision and by hand, with noise taken out and statistics that matter."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from explicit import (
    owner_of,
    row_weights,
)
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.resnet import Bottleneck

from pyro_bnn.perturb import Perturbation

MEMBERS, ROWS = 2, 2


DIFFERENT = 1e-3  # relative distance of rows that differ in their weights alone


SENSITIVE = 1e-7  # relative first-order effect of the factors of every weight on every row


_vision = torchvision.models


ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (lambda: _vision.resnet18(num_classes=10), 64),
    "resnet_of_bottlenecks": (lambda: _vision.ResNet(Bottleneck, [1, 1, 1, 1], num_classes=10), 48),
    "densenet": (lambda: _vision.DenseNet(8, (2, 2), 16, num_classes=10), 48),
    "mobilenet_v3_small": (lambda: _vision.mobilenet_v3_small(num_classes=10), 64),
    "efficientnet_b0": (lambda: _vision.efficientnet_b0(num_classes=10), 64),
    "convnext": (lambda: ConvNeXt([CNBlockConfig(24, 48, 1), CNBlockConfig(48, None, 1)], num_classes=10), 32),
    "regnet_y_400mf": (lambda: _vision.regnet_y_400mf(num_classes=10), 64),
    "vit": (lambda: _vision.VisionTransformer(32, 16, 2, 4, 32, 64, num_classes=10), 32),
    "swin": (lambda: _vision.SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=10), 64),
    "resnet50": (lambda: _vision.resnet50(num_classes=10), 48),
    "densenet121": (lambda: _vision.densenet121(num_classes=10), 48),
    "convnext_tiny": (lambda: _vision.convnext_tiny(num_classes=10), 32),
    "vit_b_16": (lambda: _vision.vit_b_16(image_size=32, num_classes=10), 32),
    "swin_t": (lambda: _vision.swin_t(num_classes=10), 64),
}


#: their names as parameters of a test: those of full size are slow, and have small relatives of the same blocks
NAMES = [
    pytest.param(
        name,
        marks=[pytest.mark.slow] if name in ("resnet50", "densenet121", "convnext_tiny", "vit_b_16", "swin_t") else [],
    )
    for name in ARCHITECTURES
]


def without_noise(net: nn.Module) -> nn.Module:
    """Switches dropout and stochastic depth off, in modules of every kind."""
    for module in net.modules():
        for name in ("p", "dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return net


def randomise(net: nn.Module) -> nn.Module:
    """Gives every parameter a value that matters: no layer starts at zero, no gain at one or a millionth."""
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() > 1 and p.shape[0] > 1 and p[0].numel() > 1:
                p.normal_(std=(2 / p[0].numel()) ** 0.5)
            elif p.dim() > 1:  # positions, class tokens, layer scales
                p.uniform_(0.5, 1.5)
            elif not p.any():
                p.normal_(std=0.3)
            elif bool((p == 1).all()):
                p.uniform_(0.5, 1.5)
        for module in net.modules():
            if isinstance(module, torchvision.ops.SqueezeExcitation):
                module.fc2.weight.mul_(0.1)  # keeps the gates out of saturation
    return net


def calibrate(net: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """Gives batch normalisation the statistics of random data, so that activations neither vanish nor explode."""
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [m.momentum for m in norms]
    if not norms:
        return net
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average over passes
    net.train()
    with torch.no_grad():
        for _ in range(2):
            net(torch.randn(4, *shape, dtype=torch.float64))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return net


@dataclasses.dataclass
class Subject:
    """A network in double precision, two images, and factors and biases for each of two members and two rows."""

    net: nn.Module
    x: Tensor
    perturbations: dict[str, Perturbation]

    @property
    def coupled(self) -> bool:
        """Whether rows see each other in train mode."""
        return any(isinstance(m, nn.BatchNorm2d) for m in self.net.modules())


def looped(subject: Subject) -> nn.Module:
    """A copy for the folded batch in which every perturbed layer loops over rows with explicit weights."""
    net = copy.deepcopy(subject.net)
    for name in subject.perturbations:
        layer = owner_of(net, name)
        assert isinstance(layer, (nn.Conv2d, nn.Linear))
        layer.forward = _loop(layer, name.rpartition(".")[0], subject)
    return net


def _loop(layer: nn.Conv2d | nn.Linear, prefix: str, subject: Subject) -> Callable[[Tensor], Tensor]:
    own = {n: p for n, p in subject.perturbations.items() if n.rpartition(".")[0] == prefix}

    def forward(x: Tensor) -> Tensor:
        assert x.shape[0] == MEMBERS * ROWS
        results = []
        for i, row in enumerate(x.split(1)):
            of_row = row_weights(subject.net, own, i // ROWS, i % ROWS)
            weight, bias = of_row[f"{prefix}.weight"], of_row.get(f"{prefix}.bias", layer.bias)
            results.append(
                F.linear(row, weight, bias) if isinstance(layer, nn.Linear) else layer._conv_forward(row, weight, bias)
            )
        return torch.cat(results)

    return forward


class Tagger(nn.Module):
    """Embedding, recurrent layer, linear layer."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layer = getattr(nn, kind)(6, 5, dropout=0.5, num_layers=2, **options)
        self.head = nn.Linear(10 if options.get("bidirectional") else 5, 3)
        self.first = options.get("batch_first", False)

    def forward(self, tokens: Tensor) -> Tensor:
        y, _ = self.layer(self.embed(tokens if self.first else tokens.t()))
        return self.head(y if self.first else y.transpose(0, 1))


class Translator(nn.Module):
    """``nn.Transformer`` with a causal and a padding mask."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(11, 8), nn.Embedding(7, 8)
        self.body = nn.Transformer(8, 2, 2, 2, 16, dropout=0.1, **options)
        self.head = nn.Linear(8, 11)
        self.first = options.get("batch_first", False)

    def forward(self, source: Tensor, target: Tensor, padding: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1], dtype=torch.float64)
        source, target = (self.embed(t) + self.positions(torch.arange(t.shape[1])) for t in (source, target))
        if not self.first:
            source, target = source.transpose(0, 1), target.transpose(0, 1)
        y = self.body(
            source,
            target,
            tgt_mask=causal,
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
            tgt_is_causal=True,
        )
        return self.head(y if self.first else y.transpose(0, 1))


class Encoder(nn.Module):
    """``nn.TransformerEncoder`` with a padding mask, for which torch has a fused path in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.body(x, src_key_padding_mask=padding).masked_fill(padding[..., None], 0.0).sum(1)


class Tied(nn.Module):
    """A language model whose output weights are those of its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden = nn.Embedding(11, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 11)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.embed(tokens))))


class OwnParameters(nn.Module):
    """A perceptron that calls ``F.linear`` on parameters of its own, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(5, 5))
        self.bias = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(F.linear(x, self.first, self.bias))
        return F.linear(torch.tanh(F.linear(h, self.second)), self.second, self.bias)


class TimeMajor(nn.Module):
    """Flattens time and batch with time in front, then with the batch in front."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        h = self.a(x.transpose(0, 1).reshape(time * batch, -1)).tanh()
        return self.b(h.view(time, batch, 5).transpose(0, 1).reshape(batch * time, 5)).view(batch, time, 3)


class Windows(nn.Module):
    """Cuts images of 4 x 4 pixels into four windows: linear and attention layers in them, batch in front or behind."""

    def __init__(self, batch_in_front: bool) -> None:
        super().__init__()
        self.mix, self.attention = nn.Linear(6, 6), nn.MultiheadAttention(6, 2, batch_first=True)
        self.convolve = nn.Conv1d(6, 3, 2)
        self.batch_in_front = batch_in_front

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        windows = x.view(batch, 2, 2, 2, 2, 6).permute(0, 1, 3, 2, 4, 5).reshape(batch, 4, 4, 6)
        if not self.batch_in_front:
            windows = windows.transpose(0, 1)
        h = self.mix(windows.reshape(batch * 4, 4, 6))
        h = h + self.attention(h, h, h, need_weights=False)[0]
        h = self.convolve(h.transpose(1, 2))
        return h.view(batch, 4, -1) if self.batch_in_front else h.view(4, batch, -1).transpose(0, 1)


def tokens(*shape: int) -> Tensor:
    return torch.randint(11, shape, generator=torch.Generator().manual_seed(1))


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


_PADDING = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 0, 0], [0, 0, 1, 1, 1]], dtype=torch.bool)


SEQUENCES: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "lstm": (lambda: Tagger("LSTM"), tokens(3, 7)),
    "lstm, batch first": (lambda: Tagger("LSTM", batch_first=True), tokens(3, 7)),
    "bidirectional gru": (lambda: Tagger("GRU", bidirectional=True), tokens(3, 7)),
    "transformer": (Translator, (tokens(3, 5), tokens(3, 4), _PADDING)),
    "transformer, batch first": (
        lambda: Translator(batch_first=True, norm_first=True),
        (tokens(3, 5), tokens(3, 4), _PADDING),
    ),
    "encoder": (Encoder, (randn(3, 5, 8), _PADDING)),
    "tied": (Tied, tokens(3, 7)),
    "own parameters": (OwnParameters, randn(3, 4)),
    "time major": (TimeMajor, randn(3, 3, 4)),
    "windows, batch in front": (lambda: Windows(True), randn(3, 4, 4, 6)),
    "windows, batch behind": (lambda: Windows(False), randn(3, 4, 4, 6)),
}


def norm_parameters(net: nn.Module) -> list[str]:
    return [f"{n}.{p}" for n, m in net.named_modules() if isinstance(m, nn.LayerNorm) for p in ("weight", "bias")]
