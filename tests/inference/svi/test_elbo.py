"""The ELBO of a mixture of members, against the same written by hand, Monte Carlo and quadrature."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from by_hand import chain, kolchinsky_tracey, means_and_scales, parts, scatter
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoNormal
from scipy import integrate, stats
from torch import Tensor

import pyro_bnn as pb
from pyro_bnn.inference import MixtureELBO, ScaleLatents
from pyro_bnn.inference.svi.elbo import kolchinsky_tracey as correction
from pyro_bnn.likelihoods import Categorical, Gaussian
from pyro_bnn.models import Dense, MeanFieldGuide, PointGuide, Rank1, Rank1Guide
from pyro_bnn.priors import (
    Cauchy,
    HierarchicalCauchy,
    HierarchicalNormal,
    Horseshoe,
    Laplace,
    Normal,
    StudentT,
)
from pyro_bnn.program.factorised import NormalBlock

N = 7
PRIORS: list[Any] = [
    Normal(0.9, 0.3),
    Cauchy(None, 0.2),
    Laplace(1.1, 0.4),
    StudentT(4.0, None, 0.5),
    HierarchicalCauchy(0.3),
    HierarchicalNormal(2.5, 0.4),
    Horseshoe(0.7, 0.8),
    dist.Logistic(torch.tensor(1.0, dtype=torch.float64), 0.5),
]
LIGHT = (Normal, Laplace, HierarchicalNormal, Horseshoe)


def name_of(value: Any) -> str:
    return value if isinstance(value, str) else type(value).__name__


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(N, 2, generator=generator, dtype=torch.float64)
    return x, torch.sin(x[:, 0]) + 0.1 * torch.randn(N, generator=generator, dtype=torch.float64)


def rank1(prior: Any = PRIORS[0], family: Any = "normal", draws: Any = "row", **options: Any) -> tuple[Any, Any]:
    model = Rank1(chain(2, 3, 1), Gaussian(), N, prior=prior, weight_prior=Normal(0, 0.7), **options)
    guide = Rank1Guide(model, 3, family, draws=draws)
    scatter(guide)
    return model, guide


def at_seed(elbo: Any, model: Any, guide: Any, *args: Tensor, seed: int = 0) -> tuple[float, dict[str, Tensor]]:
    """The ELBO, and the draws that it was computed from."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        trace = poutine.trace(guide).get_trace(*args)
        torch.manual_seed(seed)
        value = -elbo.loss(model, guide, *args)
    return value, {name: site["value"] for name, site in trace.nodes.items() if site["type"] == "sample"}


@pytest.mark.parametrize("draws", ["row", "member"])
@pytest.mark.parametrize("family", ["normal", "cauchy"])
@pytest.mark.parametrize("prior", PRIORS, ids=name_of)
@pytest.mark.filterwarnings("ignore:family='cauchy'")
def test_elbo_of_rank_1_equals_the_one_written_by_hand(prior: Any, family: str, draws: str) -> None:
    """Every prior, family, bound and kind of draw, on the whole data set and on a part of it (times N / B)."""
    x, y = data()
    model, guide = rank1(prior, family, draws)
    unbiased, its_guide = rank1(prior, family, draws, member_bias=False)
    for size in (N, 3):
        for mixture_kl in ("mean", "sum", "kt"):
            m, g = (unbiased, its_guide) if mixture_kl == "kt" else (model, guide)
            value, values = at_seed(MixtureELBO(mixture_kl), m, g, x[:size], y[:size])
            rows = size if draws == "row" else 1
            assert values["0.weight.s"].shape == (3, rows, 2)
            expected = parts(m, g, values, x[:size], y[:size], prior=prior, mixture_kl=mixture_kl)
            smallest = min(map(abs, (expected.likelihood, expected.log_weights, expected.kl)))
            assert value == pytest.approx(expected.elbo, abs=1e-6 * smallest)


@pytest.mark.parametrize("draws", ["row", "member"])
def test_mixture_bound_of_the_likelihood(draws: str) -> None:
    """log of the average over members, sample by sample: as written by hand, and never below the average of logs."""
    x, y = data()
    model, guide = rank1(draws=draws)
    for size in (N, 3):
        average, _ = at_seed(MixtureELBO(), model, guide, x[:size], y[:size])
        mixture, values = at_seed(MixtureELBO(likelihood_bound="mixture"), model, guide, x[:size], y[:size])
        expected = parts(
            model, guide, values, x[:size], y[:size], prior=PRIORS[0], likelihood_bound="mixture"
        )  # fmt: skip
        assert mixture == pytest.approx(expected.elbo, rel=1e-6)
        assert mixture > average


