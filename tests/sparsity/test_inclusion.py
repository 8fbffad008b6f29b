"""Posterior inclusion probabilities: the mean over draws by hand, in every form of draws and for any Pyro model."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn.priors import SpikeAndSlab
from pyro_bnn.sparsity.inclusion import inclusion_log_odds


def by_hand(draws: dict[str, Tensor], weight: str, within: tuple[int, ...], v0: float, v1: float) -> Tensor:
    """Mean of theta N(w; v1) / (theta N(w; v1) + (1 - theta) N(w; v0)) over draws and members, in double precision."""
    w = draws[weight].double().flatten(0, 1)
    share = draws[f"{weight}_inclusion"].double().flatten().reshape((-1,) + (1,) * (w.dim() - 1))
    sigma = draws[f"{weight}_tau"].double().flatten().reshape(share.shape) if f"{weight}_tau" in draws else 1.0
    axes = tuple(a + 1 for a in within)

    def log_density(v: float) -> Tensor:
        terms = dist.Normal(torch.zeros(()).double(), sigma * v**0.5 * torch.ones_like(w)).log_prob(w)
        return terms.sum(axes, keepdim=True) if axes else terms

    p = (share.logit() + log_density(v1) - log_density(v0)).sigmoid()
    return (p.squeeze(axes) if axes else p).mean(0)


@pytest.mark.parametrize(
    ("group", "within", "shape"),
    [("weight", (), (4, 2, 3, 3)), ("kernel", (2, 3), (4, 2)), ("input", (0, 2, 3), (2,)), ("output", (1, 2, 3), (4,))],
)
def test_mean_over_draws_and_members(group: Any, within: tuple[int, ...], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    prior = SpikeAndSlab(0.1, 1.0, group=group, variance_prior=dist.InverseGamma(2.0, 2.0))
    model = pb.models.SpikeSlab(net, pb.likelihoods.Categorical(), 10, prior=prior, prefix="net")
    posterior = pb.Posterior(model, pb.models.MeanFieldGuide(model, components=3, init_scale=0.1))
    found = posterior.inclusion_probabilities(7, seed=4)
    assert set(found) == {"0.weight", "2.weight"} and found["0.weight"].shape == shape
    draws = {name.removeprefix("net."): value for name, value in posterior.draws(7, seed=4).items()}
    torch.testing.assert_close(
        found["0.weight"].double(), by_hand(draws, "0.weight", within, 0.01, 1.0), rtol=1e-4, atol=1e-6
    )


def test_removed_groups_and_saturated_ones() -> None:
    """A column of exact zeros has probability 0; log odds tell apart what both round to probability 1."""
    torch.manual_seed(0)
    model = pb.models.SpikeSlab(
        nn.Linear(3, 40, bias=False), None, prior=SpikeAndSlab(0.01, 1.0, inclusion=0.5, group="input")
    )
    w = torch.randn(6, 40, 3) * torch.tensor([0.0, 1.0, 2.0])
    posterior = pb.Posterior.from_draws(model, {"weight": w})
    assert posterior.inclusion_probabilities()["weight"].tolist() == [0.0, 1.0, 1.0]
    odds = inclusion_log_odds(model, [posterior.draws(6)])["weight"]
    assert odds[0] == -torch.inf and 100 < float(odds[1]) < float(odds[2])
    some = pb.Posterior.from_draws(model, {"weight": torch.cat([w, torch.randn(18, 40, 3)])})
    assert float(some.inclusion_probabilities()["weight"][0]) == pytest.approx(18 / 24)


def test_any_pyro_model() -> None:
    def model(x: Tensor) -> None:
        share = pyro.sample("w_inclusion", dist.Beta(2.0, 2.0))
        w = pyro.sample("w", SpikeAndSlab(0.1, 1.0).with_share(share).elements(0.0, torch.zeros(5), None))
        pyro.sample("obs", dist.Normal(x @ w, 1.0).to_event(1))

    torch.manual_seed(0)
    draws = {"w": torch.randn(9, 5), "w_inclusion": torch.rand(9)}
    posterior = pb.Posterior.from_draws(model, draws)
    found = posterior.inclusion_probabilities(args=(torch.randn(4, 5),))["w"]
    expected = by_hand({k: v.unsqueeze(1) for k, v in draws.items()}, "w", (), 0.01, 1.0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


def test_without_a_spike_and_slab_prior() -> None:
    model = pb.models.Dense(nn.Linear(2, 1), None)
    posterior = pb.Posterior(model, pb.models.MeanFieldGuide(model))
    with pytest.raises(ValueError, match="no spike-and-slab site"):
        posterior.inclusion_probabilities()


def test_a_rate_for_every_member() -> None:
    """Rank-1 factors of two components: the sites are the factors."""
    torch.manual_seed(0)
    model = pb.models.Rank1(
        nn.Linear(3, 2), pb.likelihoods.Gaussian(scale=1.0), 10, prior=SpikeAndSlab(0.01, 0.3, dist.Beta(1, 9))
    )
    posterior = pb.Posterior(model, pb.models.Rank1Guide(model, components=2))
    found = posterior.inclusion_probabilities(20)
    assert {name: tuple(p.shape) for name, p in found.items()} == {"weight.s": (3,), "weight.r": (2,)}


def test_arviz_has_chains_and_inclusion(tmp_path: Any) -> None:
    """Two chains as a dimension, R-hat from it, inclusion probabilities as a group; the same after saving."""
    import arviz

    torch.manual_seed(0)
    x = torch.randn(30, 4)
    y = x[:, :1] + 0.1 * torch.randn(30, 1)
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    prior = {"0.weight": SpikeAndSlab(0.1, 1.0, group="input"), ".*": pb.priors.Normal()}
    model = pb.models.SpikeSlab(net, pb.likelihoods.Gaussian(scale=0.1), 30, prior=prior)
    kernel = pb.inference.SGHMC(model, (x, y), step_size=0.02, friction=0.1, thinning=5)
    posterior = pb.inference.sample(kernel, 20, 10, num_chains=2, progress=False, seed=0)
    posterior.save(tmp_path / "run")
    for one in (posterior, pb.load(tmp_path / "run", net)):
        tree = pb.diagnostics.to_arviz(one, x, y, sites="0.bias")
        assert tree["posterior"]["0.bias"].shape == (2, 20, 3)
        assert tree["posterior"]["weight_inclusion"].shape == (2, 20, 1)
        first = one.draws(40)["0.weight_inclusion"].reshape(2, 20)
        torch.testing.assert_close(torch.as_tensor(tree["posterior"]["weight_inclusion"].sel(layer="0").values), first)
        assert tree["log_likelihood"]["obs"].shape == (2, 20, 30)
        found = one.inclusion_probabilities()["0.weight"]
        torch.testing.assert_close(torch.as_tensor(tree["inclusion"]["0.weight"].values), found)
        assert float(arviz.rhat(tree, var_names=["weight_inclusion"])["weight_inclusion"].min()) > 0.9
    assert pb.diagnostics.to_arviz(posterior, x, y, num_samples=10)["posterior"]["bias_mean"].shape == (1, 10, 1)


def test_draws_that_are_no_chains() -> None:
    model = pb.models.Dense(nn.Linear(2, 1, bias=False), None)
    with pytest.raises(ValueError, match="num_chains=3: expected draws .* chains of one length"):
        pb.Posterior.from_draws(model, {"weight": torch.randn(10, 1, 2)}, num_chains=3)
