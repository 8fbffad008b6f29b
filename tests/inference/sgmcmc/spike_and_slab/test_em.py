"""SGHMC within EM: the collapsed prior by quadrature, EMVS by linear algebra, and the released update step by step."""

from __future__ import annotations

import math
import pickle
import warnings
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC
from scipy import optimize, stats
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_bnn as pb
from pyro_bnn.inference import SGHMC, SGHMCEM, KeFanSGHMC, sample
from pyro_bnn.inference.sgmcmc.pruning import InclusionRule, KeFanRule, MagnitudeRule, SiteGroups
from pyro_bnn.priors import SpikeAndSlab, SpikeAndSlabDistribution
from pyro_bnn.priors.spike_and_slab import InverseGammaHyperprior

NOISE = 0.25


def run(kernel: SGHMC, warmup: int, draws: int, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    kernel.setup(warmup)
    params = kernel.initial_params
    kept = []
    for i in range(warmup + draws):
        params = kernel.sample(params)
        if i >= warmup:
            kept.append(kernel.potential.constrain(params))
    kernel.cleanup()
    return {name: torch.stack([draw[name] for draw in kept]) for name in kept[0]}


# ------------------------------------------------------------------------------ (g) the target of invariant mode


def copies(y: float, spike: Any, count: int = 4000, inclusion: Any = 0.4) -> Any:
    """``count`` independent problems in one: w_i ~ spike and slab, y = w_i + noise, without data plates (N = 1)."""
    prior = SpikeAndSlab(0.15, 1.0, inclusion=inclusion, spike=spike)

    def model() -> None:
        like = torch.zeros(count, dtype=torch.float64)
        w = pyro.sample("w", prior.elements(0.0, like, None))
        pyro.sample("y", dist.Normal(w, NOISE).to_event(1), obs=torch.full_like(w, y))

    return model


def cdf(y: float, spike: str, hard: bool, share: float = 0.4) -> Any:
    """Of the posterior of one weight, by quadrature on a fine grid."""
    grid = np.linspace(-4, 4, 200_001)
    slab = share * stats.norm(0, 1).pdf(grid)
    narrow = (1 - share) * (stats.norm(0, 0.15) if spike == "normal" else stats.laplace(0, 0.15)).pdf(grid)
    density = (np.maximum(slab, narrow) if hard else slab + narrow) * stats.norm(grid, NOISE).pdf(y)
    total = np.cumsum(density)
    return lambda w: np.interp(w, grid, total / total[-1])


@pytest.mark.parametrize("y", [0.0, 0.45, 0.8])
@pytest.mark.parametrize(("spike", "e_step"), [("normal", "soft"), ("laplace", "soft"), ("normal", "hard")])
def test_invariant_mode_has_the_collapsed_posterior(y: float, spike: str, e_step: Any) -> None:
    """KS of 4000 independent weights at the end of 1600 steps; at y = .45 the other target must be told apart."""
    kernel = SGHMCEM(copies(y, spike), step_size=0.03, friction=0.1, e_step=e_step, thinning=800)
    w = run(kernel, 1, 1)["w"][-1].numpy()
    assert stats.kstest(w, cdf(y, spike, e_step == "hard")).pvalue > 0.01
    if y == 0.45:
        assert (
            stats.kstest(w, cdf(y, spike, e_step == "soft")).pvalue < 5e-3
        )  # KS with 4000 draws sees a distance of .03


def test_it_is_sghmc_on_the_collapsed_prior() -> None:
    """With rates fixed, the two kernels make the same chain from the same noise: Fisher's identity, end to end."""
    chains = []
    for kind in (SGHMC, SGHMCEM):
        kernel = kind(copies(0.45, "normal", 20), step_size=0.06, friction=0.2, capture=False, thinning=50)
        kernel.setup(1)
        torch.manual_seed(0)
        first = kernel.sample({"w": torch.linspace(-1, 1, 20, dtype=torch.float64)})
        chains.append(torch.stack([first["w"], kernel.sample(first)["w"]]))
    torch.testing.assert_close(*chains, rtol=1e-9, atol=1e-11)


def test_stale_indicators_miss_the_target() -> None:
    """What the E-step at every step is for: with indicators that stay where they start, the law is another."""

    class Stale(SGHMCEM):
        def expect(self, rate: float) -> None:
            """Leaves all groups in the slab."""

    kernel = Stale(copies(0.45, "normal"), step_size=0.06, friction=0.2, thinning=300)
    w = run(kernel, 1, 1)["w"][-1].numpy()
    assert stats.kstest(w, cdf(0.45, "normal", False)).pvalue < 1e-6


def test_the_target_does_not_depend_on_how_warm_up_averaged() -> None:
    """After warm-up the E-step is whole again, whatever omega was: the law is the collapsed posterior."""
    kernel = SGHMCEM(copies(0.45, "normal"), step_size=0.03, friction=0.1, rate=0.01, thinning=1600)
    w = run(kernel, 1, 1)["w"][-1].numpy()
    assert stats.kstest(w, cdf(0.45, "normal", False)).pvalue > 0.01


@pytest.mark.parametrize("precondition", ["identity", "rmsprop"])
def test_the_target_on_what_is_left(precondition: Any) -> None:
    """After removals the others have the collapsed posterior, and those that were removed are zero."""
    kernel = SGHMCEM(
        copies(0.45, "normal", 6000),
        step_size=0.03,
        friction=0.1,
        thinning=800,
        prune=MagnitudeRule(0.5),
        prune_start=0,
        preconditioner=precondition,
    )
    w = run(kernel, 1, 1)["w"][-1].numpy()
    assert (w == 0).sum() == 3000
    assert stats.kstest(w[w != 0], cdf(0.45, "normal", False)).pvalue > 0.01


@pytest.mark.filterwarnings("ignore:every group")
def test_the_inclusion_rule_uses_the_posterior_probability() -> None:
    """Of weights that visit both components those stay whose exact probability is above one half."""
    for y, stays in ((0.45, 0.0), (0.75, 1.0)):
        grid = np.linspace(-4, 4, 20_001)
        slab, narrow = 0.4 * stats.norm(0, 1).pdf(grid), 0.6 * stats.norm(0, 0.15).pdf(grid)
        weigh = stats.norm(grid, NOISE).pdf(y)
        exact = (slab * weigh).sum() / ((slab + narrow) * weigh).sum()
        assert exact < 0.4 or exact > 0.6
        kernel = SGHMCEM(copies(y, "normal", 200), step_size=0.05, friction=0.1, prune="inclusion", thinning=2000)
        run(kernel, 2, 1)
        assert kernel.diagnostics()["w: kept"] == pytest.approx(stays, abs=0.03)
        torch.testing.assert_close(kernel.sites[0].probability.mean(), torch.tensor(exact), atol=0.02, rtol=0)


def test_inclusion_is_the_mean_over_the_pruning_phase() -> None:
    """Proves that the probability that the rule sees is the plain mean of the E-steps from prune_start on, each found
    by hand from the weights before its step."""
    kernel = SGHMCEM(
        copies(0.45, "normal", 5), step_size=0.05, friction=0.3, prune=InclusionRule(1e-9), prune_start=4, em_every=2
    )
    torch.manual_seed(0)
    kernel.setup(20)
    params, found = kernel.initial_params, []
    for step in range(13):
        if step >= 4 and step % 2 == 0:
            slab, narrow = 0.4 * stats.norm(0, 1).pdf(params["w"]), 0.6 * stats.norm(0, 0.15).pdf(params["w"])
            found.append(slab / (slab + narrow))
        params = kernel.sample(params)
    assert len(found) == 5
    np.testing.assert_allclose(kernel.sites[0].probability, np.mean(found, 0), rtol=1e-9)


def test_float32_with_a_very_narrow_spike() -> None:
    """Densities and gradients of weights in the slab keep their digits: the two terms do not cancel."""
    w = torch.linspace(-2, 2, 8)
    for scale in (1e-2, 1e-3, 1e-4):
        found = []
        for like in (w, w.double()):
            value = like.clone().requires_grad_()
            density = SpikeAndSlab(scale, 1.0, inclusion=0.3).elements(0.0, like, None)
            density.log_prob(value).backward()
            found.append((density.log_prob(value).detach().double(), value.grad.double()))  # type: ignore[union-attr]
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    tiny = SpikeAndSlab(0.1, 1.0, inclusion=1e-9).elements(0.0, w, None)
    exact = SpikeAndSlab(0.1, 1.0, inclusion=1e-9).elements(0.0, w.double(), None)
    torch.testing.assert_close(tiny.log_odds(w).double(), exact.log_odds(w.double()), rtol=1e-5, atol=1e-4)


# ------------------------------------------------------------------------------------------- (f) EMVS as an oracle


def regression(p: int = 12, n: int = 60) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    x = torch.randn(n, p, dtype=torch.float64)
    truth = torch.zeros(p, dtype=torch.float64)
    truth[:3] = torch.tensor([1.5, -2.0, 0.8])
    return x, x @ truth + 0.5 * torch.randn(n, dtype=torch.float64)


def linear(x: Tensor, y: Tensor, prior: SpikeAndSlab) -> Any:
    def model() -> None:
        like = torch.zeros(x.shape[1], dtype=torch.float64)
        tau = pyro.sample("w_tau", prior.tau(like)) if prior.has_tau else None
        given = prior.with_share(pyro.sample("w_inclusion", prior.share(like))) if prior.has_inclusion else prior
        w = pyro.sample("w", given.elements(0.0, like, None if tau is None else tau.reshape(1)))
        pyro.sample("y", dist.Normal(x @ w, 0.5).to_event(1), obs=y)

    return model


@pytest.mark.parametrize("scale", [None, InverseGammaHyperprior(3.0, 4.0)])
def test_at_temperature_zero_it_is_emvs(scale: InverseGammaHyperprior | None) -> None:
    """The fixed point of E, M and (X'X + s^2 D)^-1 X'y, iterated in NumPy: weights, probabilities, rate and scale."""
    x, y = regression()
    prior = SpikeAndSlab(0.1, 1.0, inclusion=dist.Beta(2.0, 5.0), variance_prior=scale)
    kernel = SGHMCEM(linear(x, y, prior), step_size=0.03, friction=0.05, temperature=0, thinning=4000)
    draws = run(kernel, 1, 1)
    X, t, w, share, sigma2 = x.numpy(), y.numpy(), np.linalg.lstsq(x.numpy(), y.numpy(), rcond=None)[0], 2 / 7, 1.0
    if scale is not None:
        sigma2 = scale.rate / scale.concentration
    for _ in range(5000):
        v0, v1 = 0.01 * sigma2, sigma2
        odds = share / (1 - share) * np.sqrt(v0 / v1) * np.exp(w**2 * (1 / v0 - 1 / v1) / 2)
        p = odds / (1 + odds)
        share = (p.sum() + 2 - 1) / (12 + 2 + 5 - 2)
        if scale is not None:
            J = (w**2 * (p + (1 - p) / 0.01)).sum()
            sigma2 = (J + 2 * scale.rate) / (12 + 2 * scale.concentration + 2)
        precision = p / sigma2 + (1 - p) / (0.01 * sigma2)
        w = np.linalg.solve(X.T @ X + 0.25 * np.diag(precision), X.T @ t)
    np.testing.assert_allclose(draws["w"][-1].numpy(), w, atol=1e-6)
    assert float(draws["w_inclusion"][-1]) == pytest.approx(share, abs=1e-6)
    if scale is not None:
        assert float(draws["w_tau"][-1]) == pytest.approx(math.sqrt(sigma2), abs=1e-6)
    assert p[:3].min() > 0.9 and p[3:].max() < 0.5


@pytest.mark.parametrize("spike", ["normal", "laplace"])
@pytest.mark.parametrize("group", ["weight", "input"])
@pytest.mark.parametrize("prune", [None, MagnitudeRule(0.4)])
def test_the_m_step_maximises_the_expected_log_posterior(spike: Any, group: Any, prune: Any) -> None:
    """SciPy finds the same rate and scale on E[log p(w, indicators, theta, sigma^2)], written out here.

    SiteGroups that were removed are known to be out of the slab, and their weights say nothing of the scale.
    """
    torch.manual_seed(0)
    like = torch.zeros(7, 9, dtype=torch.float64)
    w = torch.randn_like(like) * torch.rand(9, dtype=torch.float64) ** 3
    hyper: Any = {"inclusion": dist.Beta(2.5, 4.0), "variance_prior": dist.InverseGamma(2.0, 3.0)}
    prior = SpikeAndSlab(0.1, 0.8, group=group, spike=spike, **hyper)

    def model() -> None:
        tau = pyro.sample("w_tau", prior.tau(like))
        share = pyro.sample("w_inclusion", prior.share(like))
        pyro.sample("w", prior.with_share(share).elements(0.0, like, tau.reshape(1, 1)))

    kernel = SGHMCEM(model, step_size=1e-9, friction=1.0, prune=prune, prune_start=0, prune_every=4)
    kernel.setup(10)
    params = kernel.sample({"w": w} | {k: v for k, v in kernel.initial_params.items() if k != "w"})
    for _ in range(5):  # the second removal comes after the M-step of the fifth
        params = kernel.sample(params)
    (site,) = kernel.sites
    p, kept = site.included.numpy(), site.kept.numpy()
    assert prune is None or (not kept.all() and (p[~kept] == 0).all() and (p[kept] > 0).all())
    axis = () if group == "weight" else (0,)

    def minus(at: np.ndarray) -> float:
        share, sigma = at
        slab = kept * stats.norm(0, 0.8 * sigma).logpdf(w.numpy()).sum(axis)
        narrow = kept * (stats.norm if spike == "normal" else stats.laplace)(0, 0.1 * sigma).logpdf(w.numpy()).sum(axis)
        complete = (p * (slab + np.log(share)) + (1 - p) * (narrow + np.log1p(-share))).sum()
        return -(complete + stats.beta(2.5, 4).logpdf(share) + stats.invgamma(2, scale=3).logpdf(sigma**2))

    best = optimize.minimize(minus, [0.4, 1.0], bounds=[(1e-3, 1 - 1e-3), (0.05, 10)], options={"ftol": 1e-14})
    assert float(site.share) == pytest.approx(best.x[0], abs=1e-4)
    assert float(site.scale) == pytest.approx(best.x[1], abs=1e-4)  # type: ignore[arg-type]


def test_where_rates_and_scales_start() -> None:
    """At a / (a + b) and sqrt(r / c), or where the user says; without an E-step they stay there."""
    x, y = regression()
    prior = SpikeAndSlab(0.1, 1.0, inclusion=dist.Beta(2.0, 6.0), variance_prior=dist.InverseGamma(3.0, 12.0))
    for given in (False, True):
        kernel = SGHMCEM(linear(x, y, prior), step_size=0.01, friction=0.3, em_start=5)
        kernel.setup(10)
        params = kernel.initial_params
        if given:
            params |= {"w_inclusion": torch.tensor(0.9).double().logit(), "w_tau": torch.tensor(0.5).double().log()}
        params = kernel.potential.constrain(kernel.sample(params))
        assert float(params["w_inclusion"]) == pytest.approx(0.9 if given else 0.25)
        assert float(params["w_tau"]) == pytest.approx(0.5 if given else 2.0)


def test_stochastic_approximation_averages() -> None:
    """p and theta after steps with rates omega_t are the weighted averages, by the recursion in NumPy."""
    x, y = regression()
    prior = SpikeAndSlab(0.1, 1.0, inclusion=dist.Beta(2.0, 5.0))
    kernel = SGHMCEM(
        linear(x, y, prior), step_size=0.02, friction=0.3, rate=lambda t: 1 / (t + 2), em_start=2, em_every=3
    )
    torch.manual_seed(0)
    kernel.setup(40)
    params = kernel.initial_params
    p, share = np.ones(12), 2 / 7
    for t in range(30):
        if t >= 2 and (t - 2) % 3 == 0:
            w = params["w"].numpy()
            odds = share / (1 - share) * 0.1 * np.exp(w**2 * (100 - 1) / 2)
            p += (odds / (1 + odds) - p) / (t + 2)
            share += ((p.sum() + 1) / (12 + 5) - share) / (t + 2)
        params = kernel.sample(params)
        np.testing.assert_allclose(kernel.sites[0].included.numpy(), p, rtol=1e-9)
        assert float(kernel.sites[0].share) == pytest.approx(share, rel=1e-9)


def test_rates_and_masks_are_frozen_after_warm_up() -> None:
    x, y = regression()
    prior = SpikeAndSlab(0.1, 1.0, inclusion=dist.Beta(2.0, 5.0), variance_prior=dist.InverseGamma(3.0, 3.0))
    kernel = SGHMCEM(
        linear(x, y, prior), step_size=0.05, friction=0.2, prune=MagnitudeRule(0.5), prune_start=30, prune_every=10
    )
    draws = run(kernel, 60, 40)
    assert len(set(draws["w_inclusion"].tolist())) == 1 and len(set(draws["w_tau"].reshape(-1).tolist())) == 1
    gone = (draws["w"] == 0).all(0)
    assert int(gone.sum()) == 6 and bool((draws["w"][:, ~gone] != 0).all())
    assert kernel.diagnostics()["w: kept"] == 0.5


def test_pruning_waits_for_half_of_warm_up() -> None:
    x, y = regression()
    prior = SpikeAndSlab(0.1, 1.0, inclusion=0.5)
    kernel = SGHMCEM(linear(x, y, prior), step_size=0.05, friction=0.2, prune=MagnitudeRule(0.5), thinning=2)
    kernel.setup(40)
    params = kernel.initial_params
    for draw in range(1, 42):
        params = kernel.sample(params)
        kept = kernel.diagnostics()["w: kept"]
        assert (kept == 1) if draw <= 20 else (0.5 <= kept < 1) if 25 < draw < 40 else (draw < 40 or kept == 0.5)


# ----------------------------------------------------------------------------------------------- the rules


def groups(w: Tensor, included: Tensor, group: Any = "weight") -> SiteGroups:
    density = SpikeAndSlab(0.1, 1.0, inclusion=0.5, group=group).elements(0.0, w, None)
    assert isinstance(density, SpikeAndSlabDistribution)
    return SiteGroups(density, w, included, torch.ones_like(included, dtype=torch.bool), included)


def test_the_inclusion_rule_keeps_the_median_probability_model() -> None:
    site = groups(torch.zeros(1, 3), torch.tensor([[0.2, 0.5, 0.9]]))
    assert InclusionRule()([site], 0.99)[0].all()
    assert InclusionRule()([site], 1.0)[0].tolist() == [[False, True, True]]
    assert InclusionRule(0.1)([site], 1.0)[0].tolist() == [[True, True, True]]


def test_the_magnitude_rule_counts_weights_over_all_sites() -> None:
    """Single weights beside columns of four: the mean square orders them, their size fills the quota."""
    single = groups(torch.tensor([[0.1, 3.0], [0.2, 5.0]]), torch.ones(2, 2))
    columns = groups(torch.tensor([[0.5, 1.0, 4.0]]).expand(4, 3).clone(), torch.ones(3), "input")
    rule = MagnitudeRule(0.5)
    stays = rule(
        [single, columns], 1.0
    )  # 16 weights, 8 may go: .1, .2 and the column of .5; one more column would be 10
    assert stays[0].tolist() == [[False, True], [False, True]] and stays[1].tolist() == [False, True, True]
    assert rule.share(1.0) == 0.5 and rule.share(0.2) == pytest.approx(0.5 * (1 - 0.99**100)) and rule.share(0) == 0
    both = [
        SiteGroups(s.density, s.weights.expand(2, *s.weights.shape), s.included, s.kept, s.included)
        for s in (single, columns)
    ]
    for with_chains, alone in zip(rule(both, 1.0), stays, strict=True):
        assert torch.equal(with_chains, alone.expand(2, *alone.shape))


def test_the_magnitude_rule_goes_on_from_a_start() -> None:
    """Proves that the share runs from the start to the end: .9 + .09 (1 - .99^(500 p))."""
    rule = MagnitudeRule(0.99, start=0.9)
    assert rule.share(0) == 0.9 and rule.share(1) == 0.99
    assert rule.share(0.3) == pytest.approx(0.9 + 0.09 * (1 - 0.99**150))


def test_groups_with_the_largest_gradients_come_back() -> None:
    """Proves the choice by hand: of 12 weights 6 are there, and half as many more come back, over both sites."""
    sites = [groups(torch.ones(2, 3), torch.ones(2, 3)) for _ in range(2)]
    for site in sites:
        site.kept[0] = False
    gradients = [
        torch.tensor([[0.1, -5.0, 0.2], [99.0, 99.0, 99.0]]),
        torch.tensor([[4.0, 0.0, -3.0], [0.0, 0.0, 0.0]]),
    ]
    found = MagnitudeRule(0.5, regrow=0.5).regrown(sites, gradients)
    assert [f.tolist() for f in found] == [
        [[False, True, False], [True, True, True]],
        [[True, False, True], [True, True, True]],
    ]
    none = MagnitudeRule(0.5).regrown(sites, gradients)
    assert all(torch.equal(f, site.kept) for f, site in zip(none, sites, strict=True))


@pytest.mark.parametrize("chains", [1, 2])
def test_every_draw_is_as_sparse_as_the_rule_says_though_groups_come_back(chains: int) -> None:
    """Proves that draws of one cycle have the same groups, that those of other cycles have others, and what is not
    there is exactly 0."""
    x, y = regression()
    model = linear(x, y, SpikeAndSlab(0.1, 1.0, inclusion=0.5))
    rule = MagnitudeRule(0.5, regrow=1.0)
    options: dict[str, Any] = {"temperature": 1.0, "schedule": "cyclical", "thinning": 3, "draws_per_cycle": 4}
    kernel = SGHMCEM(
        model, step_size=0.05, friction=0.2, prune=rule, prune_start=0, prune_every=5, exploration=8, **options
    )
    posterior = sample(kernel, 40, 8, num_chains=chains, seed=0, progress=False)
    gone = (posterior.draws(40 * chains)["w"] == 0).flatten(1).reshape(chains, 10, 4, -1)
    assert bool((gone.sum(-1) == gone.shape[-1] // 2).all())
    assert bool((gone == gone[:, :, :1]).all())
    assert all(len(gone[chain, :, 0].unique(dim=0)) > 1 for chain in range(chains))
    found = posterior.inclusion_probabilities()["w"]
    assert bool((found.flatten() <= 1 - gone.double().mean((0, 1, 2)) + 1e-6).all())


def test_groups_that_come_back_need_a_cycle_to_explore() -> None:
    x, y = regression()
    with pytest.raises(ValueError, match=r"regrow=0.5.*Give schedule='cyclical' and exploration="):
        SGHMCEM(linear(x, y, SpikeAndSlab(0.1, 1.0)), step_size=0.1, friction=0.2, prune=MagnitudeRule(regrow=0.5))


def test_layer_adaptive_scores_are_shares_of_what_is_no_smaller_in_the_layer() -> None:
    """Proves the scores by hand: squares 1, 4, 9 have 1/14, 4/13, 1, a hundredth of them too, and columns likewise.

    By magnitude all of the narrow layer would go first; by these scores both layers keep their largest.
    """
    wide = groups(torch.tensor([[3.0, 1.0, 2.0]]), torch.ones(1, 3))
    narrow = groups(torch.tensor([[0.2, 0.3, 0.1]]), torch.ones(1, 3))
    assert [s.tolist() for s in MagnitudeRule(0.5)([wide, narrow], 1.0)] == [[[True] * 3], [[False] * 3]]
    rule = MagnitudeRule(4 / 6, layer_adaptive=True)
    assert [s.tolist() for s in rule([wide, narrow], 1.0)] == [[[True, False, False]], [[False, True, False]]]
    columns = groups(torch.tensor([[1.0, 3.0], [1.0, 1.0]]), torch.ones(2), "input")  # sums of squares 2 and 10: 1/6, 1
    stays = MagnitudeRule(0.5, layer_adaptive=True)([columns, wide], 1.0)
    assert stays[0].tolist() == [False, True]  # three of seven go: the single weight of 1/14, the column of 1/6
    assert stays[1].tolist() == [[True, False, True]]
    # 1, .47, .32 and 1, .375, .006; shares of the whole site would be .36, .32, .32 and .62, .37, .006
    even, steep = (groups(torch.tensor([v]).sqrt(), torch.ones(1, 3)) for v in ([9.0, 8.1, 8.0], [100.0, 60.0, 1.0]))
    stays = MagnitudeRule(0.5, layer_adaptive=True)([even, steep], 1.0)
    assert [s.tolist() for s in stays] == [[[True, True, False]], [[True, False, False]]]
    chains = [
        SiteGroups(
            s.density,
            torch.stack([s.weights, s.weights.flip(-1)]),
            s.included.expand(2, *s.included.shape),
            s.kept.expand(2, *s.kept.shape),
            s.included,
        )
        for s in (wide, narrow)
    ]
    assert [s[1].flip(-1).tolist() for s in rule(chains, 1.0)] == [s.tolist() for s in rule([wide, narrow], 1.0)]
    empty = groups(torch.zeros(1, 3), torch.ones(1, 3))
    assert [s.tolist() for s in rule([wide, empty], 1.0)] == [[[True, False, True]], [[False] * 3]]


def test_the_rule_of_ke_and_fan() -> None:
    """Columns by mean square; of convolutions whole channels by their range, also of one constant value."""
    matrix = groups(torch.tensor([[0.01, 0.2], [0.01, 0.0]]), torch.ones(2), "input")
    w = torch.ones(3, 2, 2, 2)
    w[0] = torch.randn(2, 2, 2)
    w[1, 1, 0, 0] = 7.0
    conv = groups(w, torch.ones(3, 2), "kernel")
    stays = KeFanRule(1e-3)([matrix, conv], 0.0)
    assert stays[0].tolist() == [False, True]
    assert stays[1].tolist() == [[True, True], [True, True], [False, False]]
    w = torch.randn(3, 2, 2, 2)
    w[:, 1] = 0.5
    assert KeFanRule(1e-3)([groups(w, torch.ones(3, 2), "kernel")], 0.0)[0].tolist() == [[True, False]] * 3
    assert KeFanRule(1e-3)([groups(w, torch.ones(3), "output")], 0.0)[0].tolist() == [True] * 3


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: InclusionRule(0.0), r"expected a number in \(0, 1\)"),
        (lambda: MagnitudeRule(1.0), r"expected a number in \(0, 1\)"),
        (lambda: MagnitudeRule(0.5, start=0.5), r"below sparsity=0\.5"),
        (lambda: KeFanRule(-1.0), "positive"),
        (lambda: pb.inference.pruning.rule("random"), "'inclusion'"),
    ],
)
def test_bad_rules(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


# ------------------------------------------------------------------------------------- the update of Ke and Fan


def by_the_released_code(
    x: Tensor,
    y: Tensor,
    w: Tensor,
    batches: list[Tensor],
    h: float,
    friction: float,
    temperature: float,
    v: tuple[float, float],
    hard: float,
) -> Tensor:
    """Section 2.2 of the notes on the released code, coordinate by coordinate in its own units, with torch's noise."""
    n, beta, T = len(x), 1 - friction, math.sqrt(temperature / len(x))
    m, xi = 1e-3 * torch.randn_like(w), torch.randn_like(w)
    rho, kept = torch.zeros_like(w), torch.ones_like(w)
    tau = torch.sigmoid(rho)
    eps = torch.full_like(w, 1 / (n * v[1]))
    for t, index in enumerate(batches):
        if t >= 4 and (t - 4) % 2 == 0:
            spike = w**2 < (2 * math.log(1.5) + math.log(v[1] / v[0])) / (1 / v[0] - 1 / v[1])
            eps = torch.full_like(w, 1 / (n * v[1])).masked_fill(spike, 1 / (n * v[0]))
            kept = kept * (w**2 >= hard)
            w = w * kept
        residual = x[index] @ w - y[index]
        grad = x[index].T @ residual / len(index) / 0.25
        rho = rho - 0.1 * (T**2 * h**3 * eps * tau + T * h**1.5 * xi * grad - 1 / (n * tau))
        tau = torch.sigmoid(rho)
        xi = torch.randn_like(w)
        m = beta * m - h**2 * (grad + eps * w) + math.sqrt(2 + 2 * beta**2) * h**1.5 * T * xi
        w = (w + tau * m) * kept
    return w


def test_ke_fan_is_the_released_update_step_by_step() -> None:
    x, y = regression()
    model = pb.models.Dense(
        nn.Linear(12, 1, bias=False).double(),
        pb.likelihoods.Gaussian(scale=0.5),
        60,
        prior=SpikeAndSlab(0.1, 1.0, inclusion=0.4),
    )
    start = torch.linspace(-0.6, 0.6, 12, dtype=torch.float64)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1)).split(30) * 6
    batches = DataLoader(TensorDataset(x, y[:, None]), batch_sampler=order, generator=torch.Generator())  # type: ignore[arg-type]
    kernel = KeFanSGHMC(
        model,
        batches,
        step_size=0.2,
        friction=0.9,
        temperature=0.8,
        em_start=4,
        em_every=2,
        prune=KeFanRule(0.01),
        prune_every=2,
        thinning=12,
    )
    kernel.setup(0)
    torch.manual_seed(7)
    kernel.theta.normal_()  # what the kernel draws before its state begins: the momentum of the invariant mode
    ours = kernel.sample({"weight": start.reshape(1, 1, 1, 12)})["weight"].reshape(12)
    torch.manual_seed(7)
    torch.randn(12, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    expected = by_the_released_code(x, y, start, list(order), 0.2, 0.9, 0.8, (0.01, 1.0), 0.01)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)
    assert not any("temperature" in name for name in kernel.diagnostics())  # it has none
    assert 0 < int((expected == 0).sum()) < 12 and kernel.steps == 12


