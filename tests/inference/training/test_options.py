"""The options of the loop mean the same in every engine: validation, accumulation, precision, logs, limits."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau, StepLR

import pyro_bnn as pb
from pyro_bnn.inference import SVGD, SWAG, AutoParticles, Callback, CSVLog, DeepEnsemble, FitState, MCDropout, fit
from pyro_bnn.inference.training.precision import Precision
from pyro_bnn.likelihoods import Categorical, Gaussian
from pyro_bnn.models import Bella, Dense, MeanFieldGuide, ParticleGuide, PointGuide, Rank1, Rank1Guide
from pyro_bnn.program.guide import MixtureGuide

N = 20


def data(size: int = N, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 3, generator=generator, dtype=dtype)
    return x, x[:, :1].sin() + 0.3 * torch.randn(size, 1, generator=generator, dtype=dtype)


def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Dropout(0.1), nn.Linear(5, 1)).to(dtype)


def still() -> nn.Module:
    """Without dropout."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def by_svi(**options: Any) -> pb.Posterior:
    model = Dense(net(), Gaussian(0.3), N)
    return fit(model, MeanFieldGuide(model), data(), **{"epochs": 4, "batch_size": 6, "lr": 0.05, **options})


def by_svgd(**options: Any) -> pb.Posterior:
    model = Dense(net(), Gaussian(0.3), N)
    engine = SVGD(model, MixtureGuide(model, 3, family="point"), lr=0.05)
    return engine.fit(data(), **{"epochs": 4, "batch_size": 6, **options})


def by_particles(**options: Any) -> pb.Posterior:
    model = Dense(still(), Gaussian(0.3), N)
    return SVGD(model, AutoParticles(model, 3), lr=0.05).fit(data(), **{"epochs": 4, "batch_size": 6, **options})


def by_ensemble(**options: Any) -> pb.Posterior:
    engine = DeepEnsemble(net(), Gaussian(0.3), N, num_networks=2)
    return engine.fit(data(), **{"epochs": 4, "batch_size": 6, "lr": 0.05, **options})


def by_dropout(**options: Any) -> pb.Posterior:
    return MCDropout(net(), Gaussian(0.3), N).fit(data(), **{"epochs": 4, "batch_size": 6, "lr": 0.05, **options})


def by_swag(**options: Any) -> pb.Posterior:
    return SWAG(net(), Gaussian(0.3), N).fit(data(), **{"epochs": 4, "batch_size": 6, "num_samples": 3, **options})


Engine = Callable[..., pb.Posterior]
ENGINES: list[Engine] = [by_svi, by_svgd, by_particles, by_ensemble, by_dropout, by_swag]


def draws_of(posterior: pb.Posterior) -> list[Tensor]:
    return [value for _, value in sorted(posterior.draws(posterior.num_stored or 2, seed=1).items())]


def same(one: pb.Posterior, other: pb.Posterior) -> bool:
    pairs = zip(draws_of(one), draws_of(other), strict=True)
    return one.losses == other.losses and all(torch.equal(a, b) for a, b in pairs)


# -------------------------------------------------------------------------------------------------- the options


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_knows_every_option(engine: Engine) -> None:
    """Proves that callbacks after epochs and steps, logs, limits and clipping reach the loop of each."""
    epochs: list[int] = []
    steps: list[int] = []
    logged: list[dict[str, float]] = []

    class Watch(Callback):
        def after_epoch(self, state: FitState) -> None:
            epochs.append(state.epoch)

        def after_step(self, state: FitState) -> None:
            steps.append(state.step)

    networks = 2 if engine is by_ensemble else 1
    posterior = engine(
        callbacks=[Watch()],
        log=lambda values, step: logged.append(values | {"at": step}),
        log_every=3,
        clip_norm=0.1,
        accumulate=2,
        max_steps=7,
        max_time=1000.0,
        progress=False,
        seed=0,
    )
    assert steps == [*range(1, 8)] * networks and epochs == [1, 2, 3] * networks
    assert len(posterior.losses) == 7
    of_epochs = [values for values in logged if "loss" in values]
    assert [values["at"] for values in of_epochs] == [2, 4, 6] * networks
    assert all(values["learning_rate"] > 0 and values["steps_per_second"] > 0 for values in of_epochs)
    assert [values["at"] for values in logged if "step_loss" in values] == [3, 6] * networks


