"""Whether a training run has come to rest: a verdict on its loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.stats

#: blocks into which the second half of training is cut, whose means are nearly independent
BLOCKS = 20
#: fewest steps with which something can be said: ten in each block
FEWEST = 2 * BLOCKS * 10
#: share of the whole decrease of the loss that still to come is worth going on for
WORTH = 0.01
LEVEL = 0.01


@dataclass(frozen=True)
class LossVerdict:
    """What the loss does in the second half of training.

    :param state: ``"converged"``; ``"falling"`` or ``"rising"``, by more than 1 % of the whole decrease over that half
        and more than its noise explains; ``"diverged"``, with a loss that is not finite at the end or
        in a whole block of the second half; or ``"unknown"``, with fewer than 400 steps.
    :param change: what the loss changes by over the second half, by the line through the means of 20 blocks, in nats
        per datum.
    :param standard_error: of the change.
    :param level: mean of the last block, in nats per datum.
    """

    state: Literal["converged", "falling", "rising", "diverged", "unknown"]
    change: float
    standard_error: float
    level: float


def loss_verdict(losses: Sequence[float]) -> LossVerdict:
    """The verdict on the losses of all training steps, in the order of training.

    The means of 20 blocks of the second half are regressed on time; the change is real when the slope differs from zero
    at the level of 1 % (t-test with 18 degrees of freedom), and matters when it is more than 1 % of the decrease of
    the loss, from the 90 % quantile of 40 blocks of all steps, which a few bad steps at the start do not move, to the
    best of them.

    :param losses: negative ELBO per datum in nats, one for each step, as in ``posterior.losses``.
    :raises ValueError: when there are none: a posterior of a sampler has no losses.
    """
    values = np.asarray(losses, dtype=float)
    if values.ndim != 1 or not values.size:
        raise ValueError("there are no losses: the posterior is of a sampler, or was not made by fit()")
    finite = np.isfinite(values)
    if not finite[-1]:
        return LossVerdict("diverged", math.nan, math.nan, float(values[-1]))
    if values.size < FEWEST:
        return LossVerdict("unknown", math.nan, math.nan, float(values[finite][-max(1, values.size // 10) :].mean()))
    parts = [block[np.isfinite(block)] for block in np.array_split(values, 2 * BLOCKS)]
    if any(not part.size for part in parts[BLOCKS:]):
        return LossVerdict("diverged", math.nan, math.nan, float(parts[-1].mean()))
    blocks = np.array([part.mean() for part in parts if part.size])
    late = blocks[-BLOCKS:]
    line = scipy.stats.linregress(np.linspace(0, 1, BLOCKS), late)
    fallen = np.quantile(blocks, 0.9) - blocks.min()
    state: Literal["converged", "falling", "rising"] = "converged"
    if line.pvalue < LEVEL and abs(line.slope) > WORTH * fallen:
        state = "falling" if line.slope < 0 else "rising"
    return LossVerdict(state, float(line.slope), float(line.stderr), float(late[-1]))
