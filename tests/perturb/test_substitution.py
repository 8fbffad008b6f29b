"""Weights that are replaced for one pass: in all their places, put back after it, and there when a part runs again."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from explicit import perturb, row_weights, sample
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import pyro_bnn as pb
from pyro_bnn.network import Network
from pyro_bnn.perturb import LowRankFactors, Perturbation, Rank1Factors, Replacement

ROWS, MEMBERS = 5, 3


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -------------------------------------------------------------------------------------------- slots of a weight


class TwoNames(nn.Module):
    """Layers that are attributes and parts of a container."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
        self.layers = nn.Sequential(self.first, nn.ReLU(), self.last)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Twice(nn.Module):
    """One layer that stands twice in a container."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.Linear(4, 4)
        self.layers = nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Tied(nn.Module):
    """One parameter in two modules, one of which has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.b.weight = self.a.weight
        self.all = nn.ModuleDict({"b": self.b})

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.all["b"](self.a(x).tanh()).tanh())


class TwoOwners(nn.Module):
    """A parameter that is one of the network's own, too, and a normalisation with two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.last = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
        self.blocks = nn.ModuleList([self.a, self.norm])
        self.matrix = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.blocks[1](self.blocks[0](x)).tanh() @ self.matrix.t()).tanh())


class TwoDepths(nn.Module):
    """A block that is reached by two ways, with a recurrent layer, which keeps a list of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"cell": nn.GRU(4, 4, batch_first=True), "out": nn.Linear(4, 2)})
        self.outer = nn.ModuleList([self.block])

    def forward(self, x: Tensor) -> Tensor:
        return self.block["out"](self.outer[0]["cell"](x[:, None])[0][:, -1])


SHARED = [TwoNames, Twice, Tied, TwoOwners, TwoDepths]


def slots(net: nn.Module) -> dict[str, int]:
    """Which object lies in every slot, and what the recurrent layers have in their lists."""
    held = {n: id(p) for n, p in net.named_parameters(remove_duplicate=False)}
    lists = [m._flat_weights for m in net.modules() if isinstance(m, nn.RNNBase)]
    return held | {f"list {i}": id(w) for i, w in enumerate(w for weights in lists for w in weights)}


@pytest.mark.parametrize("build", SHARED)
def test_all_names_of_a_weight_get_it_and_give_it_back(build: type[nn.Module]) -> None:
    """Proves it against a copy of the network that holds the weights, with and without an exception in forward."""
    torch.manual_seed(0)
    network, x = Network(build().eval()), randn(ROWS, 4)
    before, held = copy.deepcopy(network.net.state_dict()), slots(network.net)
    weights = {n: randn(*p.shape, seed=i) for i, (n, p) in enumerate(network.parameters_by_name().items())}
    other = copy.deepcopy(network.net)
    with torch.no_grad():
        for name, p in other.named_parameters():
            p.copy_(weights[name])
    assert torch.equal(network(x, weights), other(x))
    for kind in (ValueError, KeyboardInterrupt):

        def fail(*_: Any, kind: type[BaseException] = kind) -> None:
            raise kind("in the middle")

        handle = [m for m in network.net.modules() if isinstance(m, nn.Linear)][-1].register_forward_hook(fail)
        with pytest.raises(kind, match="in the middle"):
            network(x, weights)
        handle.remove()
    assert slots(network.net) == held
    for name, value in network.net.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("build", SHARED)
@pytest.mark.parametrize("kind", ["dense", "point", "rank-1", "low-rank"])
def test_a_fit_trains_shared_layers_and_a_file_has_them(build: type[nn.Module], kind: str, tmp_path: Path) -> None:
    """Proves that the given network is left alone, that parameters are still tied and trained, and are saved."""
    torch.manual_seed(0)
    net, likelihood = build(), pb.likelihoods.Categorical()
    given = copy.deepcopy(net.state_dict())
    x, y = randn(32, 4), torch.arange(32) % 2
    model: pb.models.BayesianNetwork
    if kind == "rank-1":
        model = pb.models.Rank1(net, likelihood, 32, example=x)
        guide: Any = pb.models.Rank1Guide(model, 2)
    elif kind == "low-rank":
        model = pb.models.Bella(net, likelihood, 32, rank=2)
        guide = pb.models.ParticleGuide(model, 2, init="kaiming")
        plain = copy.deepcopy(net).eval()(x)
        outputs = pb.Posterior(model, guide).predict(x).outputs
        assert torch.allclose(outputs[0, 0], plain, atol=1e-6), "B = 0: the particles are the given network"
    else:
        model = pb.models.Dense(net, likelihood, 32)
        guide = pb.models.PointGuide(model) if kind == "point" else pb.models.MeanFieldGuide(model, 2)
    held = slots(model.core().net)
    trained = {n: p.requires_grad for n, p in model.named_parameters()}
    posterior = pb.inference.fit(model, guide, (x, y), epochs=2, lr=1e-2, seed=0, progress=False)
    assert slots(model.core().net) == held
    assert {n: p.requires_grad for n, p in model.named_parameters()} == trained
    if isinstance(model, pb.models.Rank1):
        own = model.core().parameters_by_name()
        assert model.weights and not any(torch.equal(net.get_parameter(n), own[n]) for n in model.weights)
    for name, value in net.state_dict().items():
        assert torch.equal(value, given[name]), name
    posterior.save(tmp_path / "saved")
    again = pb.load(tmp_path / "saved", build())
    assert torch.equal(again.predict(x, 2, seed=1).outputs, posterior.predict(x, 2, seed=1).outputs)


