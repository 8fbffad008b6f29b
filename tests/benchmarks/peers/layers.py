"""What Python spends on one layer, and many small networks at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

import pyro_bnn as pb
from pyro_bnn.models import Dense
from tests.benchmarks.peers import mean_field, rank1
from tests.benchmarks.peers.row import COMPILED, OURS, PLAIN, Build, Seconds
from tests.benchmarks.peers.tasks import Task, chain, chain_batch, plain
from tests.benchmarks.training_step import Step, sgd

LONG, SHORT = 11, 1
COMPONENTS, DEPTH = 16, 40


def of_each_length(step: Callable[[Task], Step]) -> dict[str, Step]:
    return {str(n): step(Task(partial(chain, n), chain_batch, sgd)) for n in (LONG, SHORT)}


def milliseconds_a_layer(own: Seconds, _: Seconds) -> float:
    return 1e3 * (own[str(LONG)] - own[str(SHORT)]) / (LONG - SHORT)


def layer_ways() -> dict[str, Build]:
    steps: dict[str, Callable[[Task], Step]] = {PLAIN: plain}
    steps |= {f"{OURS}, rank-1, {prior}": partial(rank1.ours, prior=prior) for prior in rank1.PRIORS}
    compiled = rank1.ours_compiled
    steps |= {f"{OURS}, rank-1, {prior}, {COMPILED}": partial(compiled, prior=prior) for prior in rank1.PRIORS}
    steps |= {
        f"{OURS}, Dense": mean_field.ours,
        f"{OURS}, Dense, {COMPILED}": mean_field.ours_compiled,
        "bayesian-torch, reparameterization": partial(mean_field.library_step, "bayesian-torch, reparameterization"),
        "AutoNormal (Pyro)": mean_field.autonormal,
    }
    return {way: partial(of_each_length, step) for way, step in steps.items()}


def _weights(net: nn.Module) -> dict[str, Tensor]:
    """Weights of all components, ``[16, 1, *shape]``, as the plates of a model have them."""
    torch.manual_seed(0)
    return {
        name: (p.detach() + 0.01 * torch.randn(COMPONENTS, 1, *p.shape)).requires_grad_()
        for name, p in net.named_parameters()
    }


def _gradients(f: Callable[[], Tensor], weights: dict[str, Tensor]) -> Step:
    def step() -> None:
        for weight in weights.values():
            weight.grad = None
        f().square().mean().backward()

    return step


def function_plain() -> Step:
    net, (x, _) = chain(DEPTH), chain_batch()
    return _gradients(lambda: net(x), dict(net.named_parameters()))


def function_ours() -> Step:
    net, (x, _) = chain(DEPTH), chain_batch()
    model: Any = Dense(net, pb.likelihoods.Categorical(), len(x)).train()
    weights = _weights(net)
    return _gradients(lambda: model.function(x, weights, len(x)), weights)


def function_by_hand() -> Step:
    net, (x, _) = chain(DEPTH), chain_batch()
    weights = _weights(net)

    def one(values: dict[str, Tensor]) -> Tensor:
        y: Tensor = functional_call(net, values, (x,))
        return y

    every = vmap(one, randomness="different")
    return _gradients(lambda: every({name: weight.squeeze(1) for name, weight in weights.items()}), weights)


FUNCTION_WAYS: dict[str, Build] = {PLAIN: function_plain, OURS: function_ours, "by hand, vmap": function_by_hand}
