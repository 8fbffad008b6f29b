"""Simulation-based calibration: uniform for exact posteriors, and the right word for each kind of wrong one."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.infer import NUTS
from pyro.infer.autoguide import AutoNormal
from scipy import stats
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn.diagnostics.checking.findings import Finding
from pyro_bnn.diagnostics.checking.ranks import SBCResult
from pyro_bnn.diagnostics.checking.simulation import sbc
from pyro_bnn.diagnostics.checking.uniformity import RankBand, chi_square, where_ranks_pile_up

ROWS, NOISE = 8, 0.5


# ------------------------------------------------------------------------------------------------ the test itself


def statistic(ranks: tuple[int, ...], largest: int) -> float:
    """Saeilynoja et al., equation 7, term by term."""
    tails = []
    for i in range(1, largest + 1):
        below = sum(rank < i for rank in ranks)
        binomial = stats.binom(len(ranks), i / (largest + 1))
        tails.append(2 * min(binomial.cdf(below), binomial.sf(below - 1)))
    return min(tails)


@pytest.mark.parametrize(("count", "largest"), [(4, 3), (5, 2), (3, 5), (7, 1)])
def test_p_values_are_those_of_an_enumeration_of_all_ranks(count: int, largest: int) -> None:
    everything = list(itertools.product(range(largest + 1), repeat=count))
    g = np.array([statistic(ranks, largest) for ranks in everything])
    expected = (g[None] <= g[:, None] * (1 + 1e-9)).mean(1)
    found = RankBand(count, largest).p_value(torch.tensor(everything).T)
    np.testing.assert_allclose(found, expected, atol=1e-11)


def test_p_values_of_uniform_ranks_hold_their_level() -> None:
    ranks = torch.randint(0, 64, (100, 4000), generator=torch.Generator().manual_seed(0))
    p = RankBand(100, 63).p_value(ranks)
    for level in (0.01, 0.05, 0.3):
        deviation = math.sqrt(level * (1 - level) / 4000)
        share = float((p <= level).double().mean())
        assert share < level + 4 * deviation
        assert share > 0.9 * level - 4 * deviation  # there are many values of the statistic


def test_a_curve_leaves_the_band_when_its_p_value_says_so() -> None:
    ranks = torch.randint(0, 16, (40, 500), generator=torch.Generator().manual_seed(1))
    result = SBCResult({"theta": ranks}, 15)
    data = result.ecdf_difference("theta", level=0.8)
    outside = ((data.difference < data.lower[:, None] - 1e-9) | (data.difference > data.upper[:, None] + 1e-9)).any(0)
    assert torch.equal(outside, result.p_values()["theta"] <= 0.2)
    assert 20 < int(outside.sum()) < 180
    ecdf = np.array([(ranks[:, 0].numpy() <= i).mean() for i in range(15)])
    np.testing.assert_allclose(data.difference[:, 0], ecdf - np.arange(1, 16) / 16)
    with pytest.raises(ValueError, match="name='phi': expected one of the quantities theta"):
        result.ecdf_difference("phi")
    with pytest.raises(ValueError, match=r"level=1\.0"):
        result.ecdf_difference("theta", level=1.0)


def test_a_result_prints_the_least_p_value_of_each_quantity() -> None:
    ranks = {"theta": torch.arange(16).repeat(4), "bad": torch.zeros(64, 2, dtype=torch.long)}
    text = repr(SBCResult(ranks, 15, falling=1))
    least = {name: float(p.min()) for name, p in SBCResult(ranks, 15).p_values().items()}
    assert text.startswith("SBCResult(simulations=64, draws=15, falling=1; smallest p-values for uniform ranks: theta ")
    assert f"bad {least['bad']:.2g}" in text and least["bad"] < 1e-6 and "tensor" not in text


def test_chi_square_is_that_of_scipy() -> None:
    ranks = torch.randint(0, 64, (100, 3), generator=torch.Generator().manual_seed(2))
    found = SBCResult({"theta": ranks}, 63).chi_square()["theta"]
    for column in range(3):  # of 100 simulations at most 20 bins, of which 16 divide 64 ranks
        counts = np.histogram(ranks[:, column], bins=16, range=(0, 64))[0]
        assert float(found[column]) == pytest.approx(stats.chisquare(counts).pvalue)
    assert float(chi_square(torch.tensor([0, 1, 1, 0, 1, 1]), 1)) == pytest.approx(stats.chisquare([2, 4]).pvalue)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 9), min_size=2, max_size=30), st.randoms())
def test_p_values_do_not_depend_on_order_or_direction(ranks: list[int], random: Any) -> None:
    band = RankBand(len(ranks), 9)
    p = float(band.p_value(torch.tensor(ranks)))
    assert 0 <= p <= 1
    random.shuffle(ranks)
    assert float(band.p_value(torch.tensor(ranks))) == pytest.approx(p, abs=1e-12)
    assert float(band.p_value(9 - torch.tensor(ranks))) == pytest.approx(p, abs=1e-11)


def test_where_ranks_pile_up() -> None:
    uniform = torch.arange(16).repeat(5)
    assert where_ranks_pile_up(uniform, 15) == "other"
    assert where_ranks_pile_up(uniform // 2, 15) == "low"
    assert where_ranks_pile_up(8 + uniform // 2, 15) == "high"
    assert where_ranks_pile_up(4 + uniform // 2, 15) == "middle"
    assert where_ranks_pile_up(torch.where(uniform < 8, uniform // 2, 15 - (15 - uniform) // 2), 15) == "ends"
    assert where_ranks_pile_up(torch.full((30,), 15), 15) == "high"
    assert where_ranks_pile_up(torch.zeros(30).long(), 1) == "low"


# ------------------------------------------------------------------------------------- a model that can be solved


def inputs() -> Tensor:
    return torch.randn(ROWS, 2, generator=torch.Generator().manual_seed(0))


def linear() -> Any:
    """``y = w x + b + noise`` with weights N(0, 1)."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return pb.models.Dense(nn.Linear(2, 1), pb.likelihoods.Gaussian(scale=NOISE), ROWS)


