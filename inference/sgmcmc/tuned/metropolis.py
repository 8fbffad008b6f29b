"""Generalised Hamiltonian Monte Carlo: SGHMC for exact gradients, with a Metropolis test of every step.

With v the momentum, N(0, T), and leapfrog steps of size h in units of the scales (Horowitz, Physics Letters B 1991)::

    v         <- (1 - friction) v + sqrt((1 - (1 - friction)^2) T) xi
    half      = v - h scale grad U(theta) / 2
    theta'    = theta + h scale half
    v'        = half - h scale grad U(theta') / 2
    (theta, v) <- (theta', v') with probability min(1, exp(-(H' - H) / T)),  else (theta, -v)

It leaves ``exp(-H / T)`` invariant for every h. A rejection reverses the momentum, and the chain retraces its path. To
keep paths long, the tests of a chain share one variable that moves slowly through (-1, 1): rejections then come close
together (Neal 2020, arXiv 2001.11950).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_bnn.inference.sgmcmc.tuned.tuner import DIVERGED, leapfrog_error

#: how far the variable of the tests moves in a step, and the width of what is random of it
DRIFT, JITTER = 0.03, 0.02


class MetropolisSteps:
    """The state of steps beside theta and the momentum: gradient and energy at theta, and the variable of the tests.

    ``threshold`` is that variable, ``[chains]``, uniform in (-1, 1) and independent of theta; a proposal is accepted
    when its absolute value is below ``exp(-(H' - H) / T)``.

    :param evaluate: gives ``grad U [chains, dim]`` and ``U [chains]`` at theta, as tensors of their own.
    :param theta: the state, ``[chains, dim]``, which steps move in place.
    """

    def __init__(self, evaluate: Callable[[], tuple[Tensor, Tensor]], theta: Tensor) -> None:
        self._evaluate, self._theta = evaluate, theta
        self.threshold = 2 * torch.rand_like(theta[:, 0]) - 1
        self._known: tuple[Tensor, Tensor] | None = None

    def forget(self) -> None:
        """To be called when theta was moved from outside."""
        self._known = None

    def here(self) -> tuple[Tensor, Tensor]:
        """``grad U`` and U at theta."""
        if self._known is None:
            self._known = self._evaluate()
        return self._known

    def step(
        self, momentum: Tensor, scale: Tensor, step_size: float, friction: float, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """One step, in place.

        :return: the energy error in units of T, and whether the proposal was rejected, ``[chains]``.
        """
        grad, energy = self.here()
        kick = step_size * scale
        momentum.mul_(1 - friction)
        momentum.add_(torch.randn_like(momentum), alpha=math.sqrt((1 - (1 - friction) ** 2) * temperature))
        half = momentum - kick * grad / 2
        before = self._theta.clone()
        self._theta.add_(kick * half)
        new_grad, new_energy = self._evaluate()
        error = leapfrog_error(new_energy - energy, half, kick * grad, kick * new_grad) / temperature
        error = error.nan_to_num(DIVERGED, DIVERGED, DIVERGED)
        moved = (self.threshold + DRIFT + JITTER * torch.rand_like(self.threshold) + 1) % 2 - 1
        accepted = moved.abs() < torch.exp(-error)
        self.threshold = torch.where(accepted, (moved * torch.exp(error.clamp(max=50.0))).clamp(-1, 1), moved)
        chosen = accepted[:, None]
        self._theta.copy_(torch.where(chosen, self._theta, before))
        momentum.copy_(torch.where(chosen, half - kick * new_grad / 2, -momentum))
        self._known = torch.where(chosen, new_grad, grad), torch.where(accepted, new_energy, energy)
        return error, ~accepted
