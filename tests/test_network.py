"""`Network` takes networks as users write them: selects their parameters, feeds their inputs, picks their outputs."""

import collections
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from explicit import TOLERANCE, perturb, relative, row_by_row
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn.network import Network, batch_size
from pyro_bnn.perturb import Layout, Rank1Factors, Replacement

MEMBERS, ROWS = 2, 3


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Mixed(nn.Module):
    """One module of each kind, and a parameter of the network's own."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, add_bias_kv=True)
        self.recurrent = nn.GRU(4, 4, batch_first=True)
        self.embed = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.ones(4, 4))

    def forward(self, images: Tensor, index: Tensor) -> Tensor:
        h = self.features(images).flatten(2).transpose(1, 2)
        h = h + self.attention(h, h, h, need_weights=False)[0] + self.embed(index)[:, None]
        return self.head(self.norm(self.recurrent(h)[0][:, -1]) @ self.scale)


WEIGHTS = [
    *("features.0.weight", "features.3.weight", "attention.in_proj_weight", "attention.out_proj.weight"),
    *("recurrent.weight_ih_l0", "recurrent.weight_hh_l0", "embed.weight", "head.weight"),
]
BIASES = [
    *("features.0.bias", "features.3.bias", "attention.in_proj_bias", "attention.out_proj.bias"),
    *("recurrent.bias_ih_l0", "recurrent.bias_hh_l0", "head.bias"),
]


# ------------------------------------------------------------------------------------------------ which parameters


def test_weights_and_biases_by_module_type() -> None:
    """Proves which parameters count as weights of products, as biases, and as neither, by type and by use."""
    network = Network(Mixed().double())
    assert set(network.product_weights()) == set(WEIGHTS)
    assert set(network.biases_of(WEIGHTS)) == set(BIASES)
    assert network.biases_of(["features.0.weight", "embed.weight"]) == ["features.0.bias"]
    assert network.normalisation_parameters() == {
        *("features.1.weight", "features.1.bias", "norm.weight", "norm.bias"),
    }
    x = (randn(ROWS, 2, 7, 7), torch.tensor([0, 3, 1]))
    assert network.consumed(x) == {*WEIGHTS, *BIASES, "scale"}


# --------------------------------------------------------------------------------------------------------- inputs


class TwoInputs(nn.Module):
    """Takes its inputs by position or by name, with an option that has no batch axis."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.label = nn.Linear(4, 3), nn.Embedding(5, 3)

    def forward(self, image: Tensor, label: Tensor, scale: float = 1.0, shift: Tensor | None = None) -> Tensor:
        y = self.image(image) * scale + self.label(label)
        return y if shift is None else y + shift


IMAGE, LABEL = randn(ROWS, 4), torch.tensor([2, 0, 4])


@pytest.mark.parametrize(
    "x",
    [
        (IMAGE, LABEL),
        [IMAGE, LABEL],
        {"image": IMAGE, "label": LABEL},
        {"label": LABEL, "image": IMAGE, "scale": 0.5},
        (IMAGE, LABEL, 2.0, randn(1, 3)),
        {"image": IMAGE, "label": LABEL, "shift": randn(4, 1, 3)[0]},
    ],
)
def test_inputs(x: Any) -> None:
    """Proves inputs by position and by name, in a list too; what has no batch axis reaches every row as it is."""
    net = TwoInputs().double()
    network = Network(net)
    expected = net(**x) if isinstance(x, dict) else net(*x)
    assert torch.equal(network(x), expected)
    perturbations = perturb(net, ["image.weight", "label.weight"], ["image.bias"], MEMBERS, ROWS)
    y = network.perturbed(x, ROWS, perturbations, MEMBERS)
    assert relative(y, row_by_row(net, x, ROWS, perturbations, MEMBERS)).max() <= TOLERANCE


def test_nested_inputs() -> None:
    """Proves that tensors in a dict inside a tuple are rows too."""

    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = TwoInputs()

        def forward(self, batch: dict[str, Any]) -> Tensor:
            return self.net(*batch["pair"])

    net = Nested().double()
    x = ({"pair": (IMAGE, LABEL)},)
    perturbations = perturb(net, ["net.image.weight", "net.label.weight"], ["net.image.bias"], MEMBERS, ROWS)
    y = Network(net).perturbed(x, ROWS, perturbations, MEMBERS)
    assert relative(y, row_by_row(net, x, ROWS, perturbations, MEMBERS)).max() <= TOLERANCE


