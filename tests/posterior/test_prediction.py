"""What a posterior says about new data, against SciPy: quantiles, parts of the uncertainty, values of functions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from by_hand import chain
from pyro.infer import MCMC, NUTS, Predictive
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoNormal
from scipy import optimize, stats
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn.likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    HeteroscedasticGaussian,
    Poisson,
)
from pyro_bnn.models import Dense, MeanFieldGuide, PointGuide, Rank1, Rank1Guide
from pyro_bnn.posterior import storage

N = 12


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ uncertainty


@pytest.mark.parametrize("level", [0.05, 0.5, 0.8, 0.95, 0.999])
@pytest.mark.parametrize("rates", [[1e-3], [0.3], [5.0], [40.0], [0.2, 7.0, 30.0], [3.0, 2000.0]], ids=str)
def test_poisson_intervals(rates: list[float], level: float) -> None:
    """The smallest counts that reach the two levels, from rates near 0 to rates far apart."""
    f = torch.tensor(rates, dtype=torch.float64).log()[:, None, None]
    low, high = pb.Prediction(f, Poisson()).interval(level)
    cdf = stats.poisson.cdf(np.arange(3000)[:, None], rates).mean(1)
    for bound, q in ((low, (1 - level) / 2), (high, (1 + level) / 2)):
        assert int(bound) == int(np.argmax(cdf >= q))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_gaussian_intervals_in_any_unit(unit: float, dtype: torch.dtype) -> None:
    """Quantiles of a mixture with components of different width, found by SciPy, whatever y is measured in."""
    means, scales = np.array([[-3.0, 0.1], [0.0, 0.2], [2.0, 0.3]]), np.array([[0.1, 1.0], [2.0, 1.0], [0.5, 1.0]])
    raw = torch.tensor(scales * unit).expm1() if unit > 1e3 else torch.tensor(scales * unit)
    f = torch.stack([torch.tensor(means * unit), torch.where(raw > 30, raw, raw.expm1().log())], -1)
    if unit > 1e3:
        f[..., 1] = torch.tensor(scales * unit)  # softplus(v) = v
    prediction = pb.Prediction(f[:, None].to(dtype), HeteroscedasticGaussian())
    low, high = prediction.interval(0.9)
    softplus = scales * unit + 1e-6
    for i in range(2):
        for q, value in ((0.05, low[i]), (0.95, high[i])):

            def excess(v: float, i: int = i, q: float = q) -> float:
                return float(stats.norm.cdf(v, means[:, i] * unit, softplus[:, i]).mean() - q)

            root = optimize.brentq(excess, -50 * unit, 50 * unit, xtol=1e-14 * unit)
            assert float(value) == pytest.approx(root, rel=1e-4 if dtype == torch.float32 else 1e-9)


def test_interval_holds_what_it_says() -> None:
    """Coverage of y drawn from the members, within 4 standard errors."""
    f = normal(4, 3, 2000)
    prediction = pb.Prediction(f, Gaussian(0.7))
    low, high = prediction.interval(0.8)
    y = prediction.sample(seed=1)
    covered = ((low <= y) & (y <= high)).double().mean()
    assert abs(float(covered) - 0.8) < 4 * math.sqrt(0.16 / y.numel())
    assert torch.equal(prediction.sample(seed=1), y) and not torch.equal(prediction.sample(), y)


@pytest.mark.parametrize(
    ("likelihood", "width", "moments"),
    [
        (Gaussian(0.3), 2, lambda f: (f, torch.full_like(f, 0.09))),
        (Poisson(), 2, lambda f: (f.exp(), f.exp())),
        (
            HeteroscedasticGaussian(),
            4,
            lambda f: (f[..., :2], (torch.nn.functional.softplus(f[..., 2:]) + 1e-6).square()),
        ),
    ],
    ids=["gaussian", "poisson", "heteroscedastic"],
)
def test_variance_is_the_sum_of_its_two_parts(likelihood: Any, width: int, moments: Any) -> None:
    """Aleatoric: the members' mean variance; epistemic: the variance of their means; both add up to that of y."""
    f = normal(5, 3, N, width)
    prediction = pb.Prediction(f, likelihood)
    mean, variance = (m.flatten(0, 1) for m in moments(f))
    torch.testing.assert_close(prediction.per_member, moments(f)[0])
    torch.testing.assert_close(prediction.mean, mean.mean(0))
    torch.testing.assert_close(prediction.aleatoric, variance.mean(0))
    torch.testing.assert_close(prediction.epistemic, (mean - mean.mean(0)).square().mean(0))
    second = (variance + mean.square()).mean(0)
    torch.testing.assert_close(prediction.aleatoric + prediction.epistemic, second - mean.mean(0).square())


