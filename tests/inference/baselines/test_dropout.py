"""Monte Carlo dropout: masks by hand, their law in training, and draws that are functions."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn.inference.baselines.dropout import DropoutGuide, DropoutNetwork, MCDropout
from pyro_bnn.likelihoods import Categorical, Gaussian
from pyro_bnn.priors import Normal

N = 48


def inputs(*shape: int) -> Tensor:
    return torch.randn(N, *(shape or (2,)), generator=torch.Generator().manual_seed(0))


def classes() -> Tensor:
    return (inputs()[:, 0] > 0).long() + (inputs()[:, 1] > 0.5).long()


def seeded(make: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return make()


def mlp() -> Any:
    return seeded(lambda: nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Dropout(0.25), nn.Linear(4, 3)))


def normalised() -> Any:
    def make() -> nn.Module:
        return nn.Sequential(
            *(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout2d(0.2)),
            *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.1), nn.Linear(16, 3)),
        )

    return seeded(make)


def taken(net: nn.Module, x: Tensor | None = None) -> pb.Posterior:
    """Of a network as it is."""
    x = inputs() if x is None else x
    return MCDropout(net, Categorical(), N).fit((x, classes()))


# --------------------------------------------------------------------------------------------------- the masks


def test_a_draw_is_the_network_with_its_weights_masked() -> None:
    """``W diag(m) / (1 - p)`` in the layer after the dropout, by hand."""
    net, x = mlp(), inputs()
    posterior = taken(net)
    masks = posterior.draws(20, seed=0)["2.mask"][:, 0]
    assert masks.shape == (20, 4)
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    hidden = net[1](net[0](x))
    weights = net[3].weight * masks[:, None, :] / 0.75
    expected = torch.einsum("nh,soh->sno", hidden, weights) + net[3].bias
    outputs = posterior.predict(x, num_samples=20, seed=0).outputs
    torch.testing.assert_close(outputs[:, 0], expected, rtol=1e-5, atol=1e-6)
    for rows in (1, 7):  # a draw is one function, whatever the batches are
        again = posterior.predict(x, num_samples=20, seed=0, batch_size=rows).outputs
        torch.testing.assert_close(again, outputs, rtol=1e-5, atol=1e-6)


def test_the_prediction_is_the_average_over_all_masks() -> None:
    """Of S draws, within 5 / (2 sqrt(S)) of the sum over the 16 masks with their probabilities."""
    net, x = mlp(), inputs()
    hidden, exact = net[1](net[0](x)), torch.zeros(N, 3)
    for mask in itertools.product((0.0, 1.0), repeat=4):
        probability = math.prod(0.75 if m else 0.25 for m in mask)
        exact += probability * net[3](hidden * torch.tensor(mask) / 0.75).softmax(-1).detach()
    probs = taken(net).predict(x, num_samples=5000, seed=0).probs
    assert (probs - exact).abs().max() < 5 / (2 * math.sqrt(5000))


@pytest.mark.parametrize(
    ("module", "shape", "mask"),
    [
        (nn.Dropout(0.3), (6,), (6,)),
        (nn.Dropout(0.3), (4, 3, 3), (4, 3, 3)),
        (nn.Dropout1d(0.3), (4, 5), (4, 1)),
        (nn.Dropout2d(0.3), (4, 3, 3), (4, 1, 1)),
        (nn.Dropout3d(0.3), (4, 2, 3, 3), (4, 1, 1, 1)),
        (nn.AlphaDropout(0.3), (6,), (6,)),
        (nn.FeatureAlphaDropout(0.3), (4, 3, 3), (4, 1, 1)),
    ],
)
def test_every_module_does_to_one_row_what_it_does_in_training(
    module: nn.Module, shape: tuple[int, ...], mask: tuple[int, ...]
) -> None:
    """The values that a unit takes are those of torch, and it is dropped as often."""
    size = math.prod(shape)
    net = nn.Sequential(module, nn.Flatten(), nn.Linear(size, size))
    nn.init.eye_(net[2].weight), nn.init.zeros_(net[2].bias)  # type: ignore[arg-type,operator]
    x = inputs(*shape)
    posterior = MCDropout(net, Gaussian(1.0), N).fit((x, x.flatten(1)))
    count = 1000
    draws = posterior.draws(count, seed=0)["0.mask"]
    assert draws.shape == (count, 1, *mask)
    row = posterior.predict(x[:1], num_samples=count, seed=0).outputs[:, 0, 0]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = module.train()(x[:1].expand(count, *shape)).flatten(1)
    for i in range(size):
        torch.testing.assert_close(row[:, i].unique(), theirs[:, i].unique(), rtol=1e-4, atol=1e-5)
    rate = draws.flatten(2).mean((0, 1))
    assert ((rate - 0.7).abs() < 5 * math.sqrt(0.7 * 0.3 / count)).all()


def test_a_module_that_is_called_twice_has_two_masks() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.drop = nn.Linear(2, 5), nn.Linear(5, 3), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.two(self.drop(self.one(self.drop(x))))
            return result

    net = seeded(Twice)
    posterior = taken(net)
    draws = posterior.draws(3, seed=0)
    assert {name: value.shape[2:] for name, value in draws.items()} == {"drop.mask_0": (2,), "drop.mask_1": (5,)}
    for i in range(3):
        expected = net.two(net.one(inputs() * draws["drop.mask_0"][i] * 2) * draws["drop.mask_1"][i] * 2)
        outputs = posterior.predict(inputs(), num_samples=3, seed=0).outputs[i, 0]
        torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-6)


def test_transformers_and_recurrent_networks() -> None:
    """Their own dropout modules take part; the fused paths that pass them by are not taken."""

    class Last(nn.Module):
        def __init__(self, body: nn.Module, width: int) -> None:
            super().__init__()
            self.body, self.drop, self.head = body, nn.Dropout(0.2), nn.Linear(width, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.body(x)
            h = h[0] if isinstance(h, tuple) else h
            result: Tensor = self.head(self.drop(h[:, -1]))
            return result

    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=True)
    x = inputs(5, 4)
    posterior = taken(Last(layer, 4), x)
    assert set(posterior.draws(1)) == {"body.dropout.mask", "body.dropout1.mask", "body.dropout2.mask", "drop.mask"}
    one = posterior.predict(x, num_samples=4, seed=0).outputs
    assert (one[0] - one[1]).abs().max() > 1e-3
    torch.testing.assert_close(posterior.predict(x, num_samples=4, seed=0, batch_size=5).outputs, one)
    posterior = taken(Last(nn.LSTM(4, 6, batch_first=True), 6), x)
    assert posterior.predict(x, num_samples=3, seed=0).probs.shape == (N, 3)
    with pytest.raises(ValueError, match=r"'body.dropout1' has masks for rows of shape \(5, 4\), and got \(7, 4\)"):
        taken(Last(layer, 4), x).predict(inputs(7, 4))


# ------------------------------------------------------------------------------------- networks and the package


def fitted(seed: int = 0) -> tuple[nn.Module, pb.Posterior]:
    net = normalised()
    x = inputs(1, 6, 6) + 2 * classes()[:, None, None, None]
    dropout = MCDropout(net, Categorical(), N)
    return net, dropout.fit((x, classes()), epochs=15, lr=2e-2, batch_size=16, progress=False, seed=seed)


def test_a_convolutional_network_on_disk_and_in_the_diagnostics(tmp_path: Path) -> None:
    net, posterior = fitted()
    x, y = inputs(1, 6, 6) + 2 * classes()[:, None, None, None], classes()
    posterior.save(tmp_path / "run")
    net[6].p = 0.9  # type: ignore[index]  # what is stored counts
    for other in (pb.load(tmp_path / "run", net), posterior.as_draws(4, seed=5)):
        expected = posterior.predict(x, num_samples=4, seed=5).per_member
        assert torch.equal(other.predict(x, num_samples=4, seed=5).per_member, expected)
    assert pb.diagnostics.evaluate(posterior, (x, y))["accuracy"] > 0.6
    data = pb.diagnostics.to_arviz(posterior, x, y, sites="3.mask", num_samples=20)
    assert data["posterior"]["3.mask"].shape == (1, 20, 4, 1, 1)
    assert data["log_likelihood"]["obs"].shape == (1, 20, N)
    assert len(posterior.losses) == 45


def test_training_drops_anew_for_every_row_and_prediction_does_not() -> None:
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(1, 1, bias=False))
    x = torch.ones(N, 1)
    posterior = MCDropout(net, Gaussian(1.0), N).fit((x, x), epochs=1, progress=False, seed=0)
    for one in posterior.predict(x, num_samples=10, seed=0).outputs[:, 0]:
        assert len(one.unique()) == 1


def test_model_and_guide_are_pyro_programs_with_the_densities_by_hand() -> None:
    net, x = mlp(), inputs()
    model = DropoutNetwork(net, Categorical(), N, masks=taken(net).model.masks, prior=Normal(0.0, 0.5))  # type: ignore[attr-defined]
    guide = DropoutGuide(model)
    guide_trace = poutine.trace(guide).get_trace(x, classes())
    trace: Any = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(x, classes())
    mask = guide_trace.nodes["2.mask"]["value"].reshape(4)
    masks = torch.where(mask == 1, math.log(0.75), math.log(0.25)).sum()
    torch.testing.assert_close(guide_trace.log_prob_sum(), masks)
    weights = sum(torch.distributions.Normal(0.0, 0.5).log_prob(p).sum() for p in net.parameters())
    f = net[3](net[1](net[0](x)) * mask / 0.75)
    expected = masks + weights - F.cross_entropy(f, classes(), reduction="sum")
    torch.testing.assert_close(trace.log_prob_sum(), expected)


def test_a_learned_noise_is_a_point(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 1))
    x = inputs()
    posterior = MCDropout(net, Gaussian(), N).fit((x, x[:, :1]), epochs=20, lr=5e-2, progress=False, seed=0)
    noise = posterior.draws(5, seed=0)["noise"]
    assert torch.equal(noise, noise[:1].expand_as(noise))
    assert 0 < float(noise[0, 0]) < 1
    posterior.save(tmp_path / "run")
    assert torch.equal(pb.load(tmp_path / "run", net).draws(5, seed=0)["noise"], noise)
    assert not posterior.is_deterministic


def test_seeds_reproduce_and_leave_the_global_state_alone() -> None:
    before = torch.get_rng_state()
    one, two, other = fitted()[1], fitted()[1], fitted(seed=1)[1]
    assert torch.equal(torch.get_rng_state(), before)
    x = inputs(1, 6, 6)
    first = one.predict(x, num_samples=2, seed=3).per_member
    assert torch.equal(first, two.predict(x, num_samples=2, seed=3).per_member)
    assert not torch.equal(first, other.predict(x, num_samples=2, seed=3).per_member)
    assert not torch.equal(first, one.predict(x, num_samples=2, seed=4).per_member)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"has no dropout to draw from: put nn.Dropout\(p\)"):
        MCDropout(nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.0)), Categorical(), N)
    with pytest.raises(ValueError, match="'0' has p=1 and drops everything"):
        MCDropout(nn.Sequential(nn.Dropout(1.0), nn.Linear(2, 3)), Categorical(), N)

    class Functional(nn.Module):
        def __init__(self, p: float) -> None:
            super().__init__()
            self.drop, self.fc, self.p = nn.Dropout(0.1), nn.Linear(2, 3), p

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.fc(self.drop(F.dropout(x, self.p, self.training)))
            return result

    with pytest.raises(ValueError, match=r"calls torch.nn.functional.dropout.*make it a module"):
        taken(Functional(0.2))
    taken(Functional(0.0))

    class Unused(Functional):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.fc(x)
            return result

    with pytest.raises(ValueError, match="reaches none of its dropout modules: drop"):
        taken(Unused(0.0))

    class TimeFirst(Functional):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.fc(self.drop(x.transpose(0, 1)))[-1]
            return result

    with pytest.raises(ValueError, match=r"'drop' gets a tensor of shape \(5, 7, 2\) from 7 rows of x"):
        taken(TimeFirst(0.0), inputs(5, 2))
