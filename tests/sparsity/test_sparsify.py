"""A sparsified posterior predicts as the posterior whose weights were removed, and is smaller."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn.models import architectures
from pyro_bnn.priors import SpikeAndSlab

CLASSES = pb.likelihoods.Categorical()


def posterior(net: nn.Module, group: Any, removed: float, draws: int = 3, seed: int = 0) -> pb.Posterior:
    """Random draws of everything, with the same groups at zero in all, and normalisation statistics of each draw."""
    torch.manual_seed(seed)
    net = net.double()
    model = pb.models.SpikeSlab(net, CLASSES, 100, prior=SpikeAndSlab(0.01, 1.0, inclusion=0.5, group=group))
    values = {}
    for site in model.sites():
        value = (
            torch.randn(draws, *site.shape, dtype=torch.float64) / max(1, site.shape.numel() // site.shape[0]) ** 0.5
        )
        if len(site.shape) > 1 and site.shape[0] != 10:
            density = model.priors[site.name].elements(0.0, value[0], None)
            value *= density.within_groups(torch.rand(density.groups) >= removed)
        values[site.name] = value if len(site.shape) > 1 else value + 0.5
    buffers = {n: b for n, b in model.core().net.named_buffers() if n.endswith(("running_mean", "running_var"))}
    statistics = {n: torch.rand(draws, *b.shape, dtype=torch.float64) + 0.5 for n, b in buffers.items()}
    return pb.Posterior.from_draws(model, values, 1, statistics)


def width(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


CASES: dict[str, tuple[Any, tuple[int, ...], str, float, bool]] = {
    "mlp, rows": (lambda: architectures.mlp(6, (12, 9), 10), (6,), "output", 0.4, True),
    "mlp, columns": (lambda: architectures.mlp(6, (12, 9), 10), (6,), "input", 0.4, True),
    "mlp, weights": (lambda: architectures.mlp(6, (12, 9), 10), (6,), "weight", 0.5, False),
    "LeNet-5, rows": (architectures.LeNet5, (1, 28, 28), "output", 0.5, True),
    "LeNet-5, columns": (architectures.LeNet5, (1, 28, 28), "input", 0.5, True),
    "digits, rows": (architectures.digits_cnn, (1, 8, 8), "output", 0.5, True),
    "digits, columns": (architectures.digits_cnn, (1, 8, 8), "input", 0.5, True),
    "ResNet-18, columns": (lambda: architectures.resnet18(10), (3, 16, 16), "input", 0.5, True),
    "ResNet-18, rows": (lambda: architectures.resnet18(10), (3, 16, 16), "output", 0.5, True),
    "ResNet-18, kernels": (lambda: architectures.resnet18(10), (3, 16, 16), "kernel", 0.5, False),
}


#: one large network by default, with groups that are channels
SLOW = ("ResNet-18, columns", "ResNet-18, kernels")


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] if c in SLOW else []) for c in CASES])
def test_predictions_stay(case: str) -> None:
    """To rounding, with biases, shifts and statistics that differ in every draw; and the network is smaller."""
    make, shape, group, removed, cuts = CASES[case]
    before = posterior(make(), group, removed)
    x = torch.randn(4, *shape, dtype=torch.float64)
    found = before.sparsify(0.0, example=x)
    reference = before.predict(x, 3).outputs
    torch.testing.assert_close(found.posterior.predict(x, 3).outputs, reference, rtol=1e-8, atol=1e-8)
    assert before.predict(x, 3).outputs.std() > 1e-3, "a network that is constant would prove nothing"
    smaller = found.posterior.model.core().net  # type: ignore[attr-defined]
    original = before.model.core().net  # type: ignore[attr-defined]
    assert (width(smaller) < width(original)) == cuts
    assert found.before.parameters == width(original) and found.after.parameters == width(smaller)
    assert found.after.nonzero <= found.before.nonzero <= found.before.parameters
    if cuts and found.after.multiply_adds is not None and found.before.multiply_adds is not None:
        assert found.after.multiply_adds < found.before.multiply_adds and found.after.bytes < found.before.bytes
    for draw in range(3):
        torch.testing.assert_close(found.network(draw)(x), reference[draw, 0], rtol=1e-8, atol=1e-8)


def hand() -> tuple[pb.Posterior, dict[str, Tensor]]:
    """Two hidden units of three: the second has no weights but a bias, the third is read by nobody."""
    w = {
        "0.weight": torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, 1.0]]),
        "0.bias": torch.tensor([0.5, 0.7, 0.9]),
        "2.weight": torch.tensor([[1.0, 2.0, 0.0], [4.0, 5.0, 0.0]]),
        "2.bias": torch.tensor([0.1, 0.2]),
    }
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    model = pb.models.SpikeSlab(net, CLASSES, 10, prior=SpikeAndSlab(0.01, 1.0, inclusion=0.5))
    return pb.Posterior.from_draws(model, {name: value[None] for name, value in w.items()}), w


def test_by_hand() -> None:
    """The unit without weights gives its constant .7 to the next bias; the unread one goes; one is left."""
    before, w = hand()
    found = before.sparsify(example=torch.zeros(1, 2))
    net = found.network()
    assert torch.equal(net[0].weight, w["0.weight"][:1]) and torch.equal(net[2].weight, w["2.weight"][:, :1])
    torch.testing.assert_close(net[2].bias, torch.tensor([0.1 + 0.7 * 2, 0.2 + 0.7 * 5]))
    assert (net[0].out_features, net[2].in_features) == (1, 1)
    assert found.after.parameters == 7 and found.before.parameters == 17 and found.before.nonzero == 13
    assert found.after.multiply_adds == 4 and found.before.multiply_adds == 12
    with pytest.raises(ValueError, match="example="):
        before.sparsify()
    masks = before.sparsify(shrink=False)
    assert masks.network()[0].weight.shape == (3, 2) and masks.after.nonzero == 13


def test_padding_holds_a_constant() -> None:
    """A constant before a convolution with padding is none after it: such a channel stays, unless it is zero."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 3, padding=1), nn.Flatten(), nn.Linear(32, 2)
    )
    model = pb.models.SpikeSlab(net, CLASSES, 10, prior=SpikeAndSlab(0.01, 1.0, inclusion=0.5, group="output"))
    values = {site.name: torch.randn(2, *site.shape) for site in model.sites()}
    values["0.weight"][:, 1:] = 0
    values["0.bias"] = torch.tensor([[0.3, 0.8, -0.4], [0.1, 0.5, -0.2]])
    before, x = pb.Posterior.from_draws(model, values), torch.randn(5, 1, 4, 4)
    found = before.sparsify(example=x)
    torch.testing.assert_close(
        found.posterior.predict(x, 2).outputs, before.predict(x, 2).outputs, rtol=1e-5, atol=1e-5
    )
    assert found.network()[0].weight.shape[0] == 2, "the negative one is silenced by the ReLU, the positive one is not"


