"""SGHMC: sixteen chains of a small network, and one of ResNet-18.

All have the update of :mod:`pyro_bnn.inference.sgmcmc.sghmc` with a step size of .01 and a friction of .1, which
``posteriors`` writes in another form.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import pyro_bnn as pb
from pyro_bnn.inference import SGHMC
from pyro_bnn.models import Dense
from pyro_bnn.models.architectures import mlp
from tests.benchmarks import sghmc
from tests.benchmarks.peers.row import COMPILED, OURS, PLAIN, Build, Cannot, Seconds
from tests.benchmarks.sghmc import CHAINS, NUM_DATA, squeezed, stepper
from tests.benchmarks.training_step import Step, images

#: steps of all chains in a turn
STEPS = 100
SIZE, FRICTION, NOISE = 1e-2, 0.1, 0.5
#: h / sqrt N
SCALE = SIZE / math.sqrt(NUM_DATA)


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(NUM_DATA, 13), torch.randn(NUM_DATA)


def network() -> nn.Module:
    return mlp(13, (50,), 1)


def repeated(step: Step) -> Step:
    def run() -> None:
        for _ in range(STEPS):
            step()

    return run


def steps_a_second(own: Seconds, _: Seconds) -> float:
    return STEPS / own["step"]


def plain() -> Step:
    """SGD with momentum on one network."""
    (x, y), net = data(), network()
    optimizer = torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.mse_loss(net(x).squeeze(-1), y).backward()
        optimizer.step()

    return repeated(step)


def ours(**options: Any) -> Step:
    x, y = data()
    model = Dense(network(), pb.likelihoods.Gaussian(NOISE), NUM_DATA, output=squeezed)
    kernel = SGHMC(model, (x, y), step_size=SIZE, friction=FRICTION, batch_size=NUM_DATA, **options)
    return repeated(stepper(kernel, CHAINS))


def log_joint(net: nn.Module, weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Up to a constant, of one network."""
    f = functional_call(net, weights, (x,)).squeeze(-1)
    prior = torch.stack([w.square().sum() for w in weights.values()]).sum()
    return -0.5 * (((f - y) / NOISE).square().sum() + prior)


def states(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() + 0.01 * torch.randn(CHAINS, *p.shape) for name, p in net.named_parameters()}


def by_hand() -> Step:
    """Gradients by vmap, and the update on one flat tensor of all chains."""
    (x, y), net = data(), network()
    start = states(net)
    sizes = [value[0].numel() for value in start.values()]
    shapes = [value[0].shape for value in start.values()]
    theta = torch.cat([value.flatten(1) for value in start.values()], 1)
    momentum = torch.zeros_like(theta)

    def potential(flat: Tensor) -> Tensor:
        parts = flat.split(sizes)
        weights = {n: part.view(s) for n, part, s in zip(start, parts, shapes, strict=True)}
        return -log_joint(net, weights, x, y)

    gradients = vmap(grad(potential))

    def step() -> None:
        momentum.mul_(1 - FRICTION).add_(gradients(theta), alpha=-SCALE)
        momentum.add_(torch.randn_like(momentum), alpha=math.sqrt(2 * FRICTION))
        theta.add_(momentum, alpha=SCALE)

    return repeated(step)


def of_posteriors(log_posterior: Callable[..., Any], parameters: dict[str, Tensor], batch: Any, lr: float) -> Step:
    """Steps of ``posteriors.sgmcmc.sghmc``."""
    from posteriors.sgmcmc import sghmc as theirs

    transform = theirs.build(log_posterior, lr=lr, alpha=FRICTION / lr, momenta=0.0)
    state = transform.init(parameters)

    def step() -> None:
        transform.update(state, batch, inplace=True)

    return step


def posteriors() -> Step:
    """The log posterior is the sum over chains, whose gradients do not mix."""
    batch, net = data(), network()

    def log_posterior(weights: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return vmap(lambda one: log_joint(net, one, *batch))(weights).sum(), torch.empty(0)

    return repeated(of_posteriors(log_posterior, states(net), batch, SCALE))


def numpyro() -> Step:
    """A model of NumPyro, whose potential energy a scan within ``jax.jit`` follows: NumPyro has no SGHMC."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.infer.util import potential_energy

    x, y = (jnp.asarray(value.numpy()) for value in data())
    shapes = {"0": (13, 50), "1": (50,), "2": (50, 1), "3": (1,)}

    def model() -> None:
        w = {n: numpyro.sample(n, dist.Normal(jnp.zeros(s), 1.0).to_event(len(s))) for n, s in shapes.items()}
        f = jax.nn.relu(x @ w["0"] + w["1"]) @ w["2"] + w["3"]
        with numpyro.plate("data", NUM_DATA):
            numpyro.sample("obs", dist.Normal(f.squeeze(-1), NOISE), obs=y)

    gradients = jax.vmap(jax.grad(lambda weights: potential_energy(model, (), {}, weights)))

    def update(state: Any, key: Any) -> tuple[Any, None]:
        weights, momentum = state
        found = gradients(weights)
        for name, one in zip(shapes, jax.random.split(key, len(shapes)), strict=True):
            noise = math.sqrt(2 * FRICTION) * jax.random.normal(one, weights[name].shape)
            u = (1 - FRICTION) * momentum[name] - SCALE * found[name] + noise
            momentum = momentum | {name: u}
            weights = weights | {name: weights[name] + SCALE * u}
        return (weights, momentum), None

    scanned = jax.jit(lambda state, key: jax.lax.scan(update, state, jax.random.split(key, STEPS))[0])
    keys = iter(jax.random.split(jax.random.key(0), 100_000))
    weights = {n: 0.1 * jax.random.normal(next(keys), (CHAINS, *s)) for n, s in shapes.items()}
    held = [(weights, {name: jnp.zeros_like(value) for name, value in weights.items()})]

    def run() -> None:
        held[0] = jax.block_until_ready(scanned(held[0], next(keys)))

    return run


CHAIN_WAYS: dict[str, Build] = {
    PLAIN: plain,
    OURS: ours,
    f"{OURS}, {COMPILED}": partial(ours, compile=True),
    "by hand, vmap": by_hand,
    "posteriors": posteriors,
    "NumPyro's potential in jax.lax.scan": numpyro,
}


def large_posteriors() -> Step:
    """Statistics of normalisation layers are copied in each step: a gradient of functorch allows no side effects."""
    from pyro_bnn.models.architectures import resnet18

    x, y = images(64)
    net = resnet18(10)
    buffers = dict(net.named_buffers())

    def log_posterior(weights: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        copies = {name: value.clone() for name, value in buffers.items()}
        f = functional_call(net, (weights, copies), (batch[0],))
        prior = torch.stack([w.square().sum() for w in weights.values()]).sum()
        return -F.cross_entropy(f, batch[1], reduction="sum") - 0.5 * prior, torch.empty(0)

    weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    return of_posteriors(log_posterior, weights, (x, y), SIZE / math.sqrt(len(x)))


def no_sghmc(library: str) -> Step:
    raise Cannot(f"{library} has no SGHMC")


LARGE_WAYS: dict[str, Build] = {
    PLAIN: sghmc.plain,
    OURS: sghmc.sghmc,
    "posteriors": large_posteriors,
    "NumPyro": partial(no_sghmc, "NumPyro"),
}
