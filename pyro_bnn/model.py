"""The part that all Bayesian networks share: plates, likelihood, and the function between latents and data.

The stateless pattern of members and rows: the model opens ``plate("members", 1)`` and, for latents that may differ
from row to row, ``plate("rows", 1)``. A guide opens the same plates with ``subsample=arange(K)`` and
``subsample=arange(B)``; Pyro's replay carries these indices into the model, whose latents then have K members and B
rows, and Pyro's rule size / subsample weighs them by 1/K and 1/B. Without such a guide (NUTS, AutoNormal, Predictive)
the same model has one member and one row.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeVar

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from pyro_bnn.likelihoods import Gaussian, Likelihood
from pyro_bnn.modes import enter_mode
from pyro_bnn.network import Network, Output, batch_size
from pyro_bnn.priors import Prior


@dataclass(frozen=True)
class Site:
    """A latent site: what a guide must know of it.

    :param name: as in a trace.
    :param shape: event shape.
    :param role: ``weight`` and ``factor`` are the random weights, ``bias`` what belongs to a member without being
        random in a rank-1 guide, ``scale`` a positive hyper-parameter or the noise, ``share`` a probability.
    :param center: value at which the network is as the user gave it (for ``scale`` and ``share``: a typical value).
    """

    name: str
    shape: torch.Size
    role: Literal["weight", "factor", "bias", "scale", "share"]
    center: Tensor | float


def register_parameters(owner: PyroModule, named: Iterable[tuple[str, nn.Parameter]]) -> None:
    """``pyro.param`` statements for parameters that a module owns, so that ``pyro.infer.SVI`` finds them.

    The store is made to hold the module's own tensors, whatever it held under these names: an entry left by an earlier
    model would otherwise be optimised in their place, silently.
    """
    if not poutine.runtime.am_i_wrapped():
        return
    store = pyro.get_param_store()
    for name, parameter in named:
        fullname = owner._pyro_get_fullname(name)
        if store._params.get(fullname) is not parameter:
            store._params[fullname] = parameter
            store._param_to_name[parameter] = fullname
            store._constraints[fullname] = torch.distributions.constraints.real
        pyro.param(fullname)


def picklable_state(module: nn.Module) -> dict[str, Any]:
    """The state of a module without what Pyro's parameter store leaves on parameters, the last plate, and caches."""
    for parameter in module.parameters():
        parameter.__dict__.pop("unconstrained", None)  # a weak reference, which the store makes anew
    return {k: v if k != "_constants" else {} for k, v in module.__dict__.items() if k != "_members"}


#: classes that ``pb.load`` can build again, by name
STORABLE: dict[str, Any] = {}

_Class = TypeVar("_Class", bound=type)


def storable(cls: _Class) -> _Class:
    """Class decorator: ``pb.load`` finds the class under its name."""
    STORABLE[cls.__name__] = cls
    return cls