def test_information_is_zero_where_members_agree_and_log_two_where_they_do_not() -> None:
    agree = torch.tensor([1.0, 0.0]).expand(3, 2, 1, 2)
    sure = torch.tensor([[[[60.0, -60.0]]], [[[-60.0, 60.0]]]], dtype=torch.float64)
    assert float(pb.Prediction(agree, Categorical()).mutual_information) == 0.0
    apart = pb.Prediction(sure, Categorical())
    assert float(apart.mutual_information) == pytest.approx(math.log(2)) == float(apart.entropy)
    assert float(apart.aleatoric) == pytest.approx(0, abs=1e-12)
    two = pb.Prediction(sure[..., 0], Bernoulli())
    assert float(two.mutual_information) == pytest.approx(math.log(2)) == float(two.entropy)


def test_probabilities_are_averaged_over_positions_and_outputs_too() -> None:
    """Sequences keep their axis; several Bernoulli outputs have a probability and an entropy each."""
    f = normal(4, 2, N, 5, 3)
    prediction = pb.Prediction(f, Categorical())
    assert prediction.per_member.shape == (4, 2, N, 5, 3) and prediction.entropy.shape == (N, 5)
    torch.testing.assert_close(prediction.probs.sum(-1), torch.ones(N, 5, dtype=torch.float64))
    y = torch.randint(3, (N, 5), generator=torch.Generator().manual_seed(0))
    expected = f.log_softmax(-1).gather(-1, y[None, None, ..., None].expand(4, 2, N, 5, 1)).squeeze(-1).sum(-1)
    torch.testing.assert_close(prediction.log_prob(y), expected)
    several = pb.Prediction(f[..., 0], Bernoulli())
    assert several.probs.shape == several.entropy.shape == (N, 5)
    torch.testing.assert_close(several.probs, f[..., 0].sigmoid().mean((0, 1)))


def test_functions_without_a_likelihood() -> None:
    """Intervals are quantiles of the members; nothing is said of y."""
    model = Rank1(chain(2, 4, 1), None)
    posterior = pb.Posterior(model, Rank1Guide(model, 3))
    prediction = posterior.predict(normal(N, 2), 50, seed=0)
    assert prediction.per_member.shape == (50, 3, N, 1)
    low, high = prediction.interval(0.9)
    torch.testing.assert_close(low, prediction.outputs.flatten(0, 1).quantile(0.05, 0))
    torch.testing.assert_close(high, prediction.outputs.flatten(0, 1).quantile(0.95, 0))
    for ask in (lambda: prediction.entropy, prediction.sample, lambda: prediction.log_prob(torch.zeros(N))):
        with pytest.raises(TypeError):
            ask()


@pytest.mark.parametrize("what", ["probs", "entropy", "mutual_information"])
def test_classification_is_asked_of_classifiers(what: str) -> None:
    with pytest.raises(TypeError, match=f"{what} is not defined for Poisson; use .mean, .interval"):
        getattr(pb.Prediction(normal(2, 1, N), Poisson()), what)
    for level in (0.0, 1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="expected a number in"):
            pb.Prediction(normal(2, 1, N), Poisson()).interval(level)


