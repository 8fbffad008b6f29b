"""Mean-field networks of each library: a Normal for every weight, the prior N(0, 1), one draw in each step."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from pyro.infer import TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.func import functional_call

import pyro_bnn as pb
from pyro_bnn.inference import MixtureELBO
from pyro_bnn.models import Dense, MeanFieldGuide
from tests.benchmarks.peers.row import COMPILED, OURS, PLAIN, Build
from tests.benchmarks.peers.tasks import Task, plain, step_of, swapped
from tests.benchmarks.training_step import NUM_DATA, Step, compiled_pyro_step, pyro_step

#: where deviations start: softplus(-4.6) and exp(-4.6) are 0.01
RHO = -4.6
IVON = "IVON, an optimiser of its own"


@dataclass(frozen=True)
class Converted:
    """A network of a library.

    :param kl: its KL divergence to the prior, after a pass; several for a library that offers several.
    :param normals: the means and the parameters of the deviations, pair by pair, and ``deviation`` of one of these.
    """

    net: nn.Module
    kl: Mapping[str, Callable[[], Tensor]]
    normals: list[tuple[Tensor, Tensor]]
    deviation: Callable[[Tensor], Tensor] = field(default=F.softplus)


def pairs(net: nn.Module, layers: type | tuple[type, ...], names: list[tuple[str, str]]) -> list[tuple[Tensor, Tensor]]:
    """The attributes of those names of all such layers, where they are not ``None``."""
    found = [(m, a, b) for m in net.modules() if isinstance(m, layers) for a, b in names if getattr(m, a) is not None]
    return [(getattr(m, a), getattr(m, b)) for m, a, b in found]


class ByHand(nn.Module):
    """A draw of the weights of all layers but normalisation, and the KL divergence in closed form."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        layers = {name: m for name, m in net.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
        self.names = [f"{name}.{p}" for name, m in layers.items() for p, _ in m.named_parameters()]
        parameters = dict(net.named_parameters())
        for name in self.names:
            parameters[name].requires_grad_(False)
        self.loc = nn.ParameterList(parameters[name].detach().clone() for name in self.names)
        self.rho = nn.ParameterList(torch.full_like(loc, RHO) for loc in self.loc)

    def forward(self, x: Tensor) -> Tensor:
        weights = {}
        kl = []
        for name, loc, rho in zip(self.names, self.loc, self.rho, strict=True):
            scale = F.softplus(rho)
            weights[name] = loc + scale * torch.randn_like(scale)
            kl.append((0.5 * (scale**2 + loc**2 - 1) - scale.log()).sum())
        self.kl = torch.stack(kl).sum()
        y: Tensor = functional_call(self.net, weights, (x,))
        return y


def by_hand(net: nn.Module) -> Converted:
    made = ByHand(net)
    return Converted(made, {"": lambda: made.kl}, list(zip(made.loc, made.rho, strict=True)))


def bayesian_torch(kind: str, net: nn.Module) -> Converted:
    from bayesian_torch.layers import BaseVariationalLayer_
    from bayesian_torch.models.dnn_to_bnn import dnn_to_bnn, get_kl_loss

    settings = {"prior_mu": 0.0, "prior_sigma": 1.0, "posterior_mu_init": 0.0, "posterior_rho_init": RHO}
    dnn_to_bnn(net, settings | {"type": kind, "moped_enable": False, "moped_delta": 0.5})
    convolutions = [(f"mu_{name}", f"rho_{name}") for name in ("kernel", "bias")]
    linear = [(f"mu_{name}", f"rho_{name}") for name in ("weight", "bias")]
    normals = [
        pair
        for module in net.modules()
        if isinstance(module, BaseVariationalLayer_)
        for pair in pairs(module, type(module), convolutions if hasattr(module, "mu_kernel") else linear)
    ]
    return Converted(net, {"": partial(get_kl_loss, net)}, normals)


def convolution(layer: nn.Conv2d) -> dict[str, Any]:
    """The arguments of a convolution that keep its shapes."""
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
    return {name: getattr(layer, name) for name in names} | {"bias": layer.bias is not None}


def linear(layer: nn.Linear) -> dict[str, Any]:
    return {"in_features": layer.in_features, "out_features": layer.out_features, "bias": layer.bias is not None}


