"""Whole networks: every row of a perturbed pass is the network with that row's explicit weights; nothing else moves.

In train mode batch normalisation lets the rows of a batch see each other, so there the reference is a copy whose
convolutions and linear layers loop over the rows, each with weights of its own, while batch normalisation sees the
whole folded batch. Everywhere else the reference runs row by row.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from explicit import (
    TOLERANCE,
    assert_exact,
    groups_of,
    perturb,
    relative,
    row_by_row,
)
from perturb.whole_networks import (
    ARCHITECTURES,
    DIFFERENT,
    MEMBERS,
    NAMES,
    ROWS,
    SENSITIVE,
    SEQUENCES,
    Subject,
    Tied,
    TimeMajor,
    Windows,
    calibrate,
    looped,
    norm_parameters,
    randn,
    randomise,
    tokens,
    without_noise,
)
from pyro import poutine
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn.network import Network
from pyro_bnn.perturb import Layout, Perturbation, Rank1Factors, Replacement, Use


@pytest.fixture(scope="module", params=NAMES)
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    torch.manual_seed(0)
    make, pixels = ARCHITECTURES[request.param]
    net = without_noise(calibrate(randomise(without_noise(make().double())), (3, pixels, pixels)))
    network = Network(net)
    weights = network.product_weights()
    products = {f"{n}.weight" for n, m in net.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    products |= {f"{n}.in_proj_weight" for n, m in net.named_modules() if isinstance(m, nn.MultiheadAttention)}
    assert set(weights) == products
    perturbations = perturb(net, weights, network.biases_of(weights), MEMBERS, ROWS, sizes=(0.6, 1.4), signs=False)
    yield Subject(net, torch.randn(ROWS, 3, pixels, pixels, dtype=torch.float64), perturbations)


def assert_sensitive(y: Tensor, perturbations: dict[str, Perturbation]) -> None:
    """Every factor matters in every row, to first order: none of the comparisons is one of nothing with nothing."""
    leaves = [t for p in perturbations.values() for t in p]
    gradients = torch.autograd.grad(y.abs().sum(), leaves)
    for (name, _), gradient in zip(((n, t) for n, p in perturbations.items() for t in p), gradients, strict=True):
        effect = gradient.abs().amax(-1) / y.detach().flatten(2).abs().amax(-1)
        assert effect.min() > SENSITIVE, f"{name} has an effect of {effect.min():.1e}"


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_architecture(subject: Subject, mode: str) -> None:
    """Proves a torchvision architecture in one mode: outputs, and in train mode the statistics that it moved."""
    net = subject.net.train(mode == "train")
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    perturbations = {n: type(p)(*(t.clone().requires_grad_() for t in p)) for n, p in subject.perturbations.items()}
    network = Network(net)
    folded = network.perturbed(subject.x, ROWS, perturbations, MEMBERS)
    assert_sensitive(folded, perturbations)
    folded = folded.detach()
    with torch.no_grad():
        if subject.coupled and mode == "train":
            reference = looped(subject)
            expected = reference(subject.x.repeat(MEMBERS, 1, 1, 1)).unflatten(0, (MEMBERS, ROWS))
            for name, buffer in reference.named_buffers():
                moved, size = network.net.get_buffer(name).double(), buffer.double().abs().max()
                # a mean near 0 is a sum of terms that cancel: its rounding is relative to them
                assert torch.allclose(moved, buffer.double(), rtol=0, atol=float(TOLERANCE * size))
                assert not torch.equal(buffer, before[name]) or "running" not in name
        else:
            expected = row_by_row(net, subject.x, ROWS, subject.perturbations, MEMBERS)
    assert relative(folded, expected).max() <= TOLERANCE
    assert relative(expected[:1], expected[1:]).min() > DIFFERENT
    assert all(torch.equal(before[name], buffer) for name, buffer in net.named_buffers())


# ---------------------------------------------------------------------------------- sequences and own forwards


@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", SEQUENCES)
def test_sequence_network(name: str, mode: str) -> None:
    """Proves networks whose batch is not simply the first axis, whose weights are shared, or are their own."""
    torch.manual_seed(0)
    make, x = SEQUENCES[name]
    net = without_noise(randomise(make().double())).train(mode == "train")
    assert torch.backends.mha.get_fastpath_enabled()
    for draws in ("row", "member"):
        assert_exact(net, x, draws=draws, skip=norm_parameters(net), effects=draws == "row")
    assert torch.backends.mha.get_fastpath_enabled(), "the fused path of the user's own networks is as it was"


def test_the_layouts_of_flattened_batches() -> None:
    """Proves what the probe finds, also where two flattens have the same lengths: three steps, and three samples."""
    net = Network(TimeMajor().double())
    found = net.layouts(randn(3, 3, 4), 3, ["a.weight", "b.weight"])
    assert found == {Use("a.weight", 0): Layout(0, outer=3), Use("b.weight", 0): Layout(0, inner=3)}
    for in_front, expected in ((True, Layout(0, inner=4)), (False, Layout(0, outer=4))):
        net = Network(Windows(in_front).double())
        found = net.layouts(randn(2, 4, 4, 6), 2, ["mix.weight", "convolve.weight", "attention.in_proj_weight"])
        assert found[Use("mix.weight", 0)] == found[Use("convolve.weight", 0)] == expected
        assert found[Use("attention.in_proj_weight", 0)] == dataclasses.replace(expected, dim=1)


# ------------------------------------------------------------------------------------- one member, factors of one


def _neutral(network: Network) -> dict[str, Perturbation]:
    parameters = network.parameters_by_name()
    weights = network.product_weights()
    neutral: dict[str, Perturbation] = {}
    for name in weights:
        out, into = parameters[name].shape[:2]
        ones = torch.ones(1, 1, out, dtype=torch.float64)
        neutral[name] = Rank1Factors(ones, torch.ones(1, 1, into * groups_of(network.net, name), dtype=torch.float64))
    return neutral | {n: Replacement(parameters[n].detach()[None, None]) for n in network.biases_of(weights)}


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
@pytest.mark.parametrize("biased", [True, False])
def test_one_member_with_factors_of_one_is_the_plain_network(name: str, biased: bool) -> None:
    """Proves that nothing is added where nothing is random: to 1e-14, and bit for bit where no layer has a bias."""
    torch.manual_seed(0)
    net = ARCHITECTURES[name][0]().double()
    layers = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert any(m.bias is not None for m in layers)
    if not biased:
        for layer in layers:
            layer.bias = None
    net = calibrate(randomise(without_noise(net)), (3, 32, 32)).eval()
    x = torch.randn(ROWS, 3, 32, 32, dtype=torch.float64)
    network = Network(net)
    for lead in ((1, 1), (1, ROWS)):
        neutral = {n: type(p)(*(t.expand(*lead, -1) for t in p)) for n, p in _neutral(network).items()}
        with torch.no_grad():
            y, plain = network.perturbed(x, ROWS, neutral, 1), net(x)[None]
        if biased:
            assert relative(y, plain).max() <= 1e-14
        else:
            assert torch.equal(y, plain)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("name", ["lstm", "transformer", "tied", "windows, batch behind"])
def test_one_member_with_factors_of_one_is_the_plain_sequence_network(name: str) -> None:
    """Proves the same for attention and recurrent layers, whose rules write out what torch fuses."""
    torch.manual_seed(0)
    make, x = SEQUENCES[name]
    net = randomise(make().double()).eval()
    network = Network(net)
    with torch.no_grad():
        y = network.perturbed(x, 3, _neutral(network), 1)
        plain = (net(*x) if isinstance(x, tuple) else net(x))[None]
    assert relative(y, plain).max() <= 1e-14


def test_the_model_at_its_centre_is_the_plain_network() -> None:
    """Proves the same through the model: latent factors of one, also as the one draw of a posterior."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16, bias=False), nn.Tanh(), nn.Linear(16, 3, bias=False)).double()
    x = randn(5, 4)
    function = pb.models.Rank1(net, None, prior=pb.priors.Normal())
    ones = {s.name: torch.ones(s.shape, dtype=torch.float64) for s in function.sites() if s.role == "factor"}
    with torch.no_grad():
        assert torch.equal(poutine.condition(function, ones)(x)[0], net(x))
        model = pb.models.Rank1(net, pb.likelihoods.Gaussian(0.1), 5, prior=pb.priors.Normal())
        draws = {site: value[None] for site, value in ones.items()}
        posterior = pb.Posterior.from_draws(model, draws)
        assert torch.equal(posterior.predict(x, num_samples=1).per_member[0, 0], net(x))


