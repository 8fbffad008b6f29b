"""Laplace's approximation of the last layer against conjugate regression, the Hessian, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.utils.data import DataLoader, TensorDataset

import pyro_bnn as pb
from pyro_bnn.inference.baselines.laplace import LastLayerLaplace, log_evidence, output_information, root_of_inverse
from pyro_bnn.likelihoods import Bernoulli, Categorical, Gaussian, HeteroscedasticGaussian, Likelihood, Poisson
from pyro_bnn.priors import Cauchy, Normal

N = 40
NOISE, SCALE = 0.4, 0.8


def inputs(features: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(N, features, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def network(*sizes: int, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layers: list[nn.Module] = []
        for i, o in zip(sizes[:-1], sizes[1:], strict=True):
            layers += [nn.Linear(i, o, dtype=dtype), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def residual(classes: int = 3) -> nn.Module:
    """A small residual network with batch normalisation."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.block, self.fc = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, classes)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.norm(self.stem(x)))
            result: Tensor = self.fc(F.relu(x + self.block(x)).mean((2, 3)))
            return result

    with torch.random.fork_rng():
        torch.manual_seed(2)
        return Residual()


def images() -> tuple[Tensor, Tensor]:
    y = torch.arange(N) % 3
    x = torch.randn(N, 1, 6, 6, generator=torch.Generator().manual_seed(3))
    return x + y[:, None, None, None], y