class Past(nn.Module):
    """Reads a weight of a layer past the layer."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
        self.how, self.weights, self.table = how, [self.a.weight], {"a": (self.a.weight,)}

    def forward(self, x: Tensor) -> Tensor:
        weight = {"list": self.weights[0], "dict": self.table["a"][0], "module": self.a.weight}[self.how]
        assert weight.shape == (4, 4) and self.weights[0].dtype == x.dtype
        return self.last(F.linear(x, weight).tanh())


@pytest.mark.parametrize("how", ["list", "dict"])
@pytest.mark.parametrize("members", [1, 3])
def test_a_weight_that_is_used_past_its_module_is_refused_by_name(how: str, members: int) -> None:
    """Proves the message, for a weight that cannot be replaced where the network has it; left out, it may be there."""
    network, x = Network(Past(how)), randn(ROWS, 4)
    weights = {"a.weight": randn(members, 4, 4), "last.weight": randn(members, 2, 4)}
    for _ in range(2):
        with pytest.raises(RuntimeError, match="parameter 'a.weight' without reading it from its module.*`select=`"):
            network.explicit(x, weights)
    del weights["a.weight"]
    assert network.explicit(x, weights).shape == (members, ROWS, 2)


def test_shape_and_type_of_a_weight_may_be_read_past_its_module() -> None:
    assert Network(Past("module")).explicit(randn(ROWS, 4), {"a.weight": randn(1, 4, 4)}).shape == (1, ROWS, 2)


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_an_exception_in_the_guide_leaves_all_slots_as_they_were(kind: type[BaseException]) -> None:
    torch.manual_seed(0)
    model = pb.models.Dense(TwoNames(), pb.likelihoods.Categorical(), 32)
    guide, held, calls = pb.models.MeanFieldGuide(model), slots(model.core().net), list[int]()

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise kind("in the guide")

    guide.register_forward_pre_hook(fail)
    with pytest.raises(kind, match="in the guide"):
        pb.inference.fit(model, guide, (randn(32, 4), torch.arange(32) % 2), epochs=5, seed=0, progress=False)
    assert slots(model.core().net) == held


def test_a_tie_outlives_a_state_that_is_assigned() -> None:
    """Proves that `load_state_dict` of Bella, which takes the tensors themselves, leaves one parameter in all slots."""
    torch.manual_seed(0)
    model = pb.models.Bella(Tied(), pb.likelihoods.Categorical(), 10, rank=2)
    state = {name: value + 1 for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    net = model.core().net
    assert net.get_parameter("a.weight") is net.get_parameter("b.weight")
    assert torch.equal(net.get_parameter("b.weight"), state["network.net.b.weight"])


def test_a_pass_starts_and_ends_buffers_with_two_names_alike() -> None:
    """Proves that two layers with the same statistics move them together, once in a step of several members."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.one, self.two = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)
            self.two.running_mean, self.two.running_var = self.one.running_mean, self.one.running_var

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(self.a(x)))

    network, x = Network(Net().train()), randn(ROWS, 4)
    weights = {"a.weight": randn(MEMBERS, 4, 4), "a.bias": randn(MEMBERS, 4, seed=1)}
    ends = []
    for m in range(MEMBERS):
        alone = copy.deepcopy(network.net)
        functional_call(alone, {n: w[m] for n, w in weights.items()}, (x,))
        ends.append(alone.one.running_mean)
    network.explicit(x, weights)
    assert network.net.one.running_mean is network.net.two.running_mean
    assert torch.allclose(network.net.one.running_mean, torch.stack(ends).mean(0), atol=1e-6)


# ------------------------------------------------------------------------------------- segments that run again


