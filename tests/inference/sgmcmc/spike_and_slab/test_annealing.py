"""The likelihood annealed in warm-up: which densities it is, recorded and not, and what waits until it is over."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn.inference import SGHMCEM
from pyro_bnn.inference.potential import Potential
from pyro_bnn.inference.sgmcmc.pruning import MagnitudeRule
from pyro_bnn.priors import SpikeAndSlab

X = torch.tensor([[0.5], [1.0], [-2.0]]).double()
Y = torch.tensor([0.3, -0.2, 1.0]).double()


def own_model() -> None:
    """Two observed sites, one of them scaled, a factor, and latents of which one is transformed and one conditional."""
    scale = pyro.sample("scale", dist.Exponential(torch.tensor(2.0).double()))
    w = pyro.sample("w", dist.Normal(torch.zeros(1).double(), scale).to_event(1))
    pyro.sample("y", dist.Normal(X @ w, 0.5).to_event(1), obs=Y)
    with pyro.plate("rows", 30, subsample=torch.arange(3)):
        pyro.sample("z", dist.Normal(w, 2.0), obs=Y)
    pyro.factor("more", -(w**2).sum())


@pytest.mark.parametrize("power", [0.25, 1.0])
def test_the_power_is_of_the_data_alone(power: float) -> None:
    """Proves that all observed sites of a user's model are multiplied, with their scale, and no density of a latent."""
    scale, w = 0.7, 0.4
    data = stats.norm(X[:, 0].numpy() * w, 0.5).logpdf(Y.numpy()).sum()
    data += 10 * stats.norm(w, 2.0).logpdf(Y.numpy()).sum() - w**2
    prior = stats.expon(scale=0.5).logpdf(scale) + stats.norm(0, scale).logpdf(w) + torch.tensor(scale).log()
    values = {"scale": torch.tensor(scale).double().log(), "w": torch.tensor([w]).double()}
    found = Potential(own_model).energy(values, (), {}, torch.tensor(power).double())
    assert float(found) == pytest.approx(-(power * data + float(prior)), rel=1e-6)
    if power == 1:
        assert float(found) == pytest.approx(float(Potential(own_model)(values)), rel=1e-12)


def network(inclusion: Any = 0.3) -> tuple[pb.models.SpikeSlab, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    x = torch.randn(40, 3, dtype=torch.float64)
    y = x[:, :1] + 0.1 * torch.randn(40, 1, dtype=torch.float64)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    columns = SpikeAndSlab(0.1, 1.0, inclusion=inclusion, group="input")
    prior = {r"0\.weight": columns, ".*": pb.priors.Normal(0.0, 1.0)}
    return pb.models.SpikeSlab(net, pb.likelihoods.Gaussian(scale=0.3), 40, prior=prior), (x, y)


def chain(kernel: SGHMCEM, warmup: int, draws: int, chains: int | None = None) -> tuple[Tensor, list[float]]:
    """Weights after each draw, and the power of the likelihood in each."""
    torch.manual_seed(1)
    kernel.chains = chains
    kernel.setup(warmup)
    params, weights, powers = kernel.initial_params, [], []
    for _ in range(warmup + draws):
        params = kernel.sample(params)
        weights.append(params["0.weight"])
        powers.append(float(kernel.gradient.power))  # type: ignore[arg-type]
    kernel.cleanup()
    return torch.stack(weights), powers


@pytest.mark.parametrize("chains", [None, 3])
def test_a_recording_sees_the_present_power(chains: int | None) -> None:
    """Proves that a recorded and an eager run are the same chain, with swaps, while the power goes from .01 to 1."""
    model, data = network()
    options: dict[str, Any] = {"batch_size": 16, "anneal": 0.01, "swap_every": 2, "check_every": 5}
    runs = [
        chain(SGHMCEM(model, data, step_size=0.1, friction=0.2, capture=capture, **options), 20, 5, chains)
        for capture in (True, False)
    ]
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=1e-6, atol=1e-8)
    expected = [0.01 ** (1 - min(1, step / 16)) for step in range(25)]
    assert runs[0][1] == pytest.approx(expected, rel=1e-6) and runs[0][1][16:] == [1.0] * 9


