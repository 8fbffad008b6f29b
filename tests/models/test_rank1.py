"""Rank-1 networks: sizes, sites, options, a closed-form posterior, and every engine of Pyro."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import torchvision
from by_hand import chain
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoNormal
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn.inference import MixtureELBO, cosine, fit
from pyro_bnn.likelihoods import Categorical, Gaussian
from pyro_bnn.models import Dense, MeanFieldGuide, Rank1, Rank1Guide, architectures
from pyro_bnn.priors import Cauchy, HierarchicalCauchy, Horseshoe, Normal

N = 20


def data(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x = torch.randn(N, 2, generator=torch.Generator().manual_seed(3)).to(dtype)
    return x, torch.sin(x[:, 0])


def network(seed: int = 0) -> nn.Sequential:
    return chain(2, 4, 1, seed=seed).float()


def convolutional() -> nn.Sequential:
    features = nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*features, nn.Linear(6, 3))


def names(model: Any) -> list[str]:
    return [site.name for site in model.sites()]


# ------------------------------------------------------------------------------------- sizes and the paper


@pytest.mark.parametrize(
    ("make", "count"),
    [(architectures.wide_resnet_28_10, 156_648), (torchvision.models.resnet50, 417_112)],
    ids=["wide_resnet_28_10", "resnet50"],
)
def test_number_of_factor_parameters(make: Any, count: int) -> None:
    """Four components with a mean and a scale for every input and output of every layer, as in the published tables."""
    model = Rank1(make(), Categorical(), 50_000, prior=Normal(1.0, 0.1))
    guide = Rank1Guide(model, components=4)
    assert sum(p.numel() for p in [*guide.loc, *guide.rho]) == count
    assert count == 2 * 4 * sum(s.shape.numel() for s in model.sites() if s.role == "factor")
    assert len(guide.scale_loc) == 0, "this prior has no scales"
    assert [s.name for s in model.sites() if s.role == "bias"] == [
        n for n, p in model.core().net.named_parameters() if n in ("classifier.bias", "fc.bias")
    ]


#: rank-1 paper, tables 5 and 6, appendix B; learning rates and epochs of decay as they take effect
TABLE: dict[tuple[str, str], dict[str, Any]] = {
    ("cifar10", "normal"): {"scale": 0.1, "p": 1e-3, "spread": 0.5, "l2": 1e-4, "samples": 1},
    ("cifar10", "cauchy"): {"scale": 0.1, "p": 1e-6, "spread": 0.5, "l2": 1e-4, "samples": 4},
    ("cifar100", "normal"): {"scale": 0.1, "p": 1e-3, "spread": 1.0, "l2": 3e-4, "samples": 1},
    ("cifar100", "cauchy"): {"scale": 0.01, "p": 1e-6, "spread": 1.0, "l2": 3e-4, "samples": 4},
    ("imagenet", "normal"): {"scale": 0.05, "p": 1e-3, "spread": 0.75, "l2": 1e-4, "samples": 1},
    ("imagenet", "cauchy"): {"scale": 0.005, "p": 1e-6, "spread": 0.5, "l2": 1e-4, "samples": 4},
}
CIFAR = {"epochs": 250, "batch_size": 128, "optim": "sgd", "lr": 0.1, "kl_annealing": 200}
IMAGENET = {"epochs": 135, "batch_size": 1024, "optim": "sgd", "lr": 0.4, "kl_annealing": 90}


@pytest.mark.parametrize(("task", "family"), TABLE, ids=str)
def test_paper_settings(task: Any, family: Any) -> None:
    s, t = Rank1.paper_settings(task, family=family), TABLE[task, family]
    assert s["model"]["prior"] == (Normal if family == "normal" else Cauchy)(1.0, t["scale"])
    assert s["model"]["weight_prior"] is None and s["model"]["clip"] == 10.0
    assert s["guide"] == {
        **{"components": 4, "family": family},
        **{"init_dropout_rate": t["p"], "init_means": Normal(1.0, t["spread"])},
    }
    expected = IMAGENET if task == "imagenet" else CIFAR
    assert {k: v for k, v in s["fit"].items() if k in expected} == expected
    assert s["fit"]["weight_decay"] == pytest.approx(2 * t["l2"])  # torch halves what TensorFlow calls l2
    assert s["predict"] == {"num_samples": t["samples"]}
    assert s["elbo"] == {"mixture_kl": "sum", "likelihood_bound": "average"}
    if task == "imagenet":
        assert s["schedule"] == {"warmup": 5, "milestones": (45, 90, 120), "ratio": 0.1}
        assert s["network"] == {"name": "resnet50", "num_classes": 1000}
    else:
        assert s["schedule"] == {"warmup": 1, "milestones": (100, 200, 225), "ratio": 0.2}
        assert s["network"] == {"name": "wide_resnet_28_10", "num_classes": {"cifar10": 10, "cifar100": 100}[task]}


def test_paper_settings_train() -> None:
    """They are keyword arguments as they stand: a small network runs with them, whose biases have a flat prior."""
    s = Rank1.paper_settings("cifar10")
    x, y = data()
    model = Rank1(chain(2, 4, 3).float(), Categorical(), N, **s["model"])
    options = {**s["fit"], "epochs": 2, "batch_size": 8}
    schedule = pb.inference.multistep(**s["schedule"])
    elbo = MixtureELBO(**s["elbo"])
    labels = (y > 0).long()
    posterior = fit(
        model, Rank1Guide(model, **s["guide"]), (x, labels), **options, schedule=schedule, elbo=elbo, progress=False
    )
    assert len(posterior.losses) == 6 and np.isfinite(posterior.losses).all()
    assert posterior.predict(x, **s["predict"]).per_member.shape == (1, 4, N, 3)
    with pytest.raises(ValueError, match=r"paper_settings\('mnist', family='normal'\): expected cifar10, cifar100"):
        Rank1.paper_settings("mnist")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="family='student'"):
        Rank1.paper_settings("cifar10", family="student")  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------- the sites


def test_sites_of_the_default_model() -> None:
    """Weight name + .s, .r, one _tau a layer, a bias for each member, the noise; in this order."""
    model = Rank1(network(), Gaussian(), N)
    expected = ["0.weight_tau", "2.weight_tau", "0.bias", "2.bias", "noise"]
    expected += ["0.weight.s", "0.weight.r", "2.weight.s", "2.weight.r"]
    assert names(model) == expected
    shapes = {s.name: tuple(s.shape) for s in model.sites()}
    assert shapes["0.weight.s"] == (2,) and shapes["0.weight.r"] == (4,) and shapes["0.bias"] == (4,)
    assert shapes["0.weight_tau"] == () == shapes["noise"]
    trace = poutine.trace(model).get_trace(*data())
    plates = ["members", "rows", "data"]
    sampled = [n for n, s in trace.nodes.items() if s["type"] == "sample"]
    assert sampled == ["weight_prior", plates[0], *expected[:5], plates[1], *expected[5:], plates[2], "obs"]
    assert trace.nodes["0.weight.s"]["value"].shape == (1, 1, 2) and trace.nodes["obs"]["value"].shape == (N,)
    no_prefix = not any(a != b and b.startswith(f"{a}.") for a in sampled for b in sampled)
    assert no_prefix, "a site whose name is a dotted prefix of another breaks AutoGuides"


def test_sites_of_a_horseshoe() -> None:
    model = Rank1(nn.Linear(3, 2), None, prior=Horseshoe(), member_bias=False)
    assert names(model) == ["weight_tau", "weight.s_lambda", "weight.r_lambda", "weight.s", "weight.r"]
    trace = poutine.trace(model).get_trace(torch.zeros(5, 3))
    value = {n: s["value"] for n, s in trace.nodes.items() if s["type"] == "sample"}
    scale = value["weight_tau"][..., None] * value["weight.s_lambda"]
    torch.testing.assert_close(trace.nodes["weight.s"]["fn"].base_dist.scale, scale)


@pytest.mark.parametrize("members_dim", [-2, -3])
def test_prefix_is_before_every_name(members_dim: int) -> None:
    model = Rank1(network(), Gaussian(), N, prefix="one", members_dim=members_dim)
    guide = Rank1Guide(model, 3)
    for program in (model, guide, guide.eval()):
        trace = poutine.trace(program).get_trace(*data())
        assert all(n.startswith("one.") for n, s in trace.nodes.items() if s["type"] == "sample")
        assert all(n.startswith(("one.", "one_guide.")) for n, s in trace.nodes.items() if s["type"] == "param")
    shape = poutine.trace(guide.train()).get_trace(*data()).nodes["one.0.weight.r"]["value"].shape
    assert shape == (3, *[1] * (-members_dim - 2), N, 4)


def test_grouped_convolutions_and_normalisation() -> None:
    """s has an entry for every channel of the layer; normalisation has no factors; its bias is no member's own."""
    model = Rank1(convolutional(), Categorical(), N)
    assert model.weights == ["0.weight", "5.weight"] and model.biases == ["0.bias", "5.bias"]
    assert {s.name: s.shape[0] for s in model.sites() if s.role == "factor"} == {
        **{"0.weight.s": 4, "0.weight.r": 6},
        **{"5.weight.s": 6, "5.weight.r": 3},
    }
    assert model(torch.zeros(5, 4, 8, 8)).shape == (1, 5)


