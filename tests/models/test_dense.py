"""Dense networks against closed forms, and the policy for normalisation layers that all models share."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from by_hand import chain
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoNormal
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn.inference import MixtureELBO, cosine, fit
from pyro_bnn.likelihoods import Categorical, Gaussian
from pyro_bnn.models import Dense, MeanFieldGuide, PointGuide, Rank1, Rank1Guide, architectures
from pyro_bnn.priors import HierarchicalCauchy, HierarchicalNormal, Horseshoe, Normal

N = 20


def data(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x = torch.randn(N, 2, generator=torch.Generator().manual_seed(3)).to(dtype)
    return x, torch.sin(x[:, 0])


def names(model: Any) -> list[str]:
    return [site.name for site in model.sites()]


def normalised(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 1)).to(dtype)


def statistics(model: Any) -> dict[str, Tensor]:
    return {n: b.clone() for n, b in model.core().net.named_buffers()}


# ------------------------------------------------------------------------------- posteriors in closed form


class LinearRegression:
    """y ~ N(w x + b, sigma^2) with independent N(0, 0.8^2) priors: conjugate, with correlated inputs and an offset."""

    noise, scale = 0.4, 0.8

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        mix = torch.tensor([[1.0, 0.5], [0.0, 0.8]], dtype=torch.float64)
        self.x = 0.3 + torch.randn(25, 2, generator=generator, dtype=torch.float64) @ mix
        self.y = 1.2 * self.x[:, 0] - 0.7 * self.x[:, 1] + 0.5
        self.y += self.noise * torch.randn(25, generator=generator, dtype=torch.float64)
        features = torch.cat([self.x, torch.ones(25, 1)], 1)
        precision = features.T @ features / self.noise**2 + torch.eye(3) / self.scale**2
        self.mean = torch.linalg.solve(precision, features.T @ self.y / self.noise**2)
        self.covariance = torch.linalg.inv(precision)
        self.mean_field = 1 / precision.diagonal()
        self.ridge = torch.linalg.solve(
            features.T @ features + self.noise**2 / self.scale**2 * torch.eye(3), features.T @ self.y
        )
        self.model = Dense(chain(2, 1), Gaussian(self.noise), 25, prior=Normal(0.0, self.scale))


@pytest.mark.parametrize("components", [1, 2])
def test_mean_field_is_the_closed_form(components: int) -> None:
    """Means within 2 % of a posterior standard deviation and variances within 2 % of 1 / diag(precision)."""
    problem = LinearRegression()
    model, guide = problem.model.eval(), MeanFieldGuide(problem.model, components, init_scale=0.1)
    torch.manual_seed(0)
    with torch.no_grad():
        guide.loc[0].add_(0.3 * torch.randn_like(guide.loc[0]))
    elbo = MixtureELBO(num_particles=1500, vectorize_particles=True, max_plate_nesting=2)
    optimiser = torch.optim.Adam(guide.parameters(), lr=0.03, betas=(0.9, 0.99))
    schedule = cosine()(optimiser, 400, 1)
    with pyro.get_param_store().scope(), pyro.validation_enabled(False):
        for _ in range(400):
            optimiser.zero_grad()
            elbo.differentiable_loss(model, guide, problem.x, problem.y).backward()
            optimiser.step()
            schedule.step()
    variance = torch.nn.functional.softplus(guide.rho[0].detach()).square()
    assert ((guide.loc[0].detach() - problem.mean).abs() < 0.02 * problem.covariance.diagonal().sqrt()).all()
    assert ((variance / problem.mean_field - 1).abs() < 0.02).all()


def test_point_guide_is_ridge_regression() -> None:
    """MAP under N(0, s^2) is ridge regression with penalty sigma^2 / s^2, and its predictions are the network's."""
    problem = LinearRegression()
    guide = PointGuide(problem.model)
    options = {"optim": lambda groups: torch.optim.LBFGS(groups[0]["params"], lr=1), "progress": False}
    with pytest.raises(TypeError):  # a closure is no part of fit: LBFGS is for the user's own loop
        fit(problem.model, guide, (problem.x, problem.y), epochs=1, **options)
    posterior = fit(problem.model, guide, (problem.x, problem.y), epochs=600, lr=0.1, schedule=cosine(), progress=False)
    torch.testing.assert_close(guide.loc[0].detach()[0], problem.ridge, rtol=1e-6, atol=1e-8)
    expected = problem.x @ problem.ridge[:2] + problem.ridge[2]
    prediction = posterior.predict(problem.x, 3)
    torch.testing.assert_close(prediction.mean, expected, rtol=1e-5, atol=1e-7)
    assert float(prediction.epistemic.max()) < 1e-20
    torch.testing.assert_close(prediction.aleatoric, torch.full_like(expected, problem.noise**2))


