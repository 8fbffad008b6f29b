"""The rules for normalisation layers: one normalisation, then separate gains and biases for every row.

    y = normalise(x) * weight + bias

Statistics do not depend on gains and biases, so all members are normalised in one call.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_bnn.perturb.factors import Rank1Factors, Replacement
from pyro_bnn.perturb.layout import Layout
from pyro_bnn.perturb.mode import Call, Perturb, register

_AFFINE = ("weight", "bias")


def _register(function: Callable[..., Tensor], *signature: str) -> None:
    @register(function, signature=("input", *signature), weights=_AFFINE, product=False)
    def _normalisation(call: Call) -> Tensor:
        parameters = [call.arguments.get(name) for name in _AFFINE]
        own = [p for p in parameters if p is not None and call.perturbation(p) is not None]
        if not own:
            return function(**call.arguments)
        y = function(**call.rest(*_AFFINE))
        if "normalized_shape" not in signature:
            return _affine(call.mode, y, parameters, 1, own[0])
        axes = tuple(call.normalized_shape)
        return _affine(call.mode, y.flatten(-len(axes)), parameters, -1, own[0]).unflatten(-1, axes)


def _affine(mode: Perturb, y: Tensor, parameters: list[Tensor | None], channel: int, own: Tensor) -> Tensor:
    """``y * weight + bias`` along the axis ``channel``.

    :param own: the gain or bias whose layout says where the samples are.
    """
    layout = mode.locate(y, own)
    operations: tuple[Callable[..., Tensor], ...] = (torch.mul, torch.add)
    for op, parameter in zip(operations, parameters, strict=True):
        if parameter is None:
            continue
        values = _values(mode, parameter)
        y = mode.combine(op, y, values, channel, layout)
        if layout.dim is None and values.shape[:2] != (1, 1):
            layout = Layout(0)  # the result just got an axis for the rows
    return y


def _values(mode: Perturb, parameter: Tensor) -> Tensor:
    """The elements of a gain or bias for every row, ``[members | 1, rows | 1, n]``."""
    perturbation = mode.perturbations.get(id(parameter))
    if perturbation is None:
        return parameter.reshape(1, 1, -1)
    if isinstance(perturbation, Replacement):
        return perturbation.value
    if not isinstance(perturbation, Rank1Factors):
        raise ValueError(
            f"{mode.names[id(parameter)]!r} of a normalisation layer has no low-rank rule: leave it out with `select=`"
        )
    outer = perturbation.r.unsqueeze(-1) * perturbation.s.unsqueeze(-2)
    return (outer.unsqueeze(-1) * parameter.reshape(*parameter.shape[:2], -1)).flatten(2)


_register(F.batch_norm, "running_mean", "running_var", *_AFFINE, "training", "momentum", "eps")
_register(F.instance_norm, "running_mean", "running_var", *_AFFINE, "use_input_stats", "momentum", "eps")
_register(F.group_norm, "num_groups", *_AFFINE, "eps")
_register(F.layer_norm, "normalized_shape", *_AFFINE, "eps")
_register(F.rms_norm, "normalized_shape", "weight", "eps")