# -------------------------------------------------------------------------------------------------- the draws


GUIDES = {
    "rank1": lambda m: Rank1Guide(m, 3),
    "auto": AutoNormal,
    "lowrank": AutoLowRankMultivariateNormal,
}


@pytest.mark.parametrize("members_dim", [-2, -4])
@pytest.mark.parametrize("kind", GUIDES)
def test_draws_come_from_the_guide(kind: str, members_dim: int) -> None:
    """Mean and spread of every site agree with the guide's own calls one at a time, within 4 standard errors."""
    x, y = normal(N, 2), normal(N, seed=1)
    model = Rank1(chain(2, 3, 1), Gaussian(), N, members_dim=members_dim)
    torch.manual_seed(0)
    guide = GUIDES[kind](model)
    posterior = pb.inference.fit(model, guide, (x, y), epochs=2, progress=False, seed=0)
    n = 400
    together = posterior.sample(n, seed=1)
    torch.manual_seed(2)
    one_by_one = [guide(x) for _ in range(n)]
    for site in model.sites():
        assert together[site.name].shape == (n, *site.shape)
        a = together[site.name].reshape(n, -1)
        b = torch.stack([v[site.name].detach().reshape(-1) for v in one_by_one])
        error = (a.var(0) / n + b.var(0) / n).sqrt() + 1e-12
        assert ((a.mean(0) - b.mean(0)).abs() < 4.5 * error).all(), site.name


def test_stored_draws_are_spread_evenly() -> None:
    model = Dense(chain(2, 1), Gaussian(1.0), N)
    draws = {
        "0.weight": torch.arange(9.0).double().reshape(9, 1, 1).expand(9, 1, 2),
        "0.bias": torch.zeros(9, 1).double(),
    }
    posterior = pb.Posterior.from_draws(model, draws)
    assert posterior.draws(3)["0.weight"][:, 0, 0, 0].tolist() == [0.0, 4.0, 8.0]
    assert posterior.draws(9)["0.weight"][:, 0, 0, 0].tolist() == list(range(9))
    with pytest.raises(ValueError, match="the draws lack 1 sites of the model, the first is '0.bias'"):
        pb.Posterior.from_draws(model, {"0.weight": draws["0.weight"]})


@pytest.mark.parametrize("members_dim", [-2, -3])
@pytest.mark.parametrize("parallel", [False, True], ids=["sequential", "parallel"])
def test_stored_draws_are_a_guide(parallel: bool, members_dim: int) -> None:
    """Every stored draw of every member is used about equally often, and the sites of a draw stay together."""
    model = Rank1(chain(2, 1), Gaussian(1.0), N, members_dim=members_dim, prefix="net")
    guide = Rank1Guide(model, 3)
    stored = pb.Posterior(model, guide).as_draws(2, seed=0)
    assert stored.num_members == 3
    torch.manual_seed(0)
    x = normal(N, 2)
    result = Predictive(model, guide=stored.guide, num_samples=600, parallel=parallel)(x)
    assert result["net.obs"].reshape(600, -1).shape == (600, N)
    known = stored.draws(2)["net.0.weight.s"].flatten(0, 1)
    tau = stored.draws(2)["net.0.weight_tau"].flatten()
    which = (result["net.0.weight.s"].reshape(600, 1, 2) == known).all(-1)
    assert (which.sum(1) == 1).all()
    assert torch.equal(result["net.0.weight_tau"].reshape(600), tau[which.int().argmax(1)])
    counts = which.sum(0).double() / 600
    assert ((counts - 1 / 6).abs() < 4 * math.sqrt(5 / 36 / 600)).all()


