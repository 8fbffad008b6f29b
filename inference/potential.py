"""The negative log joint density of a Pyro model as a function of one flat vector of unconstrained numbers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.transforms import Transform

from pyro_bnn.entry.threads import one_at_a_time
from pyro_bnn.given.fresh import fresh_copy
from pyro_bnn.modes import training_mode
from pyro_bnn.precision import asked, full_precision, require_full
from pyro_bnn.program.factorised import split
from pyro_bnn.program.model import BayesianNetwork
from pyro_bnn.program.sites import Program


class Potential:
    """``U(theta) = -log p(data, z) - log |dz / dtheta|`` in nats, with ``z = transform(theta)`` for each site.

    Calling the model with a minibatch, which its data plate scales by N/B, gives an unbiased estimate of U.

    :param model: any Pyro model whose latent sites are continuous and the same in every call.
    :param args, kwargs: arguments of the model for a first call, which finds its sites.
    :raises ValueError: when the model has no latent sites, a discrete one, one in a subsampled plate, or one whose
        support depends on other latents.
    """

    def __init__(self, model: Program, *args: object, **kwargs: object) -> None:
        self.model = model
        self._store = pyro.get_param_store().get_state()
        self._arguments = args, kwargs
        self.transforms: dict[str, Transform] = {}
        self.shapes: dict[str, torch.Size] = {}
        values: dict[str, Tensor] = {}
        for name, site in _latent_sites(self.prior_trace()):
            _require_a_state(name, site)
            self.transforms[name] = biject_to(site["fn"].support)
            values[name] = self.transforms[name].inv(site["value"])
            self.shapes[name] = values[name].shape
        if not self.shapes:
            raise ValueError("the model has no latent sites: there is nothing to sample")
        self.held: dict[str, Tensor] = {}
        self._unscored: frozenset[str] = frozenset()
        self.like = _require_one_type(values)
        self._require_fixed_supports(values)

    def _require_fixed_supports(self, values: dict[str, Tensor]) -> None:
        """A second draw from the prior must have the same transforms."""
        second: dict[str, Any] = self.prior_trace().nodes
        for name, transform in self.transforms.items():
            other = biject_to(second[name]["fn"].support) if name in second else None
            if other is None or not torch.equal(transform(values[name]), other(values[name])):
                raise ValueError(
                    f"the support of the latent site {name!r} changes with other latent values: write it in terms of a "
                    "site whose support is fixed, and transform that"
                )

    def prior_trace(self, at_network: bool = True) -> poutine.Trace:
        """A trace with all sites drawn from their priors, but those of a network at its own weights if so asked."""
        args, kwargs = self._arguments
        sites = self.model.sites() if at_network and isinstance(self.model, BayesianNetwork) else []
        centers = {site.name: site.center for site in sites}

        def value(site: Any) -> Tensor:
            fn = site["fn"]
            if site["name"] in centers:
                like = self.model.like()  # type: ignore[attr-defined]
                center = torch.as_tensor(centers[site["name"]], dtype=like.dtype, device=like.device)
                return center.expand(fn.shape())
            try:
                return fn.sample()
            except NotImplementedError:  # an improper prior: a point of its support
                return biject_to(fn.support)(torch.rand(fn.shape()) * 2 - 1)

        with torch.no_grad(), full_precision(), self._running(train=False), InitMessenger(value):
            return poutine.trace(self.model).get_trace(*args, **kwargs)

    @contextlib.contextmanager
    def _running(self, train: bool) -> Iterator[None]:
        """Where the model runs: unseen by outer handlers, and with the user's parameters, which stay as they are."""
        store = pyro.get_param_store().scope(self._store)
        with one_at_a_time, poutine.block(), store, pyro.validation_enabled(False), training_mode(train):
            yield

    def start(self, *, fresh: bool = False) -> Tensor:
        """The starting point of a chain, ``[dim]``: the weights of a network, and prior draws for all other latents.

        :param fresh: whether random weights of a network start at new values, those of its modules' own initialisation.
        :raises ValueError: when ``fresh``, and the modules cannot give a weight a new value.
        """
        nodes: dict[str, Any] = self.prior_trace().nodes
        values = {name: nodes[name]["value"] for name in self.shapes}
        if fresh and isinstance(self.model, BayesianNetwork):
            values |= self._fresh_weights(self.model)
        return self.join({name: self.transforms[name].inv(value) for name, value in values.items()})

    def _fresh_weights(self, model: BayesianNetwork) -> dict[str, Tensor]:
        """New values for the sites that are whole weights of the network."""
        shapes = {site.name: site.shape for site in model.sites()}
        parameters = dict(model.core().net.named_parameters())
        weights = {name for name, p in parameters.items() if shapes.get(model.site(name)) == p.shape}
        if not weights:
            return {}
        fresh = dict(fresh_copy(model.core().net, weights).named_parameters())
        return {model.site(name): fresh[name].detach() for name in weights}

    @property
    def dim(self) -> int:
        """Length of theta."""
        return sum(shape.numel() for shape in self.shapes.values())

    def leave_out(self, held: dict[str, Tensor], unscored: Collection[str]) -> None:
        """Fixes the latents ``held``, and leaves their densities and those of ``unscored`` out of U.

        :param held: ``{site: constrained value}``.
        """
        self.held, self._unscored = held, frozenset([*held, *unscored])
        for name in held:
            del self.shapes[name]

    def split(self, theta: Tensor) -> dict[str, Tensor]:
        """``[..., dim] -> {site: [..., *shape]}``, views, still unconstrained."""
        return dict(zip(self.shapes, split(theta, list(self.shapes.values())), strict=True))

    def join(self, values: dict[str, Tensor]) -> Tensor:
        """The inverse of :meth:`split`."""
        batch = next(values[n].shape[: values[n].dim() - len(shape)] for n, shape in self.shapes.items())
        return torch.cat([values[name].reshape(*batch, -1) for name in self.shapes], -1)

    def constrain(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """From unconstrained values to those of the model."""
        return {name: self.transforms[name](value) for name, value in values.items()}

    def __call__(self, values: dict[str, Tensor], *args: object, **kwargs: object) -> Tensor:
        """U in nats, a scalar.

        :param values: ``{site: unconstrained [*shape]}``.
        """
        return self.energy(values, args, kwargs)

    def energy(
        self,
        values: dict[str, Tensor],
        args: tuple[object, ...],
        kwargs: dict[str, object],
        power: Tensor | None = None,
    ) -> Tensor:
        """``-b log p(data | z) - log p(z) - log |dz / dtheta|`` in nats, a scalar: U for b = 1.

        Data are the observed sites, factors among them, of any model.

        :param values: ``{site: unconstrained [*shape]}``.
        :param args, kwargs: arguments of the model.
        :param power: b, a number in a tensor; ``None`` for 1.
        """
        latents = dict(self.held)
        jacobian: Any = 0.0
        for name, value in values.items():
            transform = self.transforms[name]
            latents[name] = transform(value)
            if not _is_identity(transform):
                jacobian = jacobian + transform.log_abs_det_jacobian(value, latents[name]).sum()
        with self._running(train=True), LogJoint(self._unscored, latents, power) as joint:
            poutine.condition(self.model, latents)(*args, **kwargs)
        energy: Tensor = -(joint.total + jacobian)
        if not isinstance(energy, Tensor):  # every density was left out
            return self.like.new_zeros(())
        return energy

    def log_densities(self, latents: dict[str, Tensor], *args: object, **kwargs: object) -> dict[str, Tensor]:
        """Log density of every site, in the model's own units, at given latents."""
        with torch.no_grad(), self._running(train=False):
            trace = poutine.trace(poutine.condition(self.model, latents)).get_trace(*args, **kwargs)
            trace.compute_log_prob(lambda name, site: not poutine.util.site_is_subsample(site))
        nodes: dict[str, Any] = trace.nodes
        return {name: site["log_prob_sum"] for name, site in nodes.items() if "log_prob_sum" in site}

    def offending_site(self, theta: Tensor, *args: object, **kwargs: object) -> str:
        """The first site that is not finite, or whose log density is not."""
        values = self.split(theta)
        for name, value in values.items():
            if not bool(torch.isfinite(value).all()):
                return name
        for name, density in self.log_densities(self.held | self.constrain(values), *args, **kwargs).items():
            if not math.isfinite(float(density)):
                return name
        return "unknown"


class LogJoint(Messenger):
    """Adds up log densities while the model runs.

    Those of the weights come before what the network does with them, and so their gradients after its own: a trace,
    which is scored at the end, would keep the gradients of all priors beside all activations.

    :param unscored: sites that are left out.
    :param latents: sites that are no data although their values are given.
    :param power: by which the log densities of data are multiplied; ``None`` for 1.
    """

    def __init__(
        self, unscored: Collection[str] = (), latents: Collection[str] = (), power: Tensor | None = None
    ) -> None:
        super().__init__()
        self.total: Any = 0.0
        self._unscored, self._latents, self._power = unscored, latents, power

    def _pyro_post_sample(self, msg: Any) -> None:
        if not poutine.util.site_is_subsample(msg) and msg["name"] not in self._unscored:
            if asked():
                require_full(msg["name"], msg["fn"])
            with full_precision():
                density = msg["fn"].log_prob(msg["value"], *msg["args"], **msg["kwargs"])
                added = self._sum(scale_and_mask(density, msg["scale"], msg["mask"]), msg)
            if self._power is not None and msg["is_observed"] and msg["name"] not in self._latents:
                added = added * self._power
            self.total = self.total + added

    def _sum(self, density: Tensor, msg: object) -> Tensor:
        """What a site adds to the total."""
        return density.sum()


def _is_identity(transform: Transform) -> bool:
    base = transform
    while isinstance(base, torch.distributions.transforms.IndependentTransform):
        base = base.base_transform
    return isinstance(base, torch.distributions.transforms.ComposeTransform) and not base.parts


def _latent_sites(trace: poutine.Trace) -> Iterator[tuple[str, Any]]:
    nodes: dict[str, Any] = trace.nodes
    for name, site in nodes.items():
        if site["type"] == "sample" and not site["is_observed"] and not poutine.util.site_is_subsample(site):
            yield name, site


def _require_a_state(name: str, site: Any) -> None:
    """A latent has one value for the whole data, and a gradient."""
    partial = next((f for f in site["cond_indep_stack"] if f.full_size not in (None, f.size)), None)
    if partial is not None:
        raise ValueError(
            f"the latent site {name!r} lies in the plate {partial.name!r}, which shows {partial.size} of its "
            f"{partial.full_size} rows at a time: a state for each row is needed. Take it out of the plate, or "
            "give the plate all its rows"
        )
    if site["fn"].support.is_discrete:
        raise ValueError(
            f"the latent site {name!r} is discrete ({type(site['fn']).__name__}), and has no gradient: sum it "
            "out (a mixture distribution, or pyro.infer.config_enumerate under another engine)"
        )


def _require_one_type(values: dict[str, Tensor]) -> Tensor:
    """One of the values, whose dtype and device all have."""
    first, like = next(iter(values.items()))
    for name, value in values.items():
        if value.dtype != like.dtype or value.device != like.device:
            raise ValueError(
                f"the latent sites {first!r} and {name!r} differ in dtype or device: {like.dtype}, {like.device} and "
                f"{value.dtype}, {value.device}"
            )
    return like
