"""Split conformal prediction: sets and intervals with guaranteed coverage, however wrong the posterior is.

Each of n held-out data gets a score, which is large if y surprises the posterior. A candidate value of y belongs to the
prediction if its score is at most the k-th smallest of the n scores, k = ceil((n + 1) level). If the held-out data and
the new datum are exchangeable, then

level <= P(y in prediction) <= level + 1 / (n + 1),

where the upper bound requires scores without ties. For given held-out data the coverage is a random number with the
distribution Beta(k, n + 1 - k). The probability is an average over x: in a region of x it may be lower. The held-out
data must not have been used to train the posterior.

The threshold is itself the score of a held-out row, and the same row in a batch of another size may get a slightly
larger score by rounding. Scores are therefore compared with a tolerance of eps^(3/4), 6e-6 in float32 and 2e-12 in
float64, in units of probability or relative to the size of the bounds. This can only raise the coverage. Bounds of
counts are whole numbers and need no tolerance.

Source: Vovk, Gammerman and Shafer (2005); Angelopoulos and Bates (2021).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from pyro_bnn.entry import checks
from pyro_bnn.inputs import Data, Inputs
from pyro_bnn.likelihoods import Bernoulli
from pyro_bnn.predicting import kept, labelled, log_density, predict_batches, predict_inputs, require_posterior
from pyro_bnn.randomness import some_seed

if TYPE_CHECKING:
    from pyro_bnn.posterior import Posterior, Prediction

SetScore = Literal["aps", "lac"]


class _SplitConformal:
    """What sets and intervals share: the threshold, and the same draws for held-out and new data."""

    kinds: tuple[str, ...]

    def __init__(
        self,
        posterior: Posterior,
        data: Data,
        level: float = 0.9,
        *,
        num_samples: int | None = None,
        batch_size: int | None = None,
        seed: int | None = None,
    ) -> None:
        checks.share("level", level)
        require_posterior(posterior)
        likelihood = getattr(posterior.model, "likelihood", None)
        if getattr(likelihood, "kind", None) not in self.kinds:
            raise TypeError(
                f"{type(self).__name__} is for {' and '.join(self.kinds)}, but this posterior has {likelihood!r}; "
                "ConformalSets is for classification, ConformalIntervals for regression and count"
            )
        self.posterior, self.level = posterior, level
        settings: dict[str, Any] = {"num_samples": num_samples, "batch_size": batch_size, "seed": some_seed(seed)}
        self._settings = settings
        scores = []
        for x, prediction, y in predict_batches(posterior, data, **self._settings):
            self._example = x
            scores.append(self._score(prediction, y))
        joined = _joined(scores, "data")
        self.num_rows, self.threshold = len(joined), _threshold(joined, level)

    def __repr__(self) -> str:
        """The level, the options of the class, the number of held-out rows and the threshold."""
        values = self.threshold.flatten()
        some = ", ".join(f"{float(value):.4g}" for value in values[:4]) + (", ..." if len(values) > 4 else "")
        threshold = some if self.threshold.dim() == 0 else f"[{some}]"
        kind = "".join(f"{name}={value!r}, " for name, value in self._kind().items())
        return f"{type(self).__name__}(level={self.level}, {kind}num_rows={self.num_rows}, threshold={threshold})"

    def _kind(self) -> dict[str, object]:
        return {}

    def _score(self, prediction: Prediction, y: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define _score()")

    def _predictions(self, x: Inputs) -> Iterable[Prediction]:
        batches = predict_inputs(self.posterior, x, like=self._example, **self._settings)
        return (prediction for prediction, _ in batches)


class ConformalSets(_SplitConformal):
    r"""Sets of classes that contain the true class with probability ``level``.

    With class probabilities p, and u uniform on (0, 1) for each row (``randomised=True``) or 0, the score of class c is

    ``"aps"``   sum_{c'} p_c' [c' more probable than c] + u p_c
    ``"lac"``   1 - p_c

    APS adapts to each x: it adds classes from the most probable down until their probabilities sum to the threshold.
    Without u a set always contains the most probable class, so the coverage exceeds ``level`` if the accuracy does.
    With u the coverage is exact, but some sets are empty, and each call of ``predict`` draws a new u. LAC has the
    smallest sets on average, but they can be empty if the posterior is uncertain, and are too small for hard x.

    :param posterior: any posterior with a Categorical likelihood, or a Bernoulli with one output (classes 0 and 1).
    :param data: held-out data: a ``DataLoader`` of ``(x, y)``, a ``Dataset`` of such pairs, or one pair;
        one label for each row.
    :param level: the coverage, in (0, 1).
    :param score: ``"aps"`` or ``"lac"``.
    :param randomised: whether APS draws u; LAC has no u.
    :param num_samples: draws from every member.
    :param batch_size: the most rows in one forward pass.
    :param seed: of u, and of the draws, which are the same for held-out and new data.
    :raises TypeError: when the likelihood is not a classification, or data or y has the wrong type.
    :raises ValueError: when data has too few rows for the level (ceil(level / (1 - level)) are needed), y does not fit
        the likelihood or has several labels in a row, a prediction holds NaN, level or score is out of range, or
        ``randomised`` is set for LAC.

    ``threshold`` is the k-th smallest score, a scalar; ``num_rows`` is the number n of held-out data.

    Source: Romano, Sesia and Candes (2020) for APS; Sadinle, Lei and Wasserman (2019) for LAC.
    """

    kinds = ("classification",)

    def __init__(
        self,
        posterior: Posterior,
        data: Data,
        level: float = 0.9,
        *,
        score: SetScore = "aps",
        randomised: bool = False,
        num_samples: int | None = None,
        batch_size: int | None = None,
        seed: int | None = None,
    ) -> None:
        if score not in get_args(SetScore):
            raise ValueError(f"score={score!r}: expected one of {', '.join(get_args(SetScore))}")
        if randomised and score != "aps":
            raise ValueError(f"randomised=True: expected score='aps', got score={score!r}, which is not randomised")
        seed = some_seed(seed)
        self.score, self.randomised = score, randomised
        # The u of held-out and new data must be independent of each other and of the draws: one generator of their own.
        self._uniforms = torch.Generator().manual_seed(seed + 1)
        super().__init__(posterior, data, level, num_samples=num_samples, batch_size=batch_size, seed=seed)

    def predict(self, x: Inputs) -> Tensor:
        """The sets of classes, as booleans ``[N, C]``: whether each class is in the set of each row.

        :param x: inputs of the network, or a ``DataLoader`` or ``Dataset`` of them; labels in it are ignored.
        :raises ValueError: when x has no rows, or a prediction holds NaN.
        """
        return _joined([self._sets(prediction) for prediction in self._predictions(x)], "x")

    def evaluate(self, data: Data) -> dict[str, float]:
        """``coverage``, the share of rows whose set contains y, and ``size``, the mean number of classes in a set.

        :param data: ``(x, y)`` that was used neither for training nor for calibration, in any form that the constructor
            accepts.
        :raises ValueError: when data is empty, y does not fit the likelihood, or a prediction holds NaN.
        """
        covered, sizes = [], []
        for _, prediction, y in predict_batches(self.posterior, data, **self._settings):
            sets = kept(self._sets(prediction), labelled(prediction, y))
            covered.append(sets.gather(1, _labels(prediction, y)))
            sizes.append(sets.sum(1))
        return {"coverage": _mean(_joined(covered, "data")), "size": _mean(_joined(sizes, "data"))}

    def _kind(self) -> dict[str, object]:
        return {"score": self.score, "randomised": self.randomised}

    def _score(self, prediction: Prediction, y: Tensor) -> Tensor:
        scores = self._scores(prediction)  # refuses several labels in a row
        return kept(scores, labelled(prediction, y)).gather(1, _labels(prediction, y)).squeeze(1)

    def _sets(self, prediction: Prediction) -> Tensor:
        scores = self._scores(prediction)
        return scores <= self.threshold + _rounding(scores.dtype)

    def _scores(self, prediction: Prediction) -> Tensor:
        """``[N, C]``: the score that each class would have."""
        probs = _class_probabilities(prediction)
        if self.score == "lac":
            return 1 - probs
        ordered, order = probs.sort(dim=1, descending=True, stable=True)
        above = ordered.cumsum(1) - ordered
        if self.randomised:
            above = above + torch.rand(len(probs), 1, generator=self._uniforms).to(probs) * ordered
        return torch.empty_like(above).scatter(1, order, above)


class ConformalIntervals(_SplitConformal):
    """Intervals that contain y with probability ``level``, for a regression or counts.

    With the posterior's own central interval [low, high] of this level, the score of y is max(low - y, y - high). The
    conformal interval is [low - q, high + q] with the threshold q, in the unit of y. q is positive if the posterior's
    intervals are too narrow and negative if they are too wide; an interval with low > high after that is empty. If y
    has several numbers, each has its own threshold and its own coverage.

    :param posterior: any posterior with a likelihood for regression or counts.
    :param data: held-out data: a ``DataLoader`` of ``(x, y)``, a ``Dataset`` of such pairs, or one pair.
    :param level: the coverage, in (0, 1).
    :param num_samples: draws from every member.
    :param batch_size: the most rows in one forward pass.
    :param seed: of the draws, which are the same for held-out and new data.
    :raises TypeError: when the likelihood is a classification, or data or y has the wrong type.
    :raises ValueError: when data has too few rows for the level (ceil(level / (1 - level)) are needed), y does not fit
        the likelihood, a prediction holds NaN, or level is out of range.

    ``threshold`` is q, with the shape of the y of one row; ``num_rows`` is the number n of held-out data.

    Source: Romano, Patterson and Candes (2019), eqs. 6 and 7, with the quantiles of the posterior predictive.
    """

    kinds = ("regression", "count")

    def predict(self, x: Inputs) -> tuple[Tensor, Tensor]:
        """The lower and upper bounds, ``[N, ...]`` each, in the unit of y; both belong to the interval.

        :param x: inputs of the network, or a ``DataLoader`` or ``Dataset`` of them; labels in it are ignored.
        :raises ValueError: when x has no rows, or a prediction holds NaN.
        """
        lows, highs = [], []
        for prediction in self._predictions(x):
            low, high = self._bounds(prediction)
            lows.append(low)
            highs.append(high)
        return _joined(lows, "x"), _joined(highs, "x")

    def evaluate(self, data: Data) -> dict[str, float]:
        """``coverage``, the share of y inside, and ``width``, the mean of high - low (0 for an empty interval).

        :param data: ``(x, y)`` that was used neither for training nor for calibration, in any form that the constructor
            accepts.
        :raises ValueError: when data is empty, y does not fit the likelihood, or a prediction holds NaN.
        """
        covered, widths = [], []
        for _, prediction, y in predict_batches(self.posterior, data, **self._settings):
            low, high = self._bounds(prediction)
            target = _targets(prediction, y, low)
            covered.append((low <= target) & (target <= high))
            widths.append((high - low).clamp_min(0))
        return {"coverage": _mean(_joined(covered, "data")), "width": _mean(_joined(widths, "data"))}

    def _bounds(self, prediction: Prediction) -> tuple[Tensor, Tensor]:
        low, high = prediction.interval(self.level)
        margin = self.threshold
        if getattr(prediction.likelihood, "kind", None) != "count":
            size = low.abs().maximum(high.abs()).maximum(self.threshold.abs())
            margin = margin + _rounding(low.dtype) * size
        return low - margin, high + margin

    def _score(self, prediction: Prediction, y: Tensor) -> Tensor:
        low, high = prediction.interval(self.level)
        target = _targets(prediction, y, low)
        return torch.maximum(low - target, target - high)


def _threshold(scores: Tensor, level: float) -> Tensor:
    """The k-th smallest score of n, k = ceil((n + 1) level).

    :raises ValueError: when k > n, so that the threshold would be infinite.
    """
    n, exact = len(scores), Fraction(str(level))  # exact decimals: in floating point 0.55 * 100 is above 55
    k = math.ceil((n + 1) * exact)
    if k > n:
        raise ValueError(
            f"level={level!r}: expected at least {math.ceil(exact / (1 - exact))} held-out data, got {n}; give more, "
            "or a lower level"
        )
    return scores.sort(0).values[k - 1]


def _rounding(dtype: torch.dtype) -> float:
    """The tolerance for scores that differ only by rounding, for values of size 1."""
    return torch.finfo(dtype).eps ** 0.75


def _class_probabilities(prediction: Prediction) -> Tensor:
    """``[N, C]``; the one probability of a Bernoulli becomes those of the classes 0 and 1."""
    probs = prediction.probs
    binary = isinstance(prediction.likelihood, Bernoulli)
    if probs.dim() != (1 if binary else 2):
        raise ValueError(
            "conformal sets are for one label per row, and here each row has several (predictions of shape "
            f"{tuple(probs.shape)}): use a network with one label per row, or look at calibration with evaluate(), "
            "which counts every label"
        )
    return torch.stack((1 - probs, probs), 1) if binary else probs


def _labels(prediction: Prediction, y: Tensor) -> Tensor:
    """The labels that are not missing, as integers ``[N, 1]``."""
    log_density(prediction, y)  # refuses labels that do not fit
    return kept(y.flatten().long(), labelled(prediction, y)).unsqueeze(1)


def _targets(prediction: Prediction, y: Tensor, like: Tensor) -> Tensor:
    log_density(prediction, y)  # refuses y that do not fit
    return y.reshape(like.shape).to(like.dtype)


def _joined(parts: list[Tensor], name: str) -> Tensor:
    if not parts:
        raise ValueError(f"{name} is empty: give at least one row; look at the filter or split that made it")
    return torch.cat(parts)


def _mean(values: Tensor) -> float:
    return float(values.cpu().double().mean())
