"""The spike-and-slab prior against densities written with SciPy, quadrature, and the published oracle of EMVS."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS
from scipy import integrate, stats
from scipy.special import logsumexp
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn.priors import SpikeAndSlab, SpikeAndSlabDistribution, describe, from_description
from pyro_bnn.priors.spike_and_slab import BetaHyperprior, InverseGammaHyperprior

GROUPS = ("weight", "kernel", "input", "output")
#: the axes of a weight [out, in, k, k] that a group sums over
WITHIN = {"weight": (), "kernel": (2, 3), "input": (0, 2, 3), "output": (1, 2, 3)}
CASES = list(itertools.product(GROUPS, ("normal", "laplace")))


def weights(*shape: int, seed: int = 0) -> Tensor:
    """Of mixed magnitudes, so that some groups are clearly in the slab and some in the spike."""
    torch.manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64) * torch.rand(shape, dtype=torch.float64) ** 2 * 0.4


def prior(group: Any = "weight", spike: Any = "normal", **options: Any) -> SpikeAndSlab:
    return SpikeAndSlab(0.05, 0.7, **({"inclusion": 0.3} | options), group=group, spike=spike)


def by_scipy(w: np.ndarray, group: str, spike: str, share: float, sigma: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Log densities of slab and spike of every group, with their shares."""
    narrow = stats.norm(0, 0.05 * sigma) if spike == "normal" else stats.laplace(0, 0.05 * sigma)
    slab = stats.norm(0, 0.7 * sigma).logpdf(w).sum(WITHIN[group])
    return slab + np.log(share), narrow.logpdf(w).sum(WITHIN[group]) + np.log1p(-share)


@pytest.mark.parametrize(("group", "spike"), CASES)
def test_log_prob_and_log_odds_are_those_of_the_mixture(group: str, spike: str) -> None:
    w = weights(4, 3, 2, 2)
    d = prior(group, spike).elements(0.0, w, None)
    slab, narrow = by_scipy(w.numpy(), group, spike, 0.3)
    np.testing.assert_allclose(float(d.log_prob(w)), logsumexp([slab, narrow], 0).sum(), rtol=1e-12)
    np.testing.assert_allclose(d.log_odds(w).numpy(), slab - narrow, rtol=1e-9, atol=1e-10)
    assert d.event_shape == w.shape and d.groups == slab.shape and d.group_size == w.numel() / slab.size


@pytest.mark.parametrize(("group", "spike"), CASES)
def test_members_have_rates_and_scales_of_their_own(group: str, spike: str) -> None:
    """A batch [K, 1] of rates and of sigma, as plates give them, against one weight after the other."""
    w = torch.stack([weights(4, 3, 2, 2, seed=i) for i in range(3)])[:, None]
    share, sigma = torch.tensor([[0.1], [0.5], [0.8]]).double(), torch.tensor([[0.5], [1.0], [3.0]]).double()
    like = w[0, 0]
    own = prior(group, spike, inclusion=dist.Beta(2, 5), variance_prior=dist.InverseGamma(2, 2)).with_share(share)
    d = own.elements(0.0, like, sigma.reshape(3, 1, 1, 1, 1, 1))
    assert d.batch_shape == (3, 1)
    for i in range(3):
        slab, narrow = by_scipy(w[i, 0].numpy(), group, spike, float(share[i]), float(sigma[i]))
        np.testing.assert_allclose(float(d.log_prob(w)[i, 0]), logsumexp([slab, narrow], 0).sum(), rtol=1e-11)
        np.testing.assert_allclose(d.log_odds(w)[i, 0].numpy(), slab - narrow, rtol=1e-9, atol=1e-10)
    moved = d.expand(torch.Size([5, 3, 1]))
    torch.testing.assert_close(moved.log_prob(w), d.log_prob(w).expand(5, 3, 1))
    assert moved.sample().shape == (5, 3, 1, 4, 3, 2, 2)


@pytest.mark.parametrize("loc", [0.0, 3.0])
@pytest.mark.parametrize("spike", ["normal", "laplace"])
def test_density_has_mass_one_and_draws_have_its_distribution(spike: str, loc: float) -> None:
    d = prior(spike=spike, loc=loc).elements(0.0, torch.zeros(1, dtype=torch.float64), None)

    def density(w: float) -> float:
        return math.exp(float(d.log_prob(torch.tensor([w], dtype=torch.float64))))

    assert integrate.quad(density, loc - 6, loc + 6, points=[loc], limit=400)[0] == pytest.approx(1, abs=1e-7)
    torch.manual_seed(0)
    draws = d.sample((20_000,)).numpy().reshape(-1) - loc
    narrow = stats.norm(0, 0.05) if spike == "normal" else stats.laplace(0, 0.05)
    assert stats.kstest(draws, lambda w: 0.3 * stats.norm(0, 0.7).cdf(w) + 0.7 * narrow.cdf(w)).pvalue > 1e-3
    assert float(d.variance) == pytest.approx(0.3 * 0.49 + 0.7 * narrow.var(), rel=1e-12)


