"""Swaps of whole groups leave the posterior as it is: closed forms, a joint-distribution test, and where they stop."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_bnn as pb
from pyro_bnn.inference import SGHMCEM, sample
from pyro_bnn.inference.sgmcmc.pruning import MagnitudeRule
from pyro_bnn.priors import SpikeAndSlab

NARROW, WIDE, RATE, NOISE = 0.15, 1.0, 0.4, 1.0
OUTPUTS = 6


def linear(x: Tensor, y: Tensor, loc: float = 0.0) -> Any:
    """y ``[N, 6]`` from x ``[N, 3]``; a column of the weights ``[6, 3]`` is a group of six."""

    def model() -> None:
        prior = SpikeAndSlab(NARROW, WIDE, inclusion=RATE, group="input", loc=loc)
        w = pyro.sample("w", prior.elements(0.0, torch.zeros(OUTPUTS, 3, dtype=torch.float64), None))
        pyro.sample("y", dist.Normal(x @ (w.mT - loc), NOISE).to_event(2), obs=y)

    return model


def regression() -> tuple[Tensor, Tensor]:
    torch.manual_seed(5)
    x = torch.randn(10, 3, dtype=torch.float64)
    x[:, 1] += 0.7 * x[:, 0]  # correlated inputs, so that the patterns are no product
    w = torch.zeros(OUTPUTS, 3, dtype=torch.float64)
    w[:, 0], w[:, 1] = 0.45, 0.3
    return x, x @ w.mT + NOISE * torch.randn(10, OUTPUTS, dtype=torch.float64)


def exact_patterns(x: Tensor, y: Tensor) -> dict[tuple[int, ...], float]:
    """``P(indicators | y)`` of all eight patterns: the six outputs are independent Gaussians given a pattern."""
    logs = {}
    for pattern in itertools.product((0, 1), repeat=3):
        variance = np.where(pattern, WIDE**2, NARROW**2)
        law = stats.multivariate_normal(
            np.zeros(len(x)), NOISE**2 * np.eye(len(x)) + (x.numpy() * variance) @ x.numpy().T
        )
        prior = sum(np.log(RATE if inside else 1 - RATE) for inside in pattern)
        logs[pattern] = prior + sum(law.logpdf(column) for column in y.numpy().T)
    total = np.logaddexp.reduce(list(logs.values()))
    return {pattern: float(np.exp(log - total)) for pattern, log in logs.items()}


def pattern_probabilities(w: Tensor, loc: float = 0.0) -> dict[tuple[int, ...], float]:
    """The same from weights ``[draws, 6, 3]``: given weights, indicators are independent."""
    density = SpikeAndSlab(NARROW, WIDE, inclusion=RATE, group="input", loc=loc).elements(0.0, w[0], None)
    inside = density.log_odds(w).sigmoid()
    found = {}
    for pattern in itertools.product((0, 1), repeat=3):
        chosen = torch.tensor(pattern, dtype=torch.bool)
        found[pattern] = float(torch.where(chosen, inside, 1 - inside).prod(-1).mean())
    return found


def moved(model: Any, start: Tensor, steps: int, **options: Any) -> Tensor:
    """Weights of chains ``[chains, 6, 3]`` after so many steps."""
    kernel = SGHMCEM(model, step_size=0.04, friction=0.1, thinning=steps, **options)
    kernel.chains = len(start)
    torch.manual_seed(0)
    kernel.setup(0)
    return kernel.sample({"w": start})["w"]


@pytest.mark.parametrize("loc", [0.0, -0.3])
def test_all_patterns_of_a_linear_model_have_their_exact_probabilities(loc: float) -> None:
    """Proves on 1000 independent chains, half of them from the slab and half from the spike, that the law after 400
    steps is the posterior: each of the eight probabilities within four standard errors, at most .064. Without swaps
    both halves stay where they began."""
    x, y = regression()
    exact = exact_patterns(x, y)
    assert sum(0.03 < p < 0.9 for p in exact.values()) >= 4
    torch.manual_seed(1)
    start = torch.randn(1000, OUTPUTS, 3, dtype=torch.float64) + loc
    start[500:] = NARROW * (start[500:] - loc) + loc
    w = moved(linear(x, y, loc), start, 400, swap_every=5)
    found = pattern_probabilities(w, loc)
    for pattern, p in exact.items():
        assert found[pattern] == pytest.approx(p, abs=4 * (p * (1 - p) / 1000) ** 0.5 + 0.005)
    for half in (w[:500], w[500:]):
        assert pattern_probabilities(half, loc)[0, 1, 0] == pytest.approx(exact[0, 1, 0], abs=0.1)
    stuck = moved(linear(x, y, loc), start, 400, swap_every=None)
    apart = [pattern_probabilities(half, loc)[0, 0, 0] for half in (stuck[:500], stuck[500:])]
    assert apart[1] - apart[0] > 0.3


@pytest.mark.parametrize(("temperature", "target"), [(1.0, 0.75), (0.5, 1.0)])
def test_the_temperature_divides_energies_and_not_the_jacobian(temperature: float, target: float) -> None:
    """One group, y = w + noise: at T = 1/2 the prior squared is a mixture of three Gaussians, and all is closed form.

    The mean of ``|w|^2`` of 2000 chains within four standard errors."""
    y = torch.full((OUTPUTS, 1), target, dtype=torch.float64)
    noise = 0.5

    def model() -> None:
        w = pyro.sample("w", SpikeAndSlab(NARROW, WIDE, RATE, "input").elements(0.0, torch.zeros_like(y), None))
        pyro.sample("y", dist.Normal(w, noise).to_event(2), obs=y)

    # terms of prior^(1/T): log weight, and the precision and log density at 0 of one coordinate
    slab, spike = stats.norm(0, WIDE), stats.norm(0, NARROW)
    terms = [(np.log(RATE), [slab]), (np.log(1 - RATE), [spike])]
    if temperature == 0.5:
        terms = [(a + b, one + two) for (a, one), (b, two) in itertools.product(terms, repeat=2)]
    logs, squares = [], []
    for weight, parts in terms:
        # a product of Gaussians in w: prior terms at 0, and the likelihood to the power 1/T at y
        precision = sum(part.std() ** -2 for part in parts) + noise**-2 / temperature
        pull = target * noise**-2 / temperature
        at_zero = sum(part.logpdf(0) for part in parts) + stats.norm(target, noise).logpdf(0) / temperature
        logs.append(weight + OUTPUTS * (at_zero + 0.5 * pull**2 / precision + 0.5 * np.log(2 * np.pi / precision)))
        squares.append(OUTPUTS * (1 / precision + (pull / precision) ** 2))
    share = np.exp(np.array(logs) - np.logaddexp.reduce(logs))
    torch.manual_seed(2)
    start = torch.randn(2000, OUTPUTS, 1, dtype=torch.float64)
    start[::2] *= NARROW
    w = moved(model, start, 300, swap_every=5, temperature=temperature)
    found = w.square().sum((1, 2))
    assert 0.1 < share[0] < 0.9
    assert float(found.mean()) == pytest.approx(float(share @ squares), abs=4 * float(found.std()) / 2000**0.5)


GROUPS, SIZE, ROWS = 400, 4, 3
MANY = SpikeAndSlab(0.2, 1.0, inclusion=0.4, group="input")


@pytest.mark.parametrize("temperature", [0.5, pytest.param(1.0, marks=pytest.mark.slow)])
def test_geweke(temperature: float) -> None:
    """Data given weights, weights given data by one sweep and a few steps, in turn: 400 independent groups keep their
    prior. Swaps that believe in another temperature leave it, and are told apart by the same statistic."""

    def prior() -> Any:
        return MANY.elements(0.0, torch.zeros(SIZE, GROUPS, dtype=torch.float64), None)

    def model(y: Tensor) -> None:
        w = pyro.sample("w", prior())
        pyro.sample("y", dist.Normal(w.expand(ROWS, SIZE, GROUPS), 0.8).to_event(3), obs=y)

    torch.manual_seed(0)
    kernel = SGHMCEM(model, step_size=0.05, friction=0.2, thinning=10, swap_every=10, capture=True)
    w = prior().sample()
    for _ in range(15):
        y = w + 0.8 * torch.randn(ROWS, SIZE, GROUPS, dtype=torch.float64)
        kernel.setup(0, y)
        assert kernel.swaps is not None
        kernel.swaps.count, kernel.swaps.temperature = GROUPS, temperature
        w = kernel.sample({"w": w})["w"]

    def cdf(square: np.ndarray) -> np.ndarray:
        return 0.4 * stats.chi2(SIZE).cdf(square) + 0.6 * stats.chi2(SIZE).cdf(square / 0.04)

    pvalue = stats.kstest(w.square().sum(0).numpy(), cdf).pvalue
    assert pvalue > 0.01 if temperature == 1 else pvalue < 0.01


# ----------------------------------------------------------------------------------------- networks, and where it stops


def network(*layers: nn.Module, group: Any = "input") -> tuple[pb.models.SpikeSlab, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    x = torch.randn(60, 5)
    y = x[:, :1] + 0.3 * torch.randn(60, 1)
    net = nn.Sequential(nn.Linear(5, 8), *layers, nn.Tanh(), nn.Linear(8, 1))
    prior = {r"0\.weight": SpikeAndSlab(0.05, 1.0, 0.3, group), ".*": pb.priors.Normal(0.0, 0.5)}
    return pb.models.SpikeSlab(net, pb.likelihoods.Gaussian(scale=0.3), 60, prior=prior), (x, y)


def set_up(model: Any, data: Any, warmup: int = 200, **options: Any) -> SGHMCEM:
    kernel = SGHMCEM(model, data, step_size=0.05, friction=0.1, **options)
    kernel.setup(warmup)
    return kernel


def test_swaps_are_made_by_default_where_they_pay() -> None:
    model, data = network()
    kernel = set_up(model, data)
    assert kernel.swaps is not None and kernel.swaps.count == 5 and kernel.is_annealing
    assert set_up(model, data, warmup=50).swaps is None  # five visits of each group
    assert set_up(model, data, swap_every=0).swaps is None
    short = set_up(model, data, warmup=50, swap_every=10)
    assert short.swaps is not None and short.is_annealing
    assert not set_up(model, data, anneal=None).is_annealing


def test_the_large_selection_problems_are_left_as_they_were() -> None:
    """Proves that the settings of examples/variable_selection.py have neither swaps nor annealing."""
    x, y = torch.randn(10240, 1000), torch.randn(10240, 1)
    net = nn.Sequential(nn.Linear(1000, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1))
    prior = {r"0\.weight": SpikeAndSlab(0.1, 0.7, dist.Beta(2.0, 50.0), "input"), ".*": pb.priors.Normal(0.0, 1.0)}
    model = pb.models.SpikeSlab(net, pb.likelihoods.Gaussian(scale=1.0), 10240, prior=prior)
    for warmup in (400, 1000):
        kernel = set_up(model, (x, y), warmup, batch_size=1024, thinning=10, prune="inclusion", prune_every=100)
        assert kernel.swaps is None and not kernel.is_annealing


@pytest.mark.parametrize(
    ("layers", "options", "said"),
    [
        ((), {"e_step": "hard"}, "soft"),
        ((), {"temperature": 0.0}, "above 0"),
        ((nn.BatchNorm1d(8),), {}, "whole batch"),
        ((nn.BatchNorm1d(8, track_running_stats=False),), {}, "no sum over rows"),
        ((nn.Dropout(0.3),), {}, "another likelihood at each call"),
    ],
)
def test_swaps_that_would_not_be_exact_are_refused(layers: Any, options: dict[str, Any], said: str) -> None:
    """Proves that they are refused where they were asked for, and not made where they were not."""
    model, data = network(*layers)
    assert set_up(model, data, **options).swaps is None
    with pytest.raises(ValueError, match=said):
        set_up(model, data, swap_every=10, **options)


def test_swaps_need_rows_in_memory_and_groups_of_several_weights() -> None:
    model, data = network()
    loader = DataLoader(TensorDataset(*data), batch_size=20, shuffle=True)
    assert set_up(model, loader).swaps is None
    with pytest.raises(ValueError, match="rows in memory"):
        set_up(model, loader, swap_every=10)
    model, data = network(group="weight")
    assert set_up(model, data).swaps is None
    with pytest.raises(ValueError, match="one weight"):
        set_up(model, data, swap_every=10)


def test_a_model_that_draws_its_own_subsamples_is_refused() -> None:
    x, y = regression()

    def model() -> None:
        prior = SpikeAndSlab(NARROW, WIDE, RATE, "input")
        w = pyro.sample("w", prior.elements(0.0, torch.zeros(OUTPUTS, 3, dtype=torch.float64), None))
        with pyro.plate("rows", 10, subsample_size=4) as index:
            pyro.sample("y", dist.Normal(x[index] @ w.mT, NOISE).to_event(1), obs=y[index])

    with pytest.raises(ValueError, match="another likelihood at each call"):
        set_up(model, None, swap_every=10)


def test_what_was_removed_is_not_visited() -> None:
    """Proves that removed columns stay at 0 while swaps go on, in each chain those that it removed."""
    model, data = network()
    kernel = SGHMCEM(
        model, data, step_size=0.05, friction=0.1, swap_every=2, prune=MagnitudeRule(0.6), thinning=5, batch_size=16
    )
    w = sample(kernel, 20, 30, num_chains=2, progress=False, seed=0).draws(40)["0.weight"].reshape(2, 20, 8, 5)
    gone = (w == 0).all(2)
    assert torch.equal(gone, gone[:, :1].expand_as(gone)) and gone[:, 0].sum(-1).tolist() == [3, 3]
    assert 0 < kernel.diagnostics()["swaps accepted"] < 1


@pytest.mark.parametrize("size", [16, 60])
def test_the_likelihood_is_that_of_all_rows(size: int) -> None:
    """Proves that the energy of a swap does not depend on the batch size, and is that of the whole data."""
    model, data = network()
    kernel = set_up(model, data, batch_size=size, swap_every=10, anneal=None)
    assert kernel.swaps is not None
    whole = kernel.potential(kernel.potential.split(kernel.theta), *data)
    torch.testing.assert_close(kernel.swaps.energy(kernel.theta), whole.detach())


@pytest.mark.parametrize(("swap_every", "error"), [(-1, ValueError), (1.5, ValueError), ("often", TypeError)])
def test_bad_counts_are_refused(swap_every: Any, error: type[Exception]) -> None:
    model, data = network()
    with pytest.raises(error, match="swap_every"):
        SGHMCEM(model, data, step_size=0.05, friction=0.1, swap_every=swap_every)
