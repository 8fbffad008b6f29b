"""Low-rank perturbations: W' = W + scale B A, a separate term added to the product with the shared W (Hu et al. 2022).

Every weight is seen as a matrix, its dimension 0 against all others. Where dimension 0 is the output, A is
applied to the input first: for a convolution, A is a convolution to ``rank`` channels and B a 1 x 1 convolution. Where
dimension 0 is the input (transposed convolutions, ``x @ W``, tables), B comes first.

W is applied to all members in one product, except in :meth:`LowRankFactors.convolve` and :meth:`LowRankFactors.linear`,
which sum the weight of each member.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyro_bnn.perturb.layout import Fold, Layout, of_member

Op = Callable[[Tensor, Tensor, Tensor | None], Tensor]
#: stride, padding and dilation of a convolution
Options = tuple[list[int], list[int], list[int]]


class LowRankFactors(NamedTuple):
    """W' = W + scale B A, with ``A [members | 1, rank, *W.shape[1:]]`` and ``B [members | 1, W.shape[0], rank]``."""

    A: Tensor
    B: Tensor
    scale: float

    def transposed(self) -> LowRankFactors:
        return LowRankFactors(self.B.mT, self.A.mT, self.scale)

    def narrow(self, start: int, length: int) -> LowRankFactors:
        """The factors of ``W[start : start + length]``."""
        return LowRankFactors(self.A, self.B.narrow(1, start, length), self.scale)

    def of_member(self, member: int) -> LowRankFactors:
        return LowRankFactors(of_member(self.A, member), of_member(self.B, member), self.scale)

    def explicit(self, weight: Tensor, member: int, row: int) -> Tensor:
        """The weight of one member: the definition that every rule must agree with."""
        a, b = (factor[member if factor.shape[0] > 1 else 0] for factor in (self.A, self.B))
        return weight + (self.scale * (b @ a.flatten(1))).reshape(weight.shape).to(weight.dtype)

    def term(self, fold: Fold, op: Op, x: Tensor, layout: Layout, dims: tuple[int, int], transposed: bool,
             groups: int) -> Tensor:  # fmt: skip
        """``scale (B A) x``.

        :param op: the product with a weight like W, without groups.
        :param dims: the feature axis of ``x`` and that of the result, counted from the end.
        :param transposed: whether dimension 0 of the weight is the input side.
        """
        if self.A.dim() == 3:  # a matrix
            first, second = (self.B.mT, self.A.mT) if transposed else (self.A, self.B)
            return mix(fold, mix(fold, x, first, dims[0], layout) * self.scale, second, dims[1], layout)
        b = self.B if groups == 1 else self.B.unflatten(1, (groups, -1))
        if transposed:
            return self._core(fold, op, mix(fold, x, b.mT, dims[0], layout) * self.scale, layout, groups)
        return mix(fold, self._core(fold, op, x, layout, groups) * self.scale, b, dims[1], layout)

    def _core(self, fold: Fold, op: Op, x: Tensor, layout: Layout, groups: int) -> Tensor:
        """The convolution with A; each group of channels is treated as a further sample."""
        if groups == 1:
            return _each_member(fold, lambda own, a: op(own, a, None), x, layout, self.A)

        def apart(own: Tensor, a: Tensor) -> Tensor:
            y = op(own.unflatten(1, (groups, -1)).flatten(0, 1), a, None)
            return y.unflatten(0, (-1, groups)).flatten(1, 2)

        return _each_member(fold, apart, x, layout, self.A)

    def convolve(self, fold: Fold, x: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout,
                 options: Options) -> Tensor:  # fmt: skip
        """The convolution of a batch with ``W + scale B A``, a weight that is summed for each member.

        The sum is recomputed in the backward pass, which needs only x, W, A and B. Compared with a separate convolution
        with A, this saves a pass over the result in both directions.
        """
        inputs = [x, weight, self.A, self.B] + ([] if bias is None else [bias])
        if torch.is_autocast_enabled(x.device.type):
            inputs = [t.to(torch.get_autocast_dtype(x.device.type)) for t in inputs]
        x, weight, a, b = inputs[:4]
        own_bias = None if bias is None else inputs[4]

        def run(part: Tensor, own_a: Tensor, own_b: Tensor) -> Tensor:
            y: Tensor = _Convolution.apply(part, weight, own_bias, own_a, own_b * self.scale, options)
            return y

        members = max(a.shape[0], b.shape[0])
        return _each_member(fold, run, x, layout, *(f.expand(members, *f.shape[1:]) for f in (a, b)))

    def sums_for(self, x: Tensor) -> bool:
        """Whether :meth:`linear` takes fewer passes over memory than a separate term does, for all members in ``x``.

        It takes four over a weight ``[out, in]`` of every member, forward and backward, and saves three over results
        and gradients. In half precision the sum would round a small term away, and a graph for any number of rows
        cannot depend on it.
        """
        members, (outputs, inputs) = max(self.A.shape[0], self.B.shape[0]), (self.B.shape[1], self.A.shape[2])
        rows = x.numel() // inputs // members
        if torch.is_autocast_enabled(x.device.type) or not isinstance(rows, int):
            return False
        return rows * (2 * outputs + inputs) > 4 * outputs * inputs

    def linear(self, fold: Fold, x: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout) -> Tensor:
        """``x (W + scale B A)^T + b`` with a weight that is summed for each member, and again in the backward pass."""

        def run(part: Tensor, own_a: Tensor, own_b: Tensor) -> Tensor:
            y: Tensor = _Linear.apply(part, weight, bias, own_a, own_b * self.scale)
            return y

        members = max(self.A.shape[0], self.B.shape[0])
        return _each_member(fold, run, x, layout, *(f.expand(members, *f.shape[1:]) for f in (self.A, self.B)))


