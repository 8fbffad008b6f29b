"""SGHMC against closed forms: stationary laws, conjugate posteriors, and the contract of Pyro's kernels."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC
from pyro.infer.mcmc.api import StreamingMCMC
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import pyro_bnn as pb
from pyro_bnn.inference import SGHMC, SGLD, sample
from pyro_bnn.inference.batches import minibatches
from pyro_bnn.inference.potential import Potential
from pyro_bnn.inference.sgmcmc.gradient import Gradient
from pyro_bnn.inference.sgmcmc.sghmc import sghmc_step
from pyro_bnn.inference.sgmcmc.streams import Streams
from pyro_bnn.likelihoods import Gaussian, HeteroscedasticGaussian
from pyro_bnn.models import Dense, Rank1

CURVATURES = torch.tensor([0.3, 1.0, 2.5], dtype=torch.float64)


def gaussian(copies: int = 4000) -> Any:
    """U = sum over copies and coordinates of a z^2 / 2, without data: N = 1."""

    def model() -> None:
        with pyro.plate("copies", copies):
            pyro.sample("z", dist.Normal(torch.zeros(3, dtype=torch.float64), CURVATURES.rsqrt()).to_event(1))

    return model


def run(kernel: SGHMC, warmup: int, draws: int, seed: int = 0, start: Any = None) -> Tensor:
    """Draws ``[draws, *shape of the first site]`` without Pyro's runner."""
    torch.manual_seed(seed)
    if start is not None:
        kernel.initial_params = start
    kernel.setup(warmup)
    params = kernel.initial_params
    kept = []
    for i in range(warmup + draws):
        params = kernel.sample(params)
        if i >= warmup:
            kept.append(next(iter(params.values())))
    kernel.cleanup()
    return torch.stack(kept)


def variance(z: Tensor) -> tuple[Tensor, Tensor]:
    """Variance of each coordinate over draws and copies, and its standard error: copies are independent."""
    of_copy = z.square().mean(0)
    return of_copy.mean(0), of_copy.std(0) / of_copy.shape[0] ** 0.5


