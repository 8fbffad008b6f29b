"""The objective inside of a ``LightningModule``: loops, checkpoints and mixed precision of PyTorch Lightning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from framework_loops import LR, Types, assert_same, by_hand, loader, objective, rows, seeded_loss
from torch import Tensor

from pyro_bnn.inference import Objective

lightning: Any = pytest.importorskip("lightning", reason="PyTorch Lightning is not installed: pip install lightning")


class Trained(lightning.LightningModule):  # type: ignore[misc]
    """An objective with Adam, whose losses are kept."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective
        self.losses: list[float] = []
        self.held_out: list[float] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = seeded_loss(self.objective, batch, self.objective.step)
        assert loss.dtype == torch.float32
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        assert not self.objective.training and self.objective.beta == 1.0
        self.held_out.append(float(self.objective(*batch)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.objective.parameters(), lr=LR)


def trainer(folder: Path, epochs: int, **options: Any) -> Any:
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
    }
    return lightning.Trainer(max_epochs=epochs, accelerator="cpu", default_root_dir=folder, **(quiet | options))


def test_lightning_takes_the_steps_of_a_loop_by_hand(tmp_path: Path) -> None:
    """Proves that losses and parameters are the same, and that validation, before and in between, changes nothing."""
    module, own = Trained(objective()), objective()
    trainer(tmp_path, 3).fit(module, loader(), loader())
    losses = by_hand(own, 3)
    assert module.losses == pytest.approx(losses, abs=1e-6)
    assert module.objective.step == own.step == 18
    assert len(module.held_out) == 2 + 18  # two batches before training
    assert_same(module.objective, own)


def test_lightning_accumulates_and_clips_gradients(tmp_path: Path) -> None:
    module, own, free = Trained(objective()), objective(), objective()
    trainer(tmp_path, 3, accumulate_grad_batches=3, gradient_clip_val=0.5).fit(module, loader())
    by_hand(own, 3, accumulate=3, clip_norm=0.5)
    by_hand(free, 3, accumulate=3)
    assert_same(module.objective, own)
    with pytest.raises(AssertionError):  # the bound on the norm is one
        assert_same(free, own)


def test_a_checkpoint_of_lightning_has_the_step_of_the_annealing(tmp_path: Path) -> None:
    """Proves that training which resumes from a checkpoint of the trainer ends where a run without a break ends."""
    whole, first, second = (Trained(objective(kl_annealing=18.0)) for _ in range(3))
    trainer(tmp_path, 4).fit(whole, loader())
    begun = trainer(tmp_path, 2)
    begun.fit(first, loader())
    begun.save_checkpoint(tmp_path / "begun.ckpt")
    assert second.objective.beta == pytest.approx(1 / 18)
    trainer(tmp_path, 4).fit(second, loader(), ckpt_path=tmp_path / "begun.ckpt")
    assert first.losses + second.losses == pytest.approx(whole.losses, abs=1e-6)
    assert second.objective.step == 24
    assert_same(second.objective, whole.objective)


def test_mixed_precision_of_lightning_trains_as_float32_does(tmp_path: Path) -> None:
    """Proves that layers return bfloat16, the loss is float32 in type and value, and parameters stay float32."""
    exact, mixed = Trained(objective()), Trained(objective())
    types = Types(mixed.objective)
    trainer(tmp_path, 12).fit(exact, loader())
    trainer(tmp_path, 12, precision="bf16-mixed").fit(mixed, loader())
    assert types.found == {torch.bfloat16}
    assert {p.dtype for p in mixed.objective.parameters()} == {torch.float32}
    assert mixed.losses != exact.losses
    assert sum(mixed.losses[-6:]) == pytest.approx(sum(exact.losses[-6:]), rel=0.02)
    assert sum(exact.losses[-6:]) < 0.8 * sum(exact.losses[:6])
    own = objective()
    assert mixed.losses == pytest.approx(by_hand(own, 12, half=True), abs=1e-5)


def test_the_posterior_is_that_of_the_objective(tmp_path: Path) -> None:
    module = Trained(objective())
    trainer(tmp_path, 12).fit(module, loader())
    x, y = rows()
    probs = module.objective.posterior().predict(x, 16, seed=0).probs
    assert float((probs.argmax(-1) == y).float().mean()) > 0.6