def test_a_group_is_drawn_from_one_component() -> None:
    d = SpikeAndSlab(1e-6, 1.0, inclusion=0.5, group="input").elements(0.0, torch.zeros(5, 400), None)
    columns = d.sample().abs().amax(0)
    assert set((columns > 1e-4).tolist()) == {True, False}
    assert abs(int((columns > 1e-4).sum()) - 200) < 4 * 10  # 4 standard deviations of a binomial


def test_emvs_oracle() -> None:
    """Rockova and George (2014): p*, d* and the threshold for v0 = .01, v1 = 1, theta = 1/2."""
    w = torch.tensor([0.0, 0.1, 0.3, 1.0], dtype=torch.float64)
    d = SpikeAndSlab(0.1, 1.0, inclusion=0.5).elements(0.0, w, None)
    p = d.log_odds(w).sigmoid()
    torch.testing.assert_close(p, torch.tensor([0.09091, 0.14093, 0.89589, 1.0]).double(), atol=5e-6, rtol=0)
    force = torch.zeros_like(w)
    d.add_force_(force, torch.ones_like(w), p)  # of weights 1: the precisions d*
    torch.testing.assert_close(force, torch.tensor([91.0, 86.048, 11.306, 1.0]).double(), atol=2e-3, rtol=0)
    edge = torch.tensor([0.21567, 0.21569], dtype=torch.float64)
    assert (d.at(d.inclusion, None).log_odds(edge.repeat(2)) >= 0).tolist() == [False, True, False, True]