class Shift(NamedTuple):
    """W' = W + delta, a whole matrix ``[members | 1, *W.shape]`` for every member."""

    delta: Tensor

    def transposed(self) -> Shift:
        return Shift(self.delta.mT)

    def narrow(self, start: int, length: int) -> Shift:
        return Shift(self.delta.narrow(1, start, length))

    def of_member(self, member: int) -> Shift:
        return Shift(of_member(self.delta, member))

    def explicit(self, weight: Tensor, member: int, row: int) -> Tensor:
        return weight + self.delta[member if self.delta.shape[0] > 1 else 0].to(weight.dtype)

    def term(self, fold: Fold, op: Op, x: Tensor, layout: Layout, dims: tuple[int, int], transposed: bool,
             groups: int) -> Tensor:  # fmt: skip
        """``delta x``; see :meth:`LowRankFactors.term`."""
        delta = self.delta.mT if transposed else self.delta
        if dims[0] != dims[1] or delta.dim() != 3:
            raise ValueError("a whole matrix for every member works for linear layers only: use low-rank factors here")
        return mix(fold, x, delta, dims[0], layout)


def with_rows(fold: Fold, x: Tensor, layout: Layout) -> tuple[Tensor, Layout]:
    """A tensor that does not depend on the sample, repeated for all samples on axis 0; other tensors are unchanged."""
    if layout.dim is not None:
        return x, layout
    x = x if x.dim() and x.shape[0] == 1 else x.unsqueeze(0)
    return x.expand(fold.members * fold.rows, *x.shape[1:]), Layout(0)


def mix(fold: Fold, x: Tensor, factor: Tensor, dim: int, layout: Layout) -> Tensor:
    """``y[..., i, ...] = sum_j factor[m, i, j] x[..., j, ...]`` along the axis ``dim``, m the member of the entry.

    :param factor: ``[members | 1, i, j]``, or ``[members | 1, groups, i, j]`` for each group of channels on its own.
    :param dim: counted from the end.
    """
    factor = factor.to(x.dtype)
    if factor.shape[0] == 1:
        return x @ factor[0].mT if dim == -1 else _mix(x.unsqueeze(0), factor, dim).squeeze(0)
    assert layout.dim is not None
    axis = layout.dim
    behind = axis - x.dim() > dim  # the rows come after the features, as in W @ x
    y = _mix(_by_member(fold, x, layout), factor, dim - behind)
    return y.movedim(0, axis + 1).flatten(axis, axis + 2)


def _by_member(fold: Fold, x: Tensor, layout: Layout) -> Tensor:
    """``[..., outer * members * rows * inner, ...] -> [members, ..., outer, rows * inner, ...]``."""
    assert layout.dim is not None
    sizes = (layout.outer, fold.members, fold.rows * layout.inner)
    return x.unflatten(layout.dim, sizes).movedim(layout.dim + 1, 0)


