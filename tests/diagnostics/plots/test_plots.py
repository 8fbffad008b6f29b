"""Pictures hold the numbers that they were given: every test reads them back from what was drawn."""

from __future__ import annotations

import io
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from diagnostics.fake import FakePosterior, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy import stats
from sklearn.metrics import roc_auc_score
from torch import Tensor

import pyro_bnn as pb
from pyro_bnn.data.corruptions import IMAGE_KINDS
from pyro_bnn.diagnostics import Shift, plots, to_arviz
from pyro_bnn.diagnostics.checking.training import loss_verdict
from pyro_bnn.diagnostics.plots.canvas import line_styles, spread
from pyro_bnn.diagnostics.scoring.calibration import ReliabilityBins, reliability
from pyro_bnn.likelihoods import Bernoulli, Categorical, Gaussian

Picture = Callable[[], Figure]


@pytest.fixture(autouse=True)
def _no_figure_is_left_open() -> Iterator[None]:
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    yield
    assert plt.get_fignums() == before == []


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def line(axes: Axes, label: str) -> Line2D:
    (found,) = (found for found in axes.lines if str(found.get_label()).startswith(label))
    return found


def data(found: Line2D) -> tuple[list[float], list[float]]:
    return np.asarray(found.get_xdata()).tolist(), np.asarray(found.get_ydata()).tolist()


def legend(figure: Figure) -> list[str]:
    return [
        text.get_text() for box in figure.legends for text in (box.get_title(), *box.get_texts()) if text.get_text()
    ]


def band(collection: PolyCollection, x: float) -> tuple[float, float]:
    vertices = collection.get_paths()[0].vertices
    at = np.asarray(vertices)[np.isclose(np.asarray(vertices)[:, 0], x), 1]
    return float(at.min()), float(at.max())


# ----------------------------------------------------------------------------------------------- every picture


def sine(n: int = 60) -> tuple[Tensor, pb.Prediction]:
    x = torch.linspace(-3, 3, n, dtype=torch.float64)
    return x, pb.Prediction(normal(10, 2, 1) * torch.sin(x) + 0.2 * normal(10, 2, 1, seed=1) * x, Gaussian(0.3))


def layers() -> dict[str, Tensor]:
    names = [f"layer{stage}.{block}.conv{conv}" for stage in range(1, 5) for block in (0, 1) for conv in (1, 2)]
    draws = {}
    for i, name in enumerate(names):
        draws[f"{name}.weight_tau"] = (normal(30, 4, seed=i) * 0.4 - 0.4 * i).exp()
        draws[f"{name}.weight.s"] = 1 + 0.1 * normal(30, 4, 20, seed=i)
    return draws | {"noise": normal(30, 4).exp()}


def maps() -> dict[str, Tensor]:
    return {
        "conv.weight": uniform(20, 1, 5, 5),
        "large.weight": uniform(400, 300),
        "flat.weight": uniform(10, 500),
        "tall.weight": uniform(300, 4),
        "kernels.weight": uniform(6, 3),
        "bias": uniform(10),
        "last.bias": uniform(3),
    }


def labelled(n: int = 500, classes: int = 10) -> tuple[Tensor, Tensor]:
    probs = (2 * normal(n, classes)).softmax(-1)
    return probs, torch.multinomial(probs, 1, generator=torch.Generator().manual_seed(1)).squeeze(1)


def shifted(i: int, kinds: Sequence[str] = IMAGE_KINDS) -> Shift:
    """Values that say where they come from: the kind, the severity and i."""
    return Shift(
        {
            kind: {name: [k / 10 + s / 100 + i / 1000 for s in range(1, 6)] for name in ("accuracy", "nll", "ece")}
            for k, kind in enumerate(kinds)
        },
        {"accuracy": 0.95, "nll": 0.05, "ece": 0.01},
        100,
        4,
    )


LONG = (
    "The loss is still falling by 0.021 nats per datum over the last fifth of the run, more than its noise: train on."
)
PICTURES: dict[str, Picture] = {
    "reliability": lambda: plots.plot_reliability(*labelled()),
    "reliability_adaptive": lambda: plots.plot_reliability(*labelled(), adaptive=True),
    "reliability_one": lambda: plots.plot_reliability(*labelled(1)),
    "risk_coverage": lambda: plots.plot_risk_coverage(
        {f"method number {i}": (normal(3000, seed=i), (uniform(3000, seed=i) < 0.1).double()) for i in range(9)}
    ),
    "ood": lambda: plots.plot_ood(uniform(300), 1 + uniform(200)),
    "ood_constant": lambda: plots.plot_ood(torch.ones(3), torch.ones(2)),
    "shift": lambda: plots.plot_shift({f"method number {i}": shifted(i) for i in range(5)}),
    "shift_one_kind": lambda: plots.plot_shift({"a": shifted(0, ("noise",))}, "accuracy"),
    "calibration_curve": lambda: plots.plot_calibration_curve(uniform(200)),
    "band": lambda: plots.plot_band(*sine(), y=normal(40), x_train=uniform(40, 1)),
    "band_inputs": lambda: plots.plot_band(*sine(), x_train=uniform(40, 1)),
    "band_one": lambda: plots.plot_band(*sine(1)),
    "forest": lambda: plots.plot_forest(layers()),
    "forest_one": lambda: plots.plot_forest({"noise": torch.ones(1, 1)}),
    "inclusion": lambda: plots.plot_inclusion(maps()),
    "inclusion_one": lambda: plots.plot_inclusion({"bias": uniform(300)}),
    "particles": lambda: plots.plot_particles(torch.cdist(normal(30, 5), normal(30, 5))),
    "particles_one": lambda: plots.plot_particles(torch.zeros(1, 1)),
    "losses": lambda: plots.plot_losses([float("nan"), *(2 + normal(5000)).tolist()], LONG),
    "losses_wide": lambda: plots.plot_losses(torch.logspace(4, -1, 300)),
    "losses_one": lambda: plots.plot_losses([1.0]),
    "rhat": lambda: plots.plot_rhat(1 + 0.01 * uniform(20, 10), 1000 * uniform(20, 10)),
    "rhat_one": lambda: plots.plot_rhat(torch.ones(1)),
    "pareto_k": lambda: plots.plot_pareto_k(torch.cat([0.3 + 0.2 * normal(3000), torch.tensor([torch.inf])])),
    "pareto_k_one": lambda: plots.plot_pareto_k(torch.tensor([0.3])),
    "ranks": lambda: plots.plot_ranks(torch.arange(100) % 64, 63),
    "ranks_one": lambda: plots.plot_ranks(torch.tensor([1]), 1),
}


