"""Plots of a posterior itself: forest plots of its sites, inclusion maps, distances between members."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator
from torch import Tensor

from pyro_bnn.diagnostics.plots.canvas import SMALL, log_if_wide, new_figure, numbers, probabilities, spread
from pyro_bnn.diagnostics.scoring.precision import wide
from pyro_bnn.diagnostics.scoring.probabilities import class_probabilities

if TYPE_CHECKING:
    from pyro_bnn.posterior import Importance, Prediction

#: most rows in a panel of a forest plot, and most panels in an inclusion map, so that a page stays short
_MOST_ROWS, _MOST_MAPS = 16, 6
#: number of groups above which a histogram replaces the map, which would have more cells than a page has pixels
_MOST_CELLS = 100_000
#: number of members up to which distances are written into the cells
_MOST_NUMBERED = 8
#: labels of the panels, by the ending of the names of their rows
_PANELS = {
    "_tau": "hyper-scale tau",
    "_mean": "mean over the elements",
    "_sd": "standard deviation over the elements",
    "": "value",
}
_QUANTILES = (0.03, 0.25, 0.5, 0.75, 0.97)


def plot_forest(draws: Any, names: Sequence[str] | None = None) -> Figure:
    """Forest plot of the latent sites: median (point), central 50 % (thick) and 94 % (thin) intervals.

    A site with one element has one row. A larger site has two rows, for the mean and the standard deviation over its
    elements. Draws of all members and chains are pooled, as they are in the posterior; a small bar marks the median of
    each member. ArviZ's forest plot is not used, because in ArviZ 1.x it takes no axes and leaves a ``pyplot`` figure
    open.

    :param draws: ``posterior.draws(n)``, which is ``{site: [draws, members, ...]}``, or the result of
        :func:`to_arviz`.
    :param names: rows to draw (``"fc.weight_tau"``, ``"fc.weight.s_mean"``). By default up to 16 of each kind, evenly
        spaced over the network; a note gives the number of rows left out.
    :raises TypeError: when draws is neither of these.
    :raises ValueError: when there are no sites, a name is unknown, or a draw is not finite.
    """
    rows = {name: numbers(name, values, dims=2) for name, values in _forest_rows(_sites(draws)).items()}
    if not rows:
        raise ValueError("draws has no sites: there is nothing to draw")
    if names is not None:
        if unknown := [name for name in names if name not in rows]:
            raise ValueError(f"there is no row {unknown[0]!r}; the rows are {', '.join(rows)}")
        rows = {name: rows[name] for name in names}
    kinds: dict[str, list[str]] = {suffix: [] for suffix in _PANELS}
    for name in rows:
        kinds[next(suffix for suffix in _PANELS if name.endswith(suffix))].append(name)
    panels = {
        suffix: found if names is not None else spread(found, _MOST_ROWS) for suffix, found in kinds.items() if found
    }
    counts = [len(shown) for shown in panels.values()]
    quantiles = {name: np.quantile(rows[name], _QUANTILES) for shown in panels.values() for name in shown}

    figure = new_figure(0.5 + sum(0.55 + 0.22 * count for count in counts))
    grid = figure.subplots(len(panels), squeeze=False, height_ratios=[count + 1 for count in counts])[:, 0]
    for axes, (suffix, shown) in zip(grid, panels.items(), strict=True):
        for height, name in enumerate(shown):
            _forest_row(axes, height, rows[name], quantiles[name])
        labels = [_shortened(name.removesuffix(suffix)) for name in shown]
        axes.set_yticks(range(len(shown)), labels)
        axes.set(xlabel=_PANELS[suffix], ylim=(len(shown) - 0.5, -0.5))
        axes.grid(axis="x", alpha=0.4)
        log_if_wide(axes, "x", np.array([quantiles[name] for name in shown]))
    if left_out := len(rows) - sum(counts):
        figure.supxlabel(f"{left_out} of {len(rows)} rows left out", fontsize=SMALL)
    return figure


def _sites(draws: object) -> dict[str, Tensor]:
    """``{site: [draws, members, *event]}``, with chains flattened into draws."""
    if isinstance(draws, Mapping) and hasattr(group := draws.get("posterior"), "data_vars"):
        return dict(_stored_sites(group))
    if not isinstance(draws, Mapping) or not all(isinstance(value, Tensor) for value in draws.values()):
        raise TypeError(
            "draws must be {site: tensor [draws, members, ...]}, as posterior.draws(n) returns it, or the result of "
            f"to_arviz with the group 'posterior'; got {type(draws).__name__}"
        )
    if flat := [name for name, value in draws.items() if value.dim() < 2]:
        raise ValueError(f"{flat[0]} has the shape {tuple(draws[flat[0]].shape)}: expected [draws, members, ...]")
    return dict(draws)


def _stored_sites(group: Any) -> Iterator[tuple[str, Tensor]]:
    """The sites that ``to_arviz`` stored, under their original names: the layer followed by the quantity."""
    for name, array in group.data_vars.items():
        if "probe" in array.dims:
            continue  # values of the function, not a site
        sampled = [dim for dim in ("chain", "draw", "member") if dim in array.dims]
        along = next((dim for dim in array.dims if dim in ("layer", f"{name}_layer")), None)
        for layer in [""] if along is None else array[along].values:
            one = array if along is None else array.sel({along: layer})
            values = torch.as_tensor(one.transpose(*sampled, ...).values).flatten(0, 1)
            yield f"{layer}.{name}" if layer else str(name), values if "member" in sampled else values.unsqueeze(1)


def _forest_rows(sites: dict[str, Tensor]) -> dict[str, Tensor]:
    rows = {}
    for name, values in sites.items():
        values = values.flatten(2) if values.dim() > 2 else values.unsqueeze(2)
        if values.shape[2] == 1:
            rows[name] = values[..., 0]
        else:
            rows[f"{name}_mean"], rows[f"{name}_sd"] = values.mean(2), values.std(2, correction=0)
    return rows


def _forest_row(axes: Axes, height: int, values: np.ndarray, quantiles: np.ndarray) -> None:
    low, lower, median, upper, high = quantiles
    axes.plot([low, high], [height] * 2, color="C0", linewidth=1.2)
    axes.plot([lower, upper], [height] * 2, color="C0", linewidth=4, solid_capstyle="butt")
    if values.shape[1] > 1:
        axes.plot(np.median(values, 0), [height] * values.shape[1], "|", color="0.25", markersize=9)
    axes.plot(median, height, "o", markerfacecolor="white", markeredgecolor="C0", markersize=5)


def _shortened(name: str) -> str:
    return name if len(name) <= 28 else "…" + name[-27:]


def plot_inclusion(inclusion: Mapping[str, Tensor]) -> Figure:
    """Maps of the inclusion probabilities ``P(slab | data)`` of each parameter, from 0 (dark) to 1 (bright).

    A vector of groups is drawn as a strip, a matrix as it is stored, and a convolution ``[out, in, *kernel]`` as a
    matrix of kernels. A parameter with more than 100,000 groups is drawn as a histogram. Up to 6 parameters are drawn,
    evenly spaced over the network; a note gives the number of parameters left out.

    :param inclusion: what ``posterior.inclusion_probabilities()`` returns, ``{parameter: [...]}``.
    :raises ValueError: when it is empty, or a value is not in [0, 1].
    """
    if not inclusion:
        raise ValueError("inclusion is empty: it comes from a model with a spike-and-slab prior")
    shown = spread(list(inclusion), _MOST_MAPS)
    maps = [_as_matrix(name, inclusion[name]) for name in shown]
    heights = [_height(cells) for cells in maps]
    figure = new_figure(0.6 + sum(heights) + 0.75 * len(maps))
    grid = figure.subplots(len(maps), squeeze=False, height_ratios=heights)[:, 0]
    image = None
    for axes, name, cells in zip(grid, shown, maps, strict=True):
        title = f"{_shortened(name)}: {np.mean(cells > 0.5):.0%} of {cells.size:,} above 1/2"
        axes.set_title(title, loc="left", fontsize=10)
        if cells.size > _MOST_CELLS:
            axes.hist(cells.ravel(), bins=20, range=(0, 1), color="C0", edgecolor="white")
            axes.set(xlabel="P(slab | data)", ylabel="groups", xlim=(0, 1))
            continue
        image = axes.imshow(cells, vmin=0, vmax=1, cmap="cividis", aspect="auto", interpolation="none")
        vector, kernels = inclusion[name].dim() < 2, inclusion[name].dim() > 2
        axes.set(xlabel="group" if vector else "input" + " × kernel column" * kernels)
        axes.set(ylabel="" if vector else "output" + " × kernel row" * kernels)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(NullLocator() if vector else MaxNLocator(3, integer=True))
    if image is not None:
        gap = 0.25 / figure.get_figheight()
        figure.colorbar(image, ax=list(grid), label="P(slab | data)", location="bottom", aspect=40, pad=gap)
    if left_out := len(inclusion) - len(shown):
        figure.supxlabel(f"{left_out} of {len(inclusion)} parameters left out", fontsize=SMALL)
    return figure


def plot_importance(importance: Mapping[str, Importance]) -> Figure:
    """What each group is worth to predictions, beside its inclusion: the loss without it, with two standard errors.

    Groups with an inclusion probability of at least 1/2 are filled; groups without a loss are not drawn. Up to 6
    parameters are drawn, evenly spaced over the network; a note gives the number of parameters left out.

    :param importance: what ``posterior.importance(x, y)`` returns.
    :raises ValueError: when it is empty, or no group has a loss.
    """
    if not importance:
        raise ValueError("importance is empty: it comes from a model with a spike-and-slab prior")
    shown = spread(list(importance), _MOST_MAPS)
    figure = new_figure(0.4 + 2.2 * len(shown))
    grid = figure.subplots(len(shown), squeeze=False)[:, 0]
    for axes, name in zip(grid, shown, strict=True):
        of = importance[name]
        there = ~of.loss.flatten().isnan().cpu().numpy()
        if not there.any():
            raise ValueError(f"importance of {name!r} has no loss: call posterior.importance with a smaller least=")
        loss = numbers(name, of.loss, dims=None, finite=False)[there]
        error = numbers(name, of.error, dims=None, finite=False)[there]
        inside = probabilities(name, of.inclusion, dims=of.inclusion.dim()).ravel()[there] >= 0.5
        groups = np.arange(len(there))[there]
        axes.errorbar(groups, loss, 2 * error, fmt="none", ecolor="0.4", linewidth=1.2)
        axes.plot(groups[inside], loss[inside], "o", color="C0", label="included")
        axes.plot(groups[~inside], loss[~inside], "o", color="C0", markerfacecolor="white", label="left out")
        axes.axhline(0, color="0.6", linewidth=0.8)
        axes.set_title(_shortened(name), loc="left", fontsize=10)
        axes.set(xlabel="group", ylabel="loss without it, nats per row")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    grid[0].legend(frameon=False, fontsize=SMALL)
    if left_out := len(importance) - len(shown):
        figure.supxlabel(f"{left_out} of {len(importance)} parameters left out", fontsize=SMALL)
    return figure


def _height(cells: np.ndarray) -> float:
    """Height in inches: cells are square, unless that would be too flat for the labels or too tall for a page."""
    if cells.size > _MOST_CELLS:
        return 1.5
    return 0.25 if len(cells) == 1 else float(np.clip(4 * cells.shape[0] / cells.shape[1], 0.6, 2.5))


def _as_matrix(name: str, values: Tensor) -> np.ndarray:
    cells = probabilities(name, values, dims=values.dim())
    if cells.ndim < 2:
        return cells.reshape(1, -1)
    if cells.ndim == 2:
        return cells
    outputs, inputs, *kernel = cells.shape
    tall = kernel[0] if len(kernel) > 1 else 1
    return cells.reshape(outputs, inputs, tall, -1).swapaxes(1, 2).reshape(outputs * tall, -1)


def member_distances(prediction: Prediction) -> Tensor:
    """Distances ``[K, K]`` between the functions of the members of a posterior, each averaged over its draws.

    For a classification this is the total variation distance of two members, ``(1/2) sum_c |p_i(c) - p_j(c)|``,
    averaged over inputs, in [0, 1]. Otherwise it is the root mean square over inputs of the difference of their means,
    in the unit of y.

    :param prediction: what ``Posterior.predict`` returns, with K members.
    """
    if not _classifies(prediction):
        means = wide(prediction.per_member.mean(0)).flatten(1)
        # The faster mode, through matrix products, would lose small distances to rounding.
        return torch.cdist(means, means, compute_mode="donot_use_mm_for_euclid_dist") / means.shape[1] ** 0.5
    probs = wide(class_probabilities(prediction.per_member.mean(0), prediction.likelihood))
    labels = probs[0, ..., 0].numel()
    return torch.cdist(probs.flatten(1), probs.flatten(1), p=1) / (2 * labels)


def plot_particles(distances: Tensor | Prediction) -> Figure:
    """Matrix plot of the distances between all pairs of members (particles or mixture components).

    :param distances: ``[K, K]``, or a prediction, whose :func:`member_distances` are drawn.
    :raises ValueError: when the matrix is not square, or a distance is not finite.
    """
    label = "distance"
    if not isinstance(distances, Tensor):
        label = "mean total variation" if _classifies(distances) else "RMS difference of means, unit of y"
        distances = member_distances(distances)
    cells = numbers("distances", distances, dims=2)
    if cells.shape[0] != cells.shape[1]:
        raise ValueError(f"distances has the shape {cells.shape}: expected one row and one column for each member")
    figure = new_figure(4.2)
    axes = figure.subplots()
    image = axes.imshow(cells, cmap="cividis", vmin=0, vmax=cells.max() or 1, interpolation="none")
    ticks = range(0, len(cells), -(-len(cells) // 10))
    axes.set(xlabel="member", ylabel="member", xticks=ticks, yticks=ticks)
    if len(cells) <= _MOST_NUMBERED:
        for i, j in np.ndindex(cells.shape):
            color = "black" if cells[i, j] > 0.6 * cells.max() else "white"
            axes.text(j, i, f"{cells[i, j]:.2g}", ha="center", va="center", color=color, fontsize=SMALL)
    figure.colorbar(image, ax=axes, label=label)
    return figure


def _classifies(prediction: Prediction) -> bool:
    return prediction.likelihood is not None and prediction.likelihood.kind == "classification"