def test_member_bias() -> None:
    """On: a point in every component, starting at the network's own. Off: the network's, one for all."""
    net = network()
    own, shared = Rank1(net, Gaussian(), N), Rank1(net, Gaussian(), N, member_bias=False)
    guide = Rank1Guide(own, 3)
    start = torch.cat([net[0].bias, net[2].bias]).detach()
    assert torch.equal(guide.point[0].detach(), start.expand(3, -1))
    assert names(shared) == [n for n in names(own) if not n.endswith("bias")]
    assert len(Rank1Guide(shared).point) == 0
    x, y = data()
    for model in (own, shared):
        MixtureELBO().differentiable_loss(model, Rank1Guide(model), x, y).backward()
    assert shared.core().net[0].bias.grad is not None and own.core().net[0].bias.grad is None
    prior = poutine.trace(own).get_trace(x).nodes["0.bias"]["fn"]
    assert prior.base_dist.scale.unique() == 1.0 and prior.base_dist.loc.unique() == 0.0  # weight_prior


def test_weight_prior_is_one_factor() -> None:
    x, y = data()
    net = network()
    for prior in (Normal(0.0, 0.3), Cauchy(0.1, 2.0)):
        trace = poutine.trace(Rank1(net, Gaussian(), N, weight_prior=prior)).get_trace(x, y)
        density = (dist.Normal if isinstance(prior, Normal) else dist.Cauchy)(prior.loc, prior.scale)
        expected = sum(float(density.log_prob(net[i].weight.detach()).sum()) for i in (0, 2))
        assert float(trace.nodes["weight_prior"]["fn"].log_prob(torch.zeros(0)).detach()) == pytest.approx(
            expected, 1e-5
        )
    flat = poutine.trace(poutine.condition(Rank1(net, Gaussian(), N, weight_prior=None), {"0.bias": net[0].bias}))
    assert Rank1(net, None, weight_prior=None).log_prior() is None
    with pytest.raises(NotImplementedError, match="ImproperUniform"):
        flat.get_trace(x)  # a flat prior has no draws


