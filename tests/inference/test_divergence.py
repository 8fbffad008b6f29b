"""What happens when training diverges: the site is named, and model and guide are as they were at a good time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn.inference.checkpoint import read, write

X = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()
SHORT = {"batch_size": 12, "progress": False, "seed": 0}


class Masked(nn.Module):
    """A network with buffers that are infinite, or not a number, by design."""

    def __init__(self, value: float, normalised: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3) if normalised else nn.Identity()
        self.register_buffer("mask", torch.full((3, 3), value).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x)) @ self.get_buffer("mask").nan_to_num(neginf=-torch.inf).softmax(-1)


def dense(value: float = -torch.inf, normalised: bool = False) -> tuple[pb.models.Dense, pb.models.MeanFieldGuide]:
    model = pb.models.Dense(Masked(value, normalised), pb.likelihoods.Categorical(), 24)
    return model, pb.models.MeanFieldGuide(model)


def state(*modules: nn.Module) -> list[Tensor]:
    return [t.detach().clone() for m in modules for t in (*m.parameters(), *m.buffers())]


def assert_same(ours: list[Tensor], true: list[Tensor]) -> None:
    for a, b in zip(ours, true, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("value", [-torch.inf, torch.inf, torch.nan, 0.0])
@pytest.mark.parametrize("normalised", [False, True])
def test_a_buffer_that_is_not_finite_by_design_is_no_hindrance(value: float, normalised: bool) -> None:
    """The error names a site, and parameters and buffers are as before, whatever a buffer held from the beginning."""
    model, guide = dense(value, normalised)
    before = state(model, guide)
    with pytest.raises(FloatingPointError, match=r"site 'layer\.\w+'.*end of epoch 0"):
        pb.inference.fit(model, guide, (X, Y), epochs=3, lr=1e30, **SHORT)
    assert_same(state(model, guide), before)


def test_training_goes_back_to_the_last_good_epoch_and_not_to_its_beginning() -> None:
    """An epoch is remembered although a buffer is infinite."""
    model, guide = dense()
    good: list[Tensor] = []

    def spoil(run: pb.inference.FitState) -> None:
        if run.epoch == 2:
            good.extend(state(model, guide))
            run.optimizer.param_groups[0]["lr"] = 1e30

    with pytest.raises(FloatingPointError, match="end of epoch 2"):
        pb.inference.fit(model, guide, (X, Y), epochs=5, optim="sgd", callbacks=[spoil], **SHORT)
    assert_same(state(model, guide), good)


@pytest.mark.parametrize("epochs", [1, 2])
def test_the_very_last_update_is_looked_at_as_well(epochs: int) -> None:
    """No loss is computed after the last update: it is judged by what it left behind, and no posterior is returned."""
    model, guide = dense()

    def spoil(optimizer: torch.optim.Optimizer, steps: int, total: int) -> torch.optim.lr_scheduler.LRScheduler:
        last = steps * total - 1
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: torch.inf if step == last else 1.0)

    with pytest.raises(FloatingPointError, match=r"site 'layer\.\w+'.*step.*end of epoch " + str(epochs - 1)):
        pb.inference.fit(model, guide, (X, Y), epochs=epochs, schedule=spoil, **SHORT)
    assert all(bool(torch.isfinite(p).all()) for p in guide.parameters())


def test_particles_that_diverge_are_put_back() -> None:
    """The same for SVGD, of a network with an infinite buffer."""
    model = pb.models.Bella(Masked(-torch.inf), pb.likelihoods.Categorical(), 24, rank=1)
    guide = pb.models.ParticleGuide(model, 3)
    before = state(model, guide)
    with pytest.raises(FloatingPointError, match=r"site.*end of epoch 0"):
        pb.inference.SVGD(model, guide, lr=1e30).fit((X, Y), 3, **SHORT)
    assert_same(state(model, guide), before)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("what", [0, 1])
def test_a_checkpoint_that_is_not_finite_is_not_resumed(tmp_path: Path, bad: float, what: int) -> None:
    """Nothing is taken from it, and the message names the file and the place."""
    path = tmp_path / "run.pt"
    model, guide = dense()
    pb.inference.fit(model, guide, (X, Y), epochs=1, checkpoint=path, **SHORT)
    content = read(path)
    assert content is not None
    content["values"][what].view(-1)[1] = bad
    write(path, content)
    model, guide = dense()
    before = state(model, guide)
    with pytest.raises(FloatingPointError, match=r"run\.pt is the checkpoint of a run that diverged"):
        pb.inference.fit(model, guide, (X, Y), epochs=2, checkpoint=path, **SHORT)
    assert_same(state(model, guide), before)
