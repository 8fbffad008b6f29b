"""Bella: what is shared and what is not, the prior on the product's scale, which weights are adapted, and engines."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pyro
import pytest
import torch
import torchvision
from pyro import poutine
from pyro.infer import MCMC, NUTS, Predictive
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn.inference import SVGD, cosine, fit
from pyro_bnn.models import Bella, ParticleGuide
from pyro_bnn.models.architectures import resnet18
from pyro_bnn.network import NORMALISATIONS
from pyro_bnn.priors import HierarchicalNormal, Laplace, Normal, SpikeAndSlab

CLASSES = pb.likelihoods.Categorical()


def images(n: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, 16, 16, generator=generator), torch.randint(4, (n,), generator=generator)


def small(**options: Any) -> tuple[nn.Module, Bella]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    return net, Bella(net, CLASSES, 20, **options)


def rows() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(20, 3, dtype=torch.float64, generator=generator)
    return x, (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()


# ------------------------------------------------------------------------------------- the frozen network


def test_the_given_weights_are_shared_and_never_change() -> None:
    """One storage for W_0, whatever the particles do; no gradient, no moved statistics; the network is the user's."""
    torch.manual_seed(0)
    net = resnet18(4).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    model = Bella(net, CLASSES, 8)
    guide = ParticleGuide(model, particles=3)
    fit(model, guide, images(), epochs=2, progress=False)
    for (name, mine), (_, theirs) in zip(model.core().net.named_parameters(), net.named_parameters(), strict=True):
        assert mine.data_ptr() == theirs.data_ptr(), name
        assert mine.grad is None and not mine.requires_grad and theirs.requires_grad
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(torch.equal(before[name], value) for name, value in model.core().net.state_dict().items())
    assert net.training
    trained = [p for p in [*model.parameters(), *guide.parameters()] if p.requires_grad]
    assert sum(p.numel() for p in trained) == 3 * sum(site.shape.numel() for site in model.sites())


@pytest.mark.parametrize("init", ["kaiming", "orthogonal"])
def test_particles_start_as_the_given_network(init: Any) -> None:
    """B A = 0 at the start: with "kaiming" as B is zero, with "orthogonal" although neither factor is."""
    net, model = small()
    guide = ParticleGuide(model, particles=3, init=init)
    x, _ = rows()
    prediction = pb.Posterior(model, guide).predict(x, num_samples=1)
    for member in prediction.outputs[0]:
        torch.testing.assert_close(member, net(x))
    values = guide.coordinates()
    assert not torch.equal(values["0.weight.A"][0], values["0.weight.A"][1])
    assert bool(values["0.weight.B"].any()) == (init == "orthogonal")


def test_particles_start_at_draws_from_the_prior() -> None:
    """Proves mean and deviation of factors and head over 400 particles, within five standard errors."""
    _, model = small(product_scale=1.0, head="2", head_prior=pb.priors.Normal(0.5, 2.0))
    values = ParticleGuide(model, particles=400, init="prior").coordinates()
    deviation = (1.0 / (model.scale * model.rank**0.5)) ** 0.5  # the product of a row of B and a column of A has 1
    for name, mean, scale in (("0.weight.A", 0.0, deviation), ("0.weight.B", 0.0, deviation), ("2.weight", 0.5, 2.0)):
        drawn = values[name].flatten()
        assert len(drawn.unique()) == len(drawn)
        assert abs(float(drawn.mean()) - mean) < 5 * scale / len(drawn) ** 0.5
        assert abs(float(drawn.var()) / scale**2 - 1) < 5 * (2 / len(drawn)) ** 0.5


def test_particles_at_draws_have_the_scales_that_were_drawn_with_them() -> None:
    """Proves that latent scales are drawn with their factors, in logarithms, and that the noise starts where it does.

    Given tau, the root mean square of the n factors is tau within a relative error of 1 / sqrt(2 n).
    """
    torch.manual_seed(0)
    net = nn.Linear(40, 1)
    model = Bella(net, pb.likelihoods.Gaussian(), 10, prior=pb.priors.HierarchicalNormal(2.0, 2.0))
    values, usual = (ParticleGuide(model, 50, init=init).coordinates() for init in ("prior", "gaussian"))
    a, log_tau = values["weight.A"].flatten(1), values["weight.A_tau"]
    assert float(log_tau.std()) > 0.2
    error = a.square().mean(1).sqrt().log() - log_tau
    assert float(error.abs().max()) < 5 / (2 * a.shape[1]) ** 0.5
    assert torch.equal(values["noise"], usual["noise"])


