"""Temperature scaling: one number, fitted on held-out data, that makes a classifier as confident as it is right."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from scipy.optimize import minimize_scalar

from pyro_bnn.entry import checks
from pyro_bnn.inputs import Data, Inputs
from pyro_bnn.posterior import Posterior, Prediction
from pyro_bnn.predicting import labelled, log_density, predict_batches
from pyro_bnn.randomness import some_seed

if TYPE_CHECKING:
    from pyro_bnn.posterior import Sparsified

#: grid of log temperatures that are tried first: temperatures from 0.01 to 100, with 1 among them, eight per decade
_GRID = math.log(10) * np.linspace(-2, 2, 33)
#: nats per datum by which the best temperature must beat both ends of the grid
_RESOLUTION = 1e-9


class ScaledPosterior(Posterior):
    r"""A posterior whose predictions have all logits divided by a temperature T.

    p(y | x) = (1 / (S K)) sum_sk softmax(f_sk(x) / T)_y,   with the sigmoid for a Bernoulli likelihood,

    over S draws and K members. T > 1 makes predictions less confident, T < 1 more; the most probable class of each
    draw does not change. T applies to ``predict`` and ``log_likelihood``, and so to every metric and to ``to_arviz``.
    The draws, the model and the guide are those of the original posterior, so T has no effect on
    ``Predictive(model, guide=scaled.guide)``.

    This is not a tempered posterior: ``temperature=`` of a likelihood changes the inference, T only the predictions.

    :param posterior: any posterior with a Categorical or Bernoulli likelihood, available as ``.posterior``.
    :param temperature: T, available as ``.temperature``; :func:`scale_temperature` fits it.
    :raises TypeError: for any other likelihood.
    :raises ValueError: unless ``0 < temperature < inf``.
    """

    def __init__(self, posterior: Posterior, temperature: float) -> None:
        _require_logits(posterior)
        checks.positive("temperature", temperature)
        vars(self).update(vars(posterior))  # so that draws, model and guide are those of the posterior inside
        self.posterior, self.temperature = posterior, float(temperature)

    def predict(self, *args: Any, **kwargs: Any) -> Prediction:
        """The predictive distribution at x, with logits divided by T. Arguments as for ``Posterior.predict``."""
        prediction = self.posterior.predict(*args, **kwargs)
        return Prediction(prediction.outputs / self.temperature, prediction.likelihood)

    def recompute_statistics(self, loader: Iterable[object] | None) -> None:
        """See ``Posterior.recompute_statistics``. The posterior inside changes too, and T is not fitted again."""
        self.posterior.recompute_statistics(loader)

    def as_draws(self, n: int, seed: int | None = None, *, example: Inputs = None) -> ScaledPosterior:
        """See ``Posterior.as_draws``; with the same T."""
        return ScaledPosterior(self.posterior.as_draws(n, seed, example=example), self.temperature)

    def sparsify(self, *args: Any, **kwargs: Any) -> Sparsified:
        """See ``Posterior.sparsify``; with the same T."""
        sparse = self.posterior.sparsify(*args, **kwargs)
        return replace(sparse, posterior=ScaledPosterior(sparse.posterior, self.temperature))

    def importance(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not supported: what a group is worth is a property of the posterior, not of T.

        :raises TypeError: always, with instructions.
        """
        raise TypeError("importance() is of the posterior itself, without T: call scaled.posterior.importance(x, y)")

    def save(self, path: str | os.PathLike[str], *, prior: bool = True) -> None:
        """Not supported: a saved posterior cannot hold T.

        :raises TypeError: always, with instructions.
        """
        raise TypeError(
            "a temperature cannot be saved with a posterior: call scaled.posterior.save(path) and keep "
            f"scaled.temperature ({self.temperature!r}); ScaledPosterior(pb.load(path, net), temperature) restores "
            "the scaled posterior"
        )