@pytest.mark.parametrize("name", PICTURES)
def test_picture_is_white_labelled_and_fits(name: str) -> None:
    """It can be written in both forms without a warning; no text leaves the figure, and no two tick labels meet."""
    figure = PICTURES[name]()
    assert figure.get_facecolor() == (1, 1, 1, 1) and figure.get_figwidth() == 5
    assert figure.canvas.manager is None  # pyplot does not hold it
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for form, start in (("svg", b"<?xml"), ("png", b"\x89PNG")):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=form)
            assert buffer.getvalue().startswith(start) and len(buffer.getvalue()) < 2_000_000
    box = figure.get_tightbbox()
    assert box.x0 >= -0.01 and box.y0 >= -0.01
    assert box.x1 <= figure.get_figwidth() + 0.01 and box.y1 <= figure.get_figheight() + 0.01
    for axes in (axes for axes in figure.axes if axes.get_label() != "<colorbar>"):
        assert axes.get_window_extent().width > 200 and axes.get_window_extent().height > 15
        assert axes.get_xlabel() or axes.get_shared_x_axes().get_siblings(axes) != [axes]
        for axis, side in ((axes.xaxis, 0), (axes.yaxis, 1)):
            shown = [t for t in axis.get_ticklabels() if t.get_text() and t.get_visible()]
            assert all(float(t.get_fontsize()) >= 9 for t in shown)
            spans = sorted(
                (e.x0, e.x1) if side == 0 else (e.y0, e.y1)
                for t in shown
                if _is_inside(axes, (e := t.get_window_extent()), side)
            )
            assert all(before[1] <= after[0] + 2 for before, after in zip(spans, spans[1:], strict=False)), spans


def _is_inside(axes: Axes, extent: Any, side: int) -> bool:
    """Whether the middle of a tick label is along the axis: others, beyond its limits, are not drawn."""
    area = axes.get_window_extent()
    middle = (extent.x0 + extent.x1) / 2 if side == 0 else (extent.y0 + extent.y1) / 2
    return bool((area.x0 if side == 0 else area.y0) - 1 <= middle <= (area.x1 if side == 0 else area.y1) + 1)


def test_lines_differ_without_colour() -> None:
    styles = [(style["linestyle"], style["marker"]) for style in line_styles(24)]
    assert len(set(styles)) == 24


def test_spread_keeps_the_ends() -> None:
    assert spread(range(10), 4) == [0, 3, 6, 9]
    assert spread("abc", 5) == ["a", "b", "c"]


# ------------------------------------------------------------------------------------------------- reliability


def test_reliability_by_hand() -> None:
    """Confidence 0.6, right once of twice, and 0.9, right three times of four, in the last two of four bins."""
    probs = torch.tensor([[0.6, 0.4]] * 2 + [[0.1, 0.9]] * 4)
    figure = plots.plot_reliability(probs, torch.tensor([0, 1, 1, 1, 1, 0]), bins=4)
    upper, lower = figure.axes
    assert data(line(upper, "perfect")) == ([0, 1], [0, 1])
    (bars,) = upper.containers
    points, caps, (error_lines,) = bars.lines  # type: ignore[attr-defined]
    np.testing.assert_allclose(points.get_xdata(), [0.6, 0.9], rtol=1e-6)
    np.testing.assert_allclose(points.get_ydata(), [0.5, 0.75])
    z = stats.norm.ppf(0.975)
    for segment, (right, n) in zip(error_lines.get_segments(), ((1, 2), (3, 4)), strict=True):
        share = right / n
        centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
        np.testing.assert_allclose(segment[:, 1], [centre - half, centre + half], rtol=1e-9)
    # ECE = 2/6 |0.5 - 0.6| + 4/6 |0.75 - 0.9| = 0.8 / 6
    assert bars.get_label() == "bins, ECE 0.133"
    np.testing.assert_allclose([bar.get_height() for bar in lower.patches], [0, 0, 2 / 6, 4 / 6])  # type: ignore[attr-defined]
    np.testing.assert_allclose([bar.get_x() for bar in lower.patches], [0, 0.25, 0.5, 0.75])  # type: ignore[attr-defined]
    np.testing.assert_allclose([bar.get_width() for bar in lower.patches], 0.25)  # type: ignore[attr-defined]