def test_a_weak_likelihood_lets_weights_have_their_prior() -> None:
    """Proves that the power reaches the force: far into an annealing that hardly begins, weights ignore the data."""

    def model() -> None:
        like = torch.zeros(2000, dtype=torch.float64)
        w = pyro.sample("w", SpikeAndSlab(0.5, 1.0, inclusion=0.999).elements(0.0, like, None))
        pyro.sample("y", dist.Normal(w, 0.1).to_event(1), obs=torch.full_like(like, 5.0))

    kernel = SGHMCEM(model, step_size=0.1, friction=0.3, anneal=1e-9, thinning=100)
    kernel.setup(40)
    w = kernel.sample({"w": torch.zeros(2000, dtype=torch.float64)})["w"]
    assert float(w.mean()) == pytest.approx(0, abs=4 / 2000**0.5)
    assert float(w.std()) == pytest.approx(1, abs=0.1)


def test_the_rate_waits_until_the_likelihood_has_its_full_power() -> None:
    model, data = network(dist.Beta(2.0, 5.0))
    kernel = SGHMCEM(model, data, step_size=0.1, friction=0.2, anneal=0.01)
    kernel.setup(20)
    params, shares = kernel.initial_params, []
    for _ in range(20):
        params = kernel.sample(params)
        shares.append(float(kernel.sites[0].share))
    assert shares[:16] == pytest.approx([2 / 7] * 16) and shares[16] != pytest.approx(2 / 7)


def test_nothing_is_pruned_while_the_likelihood_is_weak() -> None:
    model, data = network()
    options: dict[str, Any] = {"step_size": 0.1, "friction": 0.2, "prune": MagnitudeRule(0.4), "anneal": 0.01}
    kernel = SGHMCEM(model, data, prune_every=1, **options)
    kernel.setup(20)
    params = kernel.initial_params
    for _ in range(16):
        params = kernel.sample(params)
        assert kernel.diagnostics()["0.weight: kept"] == 1
    for _ in range(4):
        params = kernel.sample(params)
    assert kernel.diagnostics()["0.weight: kept"] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="before step 16, at which the likelihood has its full power"):
        SGHMCEM(model, data, prune_start=15, **options).setup(20)


@pytest.mark.parametrize(
    ("anneal", "error"), [(0.0, ValueError), (1.0, ValueError), (-1, ValueError), (True, TypeError), ("yes", TypeError)]
)
def test_bad_powers_are_refused(anneal: Any, error: type[Exception]) -> None:
    model, data = network()
    with pytest.raises(error, match="anneal"):
        SGHMCEM(model, data, step_size=0.1, friction=0.1, anneal=anneal)


def test_there_is_no_annealing_without_warm_up() -> None:
    model, data = network()
    kernel = SGHMCEM(model, data, step_size=0.1, friction=0.1, anneal=0.1)
    with pytest.raises(ValueError, match="no warm-up"):
        kernel.setup(0)


def test_the_slab_is_two_nats_likelier_until_the_likelihood_has_its_full_power() -> None:
    """Proves, against the log odds that are written by hand, that they are raised by 2 while the power is below 1, and
    not after."""
    model, data = network(inclusion=0.3)
    kernel = SGHMCEM(model, data, step_size=0.05, friction=0.2, thinning=5)
    torch.manual_seed(1)
    kernel.setup(20)
    params = kernel.initial_params
    for draw in range(24):
        params = kernel.sample(params)
        (site,) = kernel.sites
        squares = site.weights.square().sum(0)
        by_hand = torch.tensor(0.3, dtype=torch.float64).logit() - 4 * math.log(10) + 49.5 * squares
        raised = 2.0 if draw < 16 else 0.0  # 80 of the 100 steps of warm-up
        torch.testing.assert_close(site.density.log_odds(site.weights), by_hand + raised, rtol=1e-9, atol=1e-9)
    kernel.cleanup()
