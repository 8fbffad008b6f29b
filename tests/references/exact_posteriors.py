"""Small Pyro models without settings of their own, with the exact means and standard deviations of their latents.

Three are conjugate. The eight schools (Rubin 1981), centred, are integrated over mu and log tau by quadrature; given
these two the effects are Normal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy import stats

EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


@dataclass(frozen=True)
class Exact:
    """A model, the latents that are compared in their order, and the moments of all their elements."""

    model: Callable[[], None]
    latents: tuple[str, ...]
    mean: np.ndarray
    std: np.ndarray


def beta_bernoulli() -> None:
    p = pyro.sample("z", dist.Beta(1.0, 1.0))
    with pyro.plate("data", 12):
        pyro.sample("y", dist.Bernoulli(p), obs=torch.tensor([1.0] * 9 + [0.0] * 3))


def dirichlet_categorical() -> None:
    p = pyro.sample("z", dist.Dirichlet(torch.ones(4)))
    with pyro.plate("data", 30):
        pyro.sample("y", dist.Categorical(p), obs=torch.tensor([0] * 15 + [1] * 8 + [2] * 5 + [3] * 2))


def gamma_poisson() -> None:
    rate = pyro.sample("z", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", 5):
        pyro.sample("y", dist.Poisson(rate), obs=torch.tensor([3.0, 5.0, 2.0, 4.0, 6.0]))


def eight_schools() -> None:
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, ERRORS), obs=EFFECTS)


def _of_dirichlet(concentration: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    share = concentration / concentration.sum()
    return share, np.sqrt(share * (1 - share) / (concentration.sum() + 1))


def _of_schools() -> tuple[np.ndarray, np.ndarray]:
    tau, mu = np.exp(np.linspace(-8, 6, 2001))[:, None], np.linspace(-25, 30, 801)[None, :]
    schools = list(zip(EFFECTS.numpy(), ERRORS.numpy(), strict=True))
    log = np.log(tau) - np.log1p((tau / 5) ** 2) - (mu / 5) ** 2 / 2
    for y, s in schools:
        log = log + stats.norm.logpdf(y, mu, np.sqrt(tau**2 + s**2))
    weight = np.exp(log - log.max())
    weight /= weight.sum()
    given: list[tuple[Any, Any]] = [(mu, 0.0), (tau, 0.0)]  # mean and variance given mu and tau
    for y, s in schools:
        given.append(((y * tau**2 + mu * s**2) / (tau**2 + s**2), tau**2 * s**2 / (tau**2 + s**2)))
    mean = np.array([(weight * of_mean).sum() for of_mean, _ in given])
    square = np.array([(weight * (of_mean**2 + variance)).sum() for of_mean, variance in given])
    return mean, np.sqrt(square - mean**2)


CONJUGATE = {
    "Beta-Bernoulli": Exact(beta_bernoulli, ("z",), np.array([10 / 14]), np.array([(10 * 4 / 14**2 / 15) ** 0.5])),
    "Dirichlet-categorical": Exact(dirichlet_categorical, ("z",), *_of_dirichlet(np.array([16.0, 9.0, 6.0, 3.0]))),
    "Gamma-Poisson": Exact(gamma_poisson, ("z",), np.array([22 / 6]), np.array([22**0.5 / 6])),
}
SCHOOLS = Exact(eight_schools, ("mu", "tau", "theta"), *_of_schools())