@pytest.mark.parametrize("adaptive", [False, True])
def test_reliability_takes_bins_too(adaptive: bool) -> None:
    probs, y = labelled()
    first = plots.plot_reliability(probs, y, 7, adaptive)
    second = plots.plot_reliability(reliability(probs, y, 7, adaptive))
    heights = [[bar.get_height() for bar in f.axes[1].patches] for f in (first, second)]  # type: ignore[attr-defined]
    assert heights[0] == heights[1] and len(heights[0]) == 7
    assert heights[0] == pytest.approx([1 / 7] * 7, abs=2 / 500) if adaptive else sum(heights[0]) == pytest.approx(1)


def test_reliability_at_the_edges() -> None:
    """One bin; one datum; always right with certainty, whose error bars may not be negative."""
    probs, y = labelled()
    points = plots.plot_reliability(probs, y, bins=1).axes[0].containers[0].lines[0]  # type: ignore[attr-defined]
    np.testing.assert_allclose(points.get_xdata(), [probs.amax(1).mean()])
    np.testing.assert_allclose(points.get_ydata(), [(probs.argmax(1) == y).double().mean()])
    certain = plots.plot_reliability(torch.eye(3)[[0, 1, 2, 2]], torch.tensor([0, 1, 2, 2]))
    assert certain.axes[0].containers[0].get_label() == "bins, ECE 0.000"
    plots.plot_reliability(torch.full((5, 2), 0.5), torch.zeros(5, dtype=torch.long), adaptive=True)
    share = torch.tensor([1 + 4e-16], dtype=torch.float64)  # as sums of shares round
    plots.plot_reliability(ReliabilityBins(share, share, torch.tensor([3]), torch.tensor([0.0, 1.0])))


def test_reliability_refuses() -> None:
    probs, y = labelled()
    with pytest.raises(ValueError, match="y is missing"):
        plots.plot_reliability(probs)
    with pytest.raises(ValueError, match="distribution"):
        plots.plot_reliability(torch.full((3, 2), torch.nan), y[:3])
    empty = torch.zeros(2)
    with pytest.raises(ValueError, match="empty"):
        plots.plot_reliability(ReliabilityBins(empty, empty, empty, torch.zeros(3)))


# ----------------------------------------------------------------------------------------------- risk, coverage


def test_risk_coverage_by_hand() -> None:
    """Sorted by confidence the losses are 0, 1, 0, 1: risks 0, 1/2, 1/3, 1/2, whose mean is 1/3."""
    confidence, loss = torch.tensor([0.2, 0.9, 0.4, 0.6]), torch.tensor([1.0, 0.0, 0.0, 1.0])
    figure = plots.plot_risk_coverage({"a": (confidence, loss), "b": (confidence, torch.zeros(4))})
    x, y = data(line(figure.axes[0], "a"))
    assert x == [0.25, 0.5, 0.75, 1.0]
    assert y == pytest.approx([0, 1 / 2, 1 / 3, 1 / 2])
    assert legend(figure) == ["a: AURC 0.3333", "b: AURC 0.0000"]
    first, second = figure.axes[0].lines
    assert first.get_linestyle() != second.get_linestyle()


def test_risk_coverage_of_many_data_is_thinned_with_both_ends() -> None:
    loss = uniform(50_000)
    figure = plots.plot_risk_coverage({"a": (normal(50_000), loss)})
    x, y = data(figure.axes[0].lines[0])
    assert len(x) == 1000 and x[0] == 1 / 50_000 and x[-1] == 1
    assert y[-1] == pytest.approx(float(loss.mean()))


def test_risk_coverage_refuses() -> None:
    with pytest.raises(ValueError, match="curves is empty"):
        plots.plot_risk_coverage({})
    with pytest.raises(ValueError, match="loss of a holds 1 of 2 values"):
        plots.plot_risk_coverage({"a": (torch.ones(2), torch.tensor([0.0, torch.nan]))})
    with pytest.raises(ValueError, match="confidence of a is empty"):
        plots.plot_risk_coverage({"a": (torch.ones(0), torch.ones(0))})


# ------------------------------------------------------------------------------------------ out of distribution


def test_ood_densities_share_bins_and_have_area_one() -> None:
    inside, outside = torch.tensor([0.0, 0.0, 0.0, 3.0]), torch.tensor([3.0, 1.5])
    figure = plots.plot_ood(inside, outside, score="score (nats)")
    first, second = figure.axes[0].patches
    (heights, edges, _), (others, same, _) = first.get_data(), second.get_data()  # type: ignore[attr-defined]
    np.testing.assert_allclose(edges, np.linspace(0, 3, 31))
    np.testing.assert_array_equal(edges, same)
    assert heights[0] == pytest.approx(0.75 / 0.1) and heights[-1] == pytest.approx(0.25 / 0.1)
    assert others[15] == pytest.approx(0.5 / 0.1) and others[-1] == pytest.approx(0.5 / 0.1)
    # of the 8 pairs, outside is larger in 6, and 1 is a tie: 3 is above 0 three times and ties once, 1.5 is above 0
    assert legend(figure) == ["AUROC 0.812", "inside, 4 data", "outside, 2 data"]
    assert figure.axes[0].get_xlabel() == "score (nats)"


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.lists(st.integers(0, 5), min_size=1, max_size=8))
@settings(deadline=None, max_examples=25)
def test_ood_legend_is_scikit_learns_auroc(inside: list[int], outside: list[int]) -> None:
    expected = roc_auc_score([0] * len(inside) + [1] * len(outside), inside + outside)
    figure = plots.plot_ood(torch.tensor(inside).double(), torch.tensor(outside).double())
    assert float(legend(figure)[0].removeprefix("AUROC ")) == pytest.approx(expected, abs=5.1e-4)


