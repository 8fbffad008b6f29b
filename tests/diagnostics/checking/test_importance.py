"""Importance ratios of draws, against Gaussian linear models, whose posterior and leave-one-out density are known."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from arviz_names import elpd
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn.diagnostics.arviz.densities import log_densities, log_prior
from pyro_bnn.diagnostics.checking.importance import compare_loo, fixed_weights, loo, pareto_k

pytestmark = pytest.mark.filterwarnings("ignore")

N, NOISE = 40, 0.5


def regression() -> tuple[Any, Tensor, Tensor, Tensor, Tensor]:
    """Two inputs under the prior N(0, 1), and the exact posterior's mean and covariance."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 2, generator=generator, dtype=torch.float64)
    y = x @ torch.tensor([[1.0], [-2.0]]).double() + NOISE * torch.randn(N, 1, generator=generator).double()
    model = pb.models.Dense(nn.Linear(2, 1, bias=False).double(), pb.likelihoods.Gaussian(scale=NOISE), N)
    covariance = torch.linalg.inv(torch.eye(2).double() + x.T @ x / NOISE**2)
    return model, x, y, covariance @ x.T @ y / NOISE**2, covariance


def mean_field(model: Any, mean: Tensor, sd: Tensor) -> pb.Posterior:
    guide = pb.models.MeanFieldGuide(model)
    with torch.no_grad():
        guide.loc[0].copy_(mean.reshape(1, -1))
        guide.rho[0].copy_(sd.expm1().log().reshape(1, -1))
    return pb.Posterior(model, guide)


def exact_loo(x: Tensor, y: Tensor) -> float:
    total = 0.0
    for i in range(N):
        kept = torch.arange(N) != i
        covariance = torch.linalg.inv(torch.eye(2).double() + x[kept].T @ x[kept] / NOISE**2)
        mean = covariance @ x[kept].T @ y[kept] / NOISE**2
        sd = float((x[i] @ covariance @ x[i] + NOISE**2).sqrt())
        total += scipy.stats.norm.logpdf(float(y[i]), float(x[i] @ mean.flatten()), sd)
    return total


# --------------------------------------------------------------------------------------------------------- densities


