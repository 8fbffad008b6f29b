"""Hamiltonian Monte Carlo of a network with one hidden layer, written out, which shares no code with the library.

Weights are drawn in units of their prior deviations, ``w = s z``, all chains at once::

    U(z) = sum z^2 / 2 - sum_n log p(y_n | W2 relu(W1 x_n + b1) + b2)

A regression has a noise sigma, which is HalfCauchy(1), with its logarithm as one more coordinate. A trajectory has
leapfrog steps of one size, which dual averaging finds in warm-up, over a length that is uniform in
``LENGTH (1 +- JITTER)``, and one Metropolis test.

Source: Neal (2011, arXiv 1206.1901); the step size as in Hoffman and Gelman (2014, section 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor

#: of a trajectory, in units of prior deviations: a quarter of the period of the prior (Izmailov et al. 2021)
LENGTH, JITTER = math.pi / 2, 0.2
#: share of accepted trajectories that the step size aims at, and most steps of one
ACCEPTANCE, MOST_STEPS = 0.8, 400


class Chains(NamedTuple):
    """``outputs``: ``[chains, draws, rows, outputs]`` at test rows; ``noise``: ``[chains, draws]``, 1 for classes."""

    outputs: Tensor
    noise: Tensor
    acceptance: float
    step_size: float


class Posterior:
    """The log density of all chains, for prior deviations in the order W1, b1, W2, b2.

    :param units: in the hidden layer.
    :param outputs: 1 for a regression, whose noise is learned, else the number of classes.
    """

    def __init__(self, x: Tensor, y: Tensor, units: int, outputs: int, deviations: Sequence[float]) -> None:
        self.x, self.y, self.is_regression = x, y, outputs == 1
        self.shapes = [(units, x.shape[1]), (units,), (outputs, units), (outputs,)]
        self.sizes = [math.prod(shape) for shape in self.shapes]
        self.deviations = deviations
        self.dim = sum(self.sizes) + self.is_regression

    def forward(self, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs ``[chains, rows, outputs]``, and the noise ``[chains]``."""
        parts = z[:, : sum(self.sizes)].split(self.sizes, 1)
        w1, b1, w2, b2 = (
            part.unflatten(1, shape) * s for part, shape, s in zip(parts, self.shapes, self.deviations, strict=True)
        )
        hidden = (x @ w1.mT + b1[:, None]).relu()
        return torch.baddbmm(b2[:, None], hidden, w2.mT), z[:, -1].exp()

    def energy(self, z: Tensor) -> Tensor:
        """U, ``[chains]``, in nats."""
        f, noise = self.forward(z, self.x)
        weights = z[:, : sum(self.sizes)]
        energy = weights.square().sum(1) / 2
        if self.is_regression:
            squares = ((self.y - f) / noise[:, None, None]).square().sum((1, 2))
            energy = energy + squares / 2 + len(self.y) * noise.log()
            return energy + torch.log1p(noise.square()) - noise.log()  # HalfCauchy(1), and d sigma / d log sigma
        labels = self.y.expand(len(z), -1).flatten()
        log_likelihood = -F.cross_entropy(f.flatten(0, 1), labels, reduction="none").unflatten(0, (len(z), -1))
        return energy - log_likelihood.sum(1)

    def gradient(self, z: Tensor) -> tuple[Tensor, Tensor]:
        z = z.detach().requires_grad_()
        energy = self.energy(z)
        return torch.autograd.grad(energy.sum(), z)[0], energy.detach()


def draw(
    posterior: Posterior, x_test: Tensor, chains: int, warmup: int, draws: int, thinning: int = 1, seed: int = 0
) -> Chains:
    """Runs the chains from draws of the prior, a tenth as wide.

    :param warmup, draws: trajectories of each chain that adapt, and those that are kept.
    :param thinning: trajectories for each that is kept.
    """
    random = torch.Generator().manual_seed(seed)
    z = 0.1 * torch.randn(chains, posterior.dim, generator=random)
    averaging = DualAveraging(0.01)
    grad, energy = posterior.gradient(z)
    outputs, noise, accepted = [], [], []
    for i in track(range(warmup + draws * thinning), "HMC"):
        step = averaging.now if i < warmup else averaging.average
        length = LENGTH * (1 + JITTER * (2 * float(torch.rand((), generator=random)) - 1))
        steps = min(MOST_STEPS, max(1, round(length / step)))
        p = torch.randn(z.shape, generator=random)
        before = energy + p.square().sum(1) / 2
        there, momentum, new_grad, new_energy = leapfrog(posterior.gradient, z, p, grad, step, steps)
        log_ratio = (before - new_energy - momentum.square().sum(1) / 2).nan_to_num(-math.inf, -math.inf, -math.inf)
        probability = log_ratio.clamp(max=0.0).exp()
        take = torch.rand(chains, generator=random) < probability
        z, grad = torch.where(take[:, None], there, z), torch.where(take[:, None], new_grad, grad)
        energy = torch.where(take, new_energy, energy)
        if i < warmup:
            averaging.update(float(probability.mean()))
        else:
            accepted.append(float(probability.mean()))
            if (i - warmup) % thinning == thinning - 1:
                with torch.no_grad():
                    f, sigma = posterior.forward(z, x_test)
                outputs.append(f.clone())
                noise.append(sigma if posterior.is_regression else torch.ones(chains))
    acceptance = sum(accepted) / len(accepted)
    return Chains(torch.stack(outputs, 1), torch.stack(noise, 1), acceptance, averaging.average)


def leapfrog(
    gradient: Callable[[Tensor], tuple[Tensor, Tensor]], z: Tensor, p: Tensor, grad: Tensor, step: float, steps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``steps`` leapfrog steps from a state with this gradient; state, momentum, gradient and energy at their end."""
    energy = z.new_zeros(len(z))
    p = p - step * grad / 2
    for i in range(steps):
        z = z + step * p
        grad, energy = gradient(z)
        p = p - step * grad / (1 if i + 1 < steps else 2)
    return z, p, grad, energy


class DualAveraging:
    """The step size, ``now``, and ``average``, that of all so far, late ones weighing more."""

    def __init__(self, start: float) -> None:
        self._center = math.log(10 * start)
        self._error, self._log_average, self._count = 0.0, 0.0, 0
        self.now = start

    @property
    def average(self) -> float:
        return math.exp(self._log_average)

    def update(self, acceptance: float) -> None:
        self._count += 1
        weight = 1 / (self._count + 10)
        self._error = (1 - weight) * self._error + weight * (ACCEPTANCE - acceptance)
        log_now = self._center - math.sqrt(self._count) / 0.05 * self._error
        decay = self._count**-0.75
        self._log_average = decay * log_now + (1 - decay) * self._log_average
        self.now = math.exp(log_now)
