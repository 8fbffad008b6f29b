"""Members are vectorised where they can be, in training too, and run one by one where they cannot, with a note."""

import copy
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import pyro_bnn as pb
from pyro_bnn.network import Network

N, MEMBERS = 10, 4
#: what is said when members start to run one by one
NOTE = r"could not be vectorised over members .*; from now on they run one by one, which gives the same"


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 2)


class Fill(Layers):
    """Writes into a tensor that it has made."""

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_zeros(len(x), 2)
        out[:, :] = self.b(self.a(x).tanh())
        return out


class Decision(Layers):
    """Does one thing or the other, by a value."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x).tanh())
        return y if y.sum() > 0 else -2 * y


class Check(Layers):
    """Checks its own output."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x).tanh())
        if torch.isnan(y).any():
            raise ValueError("not a number in the network")
        return y


class Translated(Layers):
    """Raises exceptions of its own in place of those that it gets."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x).tanh())
        try:
            assert bool((y == y).all())
        except RuntimeError:
            raise ValueError("the check failed") from None
        return y


class Mask(Layers):
    """Picks entries by a boolean mask."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).clone()
        h[h < 0] = 0.1 * h[h < 0]
        return self.b(h)


class Item(Layers):
    """Takes a number out of a tensor."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(h / h.detach().abs().max().item())


class ToList(Layers):
    """Takes a list out of a tensor, which fails without a word on vmap."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(h * len(h.detach().flatten().tolist()) / 50)


class Cell(nn.Module):
    """A loop over an LSTM cell."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.b = nn.LSTMCell(2, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), 5)
        for part in x.chunk(2, 1):
            h, c = self.cell(part, (h, c))
        return self.b(h)


class Remembers(Layers):
    """Puts a tensor into a buffer at every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        self.last = h.detach().mean(0)
        return self.b(h.tanh())


class Accumulates(Remembers):
    """Adds to a buffer in place at every pass."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        self.last += h.detach().mean(0)
        return self.b(h.tanh())


class Scale(torch.autograd.Function):
    """A function without a rule for vmap."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


class OwnFunction(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(Scale.apply(self.a(x)))


HARD = [Fill, Decision, Check, Translated, Mask, Item, ToList, Cell, Remembers, Accumulates, OwnFunction]


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, 4, generator=generator), torch.randint(0, 2, (N,), generator=generator)