def test_densities_of_a_mixture_equal_those_written_out() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
    model = pb.models.Dense(net, pb.likelihoods.Categorical(), 10)
    guide = pb.models.MeanFieldGuide(model, components=3, init_scale=0.3)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    posterior = pb.Posterior(model, guide)
    log_p, log_q = log_densities(posterior, 5, seed=1)
    assert log_q is not None and log_p.shape == log_q.shape == (5, 3)
    loc, rho = guide.coordinates(), guide.widths()
    prior, components = torch.zeros(5, 3), torch.zeros(5, 3, 3)
    for site, value in posterior.draws(5, seed=1).items():
        prior += torch.distributions.Normal(0, 1).log_prob(value).flatten(2).sum(-1)
        each = torch.distributions.Normal(loc[site], nn.functional.softplus(rho[site])).log_prob(value.unsqueeze(2))
        components += each.flatten(3).sum(-1)
    torch.testing.assert_close(log_p.float(), prior, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_q.float(), components.logsumexp(-1) - math.log(3), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "prior", [pb.priors.HierarchicalCauchy(), pb.priors.Horseshoe(), pb.priors.StudentT(1.0, 0.1)], ids=repr
)
def test_prior_densities_equal_those_of_the_program(prior: Any) -> None:
    """Against Pyro's own trace of the model, one draw of one member at a time."""
    torch.manual_seed(0)
    model = pb.models.Rank1(
        nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)), pb.likelihoods.Gaussian(), 10, prior=prior
    )
    posterior = pb.Posterior(model, pb.models.Rank1Guide(model, components=2))
    draws = posterior.draws(3, seed=4)
    found = log_prior(model, draws)
    for i in range(3):
        for k in range(2):
            one = {name: model.plated(value[i : i + 1, k : k + 1])[0] for name, value in draws.items()}
            trace = pyro.poutine.trace(pyro.poutine.condition(model, one)).get_trace(torch.zeros(10, 2))
            trace.compute_log_prob()
            expected = sum(float(trace.nodes[name]["unscaled_log_prob"].sum()) for name in draws)
            assert float(found[i, k]) == pytest.approx(expected, rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("family", [AutoNormal, AutoMultivariateNormal])
def test_densities_of_pyro_guides(family: Any) -> None:
    model, x, y, _, _ = regression()
    guide = family(model, init_scale=0.3)
    guide(x, y)
    posterior = pb.Posterior(model, guide, example=x)
    _, log_q = log_densities(posterior, 6, seed=2)
    assert log_q is not None
    weights = posterior.draws(6, seed=2)["weight"].flatten(1)
    if family is AutoNormal:
        expected = torch.distributions.Normal(guide.locs.weight.flatten(), 0.3).log_prob(weights).sum(-1)
    else:
        expected = guide.get_posterior().log_prob(weights)
    torch.testing.assert_close(log_q[:, 0], expected.double().detach())


def test_points_and_stored_draws_have_no_density() -> None:
    model, x, y, _, _ = regression()
    delta = AutoDelta(model)
    delta(x, y)
    stored = pb.Posterior.from_draws(model, {"weight": torch.randn(4, 1, 2).double()})
    for posterior in (pb.Posterior(model, delta, example=x), pb.Posterior(model, pb.models.PointGuide(model)), stored):
        log_p, log_q = log_densities(posterior, 3, seed=0)
        assert log_q is None and log_p.shape == (3, 1)


def test_members_of_their_own_biases_count_with_their_own_density() -> None:
    """Points have no density to average: the mixture is then that of the draw's member, over K."""
    torch.manual_seed(0)
    model = pb.models.Rank1(nn.Linear(2, 2), pb.likelihoods.Categorical(), 10)
    guide = pb.models.Rank1Guide(model, components=2)
    with torch.no_grad():
        guide.point[0].add_(torch.randn_like(guide.point[0]))
    _, log_q = log_densities(pb.Posterior(model, guide), 4, seed=0)
    assert log_q is not None and torch.isfinite(log_q).all()


@pytest.mark.parametrize("auxiliary", [False, True])
def test_densities_of_guides_that_are_functions(auxiliary: bool) -> None:
    """A scalar and a vector in plates of their own; with an auxiliary site the trace has the density of both."""

    def guide(x: Any = None, y: Any = None) -> None:
        if auxiliary:
            with pyro.plate("rows of it", 5):
                pyro.sample("u", pyro.distributions.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("weight", pyro.distributions.Normal(torch.zeros(1, 2).double(), 0.5).to_event(2))

    model, *_ = regression()
    posterior = pb.Posterior(model, guide)
    _, log_q = log_densities(posterior, 4, seed=0)
    if auxiliary:
        assert log_q is None
    else:
        expected = torch.distributions.Normal(0, 0.5).log_prob(posterior.draws(4, seed=0)["weight"]).flatten(1).sum(1)
        torch.testing.assert_close(log_q, expected.unsqueeze(1))


def test_arviz_has_the_densities() -> None:
    model, x, y, mean, covariance = regression()
    posterior = mean_field(model, mean, covariance.diagonal().sqrt())
    stats = pb.diagnostics.to_arviz(posterior, x, y, num_samples=7, seed=3)["sample_stats"]
    weights = posterior.draws(7, seed=3)["weight"].reshape(7, 2)
    prior = torch.distributions.Normal(0, 1).log_prob(weights).sum(-1)
    joint = prior + torch.distributions.Normal(weights @ x.T, NOISE).log_prob(y.T).sum(-1)
    np.testing.assert_allclose(stats["log_prior"][0], prior, rtol=1e-10)
    np.testing.assert_allclose(stats["lp"][0], joint, rtol=1e-10)
    np.testing.assert_array_equal(stats["log_p"], stats["lp"])
    guide = torch.distributions.Normal(mean.flatten(), covariance.diagonal().sqrt()).log_prob(weights).sum(-1)
    np.testing.assert_allclose(stats["log_q"][0], guide, rtol=1e-5)  # scales are softplus + 1e-7
    part = pb.diagnostics.to_arviz(posterior, x[:-1], y[:-1], num_samples=7, seed=3)["sample_stats"]
    assert set(part.data_vars) == {"log_prior", "log_q"}  # the joint density is that of all training data


# ------------------------------------------------------------------------------------------------------ k-hat and LOO


@pytest.mark.parametrize(
    ("factor", "low", "high"), [(1.0, -math.inf, 0.5), (0.25, 0.7, math.inf), (2.0, -math.inf, 0.5)]
)
def test_k_hat_tells_a_good_fit_from_a_narrow_one(factor: float, low: float, high: float) -> None:
    """With q a quarter as wide as p, the ratio of two Gaussians has no mean: 1 / k = 1 / (1 - 1/16) for one weight.

    A guide that is too wide is safe for importance sampling.
    """
    model, x, y, mean, covariance = regression()
    found = pareto_k(mean_field(model, mean, factor * covariance.diagonal().sqrt()), x, y)
    assert low < found.k < high
    assert found.draws == 1000 and found.good == pytest.approx(1 - 1 / 3)
    assert (found.ess > 200) == (found.k < 0.7)


def test_a_mixture_is_one_guide() -> None:
    """Two members that are each a half of the mass, far from one another, are together exact."""
    model, x, y, mean, covariance = regression()
    guide = pb.models.MeanFieldGuide(model, components=2)
    with torch.no_grad():
        guide.loc[0].copy_(mean.reshape(1, -1).expand(2, -1))
        guide.rho[0].copy_(covariance.diagonal().sqrt().expm1().log().reshape(1, -1).expand(2, -1))
    twice = pareto_k(pb.Posterior(model, guide), x, y, num_samples=500, seed=1)
    assert twice.draws == 1000 and twice.k < 0.5
    with torch.no_grad():
        guide.loc[0][1] += 100.0  # the other member is far away: draws of it have no weight, and cost half of the draws
    astray = pareto_k(pb.Posterior(model, guide), x, y, num_samples=500, seed=1)
    assert astray.ess == pytest.approx(500, rel=0.1)


def test_loo_of_a_variational_posterior_is_that_of_the_exact_one() -> None:
    model, x, y, mean, covariance = regression()
    result = loo(mean_field(model, mean, 1.2 * covariance.diagonal().sqrt()), x, y, num_samples=4000)
    expected = exact_loo(x, y)
    # The Monte Carlo error of the sum is below that of 40 log means of 4000 draws whose densities vary by some 20 %.
    assert elpd(result) == pytest.approx(expected, abs=0.1)
    assert float(np.asarray(result.pareto_k).max()) < 0.5
    stored = torch.distributions.MultivariateNormal(mean.flatten(), covariance).sample((4000,)).reshape(4000, 1, 2)
    draws = loo(pb.Posterior.from_draws(model, {"weight": stored}), x, y)
    assert elpd(draws) == pytest.approx(expected, abs=0.1)


def test_standard_error_of_loo_is_that_of_a_sum_over_data() -> None:
    """Proves ``se = sqrt(N var(elpd_i))`` by hand, and with it that of draws of the exact posterior.

    The variance divides by N in ArviZ 0.x and by N - 1 in 1.x, and ours follows the one that is installed.
    """
    model, x, y, mean, covariance = regression()
    posterior = mean_field(model, mean, 1.2 * covariance.diagonal().sqrt())
    result = loo(posterior, x, y, num_samples=4000, seed=0)
    each = np.asarray(result.loo_i if hasattr(result, "loo_i") else result.elpd_i)
    assert each.shape == (N,) and each.sum() == pytest.approx(elpd(result))
    divisor = N if hasattr(result, "loo_i") else N - 1
    by_hand = math.sqrt(N * sum((value - each.mean()) ** 2 for value in each) / divisor)
    assert float(result.se) == pytest.approx(by_hand, rel=1e-9)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4000, 2, generator=generator, dtype=torch.float64)
    stored = mean.flatten() + noise @ torch.linalg.cholesky(covariance).T
    exact = loo(pb.Posterior.from_draws(model, {"weight": stored.reshape(4000, 1, 2)}), x, y)
    assert float(exact.se) == pytest.approx(by_hand, rel=0.02)


def test_loo_flags_a_posterior_that_was_shrunk_to_a_quarter() -> None:
    """Its draws agree with one another, so that smoothing without p / q calls it reliable."""
    model, x, y, mean, covariance = regression()
    narrow = mean_field(model, mean, covariance.diagonal().sqrt() / 4)
    plain = loo(pb.Posterior.from_draws(model, narrow.sample(1000, seed=0)), x, y)
    assert float(np.asarray(plain.pareto_k).max()) < 0.5 and not plain.warning
    with pytest.warns(UserWarning):
        corrected = loo(narrow, x, y)
    assert corrected.warning and float(np.asarray(corrected.pareto_k).min()) > 0.7


def test_draws_of_a_guide_are_no_sampler() -> None:
    """Stored, a narrow guide keeps its draws and loses its density: leave-one-out would call it reliable."""
    model, x, y, mean, covariance = regression()
    narrow = mean_field(model, mean, covariance.diagonal().sqrt() / 4).as_draws(200, seed=0)
    assert not narrow.is_sampled and not narrow.as_draws(100).is_sampled
    points = pb.Posterior(model, pb.models.PointGuide(model))
    for posterior, settings in ((narrow, {}), (points, {"num_samples": 200})):
        with pytest.raises(ValueError, match="neither from a sampler nor from a guide with a density"):
            loo(posterior, x, y, **settings)


def test_scaled_and_tempered_posteriors_are_refused() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(N, 2), torch.randint(3, (N,))
    for temperature in (1.0, 0.5):
        likelihood = pb.likelihoods.Categorical(temperature=temperature)
        model = pb.models.Dense(nn.Linear(2, 3), likelihood, N)
        posterior = pb.Posterior(model, pb.models.MeanFieldGuide(model))
        joint = pb.diagnostics.to_arviz(posterior, x, y, num_samples=5)
        expected = joint["sample_stats"]["log_prior"] + joint["log_likelihood"]["obs"].sum("obs_id") / temperature
        np.testing.assert_allclose(joint["sample_stats"]["lp"], expected, rtol=1e-6)
        if temperature != 1:
            with pytest.raises(ValueError, match="the likelihood or the sampler has a temperature"):
                loo(posterior, x, y)
    scaled = pb.diagnostics.ScaledPosterior(posterior, 2.0)
    assert "lp" not in pb.diagnostics.to_arviz(scaled, x, y, num_samples=5)["sample_stats"]
    for function in (pareto_k, loo):
        with pytest.raises(ValueError, match="the posterior inside"):
            function(scaled, x, y)


def test_a_cold_chain_is_refused() -> None:
    """Its draws lie closer together than those of the posterior: every datum looks easy to leave out."""
    model, x, y, mean, covariance = regression()
    cold = torch.distributions.MultivariateNormal(mean.flatten(), 0.01 * covariance).sample((200,))
    posterior = pb.Posterior.from_draws(model, {"weight": cold.reshape(200, 1, 2)})
    posterior.sampler["temperature"] = 0.01
    with pytest.raises(ValueError, match="sample at temperature=1"):
        loo(posterior, x, y)
    posterior.sampler["temperature"] = 1.0
    assert elpd(loo(posterior, x, y)) < 0


def test_chains_that_disagree_are_told() -> None:
    model, x, y, mean, covariance = regression()
    draws = torch.distributions.MultivariateNormal(mean.flatten(), covariance).sample((400,)).reshape(400, 1, 2)
    for shift, told in ((0.0, False), (2.0, True)):
        moved = draws.clone()
        moved[:200] += shift
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loo(pb.Posterior.from_draws(model, {"weight": moved}, num_chains=2), x, y)
        assert any("the chains do not agree" in str(w.message) for w in caught) == told


def test_k_hat_is_that_of_the_tempered_posterior() -> None:
    """Under a likelihood of temperature T the posterior is the one of the noise variance T NOISE^2."""
    model, x, y, _, _ = regression()
    temperature = 0.25  # without it the posterior would be twice as wide
    covariance = torch.linalg.inv(torch.eye(2).double() + x.T @ x / (temperature * NOISE**2))
    likelihood = pb.likelihoods.Gaussian(scale=NOISE, temperature=temperature)
    tempered = pb.models.Dense(nn.Linear(2, 1, bias=False).double(), likelihood, N)
    mean = covariance @ x.T @ y / (temperature * NOISE**2)
    fitted = mean_field(tempered, mean, 1.2 * covariance.diagonal().sqrt())
    assert pareto_k(fitted, x, y).k < 0.5
    assert pareto_k(mean_field(tempered, mean, covariance.diagonal().sqrt() / 4), x, y).k > 0.7


def test_weights_that_are_not_random_are_told() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(N, 2), torch.randint(3, (N,))
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
    models = pb.models
    rank1 = models.Rank1(net, pb.likelihoods.Categorical(), N)
    dense = models.Dense(net, pb.likelihoods.Categorical(), N)
    plain = models.Dense(nn.Linear(2, 3), pb.likelihoods.Categorical(), N)
    shared = models.SharedWeights(
        net,
        pb.likelihoods.Categorical(),
        N,
        codebook=models.CodebookGuide.from_network(
            models.WeightSharing(net, pb.likelihoods.Categorical(), N), codes=4
        ).book,
    )
    for model, guide, fixed in (
        (rank1, models.Rank1Guide(rank1), 2 * 4 + 4 * 3 + 2 * 4),  # both matrices, the gain and bias of the layer
        (dense, models.MeanFieldGuide(dense), 2 * 4),
        (shared, shared.shared_guide(), 2 * 4),
        (plain, models.MeanFieldGuide(plain), 0),
    ):
        posterior = pb.Posterior(model, guide)
        assert fixed_weights(posterior) == fixed
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loo(posterior, x, y, num_samples=200)
        assert any(f"{fixed} parameters of the network are not random" in str(w.message) for w in caught) == bool(fixed)


def test_leave_one_out_of_a_model_of_ones_own() -> None:
    """Exact draws of the same Gaussian linear model, written in Pyro: the same result as with ours."""
    model, x, y, mean, covariance = regression()
    draws = torch.distributions.MultivariateNormal(mean.flatten(), covariance).sample((1000,))

    def own(x: Tensor, y: Tensor | None = None) -> Tensor:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(x @ weight, NOISE), obs=y)

    ours = loo(pb.Posterior.from_draws(model, {"weight": draws.reshape(1000, 1, 2)}), x, y)
    posterior = pb.Posterior.from_draws(own, {"weight": draws})
    assert elpd(loo(posterior, x, y.flatten())) == pytest.approx(elpd(ours), abs=1e-6)
    stored = pb.Posterior(own, AutoNormal(own), example=x).as_draws(200, example=x)
    with pytest.raises(ValueError, match="neither from a sampler nor from a guide"):
        loo(stored, x, y.flatten())
    with pytest.raises(ValueError, match="its model is not one of this package"):
        pareto_k(posterior, x, y.flatten())


