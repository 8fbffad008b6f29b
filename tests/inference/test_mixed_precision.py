"""Training under ``torch.autocast``: networks run in bfloat16, and densities, KL divergences and kernels do not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForSequenceClassification

import pyro_bnn as pb
from pyro_bnn.inference import Objective
from pyro_bnn.network import Network

N, CLASSES = 24, 3
ROUNDOFF = 2.0**-8


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.encoder(x).mean(1))
        return out


def bert() -> nn.Module:
    config = BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=12,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config)


def tokens() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 9, (N, 1), generator=generator)
    return {
        "input_ids": torch.randint(30, (N, 8), generator=generator),
        "attention_mask": (torch.arange(8) < lengths).long(),
    }


def numbers(*shape: int) -> Tensor:
    return torch.randn(N, *shape, generator=torch.Generator().manual_seed(0))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, CLASSES)), numbers(5)),
    "cnn": (
        lambda: nn.Sequential(
            *(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
            *(nn.Conv2d(4, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(24, CLASSES)),
        ),
        numbers(1, 6, 6),
    ),
    "transformer": (Encoder, numbers(5, 8)),
    "bert": (bert, tokens()),
}
ENGINES = ["rank1", "dense", "weight sharing", "bella"]


def labels() -> Tensor:
    return torch.randint(CLASSES, (N,), generator=torch.Generator().manual_seed(1))


def programs(engine: str, net: nn.Module) -> tuple[Any, Any]:
    likelihood = pb.likelihoods.Categorical()
    if engine == "rank1":
        rank1 = pb.models.Rank1(net, likelihood, N)
        return rank1, pb.models.Rank1Guide(rank1, components=2)
    if engine == "dense":
        dense = pb.models.Dense(net, likelihood, N)
        return dense, pb.models.MeanFieldGuide(dense, components=2)
    if engine == "weight sharing":
        shared = pb.models.WeightSharing(
            net, likelihood, N, prior={r".*weight": pb.priors.CodebookPrior(), ".*": pb.priors.Normal(0.0, 1.0)}
        )
        select = [n for n in shared.random if n.endswith("weight")]
        return shared, pb.models.CodebookGuide(shared, codes=8, coded=select)
    bella = pb.models.Bella(
        net, likelihood, N, rank=2, affine=any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    )
    return bella, pb.models.ParticleGuide(bella, 3, init_scale=0.1)


def made(engine: str, network: str) -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    make, x = NETWORKS[network]
    return *programs(engine, make()), x


class _Narrow(TorchDispatchMode):
    """Records the operations, outside of networks and of backward passes, that make a tensor of half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.inside: list[str] = []
        self.depth = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        skipped = func.is_view or torch._C._current_graph_task_id() != -1
        if not skipped and any(isinstance(t, Tensor) and t.dtype == torch.bfloat16 for t in pytree.tree_leaves(result)):
            (self.inside if self.depth else self.outside).append(str(func))
        return result


@contextmanager
def narrow_operations(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Narrow]:
    """Inside, networks run as under ``torch.autocast`` and every operation is seen."""
    mode = _Narrow()
    original = {name: getattr(Network, name) for name in ("_run", "perturbed", "explicit")}

    def inside(name: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            mode.depth += 1
            try:
                return original[name](*args, **kwargs)
            finally:
                mode.depth -= 1

        return run

    with monkeypatch.context() as patched:
        for name in original:
            patched.setattr(Network, name, inside(name))
        with mode:
            yield mode


def autocast(on: bool = True) -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=on)


