"""The loop of every engine that trains by gradients.

An engine hands :func:`train` a :class:`~pyro_bnn.inference.training.run.TrainingRun` and an :class:`Engine`: how to add
the gradient of a batch. Everything else is here: epochs and steps, accumulation, precision, validation, callbacks,
logs, the progress bar, checkpoints, and the way back from a divergence.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any, Protocol, cast

from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils import _pytree as pytree

from pyro_bnn.inference.batches import Minibatches
from pyro_bnn.inference.checkpoint import Checkpoint, CheckpointFile
from pyro_bnn.inference.progress import Bar, progress_bar
from pyro_bnn.inference.training.callbacks import Callbacks
from pyro_bnn.inference.training.logs import writer_of
from pyro_bnn.inference.training.options import Training
from pyro_bnn.inference.training.precision import Precision
from pyro_bnn.inference.training.requirements import require_rows_for_statistics
from pyro_bnn.inference.training.run import TrainingRun
from pyro_bnn.inference.training.stopping import StopRequest, stop_requests
from pyro_bnn.inference.training.validation import Validation
from pyro_bnn.posterior import Posterior

#: seconds from one text beside the progress bar to the next
_REFRESH = 0.2


class Engine(Protocol):
    """What an engine does with a batch.

    ``label`` stands before the progress bar, and ``describe`` turns a loss into the text after it.
    """

    label: str

    def add_gradient(self, batch: tuple[Any, ...], run: TrainingRun, weight: Tensor | float) -> Tensor | float:
        """Adds ``weight`` times the gradient of the loss, in nats per datum, to ``.grad``; returns the loss.

        A scalar tensor is a loss that was not looked at, so that nothing waits for its device.

        :raises FloatingPointError: when the loss is not finite, with the reason.
        """
        ...

    def direct(self, run: TrainingRun) -> None:
        """Turns the gradient in ``.grad`` into what the optimiser gets, where that is something else."""
        ...

    def describe(self, loss: float) -> str: ...

    def posterior(self) -> Posterior:
        """What has been found so far, for validation."""
        ...


def train(run: TrainingRun, batches: Minibatches, engine: Engine, options: Training, *, epochs: int) -> None:
    """Trains until ``run`` has completed ``epochs`` epochs, starting from the checkpoint if there is one.

    :param options: complete, from :func:`~pyro_bnn.inference.training.options.checked`.
    :raises FloatingPointError: when the loss, a gradient or a parameter is not finite; ``run`` is then back in its last
        good state.
    :raises ValueError: when the checkpoint is damaged, or that of a run with other settings or more epochs.
    :raises OSError: when the checkpoint cannot be written.
    :raises KeyboardInterrupt, SystemExit: after Ctrl-C or SIGTERM, once the checkpoint is written.
    """
    require_rows_for_statistics(run.model, batches)
    _Loop(run, batches, engine, options, epochs).run_all()


class _Loop:
    def __init__(self, run: TrainingRun, batches: Minibatches, engine: Engine, options: Training, epochs: int) -> None:
        self.run, self.batches, self.engine, self.options, self.epochs = run, batches, engine, options, epochs
        self.callbacks = Callbacks(options["callbacks"])
        self.precision = Precision(options["precision"], run.parameters)
        data = options["validation"]
        self.validation = None if data is None else Validation(data, run.model, run.together)
        self.write_log = writer_of(options["log"] if run.together.is_first else None)
        checkpoint = Checkpoint.of(options["checkpoint"])
        self.file = None if checkpoint is None else CheckpointFile(checkpoint)
        run.parts = {**self.callbacks.parts()}
        if self.precision.scaler is not None:
            run.parts["factor of the loss"] = self.precision.scaler
        self.is_over = False
        self._shows = options["progress"] and run.together.is_first
        self._began_at, self._began_with, self._shown_at = time.monotonic(), 0, 0.0

    def run_all(self) -> None:
        run = self.run
        if self.file is not None:
            run.resume(self.file, self.epochs)
        run.remember()
        self._began_at, self._began_with = time.monotonic(), run.step
        self.is_over = self._is_at_the_last_step() or self._has_lost_patience()
        path = None if self.file is None else self.file.path
        with (
            progress_bar(self.engine.label, self.epochs, done=run.epoch, progress=self._shows) as bar,
            stop_requests(path) as stop,
        ):
            while run.epoch < self.epochs and not self.is_over:
                for program in (run.model, run.guide):
                    if isinstance(program, nn.Module):
                        program.train()
                with self._back_after_divergence():
                    is_whole = self._steps_of_epoch(bar, stop)
                    self._require_finite()
                if is_whole:
                    self._end_epoch(bar)
                stops = run.together.any(bool(stop))
                if self.file is not None and (stops or self.is_over or run.together.any(self._is_due_after_epoch())):
                    run.write(self.file)
                stop.obey(run.step)
                if not is_whole:
                    self._validate()
        run.optimizer.zero_grad(set_to_none=True)
        run.take_best()

    # ------------------------------------------------------------------------------------------------- one epoch

    def _steps_of_epoch(self, bar: Bar, stop: StopRequest) -> bool:
        """Makes the steps that are left of an epoch; whether it has come to its end."""
        run, options = self.run, self.options
        for parts in run.rest_of_epoch(self.batches, options["accumulate"]):
            run.add_loss(self._step(parts))
            ends = self.callbacks.after_step(run) or self._is_out_of_time()
            if options["log_every"] is not None and run.step % options["log_every"] == 0:
                self.write_log({"step_loss": run.losses[-1], "learning_rate": self._rate()}, run.step)
            self._show(bar)
            due = self.file is not None and self.file.is_due_after_step(run.step)
            ends, stops, due = (flag > 0 for flag in run.together.total([ends, bool(stop), due]))
            self.is_over = ends or self._is_at_the_last_step()
            if run.batch < self.batches.steps:
                if self.is_over or stops:
                    return False
                if self.file is not None and due:
                    run.write(self.file)
        return True

    def _step(self, parts: list[tuple[Any, ...]]) -> Tensor | float:
        """One update from one batch or several; returns the loss of all their rows."""
        run, precision = self.run, self.precision
        run.optimizer.zero_grad(set_to_none=True)
        factor, loss = precision.factor(), cast(Tensor | float, 0.0)
        for batch, share in zip(parts, self._shares(parts), strict=True):
            with precision.autocast():
                loss += share * self.engine.add_gradient(batch, run, share * factor)
        is_finite = precision.has_gradient(run.optimizer, run.step + 1)
        if is_finite:
            self.engine.direct(run)
            if self.options["clip_norm"] is not None:
                nn.utils.clip_grad_norm_(run.parameters, self.options["clip_norm"])
        precision.update(run.optimizer)  # leaves out what is not finite
        if is_finite and run.scheduler is not None and not isinstance(run.scheduler, ReduceLROnPlateau):
            run.scheduler.step()
        return loss

    def _shares(self, parts: list[tuple[Any, ...]]) -> list[float]:
        """The rows of each batch, in all processes, among those of all batches."""
        if len(parts) == 1:
            return [1.0]
        counts = self.run.together.total([rows_of(batch) for batch in parts])
        return [count / sum(counts) for count in counts]

    def _end_epoch(self, bar: Bar) -> None:
        run = self.run
        loss = run.end_epoch()
        run.remember()
        nll = self._validate()
        if isinstance(run.scheduler, ReduceLROnPlateau):
            run.scheduler.step(loss if nll is None else nll)
        text = self.engine.describe(loss)
        numbers = {"loss": loss, "learning_rate": self._rate(), "steps_per_second": self._steps_per_second()}
        if nll is not None:
            assert run.best is not None
            numbers["validation_nll"] = nll
            text += f", validation NLL {nll:.4f}, least {run.best.nll:.4f} after epoch {run.best.epoch}"
        bar.move(run.epoch, text)
        self.write_log(numbers, run.step)
        self.is_over |= run.together.any(self.callbacks.after_epoch(run, loss, nll)) or self._has_lost_patience()

    def _validate(self) -> float | None:
        if self.validation is None:
            return None
        nll = self.validation.nll(self.engine.posterior())
        self.run.validate(nll)
        return nll

    # --------------------------------------------------------------------------------------------------- the end

    def _is_at_the_last_step(self) -> bool:
        most = self.options["max_steps"]
        return most is not None and self.run.step >= most

    def _is_out_of_time(self) -> bool:
        most = self.options["max_time"]
        return most is not None and time.monotonic() - self._began_at >= most

    def _is_due_after_epoch(self) -> bool:
        run, file = self.run, self.file
        assert file is not None
        return run.epoch == self.epochs or file.is_due_after_epoch(run.epoch) or file.is_due_after_step(run.step)

    def _has_lost_patience(self) -> bool:
        best, patience = self.run.best, self.options["patience"]
        return patience is not None and best is not None and self.run.epoch - best.epoch >= patience

    @contextlib.contextmanager
    def _back_after_divergence(self) -> Iterator[None]:
        """Restores the last good state of a run that diverges inside, and says so."""
        run = self.run
        try:
            yield
        except FloatingPointError as error:
            run.restore()
            where = f"Model and guide are back at the end of epoch {run.remembered_epoch}"
            raise FloatingPointError(f"{error}. {where}") from (error.__cause__ or error)

    def _require_finite(self) -> None:
        _ = self.run.losses
        wrong = self.run.not_finite()
        if wrong is not None:  # the last update, after which no loss was computed
            raise FloatingPointError(f"{wrong} became NaN or infinite at step {self.run.step}. A smaller lr helps")

    # ---------------------------------------------------------------------------------------------- what is shown

    def _rate(self) -> float:
        return float(self.run.optimizer.param_groups[0]["lr"])

    def _steps_per_second(self) -> float:
        return (self.run.step - self._began_with) / max(1e-9, time.monotonic() - self._began_at)

    def _show(self, bar: Bar) -> None:
        now = time.monotonic()
        if not self._shows or now < self._shown_at + _REFRESH:
            return
        self._shown_at = now
        part = min(1.0, self.run.batch / self.batches.steps)
        text = f"batch {self.run.batch}/{self.batches.steps}, {self._steps_per_second():.3g} steps/s"
        bar.move(self.run.epoch + part, f"{self.engine.describe(self.run.losses[-1])}, {text}")


def rows_of(batch: tuple[Any, ...]) -> int:
    """Rows of the last tensor of a batch, which is y."""
    leaves = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()]
    return len(leaves[-1]) if leaves else 1