@pytest.mark.parametrize("step_size", [0.3, 0.8])
@pytest.mark.parametrize("friction", [0.05, 0.4, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_stationary_variance_is_the_closed_form(step_size: float, friction: float, temperature: float) -> None:
    """Proves the discrete law of the momentum-first step: T / a / (1 - h^2 a / (2 (2 - friction))), with the kinetic
    temperature 2 T / (2 - friction) times the same factor."""
    kernel = SGHMC(gaussian(), step_size=step_size, friction=friction, temperature=temperature, thinning=10)
    found, error = variance(run(kernel, 60, 40))
    factor = 1 / (1 - step_size**2 * CURVATURES / (2 * (2 - friction)))
    assert ((found - temperature * factor / CURVATURES).abs() < 4.5 * error).all()
    assert (error / found < 0.02).all(), "the test has power"
    kinetic = kernel.diagnostics()["kinetic temperature"]
    assert kinetic == pytest.approx(float((2 * temperature / (2 - friction) * factor).mean()), rel=0.02)
    configurational = kernel.diagnostics()["configurational temperature"]
    assert configurational == pytest.approx(float((temperature * factor).mean()), rel=0.03)


@pytest.mark.parametrize("temperature", [0.25, 4.0])
def test_a_chain_starts_with_the_momentum_of_its_temperature(temperature: float) -> None:
    """Proves u ~ N(0, T) before the first step: the variance of 12,000 coordinates within four standard errors."""
    torch.manual_seed(0)
    kernel = SGHMC(gaussian(), step_size=0.1, friction=0.1, temperature=temperature)
    kernel.setup(1)
    kernel.begin_at(kernel.initial_params)
    found = float(kernel.momentum.square().mean())
    assert found == pytest.approx(temperature, rel=4 * math.sqrt(2 / kernel.momentum.numel()))


def test_halving_the_step_divides_the_bias_by_four() -> None:
    """Proves second order in h, measured and not from the formula."""
    bias = []
    for h in (1.0, 0.5):
        kernel = SGHMC(gaussian(), step_size=h, friction=0.5, thinning=10)
        found, error = variance(run(kernel, 60, 60))
        bias.append((found * CURVATURES - 1)[2])
        assert error[2] * CURVATURES[2] < 0.05 * abs(bias[-1])
    # the variance is 1 / (1 - k) with k proportional to h^2
    assert float(1 - 1 / (1 + bias[0])) / float(1 - 1 / (1 + bias[1])) == pytest.approx(4.0, rel=0.15)


@pytest.mark.parametrize("friction", [0.1, 1.0])
def test_exact_draws_stay_exact(friction: float) -> None:
    """Proves invariance at a small step: from exact draws of N(0, T / a), coordinates after 200 steps pass a
    Kolmogorov-Smirnov and an Anderson-Darling test against that Normal."""
    copies, temperature = 20_000, 0.75
    torch.manual_seed(1)
    start = torch.randn(copies, 3, dtype=torch.float64) * (temperature / CURVATURES).sqrt()
    kernel = SGHMC(gaussian(copies), step_size=0.05, friction=friction, temperature=temperature, thinning=200)
    z = run(kernel, 0, 1, seed=2, start={"z": start})[0]
    assert not torch.equal(z, start)
    for i in range(3):
        standard = (z[:, i] / (temperature / CURVATURES[i]).sqrt()).numpy()
        assert stats.kstest(standard, "norm").pvalue > 1e-3
        statistic = stats.goodness_of_fit(
            stats.norm, standard, known_params={"loc": 0, "scale": 1}, statistic="ad", n_mc_samples=99, rng=0
        ).statistic
        assert statistic < 6.0, "the 0.1 % point of the Anderson-Darling statistic of a known Normal"


def network(prior: Any = None) -> tuple[Dense, Tensor, Tensor]:
    torch.manual_seed(3)
    x = torch.randn(64, 4, dtype=torch.float64)
    y = torch.sin(x[:, :1]) + 0.1 * torch.randn(64, 1, dtype=torch.float64)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    return Dense(net, pb.likelihoods.Gaussian(0.5), 64, prior=prior or pb.priors.Normal(0, 1.0)), x, y


@pytest.mark.parametrize("capture", [False, True])
def test_without_temperature_it_is_sgd_with_momentum(capture: bool) -> None:
    """Proves the units: at T = 0 from rest the trajectory is that of torch.optim.SGD on U / N with learning rate h^2
    and momentum 1 - friction."""
    model, x, y = network()
    kernel = SGHMC(model, (x, y), step_size=0.1, friction=0.2, temperature=0.0, batch_size=64, capture=capture)
    kernel.setup(0)
    params = kernel.initial_params
    for _ in range(20):
        params = kernel.sample(params)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    net.load_state_dict(model.core().net.state_dict())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.8)
    for _ in range(20):
        optimizer.zero_grad()
        squares = (net(x) - y).square().sum() / (2 * 0.25) + sum(p.square().sum() for p in net.parameters()) / 2
        (squares / 64).backward()
        optimizer.step()
    for name, p in net.named_parameters():
        torch.testing.assert_close(params[name].reshape(p.shape), p.detach(), rtol=1e-9, atol=1e-12)


class Regression:
    """y = x b + noise with b ~ N(0, I): the posterior is Normal, with precision I + x'x / s^2."""

    def __init__(self, size: int = 200) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(size, 3, generator=generator, dtype=torch.float64)
        truth = torch.tensor([1.0, -0.5, 0.25], dtype=torch.float64)
        self.y = self.x @ truth + 0.8 * torch.randn(size, generator=generator, dtype=torch.float64)
        self.size = size
        precision = torch.eye(3, dtype=torch.float64) + self.x.T @ self.x / 0.64
        self.covariance = precision.inverse()
        self.mean = self.covariance @ self.x.T @ self.y / 0.64

    def __call__(self, x: Tensor, y: Tensor) -> None:
        b = pyro.sample("b", dist.Normal(torch.zeros(3, dtype=x.dtype), 1.0).to_event(1))
        with pyro.plate("data", self.size, subsample_size=len(x), subsample=torch.arange(len(x))):
            pyro.sample("obs", dist.Normal(x @ b, 0.8), obs=y)

    def subsampling(self) -> None:
        """The same with a subsample that the plate draws for itself."""
        b = pyro.sample("b", dist.Normal(torch.zeros(3, dtype=self.x.dtype), 1.0).to_event(1))
        with pyro.plate("data", self.size, subsample_size=20) as index:
            pyro.sample("obs", dist.Normal(self.x[index] @ b, 0.8), obs=self.y[index])


def check_regression(problem: Regression, draws: Tensor, rel: float) -> None:
    chains = draws.reshape(16, -1, 3)
    deviation = problem.covariance.diagonal().sqrt()
    error = chains.mean(1).std(0) / 4
    assert ((chains.mean((0, 1)) - problem.mean).abs() < 4.5 * error).all()
    assert (error < 0.15 * deviation).all()
    covariance = chains.flatten(0, 1).T.cov()
    assert (covariance.diagonal() / problem.covariance.diagonal() - 1).abs().max() < rel


@pytest.mark.parametrize(
    "preconditioner", ["identity", *(pytest.param(name, marks=pytest.mark.slow) for name in ("rmsprop", "adaptive"))]
)
def test_conjugate_regression_on_the_whole_data(preconditioner: Any) -> None:
    """Proves mean and variance of the posterior with exact gradients, for every preconditioner, in 16 chains at once:
    variances within 5 % (the step leaves 1 %)."""
    problem = Regression()
    options = {"step_size": 0.1, "friction": 0.2, "preconditioner": preconditioner, "thinning": 20}
    kernel = SGHMC(problem, (problem.x, problem.y), batch_size=200, **options)
    posterior = sample(kernel, 250, 50, num_chains=16, seed=0, progress=False)
    check_regression(problem, posterior.draws(posterior.num_stored or 0)["b"][:, 0], 0.05)


@pytest.mark.parametrize(
    "own", [pytest.param(False, id="batches"), pytest.param(True, id="plate", marks=pytest.mark.slow)]
)
def test_minibatches_heat_by_what_is_reported(own: bool) -> None:
    """Proves that at B = N / 10 the mean is right, and the variance too large by the factor that gradient_noise()
    predicts, within 10 %: the noise of independent minibatches is reported and not corrected."""
    problem = Regression()
    options: dict[str, Any] = {"step_size": 0.12, "friction": 0.3, "thinning": 20, "capture": not own}
    if own:
        kernel = SGHMC(problem.subsampling, num_data=200, **options)
        kernel.setup(0)
        kernel.begin_at(kernel.initial_params)
    else:
        rows = TensorDataset(problem.x, problem.y)
        independent = BatchSampler(RandomSampler(rows, replacement=True, num_samples=4000), 20, drop_last=True)
        kernel = SGHMC(problem, DataLoader(rows, sampler=independent, batch_size=None), **options)
        kernel.setup(0)
        kernel.begin_at({"b": problem.mean})
    torch.manual_seed(0)
    kernel.theta.copy_(problem.mean)
    heating = kernel.gradient_noise(400)["heating"]
    assert heating > 1.1, "there is something to predict"
    kernel.cleanup()
    count = 60 if own else 250
    posterior = sample(kernel, count * (16 if own else 1), 50, num_chains=1 if own else 16, seed=0, progress=False)
    b = posterior.draws(posterior.num_stored or 0)["b"][:, 0]
    ratio = b.var(0) / problem.covariance.diagonal()
    assert ((b.mean(0) - problem.mean).abs() < 0.2 * problem.covariance.diagonal().sqrt()).all()
    assert float(ratio.mean()) == pytest.approx(heating, rel=0.15 if own else 0.1)


def test_the_variance_of_minibatch_gradients_is_the_unbiased_one() -> None:
    """Proves that gradient_noise() reports the sample variance of mean-loss gradients with divisor n - 1, which NumPy
    finds from the same batches, and the factor of heating that follows from it."""
    problem = Regression()
    batches = torch.arange(200).split(20)
    rows = TensorDataset(problem.x, problem.y)
    kernel = SGHMC(problem, DataLoader(rows, batch_sampler=batches), step_size=0.12, friction=0.3, temperature=0.5)  # type: ignore[arg-type]
    kernel.setup(0)
    kernel.begin_at({"b": torch.ones(3, dtype=torch.float64)})
    gradients = np.stack(
        [
            (np.ones(3) + 10 * x.T @ (x @ np.ones(3) - y) / 0.64) / 200
            for x, y in ((problem.x[i].numpy(), problem.y[i].numpy()) for i in batches[:3])
        ]
    )
    found = kernel.gradient_noise(3)
    variance = gradients.var(0, ddof=1).mean()
    assert found["variance"] == pytest.approx(variance, rel=1e-9)
    assert found["heating"] == pytest.approx(1 + 0.12**2 * 200 * variance / (2 * 0.3 * 0.5), rel=1e-9)


def test_passes_without_replacement_heat_less_than_is_reported() -> None:
    """Proves at B = N / 10 that the batches of a pass make up for each other: the variance lies between that of exact
    gradients and the reported one, and nearer to the former."""
    problem = Regression()
    kernel = SGHMC(problem, (problem.x, problem.y), step_size=0.12, friction=0.3, thinning=20, batch_size=20)
    kernel.setup(0)
    kernel.begin_at({"b": problem.mean})
    heating = kernel.gradient_noise(400)["heating"]
    kernel.cleanup()
    posterior = sample(kernel, 250, 50, num_chains=16, seed=0, progress=False)
    ratio = float((posterior.draws(4000)["b"][:, 0].var(0) / problem.covariance.diagonal()).mean())
    assert heating > 1.25 and 0.95 < ratio < 0.5 * (1 + heating)


def test_constrained_sites_go_through_their_transforms() -> None:
    """Proves the Jacobian: a Gamma and a Beta come out with their own means and variances, a simplex with its mean."""
    shape = torch.full((1000,), 4.0, dtype=torch.float64)

    def model() -> None:
        pyro.sample("rate", dist.Gamma(shape, shape / 2).to_event(1))
        pyro.sample("share", dist.Beta(shape, shape / 2).to_event(1))
        pyro.sample(
            "simplex", dist.Dirichlet(torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64).expand(1000, 3)).to_event(1)
        )

    posterior = sample(SGHMC(model, step_size=0.1, friction=0.3, thinning=30), 40, 40, seed=0, progress=False)
    draws = {name: value[:, 0] for name, value in posterior.draws(40).items()}
    for name, expected in (("rate", dist.Gamma(4.0, 2.0)), ("share", dist.Beta(4.0, 2.0))):
        of_copy = draws[name].mean(0)
        assert float(of_copy.mean()) == pytest.approx(float(expected.mean), rel=0.02)
        assert float(draws[name].var()) == pytest.approx(float(expected.variance), rel=0.06)
    simplex = draws["simplex"]
    torch.testing.assert_close(simplex.sum(-1), torch.ones_like(simplex[..., 0]))
    torch.testing.assert_close(
        simplex.mean((0, 1)), torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64), rtol=0.02, atol=0
    )