def test_a_sparsity_removes_the_least_probable() -> None:
    """A share of the weights, those of the lowest posterior log odds over all layers; by default those below 1/2."""
    torch.manual_seed(0)
    net = architectures.mlp(6, (12,), 10)
    model = pb.models.SpikeSlab(net, CLASSES, 10, prior=SpikeAndSlab(0.1, 1.0, inclusion=0.5))
    values = {site.name: torch.randn(4, *site.shape) * torch.rand(site.shape) for site in model.sites()}
    before = pb.Posterior.from_draws(model, values)
    p = before.inclusion_probabilities()
    flat = torch.cat([p[name].flatten() for name in p])
    for sparsity in (0.0, 0.3, 0.75):
        masks = before.sparsify(sparsity, shrink=False).masks
        kept = torch.cat([masks[name].flatten() for name in p])
        assert int((~kept).sum()) == int(sparsity * 192)
        assert sparsity == 0 or float(flat[kept].min()) >= float(flat[~kept].max())
    masks = before.sparsify(shrink=False).masks
    assert all(torch.equal(masks[name], p[name] >= 0.5) for name in p) and not all(m.all() for m in masks.values())


def test_members_prefix_and_a_guide(tmp_path: Any) -> None:
    """Draws of a mixture guide, under a prefix: every member is cut alike; what was cut is saved and loaded."""
    torch.manual_seed(0)
    model = pb.models.SpikeSlab(
        architectures.mlp(3, (8,), 2), CLASSES, 10, prior=SpikeAndSlab(0.3, 1.0, group="output"), prefix="a"
    )
    before = pb.Posterior(model, pb.models.MeanFieldGuide(model, components=2))
    x = torch.randn(4, 3)
    found = before.sparsify(0.4, example=x, num_samples=5)
    assert found.posterior.predict(x, 5).outputs.shape == (5, 2, 4, 2)
    assert found.after.parameters < found.before.parameters
    found.posterior.save(tmp_path / "run")
    again = pb.load(tmp_path / "run", found.network())
    assert torch.equal(again.predict(x, 5).outputs, found.posterior.predict(x, 5).outputs)


def test_bad_input() -> None:
    before, _ = hand()
    with pytest.raises(ValueError, match="sparsity=1"):
        before.sparsify(1.0)
    moved = pb.models.SpikeSlab(nn.Linear(2, 1), None, prior=SpikeAndSlab(loc=1.0))
    with pytest.raises(ValueError, match="centred at 1.0"):
        pb.Posterior(moved, pb.models.MeanFieldGuide(moved)).sparsify()
    rank1 = pb.models.Rank1(nn.Linear(2, 1), pb.likelihoods.Gaussian(1.0), 3)
    with pytest.raises(TypeError, match="Rank1"):
        pb.Posterior(rank1, pb.models.Rank1Guide(rank1)).sparsify()
    dense = pb.models.Dense(nn.Linear(2, 1), pb.likelihoods.Gaussian(1.0), 3)
    with pytest.raises(ValueError, match="no spike-and-slab"):
        pb.Posterior(dense, pb.models.MeanFieldGuide(dense)).sparsify()