def test_chains_of_nuts_are_put_together() -> None:
    x, y = normal(N, 2), normal(N, seed=1)
    model = Dense(chain(2, 1), Gaussian(0.5), N).eval()
    pyro.set_rng_seed(0)
    mcmc = MCMC(NUTS(model), num_samples=6, warmup_steps=6, disable_progbar=True)
    mcmc.run(x, y)
    posterior = pb.Posterior.from_mcmc(mcmc, model)
    weights = mcmc.get_samples()["0.weight"].reshape(6, 2)
    expected = weights @ x.T + mcmc.get_samples()["0.bias"].reshape(6, 1)
    torch.testing.assert_close(posterior.predict(x, 6).per_member[:, 0], expected)
    ours = posterior.log_likelihood(x, y, 6)[:, 0]
    np.testing.assert_allclose(ours.numpy(), stats.norm.logpdf(y.numpy(), expected.numpy(), 0.5), rtol=1e-10)
    y_column = posterior.log_likelihood(x, y[:, None], 6)[:, 0]
    torch.testing.assert_close(y_column, ours)


# --------------------------------------------------------------------------------------- models of other kinds


@pytest.mark.parametrize("column", [False, True], ids=["plain", "column"])
@pytest.mark.parametrize("size", [1, N])
def test_log_likelihood_of_a_model_of_another_package(size: int, column: bool) -> None:
    """The site that observes y is found by its values, also when y is a column or a single number."""
    x, y = normal(size), normal(size, seed=1)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.factor("penalty", -a.square())
        with pyro.plate("data", size):
            if column:
                pyro.sample("obs", dist.Normal(a * x[:, None], 0.5).to_event(1), obs=y)
            else:
                pyro.sample("obs", dist.Normal(a * x, 0.5), obs=y)

    given = y[:, None] if column else y
    posterior = pb.Posterior.from_draws(model, {"a": normal(4, seed=2)})
    ours = posterior.log_likelihood(x, given, 4)
    assert ours.shape == (4, 1, size)
    expected = stats.norm.logpdf(y.numpy(), normal(4, seed=2)[:, None].numpy() * x.numpy(), 0.5)
    np.testing.assert_allclose(ours[:, 0].numpy(), expected, rtol=1e-6)