def test_elbo_of_a_classifier_with_a_temperature() -> None:
    """Class labels, per-member biases, several outputs, and the likelihood to the power 1 / T."""
    x, _ = data()
    y = torch.arange(N) % 3
    model = Rank1(chain(2, 4, 3), Categorical(temperature=0.5), N, prior=Cauchy())
    guide = Rank1Guide(model, 2, "cauchy")
    scatter(guide)
    for bound in ("average", "mixture"):
        value, values = at_seed(MixtureELBO(likelihood_bound=bound), model, guide, x[:5], y[:5])
        expected = parts(model, guide, values, x[:5], y[:5], prior=Cauchy(), likelihood_bound=bound)
        assert value == pytest.approx(expected.elbo, rel=1e-6)


@pytest.mark.parametrize("components", [1, 3])
@pytest.mark.parametrize("prior", PRIORS, ids=name_of)
def test_elbo_of_dense_equals_the_one_written_by_hand(prior: Any, components: int) -> None:
    x, y = data()
    model = Dense(chain(2, 3, 1), Gaussian(), N, prior=prior)
    guide = MeanFieldGuide(model, components)
    scatter(guide)
    for size in (N, 3):
        for mixture_kl in ("mean", "sum", "kt"):
            value, values = at_seed(MixtureELBO(mixture_kl), model, guide, x[:size], y[:size])
            expected = parts(model, guide, values, x[:size], y[:size], prior=prior, mixture_kl=mixture_kl)
            assert value == pytest.approx(expected.elbo, rel=1e-6)


@pytest.mark.parametrize("block_size", [1, 7, 1000])
@pytest.mark.parametrize(
    "prior",
    [
        {"0.*": Normal(0.9, 0.3), "2.weight.*": Normal(0.2, 0.7), ".*": Normal(0, 2.0)},
        {"0.weight.*": Normal(0.9, 0.3), ".*": Laplace(0.1, 0.5)},
        {"0.weight.*": Normal(0.9, 0.3), ".*": HierarchicalNormal()},
    ],
    ids=["three normals", "one not normal", "one with a sampled scale"],
)
@pytest.mark.parametrize("model_class", [Dense, Rank1])
def test_sites_of_a_block_count_as_if_each_were_alone(
    monkeypatch: pytest.MonkeyPatch, model_class: Any, prior: Any, block_size: int
) -> None:
    """Proves that what is drawn and compared together adds up to the KL divergences that PyTorch has for each site,
    with one site in a block, some or all, also when a user scales one of them; and so do the gradients."""
    monkeypatch.setattr("pyro_bnn.program.guide.BLOCK_SIZE", block_size)
    x, y = data()
    model = model_class(chain(2, 3, 1), Gaussian(), N, prior=prior)
    guide = (MeanFieldGuide if model_class is Dense else Rank1Guide)(model, 3)
    assert len(guide.loc) == {1: 4, 7: 2, 1000: 1}[block_size]
    scatter(guide)

    def expected(trace: Any, conditioned: Any) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for name, site in conditioned.nodes.items():
            if site["type"] != "sample" or type(site["fn"]).__name__ == "_Subsample":
                continue
            if site["is_observed"]:
                total = total + (site["fn"].log_prob(site["value"]) * site["scale"]).sum()
                continue
            q = trace.nodes[name]["fn"]
            in_full = getattr(q, "in_full", q)
            try:
                kl = torch.distributions.kl_divergence(in_full, site["fn"])
            except NotImplementedError:
                pass  # PyTorch has none: the one of this site alone
            else:
                total = total - (kl * site["scale"]).sum()
                continue
            try:
                kl = torch.distributions.kl_divergence(q, site["fn"])
            except NotImplementedError:
                kl = q.log_prob(site["value"]) - site["fn"].log_prob(site["value"])
            total = total - (kl * site["scale"]).sum()
        return total

    for scaled in (None, "0.weight", "0.weight.s"):

        class ScaleOne(poutine.messenger.Messenger):
            def _pyro_sample(self, msg: Any, name: Any = scaled) -> None:
                if msg["name"] == name:
                    msg["scale"] = 0.25 * msg["scale"]

        with torch.random.fork_rng(), ScaleOne():
            torch.manual_seed(0)
            loss = MixtureELBO().differentiable_loss(model, guide, x, y)
            torch.manual_seed(0)
            trace = poutine.trace(guide).get_trace(x, y)
            value = expected(trace, poutine.trace(poutine.replay(model, trace=trace)).get_trace(x, y))
        torch.testing.assert_close(loss, -value, rtol=1e-12, atol=0)
        for own, other in zip(*(torch.autograd.grad(v, list(guide.parameters())) for v in (loss, -value)), strict=True):
            torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-12)