def draws(net: nn.Module, members: int = MEMBERS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {n: torch.randn(members, *p.shape, generator=generator) for n, p in net.named_parameters()}


def one_by_one(net: nn.Module, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """As torch itself runs them."""
    net = copy.deepcopy(net)
    return torch.stack([functional_call(net, {n: w[m] for n, w in weights.items()}, (x,)) for m in range(MEMBERS)])


# ---------------------------------------------------------------------------------------------- the way back


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("build", HARD)
def test_what_cannot_be_vectorised_runs_one_by_one_and_says_so_once(build: type[nn.Module], train: bool) -> None:
    """Proves outputs and gradients against torch itself, and that the note comes with the first pass alone."""
    torch.manual_seed(0)
    network, (x, _) = Network(build().train(train)), data()
    weights = {n: w.requires_grad_() for n, w in draws(network.net).items()}
    expected = one_by_one(network.net, x, weights)
    gradients = torch.autograd.grad(expected.square().sum(), [*weights.values()])
    with pytest.warns(UserWarning, match=f"the forward pass of {build.__name__} {NOTE}"):
        f = network.explicit(x, weights)
    torch.testing.assert_close(f, expected, rtol=1e-6, atol=1e-6)
    found = torch.autograd.grad(f.square().sum(), [*weights.values()])
    for one, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    copy.deepcopy(network.net), network.net.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(network.explicit(x, weights), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:the forward pass of")
@pytest.mark.parametrize("build", [Fill, Decision, Mask, Item, Cell])
def test_every_engine_that_trains_such_a_network_also_predicts(build: type[nn.Module]) -> None:
    """Proves that a posterior of each is finite, and that a draw of it is the network with the weights of the draw."""
    torch.manual_seed(0)
    net, likelihood, (x, y) = build(), pb.likelihoods.Categorical(), data()
    quiet: dict[str, Any] = {"seed": 0, "progress": False}
    dense = pb.models.Dense(net, likelihood, N)
    sharing = pb.models.WeightSharing(net, likelihood, N)
    slab = pb.models.SpikeSlab(net, likelihood, N)
    kernel = pb.inference.SGHMC(slab, (x, y), step_size=1e-3, friction=0.1, capture=False)
    posteriors = [
        pb.inference.fit(dense, pb.models.MeanFieldGuide(dense, 2), (x, y), epochs=1, **quiet),
        pb.inference.fit(sharing, pb.models.CodebookGuide(sharing, 4), (x, y), epochs=1, **quiet),
        pb.inference.DeepEnsemble(net, likelihood, N, num_networks=2).fit((x, y), epochs=1, **quiet),
        pb.inference.SWAG(net, likelihood, N).fit((x, y), epochs=2, **quiet),
        pb.inference.sample(kernel, 3, progress=False, seed=0),
    ]
    for posterior in posteriors:
        outputs = posterior.predict(x, 2, seed=0).outputs
        assert torch.isfinite(outputs).all() and outputs.shape[-2:] == (N, 2)
    chosen = posteriors[2]
    for i, own in enumerate(chosen.networks(2)):
        torch.testing.assert_close(own.eval()(x), chosen.predict(x, 2).outputs.flatten(0, 1)[i])


@pytest.mark.filterwarnings("ignore:the forward pass of")
@pytest.mark.parametrize("build", [Fill, Decision, Mask, Item])
def test_dropout_as_a_posterior_of_such_a_network(build: type[nn.Module]) -> None:
    """Proves that the masks of MC dropout give the same functions whether rows come together or apart."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3), build())
    (x, y), engine = data(), pb.inference.MCDropout(net, pb.likelihoods.Categorical(), N)
    posterior = engine.fit((x, y), epochs=1, seed=0, progress=False)
    apart = torch.cat([posterior.predict(x[i : i + 1], 5, seed=3).outputs for i in range(N)], -2)
    if build in (Fill, Mask):  # the others look at all rows before they decide
        torch.testing.assert_close(posterior.predict(x, 5, seed=3).outputs, apart)
    assert apart.std(0).max() > 1e-3


@pytest.mark.parametrize("build", [Decision, Translated, Mask, Item])
def test_chains_of_such_a_network_run_one_by_one(build: type[nn.Module]) -> None:
    """Proves that several chains move, and to other places, with a note that is given once."""
    torch.manual_seed(0)
    model = pb.models.SpikeSlab(build(), pb.likelihoods.Categorical(), N)
    kernel = pb.inference.SGHMC(model, data(), step_size=1e-3, friction=0.1, batch_size=5, capture=False)
    with pytest.warns(UserWarning, match="the model could not be vectorised over chains") as noted:
        draws_ = pb.inference.sample(kernel, 4, 0, 3, seed=0, progress=False).draws(12)["a.weight"]
    assert sum("over chains" in str(w.message) for w in noted) == 1
    assert torch.isfinite(draws_).all() and len(draws_.flatten(1).unique(dim=0)) == 12


def test_chains_one_by_one_have_the_gradients_of_chains_together() -> None:
    """Proves it by the same network with and without a decision that always falls alike."""

    class Plain(Layers):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).tanh())

    results = []
    for build in (Plain, Check):
        torch.manual_seed(0)
        model = pb.models.SpikeSlab(build(), pb.likelihoods.Categorical(), N)
        kernel = pb.inference.SGHMC(model, data(), step_size=1e-3, friction=0.1, batch_size=5, capture=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results.append(pb.inference.sample(kernel, 4, 0, 3, seed=0, progress=False).draws(12))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "error",
    [ValueError("of the user"), RuntimeError("shapes cannot be multiplied"), KeyError("key"), RuntimeError("vmap")],
)
def test_an_exception_of_the_network_itself_comes_out_as_it_is(error: Exception) -> None:
    """Proves that it is no reason to run one by one, whatever its type or text: afterwards members run together."""
    network, (x, _) = Network(nn.Sequential(nn.Linear(4, 2))), data()

    def fail(*_: Any) -> None:
        raise error

    handle = network.net.register_forward_hook(fail)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(type(error)) as raised:
            network.explicit(x, draws(network.net))
        assert raised.value is error
        handle.remove()
        calls: list[int] = []
        network.net.register_forward_hook(lambda *_: calls.append(1))
        network.explicit(x, draws(network.net))
    assert len(calls) == 1


def test_a_lack_of_memory_is_no_reason_to_run_one_by_one() -> None:
    network, (x, _) = Network(nn.Sequential(nn.Linear(4, 2))), data()
    for failure in (torch.OutOfMemoryError("out of memory"), MemoryError("none left")):
        calls: list[int] = []

        def once(*_: Any, calls: list[int] = calls, failure: Exception = failure) -> None:
            calls.append(1)
            if len(calls) == 1:
                raise failure

        handle = network.net.register_forward_hook(once)
        with pytest.raises(type(failure)):
            network.explicit(x, draws(network.net))
        handle.remove()


def test_what_was_random_before_a_failure_is_drawn_again() -> None:
    """Proves that the first pass, which fails half-way, gives what all later ones give with the same seed."""

    class Noisy(Layers):
        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            h = h + torch.randn_like(h)
            return self.b(h) if h.sum() > 0 else self.b(-h)

    network, (x, _) = Network(Noisy()), data()
    weights, results = draws(network.net), []
    for _ in range(3):
        torch.manual_seed(5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results.append(network.explicit(x, weights))
    assert torch.equal(results[0], results[1]) and torch.equal(results[1], results[2])


# ------------------------------------------------------------------------------------ vectorised in training too


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.b = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.layer(x[:, None].expand(-1, 3, -1)).mean(1))


def deep(layers: int = 40, width: int = 4) -> nn.Sequential:
    parts = [part for _ in range(layers) for part in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(*parts, nn.Linear(width, 2))


EASY: dict[str, Callable[[], nn.Module]] = {
    "linear": deep,
    "layer norm": lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 2)),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)
    ),
    "batch norm without statistics": lambda: nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5, 2)
    ),
    "frozen batch norm": lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5).eval(), nn.Linear(5, 2)),
    "attention": Attention,
}


@pytest.mark.parametrize("name", EASY)
def test_members_are_vectorised_in_training(name: str) -> None:
    """Proves that the network is called once, with the outputs and gradients that torch gives one by one."""
    torch.manual_seed(0)
    net = EASY[name]()
    network, (x, _), calls = Network(net), data(), list[int]()
    assert network.net.training
    weights = {n: (0.5 * w).requires_grad_() for n, w in draws(net).items()}
    expected = one_by_one(net, x, weights)
    gradients = torch.autograd.grad(expected.sum(), [*weights.values()])
    network.net.register_forward_hook(lambda *_: calls.append(1))
    f = network.explicit(x, weights)
    assert len(calls) == 1
    torch.testing.assert_close(f, expected, rtol=1e-5, atol=1e-6)
    for one, other in zip(torch.autograd.grad(f.sum(), [*weights.values()]), gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["batch norm", "instance norm", "recurrent"])
def test_what_moves_in_training_runs_member_by_member_without_a_note(name: str) -> None:
    """Proves it by the number of calls: statistics are those of one pass each, and recurrent kernels are fused."""
    nets: dict[str, Callable[[], nn.Module]] = {
        "batch norm": lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)),
        "instance norm": lambda: nn.Sequential(
            nn.Unflatten(1, (2, 2)), nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten(), nn.Linear(4, 2)
        ),
        "recurrent": lambda: nn.Sequential(nn.Unflatten(1, (2, 2)), nn.GRU(2, 3, batch_first=True)),
    }
    network, (x, _), calls = Network(nets[name](), 0 if name == "recurrent" else None), data(), list[int]()
    expected = [functional_call(copy.deepcopy(network.net), w, (x,)) for w in rows_of(draws(network.net))]
    network.net.register_forward_hook(lambda *_: calls.append(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        f = network.explicit(x, draws(network.net))
    assert len(calls) == MEMBERS
    torch.testing.assert_close(f, torch.stack([e[0] if isinstance(e, tuple) else e for e in expected]))


def rows_of(weights: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [{n: w[m] for n, w in weights.items()} for m in range(MEMBERS)]


class DropsInput(Layers):
    """Drops its input, which is the same for all members, and what it makes of it, by modules and by a function."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(self.a(F.dropout(x, 0.5, self.training)), 0.5, self.training)
        return self.b(h)


DROPOUTS: dict[str, Callable[[], nn.Module]] = {
    "input": DropsInput,
    "module": lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 2)),
    "in place": lambda: nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5, inplace=True), nn.Linear(5, 2)),
    "alpha": lambda: nn.Sequential(nn.AlphaDropout(0.5), nn.Linear(4, 5), nn.AlphaDropout(0.5), nn.Linear(5, 2)),
    "channels": lambda: nn.Sequential(nn.Unflatten(1, (4, 1)), nn.Dropout1d(0.5), nn.Flatten(), nn.Linear(4, 2)),
}


