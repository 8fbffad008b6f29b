"""Geweke's joint-distribution test and simulation-based calibration of the kernels, on thousands of copies at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor

from pyro_bnn.inference import SGHMC, SGHMCEM
from pyro_bnn.priors import SpikeAndSlab

COPIES, ROWS, NOISE = 3000, 5, 0.8
SPIKE = SpikeAndSlab(0.2, 1.0, inclusion=0.4)


def normal() -> Any:
    return dist.Normal(torch.zeros(COPIES, dtype=torch.float64), 1.0).to_event(1)


def mixture() -> Any:
    return SPIKE.elements(0.0, torch.zeros(COPIES, dtype=torch.float64), None)


def cdf_of_mixture(w: np.ndarray) -> np.ndarray:
    return 0.4 * stats.norm(0, 1).cdf(w) + 0.6 * stats.norm(0, 0.2).cdf(w)


PRIORS = {
    "SGHMC, conjugate": (SGHMC, normal, stats.norm(0, 1).cdf),
    "SGHMCEM, spike and slab": (SGHMCEM, mixture, cdf_of_mixture),
}


def simulate(w: Tensor) -> Tensor:
    """Data of every copy, ``[ROWS, COPIES]``."""
    return w + NOISE * torch.randn(ROWS, COPIES, dtype=torch.float64)


def kernel_for(kind: type[SGHMC], prior: Any, temperature: float = 1.0, thinning: int = 40) -> SGHMC:
    """Each copy has rows of its own; all copies are one site, so that they move in one chain and stay independent."""

    def model(y: Tensor) -> None:
        w = pyro.sample("w", prior())
        pyro.sample("y", dist.Normal(w.expand(ROWS, COPIES), NOISE).to_event(2), obs=y)

    return kind(model, step_size=0.04, friction=0.15, temperature=temperature, thinning=thinning, capture=False)


def moved(kernel: SGHMC, w: Tensor, y: Tensor) -> Tensor:
    kernel.setup(0, y)
    return kernel.sample({"w": w})["w"]


@pytest.mark.parametrize("case", PRIORS)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_geweke(case: str, temperature: float) -> None:
    """Data given weights, weights given data, in turn: after 25 rounds the weights have their prior, and w y its mean.

    A kernel for another law (here a colder one) leaves it, and is told apart by the same statistics.
    """
    kind, prior, cdf = PRIORS[case]
    torch.manual_seed(0)
    kernel, w = kernel_for(kind, prior, temperature), prior().sample()
    for _ in range(25):
        y = simulate(w)
        w = moved(kernel, w, y)
    pvalue = stats.kstest(w.numpy(), cdf).pvalue
    product, expected = (w * simulate(w).mean(0)).numpy(), float(prior().variance.mean())
    distance = abs(product.mean() - expected) / (product.std() / COPIES**0.5)
    assert (pvalue > 0.01 and distance < 3) if temperature == 1 else (pvalue < 0.01 and distance > 4)


@pytest.mark.parametrize("case", PRIORS)
@pytest.mark.parametrize("believed", [1.0, 0.7])
def test_simulation_based_calibration(case: str, believed: float) -> None:
    """Talts et al. (2018): the true weight has a uniform rank among 15 draws; not so if the noise is wrong."""
    kind, prior, _ = PRIORS[case]
    torch.manual_seed(1)
    truth = prior().sample()
    y = believed * simulate(truth) + (1 - believed) * truth  # rows closer together than the model says
    kernel = kernel_for(kind, prior, thinning=120)
    kernel.setup(0, y)
    params = {"w": prior().sample()}
    rank = torch.zeros(COPIES)
    for i in range(17):
        params = kernel.sample(params)
        if i >= 2:
            rank += params["w"] < truth
    counts = torch.bincount(rank.long(), minlength=16).numpy()
    pvalue = stats.chisquare(counts).pvalue
    assert pvalue > 0.01 if believed == 1 else pvalue < 1e-4