@pytest.mark.parametrize("engine", ENGINES)
def test_an_option_that_does_not_exist_is_refused_with_the_nearest(engine: Engine) -> None:
    with pytest.raises(TypeError, match=r"callback= is no option of .*: did you mean callbacks=\?"):
        engine(callback=[], progress=False)


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"accumulate": 0}, ValueError, "accumulate=0: expected a whole number, at least 1"),
    ({"patience": 2}, ValueError, "patience=2: expected validation= too"),
    ({"patience": 0, "validation": (0, 0)}, ValueError, "patience=0"),
    ({"precision": "half"}, ValueError, "precision='half': expected one of 'bf16', 'fp16'"),
    ({"precision": "bf16"}, ValueError, "precision='bf16': parameters are float64"),
    ({"max_steps": 1.5}, ValueError, "max_steps=1.5"),
    ({"max_time": 0}, ValueError, "max_time=0: expected a positive number"),
    ({"log": 3}, TypeError, "log=3: expected a function"),
    ({"callbacks": [3]}, TypeError, "callbacks=.*expected a list of functions"),
    ({"progress": 1}, TypeError, "progress=1"),
    ({"checkpoint": 3}, TypeError, "checkpoint=3: expected a path"),
    ({"validation": iter([data()])}, TypeError, "validation is read more than once"),
    ({"validation": (data()[0][:0], data()[1][:0])}, ValueError, "validation= is empty"),
    ({"validation": (data()[0] * math.nan, data()[1])}, ValueError, "NaN"),
    ({"validation": (data()[0][:, :2], data()[1])}, Exception, "mat1 and mat2|shape"),
    ({"validation": (data()[0], data()[1][:5])}, ValueError, "samples|rows"),
]