def test_particles_from_the_prior_end_at_different_networks() -> None:
    """Proves that an ensemble which starts at draws spreads between the data, where one that starts near the given
    network is one network: 20 points at two ends of a line, and the deviation of eight particles in the middle."""
    torch.manual_seed(0)
    x = torch.cat([torch.linspace(-2, -1, 10), torch.linspace(1, 2, 10)])[:, None]
    y = x.sin() + 0.05 * torch.randn(20, 1)
    spread = {}
    for init in ("gaussian", "prior"):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(1, 20), nn.ReLU(), nn.Linear(20, 1))
        model = Bella(net, pb.likelihoods.Gaussian(0.05), 20, product_scale=1.0)
        engine = SVGD(model, ParticleGuide(model, 8, init=init), method="ensemble", lr=1e-2)  # type: ignore[arg-type]
        posterior = engine.fit((x, y), 400, batch_size=20, schedule=cosine(), seed=0, progress=False)
        means = posterior.predict(torch.zeros(1, 1), 1).per_member
        spread[init] = float(means.std())
        assert float((posterior.predict(x, 1).mean - y[:, 0]).square().mean().sqrt()) < 0.1
    assert spread["prior"] > 3 * spread["gaussian"]


def test_small_b_makes_particles_differ() -> None:
    _, model = small()
    members = pb.Posterior(model, ParticleGuide(model, particles=3)).predict(rows()[0], num_samples=1).per_member[0]
    assert float((members[0] - members[1]).abs().max()) > 1e-4


def test_each_particle_is_the_network_with_its_own_weights() -> None:
    """Members of a prediction against plain networks into which W_0 + scale B A was written, head included."""
    net, model = small(head="2", rank=2)
    guide = ParticleGuide(model, particles=3, init_scale=0.3)
    values = guide.coordinates()
    for name in ("2.weight", "2.bias"):
        values[name].normal_()
    x, _ = rows()
    members = pb.Posterior(model, guide).predict(x, num_samples=1).outputs[0]
    for i in range(3):
        own = copy.deepcopy(net)
        with torch.no_grad():
            own[0].weight += model.scale * values["0.weight.B"][i] @ values["0.weight.A"][i]  # type: ignore[index, operator]
            own[2].weight.copy_(values["2.weight"][i])  # type: ignore[index, union-attr]
            own[2].bias.copy_(values["2.bias"][i])  # type: ignore[index, union-attr]
        torch.testing.assert_close(members[i], own(x))


# --------------------------------------------------------------------------------------- prior and scale


@pytest.mark.parametrize("options", [{}, {"rank": 1}, {"rank": 8, "alpha": 3.0}, {"rank": 9, "rank_stabilised": True}])
def test_product_scale_is_the_standard_deviation_of_the_product(options: dict[str, Any]) -> None:
    """Of the elements of scale B A over prior draws, at every rank and alpha."""
    net = nn.Linear(40, 30).double()
    model = Bella(net, None, product_scale=0.3, **options)
    torch.manual_seed(0)
    draws = [poutine.trace(model).get_trace(torch.zeros(1, 40, dtype=torch.float64)).nodes for _ in range(300)]
    products = torch.stack([model.scale * d["weight.B"]["value"][0, 0] @ d["weight.A"]["value"][0, 0] for d in draws])
    mean_squares = products.square().mean((1, 2))  # one for each independent draw
    error = float(mean_squares.std()) / math.sqrt(len(draws))
    assert abs(float(mean_squares.mean()) - 0.09) < 4 * error and error < 0.01


def test_scales() -> None:
    """alpha / rank stays as it is when the rank changes, unless alpha is given; the other rule divides by the root."""
    net = nn.Linear(4, 4)
    assert {Bella(net, None, rank=r).scale for r in (1, 4, 16)} == {4.0}
    assert Bella(net, None, rank=8, alpha=16).scale == 2.0
    assert Bella(net, None, rank=4, rank_stabilised=True).scale == 4.0
    assert Bella(net, None, rank=16, alpha=8, rank_stabilised=True).scale == 2.0


