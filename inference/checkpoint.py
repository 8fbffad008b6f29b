"""The state of a training run: in memory, to recover from divergence, and on disk, to resume after an interruption."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyro_bnn.files import replacing
from pyro_bnn.inference.settings import differences
from pyro_bnn.program.factorised import split
from pyro_bnn.program.guide import MixtureGuide
from pyro_bnn.program.module import ProgramModule
from pyro_bnn.program.sites import Program

VERSION = 2
#: what stands behind the content: a digest of all before it, which readers of the content do not see
_TRAILER, _LENGTH = b"\nsha256 ", 73


class TrainingRun:
    """Everything that changes during training.

    :param parameters: all parameters that the optimiser updates.
    :param step: number of steps before this run.
    :param settings: the settings of the run, see :func:`~pyro_bnn.inference.settings.settings_of`. A checkpoint with
        other settings is refused.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        parameters: Sequence[Tensor],
        optimizer: Optimizer,
        scheduler: LRScheduler | None = None,
        step: int = 0,
        settings: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.model, self.guide = model, guide
        self.parameters, self.optimizer, self.scheduler = list(parameters), optimizer, scheduler
        self.buffers = [b for program in (model, guide) if isinstance(program, nn.Module) for b in program.buffers()]
        self._names = self._find_names()  # now: a buffer that is replaced while codes merge is another tensor then
        self.epoch, self.step = 0, step
        self.settings = dict(settings)
        self.losses: list[float] = []
        # A buffer may hold what is infinite by design, as a causal mask does: judged are the numbers that were finite.
        self._judged = [torch.isfinite(b) for b in self.buffers]
        self._good: list[Tensor] = []
        self.remembered_epoch, self.remembered_step = 0, step

    def remember(self) -> None:
        """Keeps this state as the last good one."""
        self._good = [v.detach().clone() for v in (*self.parameters, *self.buffers)]
        self.remembered_epoch, self.remembered_step = self.epoch, self.step

    def not_finite(self, values: Sequence[Tensor] | None = None) -> str | None:
        """What holds NaN or infinite numbers that it did not start with, by name; ``None`` when nothing does.

        :param values: of parameters and buffers, in the place of those of now.
        """
        held = [*self.parameters, *self.buffers]
        judged: list[Tensor | None] = [*[None] * len(self.parameters), *self._judged]
        for own, value, mask in zip(held, held if values is None else values, judged, strict=True):
            finite = torch.isfinite(value)
            if not bool((finite if mask is None else finite | ~mask.to(finite.device)).all()):
                return self._name(own, value)
        return None

    def _name(self, own: Tensor, value: Tensor) -> str:
        """What a parameter or buffer is called: by a site, where it is the block of a guide that holds several."""
        if isinstance(self.guide, MixtureGuide):
            for block in self.guide.blocks():
                if block.parameter is own:
                    parts = split(value, [site.shape for site in block.sites])
                    wrong = (
                        s.name for s, p in zip(block.sites, parts, strict=True) if not bool(torch.isfinite(p).all())
                    )
                    return f"the site {next(wrong)!r}"
        for program, what in ((self.guide, "guide"), (self.model, "model")):
            if isinstance(program, nn.Module):
                for name, held in [*program.named_parameters(), *program.named_buffers()]:
                    if held is own:
                        return f"{name!r} of the {what}"
        return "a parameter of Pyro's store"

    def restore(self) -> None:
        """Restores parameters and buffers to the last good state. The state of the optimiser is cleared."""
        with torch.no_grad():
            for value, good in zip([*self.parameters, *self.buffers], self._good, strict=True):
                value.copy_(good)
        self._follow()
        self.optimizer.state.clear()

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the state to a file, completely or not at all.

        :raises OSError: when the file cannot be written; an existing file then stays unchanged.
        """
        try:
            write(
                path,
                {
                    "epoch": self.epoch,
                    "step": self.step,
                    "losses": self.losses,
                    "values": [v.detach() for v in (*self.parameters, *self.buffers)],
                    "names": self._names,
                    "settings": self.settings,
                    "optimizer": self.optimizer.state_dict(),
                    "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
                    "random": torch.get_rng_state(),
                    "cuda_random": [torch.cuda.get_rng_state(device) for device in self._cuda_devices()],
                },
            )
        except OSError as error:
            error.add_note(
                f"Model and guide hold what training found in {self.epoch} epochs, and the checkpoint is the last one "
                "that could be written: make room, or choose another path, and train on"
            )
            raise

    def resume(self, path: str | os.PathLike[str], epochs: int | None = None) -> None:
        """Takes the state from a file, where there is one.

        :param epochs: that the run is to have in all; at least those that the checkpoint has.
        :raises ValueError: when the file is no checkpoint of this run, or is damaged; see :func:`read`. The message
            names what differs.
        :raises FloatingPointError: when it holds NaN or infinite numbers; nothing has changed then.
        """
        state = read(path)
        if state is None:
            return
        try:
            self._require_same(state, path, epochs)
            self._take(state)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"{path} is a damaged checkpoint ({type(error).__name__}: {error}); remove it to start afresh"
            ) from error

    def _require_same(self, state: Mapping[str, Any], path: str | os.PathLike[str], epochs: int | None) -> None:
        values, saved = [*self.parameters, *self.buffers], state["values"]
        own = [(name, v.dtype, v.shape) for name, v in zip(self._names, values, strict=True)]
        names = state.get("names", self._names)
        if own != [(name, v.dtype, v.shape) for name, v in zip(names, saved, strict=False)] or len(own) != len(saved):
            raise ValueError(
                f"{path} is the checkpoint of another model or guide (its tensors have other names, shapes or dtypes); "
                "remove it to start afresh"
            )
        if differ := differences(state.get("settings", self.settings), self.settings):
            raise ValueError(
                f"{path} is the checkpoint of a run with other settings: {'; '.join(differ)}. Use the same settings to "
                "resume it, or remove it to start afresh"
            )
        groups = zip(state["optimizer"]["param_groups"], self.optimizer.param_groups, strict=False)
        if unknown := [name for before, now in groups for name in before if name not in now and name != "initial_lr"]:
            raise ValueError(
                f"{path} is the checkpoint of a run with another optimiser, which had {unknown[0]!r}. Use the same to "
                "resume it, or remove it to start afresh"
            )
        if epochs is not None and "settings" in state and epochs < state["epoch"]:
            raise ValueError(
                f"{path} is the checkpoint of a run that has {state['epoch']} epochs, and epochs={epochs} is fewer: "
                "give as many or more, or remove it to start afresh"
            )
        wrong = self.not_finite(saved)
        if wrong is not None:
            raise FloatingPointError(
                f"{path} is the checkpoint of a run that diverged: {wrong} is not finite in it. Remove it, and start "
                "afresh with a smaller lr or clip_norm="
            )

    def _take(self, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            for value, saved in zip([*self.parameters, *self.buffers], state["values"], strict=True):
                value.copy_(saved)
        self._follow()
        self.epoch, self.step, self.losses = state["epoch"], state["step"], list(state["losses"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None and state["scheduler"] is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["random"])
        for device, saved in zip(self._cuda_devices(), state["cuda_random"], strict=True):
            torch.cuda.set_rng_state(saved, device)

    def _follow(self) -> None:
        for program in (self.model, self.guide):
            if isinstance(program, ProgramModule):
                program.state_was_set()

    def _find_names(self) -> list[str]:
        """Of parameters and buffers; those that only Pyro's store knows have none."""
        known: dict[int, str] = {}
        for program, of in ((self.model, "model"), (self.guide, "guide")):
            if isinstance(program, nn.Module):
                for name, value in [*program.named_parameters(), *program.named_buffers()]:
                    known.setdefault(id(value), f"{of}.{name}")
        return [known.get(id(value), "") for value in (*self.parameters, *self.buffers)]

    def _cuda_devices(self) -> list[torch.device]:
        return sorted({p.device for p in self.parameters if p.is_cuda}, key=str)