def test_every_draw_of_a_block_is_new() -> None:
    """Proves that draws of neighbours and of one site again, and for more batch axes, are independent Normals."""
    torch.manual_seed(0)
    loc, scale = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.1, 0.2, 0.3]])
    first, second = NormalBlock(loc, scale, [torch.Size([1]), torch.Size([2])]).parts()
    count = 4000
    wide = [d.expand((count, 1)) for d in (first, second)]
    draws = [torch.cat([d.rsample() for d in wide], -1) for _ in range(2)] + [
        torch.cat([d.rsample((count,)) for d in (first, second)], -1)
    ]
    z = torch.cat([(d.reshape(count, 3) - loc) / scale for d in draws], 1)
    assert (z.mean(0).abs() < 5 / count**0.5).all()
    assert ((z.T.cov() - torch.eye(9)).abs() < 5 * (2 / count) ** 0.5).all()
    for d, index in ((first, [0]), (second, [1, 2])):
        torch.testing.assert_close(d.mean, loc[:, index])
        torch.testing.assert_close(d.stddev, scale[:, index])
        torch.testing.assert_close(d.log_prob(loc[:, index]), d.in_full.log_prob(loc[:, index]))
        torch.testing.assert_close(d.entropy(), d.in_full.entropy())
        assert d.support.event_dim == d.event_dim == 1


def test_divergence_of_a_block_has_second_derivatives_and_float_accuracy() -> None:
    """Proves that Hessians (as of a Laplace approximation) are those of PyTorch's own expression, and that the value
    for 1e7 elements in float32 is right to 1e-6."""
    prior = dist.Normal(torch.tensor(0.3, dtype=torch.float64), 0.5).expand([3]).to_event(1)

    def closed(loc: Tensor, scale: Tensor, own: bool) -> Tensor:
        q: Any = NormalBlock(loc, scale, [torch.Size([3])]).parts()[0]
        return torch.distributions.kl_divergence(q if own else q.in_full, prior)

    point = torch.tensor([0.1, -0.4, 0.9], dtype=torch.float64), torch.tensor([0.2, 0.7, 1.1], dtype=torch.float64)
    own, other = (torch.autograd.functional.hessian(lambda m, s, o=o: closed(m, s, o), point) for o in (True, False))
    torch.testing.assert_close(own, other)
    torch.manual_seed(0)
    loc, scale = 0.1 * torch.randn(10**7), 0.05 + 0.1 * torch.rand(10**7)
    wide = dist.Normal(0.0, 1.0).expand([10**7]).to_event(1)
    value = torch.distributions.kl_divergence(NormalBlock(loc, scale, [loc.shape]).parts()[0], wide)
    m, s = loc.double(), scale.double()
    assert float(value) == pytest.approx(float(((s * s + m * m - 1) / 2 - s.log()).sum()), rel=1e-6)


