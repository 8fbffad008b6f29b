"""Plots of predictions against data: calibration, risk and coverage, out-of-distribution scores, shift, bands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import binom, binomtest
from torch import Tensor

from pyro_bnn.data.corruptions import SEVERITIES
from pyro_bnn.diagnostics.plots.canvas import (
    LEVEL,
    MANY,
    SMALL,
    legend_below,
    line_styles,
    new_figure,
    numbers,
    probabilities,
    spread,
)
from pyro_bnn.diagnostics.scoring.calibration import BINS, ReliabilityBins, reliability
from pyro_bnn.diagnostics.scoring.ood import auroc
from pyro_bnn.diagnostics.scoring.selective import aurc, risk_coverage

if TYPE_CHECKING:
    from pyro_bnn.diagnostics.scoring.shift import Shift
    from pyro_bnn.posterior import Prediction

#: most points of a risk-coverage curve, enough for the pixels of a page
_POINTS = 1000
_LEVELS = np.arange(1, 20) / 20


def plot_reliability(
    probs: Tensor | ReliabilityBins, y: Tensor | None = None, bins: int = BINS, adaptive: bool = False
) -> Figure:
    """Reliability diagram: accuracy against confidence in bins, and below it the share of the data in each bin.

    Error bars are Wilson's 95 % intervals for a binomial proportion (Wilson 1927, J. Am. Stat. Assoc. 22, p. 209): if a
    bar meets the diagonal, its bin gives no reason to doubt the calibration.

    :param probs: class probabilities ``[N, C]``, or the result of :func:`reliability`, without other arguments.
    :param y: labels ``[N]``.
    :param bins: number of bins.
    :param adaptive: whether bins hold equal numbers of data instead of having equal width.
    :raises TypeError: when y does not hold integers.
    :raises ValueError: when y is missing or does not fit, rows of probs are not probabilities, or there are no data.
    """
    if isinstance(probs, Tensor):
        if y is None:
            raise ValueError("y is missing: a reliability plot compares probabilities with the true classes")
        probs = reliability(probs, y, bins, adaptive)
    if not bool((held := probs.count > 0).any()):
        raise ValueError("all bins are empty: there is nothing to draw")
    confidence, accuracy = numbers("confidence", probs.confidence[held]), numbers("accuracy", probs.accuracy[held])
    edges, share = numbers("edges", probs.edges), numbers("count", probs.count / probs.count.sum())
    # Ties at the bounds of adaptive bins share their right predictions, so a bin may hold a fraction of one.
    right = (probs.accuracy * probs.count)[held].round().long()
    wilson = [
        binomtest(k, n).proportion_ci(LEVEL, method="wilson")
        for k, n in zip(right.tolist(), probs.count[held].tolist(), strict=True)
    ]
    # By rounding a share may lie outside its interval, and error bars must not have a negative length.
    bars = np.clip([accuracy - [i.low for i in wilson], [i.high for i in wilson] - accuracy], 0, None)

    figure = new_figure(4.8)
    upper, lower = figure.subplots(2, sharex=True, height_ratios=[3, 1])
    upper.plot([0, 1], [0, 1], "--", color="0.4", label="perfect")
    upper.errorbar(confidence, accuracy, bars, fmt="o-", color="C0", capsize=3, label=f"bins, ECE {probs.error:.3f}")
    upper.set(ylabel="accuracy", xlim=(0, 1), ylim=(-0.02, 1.02))
    lower.bar(edges[:-1], share, np.diff(edges), align="edge", color="C0", edgecolor="0.2", linewidth=0.6)
    lower.set(xlabel="confidence", ylabel="share of data")
    legend_below(figure, columns=2)
    return figure


def plot_risk_coverage(curves: Mapping[str, tuple[Tensor, Tensor]]) -> Figure:
    """Risk-coverage curves: mean loss of the most confident data against the share of the data that is kept.

    The legend gives the area under each curve (AURC), in the unit of the loss; lower is better.

    :param curves: ``{label: (confidence [N], loss [N])}``; any loss, such as 1 for a wrong class and 0 for a right one.
    :raises ValueError: when there is no curve, or a number is not finite.
    """
    if not curves:
        raise ValueError("curves is empty: expected {label: (confidence, loss)}")
    figure = new_figure(3.3 + 0.2 * len(curves))
    axes = figure.subplots()
    for (label, (confidence, loss)), style in zip(curves.items(), line_styles(len(curves)), strict=True):
        numbers(f"confidence of {label}", confidence)
        numbers(f"loss of {label}", loss)
        coverage, risk = risk_coverage(confidence, loss)
        shown = spread(range(len(risk)), _POINTS)
        text = f"{label}: AURC {float(aurc(confidence, loss)):.4f}"
        points = coverage.cpu().numpy()[shown], risk.cpu().numpy()[shown]
        axes.plot(*points, label=text, markevery=-(-len(shown) // 8), **style)
    axes.set(xlabel="coverage, share of data that is kept", ylabel="risk, mean loss", xlim=(0, 1), ylim=(0, None))
    axes.grid(alpha=0.4)
    legend_below(figure)
    return figure


def plot_ood(inside: Tensor, outside: Tensor, score: str = "predictive entropy (nats)") -> Figure:
    """Histograms of a score for in-distribution and for out-of-distribution inputs, and the AUROC between them.

    The AUROC is the probability that an out-of-distribution input has the larger score, ties counting half.

    :param inside: scores ``[N]`` of in-distribution data.
    :param outside: scores ``[M]`` of out-of-distribution inputs.
    :param score: name and unit of the score, for the axis.
    :raises ValueError: when one of them is empty or not finite.
    """
    groups = {"inside": numbers("inside", inside), "outside": numbers("outside", outside)}
    both = np.concatenate(list(groups.values()))
    edges = np.histogram_bin_edges(both, bins=30)
    figure = new_figure(3.6)
    axes = figure.subplots()
    styles: tuple[dict[str, Any], ...] = ({"fill": True, "color": "C0", "alpha": 0.6}, {"color": "C1", "linewidth": 2})
    for (name, values), style in zip(groups.items(), styles, strict=True):
        density, _ = np.histogram(values, edges, density=True)
        axes.stairs(density, edges, label=f"{name}, {len(values):,} data", **style)
    axes.set(xlabel=score, ylabel="density", ylim=(0, None))
    legend_below(figure, columns=2, title=f"AUROC {auroc(inside, outside):.3f}")
    return figure


def plot_shift(shifts: Mapping[str, Shift], metric: str = "nll") -> Figure:
    """A metric against the severity of corruption, in one small plot for each kind; severity 0 is without corruption.

    :param shifts: ``{label: evaluate(posterior, data, shift=...)["shift"]}``, for the same kinds of corruption.
    :param metric: ``"nll"``; ``"accuracy"`` or ``"ece"`` of classifications, ``"rmse"`` of others.
    :raises ValueError: when there is no shift, their kinds differ, one lacks the metric, or a number is not finite.
    """
    if not shifts:
        raise ValueError('shifts is empty: expected {label: evaluate(..., shift=...)["shift"]}')
    kinds = list(next(iter(shifts.values())))
    for label, one in shifts.items():
        if set(one) != set(kinds):
            raise ValueError(
                f"{label!r} has the corruptions {', '.join(one)}: expected those of all, {', '.join(kinds)}"
            )
        if metric not in one.clean:
            raise ValueError(f"metric={metric!r}: {label!r} has {', '.join(one.clean)}")
    rows = -(-len(kinds) // 2)
    figure = new_figure(1.6 * rows + 0.6 + 0.2 * len(shifts))
    panels = figure.subplots(rows, 2, sharex=True, sharey=True, squeeze=False).flatten()
    styles = line_styles(len(shifts))
    for panel, kind in zip(panels, kinds, strict=False):
        for (label, one), style in zip(shifts.items(), styles, strict=True):
            values = numbers(f"{metric} of {label}", [one.clean[metric], *one[kind][metric]])
            panel.plot(range(len(values)), values, label=label if kind == kinds[0] else None, **style)
        panel.set_title(kind, fontsize=SMALL)
        panel.grid(alpha=0.4)
    for panel in panels[len(kinds) :]:
        panel.set_visible(False)
    for panel in panels[max(0, len(kinds) - 2) : len(kinds)]:
        panel.set_xlabel("severity")
        panel.xaxis.set_tick_params(labelbottom=True)
        panel.set_xticks(range(len(SEVERITIES) + 1))
    figure.supylabel({"nll": "NLL (nats)", "ece": "ECE", "rmse": "RMSE"}.get(metric, metric), fontsize=SMALL)
    legend_below(figure)
    return figure


def plot_calibration_curve(pit: Tensor) -> Figure:
    """Coverage of the central predictive intervals against their level, 5 % to 95 %.

    y_n is inside the central interval of level L if ``|2 F_n(y_n) - 1| <= L``. At each level, the band contains the
    curve of a calibrated model with a probability of 95 %.

    :param pit: ``[N]``, the predictive distribution function at the true values, ``F_n(y_n)`` (the probability integral
        transform); from draws of y it is ``(prediction.sample(seed) <= y).double().mean((0, 1))``.
    :raises ValueError: when it is empty, or not in [0, 1].
    """
    values = probabilities("pit", pit)
    covered = (np.abs(2 * values - 1)[:, None] <= _LEVELS).mean(0)
    low, high = np.array(binom.interval(LEVEL, len(values), _LEVELS)) / len(values)
    figure = new_figure(4.6)
    axes = figure.subplots()
    axes.fill_between(_LEVELS, low, high, color="0.85", label=f"{LEVEL:.0%} of calibrated models")
    axes.plot([0, 1], [0, 1], "--", color="0.4", label="perfect")
    axes.plot(_LEVELS, covered, "C0o-", markersize=4, label=f"{len(values):,} data")
    axes.set(xlabel="level of the interval", ylabel="share of data inside", xlim=(0, 1), ylim=(-0.02, 1.02))
    legend_below(figure, columns=3)
    return figure


def plot_band(x: Tensor, prediction: Prediction, y: Tensor | None = None, x_train: Tensor | None = None) -> Figure:
    """Plot of a regression on one input: the mean, and the central 50 % and 95 % intervals of y.

    The hatched band is the uncertainty of the mean: 1.96 epistemic standard deviations on each side.

    :param x: ``[N]`` or ``[N, 1]``, in any order.
    :param prediction: the prediction at x, with one output.
    :param y: observed values, drawn as points; at ``x_train`` if it is given, otherwise at x.
    :param x_train: ``[M]`` or ``[M, 1]``; without y they are drawn as ticks on the axis.
    :raises TypeError: when the prediction is a classification.
    :raises ValueError: for more than one input or output, when lengths differ, or a number is not finite.
    """
    at = _single("x", x)
    mean, variance = _single("mean", prediction.mean), _single("variance of the mean", prediction.epistemic)
    if len(mean) != len(at):
        raise ValueError(f"x has {len(at)} rows and the prediction {len(mean)}: expected the prediction at this x")
    order = np.argsort(at, kind="stable")
    at, mean, half = at[order], mean[order], 1.96 * np.sqrt(variance[order])
    figure = new_figure(3.9)
    axes = figure.subplots()
    for level, color in ((0.95, "#cfe3f1"), (0.5, "#8fbfdf")):
        low, high = (_single("interval", bound)[order] for bound in prediction.interval(level))
        axes.fill_between(at, low, high, color=color, linewidth=1, label=f"{level:.0%} interval")
    axes.fill_between(
        at, mean - half, mean + half, facecolor="none", edgecolor="C1", hatch="//", linewidth=1, label="95% of the mean"
    )
    axes.plot(at, mean, color="C0", linewidth=2, marker="" if len(at) > 1 else "o", label="mean")
    data = _single("x", x) if x_train is None else _single("x_train", x_train)
    if y is not None:
        points = _single("y", y)
        if len(points) != len(data):
            where = "x" if x_train is None else "x_train"
            raise ValueError(f"y has {len(points)} rows and {where} {len(data)}: expected the same number")
        axes.plot(data, points, "o", color="0.1", markersize=3, label="data", rasterized=len(data) > MANY)
    elif x_train is not None:
        ticks = axes.get_xaxis_transform()
        axes.plot(data, np.full(len(data), 0.02), "|", color="0.1", transform=ticks, label="training inputs")
    axes.set(xlabel="x", ylabel="y")
    legend_below(figure, columns=3)
    return figure


def _single(name: str, values: Tensor) -> np.ndarray:
    """``[N]`` from ``[N]`` or ``[N, 1]``.

    :raises ValueError: for anything else.
    """
    if values.dim() == 2 and values.shape[1] == 1:
        values = values.squeeze(1)
    if values.dim() != 1:
        raise ValueError(
            f"{name} has the shape {tuple(values.shape)}: expected [N] or [N, 1], as a band is drawn for one input and "
            "one output; choose one column, with the others held fixed"
        )
    return numbers(name, values)