def target(x: Tensor) -> Tensor:
    noise = torch.randn(N, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return 1.2 * x[:, 0] - 0.7 * x[:, 1] + 0.5 + NOISE * noise


def joint(posterior: pb.Posterior) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the Gaussian, in the order of the parameters."""
    guide: Any = posterior.guide
    return guide.mean, guide.scale_tril @ guide.scale_tril.mT


def with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[:, :1])], 1)


# ------------------------------------------------------------------------------------------------ what is exact


def conjugate(scale: float) -> tuple[Tensor, Tensor]:
    phi = with_ones(inputs())
    precision = phi.T @ phi / NOISE**2 + torch.eye(3) / scale**2
    return torch.linalg.solve(precision, phi.T @ target(inputs()) / NOISE**2), torch.linalg.inv(precision)


def regression(prior: Normal | None) -> tuple[LastLayerLaplace, pb.Posterior]:
    """At the mode under SCALE, which full-batch gradient descent finds."""
    net = network(2, 1)
    mean, _ = conjugate(SCALE)
    with torch.no_grad():
        net[0].weight.copy_(mean[None, :2])  # type: ignore[operator, union-attr]
        net[0].bias.copy_(mean[2:])  # type: ignore[operator, union-attr]
    laplace = LastLayerLaplace(net, Gaussian(NOISE), N, prior=prior)
    return laplace, laplace.fit((inputs(), target(inputs())), batch_size=7)


def test_of_a_linear_gaussian_model_it_is_the_posterior() -> None:
    laplace, posterior = regression(Normal(0.0, SCALE))
    for found, exact in zip(joint(posterior), conjugate(SCALE), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-12)
    phi = with_ones(inputs()).numpy()
    marginal = stats.multivariate_normal(cov=NOISE**2 * np.eye(N) + SCALE**2 * phi @ phi.T)
    assert laplace.log_evidence == pytest.approx(marginal.logpdf(target(inputs()).numpy()), rel=1e-10)


def test_training_ends_at_the_mode() -> None:
    laplace = LastLayerLaplace(network(2, 1), Gaussian(NOISE), N, prior=Normal(0.0, SCALE))
    posterior = laplace.fit(
        (inputs(), target(inputs())), epochs=80, batch_size=N, optim="sgd", lr=0.05, progress=False, seed=0
    )
    torch.testing.assert_close(joint(posterior)[0], conjugate(SCALE)[0], rtol=1e-5, atol=1e-6)
    assert len(posterior.losses) == 80


def test_draws_have_the_mean_and_the_covariance() -> None:
    """Of S draws a mean is within 5 sqrt(v / S), and a covariance within 5 sqrt(2 / S) in units of the deviations."""
    _, posterior = regression(Normal(0.0, SCALE))
    draws = posterior.draws(20_000, seed=0)
    theta = torch.cat([draws["0.weight"].flatten(1), draws["0.bias"].flatten(1)], 1)
    mean, covariance = joint(posterior)
    deviation = covariance.diagonal().sqrt()
    assert ((theta.mean(0) - mean).abs() < 5 * deviation / math.sqrt(20_000)).all()
    assert ((theta.T.cov() - covariance).abs() / deviation.outer(deviation) < 5 * math.sqrt(2 / 20_000)).all()


def test_sites_one_after_the_other_have_the_density_of_the_whole() -> None:
    _, posterior = regression(Normal(0.0, SCALE))
    mean, covariance = joint(posterior)
    trace = pyro.poutine.trace(posterior.guide).get_trace(inputs())
    theta = torch.cat([trace.nodes[name]["value"].flatten() for name in ("0.weight", "0.bias")])
    expected = stats.multivariate_normal(mean.numpy(), covariance.numpy()).logpdf(theta.numpy())
    assert float(trace.log_prob_sum()) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(
    ("likelihood", "y", "loss"),
    [
        (
            Categorical(temperature=0.5),
            torch.arange(N) % 3,
            lambda f, y: 2 * F.cross_entropy(f, y, reduction="sum"),
        ),
        (
            Bernoulli(),
            torch.arange(3 * N).reshape(N, 3).double() % 2,
            lambda f, y: F.binary_cross_entropy_with_logits(f, y, reduction="sum"),
        ),
        (
            Poisson(),
            torch.arange(3 * N).reshape(N, 3).double() % 4,
            lambda f, y: F.poisson_nll_loss(f, y, reduction="sum"),
        ),
        (Gaussian(NOISE), torch.ones(N, 3, dtype=torch.float64), lambda f, y: ((f - y) / NOISE).square().sum() / 2),
    ],
)
def test_the_precision_is_the_hessian_of_the_last_layer(likelihood: Likelihood, y: Tensor, loss: Any) -> None:
    """Of likelihoods whose parameter is the natural one, at any weights and behind any features."""
    net = network(2, 4, 3)
    posterior = LastLayerLaplace(net, likelihood, N, prior=Normal(0.0, SCALE)).fit((inputs(), y), batch_size=16)
    phi = net[:2](inputs()).detach()

    def energy(theta: Tensor) -> Tensor:
        result: Tensor = loss(F.linear(phi, theta[:12].reshape(3, 4), theta[12:]), y)
        return result + theta.square().sum() / (2 * SCALE**2)

    theta, covariance = joint(posterior)
    torch.testing.assert_close(torch.linalg.inv(covariance), hessian(energy, theta), rtol=1e-8, atol=1e-8)


def test_output_information_where_it_is_no_hessian() -> None:
    """Of N(m, s^2) with s = softplus(v): 1 / s^2 in m and 2 s'(v)^2 / s^2 in v, and 1 / noise^2 of a learned noise."""
    f = torch.tensor([[0.3, -1.0], [2.0, 0.7]], dtype=torch.float64)
    s, slope = F.softplus(f[:, 1]), f[:, 1].sigmoid()
    expected = torch.diag_embed(torch.stack([1 / s**2, 2 * slope**2 / s**2], 1))
    torch.testing.assert_close(output_information(HeteroscedasticGaussian(), f), expected, rtol=1e-5, atol=1e-8)
    noise = torch.tensor(0.5, dtype=torch.float64)
    torch.testing.assert_close(
        output_information(Gaussian(), f, noise), 4 * torch.eye(2, dtype=torch.float64).expand(2, 2, 2)
    )


def test_the_prior_that_is_chosen_has_the_largest_evidence() -> None:
    laplace, posterior = regression(None)
    chosen = posterior.model.prior.scale  # type: ignore[attr-defined]
    phi, mean = with_ones(inputs()), joint(posterior)[0]

    def evidence(scale: float) -> float:
        root = root_of_inverse(phi.T @ phi / NOISE**2 + torch.eye(3) / scale**2)
        return log_evidence(mean, root, Normal(0.0, scale))

    others = chosen * np.geomspace(0.2, 5, 41)
    assert chosen == pytest.approx(others[np.argmax([evidence(s) for s in others])], rel=1e-6)
    residual = (target(inputs()) - phi @ mean).numpy()
    log_likelihood = stats.norm(scale=NOISE).logpdf(residual).sum()
    assert laplace.log_evidence == pytest.approx(evidence(chosen) + log_likelihood, rel=1e-10)


def test_without_a_bias_and_over_sequences() -> None:
    """Every position of a sequence counts as a row of features."""

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(2, 3, bias=False, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.head(x)
            return result

    with torch.random.fork_rng():
        net = Tagger()
    x, y = inputs().reshape(10, 4, 2), torch.arange(N).reshape(10, 4) % 3
    posterior = LastLayerLaplace(net, Categorical(), 10, prior=Normal(0.0, SCALE)).fit((x, y), batch_size=3)

    def energy(theta: Tensor) -> Tensor:
        loss = F.cross_entropy(inputs() @ theta.reshape(3, 2).T, y.flatten(), reduction="sum")
        return loss + theta.square().sum() / (2 * SCALE**2)

    theta, covariance = joint(posterior)
    torch.testing.assert_close(torch.linalg.inv(covariance), hessian(energy, theta), rtol=1e-8, atol=1e-8)
    assert posterior.predict(x, num_samples=3, seed=0).probs.shape == (10, 4, 3)


# ------------------------------------------------------------------------------------- networks and the package


def fitted(seed: int = 0) -> tuple[nn.Module, pb.Posterior]:
    net = residual()
    laplace = LastLayerLaplace(net, Categorical(), N)
    return net, laplace.fit(images(), epochs=5, lr=1e-2, batch_size=16, progress=False, seed=seed)


def test_a_residual_network_on_disk_and_in_the_diagnostics(tmp_path: Path) -> None:
    net, posterior = fitted()
    x, y = images()
    assert [site.name for site in posterior.model.sites()] == ["fc.weight", "fc.bias"]  # type: ignore[attr-defined]
    posterior.save(tmp_path / "run")
    for other in (pb.load(tmp_path / "run", net), posterior.as_draws(4, seed=5)):
        expected = posterior.predict(x, num_samples=4, seed=5).per_member
        assert torch.equal(other.predict(x, num_samples=4, seed=5).per_member, expected)
    assert pb.diagnostics.evaluate(posterior, (x, y), seed=0)["accuracy"] > 0.5
    data = pb.diagnostics.to_arviz(posterior, x, y, sites="fc.bias", num_samples=20)
    assert data["posterior"]["fc.bias"].shape == (1, 20, 3)
    assert data["log_likelihood"]["obs"].shape == (1, 20, N)


def test_a_wide_layer_on_disk_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    """Large enough for the products to be blocked, whose rounding depends on how the matrix lies in memory."""
    net = network(2, 100, 5, dtype=torch.float32)
    x = inputs(dtype=torch.float32)
    posterior = LastLayerLaplace(net, Categorical(), N).fit((x, torch.arange(N) % 5))
    posterior.save(tmp_path / "run")
    expected = posterior.predict(x, num_samples=3, seed=0).per_member
    assert torch.equal(pb.load(tmp_path / "run", net).predict(x, num_samples=3, seed=0).per_member, expected)


def test_everything_but_the_last_layer_stays_at_the_mode() -> None:
    net, posterior = fitted()
    x, _ = images()
    core = posterior.model.core().net  # type: ignore[attr-defined]
    assert not any(p.requires_grad for p in core.parameters() if p is not None)
    f = posterior.predict(x, num_samples=2000, seed=0).outputs.mean((0, 1))
    with torch.no_grad():
        assert torch.allclose(f, core(x), atol=0.2)  # the outputs are linear in the weights
    trained, given = core.norm.running_mean, net.norm.running_mean
    assert not torch.equal(trained, given)  # statistics of training, and the user's network as it was
    assert torch.equal(given, torch.zeros(4))


def test_a_learned_noise_is_a_point(tmp_path: Path) -> None:
    laplace = LastLayerLaplace(network(2, 8, 1), Gaussian(), N, prior=Normal(0.0, 1.0))
    posterior = laplace.fit((inputs(), target(inputs())), epochs=60, lr=3e-2, batch_size=N, progress=False, seed=0)
    noise = posterior.draws(5, seed=0)["noise"]
    assert torch.equal(noise, noise[:1].expand_as(noise))
    posterior.save(tmp_path / "run")
    assert torch.equal(pb.load(tmp_path / "run", laplace.net).draws(5, seed=0)["noise"], noise)
    assert not posterior.is_deterministic
    with torch.no_grad():
        phi = posterior.model.core().net[:2](inputs())  # type: ignore[attr-defined]
    precision = with_ones(phi).T @ with_ones(phi) / noise[0, 0] ** 2 + torch.eye(9)
    torch.testing.assert_close(torch.linalg.inv(joint(posterior)[1]), precision, rtol=1e-6, atol=1e-6)


def test_seeds_reproduce_and_leave_the_global_state_alone() -> None:
    before = torch.get_rng_state()
    one, two, other = fitted()[1], fitted()[1], fitted(seed=1)[1]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(joint(one)[1], joint(two)[1])
    assert not torch.equal(joint(one)[0], joint(other)[0])


def test_bad_input(tmp_path: Path) -> None:
    x, y = inputs(), torch.arange(N) % 3
    net = network(2, 3)
    with pytest.raises(TypeError, match="takes a pyro_bnn.priors.Normal, or None"):
        LastLayerLaplace(net, Categorical(), N, prior=Cauchy(0.0, 1.0))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="needs one of pyro_bnn.likelihoods"):
        LastLayerLaplace(net, None, N)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="learns its noise, and nothing is trained with epochs=0"):
        LastLayerLaplace(net, Gaussian(), N).fit((x, x))
    with pytest.raises(ValueError, match="epochs=-1"):
        LastLayerLaplace(net, Categorical(), N).fit((x, y), epochs=-1)
    with pytest.raises(ValueError, match="is not that of a nn.Linear"):
        LastLayerLaplace(nn.Sequential(net, nn.LogSoftmax(-1)), Categorical(), N).fit((x, y))
    with pytest.raises(ValueError, match="leaves the same 8 of 40 out of every pass"):
        loader = DataLoader(TensorDataset(x, y), batch_size=16, drop_last=True)
        LastLayerLaplace(net, Categorical(), N, prior=Normal(0.0, 1.0)).fit(loader)
    square = nn.Linear(2, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="'0' are used more than once"):
        LastLayerLaplace(nn.Sequential(square, nn.Tanh(), square), Gaussian(NOISE), N).fit((x, x))
    tied = nn.Sequential(square, nn.Tanh(), nn.Linear(2, 2, dtype=torch.float64))
    tied[2].weight = square.weight
    with pytest.raises(ValueError, match="'2' are used in '0' too"):
        LastLayerLaplace(tied, Gaussian(NOISE), N).fit((x, x))
    with pytest.raises(ValueError, match="has 30,000 weights, and their covariance 900,000,000"):
        LastLayerLaplace(nn.Linear(2, 10_000).double(), Categorical(), N).fit((x, y))
    zero = nn.Linear(2, 3, dtype=torch.float64)
    nn.init.zeros_(zero.weight), nn.init.zeros_(zero.bias)
    with pytest.raises(ValueError, match="no maximum, as the last layer is zero"):
        LastLayerLaplace(zero, Categorical(), N).fit((x, y))