@pytest.mark.parametrize(("group", "spike"), CASES)
def test_fisher_identity(group: str, spike: str) -> None:
    """The force under the probabilities of these very weights is minus the gradient of the collapsed density."""
    edge = 0.115 if spike == "normal" else 0.144  # at which the two components are about as likely
    torch.manual_seed(0)
    w = edge * torch.randn(4, 3, 2, 2).double().sign() * (1 + 0.1 * torch.randn(4, 3, 2, 2).double()) + 0.02
    w.requires_grad_()
    d = prior(group, spike, loc=0.02).elements(0.0, w.detach(), None)
    p = d.log_odds(w.detach()).sigmoid()
    assert bool(((p > 0.1) & (p < 0.9)).any())
    (gradient,) = torch.autograd.grad(d.log_prob(w).sum(), w)
    force = torch.zeros_like(w.detach())
    d.add_force_(force, w.detach(), d.log_odds(w.detach()).sigmoid())
    torch.testing.assert_close(force, -gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("group", GROUPS)
def test_the_hard_rule_is_probability_one_half(group: str) -> None:
    """p* = 1/2 where the mean square is [(2/G) log((1 - theta) / theta) + log(v1 / v0)] / (1/v0 - 1/v1)."""
    torch.manual_seed(0)
    spread = torch.linspace(0.7, 1.3, 40).double()[:, None, None, None] * torch.linspace(0.7, 1.3, 30)[:, None, None]
    w = 0.115 * spread * torch.randn(40, 30, 2, 2)
    d = prior(group).elements(0.0, w, None)
    v0, v1, n = 0.05**2, 0.7**2, d.group_size
    edge = (2 / n * math.log(0.7 / 0.3) + math.log(v1 / v0)) / (1 / v0 - 1 / v1)
    included = d.mean_square(w) >= edge
    assert torch.equal(d.log_odds(w) >= 0, included)
    assert 0.1 < included.float().mean() < 0.9


def test_probabilities_of_large_groups_stay_finite() -> None:
    w = torch.cat([torch.zeros(1, 200, 200), torch.ones(1, 200, 200)])
    d = SpikeAndSlab(1e-3, 1.0, inclusion=0.5, group="output").elements(0.0, w, None)
    assert torch.isfinite(d.log_prob(w)) and d.log_odds(w).sigmoid().tolist() == [0.0, 1.0]


def test_the_scale_is_the_mode_of_what_the_density_says() -> None:
    """A and B are those of log p(w, indicators | sigma), written with SciPy."""
    w = weights(6, 5)
    for spike in ("normal", "laplace"):
        d = prior(spike=spike).elements(0.0, w, None)
        p = d.log_odds(w).sigmoid()
        squares, absolutes = (float(v) for v in d.scale_statistics(w, p))

        def expected(sigma: float, spike: str = spike, p: Tensor = p) -> float:
            slab, narrow = by_scipy(w.numpy(), "weight", spike, 0.3, sigma)
            return float((p.numpy() * slab + (1 - p.numpy()) * narrow).sum())

        for sigma in (0.5, 2.0):
            ours = -w.numel() * math.log(sigma) - squares * (sigma**-2 - 1) / 2 - absolutes * (1 / sigma - 1)
            assert expected(sigma) - expected(1.0) == pytest.approx(ours, rel=1e-10)


@pytest.mark.parametrize(
    "one",
    [
        SpikeAndSlab(),
        SpikeAndSlab(0.1, 2.0, inclusion=0.2, group="input", spike="laplace", loc=0.5),
        SpikeAndSlab(0.1, 2.0, inclusion=dist.Beta(3, 4), group="kernel", variance_prior=dist.InverseGamma(2, 3)),
    ],
)
def test_json(one: SpikeAndSlab) -> None:
    import json

    assert from_description(json.loads(json.dumps(describe(one)))) == one


def test_a_distribution_of_pyro_is_kept_by_its_numbers() -> None:
    for given, kept in (
        (dist.Beta(2.0, 3.0), BetaHyperprior(2, 3)),
        (torch.distributions.Beta(2.0, 3.0), BetaHyperprior(2, 3)),
    ):
        one = SpikeAndSlab(inclusion=given)
        assert one == SpikeAndSlab(inclusion=kept) and one.inclusion == kept and one.has_inclusion
    for given in (dist.InverseGamma(2.0, 3.0), torch.distributions.InverseGamma(torch.tensor(2.0), torch.tensor(3.0))):
        one = SpikeAndSlab(variance_prior=given)
        assert one == SpikeAndSlab(variance_prior=InverseGammaHyperprior(2, 3)) and one.has_tau
        assert one.variance_prior == InverseGammaHyperprior(2, 3)


def test_a_hyperprior_of_several_numbers_is_refused() -> None:
    for options in (
        {"inclusion": dist.Beta(torch.ones(2), torch.ones(2))},
        {"variance_prior": dist.InverseGamma(torch.ones(2), 1.0)},
    ):
        with pytest.raises(ValueError, match=r"one number for each parameter of a hyperprior, got .*\(2,\)"):
            SpikeAndSlab(**options)


def test_what_is_no_prior_of_weights_is_not_among_the_priors() -> None:
    assert not {"Beta", "InverseGamma", "CodeMixture"} & {*pb.priors.__all__, *vars(pb.priors)}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"spike_scale": 0.0}, "positive"),
        ({"spike_scale": 2.0}, "narrower"),
        ({"inclusion": 1.0}, r"\(0, 1\)"),
        ({"inclusion": "half"}, r"\(0, 1\)"),
        ({"group": "row"}, "weight, kernel"),
        ({"spike": "dirac"}, "normal, laplace"),
        ({"variance_prior": 1.0}, "InverseGamma"),
    ],
)
def test_bad_numbers(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SpikeAndSlab(**options)
    with pytest.raises(ValueError, match="positive"):
        BetaHyperprior(0.0, 1.0)
    with pytest.raises(ValueError, match="positive"):
        InverseGammaHyperprior(1.0, 0.0)


def test_columns_of_a_bias_are_an_error() -> None:
    with pytest.raises(ValueError, match="at least two axes"):
        pb.models.Dense(nn.Linear(3, 2), None, prior=SpikeAndSlab(group="input"))


# --------------------------------------------------------------------------------------------- in Pyro's engines


def small(**options: Any) -> pb.models.SpikeSlab:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    one = SpikeAndSlab(0.1, 1.0, variance_prior=dist.InverseGamma(3, 3))
    return pb.models.SpikeSlab(net, pb.likelihoods.Gaussian(scale=0.5), 10, prior=one, **options)


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(10, 3, dtype=torch.float64)
    return x, x[:, :1] - x[:, 1:2]


def test_sites_of_the_model() -> None:
    """Rates and scales are latent, biases have the other prior, and the log joint density is the sum by hand."""
    model, (x, y) = small(bias_prior=pb.priors.Normal(0.0, 0.3)), data()
    trace: Any = poutine.trace(model).get_trace(x, y)
    trace.compute_log_prob()
    latents = [n for n, s in trace.nodes.items() if s["type"] == "sample" and not s["is_observed"]]
    names = [f"{w}{end}" for w in ("0.weight", "2.weight") for end in ("", "_inclusion", "_tau")]
    assert set(latents) - {"members", "data"} == {*names, "0.bias", "2.bias"}
    for weight in ("0.weight", "2.weight"):
        w, share = trace.nodes[weight]["value"], float(trace.nodes[f"{weight}_inclusion"]["value"])
        sigma = float(trace.nodes[f"{weight}_tau"]["value"])
        narrow, wide = stats.norm(0, 0.1 * sigma), stats.norm(0, sigma)
        by_hand = np.log(share * wide.pdf(w) + (1 - share) * narrow.pdf(w)).sum()
        assert float(trace.nodes[weight]["log_prob_sum"]) == pytest.approx(by_hand, rel=1e-10)
        by_hand = stats.beta(2, 2).logpdf(share)
        assert float(trace.nodes[f"{weight}_inclusion"]["log_prob_sum"]) == pytest.approx(by_hand, rel=1e-10)
    by_hand = stats.norm(0, 0.3).logpdf(trace.nodes["0.bias"]["value"]).sum()
    assert float(trace.nodes["0.bias"]["log_prob_sum"]) == pytest.approx(by_hand, rel=1e-10)


def test_every_parameter_is_random() -> None:
    """Also those of normalisation layers, unlike in Dense: a kernel moves nothing but latent sites."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    model = pb.models.SpikeSlab(net, pb.likelihoods.Gaussian(scale=0.5), 10)
    assert set(model.random) == {name for name, _ in net.named_parameters()}
    assert not any(p.requires_grad for p in model.core().net.parameters())
    assert pb.models.SpikeSlab(net, None, select=["2.weight"]).random == ["2.weight"]


@pytest.mark.slow
def test_nuts_and_mean_field_take_the_prior() -> None:
    model, (x, y) = small(), data()
    pyro.set_rng_seed(0)
    mcmc = MCMC(NUTS(model, max_tree_depth=4), num_samples=20, warmup_steps=20, disable_progbar=True)
    mcmc.run(x, y)
    share = mcmc.get_samples()["0.weight_inclusion"]
    assert bool(((share > 0) & (share < 1)).all())
    guide = pb.models.MeanFieldGuide(model, components=2)
    posterior = pb.inference.fit(model, guide, (x, y), epochs=200, lr=0.02, progress=False, seed=0)
    assert np.mean(posterior.losses[-20:]) < np.mean(posterior.losses[:20])
    draws = posterior.draws(50, seed=0)
    assert draws["0.weight_inclusion"].shape == (50, 2) and float(draws["0.weight_inclusion"].std()) > 0


def test_the_guide_of_a_rate_is_normal_in_its_logit() -> None:
    model, x = small(), data()[0]
    guide = pb.models.MeanFieldGuide(model)
    with torch.no_grad():
        guide.share_loc[0].fill_(0.4)
    torch.manual_seed(0)
    rates = torch.stack([guide(x)["0.weight_inclusion"].detach().reshape(()) for _ in range(4000)])
    scale = float(torch.nn.functional.softplus(guide.share_rho[0][0, 0].detach()))
    assert stats.kstest(torch.logit(rates).numpy(), stats.norm(0.4, scale).cdf).pvalue > 1e-3


def test_rank1_factors_around_one() -> None:
    torch.manual_seed(0)
    one = SpikeAndSlab(0.01, 0.3, inclusion=dist.Beta(1, 9))
    model = pb.models.Rank1(nn.Linear(3, 2), pb.likelihoods.Gaussian(scale=1.0), 10, prior=one)
    trace: Any = poutine.trace(model).get_trace(torch.randn(4, 3))
    assert isinstance(trace.nodes["weight.s"]["fn"], SpikeAndSlabDistribution)
    assert float(trace.nodes["weight.s"]["fn"].mean.mean()) == 1
    guide = pb.models.Rank1Guide(model, components=2)
    x = torch.randn(10, 3)
    pb.inference.fit(model, guide, (x, x[:, :2]), epochs=2, progress=False, seed=0)


def test_saved_and_loaded(tmp_path: Any) -> None:
    model, (x, _) = small(), data()
    guide = pb.models.MeanFieldGuide(model)
    posterior = pb.Posterior(model, guide)
    posterior.save(tmp_path / "run")
    torch.manual_seed(5)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    again = pb.load(tmp_path / "run", net)
    assert isinstance(again.model, pb.models.SpikeSlab) and again.model.priors == model.priors
    assert torch.equal(again.predict(x, 8, seed=3).mean, posterior.predict(x, 8, seed=3).mean)
