"""How much minibatches heat an SGHMC chain, against what it reports: ``python -m tests.benchmarks.heating``.

Linear regression with 200 rows and 3 coefficients, whose posterior is a known Normal. The heating is the mean ratio of
the variances of 16 chains to those of the posterior; that of the whole data is the bias of the step. Batches are drawn
independently of each other, or in passes without replacement; ``reported`` is ``kernel.gradient_noise()`` at the
posterior mean.
"""

from __future__ import annotations

import argparse
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from pyro_bnn.inference import SGHMC, sample
from tests.benchmarks.measure import report

ROWS, NOISE, CHAINS, THINNING = 200, 0.8, 16, 20
STEP_SIZE, FRICTION = 0.12, 0.3


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, y, and mean and variances of the posterior under N(0, I)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, 3, generator=generator, dtype=torch.float64)
    truth = torch.tensor([1.0, -0.5, 0.25], dtype=torch.float64)
    y = x @ truth + NOISE * torch.randn(ROWS, generator=generator, dtype=torch.float64)
    covariance = (torch.eye(3, dtype=torch.float64) + x.T @ x / NOISE**2).inverse()
    return x, y, covariance @ x.T @ y / NOISE**2, covariance.diagonal()


def model(x: Tensor, y: Tensor) -> None:
    b = pyro.sample("b", dist.Normal(torch.zeros(3, dtype=x.dtype), 1.0).to_event(1))
    with pyro.plate("data", ROWS, subsample_size=len(x), subsample=torch.arange(len(x))):
        pyro.sample("obs", dist.Normal(x @ b, NOISE), obs=y)


def measure(batches: str, batch_size: int, draws: int) -> dict[str, Any]:
    x, y, mean, variance = problem()
    data: Any = (x, y)
    if batches == "independent":
        rows = TensorDataset(x, y)
        sampler = RandomSampler(rows, replacement=True, num_samples=ROWS * batch_size)
        data = DataLoader(rows, sampler=BatchSampler(sampler, batch_size, drop_last=True), batch_size=None)
    kernel = SGHMC(
        model, data, step_size=STEP_SIZE, friction=FRICTION, batch_size=batch_size, thinning=THINNING, capture=True
    )
    torch.manual_seed(0)
    kernel.setup(0)
    kernel.begin_at({"b": mean})
    reported = kernel.gradient_noise(400)["heating"]
    kernel.cleanup()
    posterior = sample(kernel, draws, 50, num_chains=CHAINS, seed=0, progress=False)
    ratios = posterior.draws(CHAINS * draws)["b"].reshape(CHAINS, draws, 3).sub(mean).square().mean(1) / variance
    of_chain = ratios.mean(-1)
    return {
        "batches": batches,
        "batch_size": batch_size,
        "rows": ROWS,
        "heating": float(of_chain.mean()),
        "standard_error": float(of_chain.std() / CHAINS**0.5),
        "reported": reported,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--draws", type=int, default=500)
    draws = parser.parse_args().draws
    cases = [("whole data", ROWS), ("passes", 50), ("passes", 20), ("independent", 50), ("independent", 20)]
    report("heating", [measure(batches, size, draws) for batches, size in cases])


if __name__ == "__main__":
    main()