@pytest.mark.parametrize(("options", "error", "message"), WRONG, ids=[str(one[0])[:30] for one in WRONG])
def test_an_option_that_means_nothing_is_refused(options: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        by_svi(**({"progress": False} | options))


# ----------------------------------------------------------------------------------------------------- validation


@pytest.mark.parametrize("engine", [by_svi, by_svgd, by_particles])
def test_validation_is_the_nll_of_the_predictions_and_training_does_not_notice(engine: Engine) -> None:
    """Proves that it equals `evaluate` at the same state, and that the losses are those without it, to the last bit."""
    seen: list[FitState] = []
    held = data(15, 5)
    posterior = engine(validation=held, callbacks=[lambda state: seen.append(state)], progress=False, seed=0)
    assert posterior.losses == engine(progress=False, seed=0).losses
    best = min(state.validation for state in seen if state.validation is not None)
    found = pb.diagnostics.evaluate(posterior, held, seed=0)["nll"]
    assert len(seen) == 4 and found == pytest.approx(best, rel=1e-6)


def test_the_best_epoch_is_restored_and_patience_ends_the_training() -> None:
    """Data of pure noise, on which a network overfits: the posterior is that of the epoch with the least NLL."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(N, 3, generator=generator).double(), torch.randn(N, 1, generator=generator).double()
    held = torch.randn(200, 3, generator=generator).double(), torch.randn(200, 1, generator=generator).double()

    def run(epochs: int, **options: Any) -> tuple[pb.Posterior, list[float], list[Tensor]]:
        model = Dense(still(), Gaussian(0.3), N)
        nlls: list[float] = []
        weights: list[Tensor] = []

        def note(state: FitState) -> None:
            nlls.append(state.validation or math.nan)
            weights.append(torch.cat([p.detach().flatten().clone() for p in guide.parameters()]))

        guide = PointGuide(model)
        settings: dict[str, Any] = {"lr": 0.1, "seed": 0, "progress": False, "callbacks": [note]}
        return fit(model, guide, (x, y), epochs=epochs, **settings | options), nlls, weights

    posterior, nlls, weights = run(40, validation=held)
    best = nlls.index(min(nlls))
    assert 0 <= best < 39 and len(nlls) == 40
    found = torch.cat([p.detach().flatten() for p in posterior.draw_source.guide.parameters()])  # type: ignore[attr-defined]
    assert torch.equal(found, weights[best])
    stopped, few, _ = run(40, validation=held, patience=3)
    first = next(i for i in range(40) if nlls.index(min(nlls[: i + 1])) <= i - 3)
    assert few == nlls[: first + 1] and len(stopped.losses) == first + 1


def test_patience_and_the_best_state_survive_an_interruption(tmp_path: Path) -> None:
    def run(epochs: int, path: Path | None) -> pb.Posterior:
        return by_svi(epochs=epochs, validation=data(15, 5), lr=0.5, checkpoint=path, progress=False, seed=0)

    whole = run(8, None)
    run(5, tmp_path / "run.pt")
    assert same(run(8, tmp_path / "run.pt"), whole)


def test_a_model_of_ones_own_is_validated_by_its_likelihood() -> None:
    """A conjugate model, whose predictive density is known: N(0, 1) prior of the mean, unit noise."""
    y = torch.linspace(-1.0, 2.0, 30)

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 30, subsample_size=len(x)):
            return pyro.sample("obs", dist.Normal(mean.expand(len(x)), 1.0), obs=y)

    seen: list[float] = []
    fit(
        model,
        AutoNormal(model),
        (torch.zeros(30, 1), y),
        epochs=120,
        batch_size=30,
        lr=0.05,
        validation=(torch.zeros(30, 1), y),
        callbacks=[lambda state: seen.append(state.validation or math.nan)],
        progress=False,
        seed=0,
    )
    exact = dist.Normal(float(y.sum()) / 31, math.sqrt(1 + 1 / 31)).log_prob(y).mean()
    # 16 draws of a mean with a standard deviation of .18 leave .002 nats of Monte Carlo error
    assert min(seen) == pytest.approx(-float(exact), abs=0.01)


# -------------------------------------------------------------------------------------------------- accumulation


@pytest.mark.parametrize("batch_size", [6, 7])
@pytest.mark.parametrize("method", ["svi", "svgd", "wgd", "particles", "shared"])
def test_accumulation_is_the_large_batch(method: str, batch_size: int) -> None:
    """Proves equality to rounding for what draws nothing, also where the last batch is smaller."""

    def run(**options: Any) -> list[Tensor]:
        model: Any = Dense(still(), Gaussian(0.3), N)
        settings: dict[str, Any] = {"epochs": 3, "seed": 0, "progress": False} | options
        if method == "svi":
            guide: Any = PointGuide(model)
            fit(model, guide, data(), lr=0.05, **settings)
        elif method == "particles":
            guide = AutoParticles(model, 3)
            guide.setup(*data())
            SVGD(model, guide, lr=0.05).fit(data(), **settings)
        else:
            if method == "shared":
                model = Rank1(still(), Gaussian(0.3), N)
            guide = MixtureGuide(model, 3, family="point")
            SVGD(model, guide, lr=0.05, method="wgd" if method == "wgd" else "svgd").fit(data(), **settings)
        return [p.detach().clone() for program in (model, guide) for p in program.parameters()]

    # all rows in one step, so that the order of rows does not matter
    whole, parts = run(batch_size=N), run(batch_size=batch_size, accumulate=-(-N // batch_size))
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in zip(whole, parts, strict=True))


def test_steps_and_annealing_count_updates_and_not_batches() -> None:
    calls: list[int] = []
    model = Dense(still(), Gaussian(0.3), N)
    guide = MeanFieldGuide(model)

    class Scaled(pb.inference.MixtureELBO):
        def differentiable_loss(self, *args: Any, **options: Any) -> Any:
            calls.append(1)
            return super().differentiable_loss(*args, **options)

    rates: list[float] = []
    posterior = fit(
        model,
        guide,
        data(),
        epochs=2,
        batch_size=5,
        accumulate=2,
        schedule=lambda optimizer, steps, epochs: StepLR(optimizer, steps, 0.1),
        callbacks=[lambda state: rates.append(state.optimizer.param_groups[0]["lr"])],
        elbo=Scaled(),
        lr=1.0,
        progress=False,
        seed=0,
    )
    assert len(posterior.losses) == 4 and len(calls) == 8
    assert rates == pytest.approx([0.1, 0.01])


def test_repulsion_by_outputs_refuses_accumulation() -> None:
    model = Dense(still(), Gaussian(0.3), N)
    engine = SVGD(model, MixtureGuide(model, 3, family="point"), method="wgd", space="function")
    with pytest.raises(ValueError, match=r"accumulate=2 with space='function': expected 1"):
        engine.fit(data(), 1, accumulate=2, progress=False)


# ------------------------------------------------------------------------------------------------------ precision


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(x)).mean(1))


def sequences(size: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, 6, 4, generator=generator)
    return x, x[:, :, 0].mean(1).mul(3).long().clamp(-1, 1) + 1


def rank1_losses(**options: Any) -> list[float]:
    torch.manual_seed(0)
    model = Rank1(Transformer(), Categorical(), 64)
    guide = Rank1Guide(model, components=2)
    settings: dict[str, Any] = {"epochs": 20, "batch_size": 32, "lr": 5e-3, "seed": 0, "progress": False}
    return fit(model, guide, sequences(), **settings | options).losses


def bella_losses(**options: Any) -> list[float]:
    torch.manual_seed(0)
    model = Bella(Transformer(), Categorical(), 64, rank=2)
    engine = SVGD(model, ParticleGuide(model, 3), lr=2e-2)
    return engine.fit(sequences(), 20, batch_size=32, seed=0, progress=False, **options).losses


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("losses", [rank1_losses, bella_losses])
def test_a_small_transformer_in_half_precision_reaches_the_loss_of_float32(losses: Any, precision: str) -> None:
    """Within 2 %, as the mean of the last ten steps, which differ by rounding alone: seeds are the same."""
    full, half = losses(), losses(precision=precision)
    assert full != half
    assert sum(half[-10:]) == pytest.approx(sum(full[-10:]), rel=0.02)


def test_the_network_runs_in_half_precision_and_parameters_stay() -> None:
    seen: list[torch.dtype] = []
    model = Dense(net(torch.float32), Gaussian(0.3), N)
    guide = MeanFieldGuide(model)

    class Note(pb.inference.MixtureELBO):
        def differentiable_loss(self, *args: Any, **options: Any) -> Any:
            with model.recording_outputs() as outputs:
                loss = super().differentiable_loss(*args, **options)
            seen.extend(f.dtype for f in outputs)
            return loss

    fit(model, guide, data(dtype=torch.float32), epochs=1, elbo=Note(), precision="bf16", progress=False)
    assert {p.dtype for p in [*model.parameters(), *guide.parameters()]} == {torch.float32} and seen


def test_overflow_lowers_the_factor_and_leaves_the_step_out() -> None:
    """A parameter whose gradient overflows with the first factor stays, and moves once the factor is small enough."""
    p = nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([p], lr=1e-30)
    precision = Precision("fp16", [p])
    moved = []
    for step in range(1, 12):
        optimizer.zero_grad()
        (precision.factor() * p * 1e35).backward()  # 65536 of it is infinite, 1000 is not
        assert precision.has_gradient(optimizer, step) == bool(torch.isfinite(p.grad).all())
        assert not torch.isfinite(p.grad) or float(p.grad) == pytest.approx(1e35)  # without the factor
        precision.update(optimizer)
        moved.append(float(p.detach()) != 1)
    assert moved[0] is False and moved[-1] is True and sorted(moved) == moved
    with pytest.raises(FloatingPointError, match="not finite at step 99 in fp16, whatever the factor"):
        for _ in range(60):
            optimizer.zero_grad()
            (precision.factor() * p * math.inf).backward()
            precision.has_gradient(optimizer, 99)
            precision.update(optimizer)


# ----------------------------------------------------------------------------------------- logs, limits, schedules


class Scalars:
    def __init__(self) -> None:
        self.found: list[tuple[str, int]] = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.found.append((name, step))


class Run:
    def __init__(self) -> None:
        self.found: list[tuple[str, int]] = []

    def log(self, values: dict[str, float], step: int) -> None:
        self.found += [(name, step) for name in values]


class Logger:
    def __init__(self) -> None:
        self.found: list[tuple[str, int]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.found += [(name, step) for name in metrics]


@pytest.mark.parametrize("kind", [Scalars, Run, Logger])
def test_logs_of_other_tools_are_written_to(kind: Any) -> None:
    log = kind()
    by_svi(log=log, validation=data(5, 5), epochs=2, progress=False, seed=0)
    names = ["loss", "learning_rate", "steps_per_second", "validation_nll"]
    assert log.found == [(name, step) for step in (4, 8) for name in names]


def test_a_csv_file_has_every_number(tmp_path: Path) -> None:
    log = CSVLog(tmp_path / "folder" / "log.csv")
    losses = by_svi(log=log, log_every=1, epochs=2, progress=False, seed=0).losses
    rows = list(csv.DictReader((tmp_path / "folder" / "log.csv").open()))
    assert [float(row["value"]) for row in rows if row["name"] == "step_loss"] == losses
    assert [int(row["step"]) for row in rows if row["name"] == "loss"] == [4, 8]
    by_svi(log=log, epochs=1, progress=False, seed=0)
    assert len(list(csv.DictReader((tmp_path / "folder" / "log.csv").open()))) == len(rows) + 3
    assert repr(log).startswith("CSVLog(path=")


def test_time_ends_a_run_within_an_epoch() -> None:
    def slow(state: FitState) -> None:
        time.sleep(0.05)

    class Slow(Callback):
        def after_step(self, state: FitState) -> None:
            slow(state)

    losses = by_svi(epochs=100, callbacks=[Slow()], max_time=0.3, progress=False, seed=0).losses
    assert 1 <= len(losses) <= 7 and losses == by_svi(epochs=2, progress=False, seed=0).losses[: len(losses)]


def test_a_callback_after_a_step_ends_the_training() -> None:
    class Enough(Callback):
        def after_step(self, state: FitState) -> bool:
            return state.step == 3

    assert len(by_svi(callbacks=[Enough()], progress=False, seed=0).losses) == 3


def test_schedulers_of_torch_step_with_the_optimiser() -> None:
    """One cycle, a scheduler object, and one that waits for the validation NLL, once an epoch."""
    rates: list[float] = []
    optimizers: list[Any] = []

    def note(state: FitState) -> None:
        rates.append(state.optimizer.param_groups[0]["lr"])

    def cycle(optimizer: Any, steps: int, epochs: int) -> LRScheduler:
        return OneCycleLR(optimizer, max_lr=0.1, total_steps=steps * epochs)

    by_svi(schedule=cycle, lr=None, optim="sgd", callbacks=[note], progress=False, seed=0)
    assert rates[0] > 0.05 and rates[-1] < 0.01

    rates.clear()
    model = Dense(still(), Gaussian(0.3), N)
    guide = MeanFieldGuide(model)
    own = torch.optim.Adam([*guide.parameters()], lr=1.0)
    options: dict[str, Any] = {"epochs": 3, "batch_size": 5, "progress": False, "seed": 0, "callbacks": [note]}
    fit(model, guide, data(), optim=own, schedule=StepLR(own, 4, 0.1), **options)
    assert rates == pytest.approx([0.1, 0.01, 0.001])
    with pytest.raises(ValueError, match="StepLR of another optimiser"):
        fit(model, guide, data(), schedule=StepLR(own, 4, 0.1), **options)

    rates.clear()

    def plateau(optimizer: Any, steps: int, epochs: int) -> LRScheduler:
        optimizers.append(ReduceLROnPlateau(optimizer, factor=0.5, patience=0))
        return optimizers[-1]

    seen: list[float] = []
    by_svi(
        epochs=6,
        schedule=plateau,
        lr=1.0,
        validation=data(10, 5),
        callbacks=[note, lambda state: seen.append(state.validation or math.nan)],
        progress=False,
        seed=0,
    )
    expected, least, rate = [], math.inf, 1.0
    for nll in seen:
        rate *= 1.0 if nll < least * (1 - 1e-4) else 0.5
        least = min(nll, least)
        expected.append(rate)
    assert rates == pytest.approx(expected) and min(rates) < 1
