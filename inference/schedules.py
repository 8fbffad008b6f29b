"""Learning-rate schedules for :func:`pyro_bnn.inference.fit`, as functions of the length of training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from pyro_bnn.entry import checks

#: ``(optimizer, steps in an epoch, epochs) -> scheduler``, or a scheduler of the optimiser given as ``optim=``. It is
#: stepped after every step of the optimiser, ``ReduceLROnPlateau`` after every epoch with the NLL on ``validation=``,
#: or the loss without these data.
Schedule = Callable[[Optimizer, int, int], LRScheduler] | LRScheduler


def scheduler_of(schedule: Schedule | None, optimizer: Optimizer, steps: int, epochs: int) -> LRScheduler | None:
    """The scheduler for a training with ``steps`` steps per epoch; ``None`` without a schedule.

    :raises TypeError: when ``schedule`` is not a function, or does not return a scheduler.
    :raises ValueError: for a scheduler of another optimiser.
    """
    if schedule is None:
        return None
    expected = "expected pyro_bnn.inference.cosine(), multistep(...) or a function (optimizer, steps, epochs)"
    if isinstance(schedule, LRScheduler):
        if schedule.optimizer is not optimizer:
            raise ValueError(
                f"schedule= is a {type(schedule).__name__} of another optimiser than the one that trains: give its "
                "optimiser as optim=, or a function (optimizer, steps, epochs) that makes the scheduler"
            )
        return schedule
    if not callable(schedule) or isinstance(schedule, type):
        raise TypeError(f"schedule={schedule!r}: {expected}")
    scheduler = schedule(optimizer, steps, epochs)
    if not hasattr(scheduler, "step"):
        raise TypeError(f"schedule={schedule!r} returned {scheduler!r}: {expected} that returns a scheduler")
    return scheduler


def cosine(warmup: float = 0.0) -> Schedule:
    """Lowers the learning rate to 0 along half a cosine, after a linear warm-up of ``warmup`` epochs.

    :raises ValueError: for a warm-up below 0.
    """
    checks.not_negative("warmup", warmup)

    def build(optimizer: Optimizer, steps: int, epochs: int) -> LRScheduler:
        start, end = warmup * steps, epochs * steps

        def factor(step: int) -> float:
            if step < start:
                return (step + 1) / start
            return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - start) / max(1.0, end - start))))

        return LambdaLR(optimizer, factor)

    return build


def multistep(warmup: float, milestones: Sequence[float], ratio: float) -> Schedule:
    """Multiplies the learning rate by ``ratio`` at every milestone (in epochs), after a linear warm-up.

    :param warmup: length of the warm-up in epochs.

    :raises ValueError: for a warm-up or a milestone below 0, or a ratio that is not positive.
    """
    checks.not_negative("warmup", warmup)
    checks.positive("ratio", ratio)
    if not isinstance(milestones, Sequence) or isinstance(milestones, str):
        raise TypeError(f"milestones={milestones!r}: expected a list of epochs")
    for milestone in milestones:
        checks.not_negative("milestones", milestone)

    def build(optimizer: Optimizer, steps: int, epochs: int) -> LRScheduler:
        def factor(step: int) -> float:
            if step < warmup * steps:
                return (step + 1) / (warmup * steps)
            return ratio ** sum(step >= m * steps for m in milestones)

        return LambdaLR(optimizer, factor)

    return build
