"""Pictures of codebooks: what is drawn is what the codebook holds."""

from __future__ import annotations

import io

import torch
from by_hand import chain
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse

import pyro_bnn as pb
from pyro_bnn.models import Codebook, CodebookGuide, WeightSharing
from pyro_bnn.models.weight_sharing.plots import PUBLISHED, plot_frontier, plot_plane, plot_weights_per_code


def book() -> Codebook:
    model = WeightSharing(chain(2, 30, 8, 1), pb.likelihoods.Gaussian(0.3), 10)
    found = CodebookGuide(model, 20, blend=0.1, outliers=0.06, smallest=1).book
    with torch.no_grad():
        found.rho += torch.randn(found.rho.shape, generator=torch.Generator().manual_seed(0))
    return found


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def test_the_plane() -> None:
    """One ellipse and one point for a living code, one line for one that merged, one cross for an outlier."""
    codes = book()
    before = codes.means().detach().clone()
    into = codes.merge(tightness=4.0)
    gone = int((into != torch.arange(len(into))).sum())
    assert gone > 2
    weights = torch.rand(50_000, 2)
    figure = plot_plane(codes, weights, into)
    (axes,) = figure.axes
    ellipses = [p for p in axes.patches if isinstance(p, Ellipse)]
    assert len(ellipses) == len(before) - gone
    k = int((codes.weights_per_code() > 0).nonzero()[0])
    values = torch.linalg.eigvalsh(codes.spread[k]).clamp_min(0).sqrt().detach()
    assert (
        abs(ellipses[0].width - 4 * float(values[1])) < 1e-9 and abs(ellipses[0].height - 4 * float(values[0])) < 1e-9
    )
    assert ellipses[0].center == (float(codes.means().detach()[k]), float(codes.scales().detach()[k]))
    lines = {line.get_label(): line for line in axes.lines}
    assert len(lines["outliers"].get_xdata()) == int(codes.is_outlier().sum()) > 0  # type: ignore[arg-type]
    assert len(lines["weights"].get_xdata()) <= 20_000  # type: ignore[arg-type]
    assert sum(len(line.get_xdata()) == 2 and line.get_color() == "C3" for line in axes.lines) == gone  # type: ignore[arg-type]
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["weights", "codes", "merged", "outliers"]  # type: ignore[union-attr]
    assert png(figure).startswith(b"\x89PNG") and png(plot_plane(codes)).startswith(b"\x89PNG")


def test_the_usage() -> None:
    codes = book()
    heights = [bar.get_height() for bar in plot_weights_per_code(codes).axes[0].patches]  # type: ignore[attr-defined]
    held = codes.weights_per_code(soft=True)
    assert heights == sorted(held[held > 0].tolist(), reverse=True)


def test_the_frontier() -> None:
    """Own points in order of bits, published ones of the same network at 32 / ratio."""
    rows = [
        {"network": "lenet5", "accuracy": 0.99, "bits": 1.5},
        {"network": "lenet5", "accuracy": 0.98, "bits": 0.5},
        {"network": "other", "accuracy": 0.5, "bits": 1.0},
    ]
    figure = plot_frontier(rows)
    assert [axes.get_title() for axes in figure.axes] == ["lenet5", "other"]
    own, *published = figure.axes[0].lines
    assert list(own.get_xdata()) == [0.5, 1.5] and abs(list(own.get_ydata())[0] - 2.0) < 1e-9  # type: ignore[arg-type]
    known = [p for p in PUBLISHED if p["network"] == "lenet5"]
    assert [float(line.get_xdata()[0]) for line in published] == [32 / p["ratio"] for p in known]  # type: ignore[index]
    assert len(figure.axes[1].lines) == 1 and png(figure)


def test_frontiers_of_several_recipes_are_lines_of_their_own() -> None:
    """Proves that points of another label are not joined to the first line, and that each has its own style."""
    first = [{"network": "own", "accuracy": 0.9, "bits": bits} for bits in (3.0, 1.0)]
    second = [{"network": "own", "accuracy": 0.8, "bits": bits, "label": "tempered"} for bits in (4.0, 2.0)]
    lines = plot_frontier([*first, *second]).axes[0].lines
    assert [(line.get_label(), list(line.get_xdata())) for line in lines] == [  # type: ignore[arg-type]
        ("codebook posterior", [1.0, 3.0]),
        ("tempered", [2.0, 4.0]),
    ]
    assert lines[0].get_linestyle() != lines[1].get_linestyle()