def test_a_preconditioner_adapts_in_warm_up_alone() -> None:
    """Proves that tau moves towards the inverse root of the curvature's spread in warm-up, and never afterwards."""
    kernel = SGHMC(gaussian(50), step_size=0.1, friction=0.2, preconditioner="rmsprop", thinning=20)
    torch.manual_seed(0)
    kernel.setup(10)
    params = kernel.initial_params
    for _ in range(10):
        params = kernel.sample(params)
    frozen = kernel.preconditioner_scale
    flat, steep = (frozen.reshape(50, 3)[:, i].mean() for i in (0, 2))
    assert flat > 1.44 * steep
    kernel.sample(params)
    assert torch.equal(kernel.preconditioner_scale, frozen)


def test_cycles_end_at_the_smallest_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that the learning rate falls along half a cosine within each draw, in whole steps, and starts anew."""
    kernel = SGHMC(gaussian(1), step_size=0.5, friction=1.0, temperature=0.0, schedule="cyclical", thinning=4)
    kernel.setup(0)
    z = torch.ones(1, 3, dtype=torch.float64)
    for _ in range(2):
        for r in range(4):
            z = z * (1 - 0.25 * 0.5 * (1 + math.cos(math.pi * r / 4)) * CURVATURES)
    params = kernel.sample({"z": torch.ones(1, 3, dtype=torch.float64)})
    params = kernel.sample(params)
    torch.testing.assert_close(params["z"], z)


def test_a_cycle_of_several_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that the cosine runs over all draws of a cycle, in warm-up and after, and starts anew with the next."""
    options: dict[str, Any] = {"step_size": 0.5, "friction": 1.0, "temperature": 0.0, "schedule": "cyclical"}
    kernel = SGHMC(gaussian(1), thinning=2, draws_per_cycle=3, **options)
    kernel.setup(1)  # a draw of warm-up is the first of its cycle
    z = torch.ones(1, 3, dtype=torch.float64)
    params = kernel.sample({"z": z})
    for draw in range(4):
        for r in (2 * draw, 2 * draw + 1):
            z = z * (1 - 0.25 * 0.5 * (1 + math.cos(math.pi * (r % 6) / 6)) * CURVATURES)
        torch.testing.assert_close(params["z"], z)
        params = kernel.sample(params)
    assert "draws_per_cycle=3" in repr(kernel)
    with pytest.raises(ValueError, match="draws_per_cycle=2 is for schedule='cyclical'"):
        SGHMC(gaussian(1), step_size=0.5, friction=1.0, draws_per_cycle=2)


