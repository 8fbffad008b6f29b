"""What a prior implies, against closed forms; contraction, against conjugate posteriors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from scipy import integrate, special, stats
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn import likelihoods, priors
from pyro_bnn.diagnostics.checking import shrinkage
from pyro_bnn.diagnostics.checking.findings import Finding
from pyro_bnn.diagnostics.checking.prior_checks import check_prior, prior_draws, prior_predictive, prior_summary
from pyro_bnn.diagnostics.checking.shrinkage import contraction

S = 4000  # draws, where moments are compared


def inputs(rows: int = 20, columns: int = 3) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def dense(net: nn.Module, likelihood: Any, prior: Any = priors.Normal(0.0, 1.0), rows: int = 20) -> Any:
    return pb.models.Dense(net, likelihood, rows, prior=prior)


def deep(outputs: int, width: int = 50) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layers = [nn.Linear(3, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs)]
        return nn.Sequential(*layers)


def scaled(name: str, like: Tensor) -> dist.Normal:
    """Variances 2 / fan in, at which the functions of a ReLU network neither grow nor shrink with its depth."""
    return dist.Normal(torch.zeros(()), math.sqrt(2 / like.shape[1]) if like.dim() > 1 else 0.1)


def topics(findings: list[Finding], severity: str = "warning") -> list[str]:
    return [f.topic for f in findings if f.severity == severity]


# --------------------------------------------------------------------------------------------- prior predictive


def test_moments_of_a_linear_network() -> None:
    """``f = w x + b``: mean 0, covariance ``s^2 (x x' + 1)``."""
    x, s = inputs(4), 0.7
    prediction = prior_predictive(dense(nn.Linear(3, 1), likelihoods.Gaussian(scale=0.3), priors.Normal(0.0, s)), x)
    assert prediction.outputs.shape == (200, 1, 4, 1)
    model = dense(nn.Linear(3, 1), likelihoods.Gaussian(scale=0.3), priors.Normal(0.0, s))
    f = prior_predictive(model, x, num_samples=S).outputs[:, 0, :, 0].double().numpy()
    expected = s**2 * (x @ x.T + 1).double().numpy()
    sd = np.sqrt(np.diag(expected))
    np.testing.assert_array_less(np.abs(f.mean(0)), 5 * sd / math.sqrt(S))
    error = np.sqrt((expected**2 + np.outer(sd, sd) ** 2) / S)  # of the covariance of two Normals
    np.testing.assert_array_less(np.abs(np.cov(f.T) - expected), 5 * error)


def test_functions_are_those_of_the_draws() -> None:
    x = inputs()
    model = dense(nn.Linear(3, 2), likelihoods.Categorical())
    (draws,) = prior_draws(model, 7, seed=3)
    expected = torch.einsum("soi,ni->sno", draws["weight"][:, 0], x) + draws["bias"]
    torch.testing.assert_close(prior_predictive(model, x, num_samples=7, seed=3).outputs[:, 0], expected)
    parts = prior_predictive(model, x, num_samples=7, seed=3, batch_size=6).outputs[:, 0]
    torch.testing.assert_close(parts, expected)


def test_draws_come_in_groups_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dense(deep(2), likelihoods.Categorical())
    elements = sum(site.shape.numel() for site in model.sites())
    monkeypatch.setattr("pyro_bnn.posterior.draw_source.MAX_ELEMENTS", 3 * elements + 1)
    groups = list(prior_draws(model, 10))
    assert [len(group["0.weight"]) for group in groups] == [3, 3, 3, 1]
    together = torch.cat([group["0.bias"][:, 0] for group in groups])
    assert len(together.unique(dim=0)) == 10
    assert prior_predictive(model, inputs(), num_samples=10).outputs.shape == (10, 1, 20, 2)


def test_hierarchical_priors_are_drawn_level_by_level() -> None:
    (draws,) = prior_draws(dense(nn.Linear(3, 1), likelihoods.Gaussian(), priors.HierarchicalCauchy(0.2)), S)
    assert set(draws) == {"weight_tau", "bias_tau", "noise", "weight", "bias"}
    tau, weight, noise = draws["weight_tau"][:, 0], draws["weight"][:, 0, 0, 0], draws["noise"][:, 0]
    assert stats.kstest(tau, stats.halfcauchy(scale=0.2).cdf).pvalue > 1e-3
    assert stats.kstest(noise, stats.halfcauchy(scale=1.0).cdf).pvalue > 1e-3
    assert stats.kstest(weight / tau, "cauchy").pvalue > 1e-3
    assert abs(stats.spearmanr(tau, weight.abs()).statistic) > 0.2  # one tau for the draw, not another one


@pytest.mark.parametrize("name", ["Dense", "Rank1", "SpikeSlab", "WeightSharing", "Bella"])
@pytest.mark.parametrize("likelihood", [likelihoods.Categorical(), likelihoods.Gaussian(), None])
def test_every_model_has_prior_functions(name: str, likelihood: Any) -> None:
    x = inputs()
    model = getattr(pb.models, name)(deep(2, width=5), likelihood, 20, members_dim=-3, prefix="net")
    prediction = prior_predictive(model, x, num_samples=11)
    assert prediction.outputs.shape == (11, 1, 20, 2)
    assert len(prediction.outputs.flatten(1).unique(dim=0)) == 11
    if likelihood is None:
        assert torch.equal(prediction.per_member, prediction.outputs)
    else:
        assert check_prior(model, x, num_samples=11)
        assert prediction.sample(seed=0).shape[:3] == (11, 1, 20)


def test_what_is_no_latent_site_is_as_the_network_has_it() -> None:
    """``E[B A] = 0`` in a Bella and ``E[r s] = 1`` in a rank-1 network, so that the mean function is the network's."""
    x, net = inputs(5), nn.Linear(3, 1)
    for model in (
        pb.models.Bella(net, likelihoods.Gaussian(scale=1.0), 5),
        pb.models.Rank1(net, likelihoods.Gaussian(scale=1.0), 5, prior=priors.Normal(1.0, 0.3), member_bias=False),
    ):
        f = prior_predictive(model, x, num_samples=S).outputs[:, 0]
        assert ((f.mean(0) - net(x)).abs() < 5 * f.std(0) / math.sqrt(S)).all()


def test_the_model_and_the_world_stay_as_they_were() -> None:
    model = pb.models.Rank1(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), likelihoods.Categorical(), 20)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    first, second = (check_prior(model, inputs(), seed=5) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(pyro.get_param_store()) == 0
    one, other = (prior_predictive(model, inputs(), num_samples=2, seed=seed).outputs for seed in (0, 1))
    assert not torch.equal(one, other)


# ------------------------------------------------------------------------------------------------------ numbers


def test_numbers_of_a_logistic_regression() -> None:
    """``f(1) ~ N(0, s^2)``: expectations of its probability by quadrature."""
    s, x = 2.0, torch.tensor([[1.0], [-1.0]])
    model = dense(nn.Linear(1, 1, bias=False), likelihoods.Bernoulli(), priors.Normal(0.0, s), rows=2)
    numbers = prior_summary(model, x, num_samples=S)

    def mean(g: Any) -> float:
        return float(integrate.quad(lambda f: g(special.expit(f)) * stats.norm(0, s).pdf(f), -40, 40)[0])

    assert numbers["max_probability"] == pytest.approx(mean(lambda p: max(p, 1 - p)), abs=5 * 0.5 / math.sqrt(S))
    entropy = mean(lambda p: special.entr(p) + special.entr(1 - p))
    assert numbers["expected_entropy"] == pytest.approx(entropy, abs=5 * 0.7 / math.sqrt(S))
    assert numbers["entropy"] == pytest.approx(math.log(2), abs=0.01)
    assert (numbers["one_class"], numbers["classes"], numbers["finite"]) == (0.0, 2.0, 1.0)
    assert prior_summary(model, x.abs())["one_class"] == 1.0


@pytest.mark.parametrize("noise", [0.3, None])
def test_numbers_of_a_linear_regression(noise: float | None) -> None:
    s, x = 2.0, torch.tensor([[1.0], [3.0]])
    model = dense(nn.Linear(1, 1, bias=False), likelihoods.Gaussian(noise), priors.Normal(0.0, s), rows=2)
    y = torch.tensor([4.0, -2.0])
    numbers = prior_summary(model, x, y, num_samples=S)
    # torch takes the lower median of two rows; a 5 % quantile has the relative error 1.3 / sqrt(S)
    assert numbers["scale"] == pytest.approx(s, rel=0.1)
    if noise is not None:
        z = y.numpy() / np.sqrt(s**2 * np.array([1.0, 9.0]) + noise**2)
        assert numbers["distance"] == pytest.approx(math.sqrt((z**2).mean()), rel=0.1)


def test_data_at_the_centre_of_the_prior_are_not_made_distant_by_few_functions() -> None:
    model = dense(nn.Linear(1, 1, bias=False), likelihoods.Gaussian(0.1), rows=2)
    x, y = torch.ones(2, 1), torch.zeros(2)
    found = [prior_summary(model, x, y, num_samples=20, seed=seed)["distance"] for seed in range(21)]
    assert np.median(found) == 0 and max(found) < 1


def test_scales_do_not_need_a_variance() -> None:
    """A Cauchy prior: the distance of its quantiles, ``2 tan(0.45 pi)``, in those of a standard Normal."""
    model = dense(nn.Linear(1, 1, bias=False), likelihoods.Gaussian(1.0), priors.Cauchy(0.0, 1.0), rows=2)
    scale = prior_summary(model, torch.ones(2, 1), num_samples=S)["scale"]
    assert scale == pytest.approx(math.tan(0.45 * math.pi) / stats.norm.ppf(0.95), rel=0.2)


def test_functions_that_overflow_are_counted_and_left_out() -> None:
    """``exp(f)`` is finite in float32 up to f = 88.7."""
    model = dense(nn.Linear(1, 1, bias=False), likelihoods.Poisson(), priors.Normal(0.0, 100.0), rows=2)
    x, y = torch.ones(2, 1), torch.ones(2, 1)
    numbers = prior_summary(model, x, y, num_samples=S)
    expected = stats.norm.cdf(math.log(float(np.finfo(np.float32).max)) / 100)
    assert numbers["finite"] == pytest.approx(expected, abs=5 * 0.5 / math.sqrt(S))
    assert all(math.isfinite(value) for value in numbers.values())
    overflow = check_prior(model, x, y)[0]
    assert overflow.severity == "warning" and re_share(overflow.message) == pytest.approx(1 - expected, abs=0.15)
    certain = dense(nn.Linear(1, 1, bias=False), likelihoods.Poisson(), priors.Normal(1e4, 1.0), rows=2)
    assert prior_summary(certain, x) == {"finite": 0.0}
    assert topics(check_prior(certain, x), "problem") == ["overflow"]


def re_share(message: str) -> float:
    return float(message.split("%")[0]) / 100


# ----------------------------------------------------------------------------------------------------- findings


def test_a_deep_network_with_standard_normal_weights_saturates_and_a_scaled_one_does_not() -> None:
    x = inputs()
    findings = check_prior(dense(deep(3), likelihoods.Categorical()), x)
    assert "saturation" in topics(findings)
    assert "above 0.81" in findings[0].message  # (1 + (1 + 1/2 + 1/3) / 3) / 2
    assert topics(check_prior(dense(deep(3), likelihoods.Categorical(), scaled), x)) == []


def test_functions_that_do_not_depend_on_x() -> None:
    prior = {".*weight": priors.Normal(0.0, 0.01), ".*bias": priors.Normal(0.0, 1.0)}
    assert topics(check_prior(dense(nn.Linear(3, 3), likelihoods.Categorical(), prior), inputs())) == ["one class"]


def test_a_prior_that_prefers_a_class() -> None:
    prior = {".*weight": priors.Normal(0.0, 0.1), ".*bias": dist.Normal(torch.tensor([2.0, 0.0]), 0.1)}
    findings = check_prior(dense(nn.Linear(3, 2), likelihoods.Categorical(), prior), inputs())
    assert topics(findings, "note") == ["preferred class"]
    few = check_prior(dense(deep(10), likelihoods.Categorical()), inputs(), num_samples=20)
    assert topics(few, "note") == []  # 20 functions cannot be spread evenly over 10 classes


@pytest.mark.parametrize(
    ("scale", "severity", "words"),
    [
        (1.0, "good", "from its centre"),
        (100.0, "warning", "far larger values"),
        (0.01, "warning", "from the centre of the prior"),
    ],
)
def test_priors_of_a_regression_against_its_data(scale: float, severity: str, words: str) -> None:
    x = inputs()
    y = x @ torch.tensor([1.0, -1.0, 0.5])
    model = dense(nn.Linear(3, 1), likelihoods.Gaussian(scale=0.1), priors.Normal(0.0, scale))
    (finding,) = check_prior(model, x, y, num_samples=1000)
    assert finding.severity == severity and words in finding.message
    (without,) = check_prior(model, x)
    assert without.severity == "note" and "give y" in without.message


def test_bad_input() -> None:
    x = inputs()
    model = dense(nn.Linear(3, 1), likelihoods.Gaussian(scale=1.0))
    with pytest.raises(TypeError, match=r"got function: .*prior_predictive\(model, x, return_site"):
        check_prior(lambda x: None, x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the model has no likelihood"):
        check_prior(dense(nn.Linear(3, 1), None), x)
    with pytest.raises(ValueError, match="x has 1 rows"):
        check_prior(model, x[:1])
    with pytest.raises(ValueError, match="x and y disagree"):
        check_prior(model, x, torch.zeros(3))
    with pytest.raises(ValueError, match=r"y has shape \(20, 2\); expected \(20,\) for this network"):
        check_prior(model, x, torch.zeros(20, 2))
    with pytest.raises(ValueError, match="y holds NaN"):
        check_prior(model, x, torch.full((20,), math.nan))
    with pytest.raises(ValueError, match="x holds 60 NaN"):
        prior_predictive(model, x * math.nan)
    with pytest.raises(ValueError, match="num_samples=0"):
        prior_predictive(model, x, num_samples=0)
    flat = pb.models.Rank1(nn.Linear(3, 1), likelihoods.Gaussian(scale=1.0), 20, weight_prior=None)
    with pytest.raises(ValueError, match="the prior is improper"):
        prior_predictive(flat, x)


# -------------------------------------------------------------------------------------------------- contraction


def solved(x: Tensor, y: Tensor, noise: float, prior: float, n: int) -> tuple[pb.Posterior, Tensor]:
    """Draws of the exact posterior of a linear regression without bias, and its covariance."""
    precision = x.T @ x / noise**2 + torch.eye(x.shape[1]) / prior**2
    covariance = torch.linalg.inv(precision)
    mean = covariance @ x.T @ y / noise**2
    root = torch.linalg.cholesky(covariance)
    draws = mean + torch.randn(n, x.shape[1], generator=torch.Generator().manual_seed(1)) @ root.T
    likelihood = likelihoods.Gaussian(scale=noise)
    model = dense(nn.Linear(x.shape[1], 1, bias=False), likelihood, priors.Normal(0.0, prior), rows=len(x))
    return pb.Posterior.from_draws(model, {"weight": draws[:, None]}), covariance


def test_contraction_of_a_linear_regression_is_that_of_its_variances() -> None:
    # The third weight has hardly any data.
    x, noise, prior = inputs(6) * torch.tensor([1.0, 0.5, 1e-3]), 0.8, 1.5
    posterior, covariance = solved(x, x[:, 0], noise, prior, S)
    found = contraction(posterior, x, seed=0)
    exact = 1 - covariance.diagonal() / prior**2
    error = 2.5 / math.sqrt(S)
    assert found["weight"].mean == pytest.approx(float(exact.mean()), abs=5 * error)
    assert found["weight"].elements == 3
    exact_f = 1 - (x @ covariance * x).sum(1) / (prior**2 * x.square().sum(1))
    assert found["function"].mean == pytest.approx(float(exact_f.mean()), abs=5 * error)
    assert float(exact[1]) > 0.3 and float(exact[2]) < 1e-4
    alone = contraction(solved(x[:, :2], x[:, 0], noise, prior, S)[0])
    assert set(alone) == {"weight"} and alone["weight"].uninformed == 0
    assert contraction(posterior, x, seed=0) == found


def test_a_posterior_that_is_its_prior_has_no_contraction() -> None:
    model = dense(nn.Linear(400, 1, bias=False), likelihoods.Gaussian(scale=1.0))
    (draws,) = prior_draws(model, S, seed=9)
    (found,) = contraction(pb.Posterior.from_draws(model, draws)).values()
    deviation = 2.5 / math.sqrt(S)
    assert found.mean == pytest.approx(0, abs=5 * deviation / math.sqrt(400))
    # an element is left out where the error of this deviation is beyond two of them and 0.05
    assert found.uninformed == pytest.approx(stats.norm.cdf(2 + 0.05 / deviation), abs=5 * 0.2 / 20)


@pytest.mark.parametrize(("draws", "members"), [(4, 50), (10, 20)])
def test_members_do_not_change_the_contraction(draws: int, members: int) -> None:
    """Few draws of many members have a width; as few of the prior would have a smaller one."""
    model = dense(nn.Linear(400, 1, bias=False), likelihoods.Gaussian(scale=1.0))
    same = torch.randn(draws, members, 1, 400, generator=torch.Generator().manual_seed(0))
    found = contraction(pb.Posterior.from_draws(model, {"weight": same}), torch.randn(5, 400))
    deviation = 2.5 / math.sqrt(draws * members)
    assert found["weight"].mean == pytest.approx(0, abs=5 * deviation / math.sqrt(400) + deviation**2)
    assert found["function"].mean == pytest.approx(0, abs=5 * deviation)


def test_the_temperature_of_predictions_is_no_contraction() -> None:
    model = dense(nn.Linear(2, 3), likelihoods.Categorical())
    (draws,) = prior_draws(model, S, seed=9)
    posterior, x = pb.Posterior.from_draws(model, draws), torch.randn(4, 2)
    scaled = pb.diagnostics.ScaledPosterior(posterior, 2.0)
    assert contraction(scaled, x, seed=0) == contraction(posterior, x, seed=0)


def test_the_share_of_uninformed_elements() -> None:
    model = dense(nn.Linear(8, 1, bias=False), likelihoods.Gaussian(scale=1.0))
    draws = torch.randn(500, 1, 8, generator=torch.Generator().manual_seed(2))
    draws[:, :, :2] *= 2  # wider than the prior
    draws[:, :, 2:] *= 0.1
    found = contraction(pb.Posterior.from_draws(model, {"weight": draws}))["weight"]
    assert found.uninformed == 0.25
    assert found.mean == pytest.approx((2 * (1 - 4) + 6 * (1 - 0.01)) / 8, abs=0.5)


def test_a_small_contraction_counts_when_the_draws_can_tell() -> None:
    model = dense(nn.Linear(8, 1, bias=False), likelihoods.Gaussian(scale=1.0))
    draws = math.sqrt(0.86) * torch.randn(20_000, 1, 8, generator=torch.Generator().manual_seed(2))
    found = contraction(pb.Posterior.from_draws(model, {"weight": draws}))["weight"]
    assert found.mean == pytest.approx(0.14, abs=0.02) and found.uninformed == 0
    few = contraction(pb.Posterior.from_draws(model, {"weight": draws[:200]}))["weight"]
    assert few.uninformed >= 0.5


def test_a_cauchy_prior_has_a_contraction_too() -> None:
    model = dense(nn.Linear(200, 1, bias=False), likelihoods.Gaussian(scale=1.0), priors.Cauchy(0.0, 1.0))
    draws = 4 * torch.randn(S, 1, 200, generator=torch.Generator().manual_seed(3))
    exact = 1 - (4 * stats.norm.ppf(0.95) / stats.cauchy.ppf(0.95)) ** 2
    (found,) = contraction(pb.Posterior.from_draws(model, {"weight": draws})).values()
    assert found.mean == pytest.approx(exact, abs=0.05)


def test_members_are_one_posterior_and_points_have_contracted_fully() -> None:
    model = dense(nn.Linear(3, 1, bias=False), likelihoods.Gaussian(scale=1.0))
    apart = 10.0 * torch.tensor([-1.0, 1.0])[None, :, None, None] + torch.zeros(50, 2, 1, 3)
    found = contraction(pb.Posterior.from_draws(model, {"weight": apart}))["weight"]
    assert found.mean < 1 - (20 / 3.29) ** 2 * 0.5 and found.uninformed == 1
    point = contraction(pb.Posterior(model, pb.models.dense.PointGuide(model)), inputs(), num_samples=10)
    assert point["weight"].mean == 1 and point["function"].mean == 1


def test_large_sites_are_judged_by_a_part_of_their_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shrinkage, "_MAX_ELEMENTS", 100 * 2 * 2 * 7)  # draws, members, sites
    model = dense(nn.Linear(50, 5), likelihoods.Gaussian(scale=1.0))
    found = contraction(pb.Posterior(model, pb.models.MeanFieldGuide(model, components=2)), num_samples=100)
    assert {name: one.elements for name, one in found.items()} == {"weight": 7, "bias": 5}
    assert all(one.mean > 0.99 for one in found.values())  # it starts narrow


def test_contraction_of_mixtures_and_hierarchies() -> None:
    model = pb.models.Rank1(deep(2, width=5), likelihoods.Categorical(), 20)
    posterior = pb.Posterior(model, pb.models.Rank1Guide(model, components=2))
    random = torch.get_rng_state()
    found = contraction(posterior, inputs(), num_samples=50, seed=0)
    assert set(found) == {site.name for site in model.sites()} | {"function"}
    assert all(math.isfinite(one.mean) for one in found.values())
    assert torch.equal(torch.get_rng_state(), random)


def test_contraction_of_a_model_that_is_not_of_this_package() -> None:
    def program(x: Tensor, y: Tensor | None = None) -> Tensor:
        m = pyro.sample("m", dist.Normal(0.0, 2.0).expand([3]).to_event(1))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(x @ m, 1.0), obs=y)

    x = inputs()
    with pyro.get_param_store().scope():
        guide = AutoNormal(program, init_scale=0.5)
        guide(x, x[:, 0])
    found = contraction(pb.Posterior(program, guide), x, num_samples=300)
    assert set(found) == {"m"}
    assert found["m"].mean == pytest.approx(1 - (0.5 / 2) ** 2, abs=0.05)


