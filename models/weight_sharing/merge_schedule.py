"""Merges codes during training: a callback for :func:`pyro_bnn.inference.fit`."""

from __future__ import annotations

import math
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.optim import Optimizer

from pyro_bnn import display
from pyro_bnn.entry import checks
from pyro_bnn.models.weight_sharing.clustering import least_divergence
from pyro_bnn.models.weight_sharing.codebook import Codebook
from pyro_bnn.models.weight_sharing.guide import CodebookGuide
from pyro_bnn.models.weight_sharing.merging import MergeRule

#: entries of an optimiser's state that average squares of gradients, or their largest
_SQUARES = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"}


class MergeCodes:
    """A callback of ``fit`` that, after chosen epochs, merges codes that are close and returns outliers to codes.

    ``fit(model, guide, data, epochs=30, callbacks=[MergeCodes(start=5, stop=20)])``

    Shapes stay the same (see :class:`~pyro_bnn.models.Codebook`), and the optimiser's state is merged along, see
    :func:`merge_state`. Merged codes stay unused until training ends; ``guide.compression_report()`` and saved
    posteriors leave them out.

    :param start, stop, every: epochs, counted from 1: at ``start``, then after every ``every`` epochs, up to ``stop``.
    :param tightness, variance_limit, how: see :meth:`~pyro_bnn.models.Codebook.merge`.
    :param gradient_limit: in nats, for the whole data set: a code does not merge if its spread changes the objective by
        more, according to the gradient of the last minibatch.
    :param absorb: in nats: an outlier returns to a code if that costs less, see :func:`absorb_outliers`; 0 for never.
    :raises ValueError: for a schedule that never merges.
    """

    def __init__(
        self,
        *,
        start: int = 1,
        stop: int | None = None,
        every: int = 1,
        tightness: float = 0.25,
        gradient_limit: float = math.inf,
        variance_limit: float = math.inf,
        how: MergeRule = "moment",
        absorb: float = 0.5,
    ) -> None:
        start, every = checks.count("start", start), checks.count("every", every)
        stop = None if stop is None else checks.count("stop", stop, start)
        checks.positive("tightness", tightness)
        checks.limit("gradient_limit", gradient_limit)
        checks.limit("variance_limit", variance_limit)
        checks.fraction("absorb", absorb)
        checks.choice("how", how, get_args(MergeRule))
        self.start, self.stop, self.every = start, stop, every
        self.gradient_limit, self.absorb = gradient_limit, absorb
        self.options: dict[str, Any] = {"tightness": tightness, "variance_limit": variance_limit, "how": how}
        #: ``(epoch, codes that are left, outliers that are left)`` after every merger
        self.history: list[tuple[int, int, int]] = []

    def __repr__(self) -> str:
        own = {"start": self.start, "stop": self.stop, "every": self.every, **self.options}
        return display.call(self, **own, gradient_limit=self.gradient_limit, absorb=self.absorb)

    def __call__(self, state: Any) -> None:
        """Merges codes if the schedule includes this epoch.

        :param state: a :class:`~pyro_bnn.inference.FitState`.
        :raises TypeError: when the guide is not a :class:`~pyro_bnn.models.CodebookGuide`.
        """
        guide = state.guide
        if not isinstance(guide, CodebookGuide):
            raise TypeError(f"MergeCodes is for a CodebookGuide, the guide is a {type(guide).__name__}")
        late = self.stop is not None and state.epoch > self.stop
        if state.epoch < self.start or late or (state.epoch - self.start) % self.every:
            return
        book = guide.book
        gradient = None
        if math.isfinite(self.gradient_limit):
            gradient = self._gradient(guide, getattr(state.model, "num_data", None))
        into = book.merge(gradient=gradient, gradient_limit=self.gradient_limit, **self.options)
        for parameter in (book.loc, book.rho):
            merge_state(state.optimizer, parameter, into)
        if self.absorb > 0:
            absorb_outliers(book, self.absorb)
        left = int(book.is_outlier().sum())
        self.history.append((state.epoch, int((book.weights_per_code(soft=True) > 0).sum()), left))

    def state_dict(self) -> dict[str, Any]:
        """The history, which checkpoints hold."""
        return {"history": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history = [tuple(one) for one in state["history"]]

    def _gradient(self, guide: CodebookGuide, num_data: int | None) -> Tensor:
        """Of the negative ELBO with respect to (m, s), ``[K, 2]``; fit divides its loss by the size of the data."""
        book = guide.book
        if book.loc.grad is None or book.rho.grad is None:
            raise RuntimeError(
                "gradient_limit needs the gradient of the last step, which was cleared: clear gradients before the "
                "backward pass and not after the step, or leave gradient_limit out"
            )
        by_scale = book.rho.grad / torch.sigmoid(book.rho.detach())  # ds / d rho is the sigmoid
        return torch.stack([book.loc.grad, by_scale], 1).detach() * (num_data or 1)


def absorb_outliers(book: Codebook, limit: float = 0.5) -> int:
    """Gives outliers back to the code with the least ``KL(N(m_k, s_k^2) || N(mu_i, sigma_i^2))``; says how many.

    That is what the ELBO loses where the outlier's own Gaussian is the posterior.

    :param limit: of that divergence, in nats; 0.5 is a mean one deviation away from the code's, and equal deviations.
    """
    alive = (book.weights_per_code(soft=True) > 0).nonzero().flatten()
    if not len(book.outliers) or not len(alive):
        return 0
    now = book.in_plane()
    living = now[alive]
    with torch.no_grad():
        x = torch.stack([book.outlier_loc, book.outlier_scales()], 1).double()
        label = least_divergence(x, living, 0.0).long()
        code, own = (Normal(v[:, 0], v[:, 1], validate_args=False) for v in (living.means[label], x))
        near = (kl_divergence(code, own) < limit) & book.is_outlier()
        book.labels[book.outliers[near]] = alive[label[near]].to(torch.int32)
    return int(near.sum())


def merge_state(optimizer: Optimizer, parameter: nn.Parameter, into: Tensor) -> None:
    """Moves the state of an optimiser along with rows of a parameter that have merged.

    The gradient of a merged code is the sum of those of its parts, and so is its momentum. Averages of squares become
    ``(sum sqrt(v))^2``, which the average square of that sum never exceeds (Minkowski). Rows that went have no state.

    :param into: for each row the one that it is now part of, ``[K]``.
    """
    state = optimizer.state.get(parameter, {})
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.shape != parameter.shape:
            continue
        if name in _SQUARES:
            total = torch.zeros_like(value).index_add_(0, into, value.sqrt()).square_()
        else:
            total = torch.zeros_like(value).index_add_(0, into, value)
        moved = torch.bincount(into, minlength=len(into)) != 1  # others are not rounded by a root
        value[moved] = total[moved]