def test_a_cycle_explores_before_its_first_draw() -> None:
    """Proves that the cosine runs over exploration and draws, and that the first draw of a cycle comes after both."""
    options: dict[str, Any] = {"step_size": 0.5, "friction": 1.0, "temperature": 0.0, "schedule": "cyclical"}
    kernel = SGHMC(gaussian(1), thinning=2, draws_per_cycle=3, exploration=4, **options)
    kernel.setup(1)
    z, step = torch.ones(1, 3, dtype=torch.float64), 0
    params: dict[str, Tensor] = {"z": z}
    for draw in range(7):
        for _ in range(6 if draw % 3 == 0 else 2):
            z = z * (1 - 0.25 * 0.5 * (1 + math.cos(math.pi * (step % 10) / 10)) * CURVATURES)
            step += 1
        params = kernel.sample(params)
        torch.testing.assert_close(params["z"], z)
        assert kernel.steps == kernel.steps_of(draw + 1) == step
    assert "exploration=4" in repr(kernel)
    with pytest.raises(ValueError, match="exploration=2 is for schedule='cyclical'"):
        SGHMC(gaussian(1), step_size=0.5, friction=1.0, exploration=2)


def test_a_step_by_hand() -> None:
    """Proves the two lines of the update with preconditioner, noise and mask, in NumPy."""
    theta, momentum, grad, xi = (np.random.default_rng(i).standard_normal(5) for i in range(4))
    root, mask = np.linspace(0.5, 1.5, 5), np.array([1.0, 1, 0, 1, 0])
    u = mask * (0.7 * momentum - 0.2 * root * grad + np.sqrt(2 * 0.3 * 0.5) * xi)
    ours, ours_u = torch.tensor(theta), torch.tensor(momentum)

    def add_noise(buffer: Tensor, size: float) -> None:
        buffer.add_(torch.tensor(xi), alpha=size)

    sghmc_step(
        ours,
        ours_u,
        torch.tensor(grad),
        add_noise,
        scale=0.2,
        friction=0.3,
        temperature=0.5,
        root=torch.tensor(root),
        mask=torch.tensor(mask),
    )
    np.testing.assert_allclose(ours_u, u, rtol=1e-12)
    np.testing.assert_allclose(ours, theta + 0.2 * root * u, rtol=1e-12)


def test_langevin_dynamics_is_friction_one() -> None:
    """Proves that SGLD makes the very draws of SGHMC with friction 1."""
    ours = run(SGLD(gaussian(5), step_size=0.3), 2, 3)
    assert torch.equal(ours, run(SGHMC(gaussian(5), step_size=0.3, friction=1.0), 2, 3))


# ------------------------------------------------------------------------------------------- contract and engine


def test_runs_in_pyros_mcmc_and_starts_afresh() -> None:
    """Proves that a kernel is reusable: cleanup twice, another run with the same seed gives the same draws, two
    sequential chains differ, and constrained values come out."""

    def model() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("s", dist.Gamma(2.0, 1.0))

    kernel = SGHMC(model, step_size=0.3, friction=0.3, thinning=5)
    runs = []
    for _ in range(2):
        pyro.set_rng_seed(0)
        mcmc = MCMC(kernel, 20, 5, disable_progbar=True)
        mcmc.run()
        runs.append(mcmc.get_samples())
        kernel.cleanup()
    assert runs[0]["s"].min() > 0
    for name in ("z", "s"):
        assert torch.equal(runs[0][name], runs[1][name])
    assert "kinetic temperature" in mcmc.diagnostics()


def test_pickling_streaming_and_chosen_sites() -> None:
    """Proves that a kernel goes to other processes, into StreamingMCMC, and keeps only the sites in save_params."""
    model, x, y = network()
    kernel = pickle.loads(pickle.dumps(SGHMC(model, (x, y), step_size=0.05, friction=0.1, batch_size=16)))
    mcmc = MCMC(kernel, 4, 2, disable_progbar=True, save_params=["2.bias"])
    mcmc.run()
    assert set(mcmc.get_samples()) == {"2.bias"}
    streaming = StreamingMCMC(
        SGHMC(gaussian(3), step_size=0.3, friction=0.3),
        num_samples=6,
        warmup_steps=1,
        disable_progbar=True,
    )
    streaming.run()
    assert streaming.get_statistics()[(0, "z")]["count"] == 6


