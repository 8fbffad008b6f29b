"""Whole networks: every row of a perturbed pass is the network with that row's explicit weights; nothing else moves.

In train mode batch normalisation lets the rows of a batch see each other, so there the reference is a copy whose
convolutions and linear layers loop over the rows, each with weights of its own, while batch normalisation sees the
whole folded batch. Everywhere else the reference runs row by row.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from explicit import (
    TOLERANCE,
    assert_exact,
    groups_of,
    owner_of,
    perturb,
    relative,
    row_by_row,
    row_weights,
)
from pyro import poutine
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn.network import Network
from pyro_bnn.perturb import Layout, Perturbation, Rank1Factors, Replacement, Use

MEMBERS, ROWS = 2, 2
DIFFERENT = 1e-3  # relative distance of rows that differ in their weights alone
SENSITIVE = 1e-7  # relative first-order effect of the factors of every weight on every row

_vision = torchvision.models
ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (lambda: _vision.resnet18(num_classes=10), 64),
    "resnet50": (lambda: _vision.resnet50(num_classes=10), 48),
    "densenet121": (lambda: _vision.densenet121(num_classes=10), 48),
    "mobilenet_v3_small": (lambda: _vision.mobilenet_v3_small(num_classes=10), 64),
    "efficientnet_b0": (lambda: _vision.efficientnet_b0(num_classes=10), 64),
    "convnext_tiny": (lambda: _vision.convnext_tiny(num_classes=10), 32),
    "regnet_y_400mf": (lambda: _vision.regnet_y_400mf(num_classes=10), 64),
    "vit_b_16": (lambda: _vision.vit_b_16(image_size=32, num_classes=10), 32),
    "swin_t": (lambda: _vision.swin_t(num_classes=10), 64),
}


def without_noise(net: nn.Module) -> nn.Module:
    """Switches dropout and stochastic depth off, in modules of every kind."""
    for module in net.modules():
        for name in ("p", "dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return net


def randomise(net: nn.Module) -> nn.Module:
    """Gives every parameter a value that matters: no layer starts at zero, no gain at one or a millionth."""
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() > 1 and p.shape[0] > 1 and p[0].numel() > 1:
                p.normal_(std=(2 / p[0].numel()) ** 0.5)
            elif p.dim() > 1:  # positions, class tokens, layer scales
                p.uniform_(0.5, 1.5)
            elif not p.any():
                p.normal_(std=0.3)
            elif bool((p == 1).all()):
                p.uniform_(0.5, 1.5)
        for module in net.modules():
            if isinstance(module, torchvision.ops.SqueezeExcitation):
                module.fc2.weight.mul_(0.1)  # keeps the gates out of saturation
    return net


def calibrate(net: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """Gives batch normalisation the statistics of random data, so that activations neither vanish nor explode."""
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [m.momentum for m in norms]
    if not norms:
        return net
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average over passes
    net.train()
    with torch.no_grad():
        for _ in range(2):
            net(torch.randn(4, *shape, dtype=torch.float64))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return net


@dataclasses.dataclass
class Subject:
    """A network in double precision, two images, and factors and biases for each of two members and two rows."""

    net: nn.Module
    x: Tensor
    perturbations: dict[str, Perturbation]

    @property
    def coupled(self) -> bool:
        """Whether rows see each other in train mode."""
        return any(isinstance(m, nn.BatchNorm2d) for m in self.net.modules())


@pytest.fixture(scope="module", params=ARCHITECTURES)
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


def looped(subject: Subject) -> nn.Module:
    """A copy for the folded batch in which every perturbed layer loops over rows with explicit weights."""
    net = copy.deepcopy(subject.net)
    for name in subject.perturbations:
        layer = owner_of(net, name)
        assert isinstance(layer, (nn.Conv2d, nn.Linear))
        layer.forward = _loop(layer, name.rpartition(".")[0], subject)
    return net


def _loop(layer: nn.Conv2d | nn.Linear, prefix: str, subject: Subject) -> Callable[[Tensor], Tensor]:
    own = {n: p for n, p in subject.perturbations.items() if n.rpartition(".")[0] == prefix}

    def forward(x: Tensor) -> Tensor:
        assert x.shape[0] == MEMBERS * ROWS
        results = []
        for i, row in enumerate(x.split(1)):
            of_row = row_weights(subject.net, own, i // ROWS, i % ROWS)
            weight, bias = of_row[f"{prefix}.weight"], of_row.get(f"{prefix}.bias", layer.bias)
            results.append(
                F.linear(row, weight, bias) if isinstance(layer, nn.Linear) else layer._conv_forward(row, weight, bias)
            )
        return torch.cat(results)

    return forward


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
                assert torch.allclose(network.net.get_buffer(name).double(), buffer.double(), rtol=TOLERANCE, atol=0)
                assert not torch.equal(buffer, before[name]) or "running" not in name
        else:
            expected = row_by_row(net, subject.x, ROWS, subject.perturbations, MEMBERS)
    assert relative(folded, expected).max() <= TOLERANCE
    assert relative(expected[:1], expected[1:]).min() > DIFFERENT
    assert all(torch.equal(before[name], buffer) for name, buffer in net.named_buffers())


# ---------------------------------------------------------------------------------- sequences and own forwards


class Tagger(nn.Module):
    """Embedding, recurrent layer, linear layer."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layer = getattr(nn, kind)(6, 5, dropout=0.5, num_layers=2, **options)
        self.head = nn.Linear(10 if options.get("bidirectional") else 5, 3)
        self.first = options.get("batch_first", False)

    def forward(self, tokens: Tensor) -> Tensor:
        y, _ = self.layer(self.embed(tokens if self.first else tokens.t()))
        return self.head(y if self.first else y.transpose(0, 1))


