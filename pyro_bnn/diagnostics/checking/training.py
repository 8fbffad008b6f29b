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
#: share of the steps of a block, the largest and the smallest, that its mean leaves out
TRIMMED = 0.1
#: median absolute deviations (as standard deviations) by which a block at the end must lie above the others to count
FAR = 8.0


@dataclass(frozen=True)
class LossVerdict:
    """What the loss does in the second half of training.

    :param state: ``"converged"``; ``"falling"`` or ``"rising"``, by more than 1 % of the whole decrease over that half
        and more than its noise explains, or ``"rising"`` at the very end; ``"diverged"``, with a loss that is not
        finite at the end or in a whole block of the second half; or ``"unknown"``, with fewer than 400 steps.
    :param change: what the loss changes by over the second half, by the Theil-Sen line through 20 blocks, in nats per
        datum.
    :param standard_error: of the change, from its 95 % interval.
    :param level: mean of the last block, in nats per datum.
    """

    state: Literal["converged", "falling", "rising", "diverged", "unknown"]
    change: float
    standard_error: float
    level: float


def loss_verdict(losses: Sequence[float]) -> LossVerdict:
    """The verdict on the losses of all training steps, in the order of training.

    The second half is cut into 20 blocks, each with the mean of its steps but for the tenth that is largest and the
    tenth that is smallest. The change is real when Kendall's tau of blocks and time differs from zero at the level of
    1 %, and matters when the slope of Theil and Sen is more than 1 % of the decrease of the loss, from the 90 %
    quantile of 40 blocks of all steps to the least of them; a few bad steps or blocks move none of these. One of the
    last two blocks that lies far above the others (by 8 standard deviations, from their median absolute deviation, and
    by 1 % of the decrease) is a rise as well: a run that blew up at its end.

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
    blocks = np.array([scipy.stats.trim_mean(part, TRIMMED) for part in parts if part.size])
    late, time = blocks[-BLOCKS:], (np.arange(BLOCKS) + 0.5) / BLOCKS
    slope, _, low, high = scipy.stats.theilslopes(late, time)
    worth = WORTH * float(np.quantile(blocks, 0.9) - blocks.min())
    usual = np.median(late)
    spread = scipy.stats.median_abs_deviation(late, scale="normal")
    state: Literal["converged", "falling", "rising"] = "converged"
    if late[-2:].max() - usual > max(FAR * spread, worth):
        state = "rising"
    elif scipy.stats.kendalltau(time, late).pvalue < LEVEL and abs(slope) > worth:
        state = "falling" if slope < 0 else "rising"
    return LossVerdict(state, float(slope), float((high - low) / (2 * 1.96)), float(late[-1]))