def test_clipping_is_where_factors_are_used() -> None:
    """The function sees clipped factors; the site, and with it the divergence, does not."""
    net = network()
    free, clipped = (Rank1(net, None, clip=c, member_bias=False) for c in (None, 1.5))
    x, _ = data()
    draw = {s.name: 3 * torch.randn(1, 1, *s.shape) for s in free.sites() if s.role == "factor"}
    latents = {**{s.name: torch.ones(1, 1) for s in free.sites() if s.role == "scale"}, **draw}
    inside = {n: v.clamp(-1.5, 1.5) if n in draw else v for n, v in latents.items()}
    assert torch.equal(clipped.function(x, latents, N), free.function(x, inside, N))
    assert not torch.allclose(free.function(x, latents, N), free.function(x, inside, N))
    values = poutine.trace(poutine.condition(clipped, latents)).get_trace(x).nodes
    assert all(torch.equal(values[n]["value"], latents[n]) for n in draw)


@pytest.mark.parametrize(
    ("select", "weights"),
    [
        (None, ["0.weight", "2.weight"]),
        (r"0\..*", ["0.weight"]),
        ("0", ["0.weight"]),
        (nn.Linear, ["0.weight", "2.weight"]),
        (lambda name, p: p.shape[0] == 1, ["2.weight"]),
        ([r"2\.weight", r"0\.weight"], ["0.weight", "2.weight"]),
    ],
    ids=["all", "pattern", "module", "type", "function", "several"],
)
def test_select(select: Any, weights: list[str]) -> None:
    model = Rank1(network(), Gaussian(), N, select=select)
    assert model.weights == weights
    assert [n for n in names(model) if n.endswith((".s", ".r"))] == [f"{w}.{f}" for w in weights for f in "sr"]
    assert model.biases == [w.replace("weight", "bias") for w in weights]
    x, y = data()
    assert np.isfinite(MixtureELBO().loss(model, Rank1Guide(model), x, y))


# ------------------------------------------------------------------------------------------------- the guide


def test_starting_values() -> None:
    """Means from N(1, 0.5) and a scale of sqrt(p / (1 - p)), unless asked otherwise; scales in the prior's bulk."""
    model = Rank1(nn.Linear(300, 200), Gaussian(), N, prior=HierarchicalCauchy(0.2))
    torch.manual_seed(0)
    guide = Rank1Guide(model)
    loc = guide.loc[0].detach()
    assert loc.shape == (4, 500)
    assert abs(float(loc.mean()) - 1) < 4 * 0.5 / math.sqrt(2000)
    assert abs(float(loc.std()) - 0.5) < 4 * 0.5 / math.sqrt(2 * 2000)
    scale = torch.nn.functional.softplus(guide.rho[0].detach()) + 1e-7
    torch.testing.assert_close(scale, torch.full_like(scale, math.sqrt(1e-3 / (1 - 1e-3))), rtol=1e-5, atol=0)
    torch.testing.assert_close(guide.scale_loc[0].detach()[:, 0].exp(), torch.full((4,), 0.2))


