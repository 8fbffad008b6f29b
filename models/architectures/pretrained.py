"""Classifiers of torchvision with the weights that it knows by name: ``"MobileNet_V2_Weights.IMAGENET1K_V1"``."""

from __future__ import annotations

import difflib
import os
import pickle
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlparse

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import WeightsEnum

_SEVERAL_OUTPUTS = ("googlenet", "inception_v3")


class Pretrained(nn.Module):
    """A classifier with a new last layer, behind the preprocessing that its weights were trained with.

    Images ``[N, 1 or 3, height, width]`` with values in [0, 1] get three channels, and are resized, cropped and
    standardised by the transforms of the weights.

    :param net: a classifier whose last layer is linear.
    :param weights: those that the transforms are taken from.
    :param out_features: outputs of the new layer.
    :raises ValueError: when the last layer is not linear.
    """

    def __init__(self, net: nn.Module, weights: WeightsEnum, out_features: int) -> None:
        super().__init__()
        name, last = [(n, m) for n, m in net.named_modules() if m._parameters][-1]
        if not isinstance(last, nn.Linear):
            raise ValueError(
                f"{weights} is of a network that ends in a {type(last).__name__} ({name!r}): expected a linear layer, "
                "of which every particle gets its own; take weights of another network"
            )
        fresh = nn.Linear(last.in_features, out_features, bias=last.bias is not None)
        net.set_submodule(name, fresh)
        self.net, self.transforms = net, weights.transforms()
        #: the name of the new layer
        self.head = f"net.{name}"

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(self.transforms(x.expand(-1, 3, -1, -1)))
        return y


def known() -> dict[str, tuple[str, WeightsEnum]]:
    """The architecture and the weights behind every name, ``DEFAULT`` included."""
    found: dict[str, tuple[str, WeightsEnum]] = {}
    for architecture in torchvision.models.list_models(module=torchvision.models):
        weights = torchvision.models.get_model_weights(architecture)
        found |= {f"{weights.__name__}.{name}": (architecture, one) for name, one in weights.__members__.items()}
    return found


def find_weights(name: str) -> str:
    """The name of weights as torchvision prints it, without ``DEFAULT``.

    :raises ValueError: when there are none of this name; the message has the nearest.
    """
    names = {one.lower(): one for one in known()}
    if name in names.values():
        return str(known()[name][1])
    near = difflib.get_close_matches(name.lower(), names, 3, cutoff=0.4) or ["resnet18_weights.default"]
    raise ValueError(
        f"{name!r} is not the folder of a run, and torchvision has no weights of this name for images; near it are "
        f"{', '.join(names[one] for one in near)}"
    )


def image_size(name: str) -> int:
    """Pixels to which the weights of this name have images resized, before they crop them."""
    size: int = known()[name][1].transforms().resize_size[0]
    return size


def build(name: str, in_shape: tuple[int, ...], out_features: int, load: bool = False) -> Pretrained:
    """The network of weights that :func:`find_weights` has found.

    :param in_shape: of one image.
    :param load: whether to give it the weights, out of the cache of ``torch.hub`` or by a download; without, it is
        what takes those of a saved posterior.
    :raises ValueError: for rows that are no images, or a network that has not one output, or has not the same shape
        without these weights, or does not end in a linear layer.
    :raises OSError: when the weights are not to be had.
    """
    if len(in_shape) != 3 or in_shape[0] not in (1, 3):
        raise ValueError(f"{name} takes images [1 or 3, height, width], a row of these data is {in_shape}")
    architecture, weights = known()[find_weights(name)]
    if architecture in _SEVERAL_OUTPUTS:
        raise ValueError(f"{name} is of a network with more than one output in training; take weights of another")
    net = torchvision.models.get_model(architecture, weights=None)
    if load:
        shapes = {key: value.shape for key, value in net.state_dict().items()}
        net = _loaded(architecture, weights)
        if shapes != {key: value.shape for key, value in net.state_dict().items()}:
            raise ValueError(
                f"{name} is for images of another size than torchvision builds {architecture} for, so that a saved run "
                "could not be opened; take other weights of it"
            )
    return Pretrained(net, weights, out_features)


def _loaded(architecture: str, weights: WeightsEnum) -> nn.Module:
    try:
        net: nn.Module = torchvision.models.get_model(architecture, weights=weights, progress=False)
    except (OSError, HTTPException, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        file = Path(torch.hub.get_dir()) / "checkpoints" / os.path.basename(urlparse(weights.url).path)
        state = "remove this file, which is damaged," if file.exists() else f"put the file from {weights.url} there,"
        raise OSError(
            f"the weights {weights} could not be loaded ({type(error).__name__}: {str(error).splitlines()[0]}): "
            f"expected them in {file}; {state} or set TORCH_HOME to a folder that has them in hub/checkpoints"
        ) from error
    return net
