"""The steps of SGHMC with ``step_size="auto"``: in warm-up they are watched, and with exact gradients always tested."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from pyro_bnn.inference.potential import Potential
from pyro_bnn.inference.sgmcmc.gradient import Gradient
from pyro_bnn.inference.sgmcmc.streams import Streams
from pyro_bnn.inference.sgmcmc.tuned.metropolis import MetropolisSteps
from pyro_bnn.inference.sgmcmc.tuned.tuner import DIVERGED, LEAST_STEPS, Settings, Tuner, leapfrog_error

#: difference of two gradients, of the largest, that is due to the order in which rows are added up
SAME_GRADIENT = 1e-4


class Tunable(Protocol):
    """What is needed of a kernel: for its parts see :class:`~pyro_bnn.inference.SGHMC`."""

    theta: Tensor
    momentum: Tensor
    temperature: float
    thinning: int
    potential: Potential
    gradient: Gradient
    streams: Streams

    @property
    def is_warming_up(self) -> bool: ...
    def force(self, *batch: object) -> Tensor: ...
    def update(self, grad: Tensor, position: int) -> None: ...
    def mark_origin(self) -> None: ...
    def measure_configuration(self, grad: Tensor, position: int) -> None: ...
    def set_scale(self, scale: Tensor) -> None: ...


class TunedSteps:
    """What a kernel whose settings warm-up finds does in place of plain steps. All of its state is here.

    :param kernel: a kernel that has been set up.
    :param num_steps: steps of warm-up.
    :param friction: the one that was asked for; ``None`` to tune it.
    :param tunes_thinning: whether to set the thinning at the end of warm-up.
    :raises ValueError: when warm-up is too short.
    """

    def __init__(self, kernel: Tunable, num_steps: int, friction: float | None, *, tunes_thinning: bool) -> None:
        if num_steps < LEAST_STEPS:
            raise ValueError(
                f"warm-up has {num_steps} steps (warmup_steps times thinning={kernel.thinning}): step_size='auto' "
                f"needs at least {LEAST_STEPS} to find its settings. Give more warmup_steps, or a step_size and a "
                "friction"
            )
        self._kernel = kernel
        self.settings = Settings(1.0, 1.0, kernel.thinning)
        self._theta, self._momentum = by_chain(kernel.theta), by_chain(kernel.momentum)
        self.tuner = Tuner(
            self._theta,
            num_steps,
            self._is_exact(),
            kernel.temperature,
            friction,
            self.settings,
            tunes_thinning=tunes_thinning,
        )
        self._tested = MetropolisSteps(self._next, self._theta) if self.tuner.is_exact else None
        self._previous: Tensor | None = None
        self._rejected, self._tests = kernel.theta.new_zeros(()), 0

    @property
    def is_exact(self) -> bool:
        """Whether every step has the gradient of the whole data, and so a Metropolis test."""
        return self.tuner.is_exact

    @property
    def acceptance(self) -> float:
        """Share of the proposals after warm-up that were accepted; NaN without tests."""
        return 1 - float(self._rejected) / self._tests if self._tests else math.nan

    def forget(self) -> None:
        """Forgets the state before theta was moved from outside."""
        self._previous = None
        if self._tested is not None:
            self._tested.forget()

    def advance(self, position: int, *batch: object) -> None:
        """One step.

        :param position: number of the step within the draw.
        """
        if self._tested is not None and not self.tuner.is_settling:
            self._tested_step(self._tested, position)
        else:
            self._watched_step(position, *batch)

    def _tested_step(self, steps: MetropolisSteps, position: int) -> None:
        kernel, use = self._kernel, self.settings
        if position == 0:
            kernel.mark_origin()
        error, rejected = steps.step(self._momentum, self.tuner.scale, use.step_size, use.friction, kernel.temperature)
        grad, energy = steps.here()
        kernel.gradient.energy = energy.view(kernel.theta.shape[:-1])
        if kernel.is_warming_up:
            self._tune(grad, error, error >= DIVERGED)
            return
        self._rejected += rejected.to(self._rejected.dtype).mean()
        self._tests += 1
        kernel.measure_configuration(grad.view_as(kernel.theta), position)

    def _watched_step(self, position: int, *batch: object) -> None:
        """A plain step of warm-up whose energy error is measured on its own minibatch."""
        kernel = self._kernel
        before, (grad, energy) = self._theta.clone(), self._at(*batch)
        if self._previous is not None:
            self.tuner.observe_noise(grad, self._previous)
        kernel.update(grad.view_as(kernel.theta), position)
        kick = self.settings.step_size * self.tuner.scale
        new_grad, new_energy = self._at(*batch)
        change = new_energy - energy
        error = leapfrog_error(change, self._momentum, kick * grad, kick * new_grad) / kernel.temperature
        diverged = ~(error.abs() < torch.clamp(change.abs() / kernel.temperature, min=DIVERGED))
        if bool(diverged.any()):  # these chains stay where they were, with a new momentum
            gone = diverged[:, None]
            fresh = torch.randn_like(self._momentum) * math.sqrt(kernel.temperature)
            self._theta.copy_(torch.where(gone, before, self._theta))
            self._momentum.copy_(torch.where(gone, fresh, self._momentum))
            new_grad = torch.where(gone, grad, new_grad)
            kernel.gradient.energy = torch.where(diverged, energy, new_energy).view(kernel.theta.shape[:-1])
        self._tune(new_grad, error, diverged, change / kernel.temperature)
        self._previous = new_grad

    def _tune(self, grad: Tensor, error: Tensor, diverged: Tensor, change: Tensor | None = None) -> None:
        if self.tuner.update(self._theta, grad, error, diverged, change):
            self._kernel.set_scale(self.tuner.scale)

    def _next(self) -> tuple[Tensor, Tensor]:
        return self._at(*self._kernel.streams.next())

    def _at(self, *batch: object) -> tuple[Tensor, Tensor]:
        """``grad U [chains, dim]`` and ``U [chains]`` at theta."""
        kernel = self._kernel
        with torch.enable_grad():  # one chain is differentiated by autograd
            grad = by_chain(kernel.force(*batch)).clone()
        return grad, kernel.gradient.energy.expand(kernel.theta.shape[:-1]).reshape(-1).clone()

    def _is_exact(self) -> bool:
        """Whether successive minibatches have the same gradient, to rounding, at a starting point."""
        kernel = self._kernel
        with torch.no_grad():
            start = kernel.potential.start()
            self._theta.copy_(start.expand_as(self._theta))
            one, other = (self._next()[0] for _ in range(2))
            self._theta.zero_()
        return bool(((one - other).abs() <= SAME_GRADIENT * one.abs().max()).all())


def by_chain(flat: Tensor) -> Tensor:
    """A view ``[chains, dim]`` of a buffer like theta."""
    return flat.view(-1, flat.shape[-1])
