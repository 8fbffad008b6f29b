"""ResNet-18 for small images."""

import torchvision
from torch import nn


def resnet18(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """torchvision's ResNet-18 with the stem used for CIFAR: ``[N, in_channels, H, W] -> [N, num_classes]`` logits.

    A 3 x 3 convolution with stride 1 replaces the 7 x 7 convolution with stride 2, and there is no max-pooling, so that
    32 x 32 images keep their resolution up to the first group (He et al. 2015, arXiv 1512.03385, section 4.2).
    """
    net = torchvision.models.resnet18(num_classes=num_classes)
    net.conv1 = nn.Conv2d(in_channels, 64, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    net.maxpool = nn.Identity()
    return net