@pytest.mark.parametrize("options", [{}, {"rank": 1}, {"rank": 8, "alpha": 3.0}, {"rank": 9, "rank_stabilised": True}])
def test_the_default_is_a_product_of_a_tenth(options: dict[str, Any]) -> None:
    """Of the factors ``N(0, 0.1 / (scale sqrt(rank)))``, and the same when it is given."""
    model, given = (Bella(nn.Linear(4, 3), None, **options, **own) for own in ({}, {"product_scale": 0.1}))
    expected = Normal(0.0, math.sqrt(0.1 / (model.scale * math.sqrt(model.rank))))
    assert model.priors == given.priors == {"weight.A": expected, "weight.B": expected}


def test_a_prior_is_that_of_the_factors_themselves() -> None:
    """A Normal too, with a mean where it has one; and it takes the place of the scale of the product."""
    _, model = small(prior=Normal(0.5, 0.3), select="0")
    assert model.priors == {"0.weight.A": Normal(0.5, 0.3), "0.weight.B": Normal(0.5, 0.3)}
    draws = [poutine.trace(model).get_trace(rows()[0]).nodes["0.weight.A"]["value"].flatten() for _ in range(400)]
    values = torch.cat(draws)
    assert abs(float(values.mean()) - 0.5) < 4 * 0.3 / math.sqrt(len(values))
    assert abs(float(values.std()) - 0.3) < 4 * 0.3 / math.sqrt(2 * len(values))


def test_other_priors_are_of_the_factors() -> None:
    _, model = small(prior={".*A": Laplace(scale=0.2), ".*": HierarchicalNormal()})
    assert model.priors["0.weight.A"] == Laplace(scale=0.2)
    names = {site.name for site in model.sites()}
    assert "0.weight.B_tau" in names and "0.weight.A_tau" not in names
    x, y = rows()
    guide = ParticleGuide(model, particles=2)
    assert math.isfinite(fit(model, guide, (x, y), epochs=2, progress=False).losses[-1])


def test_sites_and_their_shapes() -> None:
    model = Bella(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 5)), None, rank=2, head="2")
    shapes = {site.name: tuple(site.shape) for site in model.sites()}
    assert shapes == {"0.weight.A": (2, 3, 3, 3), "0.weight.B": (8, 2), "2.weight": (5, 8), "2.bias": (5,)}


# ------------------------------------------------------------------------------------------------ targets


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_fc, self.c_proj, self.norm = nn.Linear(4, 8), nn.Linear(8, 4), nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.c_proj(self.c_fc(self.norm(x)).relu())


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = nn.Embedding(7, 4), nn.Sequential(Block(), Block()), nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(tokens)).mean(1))


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        ([".*c_fc", ".*c_proj"], {f"blocks.{i}.{n}.weight" for i in (0, 1) for n in ("c_fc", "c_proj")}),
        (["blocks.0.c_fc"], {"blocks.0.c_fc.weight"}),
        (["head.weight"], {"head.weight"}),
        (r"blocks\.1\.c_.*", {"blocks.1.c_fc.weight", "blocks.1.c_proj.weight"}),
        ([".*in_proj_weight"], {f"blocks.{i}.attention.in_proj_weight" for i in (0, 1)}),
        (nn.Embedding, {"embed.weight"}),
        (lambda name, weight: weight.shape[0] == 3, {"head.weight"}),
        ([nn.Embedding, "head"], {"embed.weight", "head.weight"}),
    ],
)
def test_which_weights_are_adapted(select: Any, expected: set[str]) -> None:
    assert set(Bella(Text(), CLASSES, 10, select=select).weights) == expected


def test_all_linear_and_the_default() -> None:
    everything = set(Bella(Text(), CLASSES, 10).weights)
    linear = set(Bella(Text(), CLASSES, 10, select="all-linear").weights)
    assert everything - linear == {f"blocks.{i}.attention.in_proj_weight" for i in (0, 1)}
    assert "embed.weight" not in everything and len(linear) == 7
    mobile = torchvision.models.mobilenet_v2(num_classes=4)
    chosen = set(Bella(mobile, CLASSES, 10).weights)
    depthwise = {f"{n}.weight" for n, m in mobile.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1}
    assert depthwise and not depthwise & chosen
    name = next(iter(depthwise))
    assert Bella(mobile, CLASSES, 10, select=[name]).weights == [name]


