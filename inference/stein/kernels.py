"""Kernels between particles, computed from Gram matrices, without tensors of size particles x particles x coordinates.

With ``D_ij = |a_i - a_j|^2`` and ``T_ij = <a_i, a_j>`` every kernel here is a function ``k(D, T)``, so that the sums of
its gradients over particles are products of an ``[n, n]`` matrix with the coordinates ``[n, d]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pyro_bnn import display
from pyro_bnn.entry import checks


class KernelValues(NamedTuple):
    """``k``, ``dk / dD`` and ``dk / dT``, each ``[n, n]``; ``None`` where k does not depend on T."""

    value: Tensor
    by_distance: Tensor
    by_product: Tensor | None


@dataclass(frozen=True)
class ScaledMedian:
    """The median heuristic for bandwidths, ``h = factor * median_{i < j} D_ij / log(n + 1) + eps``.

    With factor 1 the columns of k sum to about 2. The median of an even number of distances is the mean of the middle
    two. ``eps`` is the machine epsilon, so that h is positive even if all particles coincide.

    :param factor: a positive number.
    """

    factor: float = 1.0

    def __post_init__(self) -> None:
        _require_positive("factor", self.factor)

    def __call__(self, distances: Tensor) -> Tensor:
        n = len(distances)
        row, column = torch.triu_indices(n, n, 1, device=distances.device)
        pairs = distances[row, column].sort().values
        count = len(pairs)
        median = (pairs[(count - 1) // 2] + pairs[count // 2]) / 2 if count else distances.new_zeros(())
        return self.factor * median / math.log(n + 1) + torch.finfo(distances.dtype).eps


Bandwidth = float | Literal["median"] | Callable[[Tensor], Tensor | float]


class Kernel:
    """A positive definite function of two particles, ``k(D, T)``."""

    #: whether k depends on the inner products T
    uses_products = False
    #: whether k > 0 everywhere, as a kernel density needs
    positive = True

    def __repr__(self) -> str:
        return display.call(self)

    def __call__(self, distances: Tensor, products: Tensor | None, dim: int) -> KernelValues:
        """k and its derivatives, with the bandwidth as a constant.

        :param distances: squared distances D, ``[n, n]``.
        :param products: inner products T, ``[n, n]``; only used if ``uses_products``.
        :param dim: number of coordinates of a particle.
        """
        raise NotImplementedError(f"{type(self).__name__} must define __call__()")


@dataclass(frozen=True)
class RBF(Kernel):
    """``k = exp(-D / h)``.

    :param bandwidth: h: ``"median"``, :class:`ScaledMedian`, a positive number, or a function of D.
    """

    bandwidth: Bandwidth = "median"

    def __post_init__(self) -> None:
        _check_bandwidth(self.bandwidth)

    def __call__(self, distances: Tensor, products: Tensor | None, dim: int) -> KernelValues:
        h = _bandwidth(self.bandwidth, distances)
        value = (-distances / h).exp()
        return KernelValues(value, -value / h, None)


@dataclass(frozen=True)
class IMQ(Kernel):
    """The inverse multiquadric ``k = (1 + D / h)^-exponent``, whose tails are heavier than those of :class:`RBF`.

    :param bandwidth: as for :class:`RBF`.
    :param exponent: positive; below 1, convergence in its Stein discrepancy controls weak convergence (Gorham & Mackey
        2017).
    """

    bandwidth: Bandwidth = "median"
    exponent: float = 0.5

    def __post_init__(self) -> None:
        _check_bandwidth(self.bandwidth)
        _require_positive("exponent", self.exponent)

    def __call__(self, distances: Tensor, products: Tensor | None, dim: int) -> KernelValues:
        h = _bandwidth(self.bandwidth, distances)
        base = 1 + distances / h
        value = base**-self.exponent
        return KernelValues(value, -self.exponent * value / (base * h), None)


@dataclass(frozen=True)
class LinearKernel(Kernel):
    """``k = <a, b> / dim + 1``: enough particles then match the mean and covariance of a Gaussian target exactly."""

    uses_products = True
    positive = False

    def __call__(self, distances: Tensor, products: Tensor | None, dim: int) -> KernelValues:
        assert products is not None
        return KernelValues(products / dim + 1, torch.zeros_like(distances), torch.full_like(products, 1 / dim))


@dataclass(frozen=True)
class KernelSum(Kernel):
    """``k = sum_m w_m k_m``.

    :param kernels: at least one.
    :param weights: one non-negative number for each kernel; by default equal weights that sum to 1.
    """

    kernels: Sequence[Kernel]
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        kernels = tuple(self.kernels)
        if not kernels or not all(isinstance(kernel, Kernel) for kernel in kernels):
            raise ValueError(f"kernels={self.kernels!r}: expected one kernel or more")
        weights = (1 / len(kernels),) * len(kernels) if self.weights is None else tuple(self.weights)
        for weight in weights:
            checks.not_negative("weights", weight)
        if len(weights) != len(kernels) or not 0 < sum(weights) < math.inf:
            raise ValueError(
                f"weights={self.weights!r}: expected {len(kernels)} numbers of at least 0, not all of them 0"
            )
        object.__setattr__(self, "kernels", kernels)
        object.__setattr__(self, "weights", weights)

    @property
    def uses_products(self) -> bool:  # type: ignore[override]
        return any(kernel.uses_products for kernel in self.kernels)

    @property
    def positive(self) -> bool:  # type: ignore[override]
        return all(kernel.positive for kernel in self.kernels)

    def __call__(self, distances: Tensor, products: Tensor | None, dim: int) -> KernelValues:
        value = torch.zeros_like(distances)
        by_distance = torch.zeros_like(distances)
        by_product = torch.zeros_like(distances) if self.uses_products else None
        for weight, kernel in zip(self.weights or (), self.kernels, strict=True):
            one = kernel(distances, products, dim)
            value += weight * one.value
            by_distance += weight * one.by_distance
            if by_product is not None and one.by_product is not None:
                by_product += weight * one.by_product
        return KernelValues(value, by_distance, by_product)


def _require_positive(name: str, value: float) -> None:
    checks.positive(name, value)


def _check_bandwidth(bandwidth: Bandwidth) -> None:
    if callable(bandwidth) or bandwidth == "median":
        return
    if isinstance(bandwidth, str):
        raise ValueError(
            f"bandwidth={bandwidth!r}: expected 'median', ScaledMedian(factor), a positive number or a function"
        )
    _require_positive("bandwidth", bandwidth)


def _bandwidth(bandwidth: Bandwidth, distances: Tensor) -> Tensor:
    if bandwidth == "median":
        bandwidth = ScaledMedian()
    h = bandwidth(distances) if callable(bandwidth) else bandwidth
    return torch.as_tensor(h, dtype=distances.dtype, device=distances.device)
