"""The copy that a model works on: of networks that were used, wrapped or compiled; what cannot be copied is named."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyro_bnn as pb

LIKELIHOOD = pb.likelihoods.Categorical()
MODELS = {
    pb.models.Dense: pb.models.MeanFieldGuide,
    pb.models.SpikeSlab: pb.models.MeanFieldGuide,
    pb.models.WeightSharing: pb.models.MeanFieldGuide,
    pb.models.Rank1: pb.models.Rank1Guide,
    pb.models.Bella: pb.models.ParticleGuide,
}


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(8, 5), torch.randint(0, 3, (8,))


def compiled_in_place(net: nn.Module) -> nn.Module:
    net.compile(backend="eager")
    return net


WRAPPED: dict[str, Any] = {
    "DataParallel": nn.DataParallel,
    "compiled": lambda net: torch.compile(net, backend="eager"),
    "compiled in place": compiled_in_place,
    "compiled within DataParallel": lambda net: nn.DataParallel(torch.compile(net, backend="eager")),
}


@pytest.mark.parametrize("how", WRAPPED)
def test_a_wrapped_network_is_the_network_inside(how: str, tmp_path: Path) -> None:
    """Proves for every model that sites have the names of the plain network, that parts of the wrapped one select, that
    it says what is left away, and that saving and loading take either."""
    x, y = data()
    for kind, guide in MODELS.items():
        net = plain()
        wrapped = WRAPPED[how](net)
        with pytest.warns(UserWarning, match="plain copy of the network, without the (compilation|DataParallel)"):
            model = kind(wrapped, LIKELIHOOD, 8)
        assert [s.name for s in model.sites()] == [s.name for s in kind(plain(), LIKELIHOOD, 8).sites()]
        kind(net, LIKELIHOOD, 8, select=net[2])
        posterior = pb.inference.fit(model, guide(model, 2), (x, y), epochs=1, progress=False)
        posterior.save(tmp_path / kind.__name__)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            for other in (plain(), WRAPPED[how](plain())):
                loaded = pb.load(tmp_path / kind.__name__, other)
                assert torch.equal(loaded.predict(x, seed=0).outputs, posterior.predict(x, seed=0).outputs)


class Keeps(nn.Module):
    """Keeps what it computed, at several depths, as networks keep attention maps and auxiliary losses."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)
        self.kept: dict[str, Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        self.kept["maps"] = [h, (h * 2,)]
        self.last = h.sum()
        return self.b(h)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("make", [Keeps, lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(5, 3)))])
def test_a_network_that_was_used_is_copied(make: Any) -> None:
    """Proves it before a model is made, and after passes that were vectorised: plain networks can still be had."""
    x, y = data()
    net = make()
    net(x)
    model = pb.models.Dense(net, LIKELIHOOD, 8)
    posterior = pb.inference.fit(model, pb.models.MeanFieldGuide(model, 3), (x, y), epochs=1, progress=False)
    posterior.predict(x, num_samples=2)
    assert posterior.networks(1)[0](x).shape == (8, 3)
    again = pb.models.Dense(model.core().net.requires_grad_(), LIKELIHOOD, 8)
    pb.inference.fit(again, pb.models.MeanFieldGuide(again), (x, y), epochs=1, progress=False)
    ensemble = pb.inference.DeepEnsemble(net, LIKELIHOOD, 8, num_networks=2, build=make)
    ensemble.fit((x, y), epochs=1, progress=False).predict(x)


def quantised() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(plain(), {nn.Linear})


def inner(wrap: Any) -> nn.Module:
    net = plain()
    net[2] = wrap(net[2])
    return net


REFUSED: dict[str, tuple[Any, str]] = {
    "script": (lambda: torch.jit.script(plain()), "program of TorchScript.*nn.Module that it was made of"),
    "trace": (lambda: torch.jit.trace(plain(), torch.randn(2, 5)), "program of TorchScript"),
    "script inside": (lambda: inner(torch.jit.script), "part '2'.*program of TorchScript"),
    "quantised": (quantised, "part '0'.*quantised.*floating point"),
    "DataParallel inside": (lambda: inner(nn.DataParallel), r"net\.2 = net\.2\.module"),
    "compiled inside": (lambda: inner(lambda m: torch.compile(m, backend="eager")), r"net\.2 = net\.2\._orig_mod"),
    "lazy": (
        lambda: nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 3)),
        "no shape yet: lazy layers need one run of the network",
    ),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_have_other_weights_is_refused_by_name(what: str) -> None:
    make, message = REFUSED[what]
    for kind in MODELS:
        with pytest.raises((TypeError, ValueError), match=message):
            kind(make(), LIKELIHOOD, 8)
    with pytest.raises((TypeError, ValueError), match=message):
        pb.inference.DeepEnsemble(make(), LIKELIHOOD, 8)