def test_batch_size() -> None:
    """Proves where the number of samples is read: from y, else from the first tensor of x; and its two refusals."""
    assert batch_size(IMAGE) == batch_size((IMAGE, LABEL)) == batch_size({"a": {"b": [IMAGE]}}) == ROWS
    assert batch_size((torch.tensor(1.0), 2, IMAGE)) == ROWS
    assert batch_size((randn(7, 2), IMAGE), LABEL) == ROWS
    with pytest.raises(TypeError, match="no tensor with a batch axis: got list"):
        batch_size([1, "a"])
    with pytest.raises(ValueError, match="y has 4, x has 3"):
        batch_size((IMAGE, LABEL), randn(4))


def test_only_modules_are_networks() -> None:
    """Proves the refusal of a function."""
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, got function"):
        Network(lambda x: x)


def test_a_new_batch_size_needs_no_new_probe() -> None:
    """Proves that layouts are found once for inputs of one shape, whatever the number of samples."""
    net = TwoInputs().double()
    network = Network(net)
    counts = []
    network.net.get_submodule("image").register_forward_hook(lambda *_: counts.append(1))
    for rows, probes in ((3, True), (5, False), (1, False), (2, False)):
        x = (randn(rows, 4), torch.arange(rows))
        counts.clear()
        perturbations = perturb(net, ["image.weight"], [], MEMBERS, rows)
        y = network.perturbed(x, rows, perturbations, MEMBERS)
        assert (len(counts) > 1) == probes
        assert relative(y, row_by_row(net, x, rows, perturbations, MEMBERS)).max() <= TOLERANCE
    counts.clear()
    perturbations = perturb(net, ["image.weight"], ["image.bias"], MEMBERS, 2)
    network.perturbed(x, 2, perturbations, MEMBERS)
    assert len(counts) > 1, "another set of parameters has layouts of its own"


# -------------------------------------------------------------------------------------------------------- outputs

Pair = collections.namedtuple("Pair", ["logits", "features"])


class Outputs(nn.Module):
    """Two layers whose results come out together."""

    def __init__(self, wrap: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.wrap = nn.Linear(4, 5), nn.Linear(5, 3), wrap

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.a(x))
        return self.wrap(self.b(h), h)


@pytest.mark.parametrize(
    ("wrap", "output"),
    [
        (lambda y, h: {"logits": y, "features": h}, "logits"),
        (lambda y, h: collections.OrderedDict(features=h, logits=y), "logits"),
        (Pair, "logits"),
        (Pair, 0),
        (lambda y, h: (h, y), 1),
        (lambda y, h: [h, y], -1),
        (lambda y, h: {0: y, 1: h}, 0),
        (lambda y, h: (h, {"y": [y]}), lambda out: out[1]["y"][0]),
        (lambda y, h: y.t(), lambda out: out.t()),
        (lambda y, h: y, None),
    ],
)
def test_outputs(wrap: Callable[[Tensor, Tensor], Any], output: Any) -> None:
    """Proves the choice of an output by key, attribute, index and function."""
    net = Outputs(wrap).double()
    network, x = Network(net, output), randn(ROWS, 4)
    plain = net.b(torch.tanh(net.a(x)))
    assert torch.equal(network(x), plain)
    perturbations = perturb(net, ["a.weight", "b.weight"], ["a.bias", "b.bias"], MEMBERS, ROWS)
    y = network.perturbed(x, ROWS, perturbations, MEMBERS)

    def pick(out: Any) -> Tensor:
        if callable(output):
            return output(out)
        if output is None:
            return out
        return getattr(out, output) if isinstance(out, Pair) and isinstance(output, str) else out[output]

    expected = row_by_row(net, x, ROWS, perturbations, MEMBERS, output=pick)
    assert y.shape == (MEMBERS, ROWS, 3)
    assert relative(y, expected).max() <= TOLERANCE


@pytest.mark.parametrize(
    ("wrap", "output", "kind"),
    [
        (lambda y, h: (y, h), None, "tuple"),
        (lambda y, h: {"y": y}, None, "dict"),
        (lambda y, h: {"y": [y]}, "y", "list"),
        (lambda y, h: y, lambda out: out.sum().item(), "float"),
    ],
)
def test_an_output_that_is_no_tensor_is_refused(wrap: Callable[[Tensor, Tensor], Any], output: Any, kind: str) -> None:
    """Proves the message that asks which output is meant."""
    with pytest.raises(TypeError, match=f"returns {kind}, not a tensor; choose one tensor with `output=`"):
        Network(Outputs(wrap).double(), output)(randn(ROWS, 4))


@pytest.mark.parametrize("wrap", [lambda y, h: y.t(), lambda y, h: y.mean(0), lambda y, h: y.sum()])
def test_an_output_without_rows_is_refused(wrap: Callable[[Tensor, Tensor], Any]) -> None:
    """Proves that axis 0 of the output must run over the rows, whatever was picked."""
    net = Outputs(wrap).double()
    perturbations = perturb(net, ["a.weight"], [], MEMBERS, ROWS)
    with pytest.raises(ValueError, match=r"axis 0 must run over the \d+ rows of its input.*`output=`"):
        Network(net).perturbed(randn(ROWS, 4), ROWS, perturbations, MEMBERS)


