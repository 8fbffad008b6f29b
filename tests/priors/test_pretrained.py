"""The prior around the weights of the given network: its density, a closed form, files, and where it is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from pretend_device import DEVICE, PretendDevice
from pyro import poutine
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn.inference import SGHMC, DeepEnsemble, MCDropout, cosine, fit, sample
from pyro_bnn.inference.svi.elbo import MixtureELBO
from pyro_bnn.likelihoods import Gaussian
from pyro_bnn.models import (
    Bella,
    CodebookGuide,
    Dense,
    MeanFieldGuide,
    PointGuide,
    Rank1,
    SharedWeights,
    SpikeSlab,
    WeightSharing,
)
from pyro_bnn.priors import Normal, SpikeAndSlab, pretrained

N, NOISE, SCALE = 30, 0.5, 0.7
PRIOR = pretrained(SCALE)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.1), nn.Tanh(), nn.Linear(4, 1))


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, 3, generator=generator), torch.randn(N, 1, generator=generator)


def given(net: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in net.named_parameters()}


@pytest.mark.parametrize("kind", [Dense, WeightSharing])
def test_density_is_normal_around_the_given_weights(kind: Any) -> None:
    """Also after the network that was given has changed: the model has a copy."""
    net = network()
    centers = given(net)
    model = kind(net, Gaussian(NOISE), N, prior={"0": PRIOR, ".*": Normal(0.3, 0.2)})
    for parameter in net.parameters():
        parameter.data.add_(1.0)
    x, y = data()
    trace = poutine.trace(model).get_trace(x, y)
    trace.compute_log_prob()
    for name, center in centers.items():
        value = trace.nodes[name]["value"]
        loc, scale = (center, SCALE) if name.startswith("0") else (torch.tensor(0.3), 0.2)
        expected = dist.Normal(loc, scale).log_prob(value).sum()
        torch.testing.assert_close(trace.nodes[name]["log_prob_sum"], expected)


def test_mode_of_a_linear_regression_is_the_closed_form() -> None:
    """w = w* + (X'X + noise^2 / scale^2)^-1 X'(y - X w*), and without data that matter it is w* itself."""
    x, y = (part.double() for part in data())
    torch.manual_seed(0)
    net = nn.Linear(3, 1, bias=False).double()
    w = net.weight.detach().clone()[0]
    expected = w + torch.linalg.solve(x.T @ x + (NOISE / SCALE) ** 2 * torch.eye(3).double(), x.T @ (y[:, 0] - x @ w))
    model = Dense(net, Gaussian(NOISE), N, prior=PRIOR)
    options: dict[str, Any] = {"epochs": 800, "lr": 0.05, "schedule": cosine(), "progress": False}
    found = fit(model, PointGuide(model), (x, y), **options).draws(1)["weight"]
    torch.testing.assert_close(found[0, 0, 0], expected, rtol=1e-6, atol=1e-8)
    assert (expected - w).abs().max() > 0.05


def test_divergence_of_a_mean_field_is_the_closed_form() -> None:
    """Means start at w*, so that KL = sum log(scale / s) + s^2 / (2 scale^2) - 1 / 2."""
    net = network()
    model = Dense(net, None, prior=PRIOR)  # without data the loss is the divergence alone
    guide = MeanFieldGuide(model, init_scale=0.05)
    x, _ = data()
    ratio = torch.tensor(0.05 / SCALE)
    numbers = sum(p.numel() for p in net.parameters())
    expected = numbers * (-ratio.log() + ratio.square() / 2 - 0.5)
    divergence = MixtureELBO().loss(model, guide, x)
    assert divergence == pytest.approx(float(expected), rel=1e-5)


def test_files_keep_the_given_weights(tmp_path: Path) -> None:
    """Whatever network is given to load, for a mean field, a codebook, whose weights are else not stored, and draws."""
    net, other = network(), network(1)
    centers = given(net)
    options: dict[str, Any] = {"epochs": 2, "progress": False, "seed": 0}
    model = WeightSharing(net, Gaussian(NOISE), N, prior=PRIOR)
    field = MeanFieldGuide(model)
    posteriors = {"mean field": fit(model, field, data(), **options)}
    posteriors["codebook"] = fit(model, CodebookGuide.from_mean_field(model, field, codes=3), data(), **options)
    posteriors["draws"] = posteriors["codebook"].as_draws(2)
    for name, posterior in posteriors.items():
        posterior.save(tmp_path / name)
        again = pb.load(tmp_path / name, other)
        torch.testing.assert_close(given(again.model.core().net), centers, rtol=0, atol=0, msg=name)
        assert again.model.prior == PRIOR
        latents = {site: value[0] for site, value in posterior.draws(1, seed=0).items()}
        densities = []
        for one in (posterior, again):
            trace = poutine.trace(poutine.condition(one.model, latents)).get_trace(*data())
            densities.append(trace.log_prob_sum())
        torch.testing.assert_close(*densities, msg=name)


def test_chains_and_spike_and_slabs_take_it() -> None:
    """Proves that a gradient with all rows is that of the same prior as a distribution of Pyro."""
    net = network()
    centers = given(net)
    draws = []
    for prior in (PRIOR, lambda name, value: dist.Normal(centers[name], SCALE)):
        mapping = {r"0\.weight": SpikeAndSlab(), ".*": prior}
        model = SpikeSlab(net, Gaussian(NOISE), N, prior=mapping)
        kernel = SGHMC(model, data(), step_size=0.05, friction=0.1, batch_size=N)
        draws.append(sample(kernel, 3, 3, seed=0, progress=False).draws(3))
    torch.testing.assert_close(*draws)


def test_it_follows_device_and_dtype() -> None:
    model = Dense(network().double(), Gaussian(NOISE), N, prior=PRIOR)
    assert model(data()[0].double()).dtype == torch.float64
    model = Dense(network(), Gaussian(NOISE), N, prior=PRIOR)
    x, y = data()
    poutine.trace(model).get_trace(x, y)
    with PretendDevice():
        model.to(DEVICE)
        trace = poutine.trace(model).get_trace(x.to(DEVICE), y.to(DEVICE))
        assert trace.nodes["0.weight"]["fn"].mean.device == torch.device(DEVICE)


def shared(prior: Any = PRIOR) -> SharedWeights:
    model = WeightSharing(network(), Gaussian(NOISE), N)
    guide = CodebookGuide.from_mean_field(model, MeanFieldGuide(model), codes=3)
    return SharedWeights(network(), Gaussian(NOISE), N, codebook=guide.book, prior=prior)


def test_what_shares_no_value_may_stay_near_its_own() -> None:
    """Proves that biases beside shared weights take it, at their given values."""
    net = network()
    x, y = data()
    trace = poutine.trace(shared({"codes|outliers": Normal(), ".*": PRIOR})).get_trace(x, y)
    trace.compute_log_prob()
    for name in ("0.bias", "3.bias"):
        site = trace.nodes[name]
        expected = dist.Normal(given(net)[name], SCALE).log_prob(site["value"]).sum()
        torch.testing.assert_close(site["log_prob_sum"], expected)


@pytest.mark.parametrize(
    ("build", "what"),
    [
        (lambda: Rank1(network(), Gaussian(NOISE), N, prior=PRIOR), "'0.weight.s' is no weight"),
        (lambda: Rank1(network(), Gaussian(NOISE), N, prior={".*": PRIOR}), "'0.weight.s' is no weight"),
        (lambda: Rank1(network(), Gaussian(NOISE), N, prior=lambda name, like: PRIOR), "'0.weight.s' is no weight"),
        (lambda: Bella(network(), Gaussian(NOISE), N, prior=PRIOR), "'0.weight.A' is no weight"),
        (lambda: Bella(network(), Gaussian(NOISE), N, head="3", head_prior=PRIOR), "'3.weight' is no weight"),
        (shared, "'codes' is no weight"),
        (lambda: DeepEnsemble(network(), Gaussian(NOISE), N, prior=PRIOR), "start at new ones"),
        (lambda: MCDropout(network(), Gaussian(NOISE), N, prior=PRIOR), "that training ends at"),
    ],
)
def test_it_is_refused_where_there_are_no_given_weights(build: Callable[[], object], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        build()


def test_point_estimates_have_no_given_weights() -> None:
    with pytest.raises(TypeError, match="without latent scales or given weights"):
        Rank1(network(), Gaussian(NOISE), N, weight_prior=PRIOR)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), True, "wide"])
def test_scales_that_are_none(bad: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="scale"):
        pretrained(bad)