def test_ood_refuses() -> None:
    with pytest.raises(ValueError, match="outside is empty"):
        plots.plot_ood(torch.ones(3), torch.ones(0))
    with pytest.raises(ValueError, match="inside holds 1 of 2 values"):
        plots.plot_ood(torch.tensor([1.0, torch.nan]), torch.ones(1))
    with pytest.raises(ValueError, match="expected 1 axis"):
        plots.plot_ood(torch.ones(3, 2), torch.ones(1))


# ---------------------------------------------------------------------------------------------- regression


def test_shift_has_a_small_plot_for_each_kind() -> None:
    """Proves that each line starts without corruption and goes through its five values, kind by kind."""
    figure = plots.plot_shift({"a": shifted(1), "b": shifted(2)}, "accuracy")
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in shown] == list(IMAGE_KINDS) and legend(figure) == ["a", "b"]
    for axes, kind in zip(shown, IMAGE_KINDS, strict=True):
        for line_of, one in zip(axes.lines, (shifted(1), shifted(2)), strict=True):
            assert data(line_of) == ([0, 1, 2, 3, 4, 5], [0.95, *one[kind]["accuracy"]])
    three = plots.plot_shift({"a": shifted(0, ("noise", "blur", "jpeg"))})
    assert [axes.get_visible() for axes in three.axes] == [True, True, True, False]


def test_shifts_that_cannot_be_drawn_together_are_refused() -> None:
    for shifts, metric, message in [
        ({}, "nll", "shifts is empty"),
        (
            {"a": shifted(0), "b": shifted(0, ("noise",))},
            "nll",
            "'b' has the corruptions noise: expected those of all, noise, blur",
        ),
        ({"a": shifted(0)}, "rmse", "metric='rmse': 'a' has accuracy, nll, ece"),
    ]:
        with pytest.raises(ValueError, match=message):
            plots.plot_shift(shifts, metric)


def test_calibration_curve_by_hand() -> None:
    """PIT values 0.5, 0.6, 0.02, 0.99 are on the bounds of the levels 0, 0.2, 0.96, 0.98."""
    figure = plots.plot_calibration_curve(torch.tensor([0.5, 0.61, 0.02, 0.99]))
    (axes,) = figure.axes
    x, y = data(line(axes, "4 data"))
    assert x == pytest.approx([i / 20 for i in range(1, 20)])
    assert y == [0.25] * 4 + [0.5] * 15
    (shade,) = axes.collections
    for level in (0.05, 0.5, 0.95):
        assert band(shade, level) == pytest.approx(tuple(v / 4 for v in stats.binom.interval(0.95, 4, level)))  # type: ignore[arg-type]


def test_calibration_curve_of_a_calibrated_model_is_in_its_band() -> None:
    """Evenly spaced PIT values lie on the diagonal, those of a model with half the scale under the band."""
    even = (torch.arange(1000) + 0.5) / 1000
    axes = plots.plot_calibration_curve(even).axes[0]
    x, y = data(line(axes, "1,000 data"))
    assert y == pytest.approx(x, abs=1e-3)
    narrow = torch.distributions.Normal(0.0, 1.0).cdf(2 * torch.distributions.Normal(0.0, 1.0).icdf(even))
    axes = plots.plot_calibration_curve(narrow).axes[0]
    x, y = data(line(axes, "1,000 data"))
    assert all(share < band(axes.collections[0], level)[0] for level, share in zip(x, y, strict=True))  # type: ignore[arg-type]


def test_calibration_curve_refuses() -> None:
    with pytest.raises(ValueError, match="expected probabilities"):
        plots.plot_calibration_curve(torch.tensor([0.5, 1.5]))
    with pytest.raises(ValueError, match="NaN"):
        plots.plot_calibration_curve(torch.tensor([torch.nan]))


def test_band_is_sorted_and_holds_the_intervals() -> None:
    x, prediction = sine(20)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3))
    shuffled = pb.Prediction(prediction.outputs[..., order], prediction.likelihood)
    y = normal(20)
    (axes,) = plots.plot_band(x[order].unsqueeze(1), shuffled, y[order]).axes
    at, mean = data(line(axes, "mean"))
    assert at == x.tolist() and mean == pytest.approx(prediction.mean.tolist())
    wide, half, hatched = axes.collections
    assert [c.get_label() for c in axes.collections] == ["95% interval", "50% interval", "95% of the mean"]
    for shade, level in ((wide, 0.95), (half, 0.5)):
        low, high = prediction.interval(level)
        for i in (0, 7, 19):
            assert band(shade, float(x[i])) == pytest.approx((float(low[i]), float(high[i])))  # type: ignore[arg-type]
    sd = prediction.outputs.flatten(0, 1).std(0, correction=0)
    expected = (float(prediction.mean[7] - 1.96 * sd[7]), float(prediction.mean[7] + 1.96 * sd[7]))
    assert band(hatched, float(x[7])) == pytest.approx(expected)  # type: ignore[arg-type]
    points = sorted(zip(*data(line(axes, "data")), strict=True))
    assert points == list(zip(x.tolist(), y.tolist(), strict=True))