# ----------------------------------------------------------------------------------------------- weights and dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_pass_has_the_dtype_of_the_network(dtype: torch.dtype) -> None:
    """Proves that a folded pass keeps the network's precision and agrees with the loop to it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(2, 4, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)).to(dtype)
    x = randn(ROWS, 2, 5).to(dtype)
    perturbations = perturb(net, ["0.weight", "3.weight"], ["0.bias", "3.bias"], MEMBERS, ROWS)
    network = Network(net)
    y = network.perturbed(x, ROWS, perturbations, MEMBERS)
    assert y.dtype == dtype
    assert network.net.to(torch.float64).get_parameter("0.weight").dtype == torch.float64
    expected = row_by_row(net.double(), x.double(), ROWS, perturbations, MEMBERS)
    assert relative(y.double(), expected).max() <= 20 * torch.finfo(dtype).eps
    again = network.perturbed(x.double(), ROWS, perturbations, MEMBERS)
    assert relative(again, expected).max() <= TOLERANCE, "a network that changed its precision keeps its layouts"


def test_forward_with_other_weights() -> None:
    """Proves that weights can be replaced for a call, in all places of a tied one, and come back after it."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    net[2].weight = net[0].weight
    network, x, weight = Network(net), randn(ROWS, 4), randn(4, 4, seed=1)
    expected = torch.nn.functional.linear(
        torch.tanh(torch.nn.functional.linear(x, weight, net[0].bias)), weight, net[2].bias
    )
    assert torch.equal(network(x, {"0.weight": weight}), expected)
    assert torch.equal(network(x), net(x))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_one_explicit_set_of_weights_for_each_member() -> None:
    """Proves `Network.explicit`, with and without vectorisation, and in chunks."""
    torch.manual_seed(0)
    for net, shape in (
        (nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (4,)),
        (nn.Sequential(nn.Conv1d(2, 4, 3, groups=2), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(12, 3)), (2, 5)),
        (nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), (5, 4)),
    ):
        network, x = Network(net.double().eval()), randn(ROWS, *shape)
        weights = {n: torch.randn(MEMBERS, *p.shape).double() for n, p in net.named_parameters()}
        expected = torch.stack([network(x, {n: w[m] for n, w in weights.items()}) for m in range(MEMBERS)])
        for chunk in (None, 1):
            assert torch.allclose(network.explicit(x, weights, chunk), expected, rtol=1e-12, atol=1e-12)
        one = {n: w[:1] for n, w in weights.items()}
        assert torch.allclose(network.explicit(x, one), expected[:1], rtol=1e-12, atol=1e-12)
        network.train()
        again = network.explicit(x, weights)
        trained = torch.stack([network(x, {n: w[m] for n, w in weights.items()}) for m in range(MEMBERS)])
        assert torch.allclose(again, trained, rtol=1e-12, atol=1e-12)


def test_a_perturbation_of_the_wrong_length_is_refused() -> None:
    """Proves that factors which do not fit the weight are not broadcast or cut in silence."""
    network = Network(nn.Linear(4, 3).double())
    for r, s in ((1, 5), (2, 4), (5, 4), (3, 3)):
        factors = Rank1Factors(randn(1, 1, r), randn(1, 1, s))
        with pytest.raises((RuntimeError, ValueError)):
            network.perturbed(IMAGE, ROWS, {"weight": factors}, 1)
    with pytest.raises((RuntimeError, ValueError)):
        network.perturbed(IMAGE, ROWS, {"bias": Replacement(randn(1, 1, 2))}, 1)


def test_what_is_known_of_shapes_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that meets ever new sequence lengths remembers the latest only, and is right for all of them."""
    monkeypatch.setattr("pyro_bnn.network.MAX_SHAPES", 3)
    model = pb.models.Rank1(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)), None)
    posterior = pb.Posterior(model, pb.models.Rank1Guide(model, 2))
    held = []
    for _ in range(2):
        for length in range(1, 9):
            x = torch.randn(4, length, 2)
            latents = {name: model.plated(value) for name, value in posterior.draws(3, seed=0).items()}
            f = model.function(x, latents, 4)
            alone = [model.function(x, {n: v[i : i + 1] for n, v in latents.items()}, 4) for i in range(3)]
            torch.testing.assert_close(f, torch.cat(alone))
            held.append(sum(type(thing) is Layout for thing in gc.get_objects()))
    assert held[-1] <= held[2] + 6
