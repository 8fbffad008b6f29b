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