def test_masks_and_scales_of_users_reach_every_bound() -> None:
    """Proves that masked observations drop out of the mixture bound too, and that a weight for each member, which
    Pyro allows, gives what Pyro's own ELBO gives."""
    x, y = data()
    model, guide = rank1(draws="member")
    kept = torch.arange(N) < 4
    for bound in ("average", "mixture"):
        elbo = MixtureELBO(likelihood_bound=bound)  # type: ignore[arg-type]

        class Mask(poutine.messenger.Messenger):
            def _pyro_sample(self, msg: Any) -> None:
                if msg["name"] == "obs":
                    msg["mask"] = kept

        all_of_it, _ = at_seed(elbo, model, guide, x, y)
        with Mask():
            masked, values = at_seed(elbo, model, guide, x, y)
        with pyro.poutine.scale(scale=1.0):
            trace = poutine.trace(poutine.condition(model, values)).get_trace(x, y)
        dropped = trace.nodes["obs"]["fn"].log_prob(y)[:, 4:]
        lost = dropped.mean(0) if bound == "average" else dropped.logsumexp(0) - math.log(3)
        assert masked == pytest.approx(all_of_it - float(lost.sum().detach()), rel=1e-9)
    weights = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)[:, None]
    dense = Dense(chain(2, 3, 1), Gaussian(), N)
    mean_field = MeanFieldGuide(dense, 3)
    scatter(mean_field)
    losses = []
    for elbo in (MixtureELBO(), TraceMeanField_ELBO()):
        torch.manual_seed(0)
        with poutine.scale(scale=weights):
            losses.append(float(elbo.differentiable_loss(dense, mean_field, x, y).detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)


def test_a_masked_site_does_not_join_the_closed_form_of_its_block() -> None:
    """Proves that hiding one site in model and guide takes away its own divergence, in full and nothing else, although
    it lies in one block with the other weights."""
    x, y = data()
    model = Dense(chain(2, 3, 1), Gaussian(0.4), N, prior=Normal(0.2, 0.7))
    guide = MeanFieldGuide(model, 3)
    scatter(guide)
    hidden = "0.weight"

    class Hide(poutine.messenger.Messenger):
        def _pyro_sample(self, msg: Any) -> None:
            if msg["name"] == hidden:
                msg["mask"] = torch.tensor(False)

    (block,) = guide.blocks()
    assert len(block.sites) > 1
    whole, values = at_seed(MixtureELBO(), model, guide, x, y)
    with Hide():
        rest, same = at_seed(MixtureELBO(), model, guide, x, y)
    assert torch.equal(values[hidden], same[hidden])
    deviation = torch.nn.functional.softplus(guide.widths()[hidden]) + 1e-7
    q = dist.Normal(guide.coordinates()[hidden], deviation)
    p = dist.Normal(torch.tensor(0.2, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64))
    divergence = float(torch.distributions.kl_divergence(q, p).sum()) / 3
    assert divergence > 0.1
    assert rest - whole == pytest.approx(divergence, rel=1e-9)


def test_elbo_of_points_is_the_log_joint_density() -> None:
    """A guide without spread turns the ELBO into what MAP maximises: log likelihood + log prior."""
    x, y = data()
    model = Dense(chain(2, 3, 1), Gaussian(0.3), N, prior=Normal(0, 2.0))
    guide = PointGuide(model)
    scatter(guide)
    value, values = at_seed(MixtureELBO(), model, guide, x, y)
    joint = poutine.trace(poutine.condition(model, values)).get_trace(x, y).log_prob_sum()
    assert value == pytest.approx(float(joint.detach()), rel=1e-12)


def test_plain_pyro_elbos_agree() -> None:
    """Pyro's own mean-field ELBO is the "mean" bound; its sampling ELBO has the same expectation."""
    x, y = data()
    model, guide = rank1()
    ours, _ = at_seed(MixtureELBO(), model, guide, x, y)
    pyros, _ = at_seed(TraceMeanField_ELBO(), model, guide, x, y)
    assert ours == pytest.approx(pyros, rel=1e-12)
    torch.manual_seed(0)
    analytic, sampled = (
        np.array([elbo.loss(model, guide, x, y) for _ in range(150)]) for elbo in (MixtureELBO(), Trace_ELBO())
    )
    assert abs(analytic.mean() - sampled.mean()) < 4 * math.hypot(analytic.std(), sampled.std()) / math.sqrt(150)


def test_several_particles_are_averaged() -> None:
    x, y = data()
    model, guide = rank1()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        single = [MixtureELBO("sum", "mixture").loss(model, guide, x, y) for _ in range(3)]
        torch.manual_seed(0)
        together = MixtureELBO("sum", "mixture", num_particles=3).loss(model, guide, x, y)
    assert together == pytest.approx(np.mean(single), rel=1e-12)


def test_vectorised_particles_agree_with_the_loop() -> None:
    """The members' axis is found from the right, so an axis of particles on the left changes nothing."""
    x, y = data()
    model, guide = rank1(draws="member")
    options = {"num_particles": 100, "vectorize_particles": True, "max_plate_nesting": 2}
    for chosen in (("mean", "average"), ("sum", "mixture")):
        torch.manual_seed(0)
        loop = np.array([MixtureELBO(*chosen).loss(model, guide, x, y) for _ in range(100)])
        vectorised = MixtureELBO(*chosen, **options).loss(model, guide, x, y)
        assert abs(vectorised - loop.mean()) < 4 * math.sqrt(2) * loop.std() / math.sqrt(100)
    unbiased, its_guide = rank1(member_bias=False)
    with pytest.raises(ValueError, match="vectorize_particles"):
        MixtureELBO("kt", **options).loss(unbiased, its_guide, x, y)


@pytest.mark.parametrize(
    ("prior", "family", "mixture_kl", "bound"),
    [
        (HierarchicalCauchy(), "cauchy", "mean", "mixture"),
        (HierarchicalCauchy(), "cauchy", "kt", "average"),
        (HierarchicalNormal(), "normal", "sum", "average"),
        (Horseshoe(), "normal", "kt", "mixture"),
        (Normal(1.0, 0.3), "normal", "mean", "average"),
        (Normal(1.0, 0.3), "normal", "sum", "mixture"),
        (Laplace(1.0, 0.3), "normal", "mean", "average"),
        (StudentT(), "cauchy", "mean", "average"),
    ],
    ids=name_of,
)
def test_gradient_is_that_of_the_loss(prior: Any, family: Any, mixture_kl: Any, bound: Any) -> None:
    """What the optimiser descends is the loss that is reported: central differences at fixed draws."""
    model, guide = rank1(prior, family, member_bias=False)
    parameters = [*guide.parameters(), model.core().net[0].weight]
    check_gradient(MixtureELBO(mixture_kl, bound), model, guide, parameters)


@pytest.mark.parametrize("prior", [Normal(0.1, 0.3), HierarchicalNormal(), Horseshoe()], ids=name_of)
def test_gradient_of_a_dense_network(prior: Any) -> None:
    """A scale that is the same for all elements, but sampled, passes its gradient on."""
    model = Dense(chain(2, 3, 1), Gaussian(), N, prior=prior)
    guide = MeanFieldGuide(model)
    scatter(guide)
    check_gradient(MixtureELBO(), model, guide, list(guide.parameters()))


def check_gradient(elbo: Any, model: Any, guide: Any, parameters: list[Tensor]) -> None:
    x, y = data()

    def loss() -> Tensor:
        torch.manual_seed(5)
        return elbo.differentiable_loss(model, guide, x[:4], y[:4])

    value = loss()
    value.backward()
    assert float(value.detach()) == pytest.approx(-at_seed(elbo, model, guide, x[:4], y[:4], seed=5)[0], rel=1e-12)
    step = 1e-6
    for p in parameters:
        assert p.grad is not None
        for index in {(0, 0), (p.shape[0] - 1, p.shape[1] - 1)}:
            gradient = float(p.grad[index])
            with torch.no_grad():
                p[index] += step
                above = float(loss())
                p[index] -= 2 * step
                below = float(loss())
                p[index] += step
            assert gradient == pytest.approx((above - below) / (2 * step), rel=1e-4, abs=1e-5)


# ------------------------------------------------------------------------------------------------- divergences


def only_latent(family: Any, loc: Tensor, scale: Tensor, prior: Any) -> tuple[Any, Any]:
    """A model without data whose negative ELBO is the KL divergence of K members over D elements."""
    count, size = loc.shape

    def model() -> None:
        with pyro.plate("members", 1, dim=-2):
            pyro.sample("z", prior.expand([size]).to_event(1))

    def guide() -> None:
        with pyro.plate("members", 1, subsample=torch.arange(count), dim=-2):
            pyro.sample("z", family(loc[:, None], scale[:, None]).to_event(1))

    return model, guide


def random_members(count: int, size: int, seed: int, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    loc = spread * torch.randn(count, size, generator=generator, dtype=torch.float64)
    return loc, 0.3 + torch.rand(count, size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("family", "frozen"), [(dist.Normal, stats.norm), (dist.Cauchy, stats.cauchy)])
def test_closed_form_divergence_equals_monte_carlo(family: Any, frozen: Any) -> None:
    """KL of Normals and of Cauchys in closed form, within 4 standard errors of 200,000 draws for each member."""
    loc, scale = random_members(3, 2, seed=0)
    prior = family(torch.tensor(0.2, dtype=torch.float64), 0.7)
    values = [MixtureELBO(kind).loss(*only_latent(family, loc, scale, prior)) for kind in ("mean", "sum")]
    rng = np.random.default_rng(0)
    m, s = loc.numpy(), scale.numpy()
    z = frozen.rvs(m, s, size=(200_000, 3, 2), random_state=rng)
    log_ratio = (frozen.logpdf(z, m, s) - frozen.logpdf(z, 0.2, 0.7)).sum(-1)
    for value, draws in zip(values, (log_ratio.mean(1), log_ratio.sum(1)), strict=True):
        assert abs(value - draws.mean()) < 4 * draws.std() / math.sqrt(len(draws))


def integral(f: Any, pair: tuple[float, ...], positive: bool = False) -> float:
    """Adaptive quadrature over the real line (or its positive half), in pieces about the two peaks."""
    m, s, n, t = pair
    breaks = {c + k * w for c, w in ((m, s), (n, t)) for k in (-8, -2, 0, 2, 8)}
    points = sorted({0.0, np.inf} | {math.exp(b) for b in breaks} if positive else {-np.inf, np.inf} | breaks)
    return sum(integrate.quad(f, a, b, epsabs=1e-13)[0] for a, b in pairwise(points))


PAIRS = [
    *((0.0, 1.0, 0.0, 1.0), (0.0, 1.0, 0.5, 1.5), (-1.0, 0.3, 0.5, 0.4)),
    *((1.0, 0.01, 1.3, 2.0), (0.0, 1e-3, 0.005, 1e-3)),
]


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize(
    ("family", "density"),
    [
        (dist.Normal, lambda x, m, s: stats.norm.logpdf(x, m, s)),
        (dist.LogNormal, lambda x, m, s: stats.lognorm.logpdf(x, s, scale=math.exp(m))),
        (dist.Cauchy, lambda x, m, s: stats.cauchy.logpdf(x, m, s)),
    ],
    ids=["normal", "lognormal", "cauchy"],
)
def test_bhattacharyya_distance_equals_quadrature(family: Any, density: Any, pair: Any) -> None:
    """With K = 2 the correction is log((1 + exp(-B)) / 2), from which B = -log integral sqrt(q_1 q_2)."""
    m, s, n, t = pair
    loc, scale = torch.tensor([[m], [n]], dtype=torch.float64), torch.tensor([[s], [t]], dtype=torch.float64)
    _, guide = only_latent(family, loc, scale, dist.Normal(0.0, 1.0))
    distance = -math.log(2 * math.exp(float(correction(poutine.trace(guide).get_trace()))) - 1)
    positive = family is dist.LogNormal
    expected = integral(lambda v: math.exp(0.5 * (density(v, m, s) + density(v, n, t))), pair, positive)
    assert math.exp(-distance) == pytest.approx(expected, rel=1e-7)


def test_distance_of_cauchys_in_single_precision() -> None:
    """Accurate, finite and with a finite gradient from equal members to members a million scales apart."""
    for apart in (0.0, 1e-6, 1e-2, 1.0, 1e3):
        loc = torch.tensor([[1.0], [1.0 + apart]], requires_grad=True)
        scale = torch.tensor([[1e-3], [1e-3]], requires_grad=True)
        _, guide = only_latent(dist.Cauchy, loc, scale, dist.Normal(0.0, 1.0))
        value = correction(poutine.trace(guide).get_trace())
        value.backward()
        exact = loc.detach().double().flatten().tolist()
        pair = (exact[0], 1e-3, exact[1], 1e-3)

        def root(v: float, pair: tuple[float, ...] = pair) -> float:
            return math.sqrt(stats.cauchy.pdf(v, *pair[:2]) * stats.cauchy.pdf(v, *pair[2:]))

        expected = math.log((1 + integral(root, pair)) / 2)
        assert float(value.detach()) == pytest.approx(expected, abs=2e-6)
        assert torch.isfinite(loc.grad).all() and torch.isfinite(scale.grad).all()


@pytest.mark.parametrize("family", [dist.Normal, dist.Cauchy])
@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0])
def test_order_of_the_bounds(family: Any, spread: float) -> None:
    """ "kt" <= "mean" <= "sum", with "kt" between "mean" - log K (members apart) and "mean" (all the same)."""
    loc, scale = random_members(4, 5, seed=1, spread=spread)
    prior = family(torch.tensor(0.0, dtype=torch.float64), 1.0)
    if spread == 0.0:
        scale = scale[:1].expand(4, 5)
    kt, mean, total = (MixtureELBO(k).loss(*only_latent(family, loc, scale, prior)) for k in ("kt", "mean", "sum"))
    assert total == pytest.approx(4 * mean, rel=1e-12) and mean <= total
    assert mean - math.log(4) - 1e-12 <= kt <= mean + 1e-12
    if spread == 0.0:
        assert kt == pytest.approx(mean, rel=1e-12)
    if spread == 3.0:
        assert kt < mean - 0.5


