"""Monte Carlo dropout (Gal and Ghahramani 2016, arXiv 1506.02142)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_bnn.entry import checks
from pyro_bnn.entry.threads import one_at_a_time
from pyro_bnn.inference.baselines.masks import Masks, dropout_modules, find_masks, mask_shape
from pyro_bnn.inference.baselines.point import Baseline, network_at
from pyro_bnn.inference.batches import minibatches
from pyro_bnn.inputs import Data, Inputs
from pyro_bnn.likelihoods import Likelihood
from pyro_bnn.modes import settle
from pyro_bnn.network import Network, Output
from pyro_bnn.posterior import Posterior
from pyro_bnn.priors import Normal, PriorLike
from pyro_bnn.priors.choice import resolve
from pyro_bnn.program.guide import MixtureGuide
from pyro_bnn.program.model import BayesianNetwork
from pyro_bnn.program.sites import Site
from pyro_bnn.randomness import device_of, forked
from pyro_bnn.registry import storable

#: what an alpha dropout puts in the place of a unit: the value of SELU far to the left
SELU_LIMIT = -1.7580993408473766


class MCDropout(Baseline):
    r"""A network that is trained with dropout and predicts with dropout: the dropout masks are random.

    ::

        W = argmax_W  log p(W) + sum_n E_m log p(y_n | net_W(x_n, m)),      m ~ Bernoulli(1 - p) for every unit
        p(y | x) = E_m p(y | net_W(x, m))

    Every ``nn.Dropout`` of the network (also 1d, 2d, 3d, alpha and feature-alpha) with p > 0 takes part. In training,
    masks are drawn separately for every row, as usual. **A draw of the posterior is one mask for each unit, the same
    for all rows**. A draw is thus a function, as in every posterior of this package; common practice draws a mask for
    each row. For a single row, both have the same distribution; for several rows, the joint distributions differ.
    Dropout inside attention and recurrent layers is off in prediction, and calls of ``F.dropout`` are an error.

    The result is not a Bayesian posterior: its width depends on p and not on the amount of data.

    Source: equations 4 to 8 of the paper.

    :param net, likelihood, num_data, prior, output: see :class:`~pyro_bnn.inference.baselines.point.Baseline`.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        dropouts = dropout_modules(self.net)
        if not dropouts:
            raise ValueError(
                "the network has no dropout to draw from: put nn.Dropout(p) with p > 0 before the layers whose weights "
                "are to be uncertain, and train with it. Calls of torch.nn.functional.dropout have no name and do not "
                "count"
            )
        everything = next((name for name, module in dropouts.items() if module.p >= 1), None)
        if everything is not None:
            raise ValueError(f"the dropout {everything!r} has p=1 and drops everything: choose p below 1")
        self._require_own_location("the posterior keeps only those that training ends at")

    @one_at_a_time
    def fit(
        self, data: Data, *, epochs: int = 0, batch_size: int = 128, seed: int | None = None, **options: Any
    ) -> Posterior:
        """Trains the network if ``epochs`` is positive, and finds its dropout masks.

        :param data: data in the forms that :func:`~pyro_bnn.inference.fit` accepts.
        :param epochs: epochs of training; 0 if the network is already trained.
        :param batch_size: for a dataset or a pair.
        :param seed: seed of training, the only random part.
        :param options: training options of :func:`~pyro_bnn.inference.fit`.
        :return: the posterior of a :class:`DropoutNetwork`.
        :raises ValueError: when the network calls ``F.dropout`` itself, or reaches none of its dropout modules.
        """
        checks.count("batch_size", batch_size)
        checks.seed("seed", seed)
        point = self._mode(data, epochs, batch_size=batch_size, seed=seed, **options)
        net, noise = network_at(point), point.draws(1).get("noise")
        noise = None if noise is None else noise[0, 0]
        with forked(device_of(point.model)):
            first = minibatches(point.model, data, batch_size).first
        masks = find_masks(Network(net, self.output, share=True), first[0])
        model = DropoutNetwork(net, self.likelihood, self.num_data, masks=masks, prior=self.prior, output=self.output)
        guide = DropoutGuide(model, noise)
        settle(model, guide)
        return Posterior(model, guide, losses=point.losses)