def torchbnn(net: nn.Module) -> Converted:
    import torchbnn

    def layer(kind: type[nn.Module], arguments: dict[str, Any]) -> nn.Module:
        made = kind(prior_mu=0.0, prior_sigma=1.0, **arguments)
        for name in ("weight_log_sigma", "bias_log_sigma"):
            if getattr(made, name) is not None:
                nn.init.constant_(getattr(made, name), RHO)
        return made

    layers = {
        nn.Linear: lambda one: layer(torchbnn.BayesLinear, linear(one)),
        nn.Conv2d: lambda one: layer(torchbnn.BayesConv2d, convolution(one)),
    }
    swapped(net, layers)
    # reduction="mean" is the default of the library
    kl = {f'reduction="{reduction}"': partial(torchbnn.BKLLoss(reduction), net) for reduction in ("sum", "mean")}
    names = [("weight_mu", "weight_log_sigma"), ("bias_mu", "bias_log_sigma")]
    return Converted(net, kl, pairs(net, (torchbnn.BayesLinear, torchbnn.BayesConv2d), names), torch.exp)


def blitz(net: nn.Module) -> Converted:
    from blitz.losses import kl_divergence_from_nn
    from blitz.modules import BayesianConv2d, BayesianLinear

    prior = {"prior_sigma_1": 1.0, "prior_pi": 1, "posterior_rho_init": RHO}
    layers = {
        nn.Linear: lambda one: BayesianLinear(**linear(one), **prior),
        nn.Conv2d: lambda one: BayesianConv2d(**convolution(one), **prior),
    }
    swapped(net, layers)
    with_bias = nn.ModuleList(m for m in net.modules() if getattr(m, "bias", None) is True)
    normals = pairs(net, (BayesianLinear, BayesianConv2d), [("weight_mu", "weight_rho")])
    normals += pairs(with_bias, (BayesianLinear, BayesianConv2d), [("bias_mu", "bias_rho")])
    return Converted(net, {"": partial(kl_divergence_from_nn, net)}, normals)


def torch_uncertainty(net: nn.Module) -> Converted:
    from torch_uncertainty.layers import BayesConv2d, BayesLinear
    from torch_uncertainty.losses.bayesian import KLDiv

    prior = {"prior_sigma_1": 1.0, "prior_pi": 1.0, "sigma_init": RHO}
    layers = {
        nn.Linear: lambda one: BayesLinear(**linear(one), **prior),
        nn.Conv2d: lambda one: BayesConv2d(**convolution(one), **prior),
    }
    swapped(net, layers)
    names = [("weight_mu", "weight_sigma"), ("bias_mu", "bias_sigma")]
    return Converted(net, {"": KLDiv(net)}, pairs(net, (BayesLinear, BayesConv2d), names))


def torchbayesian(net: nn.Module) -> Converted:
    from torchbayesian.bnn import BayesianModule, GaussianPosterior

    made = BayesianModule(net)
    normals = pairs(made, GaussianPosterior, [("mu", "rho")])
    with torch.no_grad():
        for _, rho in normals:
            rho.fill_(RHO)
    return Converted(made, {"": made.kl_divergence}, normals)


#: converted networks, by library
LIBRARIES: dict[str, Callable[[nn.Module], Converted]] = {
    "by hand": by_hand,
    "bayesian-torch, reparameterization": partial(bayesian_torch, "Reparameterization"),
    "bayesian-torch, flipout": partial(bayesian_torch, "Flipout"),
    "torchbnn": torchbnn,
    "torch-uncertainty": torch_uncertainty,
    "torchbayesian": torchbayesian,
    "blitz": blitz,
}


def library_step(library: str, task: Task) -> Step:
    made = LIBRARIES[library](task.net())
    return step_of(task, made.net, next(iter(made.kl.values())))


def ours(task: Task) -> Step:
    model = Dense(task.net(), pb.likelihoods.Categorical(), NUM_DATA)
    return pyro_step(model, MeanFieldGuide(model), *task.batch(), MixtureELBO(), task.optimizer)


def ours_compiled(task: Task) -> Step:
    model = Dense(task.net(), pb.likelihoods.Categorical(), NUM_DATA)
    return compiled_pyro_step(model, MeanFieldGuide(model), *task.batch(), task.optimizer)


def autonormal(task: Task) -> Step:
    model = Dense(task.net(), pb.likelihoods.Categorical(), NUM_DATA)
    return pyro_step(model, AutoNormal(model), *task.batch(), TraceMeanField_ELBO(), task.optimizer)