@pytest.mark.parametrize(("family", "frozen"), [(dist.Normal, stats.norm), (dist.Cauchy, stats.cauchy)])
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("spread", [0.1, 0.7, 2.0, 6.0])
def test_kolchinsky_tracey_bounds_the_divergence_of_the_mixture(
    family: Any, frozen: Any, size: int, spread: float
) -> None:
    """At least the Monte Carlo estimate of KL(mixture || prior) less 4 standard errors; in 1-D, quadrature too."""
    loc, scale = random_members(3, size, seed=2, spread=spread)
    prior = family(torch.tensor(0.1, dtype=torch.float64), 1.2)
    bound = MixtureELBO("kt").loss(*only_latent(family, loc, scale, prior))
    m, s = loc.numpy(), scale.numpy()
    rng = np.random.default_rng(1)
    n = 100_000

    def log_ratio(z: Any) -> Any:
        each = frozen.logpdf(z[:, None], m, s).sum(-1)
        return np.logaddexp.reduce(each, 1) - math.log(3) - frozen.logpdf(z, 0.1, 1.2).sum(-1)

    component = rng.integers(3, size=n)
    sampled = log_ratio(frozen.rvs(m[component], s[component], random_state=rng))
    assert bound >= sampled.mean() - 4 * sampled.std() / math.sqrt(n)
    if size == 1:
        angle = (np.arange(200_000) + 0.5) / 200_000 * np.pi - np.pi / 2
        z = np.tan(angle)
        density = np.exp(frozen.logpdf(z[:, None], m.T, s.T)).mean(1)
        exact = (density * log_ratio(z[:, None]) / np.cos(angle) ** 2).mean() * np.pi
        assert abs(sampled.mean() - exact) < 4 * sampled.std() / math.sqrt(n)
        assert bound >= exact - 1e-9


