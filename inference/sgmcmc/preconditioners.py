"""Preconditioners of SGHMC: tau, one number for each coordinate, which adapts during warm-up only.

Each keeps the square root of tau, by which the step of :mod:`~pyro_bnn.inference.sgmcmc.sghmc` multiplies gradient and
momentum. With g = grad U / N the mean-loss gradient::

    rmsprop     V <- 0.99 V + 0.01 g^2,    M = sqrt(V) + 0.1 mean sqrt(V),    tau = mean(M) / M
    adaptive    rho <- rho - 0.1 (h^1.5 sqrt(T / N) xi g - 1 / (N tau)),      tau = sigmoid(rho)

The first is that of Li et al. (AAAI 2016), the second the mirror descent of Ke and Fan (2022, arXiv 2210.12957), where
xi is the noise of the previous step.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Preconditioner = Literal["identity", "rmsprop", "adaptive"]
#: decay of the running second moment of "rmsprop", and its damping relative to the mean
RMSPROP_DECAY, RMSPROP_DAMPING = 0.99, 0.1
#: rate of the mirror descent of "adaptive"
ADAPTIVE_RATE = 0.1


class Identity:
    """tau = 1, and the base class of the others.

    ``root`` is the square root of tau, ``[*chains, dim]``, or ``None`` for 1. ``noise`` is the buffer into which a step
    writes its noise, or ``None`` for a preconditioner that does not need it.
    """

    root: Tensor | None = None
    noise: Tensor | None = None

    def adapt(self, grad: Tensor, *, step_size: float, temperature: float, num_data: int) -> None:
        """Updates tau with a gradient of U, ``[*chains, dim]``."""

    def recover(self) -> None:
        """Removes the NaN and infinite values that a diverged state has left."""


class Scales(Identity):
    """tau = N scale^2, with a scale for each coordinate that :mod:`~pyro_bnn.inference.sgmcmc.tuned.tuner` finds.

    :param like: a buffer of the shape of the state, ``[*chains, dim]``.
    """

    root: Tensor

    def __init__(self, like: Tensor, num_data: int) -> None:
        self._root_of_size = math.sqrt(num_data)
        self.root = torch.full_like(like, self._root_of_size)

    def set(self, scale: Tensor) -> None:
        """:param scale: of every coordinate, ``[dim]``."""
        self.root.copy_(scale * self._root_of_size)


class RMSProp(Identity):
    """tau from the running second moment of the gradient.

    :param like: a buffer of the shape of the state, ``[*chains, dim]``.
    """

    def __init__(self, like: Tensor) -> None:
        self.root = torch.ones_like(like)
        self._moment = torch.zeros_like(like)

    def adapt(self, grad: Tensor, *, step_size: float, temperature: float, num_data: int) -> None:
        self._moment.mul_(RMSPROP_DECAY).addcmul_(grad, grad, value=(1 - RMSPROP_DECAY) / num_data**2)
        mass = self._moment.sqrt()
        mass += RMSPROP_DAMPING * mass.mean(-1, keepdim=True) + torch.finfo(mass.dtype).tiny
        self.root = (mass.mean(-1, keepdim=True) / mass).sqrt_()

    def recover(self) -> None:
        self._moment.nan_to_num_(0.0, 0.0, 0.0)
        assert self.root is not None
        if not bool(torch.isfinite(self.root).all()):
            self.root = torch.ones_like(self.root)


class MirrorDescent(Identity):
    """tau in (0, 1), from the product of gradient and noise.

    :param like: a buffer of the shape of the state, ``[*chains, dim]``.
    """

    root: Tensor
    noise: Tensor

    def __init__(self, like: Tensor) -> None:
        self.noise = torch.zeros_like(like)
        self._rho = torch.zeros_like(like)
        self.root = self._rho.sigmoid().sqrt()

    @property
    def tau(self) -> Tensor:
        """``sigmoid(rho)``."""
        return self._rho.sigmoid()

    def adapt(self, grad: Tensor, *, step_size: float, temperature: float, num_data: int) -> None:
        spread = step_size**1.5 * math.sqrt(temperature / num_data)
        self.descend(self.noise * grad * (spread / num_data) - 1 / (num_data * self.tau))

    def descend(self, slope: Tensor) -> None:
        """``rho <- rho - 0.1 slope``."""
        self.root = self._rho.add_(slope, alpha=-ADAPTIVE_RATE).sigmoid().sqrt_()

    def recover(self) -> None:
        self._rho.nan_to_num_(0.0, 0.0, 0.0)
        self.noise.nan_to_num_(0.0, 0.0, 0.0)
        self.root = self._rho.sigmoid().sqrt()


def preconditioner_for(name: Preconditioner, like: Tensor) -> Identity | RMSProp | MirrorDescent:
    """The preconditioner of that name, for the start of a chain."""
    if name == "rmsprop":
        return RMSProp(like)
    return MirrorDescent(like) if name == "adaptive" else Identity()
