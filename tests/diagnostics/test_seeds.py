"""``seed=None`` draws anew, from torch's global generator, which a seed leaves alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn import diagnostics as dg
from pyro_bnn.diagnostics.pages.comparison import Candidate, comparison

pytestmark = pytest.mark.filterwarnings("ignore")

N = 12


def fitted() -> tuple[pb.Posterior, Tensor, Tensor]:
    """Of two components with a wide spread, so that other draws give other numbers."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 2, generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Linear(2, 3)
        model = pb.models.Dense(net, pb.likelihoods.Categorical(), N)
        guide = pb.models.MeanFieldGuide(model, components=2, init_scale=0.5)
    y = net(x).argmax(1)
    y[::4] = (y[::4] + 1) % 3  # some are wrong, so that there is a best temperature
    return pb.Posterior(model, guide), x, y


def function(prediction: pb.Prediction) -> list[float]:
    return [float(value) for value in prediction.outputs.flatten()]


def numbers(of: Callable[..., Any], tmp_path: Path, **seed: int) -> Any:
    """What a function says of the same posterior and data."""
    posterior, x, y = fitted()
    pairs = [(x[:5], y[:5]), (x[5:], y[5:])]
    if of in (dg.evaluate, dg.check, dg.diversity):
        return of(posterior, pairs, num_samples=3, **seed)
    if of is dg.compare_to_reference:
        return of(posterior, posterior, pairs, num_samples=2, reference_samples=3, **seed)
    if of in (dg.loo, dg.pareto_k):
        found = of(posterior, x, y, num_samples=60, **seed)
        return found.k if of is dg.pareto_k else [float(value) for value in found.pareto_k]
    if of is dg.convergence:
        return of([posterior, posterior], x[:2], num_samples=6, **seed)["rhat"].values.tolist()
    if of is dg.contraction:
        return of(posterior, x[:2], num_samples=10, **seed)
    if of is dg.to_arviz:
        return of(posterior, groups="posterior", num_samples=4, **seed)["posterior"]["bias_mean"].values.tolist()
    if of is dg.scale_temperature:
        return of(posterior, (x, y), num_samples=2, **seed).temperature
    if of is dg.ConformalSets:
        return of(posterior, pairs, level=0.5, num_samples=2, **seed).threshold
    if of is dg.prior_predictive:
        return function(of(posterior.model, x[:2], num_samples=3, **seed))
    if of is dg.check_prior:
        return of(posterior.model, x, num_samples=10, **seed)
    if of is dg.sbc:
        guides = {"simulations": 3, "draws": 7, "steps": 2, "progress": False}
        return of(posterior.model, pb.models.MeanFieldGuide, x, **guides, **seed).ranks["function"].tolist()
    path = of(posterior, pairs, path=tmp_path / "page.html", num_samples=2, findings=[], **seed)
    return [line for line in path.read_text(encoding="utf-8").splitlines() if "data-value" in line]


RANDOM: list[Callable[..., Any]] = [
    dg.ConformalSets,
    dg.check,
    dg.check_prior,
    dg.compare_to_reference,
    dg.contraction,
    dg.convergence,
    dg.diversity,
    dg.evaluate,
    dg.loo,
    dg.pareto_k,
    dg.prior_predictive,
    dg.report,
    dg.sbc,
    dg.scale_temperature,
    dg.to_arviz,
]


def test_every_public_function_takes_a_seed_that_is_none_unless_given() -> None:
    """Proves that no function draws the same numbers again and again without being told to."""
    seeds = {
        name: inspect.signature(getattr(dg, name)).parameters["seed"].default
        for name in dg.__all__
        if callable(getattr(dg, name)) and "seed" in inspect.signature(getattr(dg, name)).parameters
    }
    assert {f.__name__ for f in RANDOM} | {"ConformalIntervals"} == set(seeds) and set(seeds.values()) == {None}


@pytest.mark.parametrize("of", RANDOM, ids=lambda of: str(of.__name__))
def test_without_a_seed_numbers_follow_the_global_generator(of: Callable[..., Any], tmp_path: Path) -> None:
    """Proves that they are others at each call, and the same again from the same state of torch's generator."""
    torch.manual_seed(5)
    first, others = numbers(of, tmp_path), [numbers(of, tmp_path) for _ in range(3)]
    torch.manual_seed(5)
    assert repr(numbers(of, tmp_path)) == repr(first)
    assert any(repr(other) != repr(first) for other in others)


@pytest.mark.parametrize("of", RANDOM, ids=lambda of: str(of.__name__))
def test_a_seed_reproduces_and_leaves_the_global_generator_alone(of: Callable[..., Any], tmp_path: Path) -> None:
    before = torch.get_rng_state()
    assert repr(numbers(of, tmp_path, seed=3)) == repr(numbers(of, tmp_path, seed=3))
    assert torch.equal(torch.get_rng_state(), before)


def test_all_batches_see_the_same_draws_when_there_is_no_seed() -> None:
    """Proves that one seed is drawn for the whole: two copies of the data in two batches give what one copy gives."""
    posterior, x, y = fitted()
    torch.manual_seed(1)
    once = dg.evaluate(posterior, [(x, y)], num_samples=2)
    torch.manual_seed(1)
    twice = dg.evaluate(posterior, [(x, y), (x, y)], num_samples=2)
    for name in ("nll", "accuracy", "brier", "aleatoric", "epistemic", "disagreement"):
        assert twice[name] == pytest.approx(once[name], rel=1e-6)


def test_a_posterior_compared_with_itself_is_no_better_when_there_is_no_seed(tmp_path: Path) -> None:
    """Proves that all candidates of a comparison, and all models of a ranking, are looked at with one seed."""
    posterior, x, y = fitted()
    candidates = {name: Candidate(posterior, {"nll": 1.0}, 2) for name in ("a", "b")}
    gaps = comparison(candidates, (x, y), path=tmp_path / "c.html")
    assert [(gap.mean, gap.se) for gap in gaps.values()] == [(0, 0), (0, 0)]
    table = dg.compare_loo({"a": posterior, "b": posterior}, x, y, num_samples=60)
    assert float(table["elpd_diff"].abs().max()) == 0
