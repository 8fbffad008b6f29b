"""Priors against SciPy, and every way in which one can be given."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from numpy.typing import NDArray
from pyro import poutine
from scipy import integrate, stats
from torch import Tensor, nn

from pyro_bnn.likelihoods import Gaussian
from pyro_bnn.models import Dense, Rank1
from pyro_bnn.priors import (
    Cauchy,
    HierarchicalCauchy,
    HierarchicalNormal,
    Horseshoe,
    Laplace,
    Normal,
    Prior,
    StudentT,
    describe,
    from_description,
    resolve,
)
from pyro_bnn.program.sites import site_distribution

ALL = [
    Normal(0.3, 0.7),
    Cauchy(1.2, 0.1),
    Laplace(-0.2, 2.0),
    StudentT(3.5, 0.4, 0.6),
    HierarchicalCauchy(0.2, 0.9),
    HierarchicalNormal(2.5, 0.3, 1.1),
    Horseshoe(0.4, -0.3),
]
POINTS = np.array([-3.0, -0.4, 0.1, 1.0, 2.7])


def name_of(value: Any) -> str:
    return type(value).__name__


def vector(n: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.zeros(n, dtype=dtype)


def scaled(prior: Prior, like: Tensor, by: float) -> dist.TorchDistribution:
    """The distribution of a site when its scales are 1 except that their product is ``by``."""
    tau = like.new_tensor(by) if prior.has_tau else None
    local = like.new_ones(like.shape) if prior.has_lambda else None
    return site_distribution(prior, 0.0, like, tau, local)


# -------------------------------------------------------------------------------------------------- densities


@pytest.mark.parametrize(
    ("prior", "expected"),
    [
        (Normal(0.3, 0.7), stats.norm(0.3, 0.7)),
        (Cauchy(1.2, 0.1), stats.cauchy(1.2, 0.1)),
        (Laplace(-0.2, 2.0), stats.laplace(-0.2, 2.0)),
        (StudentT(3.5, 0.4, 0.6), stats.t(3.5, 0.4, 0.6)),
        (HierarchicalCauchy(0.2, 0.9), stats.cauchy(0.9, 0.25)),
        (HierarchicalNormal(2.5, 0.3, 1.1), stats.norm(1.1, 0.25)),
        (Horseshoe(0.4, -0.3), stats.norm(-0.3, 0.25)),
    ],
    ids=name_of,
)
def test_density_of_a_site(prior: Prior, expected: Any) -> None:
    """Given scales whose product is 0.25, the site is a vector of independent elements with SciPy's density."""
    d = scaled(prior, vector(), 0.25)
    assert d.event_shape == (5,) and d.batch_shape == ()
    assert float(d.log_prob(torch.tensor(POINTS))) == pytest.approx(expected.logpdf(POINTS).sum(), rel=1e-12)


@pytest.mark.parametrize("prior", ALL, ids=name_of)
@pytest.mark.parametrize("center", [0.0, 1.0])
def test_missing_location_is_the_centre(prior: Prior, center: float) -> None:
    """``loc=None`` centres at the value that leaves the network as it is."""
    without = type(prior)(**{k: v for k, v in vars(prior).items() if k != "loc"})
    fixed = type(prior)(**{**vars(prior), "loc": center})
    scale = torch.tensor(0.3, dtype=torch.float64) if prior.has_tau else None
    value = torch.tensor(POINTS)
    ours, given = (p.elements(center, vector(), scale).log_prob(value) for p in (without, fixed))
    torch.testing.assert_close(ours, given, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("prior", "expected"),
    [
        (HierarchicalCauchy(0.2), stats.halfcauchy(scale=0.2)),
        (Horseshoe(0.4), stats.halfcauchy(scale=0.4)),
    ],
    ids=name_of,
)
def test_density_of_half_cauchy_scales(prior: Prior, expected: Any) -> None:
    tau = np.array([1e-3, 0.1, 0.5, 30.0])
    ours = prior.tau(vector()).log_prob(torch.tensor(tau))
    np.testing.assert_allclose(ours.numpy(), expected.logpdf(tau), rtol=1e-12)
    if prior.has_lambda:
        local = prior.local(vector()).log_prob(torch.tensor(tau))
        np.testing.assert_allclose(local.numpy(), stats.halfcauchy.logpdf(tau), rtol=1e-12)


