"""The positions of n particles: their distances and inner products, and the gradients of a kernel between them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from pyro_bnn.inference.stein.kernels import Kernel, KernelValues

#: number of columns processed at a time, so that intermediate results stay in a processor's cache
COLUMNS = 2**13
#: Squared distances below this fraction of the squared lengths are rounding errors: such particles coincide.
_ROUNDING = 64 * torch.finfo(torch.float64).eps


class Positions:
    """The positions of n particles. Some coordinates may be products ``scale * B A``, which are never formed.

    :param flat: coordinates that are stored as they are, each ``[n, d]``.
    :param pairs: ``(A [n, r, in], B [n, out, r], scale)``.
    """

    def __init__(self, flat: Sequence[Tensor], pairs: Sequence[tuple[Tensor, Tensor, float]] = ()) -> None:
        self.flat = [values.detach() for values in flat]
        self.pairs = [_Pair(a.detach(), b.detach(), scale) for a, b, scale in pairs]

    @property
    def dim(self) -> int:
        """Number of coordinates; of products, not of their factors."""
        return sum(values.shape[1] for values in self.flat) + sum(pair.dim for pair in self.pairs)

    @cached_property
    def distances(self) -> Tensor:
        """Squared distances ``[n, n]`` in float64; 0 where particles coincide up to rounding."""
        # Relative to the first particle: what all particles share cancels in a distance, and would only add rounding.
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

        :param own: whether to differentiate at the particle itself, ``sum_j grad_{theta_i} k(theta_i, theta_j)``;
            otherwise at the others, ``sum_j grad_{theta_j} k(theta_j, theta_i)``.
        :return: one tensor for each of ``flat``, and a pair for each of ``pairs``.
        """
        # Particles that coincide exert no force: a tiny bandwidth has a huge derivative, which would amplify rounding.
        pull = 2 * values.by_distance.masked_fill(self.distances == 0, 0.0)
        flat = [_flat_gradient(v, pull, values.by_product, own) for v in self.flat]
        return flat, [pair.gradient(pull, values.by_product, own) for pair in self.pairs]


def _gram(values: Tensor, origin: Tensor | None = None) -> Tensor:
    """Inner products of rows relative to ``origin``, in float64, a few columns at a time."""
    total = torch.zeros(len(values), len(values), dtype=torch.float64, device=values.device)
    origins = [None] * (1 + values.shape[1] // COLUMNS) if origin is None else origin.split(COLUMNS, 1)
    for piece, start in zip(values.split(COLUMNS, 1), origins, strict=False):
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
    for piece, part in zip(values.split(COLUMNS, 1), gradient.split(COLUMNS, 1), strict=True):
        force = away @ (piece - piece[:1]).to(dtype)
        part.copy_(force if weights is None else force.addmm_(weights, piece.to(dtype)))
    return gradient


class _Pair:
    """Products ``scale * B_i A_i`` of n particles, computed from ``B_i' B_j`` and ``A_i A_j'``, ``[n, r, n, r]``."""

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
        """``(A [n, r, in], B [n, out, r])``. See :meth:`Positions.gradients`."""
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
