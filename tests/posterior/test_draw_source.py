"""How many draws are taken when nobody says, and of which shape they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pyro_bnn as pb
from pyro_bnn.posterior import draw_source
from pyro_bnn.posterior.draw_source import POSTERIOR_DRAWS, PREDICTION_DRAWS


def model() -> pb.models.Dense:
    return pb.models.Dense(nn.Linear(2, 3), pb.likelihoods.Categorical(), 10)


def stored(n: int) -> pb.Posterior:
    dense = model()
    return pb.Posterior.from_draws(dense, {site.name: torch.zeros(n, *site.shape) for site in dense.sites()})


@pytest.mark.parametrize(
    ("draws", "asked", "for_prediction", "for_posterior"),
    [
        (None, None, PREDICTION_DRAWS, POSTERIOR_DRAWS),
        (None, 7, 7, 7),
        (5, None, 5, 5),
        (40, None, PREDICTION_DRAWS, 40),
        (200, None, PREDICTION_DRAWS, 200),
        (200, 7, 7, 7),
    ],
)
def test_predictions_take_a_few_draws_and_descriptions_of_the_posterior_all_that_are_stored(
    draws: int | None, asked: int | None, for_prediction: int, for_posterior: int
) -> None:
    dense = model()
    posterior = pb.Posterior(dense, pb.models.MeanFieldGuide(dense)) if draws is None else stored(draws)
    assert posterior.draw_source.count(asked) == for_prediction
    assert posterior.draw_source.count_all(asked, POSTERIOR_DRAWS) == for_posterior
    assert len(posterior.predict(torch.zeros(1, 2), asked).outputs) == for_prediction


def test_points_are_drawn_once_whatever_is_asked() -> None:
    dense = model()
    source = pb.Posterior(dense, pb.models.PointGuide(dense)).draw_source
    assert [source.count(), source.count(9), source.count_all(None, 100), source.count_all(9, 100)] == [1, 1, 1, 1]


def test_no_draws_at_all_are_refused() -> None:
    """Proves that 0 is not taken for "nobody said"."""
    dense = pb.models.SpikeSlab(nn.Linear(2, 3), pb.likelihoods.Categorical(), 10)
    draws = {site.name: torch.zeros(4, *site.shape) for site in dense.sites()}
    with pytest.raises(ValueError, match="num_samples=0: expected a whole number, at least 1"):
        pb.Posterior.from_draws(dense, draws).inclusion_probabilities(0)


def test_draws_that_a_guide_does_not_repeat_are_repeated() -> None:
    """Proves that values without the axes of draws and members, or with one for all, get them, and others are kept."""
    shape = torch.Size((4, 2, 1, 3))
    for own in ((3,), (2, 1, 3), (1, 2, 1, 3), (4, 1, 1, 3)):
        value = torch.randn(own)
        found = draw_source._broadcast(value, shape)
        assert found.shape == shape
        assert torch.equal(found, value + torch.zeros(shape))
    wider = torch.randn(4, 5, 1, 3)  # members of which the model has not been told
    assert draw_source._broadcast(wider, torch.Size((4, 1, 1, 3))).shape == wider.shape
    whole = torch.randn(shape)
    assert draw_source._broadcast(whole, shape) is whole
