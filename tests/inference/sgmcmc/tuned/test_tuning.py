"""SGHMC that finds its own settings: against closed forms, a grid, and NUTS, without a setting by hand."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from references.exact_posteriors import CONJUGATE, SCHOOLS, Exact, gamma_poisson
from references.nuts_13_50_1 import NOISE, NUM_DATA, PATH, PRIOR, agreement, problem
from scipy import stats
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn.inference import SGHMC, SGHMCEM, SGLD, sample
from pyro_bnn.inference.sgmcmc.tuned.metropolis import MetropolisSteps
from pyro_bnn.inference.sgmcmc.tuned.tuner import ByAcceptance, Settings, Tuner, leapfrog_error

#: how far means may be off, in standard deviations, and standard deviations, in units of the true ones
MEAN, WIDTH = 0.25, 0.15


def unlike_scales() -> None:
    pyro.sample("z", dist.Normal(torch.zeros(3), torch.tensor([1e-3, 1.0, 1e3])).to_event(1))


CLOSED_FORMS = CONJUGATE | {
    "unlike scales": Exact(unlike_scales, ("z",), np.zeros(3), np.array([1e-3, 1.0, 1e3])),
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_a_conjugate_posterior_without_a_setting(name: str) -> None:
    """Proves means and standard deviations of the closed form: within 5 standard errors of the effective sample size
    that is reported, where that of a standard deviation is 1 / sqrt(2 n) of it for a Normal, and twice that is allowed
    for others; and that this is well inside of what the library promises."""
    exact = CLOSED_FORMS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # chains that agree are not warned of
        posterior = sample(SGHMC(exact.model), 300, seed=0, progress=False)
    assert posterior.num_chains == 4 and posterior.num_stored == 1200
    z = posterior.draws(1200)["z"].reshape(1200, -1).double().numpy()
    effective = posterior.sampler["smallest effective sample size"]
    assert effective > 400 and posterior.sampler["largest R-hat"] < 1.02
    assert 5 / math.sqrt(effective) <= MEAN + 1e-9 and 10 / math.sqrt(2 * effective) <= 2.5 * WIDTH
    assert (np.abs(z.mean(0) - exact.mean) / exact.std < 5 / math.sqrt(effective)).all()
    assert (np.abs(z.std(0) / exact.std - 1) < min(WIDTH, 10 / math.sqrt(2 * effective))).all()


@pytest.mark.slow
def test_the_centred_eight_schools_without_a_setting() -> None:
    """Proves means within .25 standard deviations and widths within 15 % of quadrature, on a posterior with a neck in
    which every fixed step without a test diverges."""
    posterior = sample(SGHMC(SCHOOLS.model), 1000, seed=0, progress=False)
    draws = posterior.draws(4000)
    found = torch.cat([draws[name].reshape(4000, -1) for name in SCHOOLS.latents], 1).double().numpy()
    assert (np.abs(found.mean(0) - SCHOOLS.mean) / SCHOOLS.std < MEAN).all()
    assert (np.abs(found.std(0) / SCHOOLS.std - 1) < WIDTH).all()


def logistic(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(4), 2.0).to_event(1))
    with pyro.plate("data", 300, subsample_size=len(x), subsample=torch.arange(len(x))):
        pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)


@pytest.mark.parametrize("batch_size", [300, pytest.param(60, marks=pytest.mark.slow)])
def test_a_logistic_regression_without_a_setting(batch_size: int) -> None:
    """Proves means and widths of importance sampling from a Laplace approximation with 200,000 draws, whose errors are
    below 1 %, with the whole data and with minibatches; only the former is tested by Metropolis."""
    torch.manual_seed(0)
    x = torch.randn(300, 4) * torch.tensor([1.0, 3.0, 0.3, 1.0])
    y = torch.bernoulli((x @ torch.tensor([1.0, -0.5, 0.5, 0.0])).sigmoid())

    def log_density(w: Tensor) -> Tensor:
        return dist.Bernoulli(logits=w @ x.double().T).log_prob(y.double()).sum(-1) - (w / 2).square().sum(-1) / 2

    mode = torch.zeros(4, dtype=torch.float64)
    for _ in range(20):
        gradient = torch.func.grad(log_density)(mode)
        hessian = torch.func.hessian(log_density)(mode)
        mode = mode - torch.linalg.solve(hessian, gradient)
    proposal = torch.distributions.MultivariateNormal(mode, 1.3 * torch.linalg.inv(-hessian))
    proposed = proposal.sample((200_000,))
    weight = (log_density(proposed) - proposal.log_prob(proposed)).softmax(0)[:, None]
    mean = (weight * proposed).sum(0)
    std = (weight * (proposed - mean).square()).sum(0).sqrt()

    posterior = sample(SGHMC(logistic, (x, y), batch_size=batch_size), 150, seed=0, progress=False)
    assert ("acceptance" in posterior.sampler) is (batch_size == 300)
    friction = posterior.sampler["friction"]
    expected = 1.0 if batch_size == 300 else 2 / (2 - friction)  # tested steps end with a full momentum
    assert posterior.sampler["expected kinetic temperature"] == pytest.approx(expected)
    assert posterior.sampler["kinetic temperature"] == pytest.approx(expected, rel=4 * math.sqrt(2 / 2400))
    w = posterior.draws(600)["w"].reshape(600, 4).double()
    assert ((w.mean(0) - mean).abs() / std < MEAN).all()
    assert ((w.std(0) / std - 1).abs() < WIDTH).all()


def narrow(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", 300, subsample_size=len(x), subsample=torch.arange(len(x))):
        pyro.sample("y", dist.Normal(x @ w, 0.01), obs=y)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [100, 300])
def test_a_posterior_far_narrower_than_the_first_step_is_found(batch_size: int) -> None:
    """Proves that steps which diverge are taken back, and that chains come from afar: the closed form of a linear
    regression with standard deviations of 6e-4, where the first step of .01 is 17 of them and the start is some 1000
    away. With minibatches and with the whole data, by 4 chains of 200 draws."""
    torch.manual_seed(0)
    x = torch.randn(300, 2)
    y = x @ torch.tensor([0.5, -1.0]) + 0.01 * torch.randn(300)
    precision = torch.eye(2) + x.T @ x / 1e-4
    mean = torch.linalg.solve(precision, x.T @ y / 1e-4)
    std = torch.linalg.inv(precision).diagonal().sqrt()
    assert float(0.01 / std.max()) > 10
    posterior = sample(SGHMC(narrow, (x, y), batch_size=batch_size), 200, seed=0, progress=False)
    w = posterior.draws(800)["w"].reshape(800, 2)
    assert ((w.mean(0) - mean).abs() / std < MEAN).all()
    assert ((w.std(0) / std - 1).abs() < WIDTH).all()


def network() -> pb.models.Dense:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(13, 50), nn.Tanh(), nn.Linear(50, 1))
    prior = {name: pb.priors.Normal(0.0, scale) for name, scale in PRIOR.items()}
    return pb.models.Dense(net, pb.likelihoods.Gaussian(NOISE), NUM_DATA, prior=prior)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [NUM_DATA, 50])
def test_a_network_has_the_posterior_of_nuts_without_a_setting(batch_size: int) -> None:
    """Proves the means (within .25 standard deviations, on average) and widths (within 15 %) of NUTS at 100 inputs."""
    data = problem()
    kernel = SGHMC(network(), (data.x.float(), data.y.float()), batch_size=batch_size)
    posterior = sample(kernel, 400, seed=0, progress=False)
    prediction = posterior.predict(data.probes.float(), num_samples=1600)
    reference = json.loads(PATH.read_text())["all"]
    found = agreement(
        (prediction.mean.flatten().double(), prediction.epistemic.sqrt().flatten().double()),
        (torch.tensor(reference["mean"]).double(), torch.tensor(reference["std"]).double()),
    )
    assert found["mean"] < MEAN and abs(found["ratio"] - 1) < WIDTH and found["correlation"] > 0.9, found


# ------------------------------------------------------------------------------------------------- its parts


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_tested_steps_leave_a_quartic_law_invariant(temperature: float) -> None:
    """Proves invariance at a step so large that a third of the proposals is rejected: 20,000 exact draws of
    exp(-x^4 / T), made by inverting the law of |x|, pass a Kolmogorov-Smirnov test after 60 steps. So do the momenta
    and the variable of the tests, which is uncorrelated with the energy to 4.5 standard errors."""
    torch.manual_seed(0)
    law = stats.gengamma(0.25, 4, scale=temperature**0.25)  # of |x|
    size = torch.tensor(law.rvs(20_000, random_state=0))
    theta = (size * torch.randn(20_000).sign()).unsqueeze(1)
    momentum = math.sqrt(temperature) * torch.randn_like(theta)
    steps = MetropolisSteps(lambda: (4 * theta**3, (theta**4).sum(-1)), theta)
    start, rejected = theta.clone(), 0.0
    for _ in range(60):
        rejected += float(
            steps.step(momentum, torch.ones(1), 0.9 * temperature**-0.25, 0.2, temperature)[1].double().mean()
        )
    assert 0.1 < rejected / 60 < 0.6
    assert abs(np.corrcoef(start[:, 0], theta[:, 0])[0, 1]) < 0.1, "the chains have moved"
    assert stats.kstest(theta[:, 0].abs().numpy(), law.cdf).pvalue > 1e-3
    assert stats.kstest(steps.threshold.abs().numpy(), "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(steps.threshold.abs(), theta[:, 0] ** 4)[0, 1]) < 4.5 / math.sqrt(20_000)
    assert stats.kstest((momentum[:, 0] / math.sqrt(temperature)).numpy(), "norm").pvalue > 1e-3


def test_the_energy_error_is_that_of_a_leapfrog_step() -> None:
    """Proves the formula in float64 against energies at both ends of a step of a quartic potential."""
    torch.manual_seed(0)
    theta, v, h = torch.randn(5, 3).double(), torch.randn(5, 3).double(), 0.3
    half = v - h * 4 * theta**3 / 2
    after = theta + h * half
    end = half - h * 4 * after**3 / 2
    expected = (after**4).sum(-1) + (end**2).sum(-1) / 2 - (theta**4).sum(-1) - (v**2).sum(-1) / 2
    found = leapfrog_error((after**4).sum(-1) - (theta**4).sum(-1), half, h * 4 * theta**3, h * 4 * after**3)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_step_of_a_gaussian_has_the_bias_that_is_asked_for() -> None:
    """Proves that leapfrog errors of a standard Normal lead to h with h^2 / 4 = 3 %, within 10 %, from a first guess
    that is 30 times too small."""
    torch.manual_seed(0)
    settings = Settings(1.0, 1.0, 10)
    theta = torch.randn(8, 20).double()
    tuner = Tuner(theta, 3000, False, 1.0, None, settings, tunes_thinning=True)
    for _ in range(3000):
        h = settings.step_size * tuner.scale
        theta, v = torch.randn(8, 20).double(), torch.randn(8, 20).double()
        half = v - h * theta / 2
        after = theta + h * half
        change = ((after**2).sum(-1) - (theta**2).sum(-1)) / 2
        error = leapfrog_error(change, half, h * theta, h * after)
        tuner.update(after, after, error, torch.zeros(8, dtype=torch.bool))
    assert tuner.scale.numpy() == pytest.approx(1.0, abs=0.1)
    assert (settings.step_size * float(tuner.scale.mean())) ** 2 / 4 == pytest.approx(0.03, rel=0.1)
    assert settings.friction == pytest.approx(1 - math.exp(-settings.step_size / 1.5))


def leapfrog(step_size: float, chains: int) -> Tensor:
    """Energy errors of leapfrog steps from exact draws of 20 standard Normals."""
    theta, v = torch.randn(2, chains, 20).double()
    half = v - step_size * theta / 2
    after = theta + step_size * half
    change = (after.square().sum(-1) - theta.square().sum(-1)) / 2
    return leapfrog_error(change, half, step_size * theta, step_size * after)


def test_the_step_of_tested_steps_has_the_acceptance_that_is_asked_for() -> None:
    """Proves that 97 % of proposals are accepted, within half a per cent, over 16 warm-ups of 800 steps; and that they
    end at the mean of the steps that were tried, whose standard deviation between warm-ups is 1.3 % where that of the
    last step is 3.3 %, each within a fifth of itself."""
    torch.manual_seed(0)
    found = []
    for _ in range(16):
        rule = ByAcceptance(0.01)
        for _ in range(800):
            rule.update(leapfrog(rule.step_size, 8), torch.zeros(8, dtype=torch.bool), None)
        rule.finish()
        found.append(math.log(rule.step_size))
    assert np.std(found, ddof=1) < 0.02
    accepted = torch.exp(-leapfrog(math.exp(float(np.mean(found))), 100_000).clamp(min=0)).mean()
    assert float(accepted) == pytest.approx(0.97, abs=0.005)


@pytest.mark.parametrize(
    ("noise", "size", "asked"),
    [(2.0, 0.1, None), (40.0, 1e-3, None), (40.0, 1e-3, 0.2)],
    ids=["more friction", "a smaller step", "a friction that was asked for"],
)
def test_the_heating_by_minibatches_is_held_at_its_bound(noise: float, size: float, asked: float | None) -> None:
    """Proves ``h^2 scale^2 V / (2 friction T) = 5 %``, where V, the variance of the noise of gradients, is estimated
    from pairs at one state (20,000 numbers, 100 steps: four standard errors are 0.4 %): a little noise raises the
    friction, and where that is not enough, or was asked for, the step is smaller."""
    torch.manual_seed(0)
    settings, temperature = Settings(1.0, 1.0, 10), 0.5
    tuner = Tuner(torch.zeros(50, 400), 2000, False, temperature, asked, settings, tunes_thinning=True)
    for _ in range(390):  # the first phase has 300 steps and the first window 100
        one, other = noise**0.5 * torch.randn(2, 50, 400)
        tuner.observe_noise(one, other)
        error = size * torch.randn(50)
        tuner.update(torch.randn(50, 400), torch.randn(50, 400), error, torch.zeros(50, dtype=torch.bool))
    assert settings.step_size**2 * noise / (2 * settings.friction * temperature) == pytest.approx(0.05, rel=0.01)
    if asked is not None:
        assert settings.friction == asked
    elif size == 1e-3:
        assert settings.friction == pytest.approx(1.0, abs=1e-6)
    else:
        assert 1.5 * (1 - math.exp(-settings.step_size / 1.5)) < settings.friction < 0.9


def test_settings_are_frozen_after_warm_up_and_the_same_for_the_same_seed() -> None:
    """Proves that kept draws have one law, and that a run is reproducible."""
    kernel = SGHMC(logistic, (torch.randn(300, 4), torch.ones(300)), batch_size=50)
    first = sample(kernel, 30, warmup_steps=40, seed=3, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        again = sample(kernel, 30, warmup_steps=40, seed=3, progress=False)
        longer = sample(kernel, 60, warmup_steps=40, seed=3, progress=False)
    assert torch.equal(first.draws(120)["w"], again.draws(120)["w"])
    assert all(first.sampler[n] == longer.sampler[n] for n in ("step_size", "friction", "thinning"))
    ends = longer.draws(240)["w"].reshape(4, 60, 4)[:, :30]
    assert torch.equal(first.draws(120)["w"].reshape(4, 30, 4), ends)


def test_chains_start_at_weights_of_their_own() -> None:
    """Proves that the first chain starts at the network's own weights and the others at new ones of its
    initialisation, and that the network keeps its own."""
    model = network()
    own = {name: p.clone() for name, p in model.core().net.named_parameters()}
    kernel = SGHMC(model, (problem().x.float(), problem().y.float()))
    kernel.chains = 3
    kernel.setup(30)
    start = kernel.initial_params["0.weight"]
    assert torch.equal(start[0].reshape(50, 13), own["0.weight"])
    assert not torch.equal(start[1], start[0]) and not torch.equal(start[2], start[1])
    assert float(start[1].abs().max()) <= 13**-0.5
    assert all(torch.equal(p, own[name]) for name, p in model.core().net.named_parameters())
    kernel.cleanup()


def test_chains_in_two_modes_are_told() -> None:
    """Proves the warning, in plain words, where no chain crosses."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 20.0))
        pyro.sample("y", dist.Normal(z.abs(), 0.5), obs=torch.tensor(20.0))

    kernel = SGHMC(model)
    kernel.initial_params = {"z": torch.tensor([-20.0, 20.0, 20.0, -20.0])}
    with pytest.warns(UserWarning, match="4 chains are not yet good enough.*R-hat of the latents"):
        posterior = sample(kernel, 50, seed=0, progress=False)
    assert posterior.sampler["largest R-hat"] > 1.5