def test_tuples_are_one_argument_for_models_of_other_packages() -> None:
    """The model gets at prediction what it got in training."""
    left, right, y = normal(N), normal(N, seed=1), normal(N, seed=2)

    def model(x: tuple[Tensor, Tensor], y: Tensor | None = None) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        mean = pyro.deterministic("mean", a * x[0] + x[1])
        with pyro.plate("data", N):
            pyro.sample("obs", dist.Normal(mean, 0.5), obs=y)

    posterior = pb.inference.fit(model, AutoNormal(model), ((left, right), y), epochs=2, progress=False, seed=0)
    a = posterior.draws(5, seed=3, example=(left, right))["a"]
    mean = posterior.predict((left, right), 5, seed=3, return_site="mean").outputs
    expected = a.reshape(5, 1).double() * left + right
    torch.testing.assert_close(mean.reshape(5, N), expected, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ files


def fitted(kind: str) -> tuple[pb.Posterior, Any]:
    net = chain(2, 4, 3).float() if kind == "float32" else chain(2, 4, 3)
    x = normal(N, 2).to(next(net.parameters()).dtype)
    labels = torch.arange(N) % 3
    model: Any
    if kind in ("cauchy", "prefix"):
        model = Rank1(net, Categorical(), N, prior=pb.priors.Cauchy(1.0, 0.1), clip=2.0, select=r"2\..*")
        if kind == "prefix":
            model = Rank1(
                net, Categorical(), N, prior={".*r": pb.priors.Horseshoe(), ".*": pb.priors.Laplace()}, prefix="p"
            )
        guide: Any = Rank1Guide(model, 2, "cauchy" if kind == "cauchy" else "normal", draws="member")
    else:
        model = Dense(net, Categorical(), N, prior=pb.priors.HierarchicalNormal(), chunk_size=2)
        guide = PointGuide(model) if kind == "point" else MeanFieldGuide(model, 2)
    return pb.inference.fit(model, guide, (x, labels), epochs=2, progress=False, seed=0), x


@pytest.mark.parametrize("kind", ["cauchy", "prefix", "dense", "point", "float32"])
def test_options_survive_a_file(kind: str, tmp_path: Path) -> None:
    """All arguments of model and guide, and training can go on where it was."""
    posterior, x = fitted(kind)
    posterior.save(tmp_path / "a" / "p")
    net = chain(2, 4, 3, seed=5).to(x.dtype)
    loaded = pb.load(tmp_path / "a" / "p", net)
    assert loaded.model.arguments() == posterior.model.arguments()  # type: ignore[attr-defined]
    assert loaded.guide.arguments() == posterior.guide.arguments()  # type: ignore[attr-defined]
    assert loaded.model.prior == posterior.model.prior  # type: ignore[attr-defined]
    assert torch.equal(loaded.predict(x, 3, seed=1).outputs, posterior.predict(x, 3, seed=1).outputs)
    again = [
        pb.inference.fit(p.model, p.guide, (x, torch.arange(N) % 3), epochs=1, progress=False, seed=4)
        for p in (posterior, loaded)
    ]
    assert again[0].losses == again[1].losses


@pytest.mark.parametrize("failing", [1, 2])
def test_a_rename_that_fails_leaves_a_whole_posterior(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The older one before any file took its place, the newer one after the first did, which holds all of it."""
    posterior, x = fitted("point")
    posterior.save(tmp_path / "p")
    replace, calls = storage.os.replace, []

    def fails(a: Any, b: Any) -> None:
        calls.append(b)
        if len(calls) == failing:
            raise OSError("no space left")
        replace(a, b)

    other, _ = fitted("dense")
    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "replace", fails)
        with pytest.raises(OSError, match="no space left"):
            other.save(tmp_path / "p")
    left = pb.load(tmp_path / "p", posterior.model.core().net)
    expected = posterior if failing == 1 else other
    torch.testing.assert_close(left.predict(x, seed=0).outputs, expected.predict(x, seed=0).outputs, rtol=0, atol=0)
    assert [f.name for f in tmp_path.iterdir()] == ["p"]
    assert sorted(f.name for f in (tmp_path / "p").iterdir()) == ["posterior.json", "tensors.safetensors"]


def test_a_distribution_as_prior_is_named_in_the_refusal(tmp_path: Path) -> None:
    model = Dense(chain(2, 3), Categorical(), N, prior=dist.Laplace(0.0, 1.0))
    posterior = pb.Posterior(model, MeanFieldGuide(model))
    with pytest.raises(
        TypeError, match=r"a prior given as Laplace cannot be written to JSON: use save\(path, prior=Fal"
    ):
        posterior.save(tmp_path / "p")
    posterior.as_draws(2).save(tmp_path / "q", prior=False)
    loaded = pb.load(tmp_path / "q", nn.Sequential(nn.Linear(2, 3, dtype=torch.float64)), prior=pb.priors.Laplace(0, 1))
    x = normal(N, 2)
    assert loaded.predict(x, 2).outputs.shape == (2, 1, N, 3)


# -------------------------------------------------------------------------------------- variance and tables


def test_the_variance_is_that_of_the_mixture_of_all_members() -> None:
    """Law of total variance, worked out for two members of two draws; counts have the variance of a mixture too."""
    means = torch.tensor([[[1.0], [3.0]], [[2.0], [6.0]]]).double()
    noise = torch.tensor([[1.0, 1.0], [2.0, 4.0]]).double()
    p = pb.Prediction(means, Gaussian(), noise)
    aleatoric, epistemic = (1 + 1 + 4 + 16) / 4, (4 + 0 + 1 + 9) / 4  # of 1, 3, 2, 6 around 3
    assert p.variance.tolist() == [aleatoric + epistemic] and p.std.tolist() == [math.sqrt(aleatoric + epistemic)]
    rates = torch.tensor([[[2.0]], [[4.0]]]).double()
    assert pb.Prediction(rates.log(), Poisson()).variance.tolist() == pytest.approx([3 + 1])
    assert pb.Prediction(means, None).variance.tolist() == [epistemic]


@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli()], ids=repr)
@pytest.mark.parametrize("what", ["std", "variance"])
def test_labels_have_no_variance(likelihood: Any, what: str) -> None:
    with pytest.raises(TypeError, match=f"{what} is not defined for.*use .probs"):
        getattr(pb.Prediction(normal(2, 1, 4, 3), likelihood), what)


def test_a_table_of_a_regression_has_its_moments_and_quantiles() -> None:
    means, noise = torch.tensor([[[0.0, 1.0]], [[2.0, 1.0]]]).double(), torch.tensor([[1.0], [1.0]]).double()
    table = pb.Prediction(means, Gaussian(), noise).to_dataframe(level=0.5)
    assert list(table.columns) == ["mean", "std", "aleatoric_std", "epistemic_std", "25%", "75%"]
    assert list(table.index) == [0, 1]
    assert table.loc[0, :"epistemic_std"].tolist() == pytest.approx([1, math.sqrt(2), 1, 1])
    assert table.loc[1, :"epistemic_std"].tolist() == [1, 1, 1, 0]
    assert table.loc[1, ["25%", "75%"]].tolist() == pytest.approx(stats.norm.ppf([0.25, 0.75], 1, 1).tolist())
    usual = pb.Prediction(means, Gaussian(), noise).to_dataframe()
    assert list(usual.columns[-2:]) == ["2.5%", "97.5%"]


def test_a_table_of_several_outputs_has_every_column_for_each() -> None:
    f = normal(3, 2, 4, 2)
    table = pb.Prediction(f, Gaussian(0.5)).to_dataframe()
    assert list(table.columns[:4]) == ["mean[0]", "mean[1]", "std[0]", "std[1]"] and len(table) == 4
    assert table["mean[1]"].tolist() == pytest.approx(f.mean((0, 1))[:, 1].tolist())
    values = pb.Prediction(f, None).to_dataframe()
    assert not any("aleatoric" in name for name in values.columns)
    assert values["std[0]"].tolist() == pytest.approx(f.flatten(0, 1).std(0, correction=0)[:, 0].tolist())


def test_a_table_of_a_classification_has_probabilities_and_parts_of_the_uncertainty() -> None:
    p = torch.tensor([[[[0.5, 0.3, 0.2]]], [[[0.1, 0.3, 0.6]]]]).double()  # two draws of one member, one sample
    table = pb.Prediction(p.log(), Categorical()).to_dataframe()
    assert list(table.columns) == ["p_0", "p_1", "p_2", "class", "entropy", "mutual_information"]
    assert table.loc[0, ["p_0", "p_1", "p_2"]].tolist() == pytest.approx([0.3, 0.3, 0.4])
    assert table.loc[0, "class"] == 2
    whole, parts = stats.entropy([0.3, 0.3, 0.4]), [stats.entropy([0.5, 0.3, 0.2]), stats.entropy([0.1, 0.3, 0.6])]
    assert table.loc[0, "entropy"] == pytest.approx(whole)
    assert table.loc[0, "mutual_information"] == pytest.approx(whole - sum(parts) / 2)


def test_a_table_of_a_coin_has_both_sides() -> None:
    table = pb.Prediction(torch.tensor([[[0.0, 4.0]]]).double(), Bernoulli()).to_dataframe()
    assert list(table.columns) == ["p_0", "p_1", "class", "entropy", "mutual_information"]
    assert table["p_1"].tolist() == pytest.approx([0.5, 1 / (1 + math.exp(-4))])
    assert (table["p_0"] + table["p_1"]).tolist() == pytest.approx([1, 1])
    assert table.loc[1, "class"] == 1
    several = pb.Prediction(normal(2, 1, 3, 2), Bernoulli()).to_dataframe()
    assert list(several.columns[:4]) == ["p_0[0]", "p_0[1]", "p_1[0]", "p_1[1]"]
