"""The objective in a loop around Hugging Face Accelerate: its steps, its checkpoints and its mixed precision."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from framework_loops import LR, Types, assert_same, by_hand, loader, objective, seeded_loss

from pyro_bnn.inference import Objective

accelerate: Any = pytest.importorskip("accelerate", reason="Accelerate is not installed: pip install accelerate")


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    """Accelerate keeps its settings for the whole process."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


class Loop:
    """An objective, Adam and six batches, as a user prepares them."""

    def __init__(self, given: Objective, accumulate: int = 1, precision: str = "no") -> None:
        self.objective = given
        self.accelerator = accelerate.Accelerator(
            cpu=True, gradient_accumulation_steps=accumulate, mixed_precision=precision
        )
        optimizer = torch.optim.Adam(given.parameters(), lr=LR)
        self.prepared, self.optimizer, self.loader = self.accelerator.prepare(given, optimizer, loader())

    def run(self, epochs: int, clip_norm: float | None = None) -> list[float]:
        losses: list[float] = []
        for _ in range(epochs):
            for batch in self.loader:
                with self.accelerator.accumulate(self.prepared):
                    loss = seeded_loss(self.prepared, batch, self.objective.step)
                    assert loss.dtype == torch.float32
                    losses.append(float(loss.detach()))
                    self.accelerator.backward(loss)
                    if self.accelerator.sync_gradients and clip_norm is not None:
                        self.accelerator.clip_grad_norm_(self.prepared.parameters(), clip_norm)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
        return losses


def test_accelerate_takes_the_steps_of_a_loop_by_hand() -> None:
    loop, own = Loop(objective()), objective()
    assert loop.run(3) == pytest.approx(by_hand(own, 3), abs=1e-6)
    assert loop.objective.step == own.step == 18
    assert_same(loop.objective, own)


def test_accelerate_accumulates_and_clips_gradients() -> None:
    loop, own, free = Loop(objective(), accumulate=3), objective(), objective()
    loop.run(3, clip_norm=0.5)
    by_hand(own, 3, accumulate=3, clip_norm=0.5)
    by_hand(free, 3, accumulate=3)
    assert_same(loop.objective, own)
    with pytest.raises(AssertionError):  # the bound on the norm is one
        assert_same(free, own)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
def test_a_checkpoint_of_accelerate_has_the_step_of_the_annealing(tmp_path: Path, safe: bool) -> None:
    """Proves that training which resumes from ``save_state`` ends where a run without a break ends, also from
    safetensors, which hold tensors only."""
    whole, first = Loop(objective(kl_annealing=18.0)), Loop(objective(kl_annealing=18.0))
    losses = whole.run(4)
    before = first.run(2)
    first.accelerator.save_state(str(tmp_path / "begun"), safe_serialization=safe)
    second = Loop(objective(kl_annealing=18.0))
    assert second.objective.beta == pytest.approx(1 / 18)
    second.accelerator.load_state(str(tmp_path / "begun"))
    assert second.objective.step == 12
    assert before + second.run(2) == pytest.approx(losses, abs=1e-6)
    assert_same(second.objective, whole.objective)


def test_mixed_precision_of_accelerate_trains_as_float32_does() -> None:
    """Proves that layers return bfloat16, the loss is float32 in type and value, and parameters stay float32."""
    exact = by_hand(objective(), 12)
    loop = Loop(objective(), precision="bf16")
    types = Types(loop.objective)
    losses = loop.run(12)
    assert types.found == {torch.bfloat16}
    assert {p.dtype for p in loop.objective.parameters()} == {torch.float32}
    assert losses != exact and losses == pytest.approx(by_hand(objective(), 12, half=True), abs=1e-5)
    assert sum(losses[-6:]) == pytest.approx(sum(exact[-6:]), rel=0.02)
    assert sum(exact[-6:]) < 0.8 * sum(exact[:6])


def test_the_objective_comes_back_from_what_was_prepared() -> None:
    """Proves that a posterior can be had in mixed precision too, and predicts in float32."""
    loop = Loop(objective(), precision="bf16")
    loop.run(1)
    given = loop.accelerator.unwrap_model(loop.prepared)
    assert given is loop.objective
    x = torch.randn(5, 4)
    assert given.posterior().predict(x, 4, seed=0).probs.dtype == torch.float32