@pytest.mark.slow
def test_nuts_is_the_closed_form() -> None:
    problem = LinearRegression()
    pyro.set_rng_seed(0)
    mcmc = MCMC(NUTS(problem.model.eval()), num_samples=800, warmup_steps=200, disable_progbar=True)
    mcmc.run(problem.x, problem.y)
    draws = pb.Posterior.from_mcmc(mcmc, problem.model).draws(800)
    flat = torch.cat([draws["0.weight"].reshape(800, 2), draws["0.bias"].reshape(800, 1)], 1)
    effective = (
        torch.cat([d["n_eff"].flatten() for d in mcmc.diagnostics().values() if "n_eff" in d]).min().clamp(max=800)
    )
    sd = problem.covariance.diagonal().sqrt()
    assert ((flat.mean(0) - problem.mean).abs() < 4 * sd / effective.sqrt()).all()
    assert ((flat.std(0) / sd - 1).abs() < 4 / (2 * effective).sqrt()).all()
    exact = problem.covariance / sd[:, None] / sd
    assert ((torch.corrcoef(flat.T) - exact).abs() < 4 * (1 - exact**2 + 1e-9) / effective.sqrt()).all()


def test_evidence_is_at_least_the_elbo() -> None:
    """At its best, mean field lies below the log evidence by the KL divergence of its own to the exact posterior."""
    problem = LinearRegression()
    guide = MeanFieldGuide(problem.model)
    with torch.no_grad():
        guide.loc[0].copy_(problem.mean)
        guide.rho[0].copy_((problem.mean_field.sqrt() - 1e-7).expm1().log())
    torch.manual_seed(0)
    estimates = np.array([-MixtureELBO().loss(problem.model, guide, problem.x, problem.y) for _ in range(400)])
    features = torch.cat([problem.x, torch.ones(25, 1)], 1)
    marginal = dist.MultivariateNormal(
        torch.zeros(25, dtype=torch.float64),
        problem.scale**2 * features @ features.T + problem.noise**2 * torch.eye(25, dtype=torch.float64),
    )
    evidence = float(marginal.log_prob(problem.y))
    gap = torch.distributions.kl_divergence(
        dist.MultivariateNormal(problem.mean, torch.diag(problem.mean_field)),
        dist.MultivariateNormal(problem.mean, problem.covariance),
    )
    assert abs(estimates.mean() - (evidence - float(gap))) < 4 * estimates.std() / math.sqrt(400)


# --------------------------------------------------------------------------------------------------- the model


def test_sites() -> None:
    """Every parameter but those of normalisation layers, with its own name and shape; scales before weights."""
    model = Dense(normalised(), Gaussian(), N, prior={r".*weight": Horseshoe(), ".*": Normal(0, 2)})
    assert names(model) == [
        *("0.weight_tau", "0.weight_lambda", "3.weight_tau", "3.weight_lambda", "noise"),
        *("0.weight", "0.bias", "3.weight", "3.bias"),
    ]
    trace = poutine.trace(model).get_trace(*data())
    assert trace.nodes["0.weight"]["value"].shape == (1, 1, 5, 2)
    assert trace.nodes["0.bias"]["fn"].base_dist.scale.unique() == 2.0
    assert not [n for n in trace.nodes if n == "rows"]
    trained = [n for n, p in model.core().net.named_parameters() if p.requires_grad]
    assert trained == ["1.weight", "1.bias"]