def test_correction_goes_over_all_sites_at_once() -> None:
    """One component index for the whole network: distances add up over scales, noise and factors of all layers."""
    x, y = data()
    model, guide = rank1(Horseshoe(), member_bias=False)
    trace = poutine.trace(guide).get_trace(x, y)
    expected = kolchinsky_tracey(model, guide, means_and_scales(model, guide))
    assert float(correction(trace).detach()) == pytest.approx(expected, rel=1e-8)
    moved, its_guide = rank1(Horseshoe(), member_bias=False, members_dim=-4)
    its_guide.load_state_dict(guide.state_dict())
    assert float(correction(poutine.trace(its_guide).get_trace(x, y)).detach()) == pytest.approx(expected, rel=1e-8)


def test_two_networks_have_two_mixtures() -> None:
    """Independent indices: corrections add up, and the mixture of the likelihood is over all pairs of members."""
    few, many = random_members(2, 3, 5), random_members(3, 2, 6)
    x = torch.randn(N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    prior = dist.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)

    def guide(y: Tensor) -> None:
        for name, dim, (m, s) in (("a", -2, few), ("b", -3, many)):
            with pyro.plate(f"{name}.members", 1, subsample=torch.arange(len(m)), dim=dim):
                shape = (len(m),) + (1,) * (-dim - 1) + m.shape[1:]
                pyro.sample(name, dist.Normal(m.reshape(shape), s.reshape(shape)).to_event(1))

    def model(y: Tensor) -> None:
        first, second = pyro.plate("a.members", 1, dim=-2), pyro.plate("b.members", 1, dim=-3)
        with first:
            a = pyro.sample("a", prior.expand([3]).to_event(1))
        with second:
            b = pyro.sample("b", prior.expand([2]).to_event(1))
        with first, second, pyro.plate("data", N, dim=-1):
            pyro.sample("obs", dist.Normal((a.sum(-1) + b.sum(-1)) * x, 0.5), obs=y)

    torch.manual_seed(0)
    y = torch.randn(N, dtype=torch.float64)
    separate = [MixtureELBO("kt").loss(*only_latent(dist.Normal, *one, prior)) for one in (few, many)]
    terms = [MixtureELBO("mean").loss(*only_latent(dist.Normal, *one, prior)) for one in (few, many)]
    values = {}
    for kind in ("mean", "kt"):
        for bound in ("average", "mixture"):
            values[kind, bound], draws = at_seed(MixtureELBO(kind, bound), model, guide, y)
    f = (draws["a"].sum(-1) + draws["b"].sum(-1)) * x
    log_y = stats.norm.logpdf(y.numpy(), f.numpy(), 0.5)
    assert log_y.shape == (3, 2, N)
    average, mixture = log_y.mean((0, 1)).sum(), (np.logaddexp.reduce(log_y, (0, 1)) - math.log(6)).sum()
    for (kind, bound), value in values.items():
        kl = sum(separate if kind == "kt" else terms)
        assert value == pytest.approx((average if bound == "average" else mixture) - kl, rel=1e-10)


