"""Pictures of a codebook: the plane of its weights, how many weights each code has, accuracy against bits a weight.

Every function returns a ``matplotlib.figure.Figure``, the caller's own: ``plot_plane(book).savefig("plane.png")``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TypedDict

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from torch import Tensor

from pyro_bnn.models.weight_sharing.codebook import Codebook


class Published(TypedDict):
    """A network that somebody made smaller: its error in per cent, and how many times smaller it is than in float32."""

    network: str
    method: str
    error: float
    ratio: float
    source: str


#: published points on MNIST: network, error in %, times smaller than float32, and where that is printed
PUBLISHED: list[Published] = [
    {"network": network, "method": method, "error": error, "ratio": ratio, "source": source}
    for method, source, points in (
        (
            "Deep compression",
            "Han, Mao and Dally 2016, arXiv 1510.00149, table 1",
            [("lenet300100", 1.58, 40), ("lenet5", 0.74, 39)],
        ),
        (
            "Soft weight sharing",
            "Ullrich, Meeds and Welling 2017, arXiv 1702.04008, table 1",
            [("lenet300100", 1.94, 64), ("lenet5", 0.97, 162)],
        ),
        (
            "Sparse variational dropout, weights that are left",
            "Molchanov, Ashukha and Vetrov 2017, arXiv 1701.05369, as in the authors' README",
            [("lenet300100", 1.92, 68), ("lenet5", 0.75, 280)],
        ),
    )
    for network, error, ratio in points
]


def plot_plane(book: Codebook, weights: Tensor | None = None, into: Tensor | None = None) -> Figure:
    """Codes in the plane of mean and standard deviation, each with its ellipse of two deviations; outliers as crosses.

    :param weights: means and deviations of the weights that the codes were made of, ``[n, 2]``; at most 20,000 of them
        are drawn.
    :param into: what :meth:`Codebook.merge` returned; codes that went are drawn where they were, with a line to the
        code that they are part of.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    if weights is not None:
        step = -(-len(weights) // 20_000)
        mu, sigma = weights[::step].detach().cpu().double().unbind(1)
        axes.plot(mu, sigma, ",", color="0.6", label="weights", zorder=1)
    means, scales = (v.detach().cpu().double() for v in (book.means(), book.scales()))
    held = book.weights_per_code(soft=True).cpu()
    alive = held > 0
    spread = book.spread.detach().cpu().double()
    for k in alive.nonzero().flatten().tolist():
        values, vectors = torch.linalg.eigh(spread[k])
        angle = float(torch.rad2deg(torch.atan2(vectors[1, 1], vectors[0, 1])))
        width, height = (4 * values.clamp_min(0).sqrt()).flip(0).tolist()
        axes.add_patch(Ellipse((float(means[k]), float(scales[k])), width, height, angle=angle, fill=False, ec="C0"))
    size = 4 + 60 * held[alive] / held.max()
    axes.scatter(means[alive].tolist(), scales[alive].tolist(), s=size.tolist(), color="C0", label="codes", zorder=3)
    if into is not None:
        gone = (into.cpu() != torch.arange(len(into))).nonzero().flatten()
        for k in gone.tolist():
            j = int(into[k])
            axes.plot([means[k], means[j]], [scales[k], scales[j]], color="C3", lw=0.8, zorder=2)
        axes.scatter(means[gone].tolist(), scales[gone].tolist(), s=8, color="C3", label="merged", zorder=2)
    free = book.is_outlier().cpu()
    if bool(free.any()):
        mu, sigma = (v.detach().cpu().double()[free] for v in (book.outlier_loc, book.outlier_scales()))
        axes.plot(mu, sigma, "x", color="C1", ms=4, label="outliers", zorder=2)
    axes.set(xlabel="mean of a weight", ylabel="standard deviation", ylim=(0, None))
    axes.legend()
    return figure


def plot_weights_per_code(book: Codebook) -> Figure:
    """How many weights each code has, the most frequent first, on logarithmic axes."""
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    held = book.weights_per_code(soft=True).cpu()
    held = held[held > 0].sort(descending=True).values
    axes.bar(range(1, len(held) + 1), held.tolist(), width=1.0)
    axes.set(xlabel="code, by rank", ylabel="weights", yscale="log", xlim=(0.5, len(held) + 0.5))
    return figure


def plot_frontier(
    rows: Sequence[Mapping[str, str | float]], published: Sequence[Published] = tuple(PUBLISHED)
) -> Figure:
    """Error in per cent against bits a weight, for each network.

    :param rows: of one data set, with ``network``, ``accuracy`` and ``bits``, and ``label`` where there are several
        lines; the default is "codebook posterior".
    :param published: with ``network``, ``method``, ``error`` and ``ratio`` to 32 bits.
    """
    networks = sorted({str(row["network"]) for row in rows})
    figure = Figure(figsize=(4.5 * max(1, len(networks)), 4), layout="constrained")
    for axes, network in zip(figure.subplots(1, max(1, len(networks)), squeeze=False)[0], networks, strict=False):
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in (row for row in rows if row["network"] == network):
            line = lines.setdefault(str(row.get("label", "codebook posterior")), [])
            line.append((float(row["bits"]), 100 - 100 * float(row["accuracy"])))
        for (label, line), style in zip(lines.items(), cycle(("-o", "--o", "-.o", ":o")), strict=False):
            axes.plot(*zip(*sorted(line), strict=True), f"C0{style}", label=label)
        for i, point in enumerate(p for p in published if p["network"] == network):
            axes.plot(32 / point["ratio"], point["error"], "s^Dv*"[i % 5], color=f"C{i + 1}", label=point["method"])
        axes.set(title=network, xlabel="bits a weight, everything included", ylabel="test error, %", xscale="log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure
