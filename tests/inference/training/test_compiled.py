"""``compile=True``: the same training, sampling and prediction, one graph for each shape, and a word where it cannot.

Half a minute of this file is the compiler's.
"""

from __future__ import annotations

import shutil
import sysconfig
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn.diagnostics import evaluate
from pyro_bnn.inference import SGHMC, SVGD, AutoParticles, fit, sample
from pyro_bnn.inference.training import compiled
from pyro_bnn.models import Bella, Dense, MeanFieldGuide, ParticleGuide, Rank1, Rank1Guide
from pyro_bnn.posterior import Posterior
from pyro_bnn.recording.recorded import Recorded

#: torch.compile builds extensions of Python
HAS_COMPILER = shutil.which("g++") is not None and Path(sysconfig.get_path("include"), "Python.h").exists()
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="torch.compile needs a C++ compiler and Python's headers")
ROWS = 40


class Branching(nn.Module):
    """A network that decides in Python by the numbers it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        f: Tensor = self.layer(x)
        return f if float(f.detach().sum()) > 1e6 else 2 * f


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def with_statistics() -> nn.Module:
    """Batch norm and dropout: buffers that a step writes into, and random numbers beside those of the guide."""
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.3), nn.Linear(5, 3))


def with_attention() -> nn.Module:
    """A layer of a transformer, whose dropout acts on tensors with permuted axes, and which normalises."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.2)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            tokens = x[:, :, None].expand(-1, -1, 4).transpose(0, 1)
            f: Tensor = self.head(self.layer(tokens).mean(0))
            return f

    return Encoder()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(ROWS, 6, generator=generator), torch.randint(3, (ROWS,), generator=generator)


def dense(net: nn.Module) -> tuple[Any, Any]:
    model = Dense(net, pb.likelihoods.Categorical(), ROWS)
    return model, MeanFieldGuide(model)


def rank1(net: nn.Module) -> tuple[Any, Any]:
    model = Rank1(net, pb.likelihoods.Categorical(), ROWS)
    return model, Rank1Guide(model, 2)


def trained(
    build: Callable[[nn.Module], tuple[Any, Any]], net: Callable[[], nn.Module], **options: Any
) -> tuple[Posterior, list[Tensor]]:
    """A posterior, and all parameters and buffers behind it."""
    torch.manual_seed(0)
    model, guide = build(net())
    posterior = fit(model, guide, data(), epochs=3, batch_size=16, seed=0, progress=False, **options)
    held = [*model.parameters(), *guide.parameters(), *model.buffers()]
    return posterior, [value.detach().clone() for value in held]


def require_same(one: tuple[Posterior, list[Tensor]], other: tuple[Posterior, list[Tensor]], size: float) -> None:
    torch.testing.assert_close(torch.tensor(one[0].losses), torch.tensor(other[0].losses), rtol=size, atol=size)
    for ours, true in zip(one[1], other[1], strict=True):
        torch.testing.assert_close(ours, true, rtol=size, atol=size)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    """What records, in the order in which it is made."""
    made: list[Recorded] = []

    class Watched(Recorded):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(compiled, "Recorded", Watched)
    return made


@needs_compiler
@pytest.mark.filterwarnings("error:.*compile:UserWarning")
@pytest.mark.parametrize(
    ("build", "net", "options", "size"),
    [
        (dense, with_statistics, {"kl_annealing": 2.0, "clip_norm": 1.0}, 1e-5),
        pytest.param(dense, with_statistics, {"precision": "bf16"}, 2e-2, marks=pytest.mark.slow),
        pytest.param(rank1, plain, {"accumulate": 2}, 1e-5, marks=pytest.mark.slow),
        pytest.param(rank1, with_statistics, {"kl_annealing": 2.0}, 1e-5, marks=pytest.mark.slow),
        pytest.param(rank1, with_attention, {}, 1e-4, marks=pytest.mark.slow),
        pytest.param(dense, with_attention, {}, 1e-4, marks=pytest.mark.slow),
    ],
    ids=["mean field", "half precision", "accumulated", "rank-1", "rank-1 attention", "attention"],
)
def test_a_compiled_training_is_the_same(
    build: Any, net: Any, options: dict[str, Any], size: float, graphs: list[Recorded]
) -> None:
    """Proves losses, parameters and running statistics equal, with the same draws, from one graph for each shape.

    The batches of an epoch have 16, 16 and 8 rows.
    """
    require_same(trained(build, net, compile=True, **options), trained(build, net, **options), size)
    assert [len(one) for one in graphs] == [2]


