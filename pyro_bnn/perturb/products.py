"""The rules for linear layers, convolutions, products of matrices and embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_bnn.perturb.factors import Rank1Factors, Replacement
from pyro_bnn.perturb.layout import Layout
from pyro_bnn.perturb.low_rank import LowRankFactors, look_up, with_rows
from pyro_bnn.perturb.mode import Call, register, shape_of

_WEIGHTS = ("weight", "bias")


@register(F.linear, signature=("input", "weight", "bias"), weights=_WEIGHTS)
def _linear(call: Call) -> Tensor:
    return call.mode.product(F.linear, call.input, call.weight, getattr(call, "bias", None), dims=(-1, -1))


def _register_convolution(function: Callable[..., Tensor], spatial: int, transposed: bool) -> None:
    options = ("stride", "padding") + (
        ("output_padding", "groups", "dilation") if transposed else ("dilation", "groups")
    )
    channel = -spatial - 1

    @register(function, signature=("input", "weight", "bias", *options), weights=_WEIGHTS)
    def _convolution(call: Call) -> Tensor:
        rest = call.rest("input", "weight", "bias")
        factors = call.perturbation(call.weight)
        if isinstance(factors, LowRankFactors) and not transposed and rest.get("groups", 1) == 1:
            y = _merged_convolution(call, factors, spatial, rest)
            if y is not None:
                return y
        return call.mode.product(
            lambda x, w, b: function(x, w, b, **rest),
            call.input,
            call.weight,
            getattr(call, "bias", None),
            dims=(channel, channel),
            transposed=transposed,
            groups=rest.get("groups", 1),
            ungrouped=lambda x, w, b: function(x, w, b, **rest | {"groups": 1}),
        )


def _merged_convolution(call: Call, factors: LowRankFactors, spatial: int, rest: dict[str, Any]) -> Tensor | None:
    """The convolution with the summed weight; ``None`` for padding by name and for one image without a batch axis."""
    shared = factors.A.shape[0] == factors.B.shape[0] == 1
    if isinstance(rest.get("padding"), str) or (shared and call.input.dim() != spatial + 2):
        return None
    options = tuple(
        [n] * spatial if isinstance(n := rest.get(name, default), int) else list(n)
        for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))
    )
    mode, bias = call.mode, call.arguments.get("bias")
    offset = call.perturbation(bias)
    layout = mode.locate(call.input, call.weight)
    x, layout = (call.input, layout) if shared else with_rows(mode.fold, call.input, layout)
    y = factors.convolve(mode.fold, x, call.weight, bias if offset is None else None, layout, options)  # type: ignore[arg-type]
    if isinstance(offset, Replacement):
        return mode.combine(torch.add, y, offset.value, -spatial - 1, layout)
    return y


for _spatial, _plain, _transposed in (
    (1, torch.conv1d, torch.conv_transpose1d),
    (2, torch.conv2d, torch.conv_transpose2d),
    (3, torch.conv3d, torch.conv_transpose3d),
):
    _register_convolution(_plain, _spatial, transposed=False)
    _register_convolution(_transposed, _spatial, transposed=True)


@register(F.bilinear, signature=("input1", "input2", "weight", "bias"), weights=_WEIGHTS)
def _bilinear(call: Call) -> Tensor:
    def op(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        other = call.input2
        if x.dim() != other.dim():
            other = other.expand(x.shape[:1] + other.shape)
        return F.bilinear(x, other.expand(x.shape[:-1] + other.shape[-1:]), w, b)

    factors = call.perturbation(call.weight)
    if isinstance(factors, LowRankFactors):
        raise ValueError(
            f"the bilinear layer of {call.mode.names[id(call.weight)]!r} has no low-rank rule: leave it out with "
            "`select=`"
        )
    return call.mode.product(op, call.input1, call.weight, getattr(call, "bias", None), dims=(-1, -1))


@register(torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__, signature=("left", "right"))
def _matmul(call: Call) -> Tensor:
    left, right = list(call.args) + list(call.kwargs.values())  # the second is called other, mat2 or mat
    if call.perturbation(right) is not None:
        return call.mode.product(lambda x, w, b: torch.matmul(x, w), left, right, None, dims=(-1, -1), transposed=True)
    return call.mode.product(lambda x, w, b: torch.matmul(w, x), right, left, None, dims=(-2, -2))


@register(torch.addmm, Tensor.addmm, signature=("bias", "input", "weight"), weights=_WEIGHTS)
def _addmm(call: Call) -> Tensor:
    """``Conv1D`` of the transformers library: a linear layer that stores its weight as [in, out]."""
    if call.rest("bias", "input", "weight"):
        raise TypeError("torch.addmm with beta or alpha has no rule; write the product with F.linear")
    op = lambda x, w, b: torch.matmul(x, w) if b is None else torch.addmm(b, x, w)  # noqa: E731
    return call.mode.product(op, call.input, call.weight, call.bias, dims=(-1, -1), transposed=True)


@register(
    F.embedding,
    signature=("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
    weights=("weight",),
)
def _embedding(call: Call) -> Tensor:
    """Row ``i`` of the table is ``W[i] * r[i] * s``."""
    mode, index, factors = call.mode, call.input, call.perturbation(call.weight)
    if call.arguments.get("max_norm") is not None:
        raise ValueError(
            f"the embedding {mode.names[id(call.weight)]!r} has max_norm, which rescales rows of the table by their "
            "length: that has no rank-1 form. Remove max_norm, or leave the embedding out with `select=`."
        )
    y = F.embedding(**call.arguments)
    layout = mode.locate(index, call.weight)
    if isinstance(factors, LowRankFactors):
        if factors.B.shape[0] > 1:
            index, layout = with_rows(mode.fold, index, layout)
        return _but_padding(call, index, y + look_up(mode.fold, factors, index, layout).to(y.dtype))
    assert isinstance(factors, Rank1Factors)
    if factors.r.shape[:2] == (1, 1):
        y = y * factors.r[0, 0][index].unsqueeze(-1).to(y.dtype)
    else:
        rows = mode.fold.members * mode.fold.rows
        row = torch.arange(rows, device=index.device)
        if layout.dim is None:
            index = index if index.dim() and index.shape[0] == 1 else index.unsqueeze(0)
            y, layout = y.reshape(index.shape + y.shape[-1:]), Layout(0)
        else:
            row = row.view(1, -1, 1).expand(layout.outer, rows, layout.inner).reshape(-1)
        assert layout.dim is not None
        row = row.view(shape_of(index.dim(), {layout.dim: row.numel()}))
        member = row // mode.fold.rows if factors.r.shape[0] > 1 else 0
        sample = row % mode.fold.rows if factors.r.shape[1] > 1 else 0
        y = y * factors.r[member, sample, index].unsqueeze(-1).to(y.dtype)
    return _but_padding(call, index, mode.combine(torch.mul, y, factors.s, -1, layout))


def _but_padding(call: Call, index: Tensor, y: Tensor) -> Tensor:
    """``y`` where the padding row has no gradient, and no factors unless the table has another use."""
    padding = call.arguments.get("padding_idx")
    if padding is None:
        return y
    row = padding % call.weight.shape[0]
    fixed = call.weight[row].to(y.dtype) if id(call.weight) in call.mode.padded else y
    return torch.where((index == row).unsqueeze(-1), fixed.detach(), y)


_TRANSPOSES: tuple[object, ...] = (
    Tensor.t,
    torch.t,
    vars(torch._C.TensorBase)["T"].__get__,
    vars(torch._C.TensorBase)["mT"].__get__,
)


@register(*_TRANSPOSES, signature=("input",), consumes=False)
def _transpose(call: Call) -> Tensor:
    factors = call.perturbation(call.input)
    assert factors is not None and not isinstance(factors, Replacement)
    return call.mode.derive(call.func(call.input), call.input, factors.transposed())


@register(
    *(Tensor.to, Tensor.type_as, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.contiguous),
    signature=("input",),
    consumes=False,
)
def _cast(call: Call) -> Tensor:
    perturbation = call.perturbation(call.input)
    result = call.func(*call.args, **call.kwargs)
    return result if perturbation is None else call.mode.derive(result, call.input, perturbation)