@storable
class DropoutNetwork(BayesianNetwork):
    """Pyro model ``m ~ Bernoulli(1 - p), y ~ likelihood(net_W(x, m))`` with point estimates W.

    A dropout module has the site ``<module>.mask``, or ``<module>.mask_0``, ``<module>.mask_1`` ... when the network
    calls it several times. The module gives ``x m / (1 - p)``. An alpha dropout gives ``a (x m + c (1 - m - p))`` with
    c the limit of SELU and a = ((1 - p) (1 + p c^2))^-1/2, by which units keep their mean of 0 and variance of 1
    (Klambauer et al. 2017, arXiv 1706.02515).

    :param net: a network with dropout modules; the model works on a copy.
    :param likelihood: what the output means.
    :param num_data: size N of the training set.
    :param masks: of every module, as :func:`~pyro_bnn.inference.baselines.masks.find_masks` finds them.
    :param prior: of the weights W, whose log density enters the model as one factor.
    :param prefix, members_dim, output: see :class:`~pyro_bnn.program.model.BayesianNetwork`.
    """

    def __init__(
        self,
        net: nn.Module,
        likelihood: Likelihood | None,
        num_data: int | None = None,
        *,
        masks: dict[str, Masks],
        prior: PriorLike = Normal(0.0, 1.0),
        prefix: str = "",
        members_dim: int = -2,
        output: Output = None,
    ) -> None:
        super().__init__(net, likelihood, num_data, prefix=prefix, members_dim=members_dim, output=output)
        self.masks, self.prior = masks, prior
        self.rates: dict[str, float] = {}
        self._calls: dict[str, list[str]] = {}
        self._sites: list[Site] = []
        if likelihood is not None and likelihood.learns_noise:
            self._sites.append(Site(self.site("noise"), torch.Size(), "scale", 1.0))
        for module, own in masks.items():
            names = (
                [f"{module}.mask_{i}" for i in range(len(own.shapes))] if len(own.shapes) > 1 else [f"{module}.mask"]
            )
            self._calls[module] = [self.site(name) for name in names]
            for name, shape in zip(self._calls[module], own.shapes, strict=True):
                self.rates[name] = own.rate
                self._sites.append(Site(name, torch.Size(shape), "factor", 1 - own.rate))
        self.train(self.training)

    def train(self, mode: bool = True) -> DropoutNetwork:
        """The dropout modules themselves never drop: their masks are latent."""
        super().train(mode)
        for module in dropout_modules(self.core().net).values():
            module.eval()
        return self

    def arguments(self) -> dict[str, object]:
        return super().arguments() | {"masks": {name: asdict(own) for name, own in self.masks.items()}}

    @classmethod
    def from_arguments(cls, net: nn.Module, arguments: dict[str, Any]) -> DropoutNetwork:
        masks = {name: Masks(**own) for name, own in arguments.pop("masks").items()}
        return cls(net, masks=masks, **arguments)

    def sites(self) -> list[Site]:
        return self._sites

    def repr_fields(self) -> dict[str, object]:
        return super().repr_fields() | {"masks": len(self.rates)}

    def weights_of(self, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        raise TypeError(
            "a draw of MC dropout is a mask for each unit, and not a network with other weights: use "
            "posterior.predict(x), or posterior.model.core().net for the network without its masks"
        )

    def sample_latents(self) -> dict[str, Tensor]:
        values = self.sample_noise()
        like = self.like()
        for site in self._sites:
            if site.name in self.rates:
                values[site.name] = pyro.sample(site.name, mask_distribution(site, self.rates[site.name], like))
        return values

    def log_prior(self) -> Tensor | None:
        total = self.like().new_zeros(())
        for name, parameter in self.core().parameters_by_name().items():
            if parameter.requires_grad:
                prior = resolve(self.prior, (name,), parameter.detach())
                if prior.has_tau or prior.has_lambda or prior.has_inclusion:
                    raise ValueError(f"the prior of {name!r} has scales of its own, which are no latents of this model")
                total = total + prior.elements(0.0, parameter, None).log_prob(parameter).sum()
        return total

    def function(self, x: Inputs, latents: dict[str, Tensor], size: int) -> Tensor:
        lead, core = self.lead_shape(latents), self.core()
        plates = lead + (1,) * (-self.members_dim - 1)
        masks = {
            site.name: latents[site.name].expand(plates + site.shape).reshape((-1,) + site.shape)
            for site in self._sites
            if site.name in self.rates
        }

        def run(own: dict[str, Tensor]) -> Tensor:
            with self._applied(own):
                return core(x)

        return self.unfold(core.for_each(run, masks), lead)

    @contextlib.contextmanager
    def _applied(self, masks: dict[str, Tensor]) -> Iterator[None]:
        """Inside, every dropout module applies the mask of its next call."""
        handles = []
        for name, sites in self._calls.items():
            module = self.core().net.get_submodule(name)
            calls = iter([masks[site] for site in sites])
            handles.append(module.register_forward_hook(_hook(name, calls, self.masks[name].rate)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _hook(name: str, masks: Iterator[Tensor], rate: float) -> Callable[[nn.Module, object, Tensor], Tensor]:
    def apply(module: nn.Module, args: object, x: Tensor) -> Tensor:
        mask = next(masks, None)
        if mask is None:
            raise ValueError(f"the dropout {name!r} is called more often than in the pass that its masks were made for")
        if mask_shape(module, x.shape) != list(mask.shape):
            raise ValueError(
                f"the dropout {name!r} has masks for rows of shape {tuple(mask.shape)}, and got {tuple(x.shape[1:])}: "
                "a draw is one mask for each unit, so that all inputs must have the shape of those of training"
            )
        if isinstance(module, (nn.AlphaDropout, nn.FeatureAlphaDropout)):
            a = ((1 - rate) * (1 + rate * SELU_LIMIT**2)) ** -0.5
            return a * (x * mask + SELU_LIMIT * (1 - mask - rate))
        return x * (mask / (1 - rate))

    return apply


def mask_distribution(site: Site, rate: float, like: Tensor) -> dist.TorchDistribution:
    """``Bernoulli(1 - p)`` for every element of a mask."""
    return dist.Bernoulli(like.new_full((), 1 - rate)).expand(site.shape).to_event(len(site.shape))


@storable
class DropoutGuide(MixtureGuide):
    """The guide of MC dropout: masks from ``Bernoulli(1 - p)``, as in the model, and a point for the noise.

    :param model: a :class:`DropoutNetwork`.
    :param noise: the noise scale, if the model learns it.
    """

    def __init__(self, model: DropoutNetwork, noise: Tensor | None = None) -> None:
        super().__init__(model, own=lambda site: False)
        self._noise_site = model.site("noise")
        self._masks = [(site, model.rates[site.name]) for site in model.sites() if site.name in model.rates]
        self.register_buffer("_like", model.like().new_zeros(()), persistent=False)
        self.register_buffer("noise", None if noise is None else noise.detach().to(model.like().device))

    @classmethod
    def from_tensors(cls, model: Any, arguments: dict[str, Any], tensors: dict[str, Tensor]) -> DropoutGuide:
        return cls(model, tensors.get("noise"))

    def like(self) -> Tensor:
        return self.get_buffer("_like")

    def repr_arguments(self) -> dict[str, object]:
        return {"masks": len(self._masks), "units": sum(site.shape.numel() for site, _ in self._masks)}

    def _weights(self, take: Callable[[Tensor], Tensor]) -> dict[str, dist.TorchDistribution]:
        noise = self._buffers["noise"]
        found = {} if noise is None else {self._noise_site: dist.Delta(noise)}
        return found | {site.name: mask_distribution(site, rate, self.like()) for site, rate in self._masks}