def test_every_model_and_every_way_to_predict() -> None:
    """Proves that a sampled network is a Posterior as any other: Dense and Rank1, chains, predict, log_likelihood."""
    dense, x, y = network()
    rank1 = Rank1(dense.core().net.requires_grad_(), pb.likelihoods.Gaussian(0.5), 64)
    for model in (dense, rank1):
        kernel = SGHMC(model, (x, y), step_size=0.02, friction=0.1, batch_size=16, thinning=5)
        posterior = sample(kernel, 6, 4, num_chains=1 if model is rank1 else 3, seed=0, progress=False)
        assert posterior.num_stored == (6 if model is rank1 else 18)
        assert posterior.predict(x, num_samples=4).mean.shape[0] == 64
        assert posterior.log_likelihood(x, y, num_samples=4).shape == (4, 1, 64)


def test_the_recorded_gradient_is_the_gradient() -> None:
    """Proves that the graph makes the same chain as the model itself, for one chain and for several."""
    model, x, y = network()
    for chains in (1, 3):
        runs = [
            sample(
                SGHMC(model, (x, y), step_size=0.05, friction=0.1, batch_size=16, capture=capture, thinning=3),
                5,
                2,
                num_chains=chains,
                seed=0,
                progress=False,
            ).draws(5 * chains)
            for capture in (False, True)
        ]
        for name in runs[0]:
            torch.testing.assert_close(runs[0][name], runs[1][name], rtol=1e-9, atol=1e-12)


def test_every_chain_goes_through_the_data_on_its_own() -> None:
    """Proves that each chain sees every sample once a pass, in an order of its own; a loader that cannot is refused."""
    x = torch.arange(12.0)[:, None]
    model = Dense(nn.Linear(1, 1), pb.likelihoods.Gaussian(1.0), 12)
    streams = Streams(model, (x, x), batch_size=4, chains=3)
    torch.manual_seed(0)
    for _ in range(2):
        seen = torch.cat([streams.next()[0].squeeze(-1) for _ in range(3)], 1)
        assert torch.equal(seen.sort(1).values, torch.arange(12.0).expand(3, 12))
        assert len({tuple(order) for order in seen.tolist()}) == 3
    loader = DataLoader(TensorDataset(x, x), num_workers=1, persistent_workers=True)
    with pytest.raises(ValueError, match="persistent_workers=False"):
        Streams(model, loader, chains=3)
    with pytest.raises(ValueError, match="persistent_workers=False"):
        sample(SGHMC(model, loader, step_size=0.1, friction=0.1), 2, num_chains=3, progress=False)


@pytest.mark.filterwarnings("ignore:.*could not be:UserWarning")
@pytest.mark.parametrize("chains", [1, 2])
@pytest.mark.parametrize("capture", [False, "auto"])
def test_all_rows_are_those_of_the_data_at_every_step(chains: int, capture: Any) -> None:
    """Proves that a network that writes into its input has the chain of one that does not, where batches are all rows.

    All rows are one batch, which is not made anew for every step.
    """

    class Halving(nn.Module):
        def __init__(self, writes: bool) -> None:
            super().__init__()
            self.layer, self.writes = nn.Linear(3, 1), writes

        def forward(self, x: Tensor) -> Tensor:
            f: Tensor = self.layer(x.mul_(0.5) if self.writes else x * 0.5)
            return f

    x, y = torch.randn(20, 3).double(), torch.randn(20, 1).double()
    found = []
    for writes in (True, False):
        torch.manual_seed(0)
        model = Dense(Halving(writes).double(), pb.likelihoods.Gaussian(1.0), 20)
        kernel = SGHMC(model, (x, y), step_size=0.1, friction=0.1, batch_size=20, capture=capture, thinning=3)
        found.append(sample(kernel, 4, 1, num_chains=chains, seed=0, progress=False).draws(4 * chains))
    for name, value in found[1].items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("error")
def test_networks_with_convolutions_are_recorded() -> None:
    """Proves that the chain of a small convolutional network is the same from the recording and from the model."""
    torch.manual_seed(0)
    x, y = torch.randn(16, 1, 6, 6).double(), torch.randint(3, (16,))
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3)).double()
    model = Dense(net, pb.likelihoods.Categorical(), 16)
    chains = [
        run(SGHMC(model, (x, y), step_size=0.1, friction=0.1, batch_size=16, capture=c), 0, 5) for c in (True, False)
    ]
    torch.testing.assert_close(*chains, rtol=1e-8, atol=1e-10)