class BayesianNetwork(PyroModule):
    """A network with latent weights as an ordinary Pyro model ``model(x, y=None)``.

    With ``likelihood=None`` it is the function alone, ``f = model(x)``, for use inside a larger Pyro model, which then
    writes its own observation inside ``with model.members(), pyro.plate("data", ...)``.

    :param net: any ``torch.nn.Module``; it is copied, never changed.
    :param likelihood: one of :mod:`pyro_bnn.likelihoods`, or ``None``.
    :param num_data: size N of the data set, which scales minibatches by N/B.
    :param prefix: put before the names of all sites and plates, so that two networks fit into one model.
    :param members_dim: the axis of the members plate; move it left when own plates need -2.
    :param output: which output to take when the network returns several (key, index or function).
    :param share: see :class:`~pyro_bnn.network.Network`.
    """

    def __init__(
        self,
        net: nn.Module,
        likelihood: Likelihood | None,
        num_data: int | None,
        *,
        prefix: str = "",
        members_dim: int = -2,
        output: Output = None,
        share: bool = False,
    ) -> None:
        super().__init__(prefix)
        if likelihood is not None and not isinstance(likelihood, Likelihood):
            raise TypeError(
                f"likelihood must be one of pyro_bnn.likelihoods (or None for the function alone), got {likelihood!r}"
            )
        if likelihood is not None and (not isinstance(num_data, int) or num_data < 1):
            raise ValueError(
                f"num_data={num_data!r}: expected the number of training samples, an integer of at least 1"
            )
        if members_dim > -2:
            raise ValueError(f"members_dim={members_dim}: axis -1 belongs to the data; use -2 or further left")
        self.network = Network(net, output, share)
        self.likelihood = likelihood
        self.num_data = num_data
        self.prefix = prefix
        self.members_dim = members_dim
        self.output = output
        self._constants: dict[str, tuple[Any, dist.TorchDistribution]] = {}

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments, except the network and the prior, as JSON; ``from_arguments`` takes them back."""
        return {
            "likelihood": None if self.likelihood is None else self.likelihood.describe(),
            "num_data": self.num_data,
            "prefix": self.prefix,
            "members_dim": self.members_dim,
            "output": self.output,
        }

    @classmethod
    def from_arguments(cls, net: nn.Module, arguments: dict[str, Any]) -> BayesianNetwork:
        """A model from :meth:`arguments`, with ``prior`` added and ``likelihood`` turned back into an object.

        Where :meth:`tensors` gives any, they are there as ``tensors``.
        """
        return cls(net, **arguments)

    def tensors(self) -> dict[str, Tensor]:
        """What is stored of the model beside its arguments and its network."""
        return {}

    def implied_parameters(self) -> dict[str, Tensor]:
        """Values of those parameters of the network that follow from :meth:`tensors` and are not stored, by name."""
        return {}

    def __getstate__(self) -> dict[str, Any]:
        return picklable_state(self)

    def site(self, name: str) -> str:
        """The name of a site or plate in a trace."""
        return f"{self.prefix}.{name}" if self.prefix else name

    def core(self) -> Network:
        """The network, read past Pyro's attribute hooks, which cost a millisecond a read on a large one."""
        network = self._modules["network"]
        assert isinstance(network, Network)
        return network

    def like(self) -> Tensor:
        """A tensor on the device and with the dtype of the network."""
        return next(p for p in self.core().net.parameters() if p.is_floating_point())

    # ---------------------------------------------------------------------------------- what a method defines

    def sites(self) -> list[Site]:
        """The latent sites, in the order in which model and guide sample them."""
        raise NotImplementedError(f"{type(self).__name__} must define sites()")

    def sample_latents(self) -> dict[str, Tensor]:
        """Samples all latent sites inside the members plate, in the order of :meth:`sites`."""
        raise NotImplementedError(f"{type(self).__name__} must define sample_latents()")

    def function(self, x: Any, latents: dict[str, Tensor], size: int) -> Tensor:
        """The network's output for given latents, ``[*members, 1 ..., size, *output]``."""
        raise NotImplementedError(f"{type(self).__name__} must define function()")

    def decayed(self) -> list[nn.Parameter]:
        """The point-estimated weights W, to which an optimiser's weight decay applies."""
        return []

    def moving_layers(self) -> dict[str, _NormBase]:
        """The layers whose running statistics move in training, by name."""
        layers = ((n, m) for n, m in self.core().net.named_modules() if isinstance(m, _NormBase))
        return {n: m for n, m in layers if m.track_running_stats}

    def log_prior(self) -> Tensor | None:
        """Log density of the point-estimated weights, which enters the model as one factor."""
        return None

    # ------------------------------------------------------------------------------- members as array axes

    def lead_shape(self, latents: dict[str, Tensor]) -> torch.Size:
        """The common shape of all plates from the members plate to the left."""
        shapes = {_plates(latents[s.name], len(s.shape), self.members_dim) for s in self.sites()} - {torch.Size()}
        return shapes.pop() if len(shapes) == 1 else torch.broadcast_shapes((1,), *shapes)

    def fold(self, value: Tensor, event_dim: int, lead: torch.Size) -> Tensor:
        """``[*lead, 1 ..., rows | 1, *event] -> [members | 1, rows | 1, *event]``."""
        event = value.shape[value.dim() - event_dim :]
        own = _plates(value, event_dim, self.members_dim)
        rows = value.shape[-event_dim - 1] if value.dim() > event_dim else 1
        if own.numel() == 1:
            return value.reshape((1, rows) + event)
        value = value.reshape(own + (rows,) + event)
        return value.expand(lead + (rows,) + event).reshape((-1, rows) + event)

    def unfold(self, f: Tensor, lead: torch.Size) -> Tensor:
        """``[members, size, *output] -> [*lead, 1 ..., size, *output]``."""
        return f.reshape(lead + (1,) * (-self.members_dim - 2) + f.shape[1:])

    def plated(self, value: Tensor) -> Tensor:
        """``[draws, members, *event] -> [draws, members, 1 ..., *event]``: with the axes of the plates of a program."""
        return value.reshape(value.shape[:2] + (1,) * (-self.members_dim - 1) + value.shape[2:])

    # ------------------------------------------------------------------------------------------- the program

    def prior_of(
        self, name: str, prior: Prior, center: float | Tensor, like: Tensor, tau: Tensor | None, local: Tensor | None
    ) -> dist.TorchDistribution:
        """The prior of the site of this name given its scales, built once where nothing can change it.

        :param center: see :meth:`~pyro_bnn.priors.Prior.elements`; a tensor is that of frozen parameters.
        """
        if not prior.constant:
            return site_distribution(prior, center, like, tau, local)
        validate = torch.distributions.Distribution._validate_args
        key = (like.device, like.dtype, torch.is_inference_mode_enabled(), validate)
        known = self.__dict__["_constants"].get(name)
        if known is None or known[0] != key:
            elements = prior.elements(center, like, None).expand(like.shape)
            known = self.__dict__["_constants"][name] = key, _Constant(elements, like.dim())
        built: dist.TorchDistribution = known[1]
        return built

    def members(self) -> pyro.plate:
        """The members plate of the last call, to be entered around an own observation."""
        try:
            plate: pyro.plate = self.__dict__["_members"]
        except KeyError:
            raise RuntimeError("members() belongs to a call: run f = model(x) before `with model.members()`") from None
        return plate

    def rows(self) -> pyro.plate:
        return pyro.plate(self.site("rows"), 1, dim=-1, device=str(self.like().device))

    def forward(self, x: Any, y: Tensor | None = None) -> Tensor:
        enter_mode(self)
        core, like = self.core(), self.like()
        parameters = core.parameters_by_name()
        register_parameters(self, ((f"network.net.{n}", p) for n, p in parameters.items() if p.requires_grad))
        size = batch_size(x, y)
        if y is not None and self.num_data is not None and size > self.num_data:
            raise ValueError(
                f"the batch has {size} samples, but num_data={self.num_data}: num_data is the size of the whole "
                "training set"
            )
        # Pyro warns of factors outside inference, where nobody would read this one
        log_prior = self.log_prior() if poutine.runtime.am_i_wrapped() else None
        if log_prior is not None:
            pyro.factor(self.site("weight_prior"), log_prior)
        self.__dict__["_members"] = plate = pyro.plate(
            self.site("members"), 1, dim=self.members_dim, device=str(like.device)
        )
        with plate:
            latents = self.sample_latents()
        f = self.function(x, latents, size)
        likelihood = self.likelihood
        if likelihood is None:
            return f
        data = pyro.plate(
            self.site("data"),
            self.num_data,
            subsample_size=size,
            subsample=torch.arange(size, device=like.device),
            dim=-1,
            device=str(like.device),
        )
        noise = latents.get(self.site("noise"))
        lead = len(self.lead_shape(latents)) - self.members_dim - 1
        tempered = poutine.scale(scale=1.0 / likelihood.temperature)
        with plate, data, tempered if likelihood.temperature != 1 else contextlib.nullcontext():
            return pyro.sample(self.site("obs"), likelihood.given(f, y, noise, lead), obs=y)


