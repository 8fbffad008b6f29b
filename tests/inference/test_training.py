"""The training loop that engines share, the optimisers that they build, and schedules."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import chain
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn.inference import SVGD, AutoParticles, FitState, fit, multistep
from pyro_bnn.inference.batches import minibatches
from pyro_bnn.inference.checkpoint import TrainingRun
from pyro_bnn.inference.training import build_optimizer, train
from pyro_bnn.likelihoods import Gaussian
from pyro_bnn.models import Dense, MeanFieldGuide
from pyro_bnn.program.guide import MixtureGuide

N = 12


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 2, generator=generator, dtype=torch.float64)
    return x, x[:, :1]


def dense() -> Dense:
    return Dense(chain(2, 3, 1), Gaussian(0.5), N)


# ------------------------------------------------------------------------------------------------------ the loop


class Line(nn.Module):
    """One number, and a normalisation layer that counts batches."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(4.0, dtype=torch.float64))
        self.norm = nn.BatchNorm1d(1, dtype=torch.float64)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.a * self.norm(x[:, :1])


def descend(batch: tuple[Any, ...], run: TrainingRun) -> float:
    """A step of an engine of one's own: least squares."""
    loss = (run.model(*batch) - batch[1]).square().mean()
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    run.optimizer.step()
    return float(loss.detach())


def run_of(model: Line) -> TrainingRun:
    return TrainingRun(model, model, [model.a], torch.optim.SGD([model.a], lr=0.05, momentum=0.9))


def trained(run: TrainingRun, step: Any = descend, epochs: int = 4, **options: Any) -> TrainingRun:
    torch.manual_seed(7)
    batches = minibatches(run.model, data(), 4)
    train(run, batches, step, epochs=epochs, label="own", describe=str, progress=False, **options)
    return run


def test_the_loop_counts_epochs_and_steps_and_keeps_the_losses() -> None:
    seen: list[FitState] = []
    run = trained(run_of(Line()), callbacks=[lambda state: seen.append(state)])
    assert (run.epoch, run.step, len(run.losses)) == (4, 12, 12)
    assert [(s.epoch, s.step) for s in seen] == [(1, 3), (2, 6), (3, 9), (4, 12)]
    assert [s.loss for s in seen] == [pytest.approx(sum(run.losses[3 * i : 3 * i + 3]) / 3) for i in range(4)]
    assert run.losses[-1] < run.losses[0]
    assert int(run.model.norm.num_batches_tracked) == 12  # type: ignore[attr-defined]


def test_a_run_of_ones_own_is_resumed_to_the_same_end(tmp_path: Path) -> None:
    whole = trained(run_of(Line()))
    trained(run_of(Line()), epochs=2, checkpoint=tmp_path / "run.pt")
    again = run_of(Line())
    with torch.no_grad():
        again.parameters[0].fill_(100.0)
    trained(again, checkpoint=tmp_path / "run.pt")
    assert torch.equal(again.parameters[0], whole.parameters[0])
    assert again.losses == whole.losses and again.step == whole.step
    assert all(torch.equal(a, b) for a, b in zip(again.buffers, whole.buffers, strict=True))


def test_a_step_that_fails_puts_everything_back_to_the_last_good_epoch() -> None:
    """Parameters, statistics and the optimiser's memory; the cause of the error stays its cause."""
    good: list[tuple[Tensor, Tensor]] = []

    def note(state: FitState) -> None:
        good.append((state.model.a.detach().clone(), state.model.norm.running_mean.clone()))  # type: ignore[attr-defined]

    def fails(batch: tuple[Any, ...], run: TrainingRun) -> float:
        loss = descend(batch, run)
        if run.step == 7:
            with torch.no_grad():
                run.parameters[0].fill_(math.nan)
            raise FloatingPointError("the loss became nan") from ValueError("a root of -1")
        return loss

    run = run_of(Line())
    message = "^the loss became nan. Model and guide are back at the end of epoch 2$"
    with pytest.raises(FloatingPointError, match=message) as caught:
        trained(run, fails, callbacks=[note])
    assert isinstance(caught.value.__cause__, ValueError)
    assert torch.equal(run.parameters[0], good[-1][0]) and torch.equal(run.buffers[0], good[-1][1])
    assert not run.optimizer.state and run.remembered_step == 6


def test_an_optimiser_that_was_given_can_be_used_again_after_a_divergence() -> None:
    """Its momentum is that of steps that went wrong, and is forgotten along with them."""
    model, (x, y) = dense(), data()
    guide = MixtureGuide(model, 2, family="point")
    optimizer = torch.optim.SGD(guide.parameters(), lr=1e-2, momentum=0.9)
    engine = SVGD(model, guide, optimizer)

    def explode(state: FitState) -> None:
        state.optimizer.param_groups[0]["lr"] = 1e200

    with pytest.raises(FloatingPointError, match="back at the end of epoch 1"):
        engine.fit((x, y), 5, batch_size=4, callbacks=[explode], progress=False, seed=0)
    assert not optimizer.state and engine.steps == 3
    optimizer.param_groups[0]["lr"] = 1e-2
    losses = engine.fit((x, y), 5, batch_size=4, progress=False, seed=0).losses
    assert all(map(math.isfinite, losses)) and engine.optimizer is optimizer


# ------------------------------------------------------------------------------------------------- the optimiser


def fitted(optim: Any, lr: float | None) -> Any:
    """The optimiser of ``fit``."""
    model, seen = dense(), []
    guide = MeanFieldGuide(model)
    if optim == "given":
        optim = torch.optim.RMSprop(guide.parameters(), lr=0.02)
    fit(model, guide, data(), epochs=1, optim=optim, lr=lr, callbacks=[lambda s: seen.append(s)], progress=False)
    return seen[0].optimizer


