"""Builds networks by the names that the command line uses and its run folders store."""

from __future__ import annotations

import math
from typing import Literal, get_args

from torch import nn

from pyro_bnn.models.architectures import pretrained
from pyro_bnn.models.architectures.resnet import resnet18
from pyro_bnn.models.architectures.small import digits_cnn, mlp

BuiltInName = Literal["cnn", "mlp", "resnet18"]


def build_network(name: str, in_shape: tuple[int, ...], out_features: int, load: bool = False) -> nn.Module:
    """Builds the network with the name in a run's options.

    :param name: a :data:`BuiltInName`, or the name of torchvision weights.
    :param in_shape: the shape of one input row.
    :param load: whether to load the torchvision weights.
    :raises ValueError: when the network does not accept such inputs.
    :raises OSError: when the weights cannot be loaded.
    """
    if name not in get_args(BuiltInName):
        return pretrained.build(name, in_shape, out_features, load)
    if name == "mlp":
        return mlp(math.prod(in_shape), (128, 128), out_features)
    if len(in_shape) != 3 or min(in_shape[1:]) < 4:
        raise ValueError(
            f"--network {name} takes images [channels, height, width], but a row of the data has shape {in_shape}"
        )
    if name == "resnet18":
        return resnet18(out_features, in_channels=in_shape[0])
    return digits_cnn(out_features, in_channels=in_shape[0])