def test_the_size_of_the_authors_configuration() -> None:
    """368,640 numbers for each particle: both layers of the twelve perceptrons of a ViT-B/32 at rank 4."""
    with torch.device("meta"):
        net = torchvision.models.vit_b_32()
    model = Bella(net, CLASSES, 10, select=r".*\.mlp\.[03]")
    assert len(model.weights) == 24 and sum(site.shape.numel() for site in model.sites()) == 368_640


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0}, "rank=0"),
        ({"rank": 2.5}, "rank=2.5"),
        ({"alpha": -1.0}, "alpha=-1.0"),
        ({"select": ["nothing"]}, "matches none of the weights; no names are like it"),
        ({"select": "0.w"}, "matches none of the weights; the nearest names are '0.weight'"),
        ({"head": "3"}, "head='3' matches none of the weights and biases of linear layers"),
        ({"head": "1"}, "of linear layers: '1' is a Tanh that has none"),
        ({"prior": Normal(1.0, 0.1), "product_scale": 0.1}, "give only one of them"),
        ({"product_scale": -1.0}, "product_scale=-1.0: expected a positive"),
        ({"affine": True}, "no normalisation layer with gains or biases"),
        ({"affine": "0.bias"}, "matches none of the gains and biases of normalisation layers"),
    ],
)
def test_bad_input(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        small(**options)


def test_bad_guides() -> None:
    _, model = small(rank=3)
    for options, said in (
        ({"particles": 0}, "at least 1"),
        ({"init": "zeros"}, "expected 'kaiming'"),
        ({"init": "orthogonal"}, "rank=3 is odd"),
        ({"init_scale": 0.0}, "positive"),
    ):
        with pytest.raises(ValueError, match=said):
            ParticleGuide(model, **options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="takes a pyro_bnn.models.Bella"):
        ParticleGuide(pb.models.Dense(nn.Linear(2, 2), CLASSES, 3))  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ engines


def test_saved_loaded_and_pickled(tmp_path: Any) -> None:
    net, model = small(head="2", rank=2, alpha=3.0, rank_stabilised=True)
    guide = ParticleGuide(model, particles=3)
    posterior = fit(model, guide, rows(), epochs=3, progress=False, seed=0)
    posterior.save(tmp_path / "p")
    loaded = pb.load(tmp_path / "p", net)
    x, _ = rows()
    expected = posterior.predict(x, num_samples=2, seed=0).probs
    assert torch.equal(loaded.predict(x, num_samples=2, seed=0).probs, expected)
    assert loaded.model.arguments() == model.arguments() and loaded.guide.pairs() == guide.pairs()  # type: ignore[operator]
    again = pickle.loads(pickle.dumps((model, guide)))
    assert torch.equal(pb.Posterior(*again).predict(x, num_samples=2, seed=0).probs, expected)


def test_nuts_and_mean_field() -> None:
    """Low-rank adapters under other engines: the model is an ordinary Pyro program."""
    _, model = small(select=["0"], rank=1)
    x, y = rows()
    pyro.set_rng_seed(0)
    mcmc = MCMC(NUTS(model), num_samples=20, warmup_steps=20, disable_progbar=True)
    mcmc.run(x, y)
    draws = mcmc.get_samples()
    assert draws["0.weight.A"].shape == (20, 1, 1, 1, 3) and float(draws["0.weight.B"].std()) > 0
    found = Predictive(model, posterior_samples=draws, parallel=True)(x)
    assert found["obs"].shape[0] == 20
    kernel = pb.inference.SGHMC(model, (x, y), step_size=0.05, friction=0.2, thinning=3)
    posterior = pb.inference.sample(kernel, 5, 5, num_chains=2, progress=False, seed=0)
    assert posterior.predict(x, num_samples=5).probs.shape == (20, 4)


def test_inside_a_larger_program() -> None:
    net, bnn = small()
    function = Bella(net, None, prefix="net", select=["2"])

    def model(x: Tensor, y: Tensor | None = None) -> None:
        shift = pyro.sample("shift", pyro.distributions.Normal(x.new_zeros(4), 1.0).to_event(1))
        f = function(x) + shift
        with function.members_plate(), pyro.plate("data", len(x)):
            pyro.sample("obs", pyro.distributions.Categorical(logits=f), obs=y)

    trace = poutine.trace(model).get_trace(*rows())
    assert {"net.2.weight.A", "net.2.weight.B", "shift"} <= set(trace.nodes)
    assert bnn.weights == ["0.weight", "2.weight"]


def test_normalisation_keeps_its_statistics_in_training() -> None:
    model = Bella(resnet18(4), CLASSES, 8)
    model.train()
    norms = [m for m in model.core().net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and model.training and not any(m.training for m in norms)


# -------------------------------------------------------------------------------- gains and biases of their own


class Window(nn.Module):
    """Layer normalisation over two axes, RMS, group and instance normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 3), nn.Linear(24, 4)
        self.instance, self.group = nn.InstanceNorm2d(6, affine=True), nn.GroupNorm(3, 6)
        self.layer, self.root = nn.LayerNorm((6, 4)), nn.RMSNorm(24)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.adaptive_avg_pool2d(self.group(self.instance(self.stem(x)).relu()), 2).flatten(2)
        return self.head(self.root(self.layer(x).flatten(1)))


class Encoder(nn.Module):
    """``nn.TransformerEncoder``, for which torch has a fused path in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.embed, self.body = nn.Conv2d(3, 8, 4, 4), nn.TransformerEncoder(layer, 2, nn.LayerNorm(8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embed(x).flatten(2).transpose(1, 2)).mean(1))


NORMALISED: dict[str, Any] = {
    "resnet18": lambda: resnet18(4),
    "convnext_tiny": lambda: torchvision.models.convnext_tiny(num_classes=4),
    "vit": lambda: torchvision.models.VisionTransformer(16, 4, 2, 2, 8, 16, num_classes=4),
    "encoder": Encoder,
    "window": Window,
}


def normalised(name: str) -> nn.Module:
    """In eval mode and double precision, with gains, biases and statistics that matter."""
    torch.manual_seed(0)
    net = NORMALISED[name]().double().eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, NORMALISATIONS):
                for own in module.parameters(recurse=False):
                    own.uniform_(0.5, 1.5)
                for statistics in module.buffers():
                    if statistics.is_floating_point():
                        statistics.uniform_(0.5, 1.5)
            if name == "convnext_tiny" and hasattr(module, "layer_scale"):
                module.layer_scale.fill_(0.3)  # a millionth hides what a block does
    return net


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("name", NORMALISED)
def test_particles_with_gains_and_biases_of_their_own(name: str) -> None:
    """They begin exactly as the given network, and each is the network with its explicit parameters, to 1e-10; every
    gain and bias has an effect, and the network's own stay as they are."""
    net = normalised(name)
    before = {n: value.clone() for n, value in net.state_dict().items()}
    model = Bella(net, CLASSES, 2, rank=2, affine=True, product_scale=0.02)
    norms = [m for m in net.modules() if isinstance(m, NORMALISATIONS)]
    assert len(model.affine_parameters) == sum(len([*m.parameters(recurse=False)]) for m in norms) > 0
    guide = ParticleGuide(model, particles=3, init="kaiming")
    values, parameters = guide.coordinates(), dict(net.named_parameters())
    for n in model.affine_parameters:
        assert all(torch.equal(own, parameters[n]) for own in values[n]), n
    pixels = 32 if name == "convnext_tiny" else 16
    x = torch.randn(2, 3, pixels, pixels, dtype=torch.float64)
    with torch.no_grad():
        for member in pb.Posterior(model.eval(), guide.eval()).predict(x, num_samples=1).outputs[0]:
            torch.testing.assert_close(member, net(x), rtol=1e-10, atol=1e-12)
    for value in guide.parameters():
        value.data += 0.02 * torch.randn_like(value)
    values = guide.coordinates()
    guide.train()
    trace = poutine.trace(guide).get_trace(x)
    leaves = {n: trace.nodes[n]["value"].detach().requires_grad_() for n in model.affine_parameters}
    f = model.function(x, {s.name: trace.nodes[s.name]["value"].detach() for s in model.sites()} | leaves, len(x))
    effects = torch.autograd.grad(f.abs().sum() / f.detach().abs().max(), list(leaves.values()))
    assert min(float(g.flatten(1).norm(dim=-1).min()) for g in effects) > 1e-7
    for i in range(3):
        own = {n: values[n][i] for n in model.affine_parameters}
        for weight in model.weights:
            a, b = (values[f"{weight}.{factor}"][i] for factor in "AB")
            own[weight] = parameters[weight] + model.scale * (b @ a.flatten(1)).view_as(parameters[weight])
        with torch.no_grad():
            expected = torch.func.functional_call(net, own, (x,))
        member = f.detach().reshape(3, *expected.shape)[i]
        assert float((member - expected).abs().max() / expected.abs().max()) < 1e-10
    assert all(torch.equal(before[n], value) for n, value in net.state_dict().items())


def test_which_gains_and_biases() -> None:
    """All, by a pattern, by the type of layer, by a function; with a prior around the given values."""
    net = normalised("window")
    every = {f"{n}.{p}" for n in ("instance", "group", "layer") for p in ("weight", "bias")} | {"root.weight"}
    for affine, expected in (
        (False, set()),
        (True, every),
        (".*bias", {n for n in every if n.endswith("bias")}),
        ([nn.GroupNorm, "root.*"], {"group.weight", "group.bias", "root.weight"}),
        (lambda n, p: p.dim() == 2, {"layer.weight", "layer.bias"}),
    ):
        model = Bella(net, CLASSES, 2, select=["stem"], affine=affine)  # type: ignore[arg-type]
        assert set(model.affine_parameters) == expected
        names = {site.name for site in model.sites()}
        assert names == {"stem.weight.A", "stem.weight.B"} | expected
    x, y = images(2)
    for prior, tau in ((Normal(scale=0.1), 0.1), (HierarchicalNormal(), 0.3), (SpikeAndSlab(0.1, 0.1 + 1e-9), 0.1)):
        model = Bella(net, CLASSES, 2, select=["stem"], affine="layer.*", affine_prior=prior)
        data = {"layer.weight": torch.full((1, 6, 4), 0.8).double()}
        data |= {"layer.weight_tau": torch.tensor(tau).double()} if prior.has_tau else {}
        site = poutine.trace(poutine.condition(model, data)).get_trace(x.double(), y).nodes["layer.weight"]
        expected = torch.distributions.Normal(net.layer.weight, tau).log_prob(data["layer.weight"]).sum()  # type: ignore[union-attr]
        torch.testing.assert_close(site["fn"].log_prob(site["value"]).sum(), expected)
    model = Bella(net, CLASSES, 2, select=["stem"], affine="root.weight", affine_prior=Normal(2.0, 0.1))
    trace = poutine.trace(poutine.condition(model, {"root.weight": torch.full((24,), 2.0).double()}))
    site = trace.get_trace(x.double(), y).nodes["root.weight"]
    assert float(site["fn"].log_prob(site["value"])) == pytest.approx(24 * 1.383647, rel=1e-5)


def test_the_prior_follows_a_state_that_is_loaded() -> None:
    """It lies around the gains that the model has now, and not around those of its first call."""
    net = normalised("window")
    model = Bella(net, CLASSES, 2, select=["stem"], affine="group.weight")
    x, y = images(2)
    given = poutine.condition(model, {"group.weight": net.get_parameter("group.weight").detach() + 1})
    before = poutine.trace(given).get_trace(x.double(), y).nodes["group.weight"]
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})
    after = poutine.trace(given).get_trace(x.double(), y).nodes["group.weight"]
    difference = after["fn"].log_prob(after["value"]) - before["fn"].log_prob(before["value"])
    assert float(difference) == pytest.approx(6 * 0.5 * (1 / 0.1) ** 2)