def stein(optim: Any, lr: float | None) -> Any:
    """The optimiser of ``SVGD`` for a network."""
    model = dense()
    guide = MixtureGuide(model, 2, family="point")
    if optim == "given":
        optim = torch.optim.RMSprop(guide.parameters(), lr=0.02)
    engine = SVGD(model, guide, optim, lr=lr)
    engine.fit(data(), 1, progress=False)
    return engine.optimizer


def stein_of_any_model(optim: Any, lr: float | None) -> Any:
    model = dense()
    guide = AutoParticles(model, 2)
    if optim == "given":
        guide.setup(*data())
        optim = torch.optim.RMSprop([guide.theta], lr=0.02)
    engine = SVGD(model, guide, optim, lr=lr)
    engine.step(*data())
    return engine.optimizer


def ensemble(optim: Any, lr: float | None) -> Any:
    seen: list[Any] = []
    engine = pb.inference.DeepEnsemble(chain(2, 3, 1), Gaussian(0.5), N, num_networks=2)
    engine.fit(data(), epochs=1, optim=optim, lr=lr, callbacks=[lambda s: seen.append(s.optimizer)], progress=False)
    assert type(seen[0]) is type(seen[1]) and seen[0] is not seen[1]
    return seen[1]


FORMS: list[Any] = [
    ("adamw", None, "AdamW", 1e-3),
    ("adam", None, "Adam", 1e-3),
    ("adam", 0.03, "Adam", 0.03),
    ("sgd", None, "SGD", 0.1),
    ("sgd", 1e-3, "SGD", 1e-3),
    (torch.optim.Adagrad, 0.03, "Adagrad", 0.03),
    (torch.optim.Adagrad, None, "Adagrad", 0.01),
    (lambda groups: torch.optim.NAdam(groups, lr=0.004), None, "NAdam", 0.004),
    ("given", None, "RMSprop", 0.02),
]


#: the networks of an ensemble cannot share an optimiser
EACH = [(engine, *form) for engine in (fitted, stein, stein_of_any_model) for form in FORMS]
EACH += [(ensemble, *form) for form in FORMS if form[0] != "given"]


@pytest.mark.parametrize(("engine", "optim", "lr", "name", "rate"), EACH)
def test_optim_means_the_same_in_every_engine(engine: Any, optim: Any, lr: Any, name: str, rate: float) -> None:
    found = engine(optim, lr)
    assert type(found).__name__ == name
    assert {group["lr"] for group in found.param_groups} == {rate}
    if name == "SGD":
        assert all(group["momentum"] == 0.9 and group["nesterov"] for group in found.param_groups)


def test_the_default_is_adamw_for_the_elbo_and_adam_for_particles() -> None:
    assert type(fitted(None, None)).__name__ == "AdamW" and type(stein(None, 0.02)).__name__ == "Adam"
    assert fitted(None, 0.02).param_groups[0]["lr"] == stein(None, 0.02).param_groups[0]["lr"] == 0.02
    assert stein(None, None).param_groups[0]["lr"] == 1e-3


BAD: list[Any] = [
    ("lion", None, ValueError, "optim='lion': expected 'adamw', 'adam', 'sgd', a class of torch.optim, a function"),
    (3, None, TypeError, "optim=3: expected a name, a class"),
    (dict, None, TypeError, "optim=<class 'dict'>: expected a name, a class"),
    (lambda groups: groups, None, TypeError, "optim= must return a torch.optim.Optimizer, got list"),
    (lambda groups: torch.optim.SGD(groups, lr=0.1), 0.2, ValueError, "lr=0.2 is for the name or the class"),
    ("given", 0.2, ValueError, "lr=0.2 is for the name or the class of an optimiser, but optim= sets"),
]


@pytest.mark.parametrize("engine", [fitted, stein, stein_of_any_model])
@pytest.mark.parametrize(("optim", "lr", "error", "message"), BAD)
def test_an_optim_that_means_nothing_is_refused(engine: Any, optim: Any, lr: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        engine(optim, lr)


def test_an_optimiser_of_other_parameters_is_refused() -> None:
    own, other = nn.Linear(1, 1), nn.Linear(1, 1)
    elsewhere = torch.optim.SGD(other.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="has none of the parameters to train"):
        build_optimizer(elsewhere, [{"params": [*own.parameters()]}])
    with pytest.raises(ValueError, match="has none of the parameters to train"):
        fitted(elsewhere, None)
    part = torch.optim.SGD([own.bias], lr=0.1)
    assert build_optimizer(part, [{"params": [*own.parameters()]}]) is part


def test_a_weight_decay_that_nothing_would_use_is_refused() -> None:
    model = dense()
    guide = MeanFieldGuide(model)
    own = torch.optim.AdamW(guide.parameters())
    with pytest.raises(ValueError, match=r"weight_decay=0.1: optim= is an optimiser, which sets its own"):
        fit(model, guide, data(), epochs=1, optim=own, weight_decay=0.1, progress=False)


# ------------------------------------------------------------------------------------------------------ schedules


def rates(schedule: Callable[..., Any], steps: int, epochs: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
    scheduler = schedule(optimizer, steps, epochs)
    found = []
    for _ in range(steps * epochs):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_multistep_warms_up_and_drops_at_every_milestone() -> None:
    assert rates(multistep(2, (3, 4), 0.1), 2, 5) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])
    assert rates(multistep(0, (0.5,), 0.5), 4, 1) == pytest.approx([1, 1, 0.5, 0.5])
    assert rates(multistep(0, (), 0.5), 2, 1) == [1, 1]