def density_of_tau(prior: Prior, tau: float) -> float:
    return math.exp(float(prior.tau(vector()).log_prob(torch.tensor(tau, dtype=torch.float64))))


def test_standard_deviation_of_the_hierarchical_normal() -> None:
    """The site holds tau, whose square is inverse-Gamma: the density has the factor d tau^2 / d tau, and mass 1."""
    prior = HierarchicalNormal(2.5, 0.3)
    for tau in (0.1, 0.4, 1.3):
        expected = stats.invgamma.pdf(tau**2, 2.5, scale=0.3) * 2 * tau
        assert density_of_tau(prior, tau) == pytest.approx(expected, rel=1e-10)
    assert integrate.quad(lambda t: density_of_tau(prior, t), 1e-6, np.inf)[0] == pytest.approx(1, rel=1e-6)
    draws = prior.tau(vector()).sample((20_000,))
    assert stats.kstest((draws**2).numpy(), stats.invgamma(2.5, scale=0.3).cdf).pvalue > 1e-3


def test_hierarchical_normal_is_marginally_student_t() -> None:
    """Integrating tau out by quadrature gives 2 * concentration degrees of freedom and scale sqrt(rate / conc.)."""
    prior = HierarchicalNormal(2.5, 0.3, 0.8)
    expected = stats.t(2 * 2.5, 0.8, math.sqrt(0.3 / 2.5))
    for value in (-1.0, 0.5, 0.8, 2.2):
        marginal, _ = integrate.quad(
            lambda t, value=value: density_of_tau(prior, t) * stats.norm.pdf(value, 0.8, t), 1e-3, 30, limit=200
        )
        assert marginal == pytest.approx(expected.pdf(value), rel=1e-5)


def cdf_of_cauchy_product(v: float) -> float:
    """Of a standard Cauchy times a standard half-Cauchy, whose density is 2 / pi^2 * log|r| / (r^2 - 1)."""

    def density(angle: float) -> float:  # of r = tan(angle)
        r = math.tan(angle)
        ratio = 0.5 if abs(r - 1) < 1e-9 else math.log(r) / (r * r - 1)
        return 2 / math.pi**2 * ratio / math.cos(angle) ** 2

    return 0.5 + math.copysign(integrate.quad(density, 0, math.atan(abs(v)))[0], v)


def two_stage_draws(model: Any, site: str, n: int) -> NDArray[np.float64]:
    torch.manual_seed(0)
    return np.array([float(poutine.trace(model).get_trace(torch.zeros(1, 1)).nodes[site]["value"]) for _ in range(n)])


@pytest.mark.parametrize(
    ("prior", "cdf"),
    [
        (HierarchicalCauchy(0.5), lambda v: cdf_of_cauchy_product(v / 0.5)),
        (HierarchicalNormal(2.0, 0.5), stats.t(4, 0, math.sqrt(0.25)).cdf),
    ],
    ids=["HierarchicalCauchy", "HierarchicalNormal"],
)
def test_model_draws_have_the_marginal_distribution(prior: Prior, cdf: Any) -> None:
    """The model samples tau first and the element given it; the element's marginal is the known one."""
    model = Dense(nn.Linear(1, 1, bias=False), Gaussian(1.0), 1, prior=prior)
    draws = two_stage_draws(model, "weight", 1500)
    assert stats.kstest(draws, np.vectorize(cdf)).pvalue > 1e-3


# ------------------------------------------------------------------------------------------- shapes and types