def test_band_with_training_data() -> None:
    x, prediction = sine()
    (axes,) = plots.plot_band(x, prediction, torch.tensor([3.0, 4.0]), torch.tensor([[1.0], [2.0]])).axes
    assert data(line(axes, "data")) == ([1, 2], [3, 4])
    (axes,) = plots.plot_band(x, prediction, x_train=torch.tensor([1.0, 2.0])).axes
    assert data(line(axes, "training inputs"))[0] == [1, 2]
    assert not [found for found in axes.lines if found.get_label() == "data"]


def test_band_of_one_output_with_an_axis() -> None:
    x, prediction = sine()
    (axes,) = plots.plot_band(x, pb.Prediction(prediction.outputs.unsqueeze(-1), None)).axes
    assert data(line(axes, "mean"))[1] == pytest.approx(prediction.mean.tolist())


def test_band_refuses() -> None:
    x, prediction = sine()
    two = pb.Prediction(normal(3, 1, 60, 2), Gaussian(0.3))
    with pytest.raises(ValueError, match=r"x has the shape \(60, 2\).*one input"):
        plots.plot_band(x.unsqueeze(1).expand(60, 2), prediction)
    with pytest.raises(ValueError, match=r"mean has the shape \(60, 2\).*one output"):
        plots.plot_band(x, two)
    with pytest.raises(ValueError, match="x has 59 rows and the prediction 60"):
        plots.plot_band(x[1:], prediction)
    with pytest.raises(ValueError, match="y has 3 rows and x_train 2"):
        plots.plot_band(x, prediction, torch.ones(3), torch.ones(2))
    with pytest.raises(ValueError, match="mean holds 60 of 60 values that are NaN"):
        plots.plot_band(x, pb.Prediction(prediction.outputs * torch.nan, None))
    with pytest.raises(TypeError, match="interval is not defined for Bernoulli"):
        plots.plot_band(x, pb.Prediction(prediction.outputs, Bernoulli()))


# ----------------------------------------------------------------------------------------------------- forests


def forest_rows(axes: Axes) -> dict[str, list[list[float]]]:
    """``{label: [thin, thick, (members,) median]}``: the x of the lines at the height of each label."""
    heights = dict(enumerate(text.get_text() for text in axes.get_yticklabels()))
    found: dict[str, list[list[float]]] = {name: [] for name in heights.values()}
    for drawn in axes.lines:
        x, y = data(drawn)
        found[heights[int(y[0])]].append(x)
    return found


def test_forest_by_hand() -> None:
    """0 ... 100 has the quantiles 3, 25, 50, 75 and 97; members are pooled, and their medians marked."""
    values = torch.arange(101.0)
    (axes,) = plots.plot_forest({"a": values.unsqueeze(1)}).axes
    assert forest_rows(axes) == {"a": [[3, 97], [25, 75], [50]]}
    (axes,) = plots.plot_forest({"a": torch.stack([values[:-1:2], values[1::2]], 1)}).axes
    thin, thick, members, median = forest_rows(axes)["a"]
    assert (members, median) == ([49, 50], [49.5])
    assert thin == pytest.approx(np.quantile(np.arange(100), [0.03, 0.97]).tolist())
    assert thick == pytest.approx(np.quantile(np.arange(100), [0.25, 0.75]).tolist())


def test_forest_marks_the_median_of_each_member() -> None:
    (axes,) = plots.plot_forest({"a": torch.tensor([[0.0, 1.0], [1.0, 2.0], [20.0, 30.0]])}).axes
    assert forest_rows(axes)["a"][2] == [1, 2]


def test_forest_of_layers() -> None:
    """A site of several elements has a row for their mean and one for their standard deviation, in panels of a kind."""
    draws = {"fc.weight_tau": torch.full((5, 2), 0.5), "fc.weight.s": normal(5, 2, 7), "noise": torch.ones(5, 2)}
    axes = {panel.get_xlabel(): forest_rows(panel) for panel in plots.plot_forest(draws).axes}
    assert {name: list(found) for name, found in axes.items()} == {
        "hyper-scale tau": ["fc.weight"],
        "mean over the elements": ["fc.weight.s"],
        "standard deviation over the elements": ["fc.weight.s"],
        "value": ["noise"],
    }
    assert axes["hyper-scale tau"]["fc.weight"][-1] == [0.5]
    for kind, values in (
        ("mean", draws["fc.weight.s"].mean(2)),
        ("standard deviation", normal(5, 2, 7).numpy().std(2)),
    ):
        assert axes[f"{kind} over the elements"]["fc.weight.s"][-1] == pytest.approx([float(np.median(values))])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("members", [1, 3])