@pytest.mark.parametrize(
    ("means", "check"),
    [
        (Normal(None, 0.1), lambda loc: abs(loc.mean() - 1) < 4 * 0.1 / 20 and abs(loc.std() - 0.1) < 0.02),
        (dist.Normal(-1.0, 0.1), lambda loc: abs(loc.mean() + 1) < 4 * 0.1 / 20),
        (dist.LogNormal(0.0, 0.5), lambda loc: bool((loc > 0).all())),
        (lambda shape: torch.randn(shape).sign(), lambda loc: set(loc.unique().tolist()) == {-1.0, 1.0}),
    ],
    ids=["prior", "distribution", "lognormal", "function"],
)
def test_other_starting_means(means: Any, check: Any) -> None:
    torch.manual_seed(0)
    guide = Rank1Guide(Rank1(nn.Linear(60, 40), None), 4, init_means=means, init_dropout_rate=0.2)
    assert check(guide.loc[0].detach())
    assert float(torch.nn.functional.softplus(guide.rho[0][0, 0].detach())) == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("family", ["normal", "cauchy"])
@pytest.mark.parametrize("components", [1, 2, 4])
@pytest.mark.parametrize(
    ("means", "share"),
    [
        (Normal(1.0, 0.7), lambda loc: torch.special.ndtr((loc - 1) / 0.7)),
        (Normal(None, 1.0), lambda loc: torch.special.ndtr(loc - 1)),
        (pb.priors.Cauchy(0.0, 0.5), lambda loc: 0.5 + torch.atan(loc / 0.5) / math.pi),
        (dist.Uniform(0.5, 1.5), lambda loc: loc - 0.5),
    ],
    ids=["normal", "default location", "cauchy", "uniform"],
)
def test_stratified_starting_means(means: Any, share: Any, components: int, family: Any) -> None:
    """One component in each of K equally likely strata, of which each has every one about equally often, and no other
    place in its stratum is likelier than the rest."""
    torch.manual_seed(0)
    model = Rank1(nn.Linear(700, 500).double(), None)
    guide = Rank1Guide(model, components, family, init_means=means, init_stratified=True)
    place = share(guide.loc[0].detach()) * components
    factors = place.shape[1]
    stratum = place.floor()
    assert torch.equal(stratum.sort(0).values, torch.arange(components).double()[:, None].expand(place.shape))
    for own in stratum:
        counts = torch.bincount(own.long(), minlength=components) / factors
        assert ((counts - 1 / components).abs() <= 4 * math.sqrt((1 - 1 / components) / components / factors)).all()
    within = (place - stratum).flatten()
    assert abs(float(within.mean()) - 1 / 2) < 4 / math.sqrt(12 * len(within))
    assert abs(float(within.square().mean()) - 1 / 3) < 4 * math.sqrt(4 / 45 / len(within))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_stratified_starting_means_are_finite(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a random number is 0, whose quantile is minus infinity, or rounds to 1; in half precision too."""
    model = Rank1(nn.Linear(30, 20).to(dtype), None)
    for value in (0.0, 1 - 2**-24):
        with monkeypatch.context() as patched:
            patched.setattr(torch, "rand", lambda shape, value=value, **o: torch.full(shape, value, **o))
            guide = Rank1Guide(model, 4, init_means=Normal(1.0, 1.0), init_stratified=True)
        assert guide.loc[0].dtype == dtype and guide.loc[0].isfinite().all()


@pytest.mark.parametrize(
    ("means", "message"),
    [
        (torch.ones, "init_stratified=True, but init_means is a function"),
        (dist.VonMises(0.0, 1.0), "init_means is VonMises.*, whose quantiles are not known"),
        (pb.priors.GaussianMixture([0.0, 1.0], [1.0, 1.0], [0.5, 0.5]), "whose quantiles are not known.*Normal"),
    ],
)
def test_strata_need_quantiles(means: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rank1Guide(Rank1(network(), Gaussian(), N), 3, init_means=means, init_stratified=True)


@pytest.mark.parametrize("stratified", [False, True])
def test_starting_means_that_half_precision_cannot_hold(stratified: bool) -> None:
    """A Cauchy distribution of which most draws are beyond 65,504; float32 holds them."""
    wide = pb.priors.Cauchy(0.0, 1e5)
    assert Rank1Guide(Rank1(network(), None), 3, init_means=wide, init_stratified=stratified).loc[0].isfinite().all()
    with pytest.raises(ValueError, match="init_means gave values that are not finite in torch.float16"):
        Rank1Guide(Rank1(network().half(), None), 3, init_means=wide, init_stratified=stratified)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (lambda shape: torch.full(shape, math.nan), ValueError, "not finite in torch.float32: expected finite means"),
        (lambda shape: torch.full(shape, -math.inf), ValueError, "not finite"),
        (lambda shape: torch.full(shape, 1e300, dtype=torch.float64), ValueError, "not finite in torch.float32"),
        (lambda shape: torch.ones(7), ValueError, r"a tensor of the shape \[7\] where \[3, \d+\] was asked for"),
        (lambda shape: torch.ones(2, *shape), ValueError, r"shape \[2, 3, \d+\] where \[3, \d+\]"),
        (lambda shape: torch.ones(shape, dtype=torch.complex64), TypeError, "init_means gave torch.complex64"),
        (lambda shape: None, TypeError, "init_means gave NoneType: expected a tensor of real numbers"),
        (dist.Normal(torch.zeros(7), 1.0), ValueError, r"Normal.* of the shape \[7\], where \[3, \d+\] was asked for"),
        (dist.MultivariateNormal(torch.zeros(2), torch.eye(2)), ValueError, r"shape \[3, \d+, 2\] where \[3, \d+\]"),
        ("signs", TypeError, "init_means='signs': expected a function"),
    ],
)
def test_values_that_are_no_starting_means(values: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        Rank1Guide(Rank1(network(), None), 3, init_means=values)


def test_starting_means_of_one_number_for_each_component() -> None:
    """Proves that values broadcast, and that whole numbers of another type will do."""
    guide = Rank1Guide(Rank1(network(), None), 3, init_means=lambda shape: torch.arange(shape[0])[:, None])
    assert all(torch.equal(loc, torch.arange(3.0)[:, None].expand(loc.shape)) for loc in guide.loc)


@pytest.mark.parametrize("draws", ["row", "member"])
def test_training_draws(draws: Any) -> None:
    """All members, and a draw for every row of the batch or one for all; scales never differ within a member."""
    model = Rank1(network(), Gaussian(), N)
    guide = Rank1Guide(model, 3, draws=draws)
    x, y = data()
    values = guide(x[:7], y[:7])
    rows = 7 if draws == "row" else 1
    assert values["0.weight.s"].shape == (3, rows, 2) and values["0.weight_tau"].shape == (3, 1)
    assert values["0.bias"].shape == (3, 1, 4) and values["noise"].shape == (3, 1)
    assert len(values["0.weight.s"].flatten(0, 1).unique(dim=0)) == 3 * rows
    replayed = poutine.trace(poutine.replay(model, trace=poutine.trace(guide).get_trace(x[:7], y[:7])))
    trace = replayed.get_trace(x[:7], y[:7])
    assert trace.nodes["obs"]["fn"].batch_shape == (3, 7)


def test_evaluation_draws_are_of_a_random_component() -> None:
    """One draw, the same for all rows, of every component about equally often."""
    model = Rank1(network(), Gaussian(), N)
    guide = Rank1Guide(
        model, 3, init_dropout_rate=1e-6, init_means=lambda shape: torch.arange(3.0)[:, None].expand(shape)
    )
    guide.eval()
    torch.manual_seed(0)
    x, _ = data()
    found = [round(float(v["0.weight.s"].detach().mean())) for v in (guide(x) for _ in range(300))]
    assert guide(x)["0.weight.s"].shape == (1, 1, 2)
    for component in range(3):
        assert abs(found.count(component) / 300 - 1 / 3) < 4 * math.sqrt(2 / 9 / 300)


def test_one_index_for_the_whole_network() -> None:
    """Factors of all layers, biases and scales of a draw belong to the same component."""
    model = Rank1(network(), Gaussian(), N)
    guide = Rank1Guide(
        model, 4, init_dropout_rate=1e-6, init_means=lambda shape: torch.arange(4.0)[:, None].expand(shape)
    )
    with torch.no_grad():
        guide.point[0].copy_(torch.arange(4.0)[:, None].expand_as(guide.point[0]))
        guide.scale_loc[0].copy_(torch.arange(4.0)[:, None].expand_as(guide.scale_loc[0]))
        guide.scale_rho[0].fill_(-15.0)
    guide.eval()
    for _ in range(20):
        values = {n: v.detach() for n, v in guide(data()[0]).items()}
        components = {
            round(float(v.log().mean() if "tau" in n or n == "noise" else v.mean())) for n, v in values.items()
        }
        assert len(components) == 1


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda m: Rank1Guide(m, 0), ValueError, "components=0: expected a whole number, at least 1"),
        (lambda m: Rank1Guide(m, 2.0), ValueError, "components=2.0"),
        (lambda m: Rank1Guide(m, family="laplace"), ValueError, "family='laplace': expected 'normal' or 'cauchy'"),
        (lambda m: Rank1Guide(m, draws="batch"), ValueError, "draws='batch': expected 'row' or 'member'"),
        (
            lambda m: Rank1Guide(m, init_dropout_rate=0.0),
            ValueError,
            r"init_dropout_rate=0.0: expected a number in \(0, 1\)",
        ),
        (lambda m: Rank1Guide(m, init_dropout_rate=1.0), ValueError, "init_dropout_rate=1.0"),
        (lambda m: Rank1Guide(network()), TypeError, "Rank1Guide takes a pyro_bnn.models.Rank1, got Sequential"),
        (lambda m: MeanFieldGuide(network()), TypeError, "MeanFieldGuide takes one of pyro_bnn.models, got Sequential"),
        (lambda m: Rank1Guide(Dense(network(), None)), TypeError, "takes a pyro_bnn.models.Rank1, got Dense"),
    ],
)
def test_bad_guides(make: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        make(Rank1(network(), Gaussian(), N))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Rank1(network(), Gaussian(), 0), ValueError, "num_data=0: expected a whole number"),
        (lambda: Rank1(network(), Gaussian(), -5), ValueError, "num_data=-5"),
        (lambda: Rank1(network(), Gaussian()), TypeError, "num_data=None"),
        (lambda: Rank1(network(), Gaussian(), 2.5), ValueError, "num_data=2.5"),
        (lambda: Rank1(network(), "gaussian", N), TypeError, "likelihood must be one of pyro_bnn.likelihoods"),
        (lambda: Rank1(lambda x: x, Gaussian(), N), TypeError, "net must be a torch.nn.Module, got function"),
        (lambda: Rank1(network(), Gaussian(), N, members_dim=-1), ValueError, "members_dim=-1: axis -1 belongs"),
        (lambda: Rank1(network(), Gaussian(), N, select="fc"), ValueError, "select='fc' matches none of the weights"),
        (lambda: Rank1(network(), Gaussian(), N, select=nn.Conv2d), ValueError, "matches none"),
        (lambda: Rank1(network(), Gaussian(), N, select=3), TypeError, "select takes a name, a pattern, a"),
        (lambda: Rank1(nn.ReLU(), Gaussian(), N), ValueError, "the network has no weights that can have factors"),
        (lambda: Rank1(nn.LayerNorm(3), Gaussian(), N), ValueError, "the network has no weights that can have factors"),
        (lambda: Rank1(network(), Gaussian(), N, clip=0.0), ValueError, "clip=0.0: expected a positive number"),
        (
            lambda: Rank1(network(), Gaussian(), N, weight_prior=HierarchicalCauchy()),
            TypeError,
            "weight_prior=HierarchicalCauchy.*expected a prior of pyro_bnn.priors without latent scales",
        ),
        (lambda: Rank1(network(), Gaussian(), N, weight_prior=dist.Normal(0.0, 1.0)), TypeError, "weight_prior=Normal"),
        (
            lambda: Rank1(network(), Gaussian(), N, prior=dist.Normal(torch.zeros(3), 1.0)),
            ValueError,
            r"the prior of '0.weight.s' has shape \(3,\), the site has \(2,\)",
        ),
        (lambda: Rank1(network(), None).members_plate(), RuntimeError, r"members_plate\(\) belongs to a call"),
    ],
)  # fmt: skip
def test_bad_models(make: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_batch_larger_than_the_data() -> None:
    model = Rank1(network(), Gaussian(), 5)
    with pytest.raises(ValueError, match="the batch has 20 samples, but num_data=5: num_data is the size of the whole"):
        model(*data())
    assert model(data()[0]).shape == (1, N), "prediction on more samples than were trained on is fine"


# ------------------------------------------------------------------------------- a posterior in closed form


class LinearRegression:
    """y ~ N((x o w) s, sigma^2) with s ~ N(1, 0.4^2): a layer without bias whose W and r are fixed."""

    noise, scale = 0.5, 0.4

    def __init__(self, num_data: int = 30) -> None:
        generator = torch.Generator().manual_seed(0)
        mix = torch.tensor([[1.0, 0.6, 0.0], [0.0, 1.0, -0.5], [0.0, 0.0, 1.0]], dtype=torch.float64)
        self.x = torch.randn(num_data, 3, generator=generator, dtype=torch.float64) @ mix
        net = nn.Linear(3, 1, bias=False, dtype=torch.float64)
        with torch.no_grad():
            net.weight.copy_(torch.tensor([[1.5, -0.8, 0.4]]))
        features = self.x * net.weight.detach()
        error = self.noise * torch.randn(num_data, generator=generator, dtype=torch.float64)
        self.y = features @ torch.tensor([1.3, 0.4, 1.1], dtype=torch.float64) + error
        precision = features.T @ features / self.noise**2 + torch.eye(3) / self.scale**2
        self.mean = torch.linalg.solve(precision, features.T @ self.y / self.noise**2 + 1 / self.scale**2)
        self.covariance = torch.linalg.inv(precision)
        self.mean_field = 1 / precision.diagonal()
        self.network = Rank1(net, Gaussian(self.noise), num_data, prior=Normal(1.0, self.scale), weight_prior=None)
        self.network.core().net.weight.requires_grad_(False)
        self.model = poutine.condition(self.network, {"weight.r": torch.ones(1, dtype=torch.float64)})

    def guide(self, **options: Any) -> tuple[Rank1Guide, Any]:
        torch.manual_seed(1)
        guide = Rank1Guide(self.network, init_dropout_rate=4e-3, **options)
        return guide, poutine.block(guide, hide=["weight.r"])


def adam(lr: float) -> Any:
    return lambda groups: torch.optim.Adam(groups, lr=lr, betas=(0.9, 0.99))


@pytest.mark.parametrize(("draws", "components"), [("row", 1), ("member", 2)])
def test_linear_regression_through_s(draws: Any, components: int) -> None:
    """SVI finds the mean within 2 % of a posterior standard deviation, and the mean-field variance within 2 %."""
    problem = LinearRegression()
    guide, alone = problem.guide(components=components, draws=draws)
    particles = {"num_particles": 1000 if draws == "row" else 1500, "vectorize_particles": True, "max_plate_nesting": 2}
    options = {"optim": adam(0.03), "schedule": cosine(), "seed": 0, "progress": False}
    fit(problem.model, alone, (problem.x, problem.y), epochs=400, elbo=MixtureELBO(**particles), **options)
    loc = guide.loc[0].detach()[:, :3]
    variance = torch.nn.functional.softplus(guide.rho[0].detach()[:, :3]).square()
    assert ((loc - problem.mean).abs() < 0.02 * problem.covariance.diagonal().sqrt()).all()
    assert ((variance / problem.mean_field - 1).abs() < 0.02).all()


@pytest.mark.slow
def test_linear_regression_through_s_by_nuts() -> None:
    """The same program under NUTS: mean and covariance within 4 Monte Carlo standard errors of the closed form."""
    problem = LinearRegression()
    problem.network.eval()
    pyro.set_rng_seed(0)
    mcmc = MCMC(NUTS(problem.model), num_samples=600, warmup_steps=200, disable_progbar=True)
    mcmc.run(problem.x, problem.y)
    draws = mcmc.get_samples()["weight.s"].reshape(-1, 3)
    effective = mcmc.diagnostics()["weight.s"]["n_eff"].flatten().min().clamp(max=600)
    sd = problem.covariance.diagonal().sqrt()
    assert ((draws.mean(0) - problem.mean).abs() < 4 * sd / effective.sqrt()).all()
    correlation = torch.corrcoef(draws.T)
    exact = problem.covariance / sd[:, None] / sd
    assert ((draws.std(0) / sd - 1).abs() < 4 / (2 * effective).sqrt()).all()
    assert ((correlation - exact).abs() < 4 * (1 - exact**2 + 1e-9) / effective.sqrt()).all()


# --------------------------------------------------------------------------------------- under every engine


@pytest.fixture
def model() -> Rank1:
    return Rank1(network(), Gaussian(), N)


def svi(model: Any, guide: Any, steps: int = 60) -> list[float]:
    x, y = data()
    with pyro.get_param_store().scope(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), TraceMeanField_ELBO())
        losses = [engine.step(x, y) for _ in range(steps)]
        assert np.isfinite(engine.step(x[:7], y[:7])), "a batch of another size"
        return losses


@pytest.mark.parametrize("kind", [Rank1Guide, AutoNormal, AutoLowRankMultivariateNormal])
def test_users_own_svi(model: Rank1, kind: Any) -> None:
    pyro.set_rng_seed(0)
    losses = svi(model, kind(model))
    assert np.mean(losses[-10:]) < np.mean(losses[:10])


@pytest.mark.parametrize("kind", [Rank1Guide, AutoNormal, AutoLowRankMultivariateNormal])
def test_fit_with_any_guide(model: Rank1, kind: Any) -> None:
    x, y = data()
    pyro.set_rng_seed(0)
    posterior = fit(model, kind(model), (x, y), epochs=30, lr=0.02, batch_size=8, progress=False, seed=0)
    assert np.mean(posterior.losses[-9:]) < np.mean(posterior.losses[:9])
    draws = posterior.draws(5, seed=1)
    assert {n: tuple(v.shape) for n, v in draws.items()} == {
        s.name: (5, posterior.num_members, *s.shape) for s in model.sites()
    }
    assert posterior.predict(x[:3], 5, seed=1).per_member.shape == (5, posterior.num_members, 3)


def test_nuts_on_a_small_network(model: Rank1) -> None:
    x, y = data()
    pyro.set_rng_seed(0)
    model.eval()
    mcmc = MCMC(NUTS(model, max_tree_depth=4), num_samples=12, warmup_steps=8, disable_progbar=True)
    mcmc.run(x, y)
    posterior = pb.Posterior.from_mcmc(mcmc, model)
    assert posterior.predict(x, 12).per_member.shape == (12, 1, N)
    assert all(len(v.flatten(1).unique(dim=0)) > 1 for v in mcmc.get_samples().values()), "every site moves"
    with pytest.raises(NotImplementedError, match="subsample"):
        MCMC(NUTS(model), num_samples=1, warmup_steps=1, disable_progbar=True).run(x[:7], y[:7])


@pytest.mark.parametrize("parallel", [False, True], ids=["sequential", "parallel"])
@pytest.mark.parametrize("kind", [Rank1Guide, AutoNormal])
def test_predictive(model: Rank1, kind: Any, parallel: bool) -> None:
    """Draws of the guide, of the prior, and given draws; more rows than the data set has."""
    x = torch.randn(N + 5, 2)
    guide = kind(model)
    guide(*data())
    guide.eval()
    for options in ({"guide": guide}, {}):
        result = Predictive(model, num_samples=6, parallel=parallel, **options)(x)
        assert result["obs"].reshape(6, -1).shape == (6, N + 5)
        assert len(result["obs"].reshape(6, -1).unique(dim=0)) == 6
    posterior = pb.Posterior(model, guide) if kind is Rank1Guide else pb.Posterior(model, guide, example=x)
    draws = {
        n: v.reshape(6, *[1] * 2, *v.shape[2:]) for n, v in posterior.as_draws(6).draws(6).items() if v.shape[1] == 1
    }
    if draws:
        given = Predictive(model, draws, parallel=parallel)(x)
        assert given["obs"].reshape(6, -1).shape == (6, N + 5)


def test_predictive_agrees_with_the_posterior(model: Rank1) -> None:
    """The mean of y over many draws of Predictive is that of predict(), within 4 standard errors."""
    x, _ = data()
    torch.manual_seed(0)
    guide = Rank1Guide(model, 3, init_dropout_rate=0.05)
    with torch.no_grad():
        guide.scale_loc[0][:, -1] = -3.0  # little noise
    posterior = pb.Posterior(model.eval(), guide.eval())
    ours = posterior.predict(x, 500, seed=0).per_member.flatten(0, 1)
    theirs = Predictive(model, guide=posterior.guide, num_samples=1000, parallel=True)(x)["obs"].reshape(1000, N)
    error = (ours.var(0) / 500 + theirs.var(0) / 1000).sqrt()  # components are strata: at least this accurate
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 4 * error).all()


def test_condition_and_trace(model: Rank1) -> None:
    """Sites that are given are observed at their value, with the axes of members and rows that they have."""
    x, y = data()
    guide = Rank1Guide(model, 3)
    drawn = poutine.trace(guide).get_trace(x, y)  # with the indices of its plates, which make room for the members
    trace = poutine.trace(poutine.condition(model, drawn)).get_trace(x)
    trace.compute_log_prob()
    assert trace.nodes["obs"]["value"].shape == (3, N)
    for site in model.sites():
        node = trace.nodes[site.name]
        assert node["is_observed"] and torch.equal(node["value"], drawn.nodes[site.name]["value"])
    one = {"0.weight.s": torch.tensor([2.0, -1.0])}
    given = poutine.trace(poutine.condition(model, one)).get_trace(x, y)
    assert torch.equal(given.nodes["0.weight.s"]["value"], one["0.weight.s"])
    assert torch.isfinite(given.log_prob_sum())


# ------------------------------------------------------------------------------------- copies of the objects


def copies(thing: Any) -> list[Any]:
    return [pickle.loads(pickle.dumps(thing)), copy.deepcopy(thing)]


def density(model: Any, guide: Any) -> float:
    x, y = data()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MixtureELBO().loss(model, guide, x, y)


@pytest.mark.parametrize("prior", [HierarchicalCauchy(), dist.Laplace(1.0, 0.3)], ids=["class", "distribution"])
def test_copies_before_and_after_training(prior: Any) -> None:
    """pickle and deepcopy of model and guide give the same objective, and leave the originals trainable."""
    x, y = data()
    model = Rank1(network(), Gaussian(), N, prior=prior)
    guide = Rank1Guide(model, 2)

    def check() -> None:
        for other, its_guide in zip(copies(model), copies(guide), strict=True):
            expected = density(model, guide)
            assert density(other, its_guide) == expected
            assert np.isfinite(fit(other, its_guide, (x, y), epochs=1, progress=False).losses).all()
            assert density(other, its_guide) != expected
            assert density(model, guide) == expected, "training a copy leaves the original alone"

    check()
    with pyro.get_param_store().scope():
        engine = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), TraceMeanField_ELBO())
        for _ in range(2):
            engine.step(x, y)
            for thing in (model, guide):
                copies(thing)
        start = guide.loc[0].detach().clone()
        engine.step(x, y)
        assert not torch.equal(start, guide.loc[0]), "pickling in the middle of a run does not stop it"
    check()
    posterior = fit(model, guide, (x, y), epochs=1, progress=False)
    check()
    again = pickle.loads(pickle.dumps(posterior))
    assert torch.equal(again.predict(x, 3, seed=0).per_member, posterior.predict(x, 3, seed=0).per_member)


def test_models_inside_a_module_with_pyros_own_parameters() -> None:
    """deepcopy of an outer module copies ours with it."""

    class Outer(pyro.nn.PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.bnn = Rank1(network(), Gaussian(), N)

        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            return self.bnn(x, y)

    outer = Outer()
    guide = Rank1Guide(outer.bnn)
    losses = svi(outer, guide, 20)
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert density(copy.deepcopy(outer), guide) == density(outer, guide)
