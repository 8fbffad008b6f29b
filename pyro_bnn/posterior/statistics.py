"""Statistics of normalisation layers that belong to one draw of the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Protocol

from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from pyro_bnn.inputs import inputs, without_labels
from pyro_bnn.network import batch_size
from pyro_bnn.posterior.stored_draws import DrawsGuide
from pyro_bnn.program.model import BayesianNetwork


class Statistics(Protocol):
    """The statistics that normalisation layers use while the network predicts with given draws."""

    def parts(
        self, model: BayesianNetwork, draws: dict[str, Tensor], index: Tensor | None
    ) -> Iterator[dict[str, Tensor]]:
        """Splits draws into parts with common statistics, and sets these in the network before it yields each part.

        :param draws: ``{site: [n, members, *event]}``.
        :param index: positions of the draws among the stored draws, ``[n]``.
        """
        ...


class OfNetwork:
    """All draws share the statistics of the network, as they were after training."""

    def parts(
        self, model: BayesianNetwork, draws: dict[str, Tensor], index: Tensor | None
    ) -> Iterator[dict[str, Tensor]]:
        yield draws


class Stored:
    """Each stored draw has its own statistics.

    :param values: ``{buffer of the network: [number of stored draws, *shape]}``.
    """

    def __init__(self, values: dict[str, Tensor]) -> None:
        self.values = values

    def parts(
        self, model: BayesianNetwork, draws: dict[str, Tensor], index: Tensor | None
    ) -> Iterator[dict[str, Tensor]]:
        assert index is not None
        buffers = dict(model.core().net.named_buffers())
        for position, draw in zip(index, _one_by_one(draws), strict=True):
            for name, value in self.values.items():
                buffers[name].copy_(value[position])
            yield draw


class Gathered:
    """Each draw has its own statistics, averaged over the batches of a loader: one pass over it for each draw."""

    def __init__(self, loader: Iterable[object]) -> None:
        self.loader = loader

    def parts(
        self, model: BayesianNetwork, draws: dict[str, Tensor], index: Tensor | None
    ) -> Iterator[dict[str, Tensor]]:
        for draw in _one_by_one(draws):
            gather_statistics(model, draw, self.loader)
            yield draw


def held_by(stored: DrawsGuide | None) -> Statistics:
    """The statistics that were stored with draws; those of the network where there are none."""
    held = {} if stored is None else stored.statistics()
    return Stored(held) if held else OfNetwork()


def _one_by_one(draws: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    for i in range(len(next(iter(draws.values())))):
        yield {name: value[i : i + 1] for name, value in draws.items()}


@contextlib.contextmanager
def averaging(layers: Iterable[_NormBase]) -> Iterator[None]:
    """Inside, the layers reset their statistics and take plain averages over all batches they see in train mode."""
    layers = list(layers)
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # all batches count alike
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


def gather_statistics(model: BayesianNetwork, draw: dict[str, Tensor], batches: Iterable[object]) -> None:
    """Sets the statistics of normalisation layers to their averages over batches, with the weights of a draw.

    :param draw: ``{site: [1, members, *event]}``.
    :param batches: pairs ``(x, y)``, dicts with ``labels``, or inputs alone.
    """
    layers = list(model.moving_layers().values())
    latents = {name: model.plated(value) for name, value in draw.items()}
    with averaging(layers):
        for layer in layers:
            layer.train()
        for batch in batches:
            x = inputs(without_labels(batch), model.like())
            model.function(x, latents, batch_size(x))
        for layer in layers:
            layer.eval()
