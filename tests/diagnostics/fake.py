"""A posterior whose predictions are given numbers, so that every diagnostic can be worked out by hand."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_bnn import likelihoods


class FakePrediction:
    """The interface of ``Prediction`` over a distribution of y with batch shape ``[draws, members, N]``."""

    def __init__(self, members: Tensor, y: dist.TorchDistribution, likelihood: Any) -> None:
        self.per_member = members
        self.outputs = _outputs(members, likelihood)
        self.mean = members.mean((0, 1))
        self.likelihood = likelihood
        learned = getattr(likelihood, "learns_noise", False)
        self.noise = y.scale.flatten(2)[:, :, 0] if learned else None
        self._y = y

    @property
    def probs(self) -> Tensor:
        return self.mean

    @property
    def entropy(self) -> Tensor:
        if isinstance(self.likelihood, likelihoods.Bernoulli):
            return torch.special.entr(self.mean) + torch.special.entr(1 - self.mean)
        return torch.special.entr(self.mean).sum(-1)

    @property
    def aleatoric(self) -> Tensor:
        if isinstance(self.likelihood, likelihoods.Bernoulli):
            return (torch.special.entr(self.per_member) + torch.special.entr(1 - self.per_member)).mean((0, 1))
        if isinstance(self.likelihood, likelihoods.Categorical):
            return torch.special.entr(self.per_member).sum(-1).mean((0, 1))
        return self._y.variance.mean((0, 1))

    @property
    def epistemic(self) -> Tensor:
        if isinstance(self.likelihood, (likelihoods.Bernoulli, likelihoods.Categorical)):
            return (self.entropy - self.aleatoric).clamp_min(0)
        return self.per_member.var((0, 1), correction=0)

    @property
    def mutual_information(self) -> Tensor:
        return self.epistemic

    def log_prob(self, y: Tensor) -> Tensor:
        log_prob = self._y.log_prob(y)
        return log_prob.flatten(3).sum(-1) if log_prob.dim() > 3 else log_prob

    def sample(self, seed: int | None = None) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(seed or 0)
            return self._y.sample()

    def cdf(self, y: Tensor) -> Tensor:
        if isinstance(self._y, dist.Poisson):
            return torch.special.gammaincc(y.floor().clamp_min(0) + 1, self._y.rate) * (y >= 0)
        return self._y.cdf(y)

    def interval(self, level: float) -> tuple[Tensor, Tensor]:
        half = dist.Normal(0.0, 1.0).icdf(torch.tensor((1 + level) / 2))
        scale = getattr(self._y, "scale", self.mean.sqrt())
        scale = scale.mean((0, 1)) if scale.dim() > self.mean.dim() else scale
        return self.mean - half * scale, self.mean + half * scale


def _outputs(members: Tensor, likelihood: Any) -> Tensor:
    match likelihood:
        case likelihoods.Categorical() | likelihoods.Poisson():
            return members.log()
        case likelihoods.Bernoulli():
            return members.logit()
        case _:
            return members


class FakePosterior:
    """Row i of x holds i, and the prediction for it is column i of ``table``.

    :param table: ``[draws, members, N, ...]``: class probabilities, probabilities of 1, means or rates.
    :param scale: noise of a Gaussian likelihood.
    """

    def __init__(
        self,
        table: Tensor,
        likelihood: Any,
        *,
        scale: float = 1.0,
        sites: dict[str, Tensor] | None = None,
        losses: list[float] | None = None,
    ) -> None:
        self.table, self.scale = table, scale
        self.model = SimpleNamespace(likelihood=likelihood)
        self.num_members = table.shape[1]
        self.losses = losses or []
        self.sampler: dict[str, float] = {}
        self.guide = None
        self.num_stored, self.num_chains, self.is_deterministic, self.is_sampled = None, 1, False, False
        self.draw_source = self  # a real posterior has an object of its own for draws in groups
        self.sites = sites or {}
        self.calls: list[dict[str, Any]] = []

    def count(self, asked: int | None = None) -> int:
        return asked or 16

    def count_all(self, asked: int | None, default: int) -> int:
        return asked or default

    def predict(
        self, x: Any, num_samples: int | None = None, batch_size: int | None = None, seed: int | None = None
    ) -> Any:
        index = x["rows"] if isinstance(x, dict) else x[0] if isinstance(x, (tuple, list)) else x
        self.calls.append({"rows": len(index), "num_samples": num_samples, "batch_size": batch_size, "seed": seed})
        members = self.table[: self.count(num_samples), :, index.long().flatten()]
        likelihood = self.model.likelihood
        match likelihood:
            case likelihoods.Categorical():
                y: dist.TorchDistribution = dist.Categorical(logits=members.log(), validate_args=False)
            case likelihoods.Bernoulli():
                y = dist.Bernoulli(probs=members, validate_args=False)
            case likelihoods.Poisson():
                y = dist.Poisson(members, validate_args=False)
            case _:
                y = dist.Normal(members, torch.full_like(members, self.scale), validate_args=False)
        return FakePrediction(members, y, likelihood)

    def draws(self, n: int, seed: int | None = None, *, example: Any = None) -> dict[str, Tensor]:
        return {site: values[:n] for site, values in self.sites.items()}

    def groups(self, n: int, seed: int | None = None, *, example: Any = None) -> Iterator[dict[str, Tensor]]:
        whole = self.draws(n, seed, example=example)
        for draw in range(min(len(values) for values in whole.values()) if whole else 0):
            yield {site: values[draw : draw + 1] for site, values in whole.items()}


def rows(n: int) -> Tensor:
    return torch.arange(n, dtype=torch.float64)
