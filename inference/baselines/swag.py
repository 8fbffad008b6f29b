"""SWAG: a Gaussian around the path of stochastic gradient descent (Maddox et al. 2019, arXiv 1902.02476)."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_bnn.distributed import processes
from pyro_bnn.entry import checks
from pyro_bnn.entry.threads import one_at_a_time
from pyro_bnn.inference.baselines.point import Baseline
from pyro_bnn.inference.batches import minibatches
from pyro_bnn.inference.svi.fitting import fit
from pyro_bnn.inference.training.callbacks import Callback, Callbacks, FitState
from pyro_bnn.inference.training.options import Training
from pyro_bnn.inputs import Data
from pyro_bnn.models.dense import Dense, PointGuide
from pyro_bnn.modes import evaluating
from pyro_bnn.posterior import Posterior
from pyro_bnn.posterior.statistics import gather_statistics
from pyro_bnn.precision import full_precision
from pyro_bnn.program.sites import Site
from pyro_bnn.randomness import derive_seeds, device_of, seeded

#: nats per datum by which the loss may rise above that of the first step: more is no neighbourhood of a mode
LOST = 1.0


class Moments:
    r"""Mean, variance and last deviations of the iterates theta_1 ... theta_T.

    ::

        mean = (1/T) sum_t theta_t,      variance = (1/T) sum_t theta_t^2 - mean^2   (element-wise)
        D = [theta_t - mean_t], t = T - K + 1 ... T,   with mean_t that of the first t iterates

    Source: sections 3.2 and 3.3 of the paper. The variance is gathered by Welford's recurrence, which is the same but
    for rounding: the difference of squares loses what is small against the mean.
    """

    def __init__(self, rank: int) -> None:
        self.rank, self.count = rank, 0
        self.mean = self._squares = torch.empty(0)
        self._deviations: list[Tensor] = []

    def update(self, theta: Tensor) -> None:
        if not self.count:
            self.mean, self._squares = torch.zeros_like(theta), torch.zeros_like(theta)
        self.count += 1
        before = theta - self.mean
        self.mean = self.mean + before / self.count
        deviation = theta - self.mean
        self._squares = self._squares + before * deviation
        self._deviations = [*self._deviations, deviation][-self.rank :]

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean, "squares": self._squares, "deviations": self._deviations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self._deviations = state["count"], list(state["deviations"])
        self.mean, self._squares = state["mean"], state["squares"]

    @property
    def variance(self) -> Tensor:
        return self._squares / self.count

    @property
    def columns(self) -> int:
        """K, or the number of iterates when there are fewer."""
        return len(self._deviations)

    @property
    def deviations(self) -> Tensor:
        """D, ``[P, K]``."""
        return torch.stack(self._deviations, -1)

    def draw(self, z1: Tensor, z2: Tensor) -> Tensor:
        r"""A draw from ``N(mean, (diag(variance) + D D^T / (K - 1)) / 2)``, from standard normals.

        ::

            theta = mean + sqrt(variance / 2) z_1 + D z_2 / sqrt(2 (K - 1))

        Source: equation 1 of the paper.

        :param z1: ``[..., P]``.
        :param z2: ``[..., K]``.
        """
        with full_precision():
            spread = z2 @ self.deviations.mT / math.sqrt(2 * (self.columns - 1))
        return self.mean + (self.variance / 2).sqrt() * z1 + spread


class _Collect(Callback):
    """Adds an iterate to the moments at the end of every epoch after the warm-up."""

    def __init__(self, moments: Moments, guide: PointGuide, warmup_epochs: int) -> None:
        self._moments, self._guide, self._warmup_epochs = moments, guide, warmup_epochs

    def after_epoch(self, state: FitState) -> None:
        if state.epoch > self._warmup_epochs:
            self._moments.update(torch.cat([value.flatten() for value in self._guide.coordinates().values()]))

    def state_dict(self) -> dict[str, Any]:
        return self._moments.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = next(iter(self._guide.coordinates().values())).device
        self._moments.load_state_dict(pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), state))


@dataclass(eq=False, repr=False, kw_only=True)
class SWAG(Baseline):
    r"""SWAG: a Gaussian fitted to the iterates of SGD with a constant learning rate, as stored draws.

    The loss is the negative log posterior per datum, and one iterate is taken at the end of every epoch::

        theta <- theta - lr grad [ -(1/B) sum_b log p(y_b | x_b, theta) - (1/N) log p(theta) ]

    :class:`Moments` computes the Gaussian from them. Learned scales, such as the noise of a Gaussian likelihood, take
    part through their logarithms. Each draw has its own statistics of normalisation layers, which take one pass over
    the training data.

    The width of the Gaussian depends on ``lr``: without momentum, its covariance is about ``(lr / 2 B) A^-1 V`` for
    gradient noise of covariance V per datum and curvature A of the loss, which is not the covariance of the posterior.

    Source: Maddox et al. 2019 (arXiv 1902.02476).

    :param net: a trained network, or one that ``warmup_epochs`` will train; it is copied, never changed.
    :param likelihood, num_data, prior, output: see :class:`~pyro_bnn.inference.baselines.point.Baseline`.
    :param rank: K, the number of deviations that are kept; each has the size of the network.
    :raises ValueError: for a rank below 2.
    """

    rank: int = 20
    moments: Moments = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rank = checks.count("rank", self.rank, 2)
        self.moments = Moments(self.rank)

    def repr_arguments(self) -> dict[str, object]:
        return super().repr_arguments() | {"rank": self.rank}

    @one_at_a_time
    def fit(
        self,
        data: Data,
        *,
        epochs: int,
        warmup_epochs: int = 0,
        lr: float = 1e-2,
        momentum: float = 0.9,
        num_samples: int = 30,
        batch_size: int = 128,
        seed: int | None = None,
        **training: Unpack[Training],
    ) -> Posterior:
        """Runs SGD and draws from the Gaussian of its iterates, which stays available as the attribute ``moments``.

        :param data: data in the forms that :func:`~pyro_bnn.inference.fit` accepts.
        :param epochs: number of collected iterates, at least 2.
        :param warmup_epochs: number of epochs before the first iterate is collected, with the same learning rate.
        :param lr: constant learning rate: large enough to explore around the mode, small enough not to leave it.
        :param momentum: Nesterov momentum; 0 for plain SGD.
        :param num_samples: number of stored draws.
        :param batch_size: for a dataset or a pair.
        :param seed: makes the run and the draws reproducible and leaves the global random state unchanged.
        :param training: options of the loop, see :class:`~pyro_bnn.inference.Training`; the moments are part of its
            checkpoints. ``validation`` is not one of them: the iterates of one epoch alone are no result.
        :return: a posterior of ``num_samples`` stored draws.
        :raises ValueError: for counts out of range, ``validation``, or when the run ends before its second iterate.
        :raises FloatingPointError: when SGD diverges, or its loss rises by more than a nat per datum.
        """
        epochs = checks.count("epochs", epochs, 2)
        warmup_epochs = checks.count("warmup_epochs", warmup_epochs, 0)
        num_samples = checks.count("num_samples", num_samples)
        lr, momentum = checks.positive("lr", lr), checks.share_or_none_of_it("momentum", momentum)
        if training.get("validation") is not None:
            raise ValueError(
                "validation= restores the best epoch, and SWAG is the Gaussian of all of them: leave it out, and "
                "choose lr and epochs by evaluating the posterior"
            )
        model = self._model()
        guide = PointGuide(model)
        moments = self.moments = Moments(self.rank)
        collect = _Collect(moments, guide, warmup_epochs)
        callbacks = Callbacks(training.get("callbacks", ())).given
        options: Training = {**training, "callbacks": [*callbacks, collect]}

        def sgd(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
            return torch.optim.SGD(groups, lr, momentum=momentum, nesterov=momentum > 0)

        training_seed, drawing_seed = derive_seeds(processes().shared_seed(seed), 2)
        run = fit(
            model,
            guide,
            data,
            epochs=warmup_epochs + epochs,
            batch_size=batch_size,
            optim=sgd,
            seed=training_seed,
            **options,
        )
        if moments.count < 2:
            raise ValueError(f"the run ended after {moments.count} iterates that count: two are needed")
        _require_near(run.losses, warmup_epochs / (warmup_epochs + moments.count), lr)
        posterior = self._draw(model, guide, data, batch_size, num_samples, drawing_seed)
        posterior.losses = run.losses
        return posterior

    def _draw(
        self, model: Dense, guide: PointGuide, data: Data, batch_size: int, n: int, seed: int | None
    ) -> Posterior:
        moments, sites = self.moments, {site.name: site for site in model.sites()}
        order = [sites[name] for name in guide.coordinates()]
        with seeded(device_of(model), seed):
            z1 = torch.randn(n, len(moments.mean), dtype=moments.mean.dtype, device=moments.mean.device)
            z2 = torch.randn(n, moments.columns, dtype=z1.dtype, device=z1.device)
            parts = moments.draw(z1, z2).split([site.shape.numel() for site in order], -1)
            draws = {s.name: _constrained(s, part.reshape(n, *s.shape)) for s, part in zip(order, parts, strict=True)}
            return _with_statistics(Posterior.from_draws(model, draws, is_sampled=False), data, batch_size)


def _require_near(losses: list[float], before: float, lr: float) -> None:
    """SGD that has left the mode for good, without becoming infinite, has no Gaussian around it.

    :param losses: of all steps, in nats per datum.
    :param before: the share of the steps before the first iterate that counts.
    :raises FloatingPointError: when the loss of those that count is far above that of the first step.
    """
    counted = losses[round(before * len(losses)) :]
    reached = sum(counted) / max(1, len(counted))
    if losses and reached > losses[0] + LOST:
        raise FloatingPointError(
            f"SGD has left the mode: the loss is {losses[0]:.3g} nats per datum at its start, and {reached:.3g} on "
            f"average where iterates count. Give a smaller lr (it is {lr:g}), clip_norm=1.0, or a network that was "
            "trained longer"
        )


def _with_statistics(posterior: Posterior, data: Data, batch_size: int) -> Posterior:
    """The same stored draws, each with the statistics of normalisation layers that it has on the data."""
    model, draws = posterior.model, posterior.draws(posterior.num_stored or 0)
    assert isinstance(model, Dense)
    if not model.moving_layers():
        return posterior
    batches = minibatches(model, data, batch_size)
    gathered: dict[str, list[Tensor]] = defaultdict(list)
    with torch.no_grad(), evaluating(model):
        for i in range(posterior.num_stored or 0):
            gather_statistics(model, {name: value[i : i + 1] for name, value in draws.items()}, batches.epoch())
            for name, layer in model.moving_layers().items():
                for buffer, value in layer.named_buffers():
                    gathered[f"{name}.{buffer}"].append(value.clone())
    statistics = {name: torch.stack(values) for name, values in gathered.items()}
    own = {name: value[:, 0] for name, value in draws.items()}
    return Posterior.from_draws(model, own, statistics=statistics, is_sampled=False)


def _constrained(site: Site, value: Tensor) -> Tensor:
    """From the coordinates in which a guide holds a point."""
    if site.role == "scale":
        return value.exp()
    return value.sigmoid() if site.role == "share" else value