def ivon(task: Task) -> Step:
    """The optimiser that holds a Normal around the weights; the prior is its weight decay."""
    import ivon as library

    net, (x, y) = task.net(), task.batch()
    optimizer = library.IVON(net.parameters(), lr=0.1, ess=NUM_DATA, weight_decay=1 / NUM_DATA)

    def step() -> None:
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
        optimizer.step()

    return step


def ways(task: Task, compiles: bool = False) -> dict[str, Build]:
    """Every mean field of a task.

    :param compiles: whether ours is measured with ``compile=True`` too.
    """
    found: dict[str, Build] = {PLAIN: partial(plain, task), OURS: partial(ours, task)}
    found |= {f"{OURS}, {COMPILED}": partial(ours_compiled, task)} if compiles else {}
    found |= {library: partial(library_step, library, task) for library in LIBRARIES}
    return found | {IVON: partial(ivon, task), "AutoNormal (Pyro)": partial(autonormal, task)}


def divergences() -> dict[str, str]:
    """What each library's KL divergence is, over the closed form, for a 20-100-1 network in float64."""
    found = {OURS: _of_ours(), "AutoNormal (Pyro)": _of_autonormal()}
    for library, convert in LIBRARIES.items():
        try:
            found[library] = _of_library(convert)
        except ModuleNotFoundError:  # the figures of the row say so too
            found[library] = "not installed"
    return found | {IVON: "none: it is within the update"}


def _small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 100), nn.ReLU(), nn.Linear(100, 1)).double()


def _rows() -> Tensor:
    return torch.ones(3, 20, dtype=torch.float64)


@torch.no_grad()
def _given(normals: list[tuple[Tensor, Tensor]], deviation: Callable[[Tensor], Tensor]) -> float:
    """Sets means and deviations, and gives the KL divergence to N(0, 1) in closed form."""
    total = 0.0
    for mean, rho in normals:
        mean.copy_(0.5 * torch.randn_like(mean))
        rho.copy_(-1 + 0.3 * torch.randn_like(rho))
        scale = deviation(rho)
        total += float((0.5 * (scale**2 + mean**2 - 1) - scale.log()).sum())
    if sum(mean.numel() for mean, _ in normals) != 2201:
        raise ValueError("not all 2,201 weights were found")
    return total


def _of_library(convert: Callable[[nn.Module], Converted]) -> str:
    """Of each KL divergence that the library offers."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        made = convert(_small())
        exact = _given(made.normals, made.deviation)
        x = _rows()
        with torch.no_grad():

            def after_a_pass(kl: Callable[[], Tensor]) -> float:
                made.net(x)
                return float(kl())

            texts = {name: _in_words(partial(after_a_pass, kl), exact) for name, kl in made.kl.items()}
    finally:
        torch.set_default_dtype(default)
    return ", ".join(text + (f" with {name}" if name else "") for name, text in texts.items())


def _in_words(kl: Callable[[], float], exact: float, draws: int = 300) -> str:
    """A KL divergence over the exact one, with its error where it is estimated from draws."""
    ratios = [kl() / exact for _ in range(draws)]
    error = statistics.stdev(ratios) / math.sqrt(draws)
    return f"{statistics.fmean(ratios):.4g}" + (f" +- {error:.2g}, from draws" if error > 1e-9 else "")


def _of_ours() -> str:
    model = Dense(_small(), None)
    guide = MeanFieldGuide(model)
    coordinates = guide.coordinates()
    exact = _given([(coordinates[name], rho) for name, rho in guide.widths().items()], lambda r: F.softplus(r) + 1e-7)
    return _of_programs(model, guide, MixtureELBO(), exact)


def _of_autonormal() -> str:
    model = Dense(_small(), None)
    guide = AutoNormal(model)
    guide(_rows())
    exact = _given(list(zip(guide.locs.parameters(), guide.scales.parameters(), strict=True)), F.softplus)
    return _of_programs(model, guide, TraceMeanField_ELBO(), exact)


def _of_programs(model: Any, guide: Any, elbo: Any, exact: float) -> str:
    """Without a likelihood the loss is the KL divergence alone."""
    return _in_words(lambda: float(elbo.differentiable_loss(model, guide, _rows()).detach()), exact)