# --------------------------------------------------------------------------------------------------- annealing


@pytest.mark.parametrize("mixture_kl", ["mean", "sum", "kt"])
@pytest.mark.parametrize("prior", [PRIORS[0], PRIORS[4], PRIORS[6]], ids=name_of)
def test_annealing_scales_the_divergence_alone(mixture_kl: Any, prior: Any) -> None:
    """At fixed draws the objective is likelihood + log p(W) - beta KL, with both first terms as written by hand."""
    x, y = data()
    model, guide = rank1(prior, member_bias=mixture_kl != "kt")
    for beta in (0.0, 0.3, 1.0, 2.0):
        with ScaleLatents(beta):
            value, values = at_seed(MixtureELBO(mixture_kl), model, guide, x[:3], y[:3])
        p = parts(model, guide, values, x[:3], y[:3], prior=prior, mixture_kl=mixture_kl)
        assert value == pytest.approx(p.likelihood + p.log_weights - beta * p.kl, rel=1e-6)


@pytest.mark.parametrize("mixture_kl", ["mean", "sum", "kt"])
@pytest.mark.parametrize("prior", [PRIORS[0], PRIORS[4], PRIORS[6]], ids=name_of)
def test_annealing_by_a_tensor_is_that_by_its_number(mixture_kl: Any, prior: Any) -> None:
    """Proves it for one handler whose tensor is written into between losses, as compiled steps need it."""
    x, y = data()
    model, guide = rank1(prior, member_bias=mixture_kl != "kt")
    beta = torch.ones((), dtype=torch.float64)
    handler = ScaleLatents(beta)
    for number in (0.3, 1.0, 2.0):
        beta.fill_(number)
        with handler:
            value, _ = at_seed(MixtureELBO(mixture_kl), model, guide, x[:3], y[:3])
        with ScaleLatents(number):
            true, _ = at_seed(MixtureELBO(mixture_kl), model, guide, x[:3], y[:3])
        assert value == pytest.approx(true, rel=1e-12)