def test_gains_and_biases_are_trained_saved_loaded_and_pickled(tmp_path: Any) -> None:
    """Particles part in them under SVGD; what is loaded into another network predicts bit for bit the same, and new
    particles of it begin at the gains that were saved."""
    net = normalised("window")
    x, y = images(16)
    model = Bella(net, CLASSES, 16, rank=2, affine=True, affine_prior=HierarchicalNormal())
    guide = ParticleGuide(model, particles=3)
    start = {name: value.clone() for name, value in guide.coordinates().items()}
    engine = pb.inference.SVGD(model, guide, lr=0.02)
    posterior = engine.fit((x.double(), y), epochs=20, batch_size=8, progress=False, seed=0)
    assert sum(posterior.losses[-4:]) < sum(posterior.losses[:4])
    for name in model.affine_parameters:
        value = guide.coordinates()[name]
        assert float((value - start[name]).abs().max()) > 1e-3 and not torch.equal(value[0], value[1])
    posterior.save(tmp_path / "p")
    torch.manual_seed(7)
    loaded = pb.load(tmp_path / "p", Window().double())
    expected = posterior.predict(x.double(), num_samples=1).probs
    assert torch.equal(loaded.predict(x.double(), num_samples=1).probs, expected)
    assert isinstance(loaded.model, Bella) and loaded.model.arguments() == model.arguments()
    fresh = ParticleGuide(loaded.model, particles=2, init="kaiming").coordinates()
    assert all(torch.equal(own, net.get_parameter(n)) for n in model.affine_parameters for own in fresh[n])
    again = pickle.loads(pickle.dumps((model, guide)))
    assert torch.equal(pb.Posterior(*again).predict(x.double(), num_samples=1).probs, expected)