def test_what_has_no_contraction() -> None:
    model = dense(nn.Linear(3, 1, bias=False), likelihoods.Gaussian(scale=1.0))
    posterior = pb.Posterior.from_draws(model, {"weight": torch.randn(5, 1, 3)})
    with pytest.raises(ValueError, match="num_samples=1: expected at least 2"):
        contraction(posterior, num_samples=1)
    with pytest.raises(ValueError, match="only 5 draws are stored"):
        contraction(posterior, num_samples=6)
    with pytest.raises(ValueError, match="the posterior of 'weight' holds NaN"):
        contraction(pb.Posterior.from_draws(model, {"weight": torch.full((5, 1, 3), math.nan)}))
    fixed = dense(nn.Linear(3, 1, bias=False), likelihoods.Gaussian(scale=1.0), dist.Delta(torch.tensor(1.0)))
    with pytest.raises(ValueError, match="the prior of 'weight' is a point"):
        contraction(pb.Posterior.from_draws(fixed, {"weight": torch.randn(5, 1, 3)}))
    flat = pb.models.Rank1(nn.Linear(3, 1), likelihoods.Gaussian(scale=1.0), 20, weight_prior=None)
    with pytest.raises(ValueError, match="the prior is improper"):
        contraction(pb.Posterior(flat, pb.models.Rank1Guide(flat)))
