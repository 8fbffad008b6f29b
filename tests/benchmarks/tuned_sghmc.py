"""SGHMC that finds its own settings, against exact posteriors: ``python -m tests.benchmarks.tuned_sghmc``.

``mean`` is the largest difference of a mean in standard deviations, ``width`` the largest relative difference of a
standard deviation, over all latents; ``effective`` the smallest effective sample size and ``seconds`` those of the run,
warm-up and recording of the gradient too. NUTS of Pyro runs beside it, one chain with as many gradients as it asks for.
Targets: mean <= 0.25 and width <= 0.15.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from pyro.infer import NUTS
from scipy import stats

from pyro_bnn.inference import SGHMC, sample
from tests.benchmarks.measure import report

DRAWS, CHAINS, NUTS_DRAWS = 1000, 4, 1000
EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
Moments = tuple[np.ndarray, np.ndarray]


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


def of_dirichlet() -> Moments:
    concentration = np.array([16.0, 9.0, 6.0, 3.0])
    share = concentration / concentration.sum()
    return share, np.sqrt(share * (1 - share) / (concentration.sum() + 1))


def of_schools() -> Moments:
    """By quadrature over mu and log tau."""
    tau, mu = np.exp(np.linspace(-8, 6, 2001))[:, None], np.linspace(-25, 30, 801)[None, :]
    log = np.log(tau) - np.log1p((tau / 5) ** 2) - (mu / 5) ** 2 / 2
    for y, s in zip(EFFECTS.numpy(), ERRORS.numpy(), strict=True):
        log = log + stats.norm.logpdf(y, mu, np.sqrt(tau**2 + s**2))
    weight = np.exp(log - log.max())
    weight /= weight.sum()
    parts: list[tuple[Any, Any]] = [(mu, 0.0), (tau, 0.0)]
    for y, s in zip(EFFECTS.numpy(), ERRORS.numpy(), strict=True):
        parts.append(((y * tau**2 + mu * s**2) / (tau**2 + s**2), tau**2 * s**2 / (tau**2 + s**2)))
    means = np.array([(weight * value).sum() for value, _ in parts])
    squares = np.array([(weight * (value**2 + spread)).sum() for value, spread in parts])
    return means, np.sqrt(squares - means**2)


MODELS: dict[str, tuple[Callable[[], None], Moments]] = {
    "Beta-Bernoulli": (beta_bernoulli, (np.array([10 / 14]), np.array([(10 * 4 / 14**2 / 15) ** 0.5]))),
    "Dirichlet-categorical": (dirichlet_categorical, of_dirichlet()),
    "Gamma-Poisson": (gamma_poisson, (np.array([22 / 6]), np.array([22**0.5 / 6]))),
    "eight schools, centred": (eight_schools, of_schools()),
}


def measure(name: str, engine: str, seed: int) -> dict[str, Any]:
    model, (mean, std) = MODELS[name]
    start = time.perf_counter()
    if engine == "SGHMC":
        chains, posterior = CHAINS, sample(SGHMC(model), DRAWS, seed=seed, progress=False)
    else:
        chains, posterior = 1, sample(NUTS(model), NUTS_DRAWS, NUTS_DRAWS, 1, seed=seed, progress=False)
    seconds = time.perf_counter() - start
    count = posterior.num_stored or 0
    draws = posterior.draws(count)
    names = ("mu", "tau", "theta") if "mu" in draws else ("z",)
    values = torch.cat([draws[n].reshape(count, -1) for n in names], 1).double().numpy()
    array = xr.DataArray(values.reshape(chains, -1, values.shape[1]), dims=("chain", "draw", "value"))
    return {
        "model": name,
        "engine": engine,
        "seed": seed,
        "mean": float((np.abs(values.mean(0) - mean) / std).max()),
        "width": float(np.abs(values.std(0) / std - 1).max()),
        "effective": float(arviz.ess(array.to_dataset(name="x"))["x"].min()),
        "seconds": seconds,
        **{f"found {key}": value for key, value in posterior.sampler.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in MODELS:
        for engine, seeds in (("SGHMC", asked.seeds), ("NUTS", 1)):
            for seed in range(seeds):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)
                    rows.append(measure(name, engine, seed))
                row = rows[-1]
                print(
                    f"{name:24} {engine:6} seed {seed}: mean {row['mean']:.3f}, width {row['width']:.3f}, "
                    f"{row['effective']:.0f} effective draws in {row['seconds']:.1f} s",
                    flush=True,
                )
    report("tuned_sghmc", rows, seeds=list(range(asked.seeds)))


if __name__ == "__main__":
    main()
