"""How particles act on each other: from their gradients and a kernel to the direction in which each moves."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from pyro_bnn.inference.stein.groups import Group
from pyro_bnn.inference.stein.kernels import Kernel
from pyro_bnn.inference.stein.members import Force
from pyro_bnn.inference.stein.particles import Segment
from pyro_bnn.inference.stein.positions import Positions


def interact(
    kernel: Kernel, blocks: list[nn.Parameter], group: Group, strength: float, method: Literal["svgd", "wgd"]
) -> None:
    """Turns ``gamma grad U`` in ``.grad`` into ``-phi`` in the coordinates of one kernel; see SVGD for phi.

    :param blocks: of particles, ``[n, d]`` each.
    :param strength: lambda, in the units of the gradients.
    """
    flat = [blocks[b][:, start:stop] for b, start, stop in group.columns]
    gradients = [_gradient(blocks[b])[:, start:stop] for b, start, stop in group.columns]
    factors = []
    for a, b, scale in group.pairs:
        for segment in (a, b):
            gradients.append(_gradient(blocks[segment.block])[:, segment.start : segment.stop])
        factors.append((_factor(blocks, a).flatten(2), _factor(blocks, b).flatten(2), scale))
    points = Positions(flat, factors)
    values = points.evaluate(kernel)
    own, pulled = points.gradients(values, own=method == "wgd")
    forces = [*own, *(half.flatten(1) for pair in pulled for half in pair)]
    n = len(values.value)
    for gradient, force in zip(gradients, forces, strict=True):
        if method == "wgd":
            gradient += force * (strength / values.value.sum(1, keepdim=True)).to(force)
        else:
            gradient.copy_(torch.addmm(force, values.value.to(gradient), gradient, beta=-strength / n, alpha=1 / n))


def force_in_outputs(kernel: Kernel, strength: float) -> Force:
    """Repulsion in the space of function values, ``-lambda (sum_j grad_{f_i} k_ij) / (sum_j k_ij)``."""

    def force(f: Tensor) -> Tensor:
        with torch.autocast(f.device.type, enabled=False):
            points = Positions([f])
            values = points.evaluate(kernel)
            (gradient,), _ = points.gradients(values, own=True)
            return -gradient * (strength / values.value.sum(1, keepdim=True)).to(gradient)

    return force


def _gradient(block: nn.Parameter) -> Tensor:
    assert block.grad is not None
    return block.grad


def _factor(blocks: list[nn.Parameter], segment: Segment) -> Tensor:
    block = blocks[segment.block]
    return block[:, segment.start : segment.stop].reshape(-1, *segment.shape)
