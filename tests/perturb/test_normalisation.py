"""Gains and biases of a row's own in every normalisation layer, against the plain layer run once for each row."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from explicit import DRAWS, TOLERANCE, assert_exact, perturb, perturb_low_rank, relative
from perturb.layer_cases import Function, randn
from torch import Tensor, nn

from pyro_bnn.models import Rank1
from pyro_bnn.network import Network
from pyro_bnn.perturb import Rank1Factors, Replacement

ROWS, MEMBERS = 3, 2
CHANNELS = 4


def batch_norm(kind: type[nn.Module], **options: bool) -> nn.Module:
    """In eval mode, with statistics that are neither 0 nor 1."""
    layer = kind(CHANNELS, **options).double()
    generator = torch.Generator().manual_seed(0)
    for buffer in layer.buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand(CHANNELS, generator=generator) + 0.5)
    return layer.eval()


CASES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "batch norm 1d": (lambda: batch_norm(nn.BatchNorm1d), randn(ROWS, CHANNELS)),
    "batch norm 1d of sequences": (lambda: batch_norm(nn.BatchNorm1d), randn(ROWS, CHANNELS, 5)),
    "batch norm 2d": (lambda: batch_norm(nn.BatchNorm2d), randn(ROWS, CHANNELS, 3, 5)),
    "batch norm 3d": (lambda: batch_norm(nn.BatchNorm3d), randn(ROWS, CHANNELS, 3, 2, 2)),
    "instance norm 1d": (lambda: nn.InstanceNorm1d(CHANNELS, affine=True), randn(ROWS, CHANNELS, 5)),
    "instance norm 2d": (lambda: nn.InstanceNorm2d(CHANNELS, affine=True), randn(ROWS, CHANNELS, 3, 5)),
    "instance norm 3d": (lambda: nn.InstanceNorm3d(CHANNELS, affine=True), randn(ROWS, CHANNELS, 3, 2, 2)),
    "instance norm with running statistics": (
        lambda: batch_norm(nn.InstanceNorm2d, affine=True, track_running_stats=True),
        randn(ROWS, CHANNELS, 3, 5),
    ),
    "group norm": (lambda: nn.GroupNorm(2, CHANNELS), randn(ROWS, CHANNELS, 3, 5)),
    "group norm of vectors": (lambda: nn.GroupNorm(2, CHANNELS), randn(ROWS, CHANNELS)),
    "layer norm": (lambda: nn.LayerNorm(CHANNELS), randn(ROWS, CHANNELS)),
    "layer norm of sequences": (lambda: nn.LayerNorm(CHANNELS), randn(ROWS, 5, CHANNELS)),
    "layer norm without bias": (lambda: nn.LayerNorm(CHANNELS, bias=False), randn(ROWS, 5, CHANNELS)),
    "layer norm over two axes": (lambda: nn.LayerNorm((5, CHANNELS)), randn(ROWS, 5, CHANNELS)),
    "layer norm over all axes": (lambda: nn.LayerNorm((2, 5, CHANNELS)), randn(ROWS, 2, 5, CHANNELS)),
    "layer norm, time first": (
        lambda: Function(lambda p, x: p.n(x.transpose(0, 1)).transpose(0, 1), n=nn.LayerNorm(CHANNELS)),
        randn(ROWS, 5, CHANNELS),
    ),
    "layer norm, flattened with time first": (
        lambda: Function(
            lambda p, x: p.n(x.transpose(0, 1).reshape(-1, CHANNELS)).unflatten(0, (5, -1)).transpose(0, 1),
            n=nn.LayerNorm(CHANNELS),
        ),
        randn(ROWS, 5, CHANNELS),
    ),
    "layer norm of channels": (
        lambda: Function(lambda p, x: p.n(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), n=nn.LayerNorm(CHANNELS)),
        randn(ROWS, CHANNELS, 3, 5),
    ),
    "layer norm of windows": (
        lambda: Function(lambda p, x: p.n(x.reshape(-1, 2, CHANNELS)).reshape(x.shape), n=nn.LayerNorm((2, CHANNELS))),
        randn(ROWS, 6, CHANNELS),
    ),
    "layer norm by keywords": (
        lambda: Function(
            lambda p, x: F.layer_norm(bias=p.b, weight=p.w, normalized_shape=(CHANNELS,), input=x),
            w=randn(CHANNELS),
            b=randn(CHANNELS),
        ),
        randn(ROWS, CHANNELS),
    ),
    "layer norm, used twice": (
        lambda: Function(lambda p, x: p.n(p.n(x).exp()), n=nn.LayerNorm(CHANNELS)),
        randn(ROWS, 5, CHANNELS),
    ),
    "layer norm of a learned input": (
        lambda: Function(lambda p, x: x + p.n(p.tokens), n=nn.LayerNorm(CHANNELS), tokens=randn(5, CHANNELS)),
        randn(ROWS, 5, CHANNELS),
    ),
    "layer norm over two axes of a learned input": (
        lambda: Function(lambda p, x: x + p.n(p.tokens), n=nn.LayerNorm((5, CHANNELS)), tokens=randn(5, CHANNELS)),
        randn(ROWS, 5, CHANNELS),
    ),
    "RMS norm": (lambda: nn.RMSNorm(CHANNELS), randn(ROWS, 5, CHANNELS)),
    "RMS norm over two axes": (lambda: nn.RMSNorm((5, CHANNELS)), randn(ROWS, 5, CHANNELS)),
}


def affine(net: nn.Module) -> list[str]:
    return [name for name, _ in net.named_parameters() if name != "tokens"]


def shuffled(net: nn.Module) -> nn.Module:
    """Gains and biases that are neither 1 nor 0."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.double().parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return net


