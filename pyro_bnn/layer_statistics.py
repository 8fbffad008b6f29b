"""Statistics of normalisation layers that belong to one draw of the weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from pyro_bnn.inputs import to_device
from pyro_bnn.model import BayesianNetwork
from pyro_bnn.network import batch_size


def gather_statistics(model: BayesianNetwork, draw: dict[str, Tensor], batches: Iterable[Any]) -> None:
    """Leaves in the network the statistics that its normalisation layers have under a draw: plain averages.

    :param draw: ``{site: [1, members, *event]}``.
    :param batches: pairs ``(x, y)``, or inputs alone.
    """
    layers = list(model.moving_layers().values())
    momenta = [layer.momentum for layer in layers]
    latents = {name: model.plated(value) for name, value in draw.items()}
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # all batches count alike
        layer.train()
    for batch in batches:
        x = to_device(batch[0] if isinstance(batch, (tuple, list)) else batch, model.like())
        model.function(x, latents, batch_size(x))
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        layer.eval()
