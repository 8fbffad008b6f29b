"""Whether a training run has converged, judged by its loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.stats

#: number of blocks into which the second half of training is cut; their means are nearly independent
BLOCKS = 20
#: fewest steps for a verdict: ten in each block
FEWEST = 2 * BLOCKS * 10
#: change of the loss, as a share of its total decrease, that matters
WORTH = 0.01
#: significance level of Kendall's tau
LEVEL = 0.01
#: share of the largest and of the smallest losses of a block that its trimmed mean leaves out
TRIMMED = 0.1
#: robust standard deviations by which a block at the end must lie above the others to count as a rise
FAR = 8.0


@dataclass(frozen=True)
class LossVerdict:
    """What the loss does in the second half of training.

    :param state: ``"converged"``; ``"falling"`` or ``"rising"`` if the change over that half is significant and exceeds
        1 % of the total decrease, or if the loss jumps up at the very end (``"rising"``); ``"diverged"`` if the last
        loss or a whole block of the second half is not finite; ``"unknown"`` for fewer than 400 steps.
    :param change: change of the loss over the second half, by a Theil-Sen line through 20 blocks, in nats per datum;
        NaN if the state is ``"diverged"`` or ``"unknown"``.
    :param standard_error: standard error of the change, from its 95 % interval.
    :param level: trimmed mean of the last block, in nats per datum.
    """

    state: Literal["converged", "falling", "rising", "diverged", "unknown"]
    change: float
    standard_error: float
    level: float


def loss_verdict(losses: Sequence[float]) -> LossVerdict:
    """Whether the loss has converged, judged by the losses of all training steps in order.

    The second half of training is cut into 20 blocks. The mean of each block leaves out the largest and the smallest
    tenth of its losses. The change over the second half is significant if Kendall's tau of blocks and time differs from
    zero at the 1 % level. It matters if the Theil-Sen slope exceeds 1 % of the decrease of the loss, which is measured
    from the 90 % quantile of 40 blocks over all steps to the smallest of them. None of these depends much on a few bad
    steps or blocks. A loss that jumps up at the end also counts as rising: one of the last two blocks then exceeds the
    median block by 8 robust standard deviations (from the median absolute deviation) and by 1 % of the decrease.

    :param losses: negative ELBO per datum in nats, one for each step, as in ``posterior.losses``.
    :returns: the state of the loss (``state``), its ``change`` over the second half with a ``standard_error``, and its
        final ``level``; all but the state are in nats per datum.
    :raises ValueError: when there are no losses, as for the posterior of a sampler.
    """
    values = np.asarray(losses, dtype=float)
    if values.ndim != 1 or not values.size:
        raise ValueError("losses is empty: the posterior comes from a sampler, or was not made by fit()")
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
