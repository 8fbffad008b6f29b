"""Laplace's approximation for the last layer (MacKay 1992; Kristiadi, Hein and Hennig 2020; Daxberger et al. 2021)."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import kl_divergence
from torch.distributions.transforms import ReshapeTransform

from pyro_bnn.entry import checks
from pyro_bnn.entry.threads import one_at_a_time
from pyro_bnn.inference.baselines.point import Baseline, network_at
from pyro_bnn.inference.batches import Minibatches, minibatches
from pyro_bnn.inputs import Data, Inputs
from pyro_bnn.likelihoods import Likelihood
from pyro_bnn.models.dense import Dense
from pyro_bnn.modes import settle, undisturbed
from pyro_bnn.network import Network, Output
from pyro_bnn.posterior import Posterior
from pyro_bnn.precision import widened
from pyro_bnn.priors import Normal
from pyro_bnn.program.guide import MixtureGuide
from pyro_bnn.randomness import device_of, forked
from pyro_bnn.registry import storable

#: the most weights of a last layer: their covariance takes 2 GiB in double precision
LARGEST = 2**14


class LastLayerLaplace(Baseline):
    r"""A trained network with a Gaussian over the weights of its last layer; all other weights stay at the mode.

    With features phi_n (and a 1 for the bias), outputs f_n = W phi_n and Lambda_n the Fisher information of p(y | f) in
    f at f_n, the posterior of W is

    ::

        N(W_MAP, P^-1),    P = (1 / T) sum_n Lambda_n kron phi_n phi_n^T  +  I / s^2

    for the prior N(m, s^2) and the likelihood's temperature T. P is the generalised Gauss-Newton matrix. For a linear
    Gaussian model, the result is the exact posterior; for Categorical, Bernoulli and Poisson, P is the Hessian of the
    layer. Without a prior, s maximises Laplace's evidence,

    ::

        log p(y) = log p(y | W) - |W|^2 / (2 s^2) - D log s - (1/2) log det P

    for D weights. W is not retrained with this prior.

    Source: Daxberger et al. 2021 (arXiv 2106.14806), sections 3.1 to 3.3; Kristiadi et al. 2020 (arXiv 2002.10118).

    :param net, likelihood, num_data, output: see :class:`~pyro_bnn.inference.baselines.point.Baseline`. Its output must
        be that of a ``nn.Linear``, whatever the layers before it are.
    :param prior: prior of all weights, in training and in the approximation; ``None`` trains with Normal(0, 1) and then
        chooses the prior of the last layer by the evidence.
    """

    def __init__(
        self,
        net: nn.Module,
        likelihood: Likelihood,
        num_data: int,
        *,
        prior: Normal | None = None,
        output: Output = None,
    ) -> None:
        if prior is not None and not isinstance(prior, Normal):
            raise TypeError(
                f"LastLayerLaplace takes a pyro_bnn.priors.Normal, or None to choose one, not {prior!r}: the curvature "
                "of another prior is not constant"
            )
        super().__init__(net, likelihood, num_data, prior=prior or Normal(0.0, 1.0), output=output)
        half = next((p.dtype for p in net.parameters() if p.dtype in (torch.float16, torch.bfloat16)), None)
        if half is not None:
            raise ValueError(
                f"the network is in {half}, in which no covariance can be factorised: give net.float(), and data of "
                "any precision"
            )
        self._chooses = prior is None

    def repr_arguments(self) -> dict[str, object]:
        return super().repr_arguments() | ({"prior": None} if self._chooses else {})

    @one_at_a_time
    def fit(
        self, data: Data, *, epochs: int = 0, batch_size: int = 128, seed: int | None = None, **options: Any
    ) -> Posterior:
        """Trains the network if ``epochs`` is positive, and makes one pass over the data for the curvature.

        :param data: a loader of (x, y) that gives every row once, a dataset, or the pair (x, y) itself.
        :param epochs: epochs of training; 0 if the network is already trained.
        :param batch_size: for a dataset or a pair.
        :param seed: seed of training, the only random part.
        :param options: training options of :func:`~pyro_bnn.inference.fit`.
        :return: the posterior of a :class:`~pyro_bnn.models.Dense` over the last layer. The model has the prior that
            was used, and ``log_evidence`` of this object the evidence, in nats.
        :raises ValueError: when the output is not that of a linear layer of its own, the layer is too large, the loader
            does not give every row, or there is nothing to choose the prior by.
        """
        checks.count("batch_size", batch_size)
        checks.seed("seed", seed)
        point = self._mode(data, epochs, batch_size=batch_size, seed=seed, **options)
        net, noise = network_at(point), point.draws(1).get("noise")
        noise = None if noise is None else noise[0, 0]
        with forked(device_of(point.model)):
            batches = minibatches(point.model, data, batch_size)
            layer = find_last_layer(Network(net, self.output, share=True), batches.first[0])
            own = [id(p) for p in net.get_submodule(layer).parameters()]
            names = [name for name, p in net.named_parameters() if id(p) in own]
            model = Dense(
                net, self.likelihood, self.num_data, prior=self.prior, select=names, output=self.output
            ).eval()
            curvature, log_likelihood = self._curvature(model, layer, batches, noise)
        mean = torch.cat([model.core().parameters_by_name()[name].detach().flatten() for name in names])
        if self._chooses:
            model = Dense(
                net,
                self.likelihood,
                self.num_data,
                prior=choose_prior(curvature, mean.to(curvature)),
                select=names,
                output=self.output,
            )
        assert isinstance(model.prior, Normal)
        precision = curvature + torch.eye(len(mean)).to(curvature) / model.prior.scale**2
        scale_tril = root_of_inverse(precision)
        self.log_evidence = log_likelihood + log_evidence(mean.to(scale_tril), scale_tril, model.prior)
        guide = LaplaceGuide(model, mean, scale_tril.to(mean), noise)
        settle(model, guide)
        return Posterior(model, guide, losses=point.losses)

    def _curvature(self, model: Dense, layer: str, batches: Minibatches, noise: Tensor | None) -> tuple[Tensor, float]:
        """``sum_n Lambda_n kron phi_n phi_n^T`` in the order of the parameters, and the log-likelihood, over T both."""
        core = model.core()
        linear = core.net.get_submodule(layer)
        assert isinstance(linear, nn.Linear)
        inputs: list[Tensor] = []
        handle = linear.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        precise = torch.float32 if linear.weight.device.type == "mps" else torch.float64
        total, log_likelihood, rows = None, 0.0, 0
        try:
            for x, y in batches.epoch():
                inputs.clear()
                with torch.no_grad():
                    f = widened(core(x), linear.weight)
                phi = inputs[0].flatten(0, -2).to(precise)
                if linear.bias is not None:
                    phi = torch.cat([phi, torch.ones_like(phi[:, :1])], 1)
                information = output_information(
                    self.likelihood, f.to(precise).reshape(len(phi), -1), None if noise is None else noise.to(precise)
                )
                if (there := self.likelihood.labelled(y)) is not None:
                    information = information * there.to(information.device).flatten()[:, None, None]
                part = curvature_of_layer(phi, information)
                total = part if total is None else total + part
                log_likelihood += float(self.likelihood.given(f, y, noise).log_prob(y).double().sum())
                rows += len(y)
        finally:
            handle.remove()
        if rows != self.num_data or total is None:
            raise ValueError(
                f"the loader gave {rows} rows of {self.num_data}: the curvature is a sum over all of them. Build it "
                "without drop_last= and without a sampler that repeats or leaves out rows"
            )
        outputs, width = linear.out_features, linear.in_features
        index = torch.arange(len(total), device=total.device).reshape(outputs, -1)
        order = torch.cat([index[:, :width].flatten(), index[:, width:].flatten()])  # the weight, then the bias
        temperature = self.likelihood.temperature
        return total[order][:, order] / temperature, log_likelihood / temperature


def find_last_layer(core: Network, x: Inputs) -> str:
    """The name of the linear layer whose output is that of the network.

    :raises ValueError: when there is none, it is used more than once, its weights are tied, or there are too many.
    """
    net = core.net
    calls: list[tuple[str, Tensor]] = []
    names = {module: name for name, module in net.named_modules() if isinstance(module, nn.Linear)}
    handles = [m.register_forward_hook(lambda m, _, result: calls.append((names[m], result))) for m in names]
    try:
        with undisturbed(net):
            f = core(x)
    finally:
        for handle in handles:
            handle.remove()
    found = [n for n, y in calls if y.shape in (f.shape, (*f.shape, 1)) and torch.equal(y.reshape(f.shape), f)]
    if not found:
        raise ValueError(
            "the output of the network is not that of a nn.Linear, whose weights are to be random: end the network "
            "with one (a softmax belongs to the likelihood), or pick its output with output="
        )
    name = found[-1]
    layer = net.get_submodule(name)
    shared = [
        n
        for n, m in net.named_modules()
        if m is not layer and any(p is q for p in m.parameters(recurse=False) for q in layer.parameters())
    ]
    if shared or [n for n, _ in calls].count(name) > 1:
        where = f"in {shared[0]!r} too" if shared else "more than once"
        raise ValueError(
            f"the weights of the last layer {name!r} are used {where}, so that the output is not linear in them"
        )
    size = sum(p.numel() for p in layer.parameters())
    if size > LARGEST:
        raise ValueError(
            f"the last layer {name!r} has {size:,} weights, and their covariance {size**2:,} numbers; at most "
            f"{LARGEST:,} weights are taken. A Dense(select=...) with a MeanFieldGuide has no such limit"
        )
    return name


def output_information(likelihood: Likelihood, f: Tensor, noise: Tensor | None = None) -> Tensor:
    """``[M, C] -> [M, C, C]``: the Fisher information of ``p(y | f)`` in f, at temperature 1.

    It is the Hessian in g, at g = f, of ``KL(p(y | f) || p(y | g))``, which all likelihoods have in closed form: for
    Categorical diag(p) - p p^T, for Gaussian I / sigma^2.
    """
    with torch.enable_grad():
        at, g = f.detach(), f.detach().clone().requires_grad_()
        kl = kl_divergence(likelihood.distribution(at, noise), likelihood.distribution(g, noise))
        (slope,) = torch.autograd.grad(kl.sum(), g, create_graph=True)
        rows = [torch.autograd.grad(slope[:, c].sum(), g, retain_graph=True)[0] for c in range(f.shape[1])]
    return torch.stack(rows, 1)


def curvature_of_layer(phi: Tensor, information: Tensor) -> Tensor:
    """``sum_n Lambda_n kron phi_n phi_n^T``, ``[C D, C D]``.

    :param phi: features, ``[M, D]``.
    :param information: Lambda, ``[M, C, C]``.
    """
    blocks = [phi.T @ (information[:, c, :, None] * phi[:, None, :]).flatten(1) for c in range(information.shape[1])]
    return torch.cat(blocks)


def choose_prior(curvature: Tensor, mean: Tensor) -> Normal:
    """The prior N(0, s^2) that maximises Laplace's evidence.

    With the eigenvalues l_i of the curvature and the precision a = 1 / s^2 the derivative of the evidence by a is
    ``(sum_i l_i / (l_i + a) / a - |W|^2) / 2`` (MacKay 1992), which falls with a: there is one maximum.
    """
    eigenvalues, square = torch.linalg.eigvalsh(curvature).clamp_min(0), float(mean.square().sum())
    largest = float(eigenvalues.max())
    if not (square > 0 and largest > 0):
        raise ValueError(
            "the evidence has no maximum, as the last layer "
            + ("is zero" if square == 0 else "sees no features")
            + ": train the network first (epochs=), or give prior="
        )

    def slope(precision: float) -> float:
        return float((eigenvalues / (eigenvalues + precision)).sum()) - precision * square

    from scipy.optimize import brentq  # takes a third of a second to import

    precision = brentq(slope, min(largest, 0.5 / square), len(mean) / square, rtol=1e-12)
    return Normal(0.0, 1 / math.sqrt(precision))


def log_evidence(mean: Tensor, scale_tril: Tensor, prior: Normal) -> float:
    """``log p(W) + (D / 2) log(2 pi) + (1/2) log det P^-1``: Laplace's evidence but for the likelihood, in nats."""
    log_prior = prior.elements(0.0, mean, None).log_prob(mean).sum()
    return float(log_prior + len(mean) / 2 * math.log(2 * math.pi) + scale_tril.diagonal().log().sum())


