"""What a network holds fixed stays fixed in every model and engine; what cannot be random is refused by name."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import pyro_bnn as pb

WORDS, PAD = 10, 2
LIKELIHOOD = pb.likelihoods.Categorical()


class Texts(nn.Module):
    """A table whose row for padding has a value of its own, which torch never moves."""

    def __init__(self, bag: bool = False, **options: Any) -> None:
        super().__init__()
        self.is_bag = bag
        self.e = (nn.EmbeddingBag if bag else nn.Embedding)(WORDS, 4, padding_idx=PAD, **options)
        self.o = nn.Linear(4, 2)
        with torch.no_grad():
            self.e.weight[PAD] = torch.tensor([0.5, -1.0, 2.0, 0.25])

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.e(x) if self.is_bag else self.e(x).sum(1))


def texts(n: int = 24) -> tuple[Tensor, Tensor]:
    x = torch.randint(0, WORDS, (n, 5))
    x[:, 3:] = PAD
    return x, (x[:, 0] > 5).long()


def padded(net: nn.Module) -> Tensor:
    return net.get_parameter("e.weight")[PAD]


def fit(model: Any, guide: Any) -> pb.Posterior:
    return pb.inference.fit(model, guide, texts(), epochs=3, lr=0.05, progress=False, seed=0)


def dense(net: nn.Module) -> pb.Posterior:
    model = pb.models.Dense(net, LIKELIHOOD, 24)
    return fit(model, pb.models.MeanFieldGuide(model, 2))


def spike_slab(net: nn.Module) -> pb.Posterior:
    model = pb.models.SpikeSlab(net, LIKELIHOOD, 24)
    return fit(model, pb.models.MeanFieldGuide(model))


def weight_sharing(net: nn.Module) -> pb.Posterior:
    model = pb.models.WeightSharing(net, LIKELIHOOD, 24)
    return fit(model, pb.models.CodebookGuide(model, codes=6))


def rank1(net: nn.Module) -> pb.Posterior:
    model = pb.models.Rank1(net, LIKELIHOOD, 24)
    return fit(model, pb.models.Rank1Guide(model, 2))


def bella(net: nn.Module) -> pb.Posterior:
    model = pb.models.Bella(net, LIKELIHOOD, 24, select=["e", "o.weight"])
    return pb.inference.SVGD(model, pb.models.ParticleGuide(model, 2)).fit(texts(), epochs=2, progress=False)


def ensemble(net: nn.Module) -> pb.Posterior:
    def build() -> nn.Module:
        other = copy.deepcopy(net)
        with torch.no_grad():
            other.o.weight.normal_()
        return other

    engine = pb.inference.DeepEnsemble(net, LIKELIHOOD, 24, num_networks=2, build=build)
    return engine.fit(texts(), epochs=2, progress=False)


def sghmc(net: nn.Module) -> pb.Posterior:
    model = pb.models.Dense(net, LIKELIHOOD, 24)
    kernel = pb.inference.SGHMC(model, texts(), step_size=1e-3, friction=0.1)
    return pb.inference.sample(kernel, num_samples=3, warmup_steps=2, progress=False)


ENGINES: dict[str, Callable[[nn.Module], pb.Posterior]] = {
    f.__name__: f for f in (dense, spike_slab, weight_sharing, rank1, bella, ensemble, sghmc)
}


@pytest.mark.parametrize("engine", ENGINES)
def test_the_row_for_padding_is_fixed(engine: str, tmp_path: Path) -> None:
    """Proves that networks of the posterior, its draws, and what is loaded from it all have the row as it was given."""
    net = Texts()
    fixed = padded(net).detach().clone()
    posterior = ENGINES[engine](net)
    assert torch.equal(padded(net), fixed), "the given network is left alone"
    for own in posterior.networks(2, seed=0):
        assert torch.equal(padded(own), fixed)
    draws = posterior.draws(2, seed=0)
    if "e.weight" in draws:
        assert torch.equal(draws["e.weight"][..., PAD, :], fixed.expand(2, posterior.num_members, 4))
        assert draws["e.weight"][:, :, 0].std() > 0
    x = torch.full((1, 5), PAD)
    assert posterior.predict(x, seed=0).outputs.isfinite().all()
    posterior.save(tmp_path / "p")
    other, x = Texts(), texts()[0]
    nn.init.zeros_(other.e.weight)
    loaded = pb.load(tmp_path / "p", other)
    assert torch.equal(padded(loaded.networks(1)[0]), fixed)
    assert torch.equal(loaded.predict(x, seed=1).outputs, posterior.predict(x, seed=1).outputs)


def test_predictions_are_those_of_the_plain_networks_that_have_the_row() -> None:
    """Proves by an input of padding alone that no draw sees another row, in a table and in a bag of one."""
    x = torch.full((3, 5), PAD)
    for bag in (False, True):
        net = Texts(bag=bag, **({"mode": "sum"} if bag else {}))
        model = pb.models.Dense(net, LIKELIHOOD, 24, select="e")
        posterior = pb.Posterior(model, pb.models.MeanFieldGuide(model, init_scale=1.0))
        outputs = posterior.predict(x, num_samples=4, seed=0).outputs[:, 0]
        assert torch.allclose(outputs, net(x).detach().expand_as(outputs), atol=1e-6)


@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_are_those_of_plain_autograd_on_explicit_weights(sparse: bool) -> None:
    """Proves for a table with a row for padding, with dense and with sparse gradients, that Dense is plain torch."""
    net = Texts(sparse=sparse)
    x, y = texts()
    model = pb.models.Dense(net, LIKELIHOOD, 24)
    weights = {n: (p.detach() + 0.1).requires_grad_() for n, p in net.named_parameters()}
    with torch.no_grad():
        weights["e.weight"][PAD] = padded(net)
    f = model.function(x, {n: w[None, None] for n, w in weights.items()}, 24).reshape(24, 2)
    own = torch.autograd.grad(F.cross_entropy(f, y), list(weights.values()))
    plain = torch.autograd.grad(F.cross_entropy(torch.func.functional_call(net, weights, x), y), list(weights.values()))
    for mine, expected in zip(own, plain, strict=True):
        assert torch.allclose(mine, expected.to_dense() if expected.is_sparse else expected, atol=1e-6)
    assert not own[0][PAD].any()


def test_a_tied_table_is_random_in_all_rows() -> None:
    """Proves that a row for padding that is also the output weight of a word is a weight as others, in both forms."""

    class Tied(Texts):
        def __init__(self) -> None:
            super().__init__()
            self.o = nn.Linear(4, WORDS)
            self.o.weight = self.e.weight

    x = texts()[0]
    model = pb.models.Dense(Tied(), LIKELIHOOD, 24)
    posterior = pb.Posterior(model, pb.models.MeanFieldGuide(model, init_scale=1.0))
    assert posterior.draws(4, seed=0)["e.weight"][..., PAD, :].std(0).min() > 0
    factors = pb.models.Rank1(Tied(), LIKELIHOOD, 24, example=x)  # is checked against explicit weights
    assert factors.weights == ["e.weight"]


# ------------------------------------------------------------------------------------------------- frozen parameters


def partly_frozen() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    net[2].requires_grad_(False)
    net[4].bias.requires_grad_(False)
    return net


def test_frozen_parameters_are_not_random_in_any_model() -> None:
    """Proves for all models that nothing of a frozen parameter is a site, that training leaves it, and that it is
    saved as it is."""
    net = partly_frozen()
    frozen = {n: p.detach().clone() for n, p in net.named_parameters() if not p.requires_grad}
    data = torch.randn(12, 3), torch.randint(0, 2, (12,))
    for kind, guide in (
        (pb.models.Dense, pb.models.MeanFieldGuide),
        (pb.models.SpikeSlab, pb.models.MeanFieldGuide),
        (pb.models.WeightSharing, partial(pb.models.CodebookGuide, codes=6)),
        (pb.models.Rank1, pb.models.Rank1Guide),
        (pb.models.Bella, pb.models.ParticleGuide),
    ):
        model = kind(net, LIKELIHOOD, 12)
        assert not [s.name for s in model.sites() if s.name.startswith(("2.", "4.bias"))], kind.__name__
        posterior = pb.inference.fit(model, guide(model), data, epochs=2, lr=0.1, progress=False)
        own = dict(posterior.networks(1)[0].named_parameters())
        assert all(torch.equal(own[n], value) for n, value in frozen.items()), kind.__name__
        assert model.forms()["2.weight"] == "frozen"


def test_frozen_parameters_stay_in_samplers() -> None:
    net = partly_frozen()
    data = torch.randn(12, 3), torch.randint(0, 2, (12,))
    kernel = pb.inference.SGHMC(pb.models.Dense(net, LIKELIHOOD, 12), data, step_size=1e-3, friction=0.1)
    posterior = pb.inference.sample(kernel, num_samples=2, warmup_steps=2, progress=False)
    own = posterior.networks(1)[0]
    assert torch.equal(own.get_parameter("2.weight"), net[2].weight)
    assert "2.weight" not in posterior.draws(1)


@pytest.mark.parametrize("select", ["2.weight", "2", r"2\..*", lambda name, p: name == "2.weight"])
def test_a_frozen_parameter_is_random_when_it_is_picked(select: Any) -> None:
    for kind in (pb.models.Dense, pb.models.SpikeSlab, pb.models.WeightSharing, pb.models.Rank1, pb.models.Bella):
        model = kind(partly_frozen(), LIKELIHOOD, 12, select=select)
        assert any(s.name.startswith("2.weight") for s in model.sites())
        assert not any(s.name.startswith("0.weight") for s in model.sites())


def test_a_network_that_is_frozen_as_a_whole_is_refused_and_the_advice_works() -> None:
    net = partly_frozen().requires_grad_(False)
    for kind in (pb.models.Dense, pb.models.SpikeSlab, pb.models.WeightSharing, pb.models.Rank1, pb.models.Bella):
        with pytest.raises(ValueError, match="all of them are frozen.*select=.*requires_grad_"):
            kind(net, LIKELIHOOD, 12)
        kind(net, LIKELIHOOD, 12, select="4")
        kind(copy.deepcopy(net).requires_grad_(), LIKELIHOOD, 12)


# ------------------------------------------------------------------- what cannot be random, and computed weights

MODELS = (pb.models.Dense, pb.models.SpikeSlab, pb.models.WeightSharing, pb.models.Rank1, pb.models.Bella)


@pytest.mark.parametrize("bag", [False, True])
def test_a_random_table_with_max_norm_is_refused(bag: bool) -> None:
    for kind in MODELS:
        with pytest.raises(ValueError, match="'e.weight' has max_norm|matches none of the weights|no rule"):
            kind(Texts(bag=bag, max_norm=1.0), LIKELIHOOD, 24, select="e")


def test_bella_does_not_write_into_a_table_with_max_norm() -> None:
    """Proves that the given table, whose rows are longer than max_norm allows, keeps every bit of them."""
    net = Texts(max_norm=0.5)
    before = net.e.weight.detach().clone()
    model = pb.models.Bella(net, LIKELIHOOD, 24)
    guide = pb.models.ParticleGuide(model, 2)
    posterior = pb.inference.SVGD(model, guide).fit(texts(), epochs=1, progress=False)
    predicted = posterior.predict(texts()[0])
    assert torch.equal(net.e.weight, before)
    assert predicted.outputs.isfinite().all()


def layer(how: str) -> nn.Module:
    one = nn.Linear(4, 4)
    if how == "weight_norm":
        return nn.utils.weight_norm(one)
    if how == "spectral_norm":
        return nn.utils.spectral_norm(one)
    if how == "prune":
        return prune.l1_unstructured(one, "weight", amount=0.5)
    return {
        "new weight_norm": parametrizations.weight_norm,
        "new spectral_norm": parametrizations.spectral_norm,
        "orthogonal": parametrizations.orthogonal,
    }[how](one)


def plain(how: str, one: nn.Module) -> nn.Module:
    """The remedy that messages name."""
    if how == "weight_norm":
        return nn.utils.remove_weight_norm(one)
    if how == "spectral_norm":
        return nn.utils.remove_spectral_norm(one)
    if how == "prune":
        return prune.remove(one, "weight")
    return parametrize.remove_parametrizations(one, "weight")


COMPUTED = ["weight_norm", "new weight_norm", "spectral_norm", "new spectral_norm", "prune", "orthogonal"]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("how", COMPUTED)
def test_a_computed_weight_takes_no_factors_and_the_advice_works(how: str) -> None:
    """Proves that it is neither blamed on rows nor silently left out, and that both remedies give a model that runs."""
    x = torch.randn(5, 4)
    data = x, torch.randint(0, 2, (5,))
    for kind, guide in ((pb.models.Rank1, pb.models.Rank1Guide), (pb.models.Bella, pb.models.ParticleGuide)):
        net = nn.Sequential(nn.Linear(4, 4), layer(how), nn.Linear(4, 2))
        net(x)  # it has been used
        with pytest.raises(ValueError, match="'1' computes its weight"):
            kind(net, LIKELIHOOD, 5)
        for model in (kind(net, LIKELIHOOD, 5, select=["0", "2"]),):
            before = copy.deepcopy(model.core().net.state_dict())
            pb.inference.fit(model, guide(model, 2), data, epochs=2, progress=False).predict(x)
            if kind is pb.models.Bella:
                after = model.core().net.state_dict()
                assert all(torch.equal(after[n], value) for n, value in before.items())
        plain(how, net[1])
        model = kind(net, LIKELIHOOD, 5)
        pb.inference.fit(model, guide(model, 2), data, epochs=1, progress=False).predict(x)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("how", COMPUTED)
def test_dense_draws_what_a_weight_is_computed_from(how: str, tmp_path: Path) -> None:
    """Proves that predictions are those of the plain network with the draw's own parameters, in train and eval mode
    alike; a spectral norm, whose vectors are no draw's own, is refused, and its advice works."""
    x = torch.randn(5, 4)
    net = nn.Sequential(nn.Linear(4, 4), layer(how), nn.Linear(4, 2))
    if "spectral" in how:
        with pytest.raises(ValueError, match="spectral_norm.*'1'.*select="):
            pb.models.Dense(net, LIKELIHOOD, 5)
        pb.models.Dense(net, LIKELIHOOD, 5, select=["0", "2"])
        plain(how, net[1])
    model = pb.models.Dense(net, LIKELIHOOD, 5)
    guide = pb.models.MeanFieldGuide(model, 2)
    posterior = pb.inference.fit(model, guide, (x, torch.randint(0, 2, (5,))), epochs=2, progress=False)
    outputs = posterior.predict(x, num_samples=3, seed=0).outputs
    draws = posterior.draws(3, seed=0)
    for draw in range(3):
        for member in range(2):
            weights = {name: value[draw, member] for name, value in draws.items()}
            with torch.no_grad():
                expected = torch.func.functional_call(net, weights, x)
            assert torch.allclose(outputs[draw, member], expected, atol=1e-5)
    assert all(own(x).isfinite().all() for own in posterior.networks(2))
    posterior.save(tmp_path / "p")
    assert torch.equal(pb.load(tmp_path / "p", net).predict(x, 3, seed=0).outputs, outputs)