def test_what_cannot_be_recorded_is_said() -> None:
    """Proves that capture="auto" warns and goes on, capture=True raises."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("steps", -z.abs() if float(z) > 0 else -2 * z.abs())

    with pytest.warns(UserWarning, match="could not be recorded"):
        run(SGHMC(model, step_size=0.1, friction=0.1), 0, 2)
    with pytest.raises(Exception, match=r".*"):
        run(SGHMC(model, step_size=0.1, friction=0.1, capture=True), 0, 2)


@pytest.mark.filterwarnings("error")
def test_every_draw_predicts_with_its_own_statistics(tmp_path: Path) -> None:
    """Proves that a draw is its weights and the mean and variance that these have on the data, by hand; also saved."""
    torch.manual_seed(0)
    x, y = torch.randn(32, 3).double(), torch.randn(32, 1).double()
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    model = Dense(net, pb.likelihoods.Gaussian(1.0), 32)
    kernel = SGHMC(model, (x, y), step_size=0.1, friction=0.1, batch_size=32, thinning=5)
    posterior = sample(kernel, 3, 1, seed=0, progress=False)
    outputs = posterior.predict(x[:5], num_samples=3).outputs[:, 0]
    draws = {name: value[:, 0] for name, value in posterior.draws(3).items()}
    for i in range(3):
        hidden = x @ draws["0.weight"][i].T + draws["0.bias"][i]
        normal = (hidden[:5] - hidden.mean(0)) / (hidden.var(0) + 1e-5).sqrt()
        torch.testing.assert_close(
            outputs[i], normal @ draws["2.weight"][i].T + draws["2.bias"][i], rtol=1e-9, atol=1e-9
        )
    posterior.save(tmp_path / "run")
    assert torch.equal(pb.load(tmp_path / "run", net).predict(x[:5], num_samples=3).outputs[:, 0], outputs)
    assert torch.equal(posterior.as_draws(2).predict(x[:5], num_samples=2).outputs[:, 0], outputs[[0, 2]])
    posterior.recompute_statistics([(2 * x, y)])
    assert not torch.allclose(posterior.predict(x[:5], num_samples=3).outputs[:, 0], outputs)
    posterior.recompute_statistics(None)
    assert torch.equal(posterior.predict(x[:5], num_samples=3).outputs[:, 0], outputs)


def test_batch_normalisation_moves_once_a_step_and_refuses_vectorised_chains() -> None:
    """Proves that one chain of such a network runs, its statistics moving with every step, and several are refused."""
    x, y = torch.randn(32, 3), torch.randn(32, 1)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    model = Dense(net, pb.likelihoods.Gaussian(1.0), 32)
    kernel = SGHMC(model, (x, y), step_size=0.02, friction=0.1, batch_size=8, thinning=5)
    run(kernel, 1, 3)
    assert int(model.core().net[1].num_batches_tracked) == 4 * 5
    with pytest.raises(ValueError, match=r"1' gathers statistics while it trains"):
        sample(kernel, 3, 1, num_chains=2, progress=False)


def test_draws_stream_to_disk(tmp_path: Path) -> None:
    """Proves that streamed draws are those of a run in memory, one file a site, and that none is overwritten."""
    kernel = SGHMC(gaussian(4), step_size=0.3, friction=0.3)
    memory = sample(kernel, 5, 1, num_chains=2, seed=0, progress=False).draws(10)["z"]
    disk = sample(kernel, 5, 1, num_chains=2, seed=0, progress=False, stream=tmp_path / "draws").draws(10)["z"]
    assert torch.equal(memory, disk)
    assert sorted(p.name for p in (tmp_path / "draws").iterdir()) == ["draws.count", "draws.json", "z.npy"]
    with pytest.raises(ValueError, match=r"without draws of an earlier run"):
        sample(kernel, 5, 1, num_chains=2, progress=False, stream=tmp_path / "draws")


def test_the_users_parameter_store_stays() -> None:
    """Proves that sampling a network leaves no entry in Pyro's parameter store."""
    model, x, y = network()
    sample(SGHMC(model, (x, y), step_size=0.05, friction=0.1), 2, progress=False)
    assert not list(pyro.get_param_store().keys())


def test_other_kernels_give_a_posterior_too() -> None:
    model, x, y = network()
    from pyro.infer import NUTS

    posterior = sample(NUTS(model, max_tree_depth=3), 4, 2, args=(x, y), seed=0, progress=False)
    assert posterior.num_stored == 4
    with pytest.raises(ValueError, match=r"stream= needs an SGHMC kernel"):
        sample(NUTS(model), 4, args=(x, y), stream="nowhere")