def write(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Writes tensors, numbers, strings and containers of them; the file appears whole or not at all.

    :raises OSError: when the disk refuses it.
    """
    with replacing(Path(path)) as temporary:
        try:
            with temporary.open("wb") as file:
                torch.save({"format": "pyro_bnn checkpoint", "version": VERSION, **state}, file)
        except RuntimeError as error:  # torch stumbles over what a full disk left out
            cause = error.__context__
            raise OSError(*(cause.args if isinstance(cause, OSError) else (str(error),))) from error
        with temporary.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        with temporary.open("ab") as file:
            file.write(_TRAILER + digest.encode() + b"\n")


def read(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What :func:`write` wrote, on the CPU; ``None`` when there is no file.

    :raises ValueError: when the file is damaged, no checkpoint, or of a newer version.
    """
    path = Path(path)
    if not path.exists():
        return None
    is_sealed = _require_digest(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is not a readable checkpoint ({error}); remove it to start afresh") from error
    if not isinstance(state, dict) or state.get("format") != "pyro_bnn checkpoint":
        raise ValueError(f"{path} is not a pyro_bnn checkpoint; choose another path or remove it")
    version = state.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise ValueError(f"{path} was written by a newer pyro_bnn (checkpoint version {version})")
    if version > 1 and not is_sealed:
        raise ValueError(f"{path} is a damaged checkpoint (its digest is missing); remove it to start afresh")
    return state


def _require_digest(path: Path) -> bool:
    """Whether the file has a digest, which is then right; the first version had none.

    :raises ValueError: when it is wrong.
    """
    length = path.stat().st_size - _LENGTH
    with path.open("rb") as file:
        file.seek(max(0, length))
        trailer = file.read()
        if not trailer.startswith(_TRAILER):
            return False
        file.seek(0)
        found = hashlib.sha256()
        while length > 0 and (part := file.read(min(length, 2**20))):
            found.update(part)
            length -= len(part)
    if trailer != _TRAILER + found.hexdigest().encode() + b"\n":
        raise ValueError(f"{path} is a damaged checkpoint (its digest is another); remove it to start afresh")
    return True