def test_gains_and_biases_under_other_engines() -> None:
    """NUTS, Predictive, SGHMC and points of any model: they are sites of an ordinary Pyro program."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 4)).double()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x, y = rows()
    model = Bella(net, CLASSES, 20, select=["0"], rank=1, affine=True)
    pyro.set_rng_seed(0)
    mcmc = MCMC(NUTS(model), num_samples=20, warmup_steps=20, disable_progbar=True)
    mcmc.run(x, y)
    draws = mcmc.get_samples()
    assert draws["1.weight"].shape == (20, 1, 1, 5) and 0 < float((draws["1.weight"] - 1).abs().mean()) < 0.3
    assert Predictive(model, posterior_samples=draws, parallel=True)(x)["obs"].shape[0] == 20
    kernel = pb.inference.SGHMC(model, (x, y), step_size=0.05, friction=0.2, thinning=3)
    posterior = pb.inference.sample(kernel, 5, 5, num_chains=2, progress=False, seed=0)
    assert posterior.predict(x, num_samples=5).probs.shape == (20, 4)
    guide = pb.inference.AutoParticles(model, 3)
    points = pb.inference.SVGD(model, guide, lr=0.01).fit((x, y), epochs=2, progress=False, seed=0)
    assert points.predict(x, num_samples=1).probs.shape == (20, 4)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


@pytest.mark.parametrize("scale", [0.003, 0.25])
def test_particles_start_with_the_spread_that_was_asked_for(scale: float) -> None:
    """B is normal with the standard deviation ``init_scale``: of n draws the mean has a standard error of
    ``s / sqrt(n)`` and the standard deviation one of ``s / sqrt(2 n)``. A is as in a new layer, uniform."""
    torch.manual_seed(0)
    model = Bella(nn.Linear(12, 50), None, rank=8)
    values = ParticleGuide(model, particles=20, init_scale=scale).coordinates()
    a, b = values["weight.A"].flatten(), values["weight.B"].flatten()
    assert abs(float(b.mean())) < 4 * scale / math.sqrt(len(b))
    assert abs(float(b.std()) - scale) < 4 * scale / math.sqrt(2 * len(b))
    bound = 1 / math.sqrt(12)
    assert float(a.abs().max()) <= bound
    # a uniform has a kurtosis of 9/5, and n draws of it a relative error of sqrt(1 / 5 n) in the standard deviation
    assert abs(float(a.std()) - bound / math.sqrt(3)) < 4 * bound / math.sqrt(3) * math.sqrt(0.2 / len(a))


def test_heads_and_gains_differ_from_the_start() -> None:
    """By `init_scale`: from one place the kernel of a tensor would move all particles alike, and never part them."""
    net = normalised("window")
    model = Bella(net, CLASSES, 16, head="head", affine=True)
    guide = ParticleGuide(model, particles=50, init_scale=0.03)
    own = {n: (guide.coordinates()[n] - net.get_parameter(n)).detach() for n in model.own_parameters()}
    noise = torch.cat([value.flatten() for value in own.values()])
    assert float(noise.mean().abs()) < 0.001 and abs(float(noise.std()) - 0.03) < 0.001
    x, y = images(16)
    pb.inference.SVGD(model, guide, lr=1e-3).fit((x.double(), y), 1, progress=False, seed=0)
    assert all(bool((guide.coordinates()[name].std(0) > 0.01).all()) for name in own)


# --------------------------------------------------------------------------------------- particles that interact


@pytest.mark.parametrize(
    ("space", "method"),
    [
        (s, m)
        for s in ("product", "factor", "function")
        for m in ("svgd", "wgd", "ensemble")
        if (s, m) != ("function", "svgd")
    ],
)
def test_every_update_in_every_space(space: Any, method: Any) -> None:
    """W_0 stays bit for bit, the energy falls, and one by one the particles do what they do together."""
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    net.double()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x, y = images(16)
    ends = []
    for sequential in (False, True):
        torch.manual_seed(0)
        model = Bella(net, CLASSES, 16, rank=2)
        guide = ParticleGuide(model, particles=3)
        engine = pb.inference.SVGD(model, guide, method=method, space=space, lr=0.02, sequential=sequential)
        posterior = engine.fit((x.double(), y), epochs=15, batch_size=8, progress=False, seed=0)
        assert sum(posterior.losses[-4:]) < sum(posterior.losses[:4])
        ends.append(torch.cat([v.flatten() for v in guide.coordinates().values()]).clone())
        assert posterior.predict(x.double(), num_samples=1).probs.shape == (16, 4)
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-8)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_an_ensemble_is_independent_runs() -> None:
    """Each particle ends where it ends alone, from the same start, on the same batches."""
    x, y = rows()
    _, model = small()
    together = ParticleGuide(model, particles=3)
    start = {name: value.clone() for name, value in together.coordinates().items()}

    def run(guide: ParticleGuide) -> dict[str, Tensor]:
        pb.inference.SVGD(model, guide, method="ensemble", lr=0.02).fit(
            (x, y), 10, batch_size=7, progress=False, seed=0
        )
        return guide.coordinates()

    ends = run(together)
    for i in range(3):
        alone = ParticleGuide(model, particles=1)
        for name, value in alone.coordinates().items():
            value.copy_(start[name][i : i + 1])
        for name, value in run(alone).items():
            torch.testing.assert_close(value[0], ends[name][i], rtol=1e-9, atol=1e-11)
            assert not torch.equal(value[0], start[name][i])


def test_a_transformer_is_tuned_by_its_particles() -> None:
    """Attention and perceptrons of a small text network under the default engine."""
    torch.manual_seed(0)
    tokens = torch.randint(7, (40, 5))
    y = (tokens == 3).any(1).long()
    net = Text()
    net.head = nn.Linear(4, 2)
    model = Bella(net, CLASSES, 40, head="head", product_scale=1.0)
    guide = ParticleGuide(model, particles=4)
    engine = pb.inference.SVGD(model, guide, lr=0.02)
    assert (engine.space, engine.scope) == ("product", "tensor")
    posterior = engine.fit((tokens, y), epochs=60, batch_size=20, progress=False, seed=0)
    accuracy = (posterior.predict(tokens, num_samples=1).probs.argmax(-1) == y).double().mean()
    before = (net(tokens).argmax(-1) == y).double().mean()
    assert accuracy > max(float(before), float(y.double().mean()), float(1 - y.double().mean())) + 0.05


def test_sampling_leaves_the_statistics_alone() -> None:
    """SGHMC at temperature 0 and a step of nothing: every draw predicts what the given network predicts."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)).double()
    net(5 + 3 * torch.randn(64, 3).double())  # statistics far from 0 and 1
    x, y = rows()
    model = Bella(net.eval(), CLASSES, 20)
    kernel = pb.inference.SGHMC(model, (x, y), step_size=1e-8, friction=0.5, temperature=0.0)
    posterior = pb.inference.sample(kernel, 2, 1, num_chains=2, progress=False, seed=0)
    for member in posterior.predict(x, num_samples=4).outputs.flatten(0, 1):
        torch.testing.assert_close(member, net(x), rtol=1e-5, atol=1e-6)