def test_forest_of_an_arviz_object_is_that_of_its_draws(members: int) -> None:
    """Layers, which the ArviZ object has as a dimension, are rows under the names of their sites."""
    sites = {
        "one.weight_tau": uniform(20, members, seed=1),
        "two.weight_tau": uniform(20, members, seed=2),
        "one.weight.s": normal(20, members, 4, seed=3),
        "two.weight.s": normal(20, members, 6, seed=4),
        "noise": uniform(20, members, seed=5),
    }
    table = torch.full((20, members, 5, 2), 0.5, dtype=torch.float64)
    posterior = FakePosterior(table, Categorical(), sites=sites)
    stored: Any = to_arviz(posterior, rows(5), groups="posterior", probes=rows(2), num_samples=20)  # type: ignore[arg-type]
    for given_by_draws, by_arviz in zip(plots.plot_forest(sites).axes, plots.plot_forest(stored).axes, strict=True):
        first, second = forest_rows(given_by_draws), forest_rows(by_arviz)
        assert set(first) == set(second)
        for name, lines in first.items():
            for mine, theirs in zip(lines, second[name], strict=True):
                np.testing.assert_allclose(mine, theirs, rtol=1e-5)


def test_forest_says_what_it_leaves_out() -> None:
    draws = layers()
    figure = plots.plot_forest(draws)
    assert [len(axes.get_yticklabels()) for axes in figure.axes] == [16, 16, 16, 1]
    assert figure.get_supxlabel() == ""
    more = {f"{i:02}.weight_tau": torch.ones(2, 1) for i in range(40)}
    figure = plots.plot_forest(more)
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert len(labels) == 16 and labels[0] == "00.weight" and labels[-1] == "39.weight"
    assert figure.get_supxlabel() == "24 of 40 rows left out"
    figure = plots.plot_forest(more, names=list(more))
    assert len(figure.axes[0].get_yticklabels()) == 40 and figure.get_supxlabel() == ""


def test_forest_axis_is_logarithmic_for_wide_positive_values() -> None:
    wide = {"a_tau": torch.full((3, 1), 1e-3), "b_tau": torch.ones(3, 1), "c": torch.ones(3, 1)}
    tau, value = plots.plot_forest(wide).axes
    assert tau.get_xscale() == "log" and value.get_xscale() == "linear"


def test_forest_refuses() -> None:
    with pytest.raises(ValueError, match="there is no row 'b'; the rows are a"):
        plots.plot_forest({"a": torch.ones(2, 1)}, names=["b"])
    with pytest.raises(ValueError, match="a holds 1 of 2 values"):
        plots.plot_forest({"a": torch.tensor([[1.0], [torch.nan]])})
    with pytest.raises(ValueError, match=r"expected \[draws, members"):
        plots.plot_forest({"a": torch.ones(2)})
    with pytest.raises(ValueError, match="no sites"):
        plots.plot_forest({})
    with pytest.raises(TypeError, match="got list"):
        plots.plot_forest([1])


# --------------------------------------------------------------------------------------------------- inclusion


def test_inclusion_maps() -> None:
    vector, matrix, conv = uniform(5), uniform(3, 4), uniform(2, 3, 4, 5)
    figure = plots.plot_inclusion(
        {"a": vector, "b": matrix, "c": conv, "d": uniform(2, 3, 4), "e": uniform(2, 1, 2, 3, 4)}
    )
    first, second, third, fourth, fifth = (np.asarray(axes.images[0].get_array()) for axes in figure.axes[:5])
    np.testing.assert_array_equal(first, vector.numpy()[None])
    np.testing.assert_array_equal(second, matrix)
    assert third.shape == (2 * 4, 3 * 5)
    for o in range(2):
        for i in range(3):
            np.testing.assert_array_equal(third[4 * o : 4 * o + 4, 5 * i : 5 * i + 5], conv[o, i])
    assert fourth.shape == (2, 3 * 4) and fifth.shape == (2 * 2, 1 * 12)
    assert [axes.images[0].get_clim() for axes in figure.axes[:5]] == [(0, 1)] * 5
    share = round(100 * float((matrix > 0.5).double().mean()))
    assert figure.axes[1].get_title(loc="left") == f"b: {share}% of 12 above 1/2"


def test_inclusion_of_many_groups_is_a_histogram() -> None:
    values = torch.cat([torch.full((60_000,), 0.01), torch.full((40_001,), 0.99)])
    (axes,) = plots.plot_inclusion({"a": values}).axes
    heights = [bar.get_height() for bar in axes.patches]  # type: ignore[attr-defined]
    assert heights == [60_000, *[0] * 18, 40_001] and not axes.images


def test_inclusion_says_what_it_leaves_out() -> None:
    figure = plots.plot_inclusion({str(i): uniform(3) for i in range(11)})
    titles = [axes.get_title(loc="left").split(":")[0] for axes in figure.axes if axes.get_title(loc="left")]
    assert titles == ["0", "2", "4", "6", "8", "10"]
    assert figure.get_supxlabel() == "5 of 11 parameters left out"


def test_inclusion_refuses() -> None:
    with pytest.raises(ValueError, match="spike-and-slab"):
        plots.plot_inclusion({})
    with pytest.raises(ValueError, match=r"a lies in \[2, 2\]"):
        plots.plot_inclusion({"a": torch.full((2,), 2.0)})
    with pytest.raises(ValueError, match="a holds 2 of 2 values"):
        plots.plot_inclusion({"a": torch.full((2,), torch.nan)})


# ---------------------------------------------------------------------------------------------------- members