# ------------------------------------------------------------------------------------------ the user's own network


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("name", ["tied", "transformer", "lstm"])
def test_the_given_network_is_left_alone(name: str) -> None:
    """Proves that no construction, forward pass or prediction touches the given network, and that ties are kept."""
    torch.manual_seed(0)
    make, x = SEQUENCES[name]
    net = make().double().train()
    leave_alone(net, x)


def test_the_given_network_is_left_alone_with_its_statistics() -> None:
    """Proves the same for batch normalisation, whose statistics move in the model alone, and in training alone."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(16, 3)
    )
    net[1].eval()
    leave_alone(net.double(), randn(3, 2, 4, 4))


def leave_alone(net: nn.Module, x: Any) -> None:
    tensors = dict(net.named_parameters(remove_duplicate=False)) | dict(net.named_buffers())
    values = {name: t.detach().clone() for name, t in tensors.items()}
    modes = [module.training for module in net.modules()]
    model = pb.models.Rank1(net, pb.likelihoods.Gaussian(0.5), 10, example=x)
    guide = pb.models.Rank1Guide(model, components=2)
    for train in (True, False):
        model.train(train)
        guide.train(train)
        poutine.replay(model, trace=poutine.trace(guide).get_trace(x))(x)
    posterior = pb.Posterior(model, guide)
    posterior.predict(x, num_samples=2)
    posterior.predict(x, num_samples=2, batch_size=1)
    after = dict(net.named_parameters(remove_duplicate=False)) | dict(net.named_buffers())
    assert after.keys() == tensors.keys() and all(after[n] is t for n, t in tensors.items())
    assert all(torch.equal(after[n], value) for n, value in values.items())
    assert modes == [module.training for module in net.modules()]
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    own = dict(model.core().net.named_parameters(remove_duplicate=False))
    assert not {id(p) for p in own.values()} & {id(p) for p in tensors.values()}
    for a in own:
        assert [own[a] is own[b] for b in own] == [tensors[a] is tensors[b] for b in own], "ties are not as they were"


def test_tied_weights_have_one_pair_of_factors() -> None:
    """Proves that a tied weight is one random weight, not two, and that training moves it in both places."""
    torch.manual_seed(0)
    model = pb.models.Rank1(Tied().double(), pb.likelihoods.Categorical(), 10, example=tokens(3, 7))
    assert [s.name for s in model.sites() if s.role == "factor"] == [
        *("embed.weight.s", "embed.weight.r", "hidden.weight.s", "hidden.weight.r"),
    ]
    net = model.core().net
    with torch.no_grad():
        net.get_parameter("embed.weight").add_(1.0)
    assert net.get_submodule("head").weight is net.get_parameter("embed.weight")


# --------------------------------------------------------------------------------------------------- the probe


class Stateful(nn.Module):
    """Batch normalisation, a buffer that is written in place, one that is replaced, and random numbers, in any mode."""

    count: Tensor
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.drop, self.b = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.b(self.drop(self.norm(self.a(x)))) + 0 * torch.rand(())


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_the_probe_leaves_no_trace(rows: int) -> None:
    """Proves that the probe puts buffers (in place or replaced), random state and mixed modes back, from one row on."""
    torch.manual_seed(0)
    network = Network(Stateful().double().train())
    net = network.net
    net.get_submodule("norm").eval()
    buffers = dict(net.named_buffers())
    values = {name: b.clone() for name, b in buffers.items()}
    parameters = {name: p.detach().clone() for name, p in net.named_parameters()}
    modes = {name: m.training for name, m in net.named_modules()}
    state = torch.get_rng_state()
    names = ["a.weight", "a.bias", "b.weight", "b.bias"]
    layouts = network.layouts(randn(rows, 4), rows, names)
    assert layouts == {Use("a.weight", 0): Layout(0), Use("b.weight", 0): Layout(0)}
    assert network.consumed(randn(rows, 4)) == set(names)
    assert torch.equal(state, torch.get_rng_state())
    assert all(b is buffers[n] and torch.equal(b, values[n]) for n, b in net.named_buffers())
    assert all(torch.equal(p, parameters[n]) for n, p in net.named_parameters())
    assert modes == {name: m.training for name, m in net.named_modules()}
    network.perturbed(randn(rows, 4), rows, perturb(net, names[::2], names[1::2], MEMBERS, rows), MEMBERS)
    assert net.get_buffer("count") == 1, "only the pass itself is one"


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("name", ["bidirectional gru", "transformer", "windows, batch in front", "tied"])
def test_one_row(name: str) -> None:
    """Proves that a network can be probed and run with a batch of one, and with one token that all positions share."""
    torch.manual_seed(0)
    make, x = SEQUENCES[name]
    net = randomise(make().double()).eval()
    one = tuple(t[:1] for t in x) if isinstance(x, tuple) else x[:1]
    assert_exact(net, one, skip=norm_parameters(net))
    if not isinstance(x, tuple) and not x.is_floating_point():
        assert_exact(net, torch.full_like(x[:1], 4), skip=norm_parameters(net))


def test_new_shapes_can_be_probed_before_the_backward_pass() -> None:
    """Proves that a probe between two forward passes leaves the graph of the first one valid: frozen statistics, and a
    last layer that starts at zero."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.Conv1d(3, 3, 1), nn.AdaptiveAvgPool1d(1), nn.Flatten()
    )
    nn.init.zeros_(net[2].weight)
    network = Network(net.double().eval())
    perturbations = perturb(network.net, ["0.weight", "2.weight"], [], MEMBERS, 3)
    y = [network.perturbed(randn(3, 2, n), 3, perturbations, MEMBERS).sum() for n in (5, 6)]
    (y[0] + y[1]).backward()
    assert network.net.get_parameter("2.weight").grad is not None
    assert not network.net.get_parameter("2.weight").any()