@pytest.mark.parametrize(("step_size", "curvature"), [(0.3, 1.5), (0.5, 3.0), (0.3, 8.0)])
def test_ke_fan_has_its_own_variance(step_size: float, curvature: float) -> None:
    """(1 + b) tau^2 s^2 / [(1 - b) k (2 (1 + b) - k)] with k = C^2 a tau and s^2 = (2 + 2 b^2) C^3 T / N."""
    beta, count = 0.1, 4000

    def model() -> None:
        like = torch.zeros(count, dtype=torch.float64)
        w = pyro.sample("w", SpikeAndSlab(1e-3, 1.0, inclusion=0.5).elements(0.0, like, None))
        pyro.sample("y", dist.Normal(w, (curvature - 1) ** -0.5).to_event(1), obs=like)

    kernel = KeFanSGHMC(model, step_size=step_size, friction=1 - beta, soft_threshold=1e-30, thinning=400)
    w = run(kernel, 0, 1)["w"][-1]
    tau = kernel.preconditioner_scale
    kappa, noise = step_size**2 * curvature * tau, (2 + 2 * beta**2) * step_size**3
    expected = (1 + beta) * tau**2 * noise / ((1 - beta) * kappa * (2 * (1 + beta) - kappa))
    assert float((w.square() / expected).mean()) == pytest.approx(1, abs=4 * math.sqrt(2 / count))


