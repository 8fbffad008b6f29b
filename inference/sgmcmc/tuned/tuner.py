"""How SGHMC finds its own settings in warm-up: a scale for each coordinate, the step size, friction and thinning.

Warm-up starts with all scales equal, continues with windows of growing length, and ends with a phase in which only the
step size moves. At the end of each window, with x_i a coordinate and g_i its part of ``grad U``::

    scale_i <- (Var x_i / Var g_i)^(1/4)

which is the standard deviation of x_i for a Gaussian with a diagonal covariance, and is smaller where minibatches make
g_i noisy. All chains together have one scale for each coordinate. The step size h is in units of these scales.

h is set by the error of the energy H = U + u^2 / 2 (in units of T) in single leapfrog steps. For a Gaussian, leapfrog
steps of size h (in standard deviations) have stationary variances that are ``1 / (1 - h^2 / 4)`` times too large, and
their energy error has the variance h^6 / 16 for each coordinate. So the bias b = h^2 / 4 is held by::

    E[error^2] = 4 b^3 dim

which is measured on the minibatch of each step. Far from the posterior a step changes U by much more than the
``h sqrt(dim)`` that it does there, and its error is larger by the same factor; the bias is then held by
``E[error^2] = b^2 E[change of U^2]``, which is the same where the chain is stationary. Where the gradient is exact, a
Metropolis test makes the chain exact, and h is set so that a given share of its proposals is accepted, by dual
averaging.

Friction makes the momentum forget itself along a path of ``PATH`` standard deviations, ``1 - exp(-h / PATH)``, or
sooner where minibatches would heat the chain: the heating, ``h^2 scale_i^2 Var(noise of g_i) / (2 friction T)`` on
average over coordinates, is held below ``HEATING``. In the first phase, which finds the posterior, steps are not
tested, their heating is not limited, and the friction is at least ``SETTLING``. A draw is ``PATHS_PER_DRAW`` such
paths.

Sources: the scales, Seyboldt, Carlson and Carpenter (2026, arXiv 2603.18845) for the ratio of variances; windows, Stan;
the energy error, Robnik and Seljak (2024, arXiv 2212.08549); dual averaging, Hoffman and Gelman (JMLR 2014).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from pyro.ops.dual_averaging import DualAveraging
from pyro.ops.welford import WelfordCovariance
from torch import Tensor

#: relative bias of variances, b, that the step size of minibatch steps may cause; and the heating by their noise
BIAS, HEATING = 0.03, 0.05
#: share of proposals that are accepted where the gradient is exact; h^2 grows to where others are rejected
ACCEPTANCE = 0.97
#: standard deviations along which the momentum forgets itself
PATH = 1.5
#: least friction of the first phase, a momentum of .9: it takes away the energy that is set free on the way
SETTLING = 0.1
#: such paths for each draw
PATHS_PER_DRAW = 4
#: most steps for a draw: where the step size is so small, more of them would not help
MOST_STEPS = 1000
#: share of warm-up before the first window and after the last; shortest window as a share
FIRST, LAST, WINDOW = 0.15, 0.15, 0.05
#: a leapfrog step of a Gaussian is stable up to 2
FIRST_STEP, LARGEST, SMALLEST = 0.01, 1.4, 1e-8
#: energy error beyond which a step counts as diverged
DIVERGED = 1000.0
#: steps over which energy errors are averaged, and noise
MEMORY, NOISE_MEMORY = 75, 100
#: fewest steps of warm-up
LEAST_STEPS = 200


@dataclass
class Settings:
    """What a step of SGHMC uses.

    :param step_size: h.
    :param friction: in (0, 1].
    :param thinning: steps for each draw.
    """

    step_size: float
    friction: float
    thinning: int


class ByEnergyError:
    """h at which the mean square of the energy error is ``target``, as its mean square grows with h^6.

    The target is larger for a step that changes U by more than three times what is usual of that bias; see above.
    Errors are averaged with weights that fall with their distance from the target in orders of magnitude, so that a few
    steps out of proportion do not decide alone.
    """

    def __init__(self, step_size: float, dim: int) -> None:
        self.step_size, self._target = step_size, 4 * BIAS**3 * dim
        self._errors = self._weights = 0.0
        self._largest = LARGEST

    def update(self, errors: Tensor, diverged: Tensor, changes: Tensor | None) -> None:
        """:param errors, diverged, changes: see :meth:`Tuner.update`."""
        if bool(diverged.any()):
            self._largest = 0.8 * self.step_size
        target = torch.full_like(errors, self._target, dtype=torch.float64)
        if changes is not None:
            target = torch.maximum(target, (BIAS / 3 * changes.double().nan_to_num(0.0, 0.0, 0.0)).square())
        ratio = errors.double().nan_to_num(DIVERGED, DIVERGED, -DIVERGED).square() / target
        ratio = torch.where(diverged, 1e12, ratio).clamp(1e-8, 1e12)
        weights = torch.exp(-0.5 * (ratio.log() / 9) ** 2)
        decay = 1 - 1 / MEMORY
        self._errors = decay * self._errors + float((weights * ratio).mean()) / self.step_size**6
        self._weights = decay * self._weights + float(weights.mean())
        found = (self._errors / max(self._weights, 1e-300)) ** (-1 / 6)
        self.step_size = min(max(found, SMALLEST), self._largest, LARGEST)

    def finish(self) -> None:
        """The step size is the present one."""


class ByAcceptance:
    """h at which the mean probability that a Metropolis test accepts is :data:`ACCEPTANCE`."""

    def __init__(self, step_size: float) -> None:
        self.step_size = step_size
        self._averaging = DualAveraging(prox_center=math.log(10 * step_size))

    def update(self, errors: Tensor, diverged: Tensor, changes: Tensor | None) -> None:
        """:param errors, diverged, changes: see :meth:`Tuner.update`."""
        accepted = torch.exp(-errors.clamp(min=0)).nan_to_num(0.0)
        self._averaging.step(ACCEPTANCE - float(accepted.double().mean()))
        self.step_size = self._limited(self._averaging.get_state()[0])

    def finish(self) -> None:
        """The step size is the mean of those that were tried."""
        self.step_size = self._limited(self._averaging.get_state()[1])

    @staticmethod
    def _limited(log_step: float) -> float:
        return min(max(math.exp(min(log_step, 1.0)), SMALLEST), LARGEST)


class Tuner:
    """The warm-up of one run, and in ``settings`` and ``scale`` what it has found.

    :param theta: the state, ``[chains, dim]``.
    :param num_steps: steps of warm-up.
    :param is_exact: whether all steps have the gradient of the whole data.
    :param temperature: T, positive.
    :param friction: the one that was asked for; ``None`` to tune it.
    :param settings: what steps use; they are written here.
    :param tunes_thinning: whether the thinning is set at the end.
    """

    def __init__(
        self,
        theta: Tensor,
        num_steps: int,
        is_exact: bool,
        temperature: float,
        friction: float | None,
        settings: Settings,
        *,
        tunes_thinning: bool,
    ) -> None:
        self.is_exact, self.settings = is_exact, settings
        #: whether this is the first phase
        self.is_settling = True
        self.scale = torch.ones_like(theta[0])
        settings.step_size = FIRST_STEP
        settings.friction = friction or SETTLING
        self._num_steps, self._steps, self._temperature = num_steps, 0, temperature
        self._friction, self._tunes_thinning = friction, tunes_thinning
        self._dim = theta.shape[-1]
        self._ends = _ends_of_windows(num_steps)
        self._positions, self._gradients = WelfordCovariance(), WelfordCovariance()
        self._noise: Tensor | None = None
        self._rule: ByEnergyError | ByAcceptance = ByEnergyError(FIRST_STEP, self._dim)

    def update(
        self, theta: Tensor, grad: Tensor, errors: Tensor, diverged: Tensor, changes: Tensor | None = None
    ) -> bool:
        """After a step of warm-up. Returns whether the scales have changed.

        :param theta, grad: state and ``grad U``, ``[chains, dim]``.
        :param errors, diverged: energy error of the step in units of T, and whether it was none, ``[chains]``.
        :param changes: by how much the step changed U, in units of T, ``[chains]``; ``None`` for a tested step.
        """
        self._steps += 1
        self._rule.update(errors, diverged, changes)
        self._positions.update(theta)
        self._gradients.update(grad)
        ends = bool(self._ends) and self._steps == self._ends[0]
        if ends:
            self._ends.pop(0)
            self._rescale()
        if self._steps == self._num_steps:
            self._rule.finish()
        self._set(self._rule.step_size)
        if self._steps == self._num_steps and self._tunes_thinning:
            path = PATH if self._friction is None else self.settings.step_size / self.settings.friction
            self.settings.thinning = min(math.ceil(PATHS_PER_DRAW * path / self.settings.step_size), MOST_STEPS)
        return ends

    def observe_noise(self, one: Tensor, other: Tensor) -> None:
        """:param one, other: gradients at the same state on independent minibatches, ``[chains, dim]``."""
        square = (one - other).square().mean(0) / 2
        self._noise = square if self._noise is None else self._noise.lerp(square, 1 / NOISE_MEMORY)

    def _set(self, step_size: float) -> None:
        least = SETTLING if self.is_settling else 0.0
        if self._noise is not None and not self.is_settling:
            heat = float((self.scale.square() * self._noise).mean()) / (2 * self._temperature * HEATING)
            most = math.sqrt((self._friction or 1.0) / heat) if heat > 0 else math.inf
            step_size = min(step_size, most)
            least = min(1.0, step_size**2 * heat)
        self.settings.step_size = step_size
        if self._friction is None:
            self.settings.friction = max(-math.expm1(-step_size / PATH), least)

    def _rescale(self) -> None:
        tiny = torch.finfo(self.scale.dtype).tiny
        variances = [w.get_covariance(regularize=False).mean(0) for w in (self._positions, self._gradients)]
        usable = (variances[0] > tiny) & (variances[1] > tiny)
        found = torch.where(usable, (variances[0] / variances[1]) ** 0.25, self.scale)
        change = float((found / self.scale).log().mean())
        self.scale, self.is_settling = found, False
        step_size = min(self._rule.step_size * math.exp(-change), 1.0)
        self._rule = ByAcceptance(step_size) if self.is_exact else ByEnergyError(step_size, self._dim)
        self._positions.reset()
        self._gradients.reset()


def _ends_of_windows(num_steps: int) -> list[int]:
    """Steps after which scales are set: of the first phase, then of windows that double."""
    ends, length, last = [int(FIRST * num_steps)], max(20, int(WINDOW * num_steps)), int((1 - LAST) * num_steps)
    while ends[-1] + length <= last:
        if ends[-1] + 3 * length > last:  # the next would not fit
            length = last - ends[-1]
        ends.append(ends[-1] + length)
        length *= 2
    return ends


def leapfrog_error(change: Tensor, half: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Energy error ``[chains]`` of ``theta' = theta + h scale half``, with half a kick of the momentum at each end.

    With v = half + before / 2 and v' = half - after / 2 it is ``U' - U + (v'^2 - v^2) / 2``.

    :param change: ``U' - U``, ``[chains]``.
    :param half: the momentum between the kicks, ``[chains, dim]``.
    :param before, after: ``h scale grad U`` at both ends, ``[chains, dim]``.
    """
    squares = (after.square() - before.square()).sum(-1) / 8
    return change - (half * (before + after)).sum(-1) / 2 + squares