@needs_compiler
def test_frozen_weights_and_weights_without_a_gradient_stay() -> None:
    """Proves that AdamW does not decay a parameter that no loss depends on, which has no gradient and not one of 0."""

    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.unused = nn.Linear(6, 3), nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            f: Tensor = self.layer(x)
            return f

    def build(net: nn.Module) -> tuple[Any, Any]:
        model = Dense(net, pb.likelihoods.Categorical(), ROWS, select=lambda name, value: name == "layer.weight")
        return model, MeanFieldGuide(model)

    options = {"weight_decay": 0.5, "decay": "all"}
    one, other = trained(build, Apart, compile=True, **options), trained(build, Apart, **options)
    require_same(one, other, 1e-5)


class Twins(nn.Module):
    """Three parameters, of which two have the same gradient and one has itself as its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
        self.third = nn.Parameter(torch.full((3,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        return ((self.first + self.second) * x).sum() + self.third.square().sum() / 2 + self.third[0].expand(3).sum()


@needs_compiler
def test_gradients_may_be_written_into() -> None:
    """Proves that who clips or unscales a gradient in place changes no other, no parameter and no later step."""
    net, x = Twins(), torch.tensor([1.0, 2.0, 3.0])

    def differentiate(x: Tensor) -> Tensor:
        loss: Tensor = net(x)
        loss.backward()
        return loss

    step = compiled.CompiledStep(differentiate, list(net.parameters()), [net], verifies_epochs=False)
    for _ in range(3):
        for parameter in net.parameters():
            parameter.grad = None
        assert step(x) is not None
        for parameter in net.parameters():
            parameter.grad.mul_(10)  # type: ignore[union-attr]
        for parameter, true in zip(net.parameters(), (10 * x, 10 * x, torch.tensor([50.0, 20, 20])), strict=True):
            torch.testing.assert_close(parameter.grad, true)
        torch.testing.assert_close(net.third.detach(), torch.full((3,), 2.0))


def test_results_that_are_one_tensor_become_gradients_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves it for one result of two parameters, and for one whose elements lie in one place."""
    net, both = Twins(), torch.ones(3)
    step = compiled.CompiledStep(lambda: both, list(net.parameters()), [net], verifies_epochs=False)
    monkeypatch.setattr(step, "_recorded", lambda: (both.sum(), both, both, torch.ones(1).expand(3)))
    step()
    for parameter in net.parameters():
        parameter.grad.mul_(10)  # type: ignore[union-attr]
        assert torch.equal(parameter.grad, torch.full((3,), 10.0))  # type: ignore[arg-type]


@needs_compiler
@pytest.mark.parametrize("sequential", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_particles_are_the_same(sequential: bool, graphs: list[Recorded]) -> None:
    """Proves it for particles with annealing, together and in turn."""

    def run(compile: bool) -> tuple[Posterior, list[Tensor]]:
        torch.manual_seed(0)
        model = Bella(plain(), pb.likelihoods.Categorical(), ROWS, rank=2)
        guide = ParticleGuide(model, 3)
        engine = SVGD(model, guide, sequential=sequential, annealing=lambda step: min(1.0, (step + 1) / 8))
        posterior = engine.fit(data(), 3, batch_size=20, seed=0, progress=False, compile=compile)
        return posterior, [value.detach().clone() for value in guide.parameters()]

    require_same(run(True), run(False), 1e-5)
    assert [len(one) for one in graphs] == [1]


@needs_compiler
def test_compiled_particles_of_a_users_model_are_the_same() -> None:
    """Proves it for a Pyro program that is a function."""
    x, y = data()

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(6, 3), 1.0).to_event(2))
        with pyro.plate("rows", ROWS, subsample_size=len(x)):
            pyro.sample("y", dist.Categorical(logits=x @ w), obs=y)

    def run(compile: bool) -> Tensor:
        torch.manual_seed(0)
        guide = AutoParticles(model, 3)
        SVGD(model, guide).fit((x, y), 2, batch_size=20, seed=0, progress=False, compile=compile)
        return guide.theta.detach().clone()

    torch.testing.assert_close(run(True), run(False), rtol=1e-5, atol=1e-6)


@needs_compiler
def test_a_compiled_chain_is_the_same() -> None:
    """Proves that SGHMC has the same draws from a compiled potential, with two chains and batches of their own."""
    torch.manual_seed(0)
    model, _ = dense(plain())
    draws = [
        sample(
            SGHMC(model, data(), step_size=0.05, friction=0.1, batch_size=16, compile=compile),
            6,
            2,
            num_chains=2,
            seed=0,
            progress=False,
        ).draws(12)
        for compile in (True, False)
    ]
    for name, value in draws[1].items():
        torch.testing.assert_close(draws[0][name], value, rtol=1e-4, atol=1e-5)


