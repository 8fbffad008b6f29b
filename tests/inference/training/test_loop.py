"""The training loop that engines share."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Unpack

import pytest
import torch
from by_hand import chain
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn.inference import SVGD, FitState
from pyro_bnn.inference.batches import minibatches
from pyro_bnn.inference.training.loop import train
from pyro_bnn.inference.training.options import Training, checked
from pyro_bnn.inference.training.run import TrainingRun
from pyro_bnn.likelihoods import Gaussian
from pyro_bnn.models import Dense
from pyro_bnn.program.guide import MixtureGuide

N = 12


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 2, generator=generator, dtype=torch.float64)
    return x, x[:, :1]


def dense() -> Dense:
    return Dense(chain(2, 3, 1), Gaussian(0.5), N)


class Line(nn.Module):
    """One number, and a normalisation layer that counts batches."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(4.0, dtype=torch.float64))
        self.norm = nn.BatchNorm1d(1, dtype=torch.float64)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.a * self.norm(x[:, :1])


class LeastSquares:
    """An engine of one's own."""

    label = "own"

    def add_gradient(self, batch: tuple[Any, ...], run: TrainingRun, weight: Tensor | float) -> float:
        loss = (run.model(*batch) - batch[1]).square().mean()
        (weight * loss).backward()
        return float(loss.detach())

    def direct(self, run: TrainingRun) -> None:
        pass

    def describe(self, loss: float) -> str:
        return str(loss)

    def posterior(self) -> pb.Posterior:
        raise NotImplementedError


def run_of(model: Line) -> TrainingRun:
    return TrainingRun(model, model, [model.a], torch.optim.SGD([model.a], lr=0.05, momentum=0.9))


def trained(run: TrainingRun, engine: Any = None, epochs: int = 4, **options: Unpack[Training]) -> TrainingRun:
    torch.manual_seed(7)
    batches = minibatches(run.model, data(), 4)
    train(run, batches, engine or LeastSquares(), checked({"progress": False, **options}, "own"), epochs=epochs)
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

    class Fails(LeastSquares):
        def add_gradient(self, batch: tuple[Any, ...], run: TrainingRun, weight: Tensor | float) -> float:
            if run.step == 7:
                with torch.no_grad():
                    run.parameters[0].fill_(math.nan)
                raise FloatingPointError("the loss became nan") from ValueError("a root of -1")
            return super().add_gradient(batch, run, weight)

    run = run_of(Line())
    message = "^the loss became nan. Model and guide are back at the end of epoch 2$"
    with pytest.raises(FloatingPointError, match=message) as caught:
        trained(run, Fails(), callbacks=[note])
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
