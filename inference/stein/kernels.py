"""Kernels between particles, computed from Gram matrices: nothing is ever of size particles x particles x coordinates.

With ``D_ij = |a_i - a_j|^2`` and ``T_ij = <a_i, a_j>`` every kernel here is a function ``k(D, T)``, so that the sums of
its gradients over particles are products of an ``[n, n]`` matrix with the coordinates ``[n, d]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pyro_bnn import display

#: columns that are worked on at a time: what is made of them in between stays in a processor's cache
_COLUMNS = 2**13
#: Squared distances below this part of the squared lengths are rounding: such particles coincide.
_ROUNDING = 64 * torch.finfo(torch.float64).eps


class KernelValues(NamedTuple):
    """``k``, ``dk / dD`` and ``dk / dT``, each ``[n, n]``; ``None`` where k does not depend on T."""

    value: Tensor
    by_distance: Tensor
    by_product: Tensor | None


@dataclass(frozen=True)
class ScaledMedian:
    """``h = factor * median over i < j of D_ij / log(n + 1) + eps``: at factor 1 the columns of k sum to about 2.

    The median of an even number of distances is the mean of the middle two. ``eps`` is the machine's, so that particles
    which all coincide have a bandwidth.
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
        """k and its derivatives; the bandwidth counts as a constant.

        :param distances: squared distances D, ``[n, n]``.
        :param products: inner products T, ``[n, n]``; only read where ``uses_products``.
        :param dim: number of coordinates that they sum over.
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
class Linear(Kernel):
    """``k = <a, b> / dim + 1``: with it the mean and covariance of a Gaussian are exact once particles span it."""

    uses_products = True
    positive = False

    def __call__(self, distances: Tensor, products: Tensor | None, dim: int) -> KernelValues:
        assert products is not None
        return KernelValues(products / dim + 1, torch.zeros_like(distances), torch.full_like(products, 1 / dim))


@dataclass(frozen=True)
class Mixture(Kernel):
    """``k = sum_m w_m k_m``.

    :param kernels: at least one.
    :param weights: one non-negative number for each kernel; equal ones that sum to 1 by default.
    """

    kernels: Sequence[Kernel]
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        kernels = tuple(self.kernels)
        if not kernels or not all(isinstance(kernel, Kernel) for kernel in kernels):
            raise ValueError(f"kernels={self.kernels!r}: expected one kernel or more")
        weights = (1 / len(kernels),) * len(kernels) if self.weights is None else tuple(self.weights)
        if len(weights) != len(kernels) or min(weights) < 0 or not 0 < sum(weights) < math.inf:
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
    if not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r}: expected a positive number")


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


# ------------------------------------------------------------------------------------------- where particles are


class Points:
    """The positions of n particles, of which a part may be products ``scale * B A`` that are never formed.

    :param flat: coordinates that count as they are, each ``[n, d]``.
    :param pairs: ``(A [n, r, in], B [n, out, r], scale)``.
    """

    def __init__(self, flat: Sequence[Tensor], pairs: Sequence[tuple[Tensor, Tensor, float]] = ()) -> None:
        self.flat = [values.detach() for values in flat]
        self.pairs = [_Pair(a.detach(), b.detach(), scale) for a, b, scale in pairs]

    @property
    def dim(self) -> int:
        """Number of coordinates, of the products and not of their factors."""
        return sum(values.shape[1] for values in self.flat) + sum(pair.dim for pair in self.pairs)

    @cached_property
    def distances(self) -> Tensor:
        """Squared distances ``[n, n]`` in float64; 0 where particles coincide but for rounding."""
        # Lengths are taken from the first particle, for all that particles share is cancelled in a distance.
        grams = [_gram(values, values[:1]) for values in self.flat] + [pair.products for pair in self.pairs]
        gram = torch.stack(grams).sum(0)
        lengths = gram.diagonal()
        both = lengths[:, None] + lengths
        distances = both - 2 * gram
        distances = (distances + distances.T) / 2
        return distances.masked_fill(distances <= _ROUNDING * both, 0.0).fill_diagonal_(0.0)

    @cached_property
    def products(self) -> Tensor:
        """Inner products ``[n, n]`` in float64."""
        return torch.stack([_gram(values) for values in self.flat] + [pair.products for pair in self.pairs]).sum(0)

    def evaluate(self, kernel: Kernel) -> KernelValues:
        """The kernel between all particles."""
        return kernel(self.distances, self.products if kernel.uses_products else None, self.dim)

    def gradients(self, values: KernelValues, own: bool) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
        """Sums over j of gradients of k in its first argument, for each particle i.

        Gradients in A and B are those of the kernel between products: ``dD_ij / dA_j = 2 scale^2 B_j' (B_j A_j - B_i
        A_i)`` and ``dD_ij / dB_j = 2 scale^2 (B_j A_j - B_i A_i) A_j'``.

        :param own: ``sum_j grad_{theta_i} k(theta_i, theta_j)``, at the particle itself, instead of
            ``sum_j grad_{theta_j} k(theta_j, theta_i)``, at the others.
        :return: one tensor for each of ``flat``, and a pair for each of ``pairs``.
        """
        # Particles that coincide exert no force: a derivative that a tiny bandwidth makes huge would multiply rounding.
        pull = 2 * values.by_distance.masked_fill(self.distances == 0, 0.0)
        flat = [_flat_gradient(v, pull, values.by_product, own) for v in self.flat]
        return flat, [pair.gradient(pull, values.by_product, own) for pair in self.pairs]


def _gram(values: Tensor, origin: Tensor | None = None) -> Tensor:
    """Inner products of rows, in float64, a few columns at a time."""
    total = torch.zeros(len(values), len(values), dtype=torch.float64, device=values.device)
    origins = [None] * (1 + values.shape[1] // _COLUMNS) if origin is None else origin.split(_COLUMNS, 1)
    for piece, start in zip(values.split(_COLUMNS, 1), origins, strict=False):
        wide = piece.double() if start is None else piece.double() - start
        total += wide @ wide.T
    return total


def _flat_gradient(values: Tensor, pull: Tensor, by_product: Tensor | None, own: bool) -> Tensor:
    """``own``: sum_j p_ij (x_i - x_j) + t_ij x_j; otherwise sum_j p_ij (x_j - x_i) + t_ij x_i."""
    dtype = torch.promote_types(values.dtype, torch.float32)
    away = (torch.diag(pull.sum(1)) - pull).to(dtype)
    away = away if own else -away
    weights = None
    if by_product is not None:
        weights = (by_product if own else torch.diag(by_product.sum(1))).to(dtype)
    gradient = torch.empty_like(values)
    for piece, part in zip(values.split(_COLUMNS, 1), gradient.split(_COLUMNS, 1), strict=True):
        force = away @ (piece - piece[:1]).to(dtype)
        part.copy_(force if weights is None else force.addmm_(weights, piece.to(dtype)))
    return gradient


class _Pair:
    """Products ``scale * B_i A_i`` of n particles, by way of ``B_i' B_j`` and ``A_i A_j'``, ``[n, r, n, r]``."""

    def __init__(self, a: Tensor, b: Tensor, scale: float) -> None:
        self.n, self.rank, self.scale = a.shape[0], a.shape[1], scale
        self.rows, self.columns = a.flatten(0, 1), b.movedim(0, 1).flatten(1)  # [n r, in] and [out, n r]
        shape = (self.n, self.rank, self.n, self.rank)
        self.a_a = _gram(self.rows).reshape(shape)
        self.b_b = _gram(self.columns.T).reshape(shape)

    @property
    def dim(self) -> int:
        return self.columns.shape[0] * self.rows.shape[1]

    @cached_property
    def products(self) -> Tensor:
        """``<scale B_i A_i, scale B_j A_j>`` = scale^2 sum((B_i' B_j) * (A_i A_j')), ``[n, n]``."""
        return self.scale**2 * (self.a_a * self.b_b).sum((1, 3))

    def gradient(self, pull: Tensor, by_product: Tensor | None, own: bool) -> tuple[Tensor, Tensor]:
        """``(A [n, r, in], B [n, out, r])``. See :meth:`Points.gradients`."""
        dtype = torch.promote_types(self.rows.dtype, torch.float32)
        cross = pull if by_product is None else pull - by_product
        eye = torch.eye(self.n, dtype=pull.dtype, device=pull.device)
        left = self._coefficients(self.b_b, pull, cross, eye, own)
        right = self._coefficients(self.a_a, pull, cross, eye, own)
        a = (left.to(dtype) @ self.rows.to(dtype)).to(self.rows.dtype)
        b = (self.columns.to(dtype) @ right.T.to(dtype)).to(self.columns.dtype)
        return a.unflatten(0, (self.n, -1)), b.unflatten(1, (self.n, -1)).movedim(1, 0)

    def _coefficients(self, gram: Tensor, pull: Tensor, cross: Tensor, eye: Tensor, own: bool) -> Tensor:
        """``[n r, n r]``: with G_ij of the other factor, and S for sums over k,

        own: S_k p_ik G_ii on the diagonal, minus c_ij G_ij; otherwise p_ij G_jj, minus S_k c_ik G_ki on the diagonal.
        """
        same = gram.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [n, r, r]
        if own:
            coefficients = -cross[:, None, :, None] * gram
            on_diagonal = pull.sum(1)[:, None, None] * same
        else:
            coefficients = torch.einsum("ij,jab->iajb", pull, same)
            on_diagonal = -torch.einsum("ik,kaib->iab", cross, gram)
        coefficients = coefficients + torch.einsum("ij,iab->iajb", eye, on_diagonal)
        return self.scale**2 * coefficients.flatten(2).flatten(0, 1)
