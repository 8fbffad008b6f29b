"""Wide residual networks for small images (Zagoruyko and Komodakis 2016, arXiv 1605.07146).

This is the variant that Dusenberry et al. 2020 (arXiv 2005.07186) use for rank-1 networks: pre-activation blocks
whose 1 x 1 projection acts on the raw block input, no dropout.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from pyro_bnn.entry import checks


def _conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)


class _Block(nn.Module):
    """``x -> conv2(relu(bn2(conv1(relu(bn1(x)))))) + shortcut(x)``."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = _conv(in_channels, out_channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = _conv(out_channels, out_channels, 3)
        same_shape = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if same_shape else _conv(in_channels, out_channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        return out + self.shortcut(x)


class WideResNet(nn.Module):
    """Wide residual network: ``[N, in_channels, H, W] -> [N, num_classes]`` logits.

    A 3 x 3 convolution to 16 channels, three groups of ``(depth - 4) / 6`` blocks with ``16, 32, 64`` times ``width``
    channels (the second and third start with stride 2), batch normalisation (eps 1e-5, momentum 0.1), ReLU, global
    average pooling (8 x 8 for 32 x 32 images) and a linear classifier, the only layer with a bias. Weights start from
    the truncated He normal distribution with variance ``2 / fan_in``, biases from zero.

    :raises ValueError: when ``depth`` is not ``6 n + 4`` for a whole ``n >= 1``, or ``width < 1``.
    """

    def __init__(self, depth: int = 28, width: int = 10, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth={depth}: expected 6 n + 4 with n >= 1 (10, 16, 22, 28, ...)")
        checks.count("width", width)
        self.conv = _conv(in_channels, 16, 3)
        channels = 16
        groups = []
        for out_channels, stride in ((16 * width, 1), (32 * width, 2), (64 * width, 2)):
            blocks = [_Block(channels, out_channels, stride)]
            blocks += [_Block(out_channels, out_channels, 1) for _ in range((depth - 4) // 6 - 1)]
            groups.append(nn.Sequential(*blocks))
            channels = out_channels
        self.groups = nn.Sequential(*groups)
        self.bn = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                _he_normal_(module.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.groups(self.conv(x))))
        return self.classifier(x.mean((-2, -1)))


def _he_normal_(weight: Tensor) -> None:
    fan_in = weight[0].numel()
    # A standard normal truncated at two standard deviations has a standard deviation of 0.8796.
    std = math.sqrt(2.0 / fan_in) / 0.87962566
    nn.init.trunc_normal_(weight, std=std, a=-2.0 * std, b=2.0 * std)


def wide_resnet_28_10(num_classes: int = 10) -> WideResNet:
    """WRN-28-10: 36.5 million parameters, the CIFAR network of the rank-1 paper."""
    return WideResNet(depth=28, width=10, num_classes=num_classes)
