"""The state of a training run: in memory, to recover from divergence, and in a checkpoint, to resume."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyro_bnn.distributed import ALONE, Processes
from pyro_bnn.inference.batches import Minibatches
from pyro_bnn.inference.checkpoint import CheckpointFile
from pyro_bnn.inference.settings import differences
from pyro_bnn.program.factorised import split
from pyro_bnn.program.guide import MixtureGuide
from pyro_bnn.program.model import BayesianNetwork
from pyro_bnn.program.module import ProgramModule
from pyro_bnn.program.sites import Program
from pyro_bnn.randomness import random_states, set_random_states

#: steps after which the losses of a device are read, to see whether they are finite
READ_AFTER = 100


@runtime_checkable
class Stateful(Protocol):
    """What a checkpoint holds the state of, besides parameters and buffers: a callback, a scaler."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> object: ...


class Best(NamedTuple):
    """The state with the least NLL on validation data.

    :param nll: in nats per datum.
    :param epoch: after which it was reached.
    :param values: of parameters and buffers.
    """

    nll: float
    epoch: int
    values: list[Tensor]


class TrainingRun:
    """Everything that changes during training.

    :param parameters: all parameters that the optimiser updates.
    :param step: number of steps before this run.
    :param settings: the settings of the run, see :func:`~pyro_bnn.inference.settings.settings_of`. A checkpoint with
        other settings is refused.
    :param together: the processes that train.
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
        together: Processes = ALONE,
    ) -> None:
        self.model, self.guide = model, guide
        self.parameters, self.optimizer, self.scheduler = list(parameters), optimizer, scheduler
        self.buffers = [b for program in (model, guide) if isinstance(program, nn.Module) for b in program.buffers()]
        self._names = self._find_names()  # now: a buffer that is replaced while codes merge is another tensor then
        self.epoch, self.step = 0, step
        #: batches of the epoch that has begun which are done, and steps before it
        self.batch, self.steps_before_epoch = 0, 0
        self.together = together
        self.settings = {**settings, "processes": str(together.size)}
        self._losses: list[float] = []
        self._unread: list[Tensor] = []
        self.best: Best | None = None
        #: what else a checkpoint holds, by name
        self.parts: dict[str, Stateful] = {}
        self._random_before_epoch: list[Tensor] = []
        # A buffer may hold what is infinite by design, as a causal mask does: judged are the numbers that were finite.
        self._judged = [torch.isfinite(b) for b in self.buffers]
        self._good: list[Tensor] = []
        self.remembered_epoch, self.remembered_step = 0, step

    @property
    def device(self) -> torch.device:
        return self.parameters[0].device if self.parameters else torch.device("cpu")

    @property
    def losses(self) -> list[float]:
        """The loss of each step, in nats per datum. Reading it waits for the device, once for all steps since.

        :raises FloatingPointError: when one of them is not finite, with the number of its step.
        """
        if self._unread:
            self._losses += torch.stack(self._unread).tolist()
            number = len(self._unread)
            self._unread.clear()
            for i, value in enumerate(self._losses[-number:], 1 - number):
                if not math.isfinite(value):
                    raise FloatingPointError(
                        f"the loss became {value} at step {self.step + i} (epoch {self.epoch + 1}), and was read at "
                        f"step {self.step}. A smaller lr or clip_norm= usually helps"
                    )
        return self._losses

    def add_loss(self, loss: Tensor | float) -> None:
        """Counts a step; a loss on a device is read later, at the latest after so many steps as a check can wait."""
        self.step += 1
        if not isinstance(loss, Tensor):
            self._losses.append(loss)
            return
        self._unread.append(loss)
        if len(self._unread) >= READ_AFTER:
            _ = self.losses

    @property
    def waits(self) -> bool:
        """Whether a step may wait for its loss: on a processor, among several processes, and at the first step."""
        return self.device.type == "cpu" or self.together.are_several or self.step == 0

    def rest_of_epoch(self, batches: Minibatches, together: int) -> Iterator[list[tuple[Any, ...]]]:
        """The batches of this epoch that are still to come, in lists of so many; ``batch`` counts what was given.

        Of an epoch in which the run was interrupted, the same order comes again, and then the random numbers go on.
        """
        if self.together.are_several and not self.batch and not batches.divided:
            torch.manual_seed(self.together.common_seed())  # all have the same batches
        now = self._random_states()
        if self.batch:
            self._set_random_states(self._random_before_epoch)
        else:
            self._random_before_epoch, self.steps_before_epoch = now, len(self.losses)
        rows = batches.rows()
        if self.batch:
            for _ in itertools.islice(rows, self.batch):
                pass
            self._set_random_states(now)
        each = (batches.take(*row) for row in rows)
        while part := list(itertools.islice(each, together)):
            self.batch += len(part)
            yield part

    def end_epoch(self) -> float:
        """Counts an epoch, and gives the mean loss of its steps; statistics are averaged over processes."""
        self._average_statistics()
        own = self.losses[self.steps_before_epoch :]
        self.epoch, self.batch = self.epoch + 1, 0
        return sum(own) / len(own)

    def _average_statistics(self) -> None:
        """Of normalisation layers, which every process gathers from its rows."""
        moving = self.model.moving_layers().values() if isinstance(self.model, BayesianNetwork) else ()
        buffers = {id(b): b for layer in moving for b in layer.buffers() if b.is_floating_point()}
        with torch.no_grad():
            for buffer in buffers.values() if self.together.are_several else ():
                self.together.sum_(buffer)
                buffer /= self.together.size

    def validate(self, nll: float) -> None:
        """Takes the NLL on validation data after an epoch, and keeps the state where it is the least."""
        if self.best is None or nll < self.best.nll:
            self.best = Best(nll, self.epoch, self._values())

    def take_best(self) -> None:
        """Sets parameters and buffers to the best state on validation data, where there is one."""
        if self.best is not None:
            self._set(self.best.values)

    def remember(self) -> None:
        """Keeps this state as the last good one."""
        self._good = self._values()
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
        self._set(self._good)
        self.optimizer.state.clear()

    def write(self, file: CheckpointFile) -> None:
        """Writes the state to a file, completely or not at all; of several processes the first does.

        :raises OSError: when the file cannot be written; an existing file then stays unchanged.
        """
        randoms = self.together.gather((self._random_states(), self._random_before_epoch))
        if not self.together.is_first:
            return
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        for name, state in parts.items():
            require_plain(state, f"the state of the {name}")
        try:
            file.write(
                {
                    "epoch": self.epoch,
                    "step": self.step,
                    "batch": self.batch,
                    "steps_before_epoch": self.steps_before_epoch,
                    "random": [now for now, _ in randoms],
                    "random_before_epoch": [before for _, before in randoms],
                    "losses": self.losses,
                    "best": None if self.best is None else tuple(self.best),
                    "values": [v.detach() for v in (*self.parameters, *self.buffers)],
                    "names": self._names,
                    "settings": self.settings,
                    "optimizer": self.optimizer.state_dict(),
                    "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
                    "parts": parts,
                }
            )
        except OSError as error:
            error.add_note(
                f"Model and guide hold what training found in {self.epoch} epochs, and the checkpoint is the last one "
                "that could be written: make room, or choose another path, and train on"
            )
            raise

    def resume(self, file: CheckpointFile, epochs: int | None = None) -> None:
        """Takes the state from a file, where there is one.

        :param epochs: that the run is to have in all; at least those that the checkpoint has.
        :raises ValueError: when the file is no checkpoint of this run, or is damaged; see
            :func:`~pyro_bnn.inference.checkpoint.read`. The message names what differs.
        :raises FloatingPointError: when it holds NaN or infinite numbers; nothing has changed then.
        """
        state, path = file.read(), file.path
        if state is None:
            return
        try:
            self._require_same(state, path, epochs)
            self._take(state)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"{path} is a damaged checkpoint ({type(error).__name__}: {error}); remove it to start afresh"
            ) from error

    def _require_same(self, state: Mapping[str, Any], path: Path, epochs: int | None) -> None:
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
        if sorted(state.get("parts", self.parts)) != sorted(self.parts):
            raise ValueError(
                f"{path} is the checkpoint of a run with other callbacks: it holds the state of "
                f"{', '.join(state['parts']) or 'none'}, and this run has {', '.join(self.parts) or 'none'}. Use the "
                "same to resume it, or remove it to start afresh"
            )
        wrong = self.not_finite(saved)
        if wrong is not None:
            raise FloatingPointError(
                f"{path} is the checkpoint of a run that diverged: {wrong} is not finite in it. Remove it, and start "
                "afresh with a smaller lr or clip_norm="
            )

    def _take(self, state: Mapping[str, Any]) -> None:
        self._set(state["values"])
        self.epoch, self.step, self._losses = state["epoch"], state["step"], list(state["losses"])
        self.batch, self.steps_before_epoch = state.get("batch", 0), state.get("steps_before_epoch", 0)
        best = state.get("best")
        self.best = None if best is None else Best(*best)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None and state["scheduler"] is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        for name, own in state.get("parts", {}).items():  # a version that wrote after epochs alone had none
            self.parts[name].load_state_dict(own)
        if "cuda_random" in state:  # of a version that wrote after epochs alone
            self._set_random_states([state["random"], *state["cuda_random"]])
        else:
            self._set_random_states(state["random"][self.together.rank])
            self._random_before_epoch = list(state["random_before_epoch"][self.together.rank])

    def _values(self) -> list[Tensor]:
        return [v.detach().clone() for v in (*self.parameters, *self.buffers)]

    def _set(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for value, saved in zip([*self.parameters, *self.buffers], values, strict=True):
                value.copy_(saved)
        self._follow()

    def _random_states(self) -> list[Tensor]:
        return random_states(self.device)

    def _set_random_states(self, states: Sequence[Tensor]) -> None:
        set_random_states(self.device, states)

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


def require_plain(state: object, what: str) -> None:
    """Refuses what a checkpoint could be written with and not be read from again.

    :raises TypeError: for anything but tensors, numbers, strings, ``None`` and containers of these.
    """
    if isinstance(state, Mapping):
        for key, value in state.items():
            require_plain(key, what)
            require_plain(value, what)
    elif isinstance(state, (list, tuple, set)):
        for value in state:
            require_plain(value, what)
    elif not isinstance(state, Tensor) and type(state) not in (bool, int, float, complex, str, bytes, type(None)):
        raise TypeError(
            f"{what} holds a {type(state).__name__}: expected tensors, numbers, strings and containers of them, as "
            "state_dict() returns them, so that a checkpoint can be read again"
        )
