"""What a training run calls while it goes on, and the state that it is called with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch.optim import Optimizer

from pyro_bnn import display
from pyro_bnn.inference.training.run import Stateful, TrainingRun
from pyro_bnn.program.sites import Program


@dataclass
class FitState:
    """The state of training that callbacks get.

    :param epoch: number of completed epochs, including those before an interruption.
    :param step: number of completed steps.
    :param loss: mean loss per datum of this epoch, or after a step that of the step, in nats: the negative ELBO of
        ``fit``, the energy of ``SVGD``.
    :param losses: those of every step so far.
    :param validation: NLL of the predictions for ``validation=`` after this epoch, in nats per datum; ``None`` without
        such data, and after a step.
    """

    epoch: int
    step: int
    loss: float
    model: Program
    guide: Program
    optimizer: Optimizer
    losses: list[float] = field(default_factory=list)
    validation: float | None = None

    def __repr__(self) -> str:
        programs = {"model": display.name_of(self.model), "guide": display.name_of(self.guide)}
        own = {} if self.validation is None else {"validation": self.validation}
        return display.call(self, epoch=self.epoch, step=self.step, loss=self.loss, **own, **programs)


class Callback:
    """A base class for callbacks that are more than a function.

    A function is called after each epoch. An object may define :meth:`after_epoch` and :meth:`after_step`, and with
    ``state_dict`` and ``load_state_dict`` what it holds becomes part of checkpoints. Whatever returns ``True`` ends the
    training.
    """

    def __repr__(self) -> str:
        return display.call(self)

    def after_epoch(self, state: FitState) -> bool | None:
        """Called after each epoch, when validation is done and before the checkpoint is written."""
        return None

    def after_step(self, state: FitState) -> bool | None:
        """Called after each step of the optimiser. It costs time at each step, as the loss of a GPU is waited for."""
        return None


#: what ``callbacks=`` takes
AnyCallback = Callable[[FitState], bool | None] | Callback


class Callbacks:
    """All callbacks of a run.

    :raises TypeError: for what is neither a function nor an object with ``after_epoch`` or ``after_step``.
    """

    def __init__(self, given: Iterable[AnyCallback]) -> None:
        expected = f"callbacks={given!r}: expected a list of functions"
        if not isinstance(given, Iterable) or isinstance(given, str):
            raise TypeError(f"{expected}, not {type(given).__name__}")
        #: as a list
        self.given = list(given)
        self._after_epoch: list[Callable[[FitState], object]] = []
        self._after_step: list[Callable[[FitState], object]] = []
        self._stateful: list[Stateful] = []
        for one in self.given:
            epoch = getattr(one, "after_epoch", one if callable(one) else None)
            step = getattr(one, "after_step", None)
            if epoch is None and step is None:
                raise TypeError(
                    f"{expected} or objects with after_epoch(state) or after_step(state); {one!r} cannot be called"
                )
            if epoch is not None:
                self._after_epoch.append(epoch)
            if step is not None and getattr(type(one), "after_step", None) is not Callback.after_step:
                self._after_step.append(step)
            if isinstance(one, Stateful):
                self._stateful.append(one)

    def parts(self) -> dict[str, Stateful]:
        """Those with a state, by a name for checkpoints."""
        return {f"callback {i}, a {type(one).__name__}": one for i, one in enumerate(self._stateful)}

    def after_epoch(self, run: TrainingRun, loss: float, validation: float | None) -> bool:
        """Calls those of an epoch; whether one ends the training."""
        return self._call(self._after_epoch, run, loss, validation)

    def after_step(self, run: TrainingRun) -> bool:
        """Calls those of a step; whether one ends the training."""
        return bool(self._after_step) and self._call(self._after_step, run, run.losses[-1], None)

    @staticmethod
    def _call(
        functions: list[Callable[[FitState], object]], run: TrainingRun, loss: float, validation: float | None
    ) -> bool:
        state = FitState(run.epoch, run.step, loss, run.model, run.guide, run.optimizer, run.losses, validation)
        ends = [bool(function(state)) for function in functions]  # all are called, whatever the first says
        return any(ends)