@needs_compiler
def test_compiled_predictions_are_the_same() -> None:
    """Proves that predictions and evaluations are those of the posterior as it was, in every shape."""
    posterior, _ = trained(dense, with_statistics)
    x, y = data()
    before = posterior.predict(x, seed=0).outputs, evaluate(posterior, (x, y), seed=0)["nll"]
    posterior.compile()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rows in (ROWS, ROWS, 7):
            found = posterior.predict(x[:rows], seed=0).outputs
            torch.testing.assert_close(found, before[0][:, :, :rows], rtol=1e-5, atol=1e-6)
        assert evaluate(posterior, (x, y), seed=0)["nll"] == pytest.approx(before[1], rel=1e-5)
    with pytest.raises(TypeError, match="models of this package"):
        Posterior(lambda: None, lambda: None).compile()


def test_what_cannot_be_compiled_is_said_and_runs() -> None:
    """Proves that a network that branches on its values trains as without ``compile=``, with one warning."""
    with pytest.warns(UserWarning, match=r"step of training could not be compiled.*compile=False silences") as said:
        one = trained(dense, Branching, compile=True)
    assert len([w for w in said if "could not be compiled" in str(w.message)]) == 1
    require_same(one, trained(dense, Branching), 0.0)


def test_without_a_compiler_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that what the compiler raises is said, and that the step is then that of the model."""

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no C++ compiler was found")

    monkeypatch.setattr("torch.compile", lambda *_, **__: fails)
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler was found"):
        one = trained(dense, plain, compile=True)
    require_same(one, trained(dense, plain), 0.0)


def test_where_compile_does_not_apply() -> None:
    """Proves that particles in function space and chains of batch norm say that they are not compiled."""
    model = Bella(plain(), pb.likelihoods.Categorical(), ROWS, rank=2)
    engine = SVGD(model, ParticleGuide(model, 2), space="function", method="wgd")
    with pytest.warns(UserWarning, match="not compiled, because particles repel each other by their outputs"):
        engine.fit(data(), 1, seed=0, progress=False, compile=True)
    model, _ = dense(with_statistics())
    with pytest.warns(UserWarning, match="not compiled, because the layer '1' gathers statistics"):
        sample(SGHMC(model, data(), step_size=0.05, friction=0.1, compile=True), 2, 1, seed=0, progress=False)
    with pytest.raises(ValueError, match="capture='auto'"):
        SGHMC(model, data(), step_size=0.05, friction=0.1, compile=True, capture=False)
    with pytest.raises(ValueError, match="compile='yes': expected True, False or 'reduce-overhead'"):
        trained(dense, plain, compile="yes")
    with pytest.raises(TypeError, match="compile=1"):
        trained(dense, plain, compile=1)
    with pytest.warns(UserWarning, match="CUDA graphs are for tensors on a CUDA device, and these are on cpu"):
        one = trained(dense, plain, compile="reduce-overhead")
    require_same(one, trained(dense, plain), 0.0)
    posterior, (x, _) = one[0], data()
    before = posterior.predict(x, seed=0).probs
    posterior.compile("reduce-overhead")
    with pytest.warns(UserWarning, match="a prediction could not be compiled.*CUDA graphs"):
        assert torch.equal(posterior.predict(x, seed=0).probs, before)
    with pytest.raises(ValueError, match="mode='fast'"):
        posterior.compile("fast")  # type: ignore[arg-type]


@needs_compiler
def test_a_callback_that_changes_the_network_is_noticed() -> None:
    """Proves that the first step of an epoch is compared with the model where callbacks may have changed it."""

    def run(compile: bool) -> tuple[Posterior, list[Tensor]]:
        torch.manual_seed(0)
        model, guide = dense(with_statistics())

        def stop_dropping(state: Any) -> None:
            model.core().net[3].p = 0.0  # type: ignore[operator, union-attr]

        options: dict[str, Any] = {"epochs": 4, "batch_size": 20, "seed": 0, "progress": False}
        posterior = fit(model, guide, data(), callbacks=[stop_dropping], compile=compile, **options)
        return posterior, [*guide.parameters()]

    with pytest.warns(UserWarning, match="is not what it was when it was recorded"):
        one = run(True)
    require_same(one, run(False), 1e-5)