def solved(scale: float = 1.0, bias: float = 0.0, data: float = 1.0, draws: int = 31) -> Callable[..., Any]:
    """Draws from the exact posterior, or from one that is stretched, shifted, or has seen a share of the data."""

    def factory(model: Any) -> Callable[..., dict[str, Tensor]]:
        def infer(x: Tensor, y: Tensor) -> dict[str, Tensor]:
            design = torch.cat((x, torch.ones(len(x), 1)), 1).double()
            precision = torch.eye(3) + data * design.T @ design / NOISE**2
            mean = torch.linalg.solve(precision, data * design.T @ y.double() / NOISE**2)
            root = torch.linalg.cholesky(torch.linalg.inv(precision))
            w = mean + root.diagonal() * bias + scale * torch.randn(draws, 3, dtype=torch.float64) @ root.T
            return {"weight": w[:, None, :2].float(), "bias": w[:, 2:].float()}

        return infer

    return factory


def run(factory: Any, model: Any = None, **options: Any) -> SBCResult:
    options = {"simulations": 100, "draws": 31, "progress": False, "seed": 0} | options
    return sbc(model or linear(), factory, inputs(), **options)


def about(findings: list[Finding], name: str) -> str:
    return next(f.message for f in findings if f.topic == f"calibration of {name}")


def test_uniform_for_the_exact_posterior() -> None:
    result = run(solved(), simulations=200)
    assert {name: tuple(rank.shape) for name, rank in result.ranks.items()} == {
        "weight": (200, 1, 2),
        "bias": (200, 1),
        "function": (200, 5, 1),
        "log_likelihood": (200,),
    }
    assert all(0 <= int(rank.min()) and int(rank.max()) <= 31 for rank in result.ranks.values())
    (finding,) = result.findings()
    assert finding.severity == "good"
    assert "weight, bias, function, log_likelihood look uniform in 200 simulations" in finding.message
    assert all(float(p.min()) > 1e-3 for p in result.chi_square().values())


def test_half_the_scale_is_too_narrow() -> None:
    findings = run(solved(scale=0.5)).findings()
    for name in ("weight", "bias", "function"):
        assert "the posterior is too narrow" in about(findings, name)
    assert {f.severity for f in findings} == {"problem"}


def test_twice_the_scale_is_too_wide() -> None:
    findings = run(solved(scale=2.0)).findings()
    assert "the posterior is too wide" in about(findings, "bias")
    assert "fits the data too little" in about(findings, "log_likelihood")


