"""SWAG against the moments of its iterates, the stationary law of SGD, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import pyro_bnn as pb
from pyro_bnn.inference.baselines.swag import SWAG, Moments
from pyro_bnn.likelihoods import Categorical, Gaussian, HeteroscedasticGaussian
from pyro_bnn.models.architectures import digits_cnn
from pyro_bnn.priors import Normal

N = 60


def iterates(count: int = 9, size: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return 10 + torch.randn(count, size, generator=generator, dtype=torch.float64).cumsum(0)


def gathered(path: Tensor, rank: int) -> Moments:
    moments = Moments(rank)
    for theta in path:
        moments.update(theta)
    return moments


def images() -> tuple[Tensor, Tensor]:
    y = torch.arange(N) % 3
    x = torch.randn(N, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return x + y[:, None, None, None], y


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return digits_cnn(3, width=4)


def fitted(seed: int | None = 0, **options: Any) -> tuple[SWAG, pb.Posterior]:
    swag = SWAG(network(), Categorical(), N, rank=4)
    options = {"epochs": 5, "warmup_epochs": 2, "num_samples": 6, "batch_size": 20, "progress": False} | options
    return swag, swag.fit(images(), seed=seed, **options)


# ------------------------------------------------------------------------------------------------ what is exact


def test_moments_are_those_of_the_iterates() -> None:
    path = iterates().numpy()
    moments = gathered(iterates(), rank=4)
    np.testing.assert_allclose(moments.mean, path.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.variance, (path**2).mean(0) - path.mean(0) ** 2, rtol=1e-10)
    running = np.cumsum(path, 0) / np.arange(1, 10)[:, None]
    np.testing.assert_allclose(moments.deviations, (path - running)[-4:].T, rtol=1e-10, atol=1e-12)
    assert gathered(iterates(3), rank=4).deviations.shape == (5, 3)


def test_a_small_variance_survives_single_precision() -> None:
    """Deviations of 1e-3 at 100: the difference of squares in float32 would be noise."""
    path = 100 + 1e-3 * torch.randn(500, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moments = gathered(path.float(), rank=2)
    torch.testing.assert_close(moments.variance.double(), path.var(0, correction=0), rtol=0.05, atol=0)


def test_a_draw_is_a_linear_map_whose_covariance_is_the_formula() -> None:
    """Columns of the map are read off with unit vectors for z, so that nothing is sampled."""
    moments = gathered(iterates(), rank=4)
    z = torch.eye(5 + 4, dtype=torch.float64)
    root = moments.draw(z[:, :5], z[:, 5:]) - moments.mean
    low_rank = moments.deviations @ moments.deviations.T / (4 - 1)
    torch.testing.assert_close(root.T @ root, (torch.diag(moments.variance) + low_rank) / 2, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moments.draw(torch.zeros(5).double(), torch.zeros(4).double()), moments.mean)


def test_iterates_have_the_stationary_variance_of_sgd() -> None:
    """Of the mean of y ~ N(theta, s^2) with batches of B drawn with replacement, plain SGD is an AR(1) process.

    theta <- (1 - h a) theta + h g with a = 1 / s^2 and Var g = Var(y) / (s^4 B) has the variance
    h Var(y) a / (B (2 - h a)), and its mean is that of y. With T = 150 iterates of 40 coordinates, correlated by
    (1 - h a)^4 = 1/16 from one to the next, the average of the variances is known to about 2 %.
    """
    s, h, b, coordinates, epochs = 2.0, 2.0, 8, 40, 150
    y = 3 + s * torch.randn(32, coordinates, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    data = TensorDataset(torch.zeros(32, 1, dtype=torch.float64), y)
    loader = DataLoader(data, batch_size=b, sampler=RandomSampler(data, replacement=True))
    swag = SWAG(nn.Linear(1, coordinates).double(), Gaussian(s), 32, prior=Normal(0.0, 1e6))
    swag.fit(loader, epochs=epochs, warmup_epochs=5, lr=h, momentum=0.0, num_samples=1, progress=False, seed=0)
    a = 1 / s**2
    expected = h * y.var(0, correction=0) * a / (b * (2 - h * a))
    variance, mean = swag.moments.variance[coordinates:], swag.moments.mean[coordinates:]  # of the bias
    assert float((variance / expected).mean()) == pytest.approx(1, abs=0.1)
    assert ((mean - y.mean(0)).abs() < 5 * (expected / epochs * (1 + 2 / 15)).sqrt()).all()


def test_draws_are_from_the_gaussian_of_the_iterates() -> None:
    """S draws: a mean within 5 deviations / sqrt(S), a variance within 5 sqrt(2 / S) of itself."""
    count = 2000
    swag = SWAG(nn.Linear(2, 1).double(), Gaussian(), N, rank=3)
    x = torch.randn(N, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    posterior = swag.fit((x, x[:, :1]), epochs=6, num_samples=count, progress=False, seed=0)
    draws = posterior.draws(count)
    theta = torch.cat([draws[name].flatten(1) for name in ("weight", "bias")] + [draws["noise"].log()], 1)
    moments = swag.moments
    variance = (moments.variance + moments.deviations.square().sum(1) / 2) / 2
    assert ((theta.mean(0) - moments.mean).abs() < 5 * (variance / count).sqrt()).all()
    assert ((theta.var(0) / variance - 1).abs() < 5 * math.sqrt(2 / count)).all()


# ------------------------------------------------------------------------------------- networks and the package


def test_every_draw_has_the_statistics_of_its_weights_on_the_data() -> None:
    swag, posterior = fitted(batch_size=N)
    x, _ = images()
    statistics = posterior.guide.statistics()  # type: ignore[attr-defined]
    draws, net = posterior.draws(6), network()
    for i in range(6):
        net.load_state_dict(net.state_dict() | {name: value[i, 0] for name, value in draws.items()})
        net.train()
        first, norm = net[0](x), net[1]
        torch.testing.assert_close(statistics["1.running_mean"][i], first.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(statistics["1.running_var"][i], first.var((0, 2, 3)), rtol=1e-4, atol=1e-5)
        assert isinstance(norm, nn.BatchNorm2d)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        net(x)
        outputs = posterior.predict(x, num_samples=6).outputs[i, 0]
        torch.testing.assert_close(net.eval()(x), outputs, rtol=1e-3, atol=1e-4)


def test_on_disk_it_is_the_same_bit_for_bit_and_in_the_diagnostics(tmp_path: Path) -> None:
    _, posterior = fitted()
    x, y = images()
    posterior.save(tmp_path / "run")
    loaded = pb.load(tmp_path / "run", network())
    expected = posterior.predict(x, num_samples=6).per_member
    assert torch.equal(loaded.predict(x, num_samples=6).per_member, expected)
    assert pb.diagnostics.evaluate(posterior, (x, y), num_samples=6)["accuracy"] > 0.5
    data = pb.diagnostics.to_arviz(posterior, x, y)
    assert data["log_likelihood"]["obs"].shape == (1, 6, N)
    assert data["training"]["loss"].shape == (7 * 3,)


def test_only_iterates_after_the_warm_up_count() -> None:
    seen: list[Tensor] = []

    def note(state: pb.inference.FitState) -> None:
        guide: Any = state.guide
        seen.append(torch.cat([value.flatten() for value in guide.coordinates().values()]))

    swag, _ = fitted(callbacks=[note])
    assert swag.moments.count == 5
    torch.testing.assert_close(swag.moments.mean, torch.stack(seen[2:]).mean(0), rtol=1e-5, atol=1e-6)


def test_seeds_reproduce_and_leave_the_global_state_alone() -> None:
    before = torch.get_rng_state()
    one, two, other = (fitted(seed)[1].draws(6)["0.weight"] for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_the_given_network_stays() -> None:
    net = network()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    SWAG(net, Categorical(), N).fit(images(), epochs=2, num_samples=2, progress=False, seed=0)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="rank=1: expected a whole number, at least 2"):
        SWAG(network(), Categorical(), N, rank=1)
    for options, message in (
        ({"epochs": 1}, "epochs=1: expected a whole number, at least 2"),
        ({"warmup_epochs": -1}, "warmup_epochs=-1"),
        ({"num_samples": 0}, "num_samples=0: expected a whole number"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"momentum": 1.0}, r"momentum=1.0: expected a number in \[0, 1\)"),
        ({"callbacks": [lambda state: state.epoch == 3]}, "the run ended after 1 iterates that count"),
    ):
        with pytest.raises(ValueError, match=message):
            fitted(**options)
    with pytest.raises(FloatingPointError, match="became"):
        fitted(lr=1e8)


def test_leaving_the_mode_is_refused() -> None:
    """A network that predicts its noise, trained until that is small, under a rate at which SGD jumps far."""
    torch.manual_seed(0)
    x = torch.randn(N, 2)
    y = x[:, :1] * 0.5
    net = nn.Sequential(nn.Linear(2, 20), nn.ReLU(), nn.Linear(20, 2))
    ensemble = pb.inference.DeepEnsemble(net, HeteroscedasticGaussian(), N, num_networks=1)
    point = ensemble.fit((x, y), epochs=300, batch_size=N, lr=1e-2, seed=0, progress=False)
    (trained,) = point.networks(1)
    options: dict[str, Any] = {"epochs": 20, "batch_size": 20, "seed": 0, "progress": False}
    with pytest.raises(FloatingPointError, match=r"SGD has left the mode: .* Give a smaller lr \(it is 0.001\)"):
        SWAG(trained, HeteroscedasticGaussian(), N).fit((x, y), lr=1e-3, **options)
    near = SWAG(trained, HeteroscedasticGaussian(), N).fit((x, y), lr=1e-5, **options)
    assert max(near.losses) < near.losses[0] + 1


def test_a_network_that_warm_up_trains_may_start_anywhere() -> None:
    _, posterior = fitted(warmup_epochs=6)
    assert posterior.losses[-1] < posterior.losses[0]