@pytest.mark.parametrize("prior", ALL, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_priors_follow_the_dtype(prior: Prior, dtype: torch.dtype) -> None:
    like = vector(dtype=dtype)
    d = scaled(prior, like, 0.25)
    assert d.sample().dtype == dtype and d.log_prob(like).dtype == dtype
    if prior.has_tau:
        assert prior.tau(like).sample().dtype == dtype
    if prior.has_lambda:
        assert prior.local(like).sample().dtype == dtype


@pytest.mark.parametrize("prior", ALL, ids=name_of)
def test_priors_follow_the_device(prior: Prior) -> None:
    like = torch.zeros(5, device="meta")
    with pyro.validation_enabled(False):  # there are no values to validate
        assert scaled(prior, like, 0.25).log_prob(like).device.type == "meta"
        if prior.has_tau:
            assert prior.tau(like).log_prob(like).device.type == "meta"


def test_scales_with_plates_broadcast_against_the_site() -> None:
    """tau of every member and lambda of every element: [K, 1] and [K, 1, n] against rows [K, B, n]."""
    tau = torch.tensor([[0.1], [2.0]], dtype=torch.float64)
    local = torch.rand(2, 1, 5, dtype=torch.float64) + 0.5
    d = site_distribution(Horseshoe(), 1.0, vector(), tau, local)
    assert d.batch_shape == (2, 1) and d.event_shape == (5,)
    value = torch.randn(2, 3, 5, dtype=torch.float64)
    expected = stats.norm.logpdf(value.numpy(), 1.0, (tau[..., None] * local).numpy()).sum(-1)
    np.testing.assert_allclose(d.log_prob(value).numpy(), expected, rtol=1e-12)
    matrix = torch.zeros(4, 5, dtype=torch.float64)
    assert site_distribution(HierarchicalNormal(), 0.0, matrix, tau, None).event_shape == (4, 5)


# ---------------------------------------------------------------------------------------------- Pyro's own


MIX = dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.5, 0.5])), dist.Normal(torch.tensor([-1.0, 1.0]), 0.5))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (dist.Normal(0.5, 2.0), stats.norm(0.5, 2.0)),
        (dist.StudentT(3.0, 0.5, 2.0), stats.t(3.0, 0.5, 2.0)),
        (dist.LogNormal(0.5, 0.7), stats.lognorm(0.7, scale=math.exp(0.5))),
        (dist.LogNormal(torch.full((5,), 0.5), 0.7), stats.lognorm(0.7, scale=math.exp(0.5))),
        (dist.Normal(0.5, 2.0).expand([5]), stats.norm(0.5, 2.0)),
        (dist.Normal(0.5, 2.0).expand([5]).to_event(1), stats.norm(0.5, 2.0)),
        (dist.Normal(torch.full((1,), 0.5), 2.0), stats.norm(0.5, 2.0)),
        (dist.MultivariateNormal(torch.full((5,), 0.5), 4 * torch.eye(5)), stats.norm(0.5, 2.0)),
        (MIX, None),
        (
            dist.TransformedDistribution(
                dist.Normal(0.0, 1.0), [dist.transforms.AffineTransform(torch.tensor(0.5), torch.tensor(2.0))]
            ),
            stats.norm(0.5, 2.0),
        ),
    ],
    ids=lambda v: name_of(v) if isinstance(v, torch.distributions.Distribution) else "",
)
def test_pyro_distributions(given: Any, expected: Any) -> None:
    """For every element or with the shape of the site; in single precision, for a network in double."""
    like = vector()
    prior = resolve(given, ("w.s", "w"), like)
    d = site_distribution(prior, 1.0, like, None, None)
    value = torch.tensor([0.2, 0.5, 0.7, 1.5, 3.0], dtype=torch.float64)
    assert d.event_shape == (5,) and d.batch_shape == ()
    assert d.sample().dtype == torch.float64 and d.log_prob(value).dtype == torch.float64
    if expected is None:
        pdf = 0.5 * stats.norm.pdf(value, -1, 0.5) + 0.5 * stats.norm.pdf(value, 1, 0.5)
        assert float(d.log_prob(value)) == pytest.approx(np.log(pdf).sum(), rel=1e-6)
    else:
        assert float(d.log_prob(value)) == pytest.approx(expected.logpdf(value).sum(), rel=1e-6)
    assert given.sample().dtype == torch.float32, "the distribution that was given is as it was"


def test_pyro_distribution_on_another_device() -> None:
    like = torch.zeros(5, device="meta")
    for given in (dist.LogNormal(torch.zeros(5), torch.ones(5)), dist.Cauchy(torch.zeros(5), 1.0).to_event(1)):
        d = resolve(given, ("w",), like).elements(0.0, like, None)
        with pyro.validation_enabled(False):
            assert d.log_prob(like).device.type == "meta"