@pytest.mark.parametrize(
    ("select", "expected"),
    [(r"3\..*", ["3.weight", "3.bias"]), (nn.BatchNorm1d, ["1.weight", "1.bias"]), ("0.bias", ["0.bias"])],
    ids=["pattern", "type", "one"],
)
def test_partial_networks(select: Any, expected: list[str]) -> None:
    """Also the parameters of a normalisation layer, when they are asked for; the others are point estimates."""
    x, y = data()
    model = Dense(normalised(), Gaussian(0.1), N, select=select)
    assert names(model) == expected
    before = {n: p.detach().clone() for n, p in model.core().net.named_parameters()}
    fit(model, MeanFieldGuide(model), (x, y), epochs=2, progress=False)
    moved = [n for n, p in model.core().net.named_parameters() if not torch.equal(p, before[n])]
    assert moved == [n for n in before if n not in expected]


def test_select_that_matches_nothing() -> None:
    with pytest.raises(ValueError, match="select='fc' matches none of the parameters; no names are like it"):
        Dense(chain(2, 1), Gaussian(), N, select="fc")
    with pytest.raises(ValueError, match="the network has no parameters to make random"):
        Dense(nn.LayerNorm(3), Gaussian(), N)


def test_means_start_at_the_network() -> None:
    net = chain(2, 3, 1)
    guide = MeanFieldGuide(Dense(net, Gaussian(), N), init_scale=0.03)
    flat = torch.cat([p.detach().flatten() for p in net.parameters()])
    assert torch.equal(guide.loc[0].detach()[0], flat)
    scale = torch.nn.functional.softplus(guide.rho[0].detach())
    torch.testing.assert_close(scale, torch.full_like(scale, 0.03))


