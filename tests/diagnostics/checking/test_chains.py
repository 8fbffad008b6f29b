"""R-hat, ESS and Monte Carlo errors: chains whose agreement and autocorrelation are known."""

from __future__ import annotations

import math
from typing import Any

import arviz
import numpy as np
import pytest
import scipy.stats
import torch
from diagnostics.fake import FakePosterior, rows
from pyro.infer import MCMC, NUTS
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn import likelihoods
from pyro_bnn.diagnostics.checking.chains import convergence, effective_size, rhat_limit

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

DRAWS, PROBES = 400, 6


def run(shift: float = 0.0, seed: int = 0, members: int = 1, draws: int = DRAWS) -> FakePosterior:
    values = torch.randn(draws, members, PROBES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return FakePosterior(values + shift, likelihoods.Gaussian(scale=1.0))


def test_chains_that_agree_pass_and_one_that_does_not_is_found() -> None:
    agreeing = convergence([run(seed=0), run(seed=1), run(seed=2)], rows(PROBES), num_samples=DRAWS)
    assert agreeing["rhat"].dims == ("probe",)
    assert float(agreeing["rhat"].max()) < 1.01
    # Independent draws: ESS is their number, up to 4 times the error sqrt(2 (2 M + 1) / draws) of a sum of M = 3 lags.
    np.testing.assert_allclose(agreeing["ess_bulk"], 3 * DRAWS, rtol=4 * math.sqrt(14 / (3 * DRAWS)))
    np.testing.assert_allclose(agreeing["mcse_mean"], 1 / math.sqrt(3 * DRAWS), rtol=0.2)
    apart = convergence([run(seed=0), run(seed=1), run(1.0, seed=2)], rows(PROBES), num_samples=DRAWS)
    assert float(apart["rhat"].min()) > 1.05


def test_r_hat_of_two_chains_by_hand() -> None:
    """Chains far apart, whose ranks are those of two separate normal scores: R-hat^2 = (n - 1) / n + B / (n W).

    With m chains halved into 2 m, the means of normal scores z of the halves give B, their variances W; done here with
    scipy's ranks, as in the paper, with the fractional offset 3/8.
    """
    one, two = run(seed=3), run(3.0, seed=4)
    found = convergence([one, two], rows(PROBES), num_samples=DRAWS)["rhat"]
    values = torch.stack((one.table[:, 0, 0], two.table[:, 0, 0])).numpy()
    halves = values.reshape(4, -1)
    score = scipy.stats.norm.ppf((scipy.stats.rankdata(halves).reshape(4, -1) - 3 / 8) / (halves.size + 1 / 4))
    n = score.shape[1]
    between, within = n * score.mean(1).var(ddof=1), score.var(1, ddof=1).mean()
    assert float(found[0]) == pytest.approx(math.sqrt((n - 1) / n + between / (n * within)), rel=1e-6)


@pytest.mark.parametrize(("draws", "chains", "quantities"), [(400, 4, 10), (60, 2, 1), (1000, 3, 5000)])
def test_chance_passes_the_limit_of_r_hat_once_in_a_hundred_times(draws: int, chains: int, quantities: int) -> None:
    """Proves that for each quantity two R-hats count: ``(2 M - 1) F`` is chi-square, with F = n (R-hat^2 - 1) + 1."""
    n, freedom = draws / (2 * chains), 2 * chains - 1
    f = n * (rhat_limit(draws, chains, quantities) ** 2 - 1) + 1
    assert 2 * quantities * scipy.stats.chi2.sf(freedom * f, freedom) == pytest.approx(0.01)


def test_the_effective_size_is_that_of_the_halves_of_every_chain() -> None:
    """Proves that columns of four chains, one of them elsewhere, are cut into eight halves; an odd draw is left out."""
    values = torch.randn(4, 101, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    values[1] += 0.4
    halves = values[:, :100].reshape(8, 50, 3).numpy()
    expected = arviz.ess(arviz.convert_to_dataset({"x": halves}), method="bulk")["x"].mean()
    assert effective_size(values.flatten(0, 1), 4) == pytest.approx(float(expected), rel=1e-9)


def test_an_autocorrelated_chain_is_worth_fewer_draws() -> None:
    """AR(1) with coefficient .8: ESS = S (1 - .8) / (1 + .8) = S / 9."""
    noise = torch.randn(4, 5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chain = torch.zeros_like(noise)
    for t in range(1, 5000):
        chain[:, t] = 0.8 * chain[:, t - 1] + math.sqrt(1 - 0.8**2) * noise[:, t]
    runs = [FakePosterior(values.reshape(-1, 1, 1), likelihoods.Gaussian(scale=1.0)) for values in chain]
    assert float(convergence(runs, rows(1), num_samples=5000)["ess_bulk"][0]) == pytest.approx(20_000 / 9, rel=0.15)


def test_members_are_draws_of_their_run() -> None:
    """Members that differ are no disagreement, and runs with the same members agree."""
    members = torch.tensor([-5.0, 5.0]).double().reshape(1, 2, 1)
    runs = []
    for seed in range(2):
        posterior = run(seed=seed, members=2)
        posterior.table += members
        runs.append(posterior)
    assert float(convergence(runs, rows(PROBES), num_samples=DRAWS)["rhat"].max()) < 1.01


def test_classes_have_names_and_constants_have_no_size() -> None:
    generator = torch.Generator().manual_seed(0)
    runs = []
    for _ in range(2):
        probs = torch.rand(50, 1, PROBES, 3, generator=generator, dtype=torch.float64)
        probs /= probs.sum(-1, keepdim=True)
        probs[:, :, 0] = 1 / 3
        runs.append(FakePosterior(probs, likelihoods.Categorical()))
    found = convergence(runs, rows(PROBES), num_samples=50)
    assert found["rhat"].dims == ("probe", "class")
    assert (found["rhat"][0] == 1).all() and found["ess_bulk"][0].isnull().all()
    assert found["ess_tail"][1:].notnull().all()
    runs[1].table[:, :, 0, 0] = 0.5  # chains that stand still at different places
    assert float(convergence(runs, rows(PROBES), num_samples=50)["rhat"][0, 0]) == math.inf


def test_several_outputs_are_no_classes() -> None:
    generator = torch.Generator().manual_seed(0)
    runs = [
        FakePosterior(torch.rand(50, 1, PROBES, 3, generator=generator).double(), likelihoods.Bernoulli())
        for _ in range(2)
    ]
    assert convergence(runs, rows(PROBES), num_samples=50)["rhat"].dims == ("probe", "output")


def tiny() -> tuple[Any, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 1, generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1))
    return pb.models.Dense(net, pb.likelihoods.Gaussian(scale=0.1), 20), x, torch.sin(2 * x)


def test_signs_of_hidden_units_are_no_disagreement_of_functions() -> None:
    """tanh is odd: a chain with all signs of the hidden layer turned is the same function with other weights."""
    model, x, _ = tiny()
    generator = torch.Generator().manual_seed(1)
    centre = {s.name: torch.randn(s.shape, generator=generator) for s in model.sites()}
    draws = {}
    for name, value in centre.items():
        noise = 0.01 * torch.randn(2, 100, *value.shape, generator=generator)
        signs = torch.tensor([1.0, -1.0 if name != "2.bias" else 1.0]).reshape(2, *[1] * (value.dim() + 1))
        draws[name] = (signs * (value + noise)).flatten(0, 1)
    posterior = pb.Posterior.from_draws(model, draws, num_chains=2)
    assert float(convergence(posterior, x[:5])["rhat"].max()) < 1.05
    with pytest.warns(UserWarning, match="symmetries"):
        weights = convergence(posterior, space="weights")
    assert float(weights["2.weight_rhat"].min()) > 1.5 and float(weights["2.bias_rhat"].max()) < 1.05
    assert weights["0.weight_rhat"].dims == ("0.weight_dim_0", "0.weight_dim_1")


def test_chains_of_nuts() -> None:
    """A linear regression, whose chains agree in both spaces; and ArviZ says the same of the exported draws."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 1, generator=generator)
    model = pb.models.Dense(nn.Linear(1, 1), pb.likelihoods.Gaussian(scale=0.5), 30)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        chains = []
        for _ in range(2):
            mcmc = MCMC(NUTS(model.eval()), 150, 100, disable_progbar=True)
            mcmc.run(x, 2 * x)
            chains.append(mcmc.get_samples())
    draws = {name: torch.cat([chain[name] for chain in chains]) for name in chains[0]}
    posterior = pb.Posterior.from_draws(model, draws, num_chains=2)
    found = convergence(posterior, x[:4])
    assert float(found["rhat"].max()) < 1.05
    data = pb.diagnostics.to_arviz(posterior, probes=x[:4], groups="posterior")
    np.testing.assert_allclose(
        arviz.rhat(data["posterior"].to_dataset() if hasattr(data["posterior"], "to_dataset") else data.posterior)[
            "function"
        ],
        found["rhat"],
        rtol=1e-5,
    )


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="there is only one chain: sample with num_chains=4"):
        convergence(run(), rows(PROBES), num_samples=DRAWS)
    pair = [run(), run(seed=1)]
    with pytest.raises(ValueError, match="chains have 1 draw: at least 4"):
        convergence(pair, rows(PROBES), num_samples=1)
    with pytest.raises(ValueError, match="needs probes"):
        convergence(pair)
    with pytest.raises(ValueError, match="space='prior': expected"):
        convergence(pair, rows(PROBES), space="prior")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"the runs have \[100, 400\] draws"):
        convergence([run(draws=100), run(seed=1)], rows(PROBES), num_samples=DRAWS)
    generator = torch.Generator().manual_seed(0)
    model, x, _ = tiny()
    four = pb.Posterior.from_draws(
        model, {s.name: torch.randn(40, *s.shape, generator=generator) for s in model.sites()}, num_chains=4
    )
    with pytest.raises(ValueError, match="num_samples=20 takes only some of the 40 draws of 4 chains"):
        convergence(four, x, num_samples=20)
    broken = run()
    broken.table[3, 0, 2] = math.nan
    with pytest.raises(ValueError, match="predicts NaN"):
        convergence([broken, run(seed=1)], rows(PROBES), num_samples=DRAWS)
    draws = {s.name: torch.randn(20, *s.shape) for s in model.sites()}
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="more than max_values=10:"):
        convergence(pb.Posterior.from_draws(model, draws, num_chains=2), space="weights", max_values=10)