def root_of_inverse(precision: Tensor) -> Tensor:
    """The lower triangular L with ``L L^T = P^-1``, without ever forming the inverse."""
    flipped = torch.linalg.cholesky(precision.flip(0, 1)).flip(0, 1)  # P = U U^T with U upper triangular
    identity = torch.eye(len(precision), dtype=precision.dtype, device=precision.device)
    return torch.linalg.solve_triangular(flipped.mT, identity, upper=False)


@storable
class LaplaceGuide(MixtureGuide):
    """One Gaussian ``N(mean, L L^T)`` over all weights of a model, and a point for its noise. It has no parameters.

    Every site is normal given those before it, as L is triangular: each has a density of its own, and their product is
    that of the Gaussian.

    :param model: a :class:`~pyro_bnn.models.Dense`.
    :param mean: of the weights one after the other, ``[D]``.
    :param scale_tril: L, ``[D, D]``.
    :param noise: the noise, where the model learns it.
    :raises ValueError: when they are not of the size of the model.
    """

    def __init__(self, model: Dense, mean: Tensor, scale_tril: Tensor, noise: Tensor | None = None) -> None:
        super().__init__(model, own=lambda site: False)
        self._noise_site = model.site("noise")
        self._weight_sites = [site for site in model.sites() if site.role == "weight"]
        size = sum(site.shape.numel() for site in self._weight_sites)
        if mean.shape != (size,) or scale_tril.shape != (size, size):
            raise ValueError(
                f"the model has {size} weights: expected a mean of shape ({size},) and a scale_tril of shape "
                f"({size}, {size}), got {tuple(mean.shape)} and {tuple(scale_tril.shape)}"
            )
        for name, value in (("mean", mean), ("scale_tril", scale_tril), ("noise", noise)):
            # products with a matrix that comes from disk round as with this one when both lie in memory alike
            self.register_buffer(name, None if value is None else value.detach().to(model.like().device).contiguous())

    @classmethod
    def from_tensors(cls, model: Any, arguments: dict[str, Any], tensors: dict[str, Tensor]) -> LaplaceGuide:
        return cls(model, tensors["mean"], tensors["scale_tril"], tensors.get("noise"))

    def like(self) -> Tensor:
        return self.get_buffer("mean")

    def repr_arguments(self) -> dict[str, object]:
        return {"weights": len(self.get_buffer("mean")), "sites": len(self._weight_sites)}

    def forward(self, x: Inputs, y: Tensor | None = None) -> dict[str, Tensor]:
        mean, root, noise = self.get_buffer("mean"), self.get_buffer("scale_tril"), self._buffers["noise"]
        values: dict[str, Tensor] = {}
        standard, start = mean[:0], 0
        with self._plate("members", 1, self.members_dim, mean.device):
            if noise is not None:
                values[self._noise_site] = pyro.sample(self._noise_site, dist.Delta(noise))
            for site in self._weight_sites:
                stop = start + site.shape.numel()
                loc = mean[start:stop] + standard @ root[start:stop, :start].mT
                own = root[start:stop, start:stop]
                flat = dist.MultivariateNormal(loc, scale_tril=own, validate_args=False)
                shaped = dist.TransformedDistribution(flat, [ReshapeTransform(flat.event_shape, site.shape)])
                value = values[site.name] = pyro.sample(site.name, shaped)
                rest = value.reshape(*value.shape[: value.dim() - len(site.shape)], -1) - loc
                new = torch.linalg.solve_triangular(own, rest.unsqueeze(-1), upper=False).squeeze(-1)
                standard = torch.cat([standard.expand(*new.shape[:-1], -1), new], -1)
                start = stop
        return values