class Wrapped:
    """A batch that PyTorch cannot look into, and whose repr hides its values."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __repr__(self) -> str:
        return "Wrapped"


def collate(rows: Any) -> tuple[Wrapped, Tensor]:
    return Wrapped(torch.stack([x for x, _ in rows])), torch.stack([y for _, y in rows])


def test_batches_that_are_not_tensors_are_never_recorded() -> None:
    """Proves that a graph cannot keep the numbers of one batch for all others."""
    problem = Regression()
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(problem.x, problem.y), batch_size=50, shuffle=True, collate_fn=collate
    )
    kernel = SGHMC(lambda x, y: problem(x.x, y), loader, step_size=0.05, friction=0.3, thinning=10)
    b = sample(kernel, 150, 20, seed=0, progress=False).draws(150)["b"][:, 0]
    assert ((b.mean(0) - problem.mean).abs() < problem.covariance.diagonal().sqrt()).all()
    assert kernel.gradient.num_graphs == 0


def test_a_model_that_changes_is_noticed() -> None:
    """Proves that a recorded gradient is compared with the model again at every check."""
    strength = [1.0]

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(500), 1.0).to_event(1))
        pyro.factor("more", -(strength[0] - 1) * z.square().sum() / 2)

    torch.manual_seed(0)
    kernel = SGHMC(model, step_size=0.1, friction=0.3, thinning=20, check_every=20)
    kernel.setup(0)
    params = kernel.sample(kernel.initial_params)
    strength[0] = 10.0
    with pytest.warns(UserWarning, match="is not what it was when it was recorded"):
        params = kernel.sample(params)
    for _ in range(30):
        params = kernel.sample(params)
    assert float(params["z"].var()) == pytest.approx(0.1, rel=0.35)


def test_arguments_of_the_model_are_the_same_for_all_chains() -> None:
    """Proves that ``args=`` is not taken for one minibatch a chain, also when the numbers of rows and chains agree."""
    problem = Regression(size=8)
    kernel = SGHMC(problem, step_size=0.3, friction=0.3, num_data=8, thinning=20)
    draws = sample(kernel, 200, 20, num_chains=8, args=(problem.x, problem.y), seed=0, progress=False)
    b = draws.draws(1600)["b"][:, 0].reshape(8, 200, 3).mean(1)
    assert ((b - problem.mean).abs() < 0.6 * problem.covariance.diagonal().sqrt()).all()


def test_every_row_of_a_loader_is_used() -> None:
    """Proves that a loader in fixed order with a shorter last batch loses no rows in one chain, and is refused where
    chains would need batches of one length."""
    problem = Regression(size=100)
    problem.y[64:] += 3.0  # the last rows tell another story
    precision = problem.covariance.inverse()
    problem.mean = torch.linalg.solve(precision, problem.x.T @ problem.y / 0.64)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(problem.x, problem.y), batch_size=64)
    kernel = SGHMC(problem, loader, step_size=0.03, friction=0.3, thinning=20)
    b = sample(kernel, 300, 50, seed=0, progress=False).draws(300)["b"][:, 0]
    assert ((b.mean(0) - problem.mean).abs() < problem.covariance.diagonal().sqrt()).all()
    with pytest.raises(ValueError, match="batches of one length"):
        sample(kernel, 5, num_chains=2, progress=False)


def test_flat_improper_priors_and_flat_gradients() -> None:
    """Proves that a network whose biases have no proper prior starts at its own, and that rmsprop survives a gradient
    of exactly zero."""
    dense, x, y = network()
    model = Rank1(dense.core().net.requires_grad_(), pb.likelihoods.Gaussian(0.5), 64, weight_prior=None)
    kernel = SGHMC(model, (x, y), step_size=0.02, friction=0.1)
    kernel.setup(0)
    assert torch.equal(kernel.initial_params["0.bias"].flatten(), model.core().net[0].bias)
    assert torch.isfinite(sample(kernel, 3, 1, progress=False).draws(3)["0.bias"]).all()
    still = SGHMC(gaussian(4), step_size=0.1, friction=0.1, preconditioner="rmsprop")
    assert torch.isfinite(run(still, 3, 3, start={"z": torch.zeros(4, 3, dtype=torch.float64)})).all()


def test_nothing_is_left_behind() -> None:
    """Proves that point-estimated weights get no gradients, modules return to their modes, a second run starts anew,
    and a kernel that has run can still be pickled."""
    dense, x, y = network()
    model = Rank1(dense.core().net.requires_grad_(), pb.likelihoods.Gaussian(0.5), 64).eval()
    kernel = SGHMC(model, (x, y), step_size=0.02, friction=0.1, capture=False)
    MCMC(kernel, 2, 1, disable_progbar=True).run()
    assert all(p.grad is None for p in model.parameters())
    assert not any(m.training for m in model.modules())
    model.train()
    MCMC(kernel, 2, 1, disable_progbar=True).run()
    assert all(m.training for m in model.modules())
    pickle.loads(pickle.dumps(kernel)).setup(0)
    free = SGHMC(gaussian(2), step_size=0.1, friction=0.1)
    starts = []
    for _ in range(2):
        free.setup(0)
        starts.append(free.initial_params["z"])
    assert not torch.equal(*starts)


def test_data_stay_where_the_user_put_them() -> None:
    """Proves that the batches of a model of the user's own are not moved to PyTorch's default device."""
    problem = Regression()
    torch.set_default_device("meta")
    try:
        first = minibatches(problem, (problem.x, problem.y), 10).first
    finally:
        torch.set_default_device(None)  # type: ignore[arg-type]
    assert first[0].device.type == first[1].device.type == "cpu"


# ----------------------------------------------------------------------------------------------------- bad input


def test_noise_cannot_be_compared_with_none() -> None:
    """Proves that the factor of heating is refused where it has no meaning."""
    kernel = SGHMC(gaussian(2), step_size=0.1, friction=0.1, temperature=0.0)
    kernel.setup(0)
    with pytest.raises(ValueError, match="expected a positive temperature"):
        kernel.gradient_noise()
    with pytest.raises(ValueError, match="num_batches=.*at least 2"):
        kernel.gradient_noise(1)


def test_sites_whose_states_cannot_be_kept() -> None:
    """Proves that a latent for each row of a subsampled plate, and a support that moves, are errors."""

    def local() -> None:
        with pyro.plate("rows", 200, subsample_size=20):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    def moving() -> None:
        low = pyro.sample("low", dist.Normal(0.0, 1.0))
        pyro.sample("u", dist.Uniform(low, low + 1))

    for model, message in ((local, "shows 20 of its 200 rows"), (moving, "support of the latent site 'u' changes")):
        with pytest.raises(ValueError, match=message):
            SGHMC(model, step_size=0.1, friction=0.1).setup(0)


def test_a_short_run_that_diverges_is_noticed_at_its_end() -> None:
    """Proves that no draw is returned unchecked, in our engine and in Pyro's."""
    kernel = SGHMC(gaussian(2), step_size=60.0, friction=0.1)
    with pytest.raises(FloatingPointError, match="diverged"):
        sample(kernel, 99, progress=False)
    with pytest.raises(FloatingPointError, match="diverged"):
        MCMC(SGHMC(gaussian(2), step_size=60.0, friction=0.1), 99, 0, disable_progbar=True).run()
    keyed = SGHMC(lambda scale: pyro.sample("z", dist.Normal(0.0, scale)), step_size=60.0, friction=0.1)
    with pytest.raises(FloatingPointError, match="site 'z'"):
        MCMC(keyed, 99, 0, disable_progbar=True).run(scale=torch.tensor(1.0))
    kernel.step_size = 0.1
    assert torch.isfinite(sample(kernel, 5, progress=False).draws(5)["z"]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_size": 0.0}, "step_size=0.0: expected a positive number"),
        ({"friction": 0.0}, r"friction=0.0: expected a number in \(0, 1\]"),
        ({"friction": 1.5}, r"friction=1.5: expected a number in \(0, 1\]"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"preconditioner": "adam"}, "expected 'identity', 'rmsprop' or 'adaptive'"),
        ({"schedule": "linear"}, "expected 'constant' or 'cyclical'"),
        ({"thinning": 0}, "thinning=0"),
        ({"check_every": 0}, "check_every=0"),
        ({"num_data": 0}, "num_data=0"),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)