def test_models_are_compared() -> None:
    model, x, y, mean, covariance = regression()
    good = mean_field(model, mean, covariance.diagonal().sqrt())
    stored = {"weight": torch.distributions.MultivariateNormal(mean.flatten() + 0.3, covariance).sample((500,))}
    worse = pb.Posterior.from_draws(model, {"weight": stored["weight"].reshape(500, 1, 2)})
    table = compare_loo({"shifted": worse, "good": good}, x, y)
    assert table.index.tolist() == ["good", "shifted"]
    with pytest.raises(ValueError, match="at least two, got 1"):
        compare_loo({"one": good}, x, y)
    with pytest.raises(TypeError, match="give {name: posterior}, got list"):
        compare_loo([good, good], x, y)  # type: ignore[arg-type]
    for function in (loo, pareto_k):
        with pytest.raises(TypeError, match="expected a posterior, got Dense"):
            function(model, x, y)
    with pytest.raises(TypeError, match="expected a posterior, got Dense"):
        pb.diagnostics.contraction(model)
    with pytest.raises(TypeError, match="expected a posterior, got dict"):
        pb.diagnostics.convergence({"good": good}, x)  # type: ignore[arg-type]


def test_bad_input() -> None:
    model, x, y, mean, covariance = regression()
    posterior = mean_field(model, mean, covariance.diagonal().sqrt())
    for function in (pareto_k, loo):
        with pytest.raises(ValueError, match=r"hold 39 data, but the model was trained on num_data=40"):
            function(posterior, x[:-1], y[:-1])
        with pytest.raises(ValueError, match="50 draws of 1 members are 50: smoothing takes at least 100"):
            function(posterior, x, y, num_samples=50)
    with pytest.raises(ValueError, match="this posterior has no such density: it consists of stored draws"):
        pareto_k(pb.Posterior.from_draws(model, {"weight": torch.randn(200, 1, 2).double()}), x, y)
    with pytest.raises(ValueError, match="y is missing"):
        loo(posterior, x, None)  # type: ignore[arg-type]
