"""Plain networks with the weights of one draw: each gives what the posterior predicts with that draw."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn.likelihoods import Categorical, Gaussian
from pyro_bnn.models import (
    Bella,
    CodebookGuide,
    Dense,
    MeanFieldGuide,
    ParticleGuide,
    Rank1,
    Rank1Guide,
    SharedWeights,
    SpikeSlab,
    WeightSharing,
)

N = 16


def network() -> nn.Sequential:
    torch.manual_seed(0)
    convolutions = (nn.Conv2d(2, 4, 3, groups=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    net = nn.Sequential(*convolutions, nn.Linear(4 * 16, 5), nn.LayerNorm(5), nn.Linear(5, 3)).double()
    net.train()(data()[0])  # statistics that are not those of a new layer
    return net


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, 2, 6, 6, generator=generator, dtype=torch.float64), torch.arange(N) % 3


def trained(model: Any, guide: Any) -> pb.Posterior:
    return pb.inference.fit(model, guide, data(), epochs=2, batch_size=8, progress=False, seed=0)


def rank1() -> pb.Posterior:
    model = Rank1(network(), Categorical(), N, clip=1.2)
    return trained(model, Rank1Guide(model, 3, init_dropout_rate=0.2))


def dense() -> pb.Posterior:
    model = Dense(network(), Categorical(), N)
    return trained(model, MeanFieldGuide(model, 2, init_scale=0.2))


def bella() -> pb.Posterior:
    model = Bella(network(), Categorical(), N, affine=True, head="6")
    guide = ParticleGuide(model, 3, init_scale=0.3)
    return pb.inference.SVGD(model, guide).fit(data(), 2, progress=False, seed=0)


def spike_slab() -> pb.Posterior:
    model = SpikeSlab(network(), Categorical(), N)
    return pb.inference.sample(pb.inference.SGLD(model, data(), step_size=0.01, batch_size=8), 4, 2, progress=False)


def codebook() -> pb.Posterior:
    model = WeightSharing(network(), Categorical(), N)
    return trained(model, CodebookGuide(model, 6, init_scale=0.1))


def shared() -> pb.Posterior:
    model = WeightSharing(network(), Categorical(), N)
    book = CodebookGuide(model, 6, init_scale=0.1, outliers=0.05).book
    values = SharedWeights(network(), Categorical(), N, codebook=book)
    return trained(values, values.shared_guide(init_scale=0.1))


def ensemble() -> pb.Posterior:
    return pb.inference.DeepEnsemble(network(), Categorical(), N, num_networks=3).fit(
        data(), epochs=2, batch_size=8, progress=False, seed=0
    )


METHODS = (rank1, dense, bella, spike_slab, codebook, shared, ensemble)


@pytest.mark.parametrize("make", METHODS, ids=lambda f: f.__name__)
def test_a_plain_network_gives_what_the_posterior_predicts_with_its_draw(make: Callable[[], pb.Posterior]) -> None:
    posterior = make()
    n = 1 if posterior.is_deterministic else 3
    networks = posterior.networks(n, seed=4)
    x = data()[0]
    outputs = posterior.predict(x, n, seed=4).outputs
    samples, draws = posterior.sample(n, seed=4), posterior.draws(n, seed=4)
    assert len(networks) == n
    for i, net in enumerate(networks):
        assert not any(part.training for part in net.modules())
        own = [
            m for m in range(posterior.num_members) if all(torch.equal(samples[s][i], draws[s][i, m]) for s in draws)
        ]
        assert len(own) == 1
        torch.testing.assert_close(net(x), outputs[i, own[0]], rtol=1e-9, atol=1e-9)


def test_networks_have_the_statistics_with_which_their_draws_predict() -> None:
    posterior = dense()
    x = data()[0]
    before = posterior.networks(1, seed=0)[0](x)
    posterior.recompute_statistics([x[:8], x[8:]])
    outputs = posterior.predict(x, 1, seed=0).outputs[0]
    after = posterior.networks(1, seed=0)[0](x)
    assert not torch.allclose(before, after)
    assert any(torch.allclose(after, own, rtol=1e-9, atol=1e-9) for own in outputs)


def test_networks_are_copies_that_leave_the_posterior_and_the_users_network_alone() -> None:
    net = network()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    model = Bella(net, Categorical(), N)
    posterior = pb.Posterior(model, ParticleGuide(model, 2, init_scale=0.3))
    outputs = posterior.predict(data()[0]).outputs
    first, second = posterior.networks(2, seed=0)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(posterior.predict(data()[0]).outputs, outputs)
    assert float(second(data()[0]).detach().abs().max()) > 0


def test_tied_weights_stay_tied_in_a_plain_network() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.out.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.out(self.table(x)).mean(1)
            return y

    x = torch.arange(12).reshape(4, 3) % 7
    model = Rank1(Tied().double(), Categorical(), 4, prior=pb.priors.Normal(1.0, 0.3))
    posterior = pb.Posterior(model, Rank1Guide(model, 1, init_dropout_rate=0.2))
    (net,) = posterior.networks(1, seed=2)
    assert isinstance(net, Tied) and net.out.weight is net.table.weight
    torch.testing.assert_close(net(x), posterior.predict(x, 1, seed=2).outputs[0, 0], rtol=1e-9, atol=1e-9)


def test_draws_that_are_no_weights_have_no_networks() -> None:
    net = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.3), nn.Linear(4, 1))
    x, y = torch.randn(8, 2), torch.randn(8)
    dropout = pb.inference.MCDropout(net, Gaussian(0.1), 8).fit((x, y))
    with pytest.raises(TypeError, match="mask for each unit.*predict"):
        dropout.networks(2)

    def program(x: Any, y: Any = None) -> None: ...

    with pytest.raises(TypeError, match="models of this package.*program"):
        pb.Posterior(program, program).networks(2)