def test_numbers_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SGHMC(gaussian(), **({"step_size": 0.1, "friction": 0.1} | options))


def test_models_that_cannot_be_sampled() -> None:
    def nothing() -> None:
        pyro.sample("obs", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))

    def discrete() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("k", dist.Bernoulli(0.5))

    for model, message in ((nothing, "no latent sites"), (discrete, "latent site 'k' is discrete")):
        with pytest.raises(ValueError, match=message):
            SGHMC(model, step_size=0.1, friction=0.1).setup(0)


def test_a_loader_without_length_needs_num_data() -> None:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([(torch.zeros(3, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64))] * 40)

    class Loader(torch.utils.data.DataLoader[Any]):
        def __len__(self) -> int:
            return 4

    problem = Regression()
    with pytest.raises(ValueError, match="num_data is missing"):
        SGHMC(problem, Loader(Stream(), batch_size=10), step_size=0.1, friction=0.1).setup(0)
    SGHMC(problem, Loader(Stream(), batch_size=10), step_size=0.1, friction=0.1, num_data=40).setup(0)


@pytest.mark.parametrize("chains", [1, 2])
def test_divergence_stops_names_the_site_and_keeps_the_last_good_state(chains: int) -> None:
    """Proves that a step far too large is found within check_every steps."""
    kernel = SGHMC(gaussian(2), step_size=40.0, friction=0.1, check_every=5, thinning=1)
    with pytest.raises(FloatingPointError, match=r"diverged .* the site 'z'"):
        sample(kernel, 1000, num_chains=chains, seed=0, progress=False)
    assert torch.isfinite(kernel.last_good()["z"]).all()
    assert torch.isfinite(kernel.theta).all()


@pytest.mark.parametrize("options", [{"num_samples": 0}, {"warmup_steps": -1}, {"num_chains": 0}])
def test_counts_out_of_range(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected a whole number"):
        sample(SGHMC(gaussian(), step_size=0.1, friction=0.1), **({"num_samples": 1} | options))


def test_a_recording_of_a_model_that_writes_into_a_buffer() -> None:
    """Proves that what a graph writes into is not taken for a constant."""

    def model() -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(6, dtype=torch.float64), 1.0).to_event(1))
        buffer = torch.zeros_like(w)
        buffer[1:3] = w[1:3].square()
        pyro.factor("f", -buffer.sum())

    gradient = Gradient(Potential(model), {}, None, False, True)
    gradient.theta.copy_(torch.arange(6.0))
    for _ in range(3):
        expected = gradient.theta.clone()
        expected[1:3] += 2 * gradient.theta[1:3]
        torch.testing.assert_close(gradient(), expected)
        gradient.theta.add_(1.0)
    assert gradient.num_graphs == 1


@pytest.mark.parametrize("likelihood", [Gaussian(), HeteroscedasticGaussian(), Gaussian(0.3)], ids=repr)
def test_gradients_of_all_likelihoods_of_tables_are_recorded(likelihood: Any) -> None:
    """Proves that a learned noise, whose support is asked for before chains start, leaves no check of values behind."""
    outputs = 2 if isinstance(likelihood, HeteroscedasticGaussian) else 1
    torch.manual_seed(0)
    model = Dense(nn.Linear(2, outputs), likelihood, 20)
    kernel = SGHMC(model, (torch.randn(20, 2), torch.randn(20, 1)), batch_size=20, capture=True)
    sample(kernel, 20, 20, seed=0, num_chains=2, progress=False)
    assert kernel.gradient.num_graphs == 1


def test_chains_start_where_the_user_says() -> None:
    """Proves that weights may have the shapes of the network, and that what is left out starts as before."""
    torch.manual_seed(0)
    model = Dense(nn.Linear(2, 1), Gaussian(), 20)
    data = torch.randn(20, 2), torch.randn(20, 1)

    def begun(**start: Any) -> dict[str, Any]:
        kernel = SGHMC(model, data)
        kernel.chains, kernel.initial_params = 3, start
        kernel.setup(30)
        try:
            return kernel.initial_params
        finally:
            kernel.cleanup()

    weight = torch.randn(3, 1, 2)
    found = begun(weight=weight)
    assert found.keys() == {"weight", "bias", "noise"}
    assert torch.equal(found["weight"].reshape(3, 1, 2), weight)
    assert torch.equal(found["bias"][0].reshape(1), model.core().net.bias)  # type: ignore[arg-type]
    assert torch.equal(begun(weight=found["weight"])["weight"], found["weight"])
    with pytest.raises(ValueError, match=r"'weight' of shape \(2, 1, 2\), expected 3 chains times \[2\]"):
        begun(weight=weight[:2])
    with pytest.raises(ValueError, match="'wieght', which is no latent of the model: noise, weight, bias"):
        begun(wieght=weight)
