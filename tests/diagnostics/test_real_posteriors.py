"""The diagnostics on posteriors that were fitted, against what those posteriors say themselves."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import pyro_bnn as pb

pytestmark = pytest.mark.filterwarnings("ignore")


def inputs(n: int = 200) -> Tensor:
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def classifier() -> pb.Posterior:
    x = inputs()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3))
    model = pb.models.Rank1(net, pb.likelihoods.Categorical(), 200)
    guide = pb.models.Rank1Guide(model, components=3)
    return pb.inference.fit(model, guide, (x, classes(x)), epochs=20, lr=1e-2, progress=False, seed=0)


def classes(x: Tensor) -> Tensor:
    return (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()


def linear(likelihood: Any = None) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return pb.models.Dense(nn.Linear(2, 1), likelihood or pb.likelihoods.Gaussian(), 200)


def targets(x: Tensor) -> Tensor:
    return 2 * x[:, :1] - x[:, 1:] + 0.3 * torch.randn(len(x), 1, generator=torch.Generator().manual_seed(2))


def test_metrics_of_a_rank_1_network(classifier: pb.Posterior) -> None:
    x = inputs()
    y = classes(x)
    result = pb.diagnostics.evaluate(classifier, (x, y), ood=10 * x, batch_size=64, seed=5)
    whole = classifier.predict(x, num_samples=16, seed=5)
    assert result["accuracy"] == pytest.approx(float((whole.probs.argmax(-1) == y).double().mean()), abs=1e-6)
    log_likelihood = classifier.log_likelihood(x, y, num_samples=16, seed=5).double()
    nll = math.log(16 * 3) - float(log_likelihood.logsumexp((0, 1)).mean())
    assert result["nll"] == pytest.approx(nll, rel=1e-6)
    assert result["nll"] == pytest.approx(-float(whole.probs[torch.arange(200), y].log().mean()), rel=1e-5)
    assert {"accuracy", "brier", "ece", "ece_adaptive", "aurc", "disagreement", "ood_auroc"} < set(result)
    for name in set(result) - {"nll", "brier", "aleatoric", "epistemic"}:
        assert 0 <= result[name] <= 1, name
    assert result["epistemic"] == pytest.approx(float(whole.mutual_information.mean()), rel=1e-4)
    assert result["aleatoric"] + result["epistemic"] == pytest.approx(float(whole.entropy.mean()), rel=1e-5)


def test_arviz_of_a_rank_1_network(classifier: pb.Posterior) -> None:
    az = pytest.importorskip("arviz")
    x = inputs(50)
    y = classes(x)
    data = pb.diagnostics.to_arviz(classifier, x, y, seed=3)
    posterior = data["posterior"]
    assert {"weight_tau", "weight.s_mean", "weight.r_sd"} <= set(posterior.data_vars)
    assert posterior["weight_tau"].dims == ("chain", "draw", "member", "layer")
    assert posterior["weight_tau"].shape == (1, 100, 3, 2)
    assert posterior.coords["layer"].values.tolist() == ["0", "2"]
    expected = classifier.log_likelihood(x, y, num_samples=100, seed=3).flatten(0, 1)
    np.testing.assert_allclose(data["log_likelihood"]["obs"][0], expected, rtol=1e-5)
    assert az.loo(data).n_data_points == 50
    assert data["training"]["loss"].shape == (len(classifier.losses),)
    az.summary(data)


def test_draws_and_predictions_are_of_the_same_functions() -> None:
    x = inputs()
    model = linear()
    fitted = pb.inference.fit(
        model, pb.models.MeanFieldGuide(model), (x, targets(x)), epochs=5, lr=1e-2, progress=False, seed=0
    )
    data = pb.diagnostics.to_arviz(fitted, x, targets(x), sites=["weight", "bias"], num_samples=20)
    weight, bias, noise = (data["posterior"][name][0].values for name in ("weight", "bias", "noise"))
    mean = np.einsum("soi,ni->sno", weight, x.numpy())[..., 0] + bias
    np.testing.assert_allclose(data["function"]["mean"][0], mean, rtol=1e-4, atol=1e-5)
    residual = (targets(x)[:, 0].numpy() - mean) / noise[:, None]
    density = -0.5 * residual**2 - np.log(noise)[:, None] - 0.5 * math.log(2 * math.pi)
    np.testing.assert_allclose(data["log_likelihood"]["obs"][0], density, rtol=1e-3, atol=1e-4)


def test_a_regression_that_fits_is_covered() -> None:
    x = inputs()
    model = linear(pb.likelihoods.Gaussian(scale=0.3))
    fitted = pb.inference.fit(
        model, pb.models.MeanFieldGuide(model), (x, targets(x)), epochs=100, lr=5e-2, progress=False, seed=0
    )
    result = pb.diagnostics.evaluate(fitted, (x, targets(x)))
    assert result["rmse"] == pytest.approx(0.3, abs=0.05)
    assert result["coverage"] == pytest.approx(0.95, abs=0.04)
    assert result["nll"] == pytest.approx(0.5 * math.log(2 * math.pi * math.e * 0.09), abs=0.15)


@pytest.mark.parametrize(
    ("likelihood", "columns"),
    [(pb.likelihoods.Bernoulli(), 1), (pb.likelihoods.Bernoulli(), 3), (pb.likelihoods.Poisson(), 1)],
)
def test_other_likelihoods(likelihood: pb.likelihoods.Likelihood, columns: int) -> None:
    x = inputs(60)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = pb.models.Dense(nn.Linear(2, columns), likelihood, 60)
        posterior = pb.Posterior(model, pb.models.MeanFieldGuide(model))
    y = (x[:, :1] > torch.tensor([0.0, 0.5, -0.5])[:columns]).float()
    result = pb.diagnostics.evaluate(posterior, (x, y), batch_size=25, seed=0)
    prediction = posterior.predict(x, seed=0)
    assert result["nll"] == pytest.approx(
        -float(prediction.log_prob(y).logsumexp((0, 1)).mean()) + math.log(16), rel=1e-5
    )
    if likelihood.kind == "classification":
        brier = 2 * (prediction.probs.reshape(y.shape) - y).square().mean()
        assert result["brier"] == pytest.approx(float(brier), rel=1e-5)
        entropy = prediction.entropy.reshape(60, -1).mean(1)
        auroc = pb.diagnostics.evaluate(posterior, (x[:30], y[:30]), ood=x[30:], seed=0)["ood_auroc"]
        larger = (entropy[30:, None] > entropy[None, :30]).double().mean()
        assert auroc == pytest.approx(float(larger), abs=1e-3)
    data = pb.diagnostics.to_arviz(posterior, x, y, num_samples=5)
    assert data["log_likelihood"]["obs"].shape == (1, 5, 60)
    assert data["posterior_predictive"]["obs"].shape == data["posterior_predictive"]["obs"].shape[:2] + tuple(
        data["observed_data"]["obs"].shape
    )


def test_all_draws_of_nuts() -> None:
    x = inputs()
    model = linear()
    mcmc = MCMC(NUTS(model), num_samples=30, warmup_steps=30, disable_progbar=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mcmc.run(x, targets(x))
    posterior = pb.Posterior.from_mcmc(mcmc, model)
    data = pb.diagnostics.to_arviz(posterior, x, targets(x))
    np.testing.assert_allclose(data["posterior"]["noise"][0], mcmc.get_samples()["noise"].reshape(-1))
    assert data["log_likelihood"]["obs"].shape == (1, 30, 200)
    assert pytest.importorskip("arviz").loo(data).n_data_points == 200


def test_the_global_random_state_is_left_alone(classifier: pb.Posterior) -> None:
    x = inputs(20)
    before = torch.get_rng_state()
    pb.diagnostics.evaluate(classifier, TensorDataset(x, classes(x)), ood=TensorDataset(x), seed=0)
    pb.diagnostics.to_arviz(classifier, x, classes(x), num_samples=5, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_data_on_the_cpu_and_a_network_on_the_gpu() -> None:
    x = inputs(50)
    for y, columns, likelihood in (
        (classes(x), 3, pb.likelihoods.Categorical()),
        (targets(x), 1, pb.likelihoods.Gaussian()),
    ):
        model = pb.models.Rank1(nn.Linear(2, columns).cuda(), likelihood, 50)
        posterior = pb.Posterior(model, pb.models.Rank1Guide(model, components=2))
        ood = x if columns == 3 else None
        result = pb.diagnostics.evaluate(posterior, (x, y), ood=ood, seed=0)
        assert all(math.isfinite(value) for value in result.values())
        assert pb.diagnostics.evaluate(posterior, (x.cuda(), y.cuda()), ood=ood, seed=0) == pytest.approx(
            result, rel=1e-5
        )
        data = pb.diagnostics.to_arviz(posterior, x, y, num_samples=5)
        assert data["log_likelihood"]["obs"].shape == (1, 10, 50)


def test_data_that_do_not_fit(classifier: pb.Posterior) -> None:
    with pytest.raises(ValueError, match="label 3, but the network has 3 outputs"):
        pb.diagnostics.evaluate(classifier, (inputs(4), torch.tensor([0, 1, 2, 3])))
    with pytest.raises(TypeError, match="class labels must be integers"):
        pb.diagnostics.evaluate(classifier, (inputs(4), torch.zeros(4)))
    x = inputs(4)
    x[1, 0] = math.nan
    with pytest.raises(ValueError, match="x holds 1 NaN"):
        pb.diagnostics.evaluate(classifier, (x, torch.zeros(4).long()))