@pytest.mark.parametrize("draws", DRAWS)
@pytest.mark.parametrize("name", CASES)
def test_rule(name: str, draws: str) -> None:
    """Proves gains and biases of one layer, of every row's own or of what rows share."""
    make, x = CASES[name]
    net = shuffled(make())
    assert_exact(net, x, perturbations=perturb(net, [], affine(net), MEMBERS, ROWS, draws), members=MEMBERS)


@pytest.mark.parametrize("one", ["weight", "bias"])
@pytest.mark.parametrize("name", ["batch norm 2d", "instance norm 2d", "group norm", "layer norm over two axes"])
def test_one_of_the_two(name: str, one: str) -> None:
    """Proves a gain of a row's own beside a bias that all share, and the reverse."""
    make, x = CASES[name]
    net = shuffled(make())
    assert_exact(net, x, perturbations=perturb(net, [], [one], MEMBERS, ROWS, "row"), members=MEMBERS)


@pytest.mark.parametrize("name", ["batch norm 2d", "group norm", "layer norm over two axes", "RMS norm"])
def test_gradients(name: str) -> None:
    """Proves the gradients of gains, biases and input against those through the plain layer, member by member."""
    make, x = CASES[name]
    net = shuffled(make())
    network = Network(net)
    own = dict(net.named_parameters())
    values = {n: p.value.requires_grad_() for n, p in perturb(net, [], affine(net), MEMBERS, ROWS, "member").items()}  # type: ignore[union-attr]
    leaves = [*values.values(), x.clone().requires_grad_()]
    y = network.perturbed(leaves[-1], ROWS, {n: Replacement(v) for n, v in values.items()}, MEMBERS)
    plain = [
        torch.func.functional_call(net, {n: v[m, 0].view_as(own[n]) for n, v in values.items()}, leaves[-1])
        for m in range(MEMBERS)
    ]
    direction = randn(*y.shape, seed=3)
    ours = torch.autograd.grad((y * direction).sum(), leaves)
    expected = torch.autograd.grad((torch.stack(plain) * direction).sum(), leaves)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
        assert bool(one.any())


def test_training_statistics_are_those_of_the_folded_batch() -> None:
    """Proves batch normalisation in train mode: all rows share its statistics, which move once, as in a plain layer."""
    net = shuffled(nn.BatchNorm1d(CHANNELS)).train()
    x = randn(ROWS, CHANNELS)
    network, plain = Network(net), Network(net)
    perturbations = perturb(net, [], ["weight", "bias"], MEMBERS, ROWS, "row")
    y = network.perturbed(x, ROWS, perturbations, MEMBERS)
    with torch.no_grad():
        plain.net.weight.fill_(1.0)  # type: ignore[operator, union-attr]
        plain.net.bias.zero_()  # type: ignore[operator, union-attr]
        normalised = plain(x.repeat(MEMBERS, 1)).unflatten(0, (MEMBERS, ROWS))
    gain, bias = (perturbations[name].value for name in ("weight", "bias"))  # type: ignore[union-attr]
    assert relative(y.detach(), (normalised * gain + bias).detach()).max() <= TOLERANCE
    for name, buffer in network.net.named_buffers():
        assert torch.equal(buffer, plain.net.get_buffer(name)), name
        assert not torch.equal(buffer, net.get_buffer(name)), name


def test_rank1_factors_of_a_gain_of_two_axes() -> None:
    """Proves W o (r s^T) for the gain and the bias of a layer norm over two or three axes."""
    for name in ("layer norm over two axes", "layer norm over all axes"):
        make, x = CASES[name]
        net = shuffled(make())
        assert_exact(net, x, perturbations=perturb(net, affine(net), [], MEMBERS, ROWS, "row"), members=MEMBERS)


def test_factors_of_low_rank_are_refused() -> None:
    make, x = CASES["layer norm over two axes"]
    net = make().double()
    with pytest.raises(ValueError, match="'weight' of a normalisation layer has no low-rank rule"):
        Network(net).perturbed(x, ROWS, perturb_low_rank(net, ["weight"], MEMBERS), MEMBERS)


def test_a_weight_that_is_normalised_is_no_gain() -> None:
    """Proves that a parameter given as the input of a normalisation is refused by name, not perturbed in silence."""
    net = Function(lambda p, x: F.linear(x, F.layer_norm(p.w, (CHANNELS,))), w=randn(3, CHANNELS))
    with pytest.raises(ValueError, match="'w' is random, but the network uses it in torch.nn.functional.layer_norm"):
        Network(net).perturbed(
            randn(ROWS, CHANNELS), ROWS, {"w": Rank1Factors(torch.ones(1, 1, 3), torch.ones(1, 1, CHANNELS))}, 1
        )


def test_a_gain_of_the_network_s_own_is_no_product() -> None:
    """Proves that a rank-1 network leaves it alone, as it leaves those of normalisation layers, at any shape."""
    net = Function(
        lambda p, x: p.l(F.layer_norm(x, (5, CHANNELS), p.w)), w=randn(5, CHANNELS), l=nn.Linear(CHANNELS, 2).double()
    )
    x = randn(ROWS, 5, CHANNELS)
    assert Network(net).consumed(x) == {"l.weight", "l.bias"}
    model = Rank1(net, None)
    assert model(x).shape == (1, ROWS, 5, 2) and model.weights == ["l.weight"]
