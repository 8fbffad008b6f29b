"""Independent Normals, LogNormals or points over the elements of many sites, in few passes, for 1e7 weights.

Sites stored side by side in one tensor are drawn together, with one pass after the noise, and their KL divergences are
computed together (:mod:`pyro_bnn.program.divergences`). The generic expressions take about three times as many passes,
and one call for each site.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints


def split(block: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """``[*batch, n] -> [*batch, *shape]`` for each of the shapes, which have n elements in total."""
    parts = block.split([shape.numel() for shape in shapes], -1)
    return [
        part if len(shape) == 1 else part.reshape(part.shape[:-1] + shape)
        for part, shape in zip(parts, shapes, strict=True)
    ]


class SiteBlock:
    """Independent distributions of all elements of several sites that are stored side by side.

    :param parameters: each ``[*batch, n]``.
    :param shapes: event shape of each site; n elements in total.
    """

    def __init__(self, parameters: tuple[Tensor, ...], shapes: Sequence[torch.Size]) -> None:
        self.parameters, self.shapes = parameters, shapes

    @cached_property
    def of_sites(self) -> list[list[Tensor]]:
        """Of each parameter, the part of each site, ``[*batch, *shape]``."""
        return [split(parameter, self.shapes) for parameter in self.parameters]

    def columns(self, indices: Sequence[int]) -> list[Tensor]:
        """The parameters of some sites, ``[*batch, n]``."""
        if list(indices) == list(range(len(self.shapes))):
            return list(self.parameters)
        lead = self.parameters[0].shape[:-1]
        return [torch.cat([parts[i].reshape(*lead, -1) for i in indices], -1) for parts in self.of_sites]


class NormalBlock(SiteBlock):
    """``N(loc, scale^2)`` for all elements of several sites that are stored side by side.

    :param loc, scale: ``[*batch, n]``, of the same shape.
    :param shapes: event shape of each site; n elements in total.
    """

    def __init__(self, loc: Tensor, scale: Tensor, shapes: Sequence[torch.Size]) -> None:
        super().__init__((loc, scale), shapes)
        self.loc, self.scale = loc, scale
        self._draws: dict[object, list[Tensor | None]] = {}

    def parts(self) -> Sequence[FactorisedNormal]:
        """The distribution of each site."""
        return [FactorisedNormal(self, i, self.loc.shape[:-1]) for i in range(len(self.shapes))]

    def draw(self, index: int, batch: torch.Size) -> Tensor:
        """``[*batch, *shape]``: a draw of one site, new for every call; the sites next to it are drawn with it."""
        key = batch, torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        parts = self._draws.get(key)
        if parts is None or parts[index] is None:
            noise = torch.randn(batch + self.loc.shape[-1:], dtype=self.loc.dtype, device=self.loc.device)
            parts = self._draws[key] = [*split(torch.addcmul(self.loc, self.scale, noise), self.shapes)]
        value, parts[index] = parts[index], None
        assert value is not None
        return value


class LogNormalBlock(NormalBlock):
    """Sites whose logarithms are a :class:`NormalBlock`.

    Each is drawn on its own, so that a seed gives the draws that it gave when they had no block.
    """

    def parts(self) -> Sequence[FactorisedLogNormal]:
        return [FactorisedLogNormal(self, i, self.loc.shape[:-1]) for i in range(len(self.shapes))]

    def draw(self, index: int, batch: torch.Size) -> Tensor:
        loc, scale = (parts[index] for parts in self.of_sites)
        noise = torch.randn(batch + self.shapes[index], dtype=loc.dtype, device=loc.device)
        return torch.addcmul(loc, scale, noise).exp()


class FactorisedNormal(dist.TorchDistribution):
    """One site of a :class:`NormalBlock`: ``N(loc, scale^2)`` with the axes of the site as event axes.

    :param batch: batch shape, to which the batch shape of the block broadcasts.
    """

    has_rsample = True
    arg_constraints: dict[str, constraints.Constraint] = {}
    _family: ClassVar[Any] = dist.Normal
    _elements: ClassVar[constraints.Constraint] = constraints.real

    def __init__(self, block: NormalBlock, index: int, batch: torch.Size) -> None:
        self.block, self.index = block, index
        super().__init__(batch, block.shapes[index], validate_args=False)

    @cached_property
    def in_full(self) -> dist.TorchDistribution:
        """The same distribution in Pyro's usual form, such as ``Normal(loc, scale).to_event(...)``."""
        shape = self.batch_shape + self.event_shape
        loc, scale = (parts[self.index].expand(shape) for parts in self.block.of_sites)
        full: dist.TorchDistribution = self._family(loc, scale, validate_args=False)
        return full.to_event(len(self.event_shape))

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> FactorisedNormal:
        batch = torch.Size(batch_shape)
        return self if batch == self.batch_shape else type(self)(self.block, self.index, batch)

    def rsample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        return self.block.draw(self.index, torch.Size(sample_shape) + self.batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        result: Tensor = self.in_full.log_prob(value)
        return result

    def entropy(self) -> Tensor:
        result: Tensor = self.in_full.entropy()
        return result

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(self._elements, len(self.event_shape))

    @property
    def mean(self) -> Tensor:
        result: Tensor = self.in_full.mean
        return result

    @property
    def variance(self) -> Tensor:
        result: Tensor = self.in_full.variance
        return result


class FactorisedLogNormal(FactorisedNormal):
    """One site of a :class:`LogNormalBlock`: its logarithm is ``N(loc, scale^2)``."""

    _family = dist.LogNormal
    _elements = constraints.positive


class PointBlock(SiteBlock):
    """Points instead of distributions.

    :param value: ``[*batch, n]``.
    :param shapes: event shape of each site; n elements in total.
    """

    def __init__(self, value: Tensor, shapes: Sequence[torch.Size]) -> None:
        super().__init__((value,), shapes)

    def parts(self) -> list[FactorisedPoint]:
        """The distribution of each site."""
        return [FactorisedPoint(self, i, self.parameters[0].shape[:-1]) for i in range(len(self.shapes))]


class FactorisedPoint(dist.Delta):
    """One site of a :class:`PointBlock`.

    :param batch: batch shape, to which the batch shape of the block broadcasts.
    """

    def __init__(self, block: PointBlock, index: int, batch: torch.Size) -> None:
        self.block, self.index = block, index
        torch.distributions.Distribution.__init__(self, batch, block.shapes[index], validate_args=False)

    @cached_property
    def v(self) -> Tensor:
        return self.block.of_sites[0][self.index].expand(self.batch_shape + self.event_shape)

    @cached_property
    def log_density(self) -> Tensor:
        return self.v.new_zeros(()).expand(self.batch_shape)

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> FactorisedPoint:
        batch = torch.Size(batch_shape)
        return self if batch == self.batch_shape else FactorisedPoint(self.block, self.index, batch)
