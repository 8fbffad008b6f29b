"""Plots of the run that found a posterior: losses, R-hat and ESS, k-hat, ranks of simulation-based calibration."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from pyro_bnn.diagnostics.checking.ranks import SBCResult
from pyro_bnn.diagnostics.checking.training import LossVerdict
from pyro_bnn.diagnostics.plots.canvas import LEVEL, MANY, legend_below, log_if_wide, new_figure, numbers, spread

#: upper limit of R-hat and lower limit of ESS (Vehtari et al. 2021, arXiv 1903.08008)
_LARGEST_RHAT, _SMALLEST_ESS = 1.01, 400.0
#: k-hat above which importance sampling is fair, poor and useless (Vehtari et al. 2024, arXiv 1507.02646)
_K_LIMITS = (0.5, 0.7, 1.0)
_VERDICTS = {
    "converged": "The loss has converged.",
    "falling": "The loss is still falling: longer training would lower it.",
    "rising": "The loss rises towards the end of training.",
    "diverged": "The loss is not finite at the end: training diverged.",
    "unknown": "There are too few steps to tell whether the loss has converged.",
}
#: most elements of a quantity whose ranks are drawn
_MOST_CURVES = 20


def plot_losses(losses: Sequence[float] | Tensor, verdict: LossVerdict | str = "") -> Figure:
    """Plot of the negative ELBO of every training step, with a running mean over 5 % of the steps.

    The axis is logarithmic if all losses are positive and span more than two decades. Steps whose loss is NaN or
    infinite are drawn as ticks on the axis, and the legend gives their number.

    :param losses: negative ELBO per datum in nats, one for each step, as in ``posterior.losses``.
    :param verdict: the result of :func:`loss_verdict`, or any sentence, for the title.
    :raises ValueError: when there is no finite loss.
    """
    values = numbers("losses", losses, finite=False)
    finite = np.isfinite(values)
    if not finite.any():
        raise ValueError(f"losses has no finite value in {len(values)} steps: training diverged at the first step")
    step, window = np.arange(1, len(values) + 1), max(1, len(values) // 20)
    values = np.where(finite, values, np.nan)
    lines = wrap(_VERDICTS[verdict.state] if isinstance(verdict, LossVerdict) else verdict, 60)
    figure = new_figure(3.3 + 0.2 * len(lines))
    axes = figure.subplots()
    axes.plot(step, values, ".", color="0.65", markersize=3, label="each step", rasterized=len(values) > MANY)
    if window > 1:
        running = pd.Series(values).rolling(window, min_periods=1, center=True).mean()
        axes.plot(step, running, color="C0", linewidth=2, label=f"mean of {window} steps")
    if not finite.all():
        where = axes.get_xaxis_transform()
        label = f"not finite: {(~finite).sum()}"
        axes.plot(step[~finite], np.zeros((~finite).sum()), "|", color="C3", ms=12, transform=where, label=label)
    axes.set(xlabel="training step", ylabel="negative ELBO per datum, nats")
    log_if_wide(axes, "y", values[finite])
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    if lines:
        figure.suptitle("\n".join(lines), x=0.02, horizontalalignment="left", fontsize=10)
    legend_below(figure, columns=3)
    return figure


def plot_rhat(rhat: Tensor, ess: Tensor | None = None) -> Figure:
    """Histogram of R-hat over function values at probes (or parameters), and one of the effective sample size.

    :param rhat: R-hats of any shape; they should be below 1.01.
    :param ess: effective sample sizes of any shape; they should be above 400.
    :raises ValueError: when one is empty or not finite, as for values that never change.
    """
    figure = new_figure(2.4 if ess is None else 4.4)
    axes, *below = figure.subplots(1 if ess is None else 2, squeeze=False)[:, 0]
    values = numbers("rhat", rhat, dims=None)
    bad = f"{(values >= _LARGEST_RHAT).sum()} of {len(values)} not under {_LARGEST_RHAT:g}"
    _counts(axes, values, _LARGEST_RHAT, (min(1.0, values.min()), max(1.02, values.max())), "R-hat", bad)
    if ess is not None:
        values = numbers("ess", ess, dims=None)
        bad = f"{(values <= _SMALLEST_ESS).sum()} of {len(values)} not over {_SMALLEST_ESS:g}"
        _counts(below[0], values, _SMALLEST_ESS, (0, max(500, values.max())), "effective sample size, draws", bad)
    return figure


def _counts(axes: Axes, values: np.ndarray, limit: float, span: tuple[float, float], label: str, verdict: str) -> None:
    counts, edges = np.histogram(values, bins=30, range=span)
    axes.stairs(counts, edges, fill=True, color="C0")
    axes.axvline(limit, color="0.15", linestyle="--")
    axes.set(xlabel=label, ylabel="values")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_title(verdict, loc="left", fontsize=10)


def plot_pareto_k(k: Tensor) -> Figure:
    """Plot of the Pareto k-hat of the importance weights of each datum, with the limits 0.5, 0.7 and 1.

    k-hat is infinite if too few weights are in the tail; it is then drawn at the upper edge.

    :param k: ``[N]``, such as ``pareto_k`` of the result of :func:`loo`.
    :raises ValueError: when it is empty or holds NaN.
    """
    values = numbers("k", k, finite=False)
    if np.isnan(values).any():
        raise ValueError(f"k holds {np.isnan(values).sum()} values that are NaN: check the log-likelihoods for NaN")
    figure = new_figure(3.6)
    axes = figure.subplots()
    top = 1.1 * max(1.0, values[np.isfinite(values)].max(initial=1.0))
    kind = np.digitize(values, _K_LIMITS, right=True)
    names = ("k ≤ 0.5, good", "0.5 < k ≤ 0.7, fair", "0.7 < k ≤ 1, poor", "k > 1, useless")
    for i, (name, marker, color) in enumerate(zip(names, ".os^", ("C0", "C0", "C1", "C3"), strict=True)):
        here = kind == i
        axes.plot(
            np.flatnonzero(here),
            np.minimum(values[here], top),
            marker,
            color=color,
            markersize=4,
            label=f"{name}: {here.sum()}",
            rasterized=len(values) > MANY,
        )
    for limit in _K_LIMITS:
        axes.axhline(limit, color="0.4", linestyle=":", linewidth=1)
    axes.set(xlabel="datum", ylabel="Pareto k-hat", ylim=(min(0.0, values.min()) - 0.05, 1.04 * top))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    legend_below(figure, columns=2)
    return figure


def plot_ranks(ranks: Tensor, draws: int) -> Figure:
    """Plot of the ranks of simulation-based calibration: their ECDF minus that of uniform ranks.

    If the inference is exact, the band contains a whole curve with a probability of 95 %. A curve that first rises
    above the band and then falls below it shows a posterior that is too narrow, one that first falls a posterior that
    is too wide, and one that stays on one side a biased posterior.

    Source: Saeilynoja, Buerkner and Vehtari (2022), Statistics and Computing 32.

    :param ranks: ``[simulations, ...]`` in 0 ... draws, as ``sbc(...).ranks[quantity]``. Up to 20 elements are drawn,
        one curve each; the band is for a single curve.
    :param draws: number of draws among which each truth was ranked.
    :raises ValueError: when there are no ranks, or one is out of range.
    """
    values = numbers("ranks", ranks, dims=ranks.dim()).reshape(len(ranks), -1)
    if values.min() < 0 or values.max() > draws or (values % 1).any():
        raise ValueError(f"ranks lie in [{values.min():g}, {values.max():g}]: expected whole numbers in 0 ... {draws}")
    curves = SBCResult({"": torch.from_numpy(values[:, spread(range(values.shape[1]), _MOST_CURVES)]).long()}, draws)
    found = curves.ecdf_difference("", LEVEL)
    z, lower, upper = (_closed(numbers("band", v)) for v in (found.z, found.lower, found.upper))
    z[-1] = 1
    figure = new_figure(3.6)
    axes = figure.subplots()
    axes.fill_between(z, lower, upper, color="0.85", linewidth=0, label=f"{LEVEL:.0%} of exact inference")
    axes.axhline(0, color="0.4", linestyle="--", linewidth=1)
    elements = numbers("difference", found.difference, dims=2).T
    for i, curve in enumerate(elements):
        label = f"{len(ranks)} simulations" if i == 0 else None
        axes.plot(z, _closed(curve), color="C0", linewidth=1.6 if len(elements) == 1 else 0.9, label=label)
    axes.set(xlabel="rank, share of the draws below the truth", ylabel="ECDF − uniform", xlim=(0, 1))
    legend_below(figure, columns=2)
    return figure


def _closed(curve: np.ndarray) -> np.ndarray:
    """Adds both ends, where all curves are 0."""
    return np.pad(curve, 1)