def test_weights_that_cannot_start_anew_are_told() -> None:
    """Proves the warning for a module without reset_parameters."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(1, 2))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.T

    model = pb.models.Dense(Own(), pb.likelihoods.Gaussian(0.5), 20)
    with pytest.warns(UserWarning, match="all chains start at the weights of the network"):
        sample(SGHMC(model, (torch.randn(20, 2), torch.randn(20, 1))), 20, seed=0, progress=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SGHMC(gamma_poisson, step_size=0.1), "step_size=0.1 needs a friction"),
        (
            lambda: SGHMC(gamma_poisson, preconditioner="rmsprop"),
            "preconditioner='rmsprop' with step_size='auto': expected 'identity'",
        ),
        (
            lambda: SGHMC(gamma_poisson, schedule="cyclical"),
            "schedule='cyclical' with step_size='auto': expected 'constant'",
        ),
        (lambda: SGHMC(gamma_poisson, temperature=0.0), "temperature=0 with step_size='auto': expected a positive"),
        (lambda: sample(SGHMC(gamma_poisson), 100, 5, progress=False), "warm-up has 50 steps"),
        (lambda: SGLD(gamma_poisson, step_size="auto"), "step_size='auto'"),  # type: ignore[arg-type]
        (lambda: SGHMCEM(gamma_poisson, step_size="auto", friction=0.1), "step_size='auto'"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_tuned_is_refused(make: Callable[[], object], message: str) -> None:
    """Proves messages that name the remedy."""
    with pytest.raises((ValueError, TypeError), match=message):
        make()


@pytest.mark.parametrize("capture", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_one_chain_is_tuned_like_several(capture: bool) -> None:
    """Proves that a single chain, recorded or differentiated by autograd, has the closed form too."""
    posterior = sample(SGHMC(gamma_poisson, capture=capture), 250, num_chains=1, seed=0, progress=False)
    z = posterior.draws(250)["z"].flatten().double()
    assert abs(float(z.mean()) - 22 / 6) / (math.sqrt(22) / 6) < MEAN
    assert abs(float(z.std()) / (math.sqrt(22) / 6) - 1) < WIDTH
    assert posterior.sampler["acceptance"] > 0.9


def test_a_given_friction_and_thinning_stay() -> None:
    """Proves that only what was not given is tuned."""
    posterior = sample(SGHMC(gamma_poisson, friction=0.3, thinning=7), 50, seed=0, progress=False)
    assert posterior.sampler["friction"] == 0.3 and posterior.sampler["thinning"] == 7


def test_a_network_with_batch_normalisation_has_one_chain() -> None:
    """Proves that the defaults run where chains cannot be vectorised."""
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))
    model = pb.models.Dense(net, pb.likelihoods.Gaussian(0.5), 40)
    posterior = sample(
        SGHMC(model, (torch.randn(40, 2), torch.randn(40, 1)), batch_size=20), 20, seed=0, progress=False
    )
    assert posterior.num_chains == 1 and posterior.num_stored == 20
    assert "acceptance" not in posterior.sampler and posterior.sampler["step_size"] > 0


def test_a_tuned_posterior_is_saved_and_loaded(tmp_path: Path) -> None:
    """Proves that what warm-up has found stays with the posterior, and so do its predictions."""
    x, y = torch.randn(40, 2), torch.randn(40, 1)
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    model = pb.models.Dense(net, pb.likelihoods.Gaussian(0.5), 40)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        posterior = sample(SGHMC(model, (x, y)), 20, seed=0, progress=False)
    posterior.save(tmp_path / "posterior")
    loaded = pb.load(tmp_path / "posterior", net)
    assert loaded.sampler == posterior.sampler and loaded.sampler["acceptance"] > 0.5
    assert torch.equal(loaded.predict(x, seed=0).outputs, posterior.predict(x, seed=0).outputs)