class Segments(nn.Module):
    """Layers a, b, c, of which a part runs again in the backward pass."""

    def __init__(self, kind: str = "plain", reentrant: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.drop = nn.Dropout(dropout)
        self.kind, self.reentrant = kind, reentrant

    def middle(self, h: Tensor) -> Tensor:
        return self.drop(self.b(h).relu() + h)

    def forward(self, x: Tensor) -> Tensor:
        again = {"use_reentrant": self.reentrant}
        if self.kind == "from the input":
            h = checkpoint(lambda z: self.middle(self.middle(self.a(z).tanh())), x, **again)
            return self.c(h)
        h = self.a(x).tanh()
        if self.kind == "closure":
            h = checkpoint(self.middle, checkpoint(self.middle, h, **again), **again)
        elif self.kind == "second use":
            h = checkpoint(self.middle, self.middle(h), **again)
        elif self.kind == "nested":

            def outer(z: Tensor) -> Tensor:
                return self.middle(checkpoint(self.middle, z, **again))

            h = checkpoint(outer, h, **again)
        elif self.kind == "sequential":
            h = checkpoint_sequential([self.middle, self.middle], 2, h, **again)
        elif self.kind == "weight handed over":
            for _ in range(2):
                h = checkpoint(
                    lambda z, w, b: self.drop(F.linear(z, w, b).relu() + z), h, self.b.weight, self.b.bias, **again
                )
        elif self.kind == "weight from outside":
            turned = self.b.weight.t()
            for _ in range(2):
                h = checkpoint(lambda z, w: self.drop((z @ w + self.b.bias).relu() + z), h, turned, **again)
        elif self.kind == "decorated":
            again_middle = checkpoint(**again)(self.middle)
            h = again_middle(again_middle(h))
        else:
            h = self.middle(self.middle(h))
        return self.c(h)


KINDS = [
    *("closure", "second use", "nested", "sequential", "weight handed over", "weight from outside", "decorated"),
    "from the input",
]


def networks(kind: str, reentrant: bool, dropout: float = 0.0) -> tuple[Segments, Segments]:
    """With and without segments."""
    torch.manual_seed(0)
    net = Segments(kind, reentrant, dropout)
    plain = copy.deepcopy(net)
    plain.kind = "plain"
    return net, plain


def require_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm() and other.norm() > 0


@pytest.mark.filterwarnings("ignore:the forward pass of Segments could not be vectorised")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_explicit_weights_through_segments(kind: str, reentrant: bool) -> None:
    """Proves it against torch itself, on the network without segments, for one member and for three."""
    net, plain = networks(kind, reentrant)
    network, x = Network(net), randn(ROWS, 4)
    for members in (1, MEMBERS):
        weights = {
            n: randn(members, *p.shape, seed=i).requires_grad_() for i, (n, p) in enumerate(plain.named_parameters())
        }
        y = torch.stack([functional_call(plain, {n: w[m] for n, w in weights.items()}, (x,)) for m in range(members)])
        expected = torch.autograd.grad(y.square().sum(), [*weights.values()])
        f = network.explicit(x, weights)
        torch.testing.assert_close(f, y)
        f.square().sum().backward()
        require_same([w.grad for w in weights.values()], list(expected))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "weight from outside"])
@pytest.mark.parametrize("form", ["rank-1", "low-rank"])
def test_the_gradient_of_perturbations_through_segments(kind: str, reentrant: bool, form: str) -> None:
    """Proves it against torch itself, on rows that are run one by one with explicit weights and without segments."""
    net, plain = networks(kind, reentrant)
    network, x = Network(net), randn(ROWS, 4)
    weights, biases = ["a.weight", "b.weight", "c.weight"], ["a.bias", "b.bias", "c.bias"]
    perturbations: dict[str, Perturbation] = dict(perturb(plain, weights, biases, MEMBERS, ROWS))
    leaves: list[Tensor] = [p for n, p in plain.named_parameters() if n in weights]
    for i, (name, p) in enumerate(perturbations.items()):
        if isinstance(p, Replacement):
            perturbations[name] = Replacement(p.value.float().requires_grad_())
        elif form == "rank-1":
            perturbations[name] = Rank1Factors(p.r.float().requires_grad_(), p.s.float().requires_grad_())
        else:
            rows, columns = plain.get_parameter(name).shape
            a, b = randn(MEMBERS, 2, columns, seed=i), randn(MEMBERS, rows, 2, seed=i + 9)
            perturbations[name] = LowRankFactors(a.requires_grad_(), b.requires_grad_(), 0.3)
        leaves += [t for t in perturbations[name] if isinstance(t, Tensor)]
    rows_ = [
        functional_call(plain, row_weights(plain, perturbations, m, r), (sample(x, ROWS, r),))[0]
        for m in range(MEMBERS)
        for r in range(ROWS)
    ]
    expected = torch.autograd.grad(torch.stack(rows_).square().sum(), leaves)
    f = network.perturbed(x, ROWS, perturbations, MEMBERS)
    torch.testing.assert_close(f.flatten(0, 1), torch.stack(rows_), rtol=1e-4, atol=1e-4)
    f.square().sum().backward()
    own = network.parameters_by_name()
    found = [own[n].grad for n in weights] + [t.grad for t in leaves[3:]]
    require_same(found, list(expected))
