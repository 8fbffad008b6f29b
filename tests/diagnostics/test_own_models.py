"""Posteriors of Pyro models that are not of this package, against closed forms: conjugate Normal and Beta-Bernoulli."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import pyro_bnn as pb
from pyro_bnn.diagnostics import loo, prior_predictive, to_arviz

N, DRAWS = 12, 2000
X = torch.linspace(-1, 1, N).double()
Y = torch.randn(N, generator=torch.Generator().manual_seed(0)).double() + 1
SUCCESSES = torch.tensor([1.0, 1, 0, 1, 1, 1, 0, 1, 0, 1, 1, 1]).double()
GROUPS = 3


def normal(x: Tensor, y: Tensor | None = None) -> None:
    """``mu ~ N(0, 1), y_n ~ N(mu, 1)``: the posterior is N(sum y / (N + 1), 1 / (N + 1))."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros(()).double(), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(mu, 1.0), obs=y)


def coin(x: Tensor, y: Tensor | None = None) -> None:
    """``p ~ Beta(1, 1)``."""
    p = pyro.sample("p", dist.Beta(torch.ones(()).double(), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Bernoulli(p), obs=y)


def grouped(x: Tensor, y: Tensor | None = None) -> None:
    """``m ~ N(0, 1), a_g ~ N(m, 1), y_gn ~ N(a_g, 1)``, all jointly Normal; y is [GROUPS, N / GROUPS]."""
    m = pyro.sample("m", dist.Normal(torch.zeros(()).double(), 1.0))
    with pyro.plate("groups", GROUPS, dim=-2):
        a = pyro.sample("a", dist.Normal(m, 1.0))
        with pyro.plate("data", N // GROUPS, dim=-1):
            pyro.sample("obs", dist.Normal(a, 1.0), obs=y)


def two_sites(x: Tensor, y: Tensor | None = None) -> None:
    """The same ``mu`` behind two kinds of data, the columns of y."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros(()).double(), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("left", dist.Normal(mu, 1.0), obs=None if y is None else y[:, 0])
        pyro.sample("right", dist.Normal(mu, 1.0), obs=None if y is None else y[:, 1])


def drawn_mu(count: int = DRAWS, data: Tensor = Y) -> Tensor:
    exact = dist.Normal(data.sum() / (data.numel() + 1), (1 / torch.tensor(data.numel() + 1.0).double()) ** 0.5)
    torch.manual_seed(1)
    return exact.sample((count,))


def exact_loo(data: Tensor) -> float:
    """``y_n`` given all others is ``N(sum of others / N, 1 + 1 / N)``."""
    n = data.numel()
    return float(dist.Normal((data.sum() - data) / n, (1 + 1 / n) ** 0.5).log_prob(data).sum())


def gaussian_blocks() -> tuple[Tensor, Tensor]:
    """Covariance of the data of ``grouped``, and of (m, a) with the data."""
    group = torch.arange(N) // (N // GROUPS)
    same = (group[:, None] == group).double()
    cov = torch.eye(N).double() + 1 + same
    with_latents = torch.cat([torch.ones(1, N).double(), 1 + (torch.arange(GROUPS)[:, None] == group).double()])
    return cov, with_latents


def grouped_draws() -> dict[str, Tensor]:
    cov, cross = gaussian_blocks()
    prior = torch.ones(GROUPS + 1, GROUPS + 1).double() + torch.diag(torch.tensor([0.0] + [1.0] * GROUPS).double())
    gain = cross @ cov.inverse()
    torch.manual_seed(2)
    draws = dist.MultivariateNormal(gain @ Y, prior - gain @ cross.T).sample((DRAWS,))
    return {"m": draws[:, 0], "a": draws[:, 1:, None]}


def elpd(result: Any) -> float:
    return float(result.elpd_loo if hasattr(result, "elpd_loo") else result.elpd)


def test_leave_one_out_of_exact_draws_is_that_of_the_closed_form() -> None:
    """Within 0.05 nats: with 2,000 draws the error of an elpd_i is below sqrt(var(weights) / 2000), about 0.007."""
    posterior = pb.Posterior.from_draws(normal, {"mu": drawn_mu()})
    assert elpd(loo(posterior, X, Y)) == pytest.approx(exact_loo(Y), abs=0.05)


def test_leave_one_out_of_a_beta_bernoulli_model() -> None:
    """``P(y_n = 1 | others) = (1 + successes of others) / (N + 1)``."""
    s = SUCCESSES.sum()
    torch.manual_seed(3)
    posterior = pb.Posterior.from_draws(coin, {"p": dist.Beta(1 + s, 1 + N - s).sample((DRAWS,))})
    p = (1 + s - SUCCESSES) / (N + 1)
    exact = float(dist.Bernoulli(p).log_prob(SUCCESSES).sum())
    assert elpd(loo(posterior, X, SUCCESSES)) == pytest.approx(exact, abs=0.05)


def test_leave_one_out_of_a_hierarchical_model_with_plates() -> None:
    """Each of the 12 data, two plates deep, given all others: a conditional of a 12-dimensional Normal."""
    precision = gaussian_blocks()[0].inverse()
    variance = 1 / precision.diagonal()
    exact = float(dist.Normal(Y - (precision @ Y) * variance, variance.sqrt()).log_prob(Y).sum())
    posterior = pb.Posterior.from_draws(grouped, grouped_draws())
    found = loo(posterior, X, Y.reshape(GROUPS, -1))
    assert found.n_data_points == N
    assert elpd(found) == pytest.approx(exact, abs=0.15)


def too_wide(x: Tensor, y: Tensor | None = None) -> None:
    """A guide of ``normal`` with 1.5 of the standard deviation of the posterior, shifted by half of it."""
    sd = (1 / torch.tensor(N + 1.0).double()) ** 0.5
    pyro.sample("mu", dist.Normal(Y.sum() / (N + 1) + 0.5 * sd, 1.5 * sd))


def test_importance_weights_correct_a_guide() -> None:
    """A guide that is shifted and too wide has the leave-one-out of the exact posterior."""
    posterior = pb.Posterior(normal, too_wide)
    assert elpd(loo(posterior, X, Y, num_samples=2000, seed=0)) == pytest.approx(exact_loo(Y), abs=0.1)


def test_importance_weights_of_an_autoguide_on_a_bounded_site() -> None:
    """AutoNormal is Normal in logit(p): its density in p has a Jacobian, without which the result is another one."""
    guide = AutoNormal(coin)
    guide(X, SUCCESSES)
    guide.locs.p.data.fill_(0.95)
    guide.scales.p = torch.tensor(0.9).double()
    p = (1 + SUCCESSES.sum() - SUCCESSES) / (N + 1)
    exact = float(dist.Bernoulli(p).log_prob(SUCCESSES).sum())
    posterior = pb.Posterior(coin, guide, example=X)
    assert elpd(loo(posterior, X, SUCCESSES, num_samples=2000, seed=0)) == pytest.approx(exact, abs=0.1)


@pytest.mark.parametrize("site", ["left", "right"])
def test_one_of_two_observed_sites_is_left_out_where_it_is_named(site: str) -> None:
    """The data of the other site stay: each y_n given the 2 N - 1 others."""
    y = torch.stack([Y, Y.flip(0) + 0.5], 1)
    posterior = pb.Posterior.from_draws(two_sites, {"mu": drawn_mu(data=y)})
    own = y[:, 0 if site == "left" else 1]
    n = y.numel()
    exact = float(dist.Normal((y.sum() - own) / n, (1 + 1 / n) ** 0.5).log_prob(own).sum())
    assert elpd(loo(posterior, X, y, observed_site=site)) == pytest.approx(exact, abs=0.05)
    with pytest.raises(ValueError, match="choose one with observed_site=.*'left', 'right'"):
        loo(posterior, X, y)
    with pytest.raises(ValueError, match="'mu' is not an observed site"):
        loo(posterior, X, y, observed_site="mu")


def subsampled(x: Tensor, y: Tensor | None = None) -> None:
    mu = pyro.sample("mu", dist.Normal(torch.zeros(()).double(), 1.0))
    with pyro.plate("data", 2 * N, subsample_size=len(x)):
        pyro.sample("obs", dist.Normal(mu, 1.0), obs=y)


def one_datum(x: Tensor, y: Tensor | None = None) -> None:
    mu = pyro.sample("mu", dist.Normal(torch.zeros(()).double(), 1.0))
    pyro.sample("obs", dist.Normal(mu, 1.0).expand([len(x)]).to_event(1), obs=y)


def masked(x: Tensor, y: Tensor | None = None) -> None:
    mu = pyro.sample("mu", dist.Normal(torch.zeros(()).double(), 1.0))
    with pyro.plate("data", len(x)), poutine.mask(mask=x > 0):
        pyro.sample("obs", dist.Normal(mu, 1.0), obs=y)


def tempered(x: Tensor, y: Tensor | None = None) -> None:
    mu = pyro.sample("mu", dist.Normal(torch.zeros(()).double(), 1.0))
    with pyro.plate("data", len(x)), poutine.scale(scale=0.5):
        pyro.sample("obs", dist.Normal(mu, 1.0), obs=y)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (subsampled, "'data' is subsampled"),
        (one_datum, "to_event"),
        (masked, "masks data"),
        (tempered, "poutine.scale"),
    ],
)
def test_data_that_cannot_be_left_out_are_refused(model: Callable[..., None], reason: str) -> None:
    """Of draws and of a guide alike."""
    for posterior in (pb.Posterior.from_draws(model, {"mu": drawn_mu(200)}), pb.Posterior(model, too_wide)):
        with pytest.raises(ValueError, match=reason):
            loo(posterior, X, Y, num_samples=200)


def test_predictions_have_the_moments_of_the_closed_form() -> None:
    """Posterior ``N(m, 1 + v)`` and prior ``N(0, 2)`` predictive distributions, within 5 standard errors."""
    posterior = pb.Posterior.from_draws(normal, {"mu": drawn_mu(1000)})
    tree = to_arviz(posterior, X, Y, groups=("posterior_predictive", "prior_predictive", "log_likelihood"), seed=0)
    for group, mean, variance in (
        ("posterior_predictive", float(Y.sum()) / (N + 1), 1 + 1 / (N + 1)),
        ("prior_predictive", 0.0, 2.0),
    ):
        values = torch.as_tensor(tree[group]["obs"].values)
        assert values.shape == (1, 1000, N)
        assert float((values.mean((0, 1)) - mean).abs().max()) < 5 * (variance / 1000) ** 0.5
        assert float((values.var((0, 1)) / variance - 1).abs().max()) < 5 * (2 / 1000) ** 0.5
    drawn = prior_predictive(normal, X, num_samples=1000, seed=1, return_site="obs").outputs
    assert drawn.shape == (1000, 1, N)
    assert abs(float(drawn.var()) / 2 - 1) < 5 * (2 / 1000) ** 0.5


def test_predictions_of_a_hierarchical_model() -> None:
    """The mean of each group's new data is its posterior mean, ``E[a_g | y]``."""
    posterior = pb.Posterior.from_draws(grouped, {name: value[:1000] for name, value in grouped_draws().items()})
    tree = to_arviz(posterior, X, groups="posterior_predictive", observed_site="obs", seed=0)
    values = torch.as_tensor(tree["posterior_predictive"]["obs"].values)
    assert values.shape == (1, 1000, GROUPS, N // GROUPS)
    cov, cross = gaussian_blocks()
    mean = (cross @ cov.inverse() @ Y)[1:, None]
    assert float((values.mean((0, 1)) - mean).abs().max()) < 5 * (1.5 / 1000) ** 0.5


def always_observed(x: Tensor, y: Tensor | None = None) -> None:
    mu = pyro.sample("mu", dist.Normal(torch.zeros(()).double(), 1.0))
    with pyro.plate("data", N):
        pyro.sample("obs", dist.Normal(mu, 1.0), obs=Y)


def test_data_are_never_taken_for_predictions() -> None:
    """A model whose data are fixed inside it has no predictions to draw."""
    posterior = pb.Posterior.from_draws(always_observed, {"mu": drawn_mu(100)})
    for ask in (
        lambda: posterior.predict(X, return_site="obs"),
        lambda: to_arviz(posterior, X, Y),
        lambda: prior_predictive(always_observed, X, return_site="obs"),
    ):
        with pytest.raises(ValueError, match="even without y"):
            ask()


def test_draws_of_another_model_are_refused() -> None:
    """A site that the model lacks would have no effect, and one that is not drawn would come from the prior."""
    posterior = pb.Posterior.from_draws(normal, {"mu": drawn_mu(100), "slope": drawn_mu(100)})
    with pytest.raises(ValueError, match="draws of 'slope', but the model has no such site"):
        posterior.predict(X, return_site="obs")
    lacking = pb.Posterior.from_draws(grouped, {"m": drawn_mu(100)})
    with pytest.raises(ValueError, match="samples 'a', of which there are no draws"):
        lacking.log_likelihood(X, Y.reshape(GROUPS, -1))