@pytest.mark.parametrize(("bias", "direction"), [(1.0, "high"), (-1.0, "low")])
def test_a_shifted_posterior_is_biased(bias: float, direction: str) -> None:
    message = about(run(solved(bias=bias)).findings(), "bias")
    assert f"the posterior is biased towards {direction} values" in message
    assert float(re.findall(r"up to (\d+) percentage", message)[0]) == pytest.approx(
        100 * (2 * stats.norm.cdf(1 / math.sqrt(2) / math.sqrt(2)) - 1), abs=12
    )


def test_a_posterior_that_is_the_prior_shows_in_the_log_likelihood_alone() -> None:
    findings = run(solved(data=0.0)).findings()
    assert "fits the data too little" in about(findings, "log_likelihood")
    assert "weight, bias, function look uniform" in findings[-1].message


def test_the_correction_keeps_the_share_of_false_alarms() -> None:
    generator = torch.Generator().manual_seed(3)
    alarms = 0
    for _ in range(100):
        ranks = {f"q{i}": torch.randint(0, 16, (50, 8), generator=generator) for i in range(4)}
        alarms += any(f.severity != "good" for f in SBCResult(ranks, 15).findings(level=0.1))
    assert alarms <= 10 + 4 * 3


# ----------------------------------------------------------------------------------------- guides and kernels


def normal_mean(x: Tensor, y: Tensor | None = None) -> Tensor:
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal(m.expand(len(x)), NOISE), obs=y)


def test_a_guide_is_trained_to_the_exact_posterior() -> None:
    guides: list[AutoNormal] = []
    data: list[Tensor] = []

    def factory(model: Any) -> AutoNormal:
        guides.append(AutoNormal(model))
        return guides[-1]

    def keep(latents: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        data.append(y)
        return latents["m"]

    result = sbc(
        normal_mean,
        factory,
        torch.zeros(ROWS),
        simulations=2,
        draws=3,
        steps=200,
        lr=0.05,
        functions={"again": keep},
        progress=False,
    )
    assert len(guides) == 2 and len({id(guide) for guide in guides}) == 2
    assert torch.equal(result.ranks["again"], result.ranks["m"])
    variance = 1 / (1 + ROWS / NOISE**2)
    for guide, y in zip(guides, (data[0], data[-1]), strict=True):
        assert guide.locs.m.item() == pytest.approx(float(variance * y.sum() / NOISE**2), abs=0.05)
        assert guide.scales.m.item() == pytest.approx(math.sqrt(variance), rel=0.2)
    assert len(pyro.get_param_store()) == 0


def test_guides_that_are_still_in_training_are_told() -> None:
    slow = sbc(normal_mean, AutoNormal, torch.zeros(ROWS), simulations=3, steps=1000, lr=1e-3, progress=False)
    assert slow.falling >= 2  # of the third the truth is where guides start
    (finding,) = [finding for finding in slow.findings() if finding.topic == "training"]
    assert finding.severity == "warning" and f"{slow.falling} of 3 guides was still falling when" in finding.message
    done = sbc(normal_mean, AutoNormal, torch.zeros(ROWS), simulations=3, steps=300, progress=False)
    assert done.falling == 0 and all(finding.topic != "training" for finding in done.findings())


def test_the_correction_is_that_of_holm() -> None:
    """The larger of two p-values is not multiplied by 2 once the smaller one was found."""
    generator = torch.Generator().manual_seed(0)
    low = torch.cat((torch.randint(16, (60,), generator=generator), torch.randint(32, (40,), generator=generator)))
    others = torch.randint(32, (100, 200), generator=generator)
    p = RankBand(100, 31).p_value(others)
    between = int(((p > 0.025) & (p < 0.05)).nonzero()[0])
    found = SBCResult({"low": low, "other": others[:, between]}, 31).findings()
    assert [finding.topic for finding in found] == ["calibration of low", "calibration of other"]
    assert f"(corrected p = {float(p[between]):.2g})" in found[1].message
    alone = SBCResult({"fine": others[:, int(p.argmax())], "other": others[:, between]}, 31).findings()
    assert [finding.severity for finding in alone] == ["good"]


def test_a_small_error_that_is_certain_is_a_warning() -> None:
    """One-sided intervals that are off by 20 points are a problem, by 7 points a warning."""
    generator = torch.Generator().manual_seed(0)
    for extra, severity in ((0.4, "problem"), (0.14, "warning")):
        low = torch.randint(16, (int(1000 * extra),), generator=generator)
        rest = torch.randint(32, (1000 - len(low),), generator=generator)
        (finding,) = SBCResult({"x": torch.cat((low, rest))}, 31).findings()
        assert finding.severity == severity


def test_a_tempered_likelihood_is_refused() -> None:
    model = pb.models.Dense(nn.Linear(2, 1), pb.likelihoods.Gaussian(scale=0.5, temperature=0.5), ROWS)
    with pytest.raises(ValueError, match=r"temperature=0\.5"):
        run(solved(), model)


@pytest.mark.slow
def test_uniform_for_a_guide_that_holds_the_exact_posterior() -> None:
    result = sbc(normal_mean, AutoNormal, torch.zeros(ROWS), simulations=60, steps=300, lr=0.05, progress=False)
    (finding,) = result.findings()
    assert finding.severity == "good"


def test_a_kernel_is_run() -> None:
    result = sbc(normal_mean, NUTS, torch.zeros(ROWS), simulations=2, draws=7, warmup=20, thinning=2, progress=False)
    assert result.ranks["m"].shape == result.ranks["log_likelihood"].shape == (2,)


def rank1() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1))
        return pb.models.Rank1(net, pb.likelihoods.Gaussian(scale=NOISE), ROWS, prefix="net")