def test_complex_parameters_are_refused_by_name_and_the_advice_works() -> None:
    class Spectrum(nn.Module):
        def __init__(self, real: bool) -> None:
            super().__init__()
            w = torch.randn(4, 3, dtype=torch.complex64)
            self.w = nn.Parameter(torch.view_as_real(w).contiguous() if real else w)
            self.o, self.real = nn.Linear(4, 2), real

        def forward(self, x: Tensor) -> Tensor:
            w = torch.view_as_complex(self.w) if self.real else self.w
            return self.o((x.to(w.dtype) @ w.t()).abs())

    x, y = torch.randn(6, 3), torch.randint(0, 2, (6,))
    for kind in MODELS[:3]:
        with pytest.raises(ValueError, match="'w' is complex.*view_as_real"):
            kind(Spectrum(False), LIKELIHOOD, 6)
        model = kind(Spectrum(False), LIKELIHOOD, 6, select="o")
        pb.inference.fit(model, pb.models.MeanFieldGuide(model), (x, y), epochs=1, progress=False).predict(x)
        model = kind(Spectrum(True), LIKELIHOOD, 6)
        pb.inference.fit(model, pb.models.MeanFieldGuide(model), (x, y), epochs=1, progress=False).predict(x)
    for kind in MODELS[3:]:
        layers = nn.Sequential(nn.Linear(3, 4, dtype=torch.complex64), nn.Linear(4, 2))
        with pytest.raises(ValueError, match="'0.weight' is complex"):
            kind(layers, LIKELIHOOD, 6)
