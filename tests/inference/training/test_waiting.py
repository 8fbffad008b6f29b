"""Training does not wait for the device inside a step: losses are read when someone asks for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_bnn.inference import SVGD, fit
from pyro_bnn.inference.training import run as run_file
from pyro_bnn.likelihoods import Categorical
from pyro_bnn.models import Bella, Dense, MeanFieldGuide, ParticleGuide, Rank1, Rank1Guide
from pyro_bnn.priors import Horseshoe
from tests.pretend_device import DEVICE, PretendDevice, PretendTensor

aten = torch.ops.aten
_WAITING = {aten._local_scalar_dense.default, aten.is_nonzero.default, aten.nonzero.default}
BATCH = 8


class Waits(TorchDispatchMode):
    """Counts what makes a processor wait for a device: ``item()``, ``float()``, ``bool()``, ``tolist()``, copies."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        to = kwargs.get("device")
        leaves = to is not None and torch.device(to).type == "cpu"
        if isinstance(args[0] if args else None, PretendTensor) and (func in _WAITING or leaves):
            self.count += 1
        return func(*args, **kwargs)

    def reading(self, tensor: PretendTensor) -> Any:
        self.count += 1
        return tensor.value.tolist()


def data(rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, 5, generator=generator), torch.randint(3, (rows,), generator=generator)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))


def dense(rows: int) -> tuple[Any, Any]:
    model = Dense(net().to(DEVICE), Categorical(), rows)
    return model, MeanFieldGuide(model)


def horseshoe(rows: int) -> tuple[Any, Any]:
    model = Dense(net().to(DEVICE), Categorical(), rows, prior=Horseshoe())
    return model, MeanFieldGuide(model)


def rank1(rows: int) -> tuple[Any, Any]:
    model = Rank1(net().to(DEVICE), Categorical(), rows)
    return model, Rank1Guide(model, 2)


def waits_of(programs: Callable[[int], tuple[Any, Any]], steps: int, **options: Any) -> int:
    rows = BATCH * steps
    with PretendDevice(), Waits() as waits, patch.object(PretendTensor, "tolist", lambda own: waits.reading(own)):
        model, guide = programs(rows)
        own = {"epochs": 1, "batch_size": BATCH, "progress": False, "seed": 0, **options}
        posterior = fit(model, guide, data(rows), **own)
        assert len(posterior.losses) == steps * own["epochs"]
    return waits.count


def test_no_step_of_particles_waits() -> None:
    """As above, for SVGD on products, which finds bandwidths and checks energies and gradients."""
    found = []
    for steps in (4, 12):
        rows = BATCH * steps
        with PretendDevice(), Waits() as waits, patch.object(PretendTensor, "tolist", lambda own: waits.reading(own)):
            model = Bella(net().to(DEVICE), Categorical(), rows)
            SVGD(model, ParticleGuide(model, 3)).fit(data(rows), epochs=1, batch_size=BATCH, progress=False, seed=0)
        found.append(waits.count)
    assert found[0] == found[1]


@pytest.mark.parametrize("options", [{}, {"clip_norm": 1.0, "kl_annealing": 6}], ids=["plain", "clipped, annealed"])
@pytest.mark.parametrize("programs", [dense, horseshoe, rank1])
def test_no_step_waits(programs: Any, options: Any) -> None:
    """Proves that three times as many steps of an epoch wait no more often."""
    assert waits_of(programs, 12, **options) == waits_of(programs, 4, **options)


def test_who_asks_for_the_loss_waits() -> None:
    """A log of every second step, a callback after each, and a limit of unread losses."""
    alone = waits_of(dense, 12)

    class Listens:
        def after_step(self, state: Any) -> None:
            assert len(state.losses) == state.step and state.loss == state.losses[-1]

    assert waits_of(dense, 12, log=lambda *_: None, log_every=2) == alone + 5  # the last is read in any case
    assert waits_of(dense, 12, callbacks=[Listens()]) == alone + 10
    with patch.object(run_file, "READ_AFTER", 3):
        assert waits_of(dense, 12) == alone + 3


def test_losses_are_those_of_the_processor() -> None:
    found = []
    for device in ("cpu", DEVICE):
        with PretendDevice():
            model = Dense(net().to(device), Categorical(), 48)
            run = fit(model, MeanFieldGuide(model), data(48), epochs=2, batch_size=BATCH, progress=False, seed=0)
        found.append(run.losses)
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_a_divergence_is_found_later_and_told_where_it_was() -> None:
    """The first step whose loss is not finite, the step at which that was read, and the state before the epoch."""
    kept: list[Tensor] = []

    def spoil(state: Any) -> None:
        if state.epoch == 1:
            kept.extend(p.detach().clone() for p in state.guide.parameters())
            for group in state.optimizer.param_groups:
                group["lr"] = 1e30

    with PretendDevice():
        model, guide = dense(48)
        said = r"the loss became (nan|inf) at step \d+ \(epoch 2\), and was read at step 12\. .*end of epoch 1"
        with pytest.raises(FloatingPointError, match=said):
            fit(model, guide, data(48), epochs=3, batch_size=BATCH, progress=False, seed=0, callbacks=[spoil])
        for own, before in zip(guide.parameters(), kept, strict=True):
            assert torch.equal(own.detach(), before)