def test_correlated_elements_of_a_matrix() -> None:
    """An event of one axis for a site of two: the other axis is made of independent copies."""
    like = torch.zeros(3, 2, dtype=torch.float64)
    covariance = torch.tensor([[1.0, 0.6], [0.6, 2.0]], dtype=torch.float64)
    prior = resolve(dist.MultivariateNormal(like.new_zeros(2), covariance), ("w",), like)
    d = site_distribution(prior, 0.0, like, None, None)
    assert d.event_shape == (3, 2)
    value = torch.randn(3, 2, dtype=torch.float64)
    expected = stats.multivariate_normal(np.zeros(2), covariance.numpy()).logpdf(value.numpy()).sum()
    assert float(d.log_prob(value)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "given",
    [
        dist.Normal(torch.zeros(4), 1.0),
        dist.Normal(torch.zeros(2, 5), 1.0),
        dist.MultivariateNormal(torch.zeros(4), torch.eye(4)),
        dist.MultivariateNormal(torch.zeros(1), torch.eye(1)),
    ],
    ids=lambda d: str(tuple(d.batch_shape + d.event_shape)),
)
def test_distribution_of_another_shape(given: Any) -> None:
    shape = tuple(given.batch_shape + given.event_shape)
    message = rf"the prior of 'fc.weight.s' has shape \({', '.join(map(str, shape))},?\), the site has \(5,\): give a"
    with pytest.raises(ValueError, match=message):
        resolve(given, ("fc.weight.s", "fc.weight"), vector())


# ------------------------------------------------------------------------------------ mappings and functions


def test_first_pattern_that_matches_the_whole_name_wins() -> None:
    names = ("layer1.fc.weight.s", "layer1.fc.weight")
    mapping = {
        "fc": Normal(0, 9),
        "layer": Normal(0, 7),
        "weight": Normal(0, 6),
        r".*\.r": Normal(0, 8),
        r".*\.weight": Normal(0, 1),
        ".*": Normal(0, 2),
    }
    assert resolve(mapping, names, vector()) == Normal(0, 1), "the weight's name counts, a part of a name does not"
    assert resolve({r".*\.s": Cauchy(), **mapping}, names, vector()) == Cauchy()
    assert resolve(mapping, ("layer1.fc.weight.r", "layer1.fc.weight"), vector()) == Normal(0, 8)
    for module in ("layer1", "layer1.fc", r"layer\d"):
        assert resolve({module: Cauchy(), **mapping}, names, vector()) == Cauchy(), "a module means all below it"
    assert resolve({".*": dist.Laplace(0.0, 1.0)}, names, vector()).elements(0, vector(), None).loc == 0


def test_a_parameter_that_no_pattern_matches() -> None:
    with pytest.raises(ValueError, match=r"no pattern of the prior matches 'b' \(patterns: 'a', 'b1'\).*'\.\*'"):
        resolve({"a": Normal(), "b1": Normal()}, ("b",), vector())
    with pytest.raises(ValueError, match=r"no pattern of the prior matches '2.weight'"):
        Dense(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)), None, prior={r"0\..*": Normal()})


def test_layers_with_priors_of_their_own() -> None:
    """In a model: scales only where the prior has some, and one for r and one for s when these differ."""
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    mapping: Any = {
        r"0\.weight\.s": HierarchicalCauchy(0.2),
        r"0\.weight\.r": HierarchicalCauchy(0.3),
        ".*": Normal(1, 0.1),
    }
    model = Rank1(net, None, prior=mapping, member_bias=False)
    names = ["0.weight.s_tau", "0.weight.r_tau", "0.weight.s", "0.weight.r", "2.weight.s", "2.weight.r"]
    assert [site.name for site in model.sites()] == names
    trace = poutine.trace(model).get_trace(torch.zeros(4, 2))
    assert trace.nodes["0.weight.r_tau"]["fn"].base_dist.scale == pytest.approx(0.3)
    tau = trace.nodes["0.weight.r_tau"]["value"]
    assert torch.equal(trace.nodes["0.weight.r"]["fn"].base_dist.scale.unique(), tau.unique())


def test_functions_see_name_and_shape() -> None:
    seen = {}

    def prior(name: str, tensor: Tensor) -> Any:
        seen[name] = tuple(tensor.shape)
        return dist.Normal(tensor.new_zeros(tensor.shape), 1 / len(tensor)) if "s" in name else Cauchy(1.0, 0.5)

    model = Rank1(nn.Linear(4, 3), None, prior=prior)
    assert seen == {"weight.s": (4,), "weight.r": (3,)}
    trace = poutine.trace(model).get_trace(torch.zeros(2, 4))
    assert isinstance(trace.nodes["weight.r"]["fn"].base_dist, dist.Cauchy)
    assert trace.nodes["weight.s"]["fn"].base_dist.scale.unique() == 0.25