class Translator(nn.Module):
    """``nn.Transformer`` with a causal and a padding mask."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(11, 8), nn.Embedding(7, 8)
        self.body = nn.Transformer(8, 2, 2, 2, 16, dropout=0.1, **options)
        self.head = nn.Linear(8, 11)
        self.first = options.get("batch_first", False)

    def forward(self, source: Tensor, target: Tensor, padding: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1], dtype=torch.float64)
        source, target = (self.embed(t) + self.positions(torch.arange(t.shape[1])) for t in (source, target))
        if not self.first:
            source, target = source.transpose(0, 1), target.transpose(0, 1)
        y = self.body(
            source,
            target,
            tgt_mask=causal,
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
            tgt_is_causal=True,
        )
        return self.head(y if self.first else y.transpose(0, 1))


class Encoder(nn.Module):
    """``nn.TransformerEncoder`` with a padding mask, for which torch has a fused path in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.body(x, src_key_padding_mask=padding).masked_fill(padding[..., None], 0.0).sum(1)


class Tied(nn.Module):
    """A language model whose output weights are those of its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden = nn.Embedding(11, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 11)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.embed(tokens))))


class OwnParameters(nn.Module):
    """A perceptron that calls ``F.linear`` on parameters of its own, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(5, 5))
        self.bias = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(F.linear(x, self.first, self.bias))
        return F.linear(torch.tanh(F.linear(h, self.second)), self.second, self.bias)