class Branches(nn.Module):
    """Convolutions, layer normalisation, an embedding and a scale of the network's own, on two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, groups=1)
        self.norm = nn.LayerNorm(4)
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 2)
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, image: Tensor, word: Tensor) -> Tensor:
        h = self.conv(image).mean((2, 3)) * self.gain + self.embed(word)
        return self.head(torch.relu(self.norm(h)))


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_members_together_equal_one_after_the_other(train: bool, chunk_size: int | None) -> None:
    torch.manual_seed(0)
    x = (torch.randn(7, 3, 8, 8, dtype=torch.float64), torch.randint(6, (7,)))
    model = Dense(Branches().double(), Categorical(), 7, chunk_size=chunk_size).train(train)
    assert "gain" in model.random and "norm.weight" not in model.random
    latents = {s.name: torch.randn(5, 1, *s.shape, dtype=torch.float64) for s in model.sites()}
    together = model.function(x, latents, 7)
    assert together.shape == (5, 7, 2)
    for m in range(5):
        net = Branches().double()
        net.load_state_dict(model.core().net.state_dict() | {n: v[m, 0] for n, v in latents.items()})
        torch.testing.assert_close(together[m], net(*x), rtol=1e-12, atol=1e-12)


def test_recurrent_members_and_two_axes_of_draws() -> None:
    """Where an operation cannot be vectorised there is a loop; draws x members are both kept."""
    torch.manual_seed(0)
    net = architectures.LSTMClassifier(3, 4, 2).double()
    model = Dense(net, Categorical(), 5).eval()
    x = torch.randn(5, 6, 3, dtype=torch.float64)
    latents = {s.name: 0.3 * torch.randn(2, 3, 1, *s.shape, dtype=torch.float64) for s in model.sites()}
    f = model.function(x, latents, 5)
    assert f.shape == (2, 3, 5, 2)
    net.load_state_dict({n: v[1, 2, 0] for n, v in latents.items()})
    torch.testing.assert_close(f[1, 2], net(x), rtol=1e-12, atol=1e-12)


# -------------------------------------------------------------------------------------- under every engine


@pytest.mark.parametrize("prior", [Normal(), HierarchicalCauchy(), HierarchicalNormal(), Horseshoe()], ids=type)
@pytest.mark.parametrize("kind", [MeanFieldGuide, PointGuide, AutoNormal, AutoLowRankMultivariateNormal])
def test_users_own_svi(prior: Any, kind: Any) -> None:
    x, y = data()
    model = Dense(chain(2, 4, 1).float(), Gaussian(), N, prior=prior)
    pyro.set_rng_seed(0)
    guide = kind(model)
    with pyro.get_param_store().scope():
        engine = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), TraceMeanField_ELBO())
        losses = [engine.step(x, y) for _ in range(40)]
        assert np.isfinite(engine.step(x[:7], y[:7]))
    assert np.mean(losses[-8:]) < np.mean(losses[:8])


def test_nuts_on_a_small_network() -> None:
    x, y = data()
    model = Dense(chain(2, 4, 1).float(), Gaussian(), N, prior=HierarchicalNormal()).eval()
    pyro.set_rng_seed(0)
    mcmc = MCMC(NUTS(model, max_tree_depth=4), num_samples=12, warmup_steps=8, disable_progbar=True)
    mcmc.run(x, y)
    posterior = pb.Posterior.from_mcmc(mcmc, model)
    assert posterior.predict(x, 12).per_member.shape == (12, 1, N)
    for parallel in (False, True):
        draws = Predictive(model, guide=posterior.guide, num_samples=5, parallel=parallel)(x)["obs"]
        assert draws.reshape(5, -1).shape == (5, N)
        given = Predictive(model, mcmc.get_samples(), parallel=parallel)(x)["obs"]
        assert given.reshape(12, -1).shape == (12, N)


# ----------------------------------------------------------------------------------------------- normalisation


MODELS = {
    "rank1": lambda net: (m := Rank1(net, Gaussian(), N), Rank1Guide(m, 3)),
    "dense": lambda net: (m := Dense(net, Gaussian(), N), MeanFieldGuide(m)),
    "dense-mixture": lambda net: (m := Dense(net, Gaussian(), N), MeanFieldGuide(m, 3)),
    "point": lambda net: (m := Dense(net, Gaussian(), N), PointGuide(m)),
    "auto": lambda net: (m := Dense(net, Gaussian(), N), AutoNormal(m)),
}


@pytest.mark.parametrize("method", MODELS)
def test_statistics_move_once_for_a_training_step(method: str) -> None:
    """Not when anything is probed, checked, initialised, predicted or saved; and never in the user's network."""
    x, y = data()
    net = normalised()
    given = {n: b.clone() for n, b in net.named_buffers()}
    model, guide = MODELS[method](net)
    posterior = fit(model, guide, (x, y), epochs=3, batch_size=8, progress=False)
    after = statistics(model)
    assert after["1.num_batches_tracked"] == 3 * 3
    assert not torch.equal(after["1.running_mean"], given["1.running_mean"])
    posterior.predict(x, 4)
    posterior.log_likelihood(x, y, 3)
    posterior.sample(2)
    Predictive(model, guide=posterior.guide, num_samples=2)(x)
    for n, b in statistics(model).items():
        assert torch.equal(b, after[n])
    assert all(torch.equal(b, given[n]) for n, b in net.named_buffers())