def test_distances_of_members_by_hand() -> None:
    """Draws of a member are averaged first; then half the sum of absolute differences, averaged over rows."""
    p = torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]]])
    expected = torch.tensor([[0.0, 0.5], [0.5, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(plots.member_distances(pb.Prediction(p.log()[None], Categorical())), expected)
    bernoulli = pb.Prediction(torch.logit(p[None, ..., 1]), Bernoulli())
    torch.testing.assert_close(plots.member_distances(bernoulli), expected)
    draws = torch.tensor([[[3.0, 1.0], [0.0, 0.0]], [[5.0, 1.0], [0.0, 4.0]]])
    # means of the members (4, 1) and (0, 2): sqrt((16 + 1) / 2)
    rms = plots.member_distances(pb.Prediction(draws, Gaussian(1.0)))
    assert float(rms[0, 1]) == pytest.approx(8.5**0.5) and rms.diagonal().tolist() == [0, 0]


@given(st.integers(1, 6), st.integers(1, 4), st.integers(2, 5), st.integers(0, 1000))
@settings(deadline=None, max_examples=25)
def test_total_variation_of_members_is_a_distance(members: int, n: int, classes: int, seed: int) -> None:
    found = plots.member_distances(pb.Prediction(3 * normal(2, members, n, classes, seed=seed), Categorical()))
    assert found.shape == (members, members)
    assert float(found.min()) >= 0 and float(found.max()) <= 1 + 1e-12
    torch.testing.assert_close(found, found.T)
    assert bool((found[:, None] <= found[:, :, None] + found[None] + 1e-12).all())
    p = torch.softmax(3 * normal(2, members, n, classes, seed=seed), -1).mean(0)
    by_hand = (p[:, None] - p[None]).abs().sum(-1).mean(-1) / 2
    torch.testing.assert_close(found, by_hand)


def test_distances_of_a_sequence_of_labels_are_over_all_of_them() -> None:
    logits = normal(1, 3, 4, 5, 6)
    whole = plots.member_distances(pb.Prediction(logits, Categorical()))
    torch.testing.assert_close(whole, plots.member_distances(pb.Prediction(logits.flatten(2, 3), Categorical())))


def test_particles() -> None:
    distances = torch.tensor([[0.0, 2.0], [2.0, 0.0]])
    axes, bar = plots.plot_particles(distances).axes
    np.testing.assert_array_equal(np.asarray(axes.images[0].get_array()), distances)
    assert [text.get_text() for text in axes.texts] == ["0", "2", "2", "0"] and bar.get_ylabel() == "distance"
    prediction = pb.Prediction(normal(2, 3, 4, 5), Categorical())
    axes, bar = plots.plot_particles(prediction).axes
    np.testing.assert_allclose(np.asarray(axes.images[0].get_array()), plots.member_distances(prediction))
    assert bar.get_ylabel() == "mean total variation"
    assert "unit of y" in plots.plot_particles(pb.Prediction(normal(2, 3, 4), Gaussian(1.0))).axes[1].get_ylabel()
    assert not plots.plot_particles(torch.zeros(9, 9)).axes[0].texts


def test_particles_refuse() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 3\)"):
        plots.plot_particles(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="NaN"):
        plots.plot_particles(torch.full((2, 2), torch.nan))


# ------------------------------------------------------------------------------------------------------ losses


def test_losses_and_their_running_mean() -> None:
    """60 steps have a window of three: the mean of a step and its neighbours."""
    values = normal(60)
    (axes,) = plots.plot_losses(values.tolist()).axes
    assert data(line(axes, "each step")) == (list(range(1, 61)), values.tolist())
    running = data(line(axes, "mean of 3 steps"))[1]
    assert running[0] == pytest.approx(float(values[:2].mean())) and running[-1] == pytest.approx(
        float(values[-2:].mean())
    )
    assert running[1:-1] == pytest.approx(values.unfold(0, 3, 1).mean(1).tolist())
    assert axes.get_yscale() == "linear"


def test_losses_that_are_not_finite_are_marked_and_not_averaged() -> None:
    values = [1.0] * 60
    values[10], values[20] = float("nan"), float("inf")
    figure = plots.plot_losses(values)
    (axes,) = figure.axes
    assert data(line(axes, "not finite: 2"))[0] == [11, 21]
    assert data(line(axes, "mean of 3 steps"))[1] == pytest.approx([1.0] * 60)
    assert legend(figure) == ["each step", "mean of 3 steps", "not finite: 2"]


@pytest.mark.parametrize(
    ("values", "scale"), [([1.0, 101.0], "log"), ([1.0, 99.0], "linear"), ([-1.0, 1000.0], "linear")]
)
def test_losses_are_logarithmic_over_two_decades(values: list[float], scale: str) -> None:
    assert plots.plot_losses(values).axes[0].get_yscale() == scale


def test_losses_carry_a_verdict() -> None:
    assert plots.plot_losses([1.0, 2.0], LONG).get_suptitle().replace("\n", " ") == LONG
    assert plots.plot_losses([1.0, 2.0]).get_suptitle() == ""


@pytest.mark.parametrize(
    ("losses", "sentence"),
    [
        ([1.0] * 500, "The loss has converged."),
        ([500.0 - i for i in range(500)], "The loss is still falling: longer training would lower it."),
        ([500.0 - i for i in range(250)] + [251.0 + i for i in range(250)], "The loss rises towards the end"),
        ([1.0, float("nan")], "The loss is not finite at the end: training diverged."),
        ([1.0, 2.0], "There are too few steps to tell whether the loss has converged."),
    ],
    ids=["converged", "falling", "rising", "diverged", "unknown"],
)
def test_losses_carry_the_verdict_on_them(losses: list[float], sentence: str) -> None:
    shown = plots.plot_losses(losses, loss_verdict(losses)).get_suptitle()
    assert shown.replace("\n", " ").startswith(sentence)


@pytest.mark.slow
def test_plots_are_there_without_an_import_of_their_own() -> None:
    """Proves that a new interpreter reaches the pictures, and that what is lazy is listed."""
    code = "import pyro_bnn as pb; assert {'plots', 'evaluate'} <= set(dir(pb.diagnostics)); "
    subprocess.run([sys.executable, "-c", code + "pb.diagnostics.plots.plot_losses([1.0])"], check=True)


def test_losses_refuse() -> None:
    with pytest.raises(ValueError, match="losses is empty"):
        plots.plot_losses([])
    with pytest.raises(ValueError, match="no finite value in 2 steps"):
        plots.plot_losses([float("nan")] * 2)


# ------------------------------------------------------------------------------------------------- convergence


def test_rhat_and_ess() -> None:
    rhat, ess = torch.tensor([[1.0, 1.005], [1.01, 1.3]], dtype=torch.float64), torch.tensor([399.0, 400.0, 401.0])
    upper, lower = plots.plot_rhat(rhat, ess).axes
    assert (
        upper.get_title(loc="left") == "2 of 4 not under 1.01" and lower.get_title(loc="left") == "2 of 3 not over 400"
    )
    assert data(upper.lines[0])[0] == [1.01, 1.01] and data(lower.lines[0])[0] == [400, 400]
    counts, edges, _ = upper.patches[0].get_data()  # type: ignore[attr-defined]
    np.testing.assert_allclose(edges, np.linspace(1, 1.3, 31))
    assert counts.tolist() == [2, 1, *[0] * 27, 1]
    assert lower.patches[0].get_data()[0].sum() == 3  # type: ignore[attr-defined]


def test_rhat_refuses() -> None:
    with pytest.raises(ValueError, match="rhat holds 1 of 2 values"):
        plots.plot_rhat(torch.tensor([1.0, torch.nan]))
    with pytest.raises(ValueError, match="ess is empty"):
        plots.plot_rhat(torch.ones(2), torch.ones(0))


def test_pareto_k_is_sorted_into_its_four_kinds() -> None:
    k = torch.tensor([0.5, 0.7, 1.0, 0.51, 2.0, -0.1, torch.inf])
    figure = plots.plot_pareto_k(k)
    (axes,) = figure.axes
    found = [data(line(axes, name)) for name in ("k ≤ 0.5", "0.5 < k", "0.7 < k", "k > 1")]
    assert [x for x, _ in found] == [[0, 5], [1, 3], [2], [4, 6]]
    assert found[3][1] == pytest.approx([2.0, 2.2])
    assert [text.rsplit(": ")[1] for text in legend(figure)] == ["2", "2", "1", "2"]
    levels = [data(drawn)[1][0] for drawn in axes.lines if str(drawn.get_label()).startswith("_")]
    assert levels == [0.5, 0.7, 1.0]


def test_pareto_k_refuses() -> None:
    with pytest.raises(ValueError, match="k holds 1 values that are NaN"):
        plots.plot_pareto_k(torch.tensor([torch.nan, 0.1]))


def test_ranks_by_hand() -> None:
    """Ranks 0, 0, 1, 3 of 0 ... 3: shares 2/4, 3/4, 3/4 at 1/4, 2/4, 3/4, and 0 at both ends."""
    figure = plots.plot_ranks(torch.tensor([0, 0, 1, 3]), 3)
    x, y = data(line(figure.axes[0], "4 simulations"))
    assert x == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert y == pytest.approx([0, 0.25, 0.25, 0, 0])


def test_uniform_ranks_are_in_the_band_and_those_of_half_the_scale_are_not() -> None:
    """The ranks of a posterior with half the scale are those of twice the normal score of uniform ones."""
    z = stats.norm.ppf((np.arange(640) + 0.5) / 640)
    for factor, inside in ((1, True), (2, False)):
        ranks = torch.from_numpy((64 * stats.norm.cdf(factor * z)).astype(int))
        (axes,) = plots.plot_ranks(ranks, 63).axes
        bounds = [band(axes.collections[0], i / 64) for i in range(1, 64)]  # type: ignore[arg-type]
        curve = data(line(axes, "640 simulations"))[1][1:-1]
        assert all(low <= value <= high for value, (low, high) in zip(curve, bounds, strict=True)) == inside


def test_ranks_of_several_elements() -> None:
    (axes,) = plots.plot_ranks(torch.randint(8, (50, 5, 7)), 7).axes
    assert len([drawn for drawn in axes.lines if len(data(drawn)[0]) == 9]) == 20


def test_ranks_refuse() -> None:
    with pytest.raises(ValueError, match="in 0 ... 3"):
        plots.plot_ranks(torch.tensor([4]), 3)
    with pytest.raises(ValueError, match="ranks is empty"):
        plots.plot_ranks(torch.tensor([]), 3)