# ------------------------------------------------------------------------------------------------ the kernel


def network(group: Any = "weight") -> tuple[pb.models.SpikeSlab, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    x = torch.randn(64, 5)
    y = (x[:, :1] > 0).float() + 0.1 * torch.randn(64, 1)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))
    model = pb.models.SpikeSlab(net, pb.likelihoods.Gaussian(scale=0.2), 64, prior=SpikeAndSlab(0.1, 1.0, group=group))
    return model, (x, y)


@pytest.mark.parametrize("group", ["weight", "kernel", "input", "output"])
def test_networks_chains_and_posteriors(group: Any) -> None:
    model, data = network(group)
    kernel = SGHMCEM(model, data, step_size=0.05, friction=0.1, batch_size=16, prune=MagnitudeRule(0.4), thinning=5)
    posterior = sample(kernel, 20, 30, num_chains=3, progress=False, seed=0)
    draws = posterior.draws(60)
    assert draws["0.weight"].shape == (60, 1, 8, 5) and draws["0.weight_inclusion"].shape == (60, 1)
    by_chain = draws["0.weight_inclusion"].reshape(3, 20)
    assert torch.equal(by_chain, by_chain[:, :1].expand(3, 20)) and len(by_chain[:, 0].unique()) > 1
    zero = (torch.cat([draws["0.weight"].flatten(1), draws["2.weight"].flatten(1)], 1) == 0).reshape(3, 20, 48)
    assert torch.equal(zero, zero[:, :1].expand_as(zero))
    assert all(0.4 - 8 / 48 < float(share) <= 0.4 for share in zero[:, 0].float().mean(-1))
    assert posterior.predict(data[0], 10).mean.shape == (64,)