class TimeMajor(nn.Module):
    """Flattens time and batch with time in front, then with the batch in front."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        h = self.a(x.transpose(0, 1).reshape(time * batch, -1)).tanh()
        return self.b(h.view(time, batch, 5).transpose(0, 1).reshape(batch * time, 5)).view(batch, time, 3)


class Windows(nn.Module):
    """Cuts images of 4 x 4 pixels into four windows: linear and attention layers in them, batch in front or behind."""

    def __init__(self, batch_in_front: bool) -> None:
        super().__init__()
        self.mix, self.attention = nn.Linear(6, 6), nn.MultiheadAttention(6, 2, batch_first=True)
        self.convolve = nn.Conv1d(6, 3, 2)
        self.batch_in_front = batch_in_front

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        windows = x.view(batch, 2, 2, 2, 2, 6).permute(0, 1, 3, 2, 4, 5).reshape(batch, 4, 4, 6)
        if not self.batch_in_front:
            windows = windows.transpose(0, 1)
        h = self.mix(windows.reshape(batch * 4, 4, 6))
        h = h + self.attention(h, h, h, need_weights=False)[0]
        h = self.convolve(h.transpose(1, 2))
        return h.view(batch, 4, -1) if self.batch_in_front else h.view(4, batch, -1).transpose(0, 1)


def _tokens(*shape: int) -> Tensor:
    return torch.randint(11, shape, generator=torch.Generator().manual_seed(1))


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


_PADDING = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 0, 0], [0, 0, 1, 1, 1]], dtype=torch.bool)
SEQUENCES: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "lstm": (lambda: Tagger("LSTM"), _tokens(3, 7)),
    "lstm, batch first": (lambda: Tagger("LSTM", batch_first=True), _tokens(3, 7)),
    "bidirectional gru": (lambda: Tagger("GRU", bidirectional=True), _tokens(3, 7)),
    "transformer": (Translator, (_tokens(3, 5), _tokens(3, 4), _PADDING)),
    "transformer, batch first": (
        lambda: Translator(batch_first=True, norm_first=True),
        (_tokens(3, 5), _tokens(3, 4), _PADDING),
    ),
    "encoder": (Encoder, (_randn(3, 5, 8), _PADDING)),
    "tied": (Tied, _tokens(3, 7)),
    "own parameters": (OwnParameters, _randn(3, 4)),
    "time major": (TimeMajor, _randn(3, 3, 4)),
    "windows, batch in front": (lambda: Windows(True), _randn(3, 4, 4, 6)),
    "windows, batch behind": (lambda: Windows(False), _randn(3, 4, 4, 6)),
}


def norm_parameters(net: nn.Module) -> list[str]:
    return [f"{n}.{p}" for n, m in net.named_modules() if isinstance(m, nn.LayerNorm) for p in ("weight", "bias")]


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
    found = net.layouts(_randn(3, 3, 4), 3, ["a.weight", "b.weight"])
    assert found == {Use("a.weight", 0): Layout(0, outer=3), Use("b.weight", 0): Layout(0, inner=3)}
    for in_front, expected in ((True, Layout(0, inner=4)), (False, Layout(0, outer=4))):
        net = Network(Windows(in_front).double())
        found = net.layouts(_randn(2, 4, 4, 6), 2, ["mix.weight", "convolve.weight", "attention.in_proj_weight"])
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
    x = _randn(5, 4)
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
    leave_alone(net.double(), _randn(3, 2, 4, 4))


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
    model = pb.models.Rank1(Tied().double(), pb.likelihoods.Categorical(), 10, example=_tokens(3, 7))
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
    layouts = network.layouts(_randn(rows, 4), rows, names)
    assert layouts == {Use("a.weight", 0): Layout(0), Use("b.weight", 0): Layout(0)}
    assert network.consumed(_randn(rows, 4)) == set(names)
    assert torch.equal(state, torch.get_rng_state())
    assert all(b is buffers[n] and torch.equal(b, values[n]) for n, b in net.named_buffers())
    assert all(torch.equal(p, parameters[n]) for n, p in net.named_parameters())
    assert modes == {name: m.training for name, m in net.named_modules()}
    network.perturbed(_randn(rows, 4), rows, perturb(net, names[::2], names[1::2], MEMBERS, rows), MEMBERS)
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
    y = [network.perturbed(_randn(3, 2, n), 3, perturbations, MEMBERS).sum() for n in (5, 6)]
    (y[0] + y[1]).backward()
    assert network.net.get_parameter("2.weight").grad is not None
    assert not network.net.get_parameter("2.weight").any()
