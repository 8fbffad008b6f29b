"""What `check` says of inclusion: chains apart, a spike that holds effects, inputs that are included for nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_bnn as pb
from pyro_bnn.diagnostics import Findings, check
from pyro_bnn.priors import SpikeAndSlab

NOISE = 0.5


def posterior(weights: Tensor, chains: int = 1) -> pb.Posterior:
    """Of draws ``[n, 3]`` of a linear network whose columns are groups."""
    prior = SpikeAndSlab(0.1, 1.0, inclusion=0.5, group="input")
    model = pb.models.SpikeSlab(nn.Linear(3, 1, bias=False), pb.likelihoods.Gaussian(NOISE), 200, prior=prior)
    return pb.Posterior.from_draws(model, {"weight": weights.reshape(len(weights), 1, 1, 3)}, chains)


def rows(effect: float = 0.6, seed: int = 1) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    x = torch.randn(200, 3)
    return x, x[:, :1] + effect * x[:, 1:2] + NOISE * torch.randn(200, 1)


def draws(second: float) -> Tensor:
    torch.manual_seed(2)
    return torch.tensor([1.0, second, 0.0]) + 0.02 * torch.randn(40, 3)


def of_inclusion(found: Findings) -> dict[str, str]:
    """``{message: severity}``."""
    return {finding.message: finding.severity for finding in found if finding.topic == "inclusion"}


def test_a_fit_that_is_right_is_good() -> None:
    x, y = rows()
    found = of_inclusion(check(posterior(draws(0.6), 2), rows(seed=3), x_train=x, y_train=y))
    assert list(found.values()) == ["good"] * 3


def test_a_spike_that_holds_an_effect_is_a_problem() -> None:
    """Proves that an input in the spike that costs the training data more than .05 nats is reported as a problem."""
    x, _ = rows()
    weights = draws(0.0)
    weights[:, 1] = 0.12  # P(slab) is below 1/2
    assert float(posterior(weights).inclusion_probabilities()["weight"][1]) < 0.5
    wide = torch.cat([x[:, :1], 6 * x[:, 1:2], x[:, 2:]], 1)  # an input of a large scale: .12 x 6 matters
    target = wide @ torch.tensor([[1.0], [0.12], [0.0]]) + NOISE * torch.randn(200, 1)
    found = of_inclusion(check(posterior(weights), x_train=wide, y_train=target))
    (message,) = [m for m, severity in found.items() if severity == "problem"]
    assert "The spike holds effects" in message


def test_an_input_that_is_included_for_nothing_is_a_warning() -> None:
    """Proves that the column is named, from data in memory and from a loader alike."""
    weights = draws(0.6)
    weights[:, 2] = 0.5 * torch.tensor([1.0, -1.0]).repeat(20)  # in the slab, its sign left and right
    pair = rows(seed=3)
    for data in (pair, DataLoader(TensorDataset(*pair), batch_size=64)):
        found = of_inclusion(check(posterior(weights), data))
        (message,) = [m for m, severity in found.items() if severity == "warning"]
        assert "1 of 3 included inputs" in message and "weight[2]" in message


def with_a_binary_input(between: nn.Module | None = None) -> pb.Posterior:
    """``y = x_0 + .8 (|c x_1 + b| - 1)`` in draws with c = +-1, of x_1 = +-1: worth nothing as long as x_1 is +-1."""
    net = nn.Sequential(*([] if between is None else [between]), nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    first, last = ("0", "2") if between is None else ("1", "3")
    prior = {rf"{first}\.weight": SpikeAndSlab(0.1, 1.0, 0.5, "input"), ".*": pb.priors.Normal()}
    model = pb.models.SpikeSlab(net, pb.likelihoods.Gaussian(NOISE), 200, prior=prior)
    sign = torch.tensor([1.0, -1.0]).repeat(10)
    weight = torch.zeros(20, 3, 2)
    weight[:, 0, 0], weight[:, 1, 1], weight[:, 2, 1] = 1.0, sign, -sign
    draws = {f"{first}.weight": weight, f"{first}.bias": torch.tensor([5.0, 0.0, 0.0]).expand(20, 3)}
    draws |= {
        f"{last}.weight": torch.tensor([[1.0, 0.8, 0.8]]).expand(20, 1, 3),
        f"{last}.bias": torch.full((20, 1), -5.8),
    }
    return pb.Posterior.from_draws(model, {name: value.unsqueeze(1) for name, value in draws.items()})


@pytest.mark.parametrize("between", [None, nn.Flatten()], ids=["direct", "flattened"])
def test_a_binary_input_that_is_included_for_nothing_is_a_warning(between: nn.Module | None) -> None:
    """Proves that an input is judged among its own values: put to 0, which it never is, this one seems to matter."""
    torch.manual_seed(5)
    x = torch.cat([torch.randn(300, 1), torch.randint(2, (300, 1)) * 2.0 - 1], 1)
    y = x[:, :1] + NOISE * torch.randn(300, 1)
    whole = with_a_binary_input(between)
    name = next(iter(whole.inclusion_probabilities()))
    found = whole.importance(x, y)[name]
    assert float(found.loss[1]) > 5 * float(found.error[1]), "at 0 it seems to matter"
    rows = x if between is None else x.unsqueeze(1)
    for data in ((rows, y), DataLoader(TensorDataset(rows, y), batch_size=50)):
        (message,) = [m for m, severity in of_inclusion(check(whole, data)).items() if severity == "warning"]
        assert "1 of 2 included inputs" in message and f"{name}[1]" in message


def test_rows_one_by_one_are_judged_at_zero() -> None:
    """Proves that a loader of single rows, which cannot be shuffled, does not make every input look idle."""
    x, y = rows()
    found = of_inclusion(check(posterior(draws(0.6)), DataLoader(TensorDataset(x[:60], y[:60]), batch_size=1)))
    assert list(found.values()) == ["good"]


def test_a_later_layer_is_put_to_zero() -> None:
    """Proves that the columns of a layer that reads something else than x are judged without shuffling x."""
    prior = {r"2\.weight": SpikeAndSlab(0.1, 1.0, 0.5, "input"), ".*": pb.priors.Normal()}
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Tanh(), nn.Linear(2, 1, bias=False))
    model = pb.models.SpikeSlab(net, pb.likelihoods.Gaussian(NOISE), 200, prior=prior)
    crossed = {
        "0.weight": torch.eye(2).flip(0).expand(10, 1, 2, 2),
        "2.weight": torch.tensor([[2.0, 1.0]]).expand(10, 1, 1, 2),
    }
    torch.manual_seed(6)
    x = torch.randn(300, 2)
    y = 2 * x[:, 1:].tanh() + NOISE * torch.randn(300, 1)  # the column 0 of the second layer, fed by x_1
    found = of_inclusion(check(pb.Posterior.from_draws(model, crossed), (x, y)))
    (message,) = [m for m, severity in found.items() if severity == "warning"]
    assert "2.weight[1]" in message and "2.weight[0]" not in message


def test_chains_that_do_not_agree_are_a_warning() -> None:
    weights = draws(0.6)
    weights[20:, 2] = 1.0
    found = of_inclusion(check(posterior(weights, 2)))
    (message,) = [m for m, severity in found.items() if severity == "warning"]
    assert "differ by at most 0.91" in message and "1 of weight" in message


def test_networks_without_such_a_prior_have_no_finding() -> None:
    model = pb.models.Dense(nn.Linear(3, 1, bias=False), pb.likelihoods.Gaussian(NOISE), 200, prior=pb.priors.Normal())
    plain = pb.Posterior.from_draws(model, {"weight": draws(0.6).reshape(40, 1, 1, 3)})
    x, y = rows()
    assert of_inclusion(check(plain, (x, y), x_train=x, y_train=y)) == {}


@pytest.mark.parametrize("group", ["weight", "output"])
def test_other_groups_are_checked_as_a_whole_alone(group: str) -> None:
    prior = SpikeAndSlab(0.1, 1.0, inclusion=0.5, group=group)  # type: ignore[arg-type]
    model = pb.models.SpikeSlab(nn.Linear(3, 1, bias=False), pb.likelihoods.Gaussian(NOISE), 200, prior=prior)
    x, y = rows()
    found = check(
        pb.Posterior.from_draws(model, {"weight": draws(0.6).reshape(40, 1, 1, 3)}), (x, y), x_train=x, y_train=y
    )
    assert len(of_inclusion(found)) == 1
