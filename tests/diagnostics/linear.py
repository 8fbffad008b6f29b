"""Posteriors of linear functions, whose outputs are worked out by one product."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import pyro_bnn as pb


def linear(weights: Tensor, likelihood: pb.likelihoods.Likelihood | None) -> pb.Posterior:
    """Stored draws of f(x) = W x: weights ``[draws, members, outputs, inputs]``."""
    with torch.random.fork_rng():
        net = nn.Linear(weights.shape[-1], weights.shape[-2], bias=False).to(weights.dtype)
        model = pb.models.Dense(net, likelihood, None if likelihood is None else 100)
    return pb.Posterior.from_draws(model, {"weight": weights})


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sampled(logits: Tensor, seed: int = 1) -> Tensor:
    """Labels ``[N]`` from the softmax of logits ``[N, C]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