def test_pyros_runner() -> None:
    """Two chains one after the other, from one kernel, start afresh; a pickled kernel gives the same chain."""
    model, data = network()
    kernel = SGHMCEM(model, data, step_size=0.05, friction=0.1, batch_size=16, prune="inclusion")
    draws = []
    for one in (kernel, kernel, pickle.loads(pickle.dumps(kernel))):
        pyro.set_rng_seed(0)
        mcmc = MCMC(one, num_samples=10, warmup_steps=20, num_chains=1, disable_progbar=True)
        mcmc.run()
        draws.append(mcmc.get_samples())
    for other in draws[1:]:
        assert all(torch.equal(draws[0][name], other[name]) for name in draws[0])
    assert draws[0]["0.weight_inclusion"].shape == (10, 1, 1)
    assert bool(((draws[0]["0.weight_inclusion"] > 0) & (draws[0]["0.weight_inclusion"] < 1)).all())


def test_temperatures_count_what_is_left() -> None:
    """Of 3000 weights without data three in four are removed; the others are at temperature 1.

    No density is left in the potential: the recorded gradient is a constant, to which the prior's force is added.
    """

    def model() -> None:
        like = torch.zeros(3000, dtype=torch.float64)
        pyro.sample("w", SpikeAndSlab(0.5, 1.0, inclusion=0.5).elements(0.0, like, None))

    kernel = SGHMCEM(model, step_size=0.1, friction=0.3, prune=MagnitudeRule(0.75), prune_start=0, thinning=20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as that the recording is not what it was
        run(kernel, 10, 200)
    found = kernel.diagnostics()
    assert found["w: kept"] == 0.25
    assert found["kinetic temperature"] == pytest.approx(2 / 1.7, rel=0.02)
    assert found["configurational temperature"] == pytest.approx(1, rel=0.03)


def test_a_diverged_chain_starts_again() -> None:
    """Indicators, rates and masks are those of the last good state, and nothing was removed for being NaN."""
    x, y = regression()
    kernel = SGHMCEM(
        linear(x, y, SpikeAndSlab(0.1, 1.0, inclusion=dist.Beta(2.0, 5.0))),
        step_size=0.02,
        friction=0.1,
        prune=KeFanRule(1e-12),
        prune_start=0,
        prune_every=7,
        thinning=50,
        preconditioner="rmsprop",
    )
    kernel.setup(10)
    params = kernel.sample(kernel.initial_params)
    kernel.step_size = 100.0
    with pytest.raises(FloatingPointError, match="diverged"):
        for _ in range(3):
            params = kernel.sample(params)
    kernel.step_size = 0.02
    good = kernel.last_good()
    assert set(good) == {"w", "w_inclusion"} and torch.isfinite(good["w"]).all()
    unconstrained = {name: kernel.potential.transforms[name].inv(value) for name, value in good.items()}
    params = kernel.sample(unconstrained)
    assert torch.isfinite(params["w"]).all() and kernel.diagnostics()["w: kept"] == 1
    assert torch.isfinite(kernel.sites[0].included).all()


def test_a_rate_that_is_left_out_of_the_start() -> None:
    x, y = regression()
    kernel = SGHMCEM(linear(x, y, SpikeAndSlab(inclusion=dist.Beta(2.0, 6.0))), step_size=0.02, friction=0.1)
    kernel.initial_params = {"w": torch.zeros(12, dtype=torch.float64)}
    assert sample(kernel, 3, 0, progress=False, seed=0).draws(3)["w_inclusion"].tolist() == [[pytest.approx(0.25)]] * 3


def test_energy_has_the_prior() -> None:
    x, y = regression()
    model = linear(x, y, SpikeAndSlab(0.1, 1.0, inclusion=0.3))
    energies = [SGHMC(model, step_size=1e-7, friction=0.1), SGHMCEM(model, step_size=1e-7, friction=0.1)]
    for kernel in energies:
        kernel.initial_params = {"w": torch.linspace(-1, 1, 12, dtype=torch.float64)}
        run(kernel, 0, 2)
    first, second = (kernel.diagnostics()["mean energy"] for kernel in energies)
    assert first == pytest.approx(second, rel=1e-5)


def shared_rate() -> None:
    rate = pyro.sample("rate", dist.Beta(2.0, 2.0))
    prior = SpikeAndSlab(0.1, 1.0).with_share(rate)
    pyro.sample("w", prior.elements(0.0, torch.zeros(3), None))


def plated() -> None:
    with pyro.plate("many", 4):
        pyro.sample("w", SpikeAndSlab(0.1, 1.0, inclusion=0.5).elements(0.0, torch.zeros(3), None))


def laplace() -> None:
    pyro.sample("w", SpikeAndSlab(0.1, 1.0, inclusion=0.5, spike="laplace").elements(0.0, torch.zeros(3), None))


def scaled() -> None:
    with pyro.poutine.scale(scale=0.5):
        pyro.sample("w", SpikeAndSlab(0.1, 1.0, inclusion=0.5).elements(0.0, torch.zeros(3), None))


def rate_used_twice() -> None:
    prior = SpikeAndSlab(0.1, 1.0)
    rate = pyro.sample("w_inclusion", prior.share(torch.zeros(3)))
    pyro.sample("w", prior.with_share(rate).elements(0.0, torch.zeros(3), None))
    pyro.sample("b", dist.Normal(0.0, rate))


def other_rate() -> None:
    prior = SpikeAndSlab(0.1, 1.0)
    rate = pyro.sample("w_inclusion", prior.share(torch.zeros(3)))
    pyro.sample("w", prior.with_share(0.1 * rate).elements(0.0, torch.zeros(3), None))


def scale_itself() -> None:
    tau = pyro.sample("w_tau", dist.InverseGamma(3.0, 3.0))
    pyro.sample("w", SpikeAndSlab(0.1, 1.0, inclusion=0.5).elements(0.0, torch.zeros(3), tau.reshape(1)))


def flat_rate() -> None:
    prior = SpikeAndSlab(0.1, 1.0, inclusion=dist.Beta(0.5, 0.5))
    given = prior.with_share(pyro.sample("w_inclusion", prior.share(torch.zeros(3))))
    pyro.sample("w", given.elements(0.0, torch.zeros(3), None))


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        (lambda: pyro.sample("z", dist.Normal(0.0, 1.0)), {}, "no spike-and-slab site"),
        (shared_rate, {}, "'w_inclusion'"),
        (plated, {}, "one weight for each site"),
        (flat_rate, {}, "no mode"),
        (scaled, {}, "scaled or masked"),
        (rate_used_twice, {}, "'b' depends on 'w_inclusion'"),
        (other_rate, {}, "'w_inclusion'"),
        (scale_itself, {}, "root of an InverseGamma"),
        (laplace, {"prune": "inclusion", "prune_start": 10}, "after warm-up"),
        (laplace, {"rate": lambda t: 3.0}, "at step 0"),
        (shared_rate, {"e_step": "exact"}, "'soft' or 'hard'"),
        (shared_rate, {"soft_threshold": 0.1}, "e_step='hard'"),
        (shared_rate, {"rate": 0.0}, r"\(0, 1\]"),
        (shared_rate, {"em_every": 0}, "at least 1"),
        (shared_rate, {"prune": "largest"}, "magnitude_schedule"),
        (laplace, {"em_start": 11}, "after warm-up"),
    ],
)
def test_bad_input(model: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        kernel = SGHMCEM(model, step_size=0.1, friction=0.1, **options)
        kernel.setup(10)
        kernel.sample(kernel.initial_params)


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        (laplace, {}, "Normal spikes"),
        (laplace, {"prune": "ke_fan"}, "from the first step"),
        (shared_rate, {"preconditioner": "rmsprop"}, "its own"),
        (shared_rate, {"soft_threshold": 0.0}, "a positive number"),
        (shared_rate, {"em_every": 0}, "at least 1"),
    ],
)
def test_bad_input_of_ke_fan(model: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        KeFanSGHMC(model, step_size=0.1, friction=0.1, **options).setup(10)


def test_ke_fan_has_no_soft_e_step() -> None:
    """Proves that what the released update does not have is not taken in silence."""
    with pytest.raises(TypeError, match="e_step"):
        KeFanSGHMC(laplace, step_size=0.1, friction=0.1, e_step="soft")
