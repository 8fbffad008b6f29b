"""Statistics of normalisation layers that were computed anew, in everything that predicts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import pyro_bnn as pb
from pyro_bnn.diagnostics import evaluate
from pyro_bnn.inference import fit
from pyro_bnn.models import Dense, MeanFieldGuide


def test_evaluation_predicts_with_the_statistics_that_were_asked_for() -> None:
    """Proves that evaluating, storing draws and networks of draws all follow ``recompute_statistics``, and its end."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 3) * 5 + 3, torch.randint(0, 2, (64,))
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    model = Dense(net, pb.likelihoods.Categorical(), 64)
    posterior = fit(model, MeanFieldGuide(model), (x, y), epochs=1, seed=0, progress=False)

    def nll_by_prediction() -> float:
        density = posterior.predict(x, seed=0).log_prob(y).logsumexp((0, 1)) - math.log(16)
        return -float(density.mean())

    before = nll_by_prediction()
    assert evaluate(posterior, (x, y), seed=0)["nll"] == pytest.approx(before, rel=1e-5)
    posterior.recompute_statistics([(x, y)])
    after = nll_by_prediction()
    assert abs(after - before) > 0.01
    assert evaluate(posterior, (x, y), seed=0)["nll"] == pytest.approx(after, rel=1e-5)
    stored = posterior.as_draws(16, seed=0)
    torch.testing.assert_close(stored.predict(x).outputs, posterior.predict(x, seed=0).outputs)
    torch.testing.assert_close(posterior.networks(1, seed=0)[0](x), posterior.predict(x, 1, seed=0).outputs[0, 0])
    posterior.recompute_statistics(None)
    assert evaluate(posterior, (x, y), seed=0)["nll"] == pytest.approx(before, rel=1e-5)


class Rounding(nn.Module):
    """A network that writes into its weight in each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.layer.weight.mul_(0.5)
        f: torch.Tensor = self.layer(x)
        return f


@pytest.mark.parametrize("writes", [False, True])
def test_a_network_that_writes_into_its_weights_does_not_change_stored_draws(writes: bool) -> None:
    """Proves that stored draws are lent without a copy only after the network was seen not to write into them."""
    torch.manual_seed(0)
    x, y = torch.randn(40, 3), torch.randint(0, 2, (40,))
    model = Dense(Rounding() if writes else nn.Linear(3, 2), pb.likelihoods.Categorical(), 40)
    draws = {site.name: torch.randn(4, *site.shape) for site in model.sites()}
    posterior = pb.Posterior.from_draws(model, {name: value.clone() for name, value in draws.items()})
    first = posterior.predict(x).outputs
    for _ in range(3):
        assert torch.equal(posterior.predict(x).outputs, first)
        evaluate(posterior, (x, y), batch_size=8, seed=0)
    for name, value in posterior.draws(4).items():
        assert torch.equal(value[:, 0], draws[name])
    assert posterior.draw_source.lends_views is not writes