def _mix(x: Tensor, factor: Tensor, dim: int) -> Tensor:
    """As :func:`mix`, with the members on axis 0 of both."""
    if dim == -1:
        return torch.matmul(x.flatten(1, -2), factor.mT).unflatten(1, x.shape[1:-1])
    rest = x.shape[dim + 1 :]
    x = x.flatten(dim + 1)
    if factor.dim() == 4:
        x = x.unflatten(-2, (factor.shape[1], -1))
    lead = (1,) * (x.dim() - factor.dim())
    y = torch.matmul(factor.reshape(factor.shape[:1] + lead + factor.shape[1:]), x)
    return (y if factor.dim() == 3 else y.flatten(-3, -2)).unflatten(-1, rest)


def _each_member(fold: Fold, run: Callable[..., Tensor], x: Tensor, layout: Layout, *factors: Tensor) -> Tensor:
    """``run(x_m, *factors_m)`` for the rows of every member m; factors ``[members | 1, ...]``."""
    if factors[0].shape[0] == 1:
        return run(x, *(f[0].to(x.dtype) for f in factors))
    assert layout.dim is not None
    axis = layout.dim
    parts = _by_member(fold, x, layout).unbind(0)
    results = [
        run(part.flatten(axis, axis + 1), *(f.to(x.dtype) for f in own))
        for part, *own in zip(parts, *factors, strict=True)
    ]
    if layout.outer == 1:
        return torch.cat(results, axis)
    return torch.stack([y.unflatten(axis, (layout.outer, -1)) for y in results], axis + 1).flatten(axis, axis + 2)


class _Convolution(torch.autograd.Function):
    """``x * (W + B A) + b``. Gradients of A and B come from convolutions with few channels, not through that of W."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, options: Options) -> Tensor:
        return torch.convolution(x, _merged(weight, a, b), bias, *options, False, [0] * (x.dim() - 2), 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[object, ...], output: Tensor) -> None:
        x, weight, bias, a, b, ctx.options = inputs
        ctx.save_for_backward(x, weight, a, b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        rest = (*ctx.options, False, [0] * (x.dim() - 2), 1)
        into = torch.ops.aten.convolution_backward
        wants_x, wants_weight, wants_bias, wants_a, wants_b, _ = ctx.needs_input_grad
        of_x, of_weight, of_bias = into(
            *(grad, x, _merged(weight, a, b), [weight.shape[0]], *rest),
            output_mask=[wants_x, wants_weight, wants_bias],
        )
        of_a = of_b = None
        if wants_a:
            # matmul of a matrix and a batch would copy the gradient, with its axes permuted
            narrow = torch.bmm(b.t().expand(len(grad), -1, -1), grad.flatten(2)).unflatten(-1, grad.shape[2:])
            of_a = into(narrow, x, a, None, *rest, output_mask=[False, True, False])[1]
        if wants_b:
            narrow = torch.convolution(x, a, None, *rest)
            of_b = torch.matmul(grad.flatten(2), narrow.flatten(2).mT).sum(0)
        return of_x, of_weight, of_bias, of_a, of_b, None


class _Linear(torch.autograd.Function):
    """``x (W + B A)^T + b``. Gradients of A and B come from products with few rows, not through that of W.

    On CPUs products of the same numbers with few columns take up to twenty times as long.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(x, _merged(weight, a, b), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x, weight, _, a, b = inputs
        ctx.save_for_backward(x, weight, a, b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, wants_a, wants_b = ctx.needs_input_grad
        rows, of_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        return (
            grad @ _merged(weight, a, b) if wants_x else None,
            of_rows.t() @ rows if wants_weight else None,
            of_rows.sum(0) if wants_bias else None,
            (b.t() @ of_rows.t()) @ rows if wants_a else None,
            ((a @ rows.t()) @ of_rows).t() if wants_b else None,
        )


def _merged(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.addmm(weight.flatten(1), b, a.flatten(1)).view_as(weight)


def look_up(fold: Fold, factors: LowRankFactors, index: Tensor, layout: Layout) -> Tensor:
    """``scale B[i] A`` for the entries i of ``index``, each with the factors of its own member."""
    if factors.B.shape[0] == 1:
        return mix(fold, factors.B[0][index] * factors.scale, factors.A.mT, -1, layout)
    assert layout.dim is not None
    axis, sizes = layout.dim, (layout.outer, fold.members, fold.rows * layout.inner)
    member = torch.arange(fold.members, device=index.device).view(1, -1, 1).expand(sizes).reshape(-1)
    member = member.view((-1,) + (1,) * (index.dim() - axis - 1))
    return mix(fold, factors.B[member, index] * factors.scale, factors.A.mT, -1, layout)
