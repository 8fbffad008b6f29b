"""Batches of predictions: every batch has the functions that ``predict`` gives, which a guide makes once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn.inference import LastLayerLaplace, MCDropout
from pyro_bnn.models import Bella, Dense, MeanFieldGuide, ParticleGuide, Rank1, Rank1Guide
from pyro_bnn.posterior import draw_source
from pyro_bnn.predicting import predict_batches, with_draws

X, Y = torch.randn(10, 4, generator=torch.Generator().manual_seed(0)), torch.arange(10) % 3
LIKELIHOOD = pb.likelihoods.Categorical()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


def rank_one() -> pb.Posterior:
    model = Rank1(network(), LIKELIHOOD, 10)
    return pb.Posterior(model, Rank1Guide(model, components=2))


def mean_field() -> pb.Posterior:
    model = Dense(network(), LIKELIHOOD, 10)
    return pb.Posterior(model, MeanFieldGuide(model))


def particles() -> pb.Posterior:
    model = Bella(network(), LIKELIHOOD, 10, rank=1)
    return pb.Posterior(model, ParticleGuide(model, 3))


def of_pyro() -> pb.Posterior:
    model = Dense(network(), LIKELIHOOD, 10)
    guide = AutoNormal(model)
    guide(X, Y)
    return pb.Posterior(model, guide, example=X)


def scaled() -> pb.Posterior:
    posterior = mean_field()
    likely = posterior.predict(X, 3, seed=0).probs.argmax(-1)
    return pb.diagnostics.scale_temperature(
        posterior, (X, likely.where(torch.arange(10) > 1, (likely + 1) % 3)), seed=0
    )


def dropped() -> pb.Posterior:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.ReLU(), nn.Linear(5, 3))
    return MCDropout(net, LIKELIHOOD, 10).fit((X, Y), epochs=1, seed=0, progress=False)


def last_layer() -> pb.Posterior:
    return LastLayerLaplace(network(), LIKELIHOOD, 10).fit((X, Y), epochs=1, seed=0, progress=False)


def codes() -> pb.Posterior:
    shared = pb.models.WeightSharing(network(), LIKELIHOOD, 10)
    return pb.Posterior(shared, pb.models.CodebookGuide.from_network(shared, codes=3))


@pytest.mark.parametrize("make", [rank_one, mean_field, particles, of_pyro, scaled, dropped, last_layer, codes])
def test_every_batch_has_the_bits_of_predict(make: Callable[[], pb.Posterior]) -> None:
    posterior = make()
    for x, prediction, _ in predict_batches(posterior, (X, Y), num_samples=3, batch_size=4, seed=7):
        alone = posterior.predict(x, 3, batch_size=4, seed=7)
        assert torch.equal(prediction.outputs, alone.outputs)
        assert torch.equal(prediction.probs, alone.probs)


def test_draws_are_made_once_where_they_fit_and_anew_where_not(monkeypatch: pytest.MonkeyPatch) -> None:
    posterior, made = mean_field(), 0
    traced = draw_source._traced

    def counted(draw: Callable[[], None], like: Tensor) -> object:
        nonlocal made
        made += 1
        return traced(draw, like)

    monkeypatch.setattr(draw_source, "_traced", counted)
    settings = {"num_samples": 3, "batch_size": 2, "seed": 7}
    whole = [p.outputs for _, p, _ in predict_batches(posterior, (X, Y), **settings)]
    assert len(whole) == 5 and made == 1
    monkeypatch.setattr(draw_source, "MAX_ELEMENTS", 100)  # of 43 numbers, two draws are a group
    assert with_draws(posterior, 8, 7) is not posterior and with_draws(posterior, 9, 7) is posterior
    monkeypatch.setattr(draw_source, "HELD_GROUPS", 1)
    assert with_draws(posterior, 3, 7) is posterior
    made = 0
    assert len(list(predict_batches(posterior, (X, Y), **settings))) == 5
    assert made == 2 * 5
