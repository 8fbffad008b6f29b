"""The state of a training run: in memory, where a run that diverges goes back to it, and on disk, to resume from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyro_bnn.files import replacing
from pyro_bnn.sites import Program

VERSION = 1


class TrainingRun:
    """Everything that changes during training.

    :param parameters: all that the optimiser moves.
    :param step: steps that were taken before this run.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        parameters: Sequence[Tensor],
        optimizer: Optimizer,
        scheduler: LRScheduler | None = None,
        step: int = 0,
    ) -> None:
        self.model, self.guide = model, guide
        self.parameters, self.optimizer, self.scheduler = list(parameters), optimizer, scheduler
        self.buffers = [b for program in (model, guide) if isinstance(program, nn.Module) for b in program.buffers()]
        self.epoch, self.step = 0, step
        self.losses: list[float] = []
        self._good: list[Tensor] = []
        self.remembered_epoch, self.remembered_step = 0, step

    def remember(self) -> None:
        """Keeps this state as the last good one, if it is."""
        values = [*self.parameters, *self.buffers]
        if all(bool(torch.isfinite(v).all()) for v in values):
            self._good = [v.detach().clone() for v in values]
            self.remembered_epoch, self.remembered_step = self.epoch, self.step

    def restore(self) -> None:
        """Puts parameters and buffers back to the last good state. The optimiser forgets the steps that went wrong."""
        with torch.no_grad():
            for value, good in zip([*self.parameters, *self.buffers], self._good, strict=True):
                value.copy_(good)
        self.optimizer.state.clear()

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the state to a file, which appears whole or not at all."""
        write(
            path,
            {
                "epoch": self.epoch,
                "step": self.step,
                "losses": self.losses,
                "values": [v.detach() for v in (*self.parameters, *self.buffers)],
                "optimizer": self.optimizer.state_dict(),
                "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
                "random": torch.get_rng_state(),
                "cuda_random": [torch.cuda.get_rng_state(device) for device in self._cuda_devices()],
            },
        )

    def resume(self, path: str | os.PathLike[str]) -> None:
        """Takes the state from a file, where there is one.

        :raises ValueError: when the file is no checkpoint of this model and guide; see :func:`read`.
        """
        state = read(path)
        if state is None:
            return
        values = [*self.parameters, *self.buffers]
        if [v.shape for v in values] != [v.shape for v in state["values"]]:
            raise ValueError(
                f"{path} is the checkpoint of another model or guide (its tensors have other shapes); remove it to "
                "start afresh"
            )
        with torch.no_grad():
            for value, saved in zip(values, state["values"], strict=True):
                value.copy_(saved)
        self.epoch, self.step, self.losses = state["epoch"], state["step"], list(state["losses"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None and state["scheduler"] is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["random"])
        for device, saved in zip(self._cuda_devices(), state["cuda_random"], strict=True):
            torch.cuda.set_rng_state(saved, device)

    def _cuda_devices(self) -> list[torch.device]:
        return sorted({p.device for p in self.parameters if p.is_cuda}, key=str)


def write(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Writes tensors, numbers, strings and containers of them; the file appears whole or not at all."""
    with replacing(Path(path)) as temporary:
        torch.save({"format": "pyro_bnn checkpoint", "version": VERSION, **state}, temporary)


def read(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What :func:`write` wrote, on the CPU; ``None`` when there is no file.

    :raises ValueError: when the file is damaged, no checkpoint, or of a newer version.
    """
    if not Path(path).exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is not a readable checkpoint ({error}); remove it to start afresh") from error
    if not isinstance(state, dict) or state.get("format") != "pyro_bnn checkpoint":
        raise ValueError(f"{path} is not a pyro_bnn checkpoint; choose another path or remove it")
    if state["version"] > VERSION:
        raise ValueError(f"{path} was written by a newer pyro_bnn (checkpoint version {state['version']})")
    return state