class _Constant(dist.Independent):
    """A distribution that never changes, and remembers how it was last expanded: plates do so at every call.

    Of Normals with one mean and standard deviation it adds up the squares before it does anything else, which takes
    half the passes over memory that the sum of log densities takes.
    """

    _expanded: _Constant | None = None

    @cached_property
    def _same_normal(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """``m, -1 / (2 s^2), -n log(s sqrt(2 pi))`` if all elements are N(m, s^2)."""
        base, zeros = self.base_dist, (0,) * (len(self.batch_shape) + len(self.event_shape))
        if not isinstance(base, torch.distributions.Normal) or any((*base.loc.stride(), *base.scale.stride())):
            return None
        m, s = base.loc[zeros], base.scale[zeros]
        n = self.event_shape.numel()
        return m, -0.5 / (s * s), -n * (s.log() + 0.5 * math.log(2 * math.pi))

    def log_prob(self, value: Tensor) -> Tensor:
        if self._same_normal is None:
            general: Tensor = super().log_prob(value)
            return general
        if self._validate_args:
            self._validate_sample(value)
        m, factor, constant = self._same_normal
        squares = F.mse_loss(value, m.expand_as(value), reduction="none")  # keeps no difference for its gradient
        if self.event_shape:
            squares = squares.sum(tuple(range(-len(self.event_shape), 0)))
        result = torch.addcmul(constant, factor, squares)
        return result.expand(torch.broadcast_shapes(result.shape, self.batch_shape))

    def expand(self, batch_shape: Any, _instance: Any = None) -> _Constant:
        batch = torch.Size(batch_shape)
        if batch == self.batch_shape:
            return self
        if self._expanded is None or self._expanded.batch_shape != batch:
            elements = self.base_dist.expand(batch + self.event_shape)
            self._expanded = _Constant(elements, self.reinterpreted_batch_ndims)
        return self._expanded


def _plates(value: Tensor, event_dim: int, members_dim: int) -> torch.Size:
    """The plate axes of a value from the members plate to the left."""
    return value.shape[: max(0, value.dim() - event_dim + members_dim + 1)]


def sample_noise(model: BayesianNetwork) -> dict[str, Tensor]:
    """The latent noise scale of a :class:`~pyro_bnn.likelihoods.Gaussian` that learns it."""
    likelihood = model.likelihood
    if not isinstance(likelihood, Gaussian) or not likelihood.learns_noise:
        return {}
    name = model.site("noise")
    return {name: pyro.sample(name, likelihood.noise_prior(model.like()))}


def sample_scales(prior: Prior, like: Tensor, name: str) -> Tensor | None:
    """The layer's ``<name>_tau``."""
    return pyro.sample(f"{name}_tau", prior.tau(like)) if prior.has_tau else None


def sample_local(prior: Prior, like: Tensor, name: str) -> Tensor | None:
    """The element-wise ``<name>_lambda``, with the shape of the site."""
    if not prior.has_lambda:
        return None
    return pyro.sample(f"{name}_lambda", prior.local(like).expand(like.shape).to_event(like.dim()))


def sample_share(prior: Prior, like: Tensor, name: str) -> tuple[Prior, Tensor | None]:
    """The layer's ``<name>_inclusion``, and the prior given it."""
    if not prior.has_inclusion:
        return prior, None
    share = pyro.sample(f"{name}_inclusion", prior.share(like))
    return prior.with_share(share), share


def site_distribution(
    prior: Prior, center: float | Tensor, like: Tensor, tau: Tensor | None, local: Tensor | None
) -> dist.TorchDistribution:
    """The prior of a site of the shape of ``like`` given its scales (which carry the plates on their left)."""
    scale = local
    if tau is not None:
        tau = tau.reshape(tau.shape + (1,) * like.dim())
        scale = tau if local is None else tau * local
    d = prior.elements(center, like, scale)
    batch = d.batch_shape[: max(0, len(d.batch_shape) + len(d.event_shape) - like.dim())]
    inner = like.dim() - len(d.event_shape)
    return d.expand(batch + like.shape[:inner]).to_event(inner)