def test_it_loads_with_the_weights_that_it_was_saved_with(tmp_path: Any) -> None:
    """Also where the name of one weight is the end of another's."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 2))
    model = Bella(net, CLASSES, 5, select="0")
    pb.Posterior(model, ParticleGuide(model, particles=2)).save(tmp_path / "p")
    loaded = pb.load(tmp_path / "p", net).model
    assert isinstance(loaded, Bella) and loaded.weights == model.weights == ["0.weight"]


def test_a_state_that_is_loaded_leaves_the_given_network_alone() -> None:
    net, model = small()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_latents_without_particles_are_refused() -> None:
    """A site of a larger program that no guide has would be drawn from its prior at every step."""
    net, _ = small()
    function = Bella(net, None)
    guide = ParticleGuide(function, particles=2)

    def model(x: Tensor, y: Tensor) -> None:
        noise = pyro.sample("noise", pyro.distributions.LogNormal(x.new_zeros(()), 1.0))
        f = function(x)[..., 0]
        with function.members_plate(), pyro.plate("data", len(x)):
            pyro.sample("obs", pyro.distributions.Normal(f, noise), obs=y)

    x, y = rows()
    for sequential in (False, True):
        with pytest.raises(ValueError, match="no particles of the latent site 'noise'"):
            pb.inference.SVGD(model, guide, num_data=20, sequential=sequential).step(x, y.double())