@pytest.mark.parametrize("name", DROPOUTS)
def test_every_member_has_a_dropout_mask_of_its_own(name: str) -> None:
    """Proves it for members with the same weights: no two have the same output, and the mean is that of one by one.

    Means of 4,000 members differ by less than 5 standard errors.
    """
    torch.manual_seed(0)
    net, (x, _), members = DROPOUTS[name](), data(), 4000
    weights = {n: p.detach().expand(members, *p.shape) for n, p in net.named_parameters()}
    f = Network(net).explicit(x, weights)
    assert len(f.flatten(1)[:20].unique(dim=0)) == 20
    apart = torch.stack([net(x) for _ in range(members)]).detach()
    error = (f.var(0) / members + apart.var(0) / members).sqrt()
    assert ((f.mean(0) - apart.mean(0)).abs() <= 5 * error + 1e-7).all()


@pytest.mark.slow
def test_members_together_are_faster_than_one_by_one() -> None:
    """Proves a factor of 2.5 for a training step of 16 members of 40 small layers, by the best of five times each."""
    torch.manual_seed(0)
    network, (x, _) = Network(deep()), data()
    weights = {n: w.requires_grad_() for n, w in draws(network.net, 16).items()}

    def together() -> Tensor:
        return network.explicit(x, weights)

    def apart() -> Tensor:
        return torch.stack([network(x, {n: w[m] for n, w in weights.items()}) for m in range(16)])

    def seconds(run: Callable[[], Tensor]) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            run().sum().backward()
            times.append(time.perf_counter() - start)
        return min(times)

    assert seconds(apart) >= 2.5 * seconds(together)