def fitted(model: Any) -> Callable[..., pb.Posterior]:
    def infer(x: Tensor, y: Tensor) -> pb.Posterior:
        return pb.inference.fit(model, pb.models.Rank1Guide(model), (x, y), epochs=2, lr=0.1, progress=False)

    return infer


@pytest.mark.parametrize("factory", [partial(pb.models.Rank1Guide, components=2), fitted, AutoNormal])
def test_the_model_and_the_world_stay_as_they_were(factory: Any) -> None:
    model = rank1()
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    result = run(factory, model, simulations=2, draws=3, steps=2, sites=())
    assert set(result.ranks) == {"function", "log_likelihood"}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert len(pyro.get_param_store()) == 0


def test_parameters_of_the_model_have_the_values_of_the_users_store_and_keep_them() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        m = pyro.sample("m", dist.Normal(pyro.param("centre", torch.tensor(0.0)), 1.0))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(m.expand(len(x)), 1.0), obs=y)

    pyro.param("centre", torch.tensor(50.0))
    pyro.param("AutoNormal.locs.m", torch.tensor(7.0))  # of another run, and no start for this one
    seen: list[float] = []

    def keep(latents: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        seen.append(float(y.mean()))
        return latents["m"]

    settings = {"simulations": 2, "draws": 1, "steps": 20, "lr": 1.0, "functions": {"again": keep}, "progress": False}
    sbc(model, AutoNormal, torch.zeros(20), **settings)  # type: ignore[arg-type]
    assert all(abs(value - 50) < 5 for value in seen)
    assert pyro.param("centre").item() == 50
    assert set(pyro.get_param_store()) == {"centre", "AutoNormal.locs.m"}


def test_seeds_make_runs_and_draws_below_all_have_rank_zero() -> None:
    first, second, other = (run(solved(), simulations=5, seed=seed).ranks for seed in (1, 1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    low = run(
        lambda model: lambda x, y: {"weight": torch.zeros(3, 1, 2) - 99, "bias": torch.zeros(3, 1) + 99},
        draws=3,
        simulations=5,
    )
    assert (low.ranks["weight"] == 3).all() and (low.ranks["bias"] == 0).all()


def test_the_data_of_a_simulation_follow_from_its_seed_whatever_the_inferences_before_drew() -> None:
    def data(draws: int) -> list[Tensor]:
        seen: list[Tensor] = []

        def keep(latents: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            seen.append(y)
            return y.mean()

        run(solved(draws=draws), simulations=3, draws=1, functions={"mean": keep})
        return seen

    first, second = data(1), data(9)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[-1])


def test_ties_are_broken_at_random() -> None:
    ranks = run(solved(), functions={"one": lambda latents, x, y: torch.ones(2)}, sites="bias").ranks
    assert set(ranks) == {"bias", "one", "function", "log_likelihood"}
    assert float(RankBand(100, 31).p_value(ranks["one"]).min()) > 1e-3
    assert not torch.equal(ranks["one"][:, 0], ranks["one"][:, 1])


def test_other_likelihoods_and_axes() -> None:
    for likelihood, columns in ((pb.likelihoods.Categorical(), 3), (pb.likelihoods.Poisson(), 1)):
        model = pb.models.Dense(
            nn.Linear(2, columns), likelihood, ROWS, members_dim=-3, prior=pb.priors.HierarchicalNormal()
        )
        result = run(pb.models.MeanFieldGuide, model, simulations=2, draws=3, steps=2)
        assert result.ranks["function"].shape == (2, 5, columns)
        assert result.ranks["weight_tau"].shape == (2,)


# ------------------------------------------------------------------------------------------------- bad input


def discrete(x: Tensor, y: Tensor | None = None) -> Tensor:
    z = pyro.sample("z", dist.Bernoulli(0.5))
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal(z.expand(len(x)), 1.0), obs=y)


def silent(x: Tensor, y: Tensor | None = None) -> None:
    pyro.sample("m", dist.Normal(0.0, 1.0))


def test_what_cannot_be_calibrated() -> None:
    x = inputs()
    with pytest.raises(ValueError, match="x has 3 rows, but the model has num_data=8"):
        sbc(linear(), solved(), x[:3])
    for options, message in (
        ({"simulations": 1}, "simulations=1: expected a whole number, at least 2"),
        ({"draws": 0}, "draws=0"),
        ({"steps": 0}, "steps=0"),
        ({"warmup": -1}, "warmup=-1"),
        ({"thinning": 1.5}, r"thinning=1\.5"),
        ({"lr": 0.0}, r"lr=0\.0"),
        ({"sites": "wait"}, "'wait' is not a latent site of the model; expected any of weight, bias"),
        ({"functions": {"function": max}}, "two quantities are named 'function'"),
    ):
        with pytest.raises(ValueError, match=message):
            run(solved(), **options)
    with pytest.raises(ValueError, match="'z' is discrete"):
        sbc(discrete, solved(), x)
    for model in (silent, pb.models.Dense(nn.Linear(2, 1), None)):
        with pytest.raises(ValueError, match="draws no site 'obs'"):
            sbc(model, solved(), x)
    flat = pb.models.Rank1(nn.Linear(2, 1), pb.likelihoods.Gaussian(scale=1.0), ROWS, weight_prior=None)
    with pytest.raises(ValueError, match="the prior is improper"):
        sbc(flat, solved(), x)


def test_what_an_inference_must_return() -> None:
    few = {"weight": torch.zeros(2, 1, 2), "bias": torch.zeros(2, 1)}
    with pytest.raises(TypeError, match="got function, which returned NoneType"):
        run(lambda model: lambda x, y: None)
    with pytest.raises(TypeError, match="got int"):
        run(lambda model: 3)
    with pytest.raises(ValueError, match="only 2 draws are stored"):
        run(lambda model: lambda x, y: few)
    with pytest.raises(ValueError, match="'m' is missing, expected"):
        sbc(normal_mean, lambda model: lambda x, y: {"other": torch.zeros(3)}, inputs(), draws=3, progress=False)
    with pytest.raises(ValueError, match=r"'m' has the shape \(2,\), expected \(\)"):
        sbc(normal_mean, lambda model: lambda x, y: {"m": torch.zeros(3, 2)}, inputs(), draws=3, progress=False)


def test_a_simulation_that_fails_is_named_with_its_seed() -> None:
    calls: list[int] = []

    def nan_later(model: Any) -> Callable[..., dict[str, Tensor]]:
        def infer(x: Tensor, y: Tensor) -> dict[str, Tensor]:
            calls.append(1)
            draws: dict[str, Tensor] = solved()(model)(x, y)
            return {name: value / (0 if len(calls) == 3 else 1) * 0 for name, value in draws.items()}

        return infer

    with pytest.raises(
        FloatingPointError, match=r"simulation 2 of 100 \(seed \d+\): the posterior gave values of 'weight'"
    ):
        run(nan_later)
    with (
        pytest.warns(UserWarning, match="NaN"),
        pytest.raises(FloatingPointError, match=r"\(seed \d+\): the loss became"),
    ):
        run(AutoNormal, steps=50, lr=1e30)
    with pytest.raises(ZeroDivisionError) as caught:
        run(lambda model: lambda x, y: 1 / 0)
    assert re.match(r"in simulation 0 of 100 \(seed \d+\)", caught.value.__notes__[0])