def scale_temperature(
    posterior: Posterior,
    data: Data,
    *,
    num_samples: int | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
) -> ScaledPosterior:
    r"""Fits a temperature T on held-out data by minimising the negative log-likelihood of the averaged prediction.

    T = argmin -(1/N) sum_n log (1 / (S K)) sum_sk p(y_n | f_sk(x_n) / T)

    For one function this is convex in 1 / T, but for an average it need not be. A grid of 33 temperatures from 0.01 to
    100 is therefore evaluated first, and Brent's bounded search then refines the best one between its neighbours. The
    result is never worse on ``data`` than T = 1. With a single function the most probable classes, and so the accuracy,
    do not change.

    The logits of all data, S K N C numbers, are kept in memory on their device; sums are in float64.

    :param posterior: any posterior with a Categorical or Bernoulli likelihood.
    :param data: held-out data: a ``DataLoader`` of ``(x, y)``, a ``Dataset`` of such pairs, or one pair. On the
        training data T would be too small.
    :param num_samples: number S of draws from every member. Use T for predictions with about as many draws.
    :param batch_size: the most rows in one forward pass.
    :param seed: of the draws; ``None`` takes a new one at each call.
    :returns: the posterior with logits divided by T, which is its ``.temperature``.
    :raises TypeError: when the likelihood is neither Categorical nor Bernoulli, or data or y has the wrong type.
    :raises ValueError: when data is empty, y does not fit the likelihood, a prediction holds NaN, or no T between 0.01
        and 100 is best: the likelihood still rises at an end, does not depend on T, or is 0 at every T.

    Source: Guo, Pleiss, Sun and Weinberger (2017), eq. 9, here for the average over the functions of a posterior.
    """
    _require_logits(posterior)
    batches, seed, any_label = [], some_seed(seed), False
    for _, prediction, y in predict_batches(posterior, data, num_samples=num_samples, batch_size=batch_size, seed=seed):
        log_density(prediction, y)  # refuses labels that do not fit
        there = labelled(prediction, y)
        any_label = any_label or there is None or bool(there.any())
        outputs = prediction.outputs
        if outputs.device.type == "mps":  # mps has no float64
            outputs, y = outputs.cpu(), y.cpu()
        # With float32 labels a Bernoulli density would be too inexact for the search.
        batches.append((outputs, prediction.likelihood, y.double() if y.is_floating_point() else y))
    if not batches:
        raise ValueError("data is empty: a temperature needs held-out data; look at the filter or split that made it")
    rows = sum(len(y) for _, _, y in batches)
    if not any_label:
        raise ValueError("data holds no label but ignore_index: a temperature needs labels to be fitted to")

    def nll(log_temperature: float) -> float:
        """The objective, up to the constant log (S K)."""
        temperature = math.exp(log_temperature)
        log_probs = (Prediction(f.double() / temperature, kind).log_prob(y) for f, kind, y in batches)
        return -sum(float(log_prob.logsumexp((0, 1)).sum()) for log_prob in log_probs) / rows

    values = np.array([nll(point) for point in _GRID])
    best = _inner_minimum(values)
    refined = minimize_scalar(nll, bounds=(_GRID[best - 1], _GRID[best + 1]), method="bounded", options={"xatol": 1e-7})
    _, log_temperature = min((float(refined.fun), float(refined.x)), (float(values[best]), float(_GRID[best])))
    return ScaledPosterior(posterior, math.exp(log_temperature))


def _inner_minimum(values: np.ndarray) -> int:
    """The index of the smallest value.

    :raises ValueError: when an end of the grid is as good.
    """
    if not np.isfinite(values.min()):
        raise ValueError("the posterior gives some y probability 0 at every temperature: check for infinite logits")
    low, high = values[[0, -1]] - values.min() < _RESOLUTION
    if low and high:
        raise ValueError(
            "the likelihood does not depend on the temperature, because all logits of a datum are equal: train the "
            "network"
        )
    if low:
        raise ValueError(
            "the likelihood rises down to a temperature of 0.01: (nearly) all of these data are classified right, so "
            "they cannot tell which confidence would be too high. Give more held-out data, or keep the posterior as "
            "it is"
        )
    if high:
        raise ValueError(
            "the likelihood rises up to a temperature of 100: the predictions are no better than equal probabilities. "
            "Check the accuracy, and whether these labels are numbered as those of training"
        )
    return int(values.argmin())


def _require_logits(posterior: Posterior) -> None:
    likelihood = getattr(posterior.model, "likelihood", None)
    if getattr(likelihood, "kind", None) != "classification":
        raise TypeError(
            "a temperature divides the logits of a Categorical or Bernoulli likelihood, but this posterior has "
            f"{likelihood!r}; for calibrated intervals use pyro_bnn.diagnostics.ConformalIntervals"
        )