def step(engine: str, network: str, half: bool) -> tuple[float, list[Tensor]]:
    """The first loss or energy, and the gradients, the particles of Bella after a step without momentum."""
    model, guide, x = made(engine, network)
    y = labels()
    torch.manual_seed(1)
    if engine == "bella":
        svgd = pb.inference.SVGD(
            model, guide, torch.optim.SGD(guide.parameters(), lr=1.0), kernel=pb.inference.RBF(5.0)
        )
        before = [p.detach().clone() for p in guide.parameters()]
        with autocast(half):
            energy = svgd.step(x, y)
        return energy, [p.detach() - b for p, b in zip(guide.parameters(), before, strict=True)]
    objective = Objective(model, guide)
    with autocast(half):
        loss = objective(x, y)
    assert loss.dtype == torch.float32
    trained = objective.trained()
    return float(loss.detach()), list(torch.autograd.grad(loss, trained, materialize_grads=True))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_in_bfloat16_is_that_in_float32_up_to_rounding(engine: str, network: str) -> None:
    """Proves, from the same draws, that loss and gradient of the whole objective, or the force on all particles, differ
    by the rounding of the network alone, which goes through a few layers."""
    (loss, exact), (half, rounded) = (step(engine, network, on) for on in (False, True))
    assert half == pytest.approx(loss, rel=ROUNDOFF)
    a, b = (torch.cat([g.flatten() for g in gradients]) for gradients in (exact, rounded))
    assert 0 < (a - b).norm() <= 20 * ROUNDOFF * a.norm()


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_outside_of_the_network_is_in_half_precision(
    engine: str, network: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proves that draws, KL divergences, log densities, jacobians and kernels make no tensor of half precision, by
    every operation of a step."""
    model, guide, x = made(engine, network)
    y = labels()
    with narrow_operations(monkeypatch) as seen, autocast():
        if engine == "bella":
            pb.inference.SVGD(model, guide).step(x, y)
        else:
            Objective(model, guide)(x, y).backward()
    assert seen.inside and seen.outside == []


@pytest.mark.parametrize("name", ["DeepEnsemble", "SWAG", "MCDropout", "LastLayerLaplace"])
def test_nothing_outside_of_the_network_of_a_baseline_is_in_half_precision(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proves the same for what methods are compared with, from the first epoch to the posterior."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, CLASSES))
    engine = getattr(pb.inference, name)(net, pb.likelihoods.Categorical(), N)
    with narrow_operations(monkeypatch) as seen, autocast():
        posterior = engine.fit((numbers(5), labels()), epochs=3, progress=False, seed=0)
    assert seen.inside and seen.outside == []
    assert_drawn_in_full(posterior)


def assert_drawn_in_full(posterior: pb.Posterior) -> None:
    """Draws inside of autocast are those outside of it, bit for bit."""
    exact = posterior.draws(3, seed=0)
    with autocast():
        assert all(torch.equal(value, exact[name]) for name, value in posterior.draws(3, seed=0).items())


def test_draws_of_a_guide_of_pyro_are_in_full_precision() -> None:
    """Proves it of a guide that makes draws by a product with a matrix."""
    torch.manual_seed(0)
    model = pb.models.Dense(nn.Linear(5, CLASSES), pb.likelihoods.Categorical(), N)
    guide = AutoMultivariateNormal(model)
    data = (numbers(5), labels())
    assert_drawn_in_full(pb.inference.fit(model, guide, data, epochs=3, lr=0.1, progress=False, seed=0))


# ------------------------------------------------------------------------------------------- against float64

NOISE = 0.1


def test_the_loss_of_what_the_network_returned_is_that_in_float64() -> None:
    """Proves that, whatever a network returns in bfloat16, its log likelihood and the KL divergence have the digits of
    float32: by hand, in float64. A noise scale in bfloat16 would be off by 1e-3, and the loss by as much."""
    torch.manual_seed(0)
    net, x, y = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 1)), numbers(5), numbers(1)[:, 0]
    prior = pb.priors.Normal(1.0, 0.1)
    model = pb.models.Rank1(
        net, pb.likelihoods.Gaussian(NOISE), 10 * N, prior=prior, member_bias=False, weight_prior=None
    )
    guide = pb.models.Rank1Guide(model, components=2)
    objective = Objective(model, guide)
    with autocast(), model.recording_outputs() as outputs:
        loss = float(objective(x, y).detach())
    f = outputs[-1]  # [members, 1, N, 1]
    with torch.no_grad():
        exact = float(objective(x, y))
    assert f.dtype == torch.float32 and abs(loss - exact) > 1e-5 * exact  # the network itself was rounded
    loc, scale = (torch.cat([p.detach().double() for p in blocks], 1) for blocks in (guide.loc, guide.rho))
    scale = nn.functional.softplus(scale) + 1e-7
    ratio, away = scale / 0.1, (loc - 1) / 0.1
    kl = (0.5 * (away**2 + ratio**2 - 1) - ratio.log()).sum(1).mean()
    errors = (f.detach().double().reshape(2, N) - y.double()) / NOISE
    likelihood = (-0.5 * errors**2 - math.log(NOISE) - 0.5 * math.log(2 * math.pi)).mean(0).sum() * 10
    assert loss == pytest.approx(float(kl - likelihood) / (10 * N), rel=1e-6)


class ByProducts(dist.MultivariateNormal):  # type: ignore[misc]
    """A multivariate Normal whose density, up to a constant, is a product of arrays, as its draws are in torch."""

    def log_prob(self, value: Tensor) -> Tensor:
        return -0.5 * ((value - self.loc).unsqueeze(-2) @ self.precision_matrix @ value.unsqueeze(-1)).squeeze((-1, -2))


def correlated(x: Tensor, y: Tensor) -> None:
    """A Pyro model without a network: ``w ~ N(0, S)`` with correlations, ``y ~ N(x w, 0.1)``."""
    root = torch.eye(5) + 0.3 * torch.ones(5, 5).tril(-1)
    w = pyro.sample("w", ByProducts(torch.zeros(5), scale_tril=root))
    mean = (x * w.unsqueeze(-2)).sum(-1)
    with pyro.plate("data", N):
        pyro.sample("obs", dist.Normal(mean, NOISE), obs=y)


def test_densities_and_draws_of_ones_own_programs_are_in_full_precision() -> None:
    """Proves that a model without a network has the loss of float32 bit for bit under autocast, although its
    density and draws are products of arrays, which autocast would round; and so have its particles."""
    x, y = numbers(5), numbers(1)[:, 0]

    def loss(half: bool) -> float:
        torch.manual_seed(0)
        objective = Objective(
            correlated, AutoMultivariateNormal(correlated), num_data=N, elbo=Trace_ELBO(), example=(x, y)
        )
        with autocast(half):
            return float(objective(x, y).detach())

    def energy(half: bool) -> float:
        torch.manual_seed(0)
        svgd = pb.inference.SVGD(correlated, pb.inference.AutoParticles(correlated, 4), num_data=N)
        with autocast(half):
            return svgd.step(x, y)

    assert loss(True) == loss(False)
    assert energy(True) == energy(False)


class Own(nn.Module):
    """A Pyro model around a network of torch, which the model gives to a distribution as it is, or converted."""

    def __init__(self, convert: bool) -> None:
        super().__init__()
        self.net, self.convert, self.dtypes = nn.Linear(5, CLASSES), convert, set[torch.dtype]()

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        shift = pyro.sample("shift", dist.Normal(torch.zeros(()), 1.0))
        f = self.net(x)
        self.dtypes.add(f.dtype)
        logits = f.float() + shift if self.convert else f
        with pyro.plate("data", N):
            pyro.sample("obs", dist.Categorical(logits=logits), obs=y)


def shift_guide(x: Tensor, y: Tensor | None = None) -> None:
    pyro.sample("shift", dist.Normal(pyro.param("m", torch.zeros(())), 1.0))


def test_a_density_in_half_precision_of_ones_own_program_is_refused() -> None:
    """Proves that such a program is told what to convert, under SVI and SVGD, and that its network runs in bfloat16."""
    x, y = numbers(5), labels()
    good, bad = Own(convert=True), Own(convert=False)
    with autocast():
        Objective(good, shift_guide, num_data=N, example=(x, y))(x, y).backward()
        assert good.dtypes == {torch.bfloat16}
        said = r"the site 'obs' is a Categorical whose logits has the dtype torch.bfloat16 under.*f\.float\(\)"
        with pytest.raises(ValueError, match=said):
            Objective(bad, shift_guide, num_data=N, example=(x, y))(x, y)
        with pytest.raises(ValueError, match=said):
            pb.inference.SVGD(bad, pb.inference.AutoParticles(bad, 2), num_data=N, sequential=True).step(x, y)
    Objective(bad, shift_guide, num_data=N, example=(x, y))(x, y)


# ------------------------------------------------------------------------------------------------ whole runs


@pytest.mark.parametrize("engine", ["rank1", "dense"])
def test_a_whole_fit_inside_of_autocast_trains_as_in_float32(engine: str) -> None:
    """Proves that weights are not those of the first step, which autocast keeps: rank-1 trains W itself."""
    y = labels()

    def last(half: bool) -> float:
        model, guide, x = made(engine, "mlp")
        with autocast(half):
            losses = pb.inference.fit(
                model, guide, (x, y), epochs=120, batch_size=N, lr=3e-2, progress=False, seed=0
            ).losses
        return sum(losses[-20:]) / 20

    assert last(True) == pytest.approx(last(False), rel=0.02)


@pytest.mark.parametrize("engine", ENGINES)
def test_predictions_inside_of_autocast_are_averaged_in_full_precision(engine: str) -> None:
    """Proves that only outputs of the network are rounded: probabilities add up to 1 in float32."""
    model, guide, x = made(engine, "mlp")
    posterior = pb.Posterior(model, guide.eval())
    exact = posterior.predict(x, 8, seed=0).probs
    with autocast():
        prediction = posterior.predict(x, 8, seed=0)
    assert prediction.outputs.dtype == prediction.probs.dtype == torch.float32
    assert not torch.equal(prediction.probs, exact)
    torch.testing.assert_close(prediction.probs.sum(-1), torch.ones(N), rtol=0, atol=1e-6)
    torch.testing.assert_close(prediction.probs, exact, rtol=0, atol=4 * ROUNDOFF)
