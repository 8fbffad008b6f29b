"""Classifiers of torchvision with pretrained weights, by name: ``"MobileNet_V2_Weights.IMAGENET1K_V1"``."""

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
    """A pretrained classifier with a new last layer, which preprocesses its input as in pretraining.

    Images ``[N, 1 or 3, height, width]`` with values in [0, 1] are converted to three channels and resized, cropped and
    standardised by the transforms of the weights.

    :param net: a classifier whose last layer is linear.
    :param weights: the torchvision weights that define the transforms.
    :param out_features: number of outputs of the new layer.
    :raises ValueError: when the last layer is not linear.
    """

    def __init__(self, net: nn.Module, weights: WeightsEnum, out_features: int) -> None:
        super().__init__()
        name, last = [(n, m) for n, m in net.named_modules() if m._parameters][-1]
        if not isinstance(last, nn.Linear):
            raise ValueError(
                f"{weights} belongs to a network that ends in a {type(last).__name__} ({name!r}): expected a linear "
                "layer, of which every particle gets its own; choose weights of another network"
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
    """The architecture and the weights for every name, including ``DEFAULT``."""
    found: dict[str, tuple[str, WeightsEnum]] = {}
    for architecture in torchvision.models.list_models(module=torchvision.models):
        weights = torchvision.models.get_model_weights(architecture)
        found |= {f"{weights.__name__}.{name}": (architecture, one) for name, one in weights.__members__.items()}
    return found


def find_weights(name: str) -> str:
    """The full name of weights, as torchvision prints it; ``DEFAULT`` is resolved.

    :raises ValueError: for an unknown name; the message lists similar ones.
    """
    names = {one.lower(): one for one in known()}
    if name in names.values():
        return str(known()[name][1])
    near = difflib.get_close_matches(name.lower(), names, 3, cutoff=0.4) or ["resnet18_weights.default"]
    raise ValueError(
        f"{name!r} is not the folder of a run, and torchvision has no image weights of this name; similar names are "
        f"{', '.join(names[one] for one in near)}"
    )


def image_size(name: str) -> int:
    """The size in pixels to which the transforms of these weights resize images before they crop them."""
    size: int = known()[name][1].transforms().resize_size[0]
    return size


def build(name: str, in_shape: tuple[int, ...], out_features: int, load: bool = False) -> Pretrained:
    """Builds the network for weights that :func:`find_weights` has found.

    :param in_shape: the shape of one image.
    :param load: whether to load the weights, from the cache of ``torch.hub`` or by a download; without them, the
        network can take the weights of a saved posterior.
    :raises ValueError: for rows that are not images, and for a network that has several outputs, whose architecture
        depends on the weights, or that does not end in a linear layer.
    :raises OSError: when the weights cannot be loaded.
    """
    if len(in_shape) != 3 or in_shape[0] not in (1, 3):
        raise ValueError(f"{name} takes images [1 or 3, height, width], but a row of the data has shape {in_shape}")
    architecture, weights = known()[find_weights(name)]
    if architecture in _SEVERAL_OUTPUTS:
        raise ValueError(f"{name} belongs to a network with several outputs in training; choose weights of another one")
    net = torchvision.models.get_model(architecture, weights=None)
    if load:
        shapes = {key: value.shape for key, value in net.state_dict().items()}
        net = _loaded(architecture, weights)
        if shapes != {key: value.shape for key, value in net.state_dict().items()}:
            raise ValueError(
                f"{name} is for another image size than the one for which torchvision builds {architecture} by "
                "default, so a saved run could not be opened; choose other weights of this architecture"
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