def test_statistics_of_a_mixture_are_the_average_of_its_members() -> None:
    """Each member normalises with its own batch, and the running values go to the mean of theirs."""
    x, _ = data(torch.float64)
    model = Dense(normalised(torch.float64), Gaussian(), N).train()
    torch.manual_seed(0)
    latents = {s.name: torch.randn(3, 1, *s.shape, dtype=torch.float64) for s in model.sites() if s.role == "weight"}
    latents["noise"] = torch.ones(3, 1, dtype=torch.float64)
    start = statistics(model)
    f = model.function(x, latents, N)
    hidden = torch.einsum("bi,koi->kbo", x, latents["0.weight"][:, 0]) + latents["0.bias"]
    mean, variance = hidden.mean(1).mean(0), hidden.var(1).mean(0)
    after = statistics(model)
    torch.testing.assert_close(after["1.running_mean"], 0.9 * start["1.running_mean"] + 0.1 * mean)
    torch.testing.assert_close(after["1.running_var"], 0.9 * start["1.running_var"] + 0.1 * variance)
    whitened = (hidden - hidden.mean(1, keepdim=True)) / (hidden.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    expected = torch.relu(whitened) @ latents["3.weight"][:, 0].mT + latents["3.bias"]
    torch.testing.assert_close(f, expected)


def test_users_own_loop_moves_statistics_in_train_mode_alone() -> None:
    x, y = data()
    model = Rank1(normalised(), Gaussian(), N)
    guide = Rank1Guide(model)
    for train, count in ((True, 1), (False, 1), (True, 2)):
        model.train(train)
        MixtureELBO().loss(model, guide, x, y)
        assert statistics(model)["1.num_batches_tracked"] == count


def test_statistics_recomputed_for_every_draw() -> None:
    """Each draw predicts as its own network whose statistics were gathered over the loader; training's stay."""
    x, y = data(torch.float64)
    model = Dense(normalised(torch.float64), Gaussian(0.2), N)
    posterior = fit(model, MeanFieldGuide(model, init_scale=0.3), (x, y), epochs=2, progress=False, seed=0)
    plain = posterior.predict(x, 4, seed=1).per_member
    before = statistics(model)
    loader = [(x[:12], y[:12]), (x[12:], y[12:])]
    posterior.recompute_statistics(loader)
    refreshed = posterior.predict(x, 4, seed=1).per_member
    assert not torch.allclose(refreshed, plain)
    draws = posterior.draws(4, seed=1)
    for d in range(4):
        net = normalised(torch.float64)
        net.load_state_dict(model.core().net.state_dict() | {n: v[d, 0] for n, v in draws.items()})
        net[1].reset_running_stats()
        net[1].momentum = None
        net.train()
        for batch, _ in loader:
            net(batch)
        torch.testing.assert_close(refreshed[d, 0], net.eval()(x).squeeze(-1).detach())
    torch.testing.assert_close(posterior.predict(x, 4, batch_size=3, seed=1).per_member, refreshed)
    assert all(torch.equal(b, before[n]) for n, b in statistics(model).items())
    assert model.core().net[1].momentum == 0.1
    posterior.recompute_statistics(None)
    assert torch.equal(posterior.predict(x, 4, seed=1).per_member, plain)


@pytest.mark.parametrize("loc", [0.0, 0.7])
def test_a_normal_prior_around_any_mean(loc: float) -> None:
    """Proves density and gradient of the Normal that is summed up in one pass, against torch's own."""
    model = Dense(nn.Linear(3, 2).double(), Gaussian(1.0), 4, prior=Normal(loc, 0.5))
    trace: Any = poutine.trace(model).get_trace(torch.zeros(4, 3, dtype=torch.float64))
    site = trace.nodes["weight"]
    value = torch.randn(site["value"].shape, dtype=torch.float64, requires_grad=True)
    ours, expected = site["fn"].log_prob(value).sum(), torch.distributions.Normal(loc, 0.5).log_prob(value).sum()
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(*(torch.autograd.grad(density, value)[0] for density in (ours, expected)))
