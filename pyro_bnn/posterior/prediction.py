"""Predictive distributions: one network output for every draw, member and sample."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_bnn import display
from pyro_bnn.entry import checks
from pyro_bnn.entry.threads import one_at_a_time
from pyro_bnn.inputs import labels
from pyro_bnn.likelihoods import Bernoulli, Categorical, Likelihood, Poisson
from pyro_bnn.posterior.sequences import Sequences
from pyro_bnn.randomness import seeded

if TYPE_CHECKING:
    import pandas as pd

#: rows and columns of the table that a notebook shows
_ROWS_SHOWN, _COLUMNS_SHOWN = 10, 12
_BISECTIONS = 60  # halvings of an interval: beyond the resolution of float64


class Prediction:
    """The posterior predictive distribution at N inputs.

    :param outputs: network outputs, ``[draws, members, N, *output]``.
    :param likelihood: the distribution of y given an output; ``None`` for raw function values.
    :param noise: learned noise scale, ``[draws, members]``, in the units of y.
    """

    def __init__(self, outputs: Tensor, likelihood: Likelihood | None, noise: Tensor | None = None) -> None:
        self.outputs, self.likelihood, self.noise = outputs, likelihood, noise

    def __repr__(self) -> str:
        return display.text(self._title(), self._fields())

    def _repr_html_(self) -> str:
        head = Prediction(self.outputs[:, :, :_ROWS_SHOWN], self.likelihood, self.noise)
        rows = head.to_dataframe().to_html(max_cols=_COLUMNS_SHOWN, float_format="{:.4g}".format)
        left = self.outputs.shape[2] - _ROWS_SHOWN
        more = f"<p>and {display.plural(left, 'more row')}</p>" if left > 0 else ""
        return display.html_text(self._title(), self._fields(), rows + more)

    def _title(self) -> str:
        return f"Prediction for {display.plural(self.outputs.shape[2], 'sample')}"

    def _fields(self) -> dict[str, object]:
        draws, members = self.outputs.shape[:2]
        of = f"{display.plural(draws, 'draw')} of {display.plural(members, 'member')}"
        meaning = "none: values of a function" if self.likelihood is None else repr(self.likelihood)
        return {"draws": of, "likelihood": meaning, "outputs": f"[{', '.join(map(str, self.outputs.shape))}]"}

    def _distribution(self, y: Tensor | None = None) -> dist.TorchDistribution:
        if self.likelihood is None:
            raise TypeError(
                "these are function values without a likelihood, so y has no distribution: give the model likelihood="
            )
        noise = None if self.noise is None else self.noise.unsqueeze(-1)
        return self.likelihood.given(self.outputs, y, noise, lead=3)

    @cached_property
    def per_member(self) -> Tensor:
        """``[draws, members, N, ...]``: the class probabilities, or the mean of y, of every member in every draw."""
        if self.likelihood is None:
            return self.outputs
        d = _base(self._distribution())
        return d.probs if isinstance(self.likelihood, (Categorical, Bernoulli)) else d.mean

    @property
    def mean(self) -> Tensor:
        """``[N, ...]``: the predictive mean, averaged over draws and members; in classification, mean probabilities."""
        return self.per_member.mean((0, 1))

    @property
    def probs(self) -> Tensor:
        """``[N, ..., C]``: class probabilities; for Bernoulli ``[N, ...]``, the probability of 1.

        :raises TypeError: unless the likelihood is Categorical or Bernoulli.
        """
        self._require(classification=True, what="probs")
        return self.mean

    @property
    def entropy(self) -> Tensor:
        """``[N, ...]``: entropy of the mean class probabilities, in nats.

        :raises TypeError: unless the likelihood is Categorical or Bernoulli.
        """
        self._require(classification=True, what="entropy")
        return self._entropy(self.mean)

    @property
    def aleatoric(self) -> Tensor:
        """``[N, ...]``: uncertainty that remains when the weights are known.

        The entropy of y averaged over draws and members, in nats; for regression and counts, the average variance of y.

        :raises TypeError: for function values without a likelihood.
        """
        if self._classifies:
            return self._entropy(self.per_member).mean((0, 1))
        return _base(self._distribution()).variance.mean((0, 1))

    @property
    def epistemic(self) -> Tensor:
        """``[N, ...]``: uncertainty about the weights.

        :attr:`entropy` minus :attr:`aleatoric`, in nats; for regression, counts and function values, the variance over
        draws and members of the mean of y.
        """
        if self._classifies:
            return (self.entropy - self.aleatoric).clamp_min(0)
        return self.per_member.flatten(0, 1).var(0, correction=0)

    @property
    def variance(self) -> Tensor:
        """``[N, ...]``: variance of y, in squared units of y.

        ``Var(y) = E_w Var(y | w) + Var_w E(y | w)``, the sum of :attr:`aleatoric` and :attr:`epistemic`; function
        values have no noise, so their variance is :attr:`epistemic` alone.

        :raises TypeError: for classification.
        """
        if self.likelihood is None:
            return self.epistemic
        self._require(classification=False, what="variance")
        return self.aleatoric + self.epistemic

    @property
    def std(self) -> Tensor:
        """``[N, ...]``: standard deviation of y, in the units of y: the square root of :attr:`variance`.

        :raises TypeError: for classification.
        """
        if self._classifies:
            self._require(classification=False, what="std")
        return self.variance.sqrt()

    @property
    def mutual_information(self) -> Tensor:
        """``[N, ...]``: mutual information ``I(y; weights)``, in nats.

        :raises TypeError: unless the likelihood is Categorical or Bernoulli.
        """
        self._require(classification=True, what="mutual_information")
        return self.epistemic

    def sequences(self, mask: object = None) -> Sequences:
        """Uncertainties of whole sequences, from those of their tokens; see :class:`~pyro_bnn.posterior.Sequences`.

        :param mask: the tokens that count, ``[N, T]``, 1 or True: not padding, nor a prompt that is given. For labels
            that ``ignore_index`` masks it is ``y != ignore_index``. By default all tokens count.
        :raises TypeError: unless the likelihood is Categorical or Bernoulli.
        :raises ValueError: when rows have a single label, or the mask has another shape or holds other numbers.
        """
        self._require(classification=True, what="sequences")
        shape = self.entropy.shape
        if len(shape) < 2:
            raise ValueError(
                f"each of the {shape[0]} rows has a single label: sequences() is for outputs [N, T, C], with a label "
                "at every token; of one label see .entropy and .log_prob(y)"
            )
        real = torch.ones(shape, dtype=torch.bool) if mask is None else labels(mask, "mask")
        if real.shape != shape or not bool(((real == 0) | (real == 1)).all()):
            raise ValueError(
                f"mask has shape {tuple(real.shape)} and values from {real.min()} to {real.max()}; expected "
                f"{tuple(shape)}, 1 or True at every token that counts and 0 or False elsewhere"
            )
        tokens = {"entropy": self.entropy, "aleatoric": self.aleatoric, "epistemic": self.epistemic}
        return Sequences(tokens, real.bool().to(self.outputs.device), self._token_log_prob)

    def _token_log_prob(self, y: Tensor, mask: Tensor) -> Tensor:
        """``[draws, members, N, T]``: log probability of every label; 0 where the mask ``[N, T]`` does not count it."""
        likelihood, y = self.likelihood, y.to(self.outputs.device)
        assert likelihood is not None
        likelihood.require_dtype(y)
        if y.shape != mask.shape:
            raise ValueError(f"y has shape {tuple(y.shape)}; expected a label at every token, {tuple(mask.shape)}")
        there = likelihood.labelled(y)
        if there is not None and bool((missing := mask & ~there).any()):
            raise ValueError(
                f"{int(missing.sum())} tokens count but have no label in y: give sequences() a mask without them, such "
                "as y != ignore_index"
            )
        y = y.masked_fill(~mask, 0)
        likelihood.check(y, self.outputs[0, 0])
        each: Tensor = _base(self._distribution(y)).log_prob(y)
        return each.masked_fill(~mask, 0.0)

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Bounds ``[N, ...]`` of the central interval that contains y with probability ``level``.

        The bounds are quantiles of the mixture of the distributions of all draws and members; for function values, they
        are empirical quantiles of these values.

        :raises TypeError: for classification.
        :raises ValueError: unless ``0 < level < 1``.
        """
        level = checks.share("level", level)
        if self.likelihood is None:
            values = self.outputs.flatten(0, 1)
            return values.quantile((1 - level) / 2, 0), values.quantile((1 + level) / 2, 0)
        self._require(classification=False, what="interval")
        return self.quantile((1 - level) / 2), self.quantile((1 + level) / 2)

    def quantile(self, q: float) -> Tensor:
        """``[N, ...]``: the q-quantile of the mixture, found by bisection of its distribution function.

        :raises ValueError: unless ``0 < q < 1``.
        :raises TypeError: as :meth:`cdf`.
        """
        q = checks.share("q", q)
        d = _base(self._distribution())
        spread = 40 * d.variance.sqrt() + 1
        low, high = (d.mean - spread).amin((0, 1)), (d.mean + spread).amax((0, 1))
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            below = self.cdf(middle).mean((0, 1)) < q
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return high.floor().clamp_min(0) if isinstance(self.likelihood, Poisson) else high

    def cdf(self, y: Tensor) -> Tensor:
        """``[draws, members, N, ...]``: the distribution function at y ``[N, ...]``, for every draw and member.

        :raises TypeError: for classification, for function values, and for a likelihood of your own whose distribution
            does not define ``cdf``.
        """
        self._require(classification=False, what="cdf")
        d = _base(self._distribution())
        if isinstance(self.likelihood, Poisson):
            return torch.special.gammaincc(y.floor().clamp_min(0) + 1, d.rate) * (y >= 0)
        try:
            return d.cdf(y)
        except NotImplementedError as error:
            kind = type(d).__name__
            raise TypeError(
                f"{kind}, the distribution of {type(self.likelihood).__name__}, has no cdf(y), from which "
                f"intervals and quantiles are found: let distribution() return a subclass of {kind} that defines "
                "cdf(self, y), or take quantiles of draws, as prediction.sample().flatten(0, 1).quantile(0.975, 0)"
            ) from error

    def log_prob(self, y: Tensor) -> Tensor:
        """``[draws, members, N]``: log density of y for every draw and member, in nats.

        :raises ValueError: for y outside the support of the likelihood, such as a label without an output.
        :raises TypeError: for function values without a likelihood.
        """
        density = self._distribution(y)
        if self.likelihood is not None and y.numel():
            self.likelihood.check(y, self.outputs[0, 0])
        return density.log_prob(y)

    @one_at_a_time
    def sample(self, seed: int | None = None) -> Tensor:
        """``[draws, members, N, ...]``: one y sampled from every member in every draw.

        :param seed: makes the samples reproducible.
        :raises TypeError: for function values without a likelihood.
        """
        with seeded(self.outputs.device, seed):
            return self._distribution().sample()

    def to_dataframe(self, level: float = 0.95) -> pd.DataFrame:
        """A table with a row for each of the N samples, in their order (index 0 to N - 1).

        For regression and counts, in the units of y: ``mean``, ``std``, ``aleatoric_std`` (noise) and
        ``epistemic_std`` (weights), with ``std^2 = aleatoric_std^2 + epistemic_std^2``, and the bounds of the central
        interval, named by their quantiles: ``2.5%`` and ``97.5%``. Function values have the columns ``mean``, ``std``
        and the bounds.

        For classification: ``p_0``, ``p_1`` ... (the probability of each class), ``class`` (the most probable class),
        and in nats ``entropy`` and ``mutual_information`` (its epistemic part).

        If y has several outputs, each has its own columns: ``mean[0]``, ``mean[1]`` ...

        :param level: probability of the central interval.
        :raises ValueError: unless ``0 < level < 1``.
        """
        import pandas as pd  # takes time to import

        if self._classifies:
            p = self.probs
            if isinstance(self.likelihood, Bernoulli):
                p = torch.stack([1 - p, p], -1)
            columns = {f"p_{i}": own for i, own in enumerate(p.unbind(-1))}
            columns |= {"class": p.argmax(-1), "entropy": self.entropy, "mutual_information": self.mutual_information}
        else:
            columns = {"mean": self.mean, "std": self.std}
            if self.likelihood is not None:
                columns |= {"aleatoric_std": self.aleatoric.sqrt(), "epistemic_std": self.epistemic.sqrt()}
            low, high = self.interval(level)
            columns |= {f"{50 * (1 - level):.6g}%": low, f"{50 * (1 + level):.6g}%": high}
        return pd.DataFrame({name: v for own, value in columns.items() for name, v in _by_output(own, value)})

    @property
    def _classifies(self) -> bool:
        return isinstance(self.likelihood, (Categorical, Bernoulli))

    def _require(self, classification: bool, what: str) -> None:
        if self._classifies != classification:
            kind = type(self.likelihood).__name__ if self.likelihood is not None else "raw function values"
            other = (
                "use .mean, .interval(level), .aleatoric and .epistemic"
                if classification
                else "use .probs and .entropy"
            )
            raise TypeError(f"{what} is not defined for {kind}; {other}")

    def _entropy(self, p: Tensor) -> Tensor:
        if isinstance(self.likelihood, Bernoulli):
            return -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p))
        return -torch.xlogy(p, p).sum(-1)


def _by_output(name: str, value: Tensor) -> Iterator[tuple[str, np.ndarray]]:
    """A column for each output: ``name`` where there is one, else ``name[i]`` or ``name[i, j]``."""
    shape = value.shape[1:]
    flat = (value.double() if value.is_floating_point() else value).reshape(len(value), -1).cpu().numpy()
    for i, place in enumerate(np.ndindex(*shape)):
        yield f"{name}[{', '.join(map(str, place))}]" if place else name, flat[:, i]


def _base(d: dist.TorchDistribution) -> dist.TorchDistribution:
    return d.base_dist if isinstance(d, torch.distributions.Independent) else d
