"""Helpers that all plots share: new figures, checked numbers, and line styles that differ without colour."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any, TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from torch import Tensor

#: width of every figure in inches: on a page 360 pixels wide a point is then a pixel, so 10 point text is legible
WIDTH = 5.0
#: size in points of notes, the smallest text
SMALL = 9
#: share of the probability that bands and error bars hold
LEVEL = 0.95
#: number of points above which a line or cloud is rasterised in an SVG, to keep the file small
MANY = 2000

_Item = TypeVar("_Item")


def new_figure(height: float) -> Figure:
    """A figure that ``pyplot`` does not know, so that it is freed when the caller drops it."""
    return Figure(figsize=(WIDTH, height), layout="constrained")


def numbers(name: str, values: object, dims: int | None = 1, finite: bool = True) -> np.ndarray:
    """Converts a tensor on any device, or anything array-like, to a float64 array.

    :param name: name of the argument, for messages.
    :param dims: the number of axes that it must have; ``None`` accepts any number and flattens the array.
    :param finite: whether NaN and infinite values are refused.
    :raises ValueError: when it is empty, has another number of axes, or holds a value that is not finite.
    """
    array: np.ndarray
    array = values.detach().cpu().double().numpy() if isinstance(values, Tensor) else np.asarray(values, dtype=float)
    array = array.reshape(-1) if dims is None else array
    if dims is not None and array.ndim != dims:
        raise ValueError(f"{name} has the shape {array.shape}: expected {dims} {'axis' if dims == 1 else 'axes'}")
    if not array.size:
        raise ValueError(f"{name} is empty: there is nothing to draw")
    if finite and (bad := int((~np.isfinite(array)).sum())):
        raise ValueError(f"{name} holds {bad} of {array.size} values that are NaN or infinite: drop or replace them")
    return array


def probabilities(name: str, values: object, dims: int | None = 1) -> np.ndarray:
    """The same as :func:`numbers`, for values in [0, 1].

    :raises ValueError: as :func:`numbers`, and when a value is outside [0, 1].
    """
    array = numbers(name, values, dims)
    if array.min() < 0 or array.max() > 1:
        raise ValueError(f"{name} lies in [{array.min():g}, {array.max():g}]: expected probabilities, in [0, 1]")
    return array


def line_styles(count: int) -> list[dict[str, Any]]:
    """Keyword arguments of ``plot`` for several lines that also differ without colour."""
    styles = [{"linestyle": line, "marker": marker} for marker, line in product(" osD^v", ("-", "--", "-.", ":"))]
    return [{**styles[i % len(styles)], "color": f"C{i % 10}", "markersize": 4} for i in range(count)]


def log_if_wide(axes: Axes, axis: str, values: np.ndarray) -> None:
    """Makes an axis logarithmic if the values are positive and span more than two decades."""
    if values.min() > 0 and values.max() > 100 * values.min():
        axes.set(**{f"{axis}scale": "log"})
        (axes.xaxis if axis == "x" else axes.yaxis).set_minor_formatter(NullFormatter())


def spread(items: Sequence[_Item], most: int) -> list[_Item]:
    """At most ``most`` of the items, evenly spaced, including the first and the last."""
    index = np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int)
    return [items[i] for i in index]


def legend_below(figure: Figure, columns: int = 1, title: str | None = None) -> None:
    """Adds one legend of all labelled artists below the axes, where it covers nothing."""
    figure.legend(loc="outside lower center", ncols=columns, title=title, frameon=False)