@pytest.mark.parametrize("kind", [AutoNormal, AutoLowRankMultivariateNormal])
def test_annealing_of_an_autoguide(kind: Any) -> None:
    """Guides with auxiliary sites too: with beta = 0 only the likelihood is left."""
    x, y = data()
    model = Dense(chain(2, 3, 1), Gaussian(), N)
    guide = kind(model)
    guide(x, y)
    with ScaleLatents(0.0):
        value, values = at_seed(MixtureELBO(), model, guide, x, y)
    replayed = poutine.trace(poutine.condition(model, {s.name: values[s.name] for s in model.sites()})).get_trace(x, y)
    replayed.compute_log_prob()
    assert value == pytest.approx(float(replayed.nodes["obs"]["log_prob_sum"].detach()), rel=1e-12)
    full, _ = at_seed(MixtureELBO(), model, guide, x, y)
    with ScaleLatents(0.5):
        half, _ = at_seed(MixtureELBO(), model, guide, x, y)
    assert half == pytest.approx((value + full) / 2, rel=1e-12)


# -------------------------------------------------------------------------------------------------- refusals


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ValueError, match="mixture_kl='max': expected 'mean', 'sum' or 'kt'"):
        MixtureELBO("max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="likelihood_bound='max': expected 'average' or 'mixture'"):
        MixtureELBO(likelihood_bound="max")  # type: ignore[arg-type]


def test_kt_is_refused_where_it_cannot_be_computed() -> None:
    """Points (whose distance is infinite), other families, and guides without members."""
    x, y = data()
    model, guide = rank1()
    with pytest.raises(ValueError, match=r"'0.bias' is a point in every member.*member_bias=False"):
        MixtureELBO("kt").loss(model, guide, x, y)

    loc, scale = random_members(2, 1, 0)
    prior = dist.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)
    with pytest.raises(ValueError, match="no closed form for the site 'z' \\(Laplace\\)"):
        MixtureELBO("kt").loss(*only_latent(dist.Laplace, loc, scale, prior))

    def plain() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="needs a guide with a members plate"):
        MixtureELBO("kt").loss(plain, plain)


@pytest.mark.parametrize("prior", PRIORS, ids=name_of)
def test_cauchy_factors_under_a_prior_with_light_tails_warn(prior: Any) -> None:
    """Their divergence is infinite: a Monte Carlo estimate of it would look finite."""
    model = Rank1(chain(2, 1), Gaussian(), N, prior=prior)
    if isinstance(prior, LIGHT):
        with pytest.warns(UserWarning, match="prior of '0.weight.s' has light tails: the KL divergence is infinite"):
            Rank1Guide(model, family="cauchy")
    else:
        Rank1Guide(model, family="cauchy")


def test_first_loss_of_a_default_network_in_single_precision() -> None:
    """The objective at step 0, as a user gets it: default prior, guide and precision, against float64 by hand."""
    x, y = data()
    model = Rank1(chain(2, 8, 1).float(), Gaussian(), 50)
    guide = Rank1Guide(model)
    value, values = at_seed(MixtureELBO(), model, guide, x.float(), y.float())
    expected = parts(model, guide, values, x.float(), y.float(), prior=HierarchicalCauchy())
    assert value == pytest.approx(expected.elbo, rel=2e-5)
    assert pb.models.Rank1Guide is Rank1Guide