def test_functions_that_return_something_else() -> None:
    with pytest.raises(TypeError, match="the prior function returned float for 'w', not a distribution"):
        resolve(lambda name, tensor: 1.0, ("w",), vector())
    with pytest.raises(ValueError, match=r"the prior of 'w' has shape \(4,\), the site has \(5,\)"):
        resolve(lambda name, tensor: dist.Normal(torch.zeros(4), 1.0), ("w",), vector())
    with pytest.raises(TypeError, match="or a mapping of patterns to these, not int"):
        resolve(3, ("w",), vector())  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ as JSON


@pytest.mark.parametrize("prior", [*ALL, Normal(), HierarchicalCauchy(), None], ids=name_of)
def test_description_round_trip(prior: Any) -> None:
    assert from_description(json.loads(json.dumps(describe(prior)))) == prior


def test_description_of_a_mapping_keeps_the_order() -> None:
    mapping = {"b.*": Normal(0.0, 2.0), "a": {".*": Horseshoe(0.3)}, ".*": Cauchy()}
    back: Any = from_description(json.loads(json.dumps(describe(mapping))))
    assert back == mapping and list(back) == list(mapping)


@pytest.mark.parametrize(
    ("prior", "kind"),
    [
        (dist.Normal(0.0, 1.0), "Normal"),
        (lambda name, tensor: Normal(), "a function"),
        ({"a": Normal(), ".*": dist.Cauchy(0.0, 1.0)}, "Cauchy"),
    ],
    ids=["distribution", "function", "mapping"],
)
def test_priors_that_json_cannot_describe(prior: Any, kind: str) -> None:
    with pytest.raises(TypeError, match=f"a prior given as {kind} cannot be written to JSON"):
        describe(prior)


@pytest.mark.parametrize("description", [{"class": "Gumbel"}, {"class": "Normal", "sigma": 1.0}, {"scale": 1.0}])
def test_unknown_descriptions(description: Any) -> None:
    with pytest.raises(ValueError, match="unknown prior .*known are Normal, Cauchy"):
        from_description(description)


# --------------------------------------------------------------------------------------------- bad arguments


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, "1", None, torch.tensor(1.0)], ids=repr)
@pytest.mark.parametrize(
    ("cls", "argument"),
    [
        *((cls, "scale") for cls in (Normal, Cauchy, Laplace, StudentT, HierarchicalCauchy, Horseshoe)),
        *((StudentT, "df"), (HierarchicalNormal, "concentration"), (HierarchicalNormal, "rate")),
    ],
    ids=lambda v: v if isinstance(v, str) else v.__name__,
)
def test_scales_must_be_positive_numbers(cls: Any, argument: str, bad: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=rf"{cls.__name__}\.{argument}=.*: expected a positive number"):
        cls(**{argument: bad})


@pytest.mark.parametrize("bad", [math.nan, math.inf, "1"], ids=repr)
@pytest.mark.parametrize("prior", ALL, ids=name_of)
def test_locations_must_be_finite_numbers(prior: Prior, bad: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=rf"{type(prior).__name__}\.loc=.*: expected a finite number"):
        type(prior)(loc=bad)  # type: ignore[call-arg]


def test_priors_are_values() -> None:
    """Equal when their numbers are, usable as keys, and not to be changed."""
    assert Normal(0, 1) == Normal(0, 1) and hash(Normal(0, 1)) == hash(Normal(0, 1)) and Normal() != Cauchy()
    with pytest.raises(AttributeError):
        Normal().scale = 2.0  # type: ignore[misc]
    for method in ("tau", "local"):
        with pytest.raises(TypeError, match="Normal has no"):
            getattr(Normal(), method)(vector())


@pytest.mark.parametrize("prior", [HierarchicalCauchy(0.3), HierarchicalNormal(2.0, 0.5), Horseshoe(0.2)], ids=name_of)
def test_guides_start_in_the_bulk_of_tau(prior: Prior) -> None:
    """The value lies between the 20 % and the 80 % quantile."""
    start = prior.typical_tau()
    draws = prior.tau(vector()).sample((4000,))
    assert 0.2 < float((draws < start).double().mean()) < 0.8
