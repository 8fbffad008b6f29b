"""The base class of all Bayesian networks: plates, likelihood, and the function between latents and data.

The stateless pattern of members and rows: the model opens ``plate("members", 1)`` and, for latents that may differ
from row to row, ``plate("rows", 1)``. A guide opens the same plates with ``subsample=arange(K)`` and
``subsample=arange(B)``; Pyro's replay carries these indices into the model, whose latents then have K members and B
rows, and Pyro's size / subsample scaling weights them by 1/K and 1/B. Without such a guide (NUTS, AutoNormal,
Predictive) the same model has one member and one row.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal, Self, TypedDict

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from pyro_bnn import display
from pyro_bnn.entry import checks
from pyro_bnn.given.copying import unwrapped
from pyro_bnn.given.fixed import require_random, with_row_of
from pyro_bnn.inputs import Inputs
from pyro_bnn.likelihoods import Gaussian, Likelihood
from pyro_bnn.modes import enter_mode
from pyro_bnn.network import Network, Output, batch_size
from pyro_bnn.precision import widened
from pyro_bnn.priors import Prior, PriorLike
from pyro_bnn.program.module import ProgramModule, picklable_state, register_parameters, require_network
from pyro_bnn.program.sites import Site, SitePrior, sample_local, sample_share, site_distribution
from pyro_bnn.program.statements import factor, is_traced, plate, sample, scale
from pyro_bnn.selection import Select, select_parameters

#: see :meth:`BayesianNetwork.forms`
Form = Literal["dense", "rank-1", "low-rank", "codebook", "point", "frozen"]


class NetworkOptions(TypedDict, total=False):
    """Keyword arguments that every :class:`BayesianNetwork` has.

    ``prefix: str = ""`` precedes the names of all sites and plates, so that one model can contain two networks;
    ``members_dim: int = -2`` is the axis of the members plate; move it left when your own plates need -2;
    ``output = None`` chooses the output when the network returns several (key, index or function); by default its
    ``logits``, if it has them.
    """

    prefix: str
    members_dim: int
    output: Output


class BayesianNetwork(ProgramModule):
    """Base class: a network with latent weights as an ordinary Pyro model ``model(x, y=None)``.

    With ``likelihood=None`` the model is only the function, ``f = model(x)``, for use inside a larger Pyro model, which
    then adds its own observation inside ``with model.members_plate(), pyro.plate("data", ...)``.

    :param net: any ``torch.nn.Module``; it is copied and never changed.
    :param likelihood: one of :mod:`pyro_bnn.likelihoods`, or ``None``.
    :param num_data: size N of the data set, which scales the likelihood of minibatches by N/B.
    :param prefix, members_dim, output: see :class:`NetworkOptions`.
    :param share: see :class:`~pyro_bnn.network.Network`.
    """

    in_place_of_network = (
        ": its network is copy.deepcopy(model.core().net).requires_grad_(). For the model as it is use "
        "pyro_bnn.models.MeanFieldGuide, pyro_bnn.inference.SGHMC or SVGD with AutoParticles"
    )
    #: the prior as given, and resolved for each site that has one
    prior: PriorLike
    priors: dict[str, Prior]

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
        require_network(net)
        super().__init__(checks.text("prefix", prefix))
        if output is not None and not isinstance(output, (str, int)) and not callable(output):
            raise TypeError(f"output={output!r}: expected a key, an index or a function of what the network returns")
        if likelihood is not None and not isinstance(likelihood, Likelihood):
            kind = f": write {likelihood.__name__}()" if isinstance(likelihood, type) else ""
            raise TypeError(
                f"likelihood must be one of pyro_bnn.likelihoods (or None for the function alone), got {likelihood!r}"
                f"{kind}"
            )
        if likelihood is not None or num_data is not None:
            num_data = checks.count("num_data", num_data)
        if isinstance(members_dim, bool) or not isinstance(members_dim, int):
            raise TypeError(f"members_dim={members_dim!r}: expected a whole number, -2 or less")
        if members_dim > -2:
            raise ValueError(f"members_dim={members_dim}: axis -1 belongs to the data; use -2 or further left")
        self.network = Network(net, output, share)
        self.likelihood = likelihood
        self.num_data = num_data
        self.prefix = prefix
        self.members_dim = members_dim
        self.output = output
        # whose modules users may name layers by; the model does not keep it alive
        self._given = weakref.ref(unwrapped(net))
        self._constants: dict[str, tuple[object, dist.TorchDistribution]] = {}

    def arguments(self) -> dict[str, object]:
        """The keyword arguments, except the network and the prior, as JSON for :meth:`from_arguments`."""
        return {
            "likelihood": None if self.likelihood is None else self.likelihood.describe(),
            "num_data": self.num_data,
            "prefix": self.prefix,
            "members_dim": self.members_dim,
            "output": self.output,
        }

    @classmethod
    def from_arguments(cls, net: nn.Module, arguments: dict[str, Any]) -> Self:
        """A model from :meth:`arguments`, with ``prior`` added and ``likelihood`` turned back into an object.

        If :meth:`tensors` gives any, they are added as ``tensors``.
        """
        return cls(net, **arguments)

    def on(self, net: nn.Module) -> Self:
        """The same model for another network, with the same likelihood, priors and options."""
        return self.from_arguments(net, self.arguments() | {"likelihood": self.likelihood, "prior": self.prior})

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are saved for the model, beside its arguments and its network."""
        return {}

    def implied_parameters(self) -> dict[str, Tensor]:
        """Values of those parameters of the network that follow from :meth:`tensors` and are not stored, by name."""
        return {}

    def __getstate__(self) -> dict[str, object]:
        return picklable_state(self)

    def __repr__(self) -> str:
        return display.text(f"{type(self).__name__} of {display.name_of(self.core().net)}", self.repr_fields())

    def repr_fields(self) -> dict[str, object]:
        """The fields of the model's ``repr``, by name."""
        forms, parameters = self.forms(), self.core().parameters_by_name()
        kept = {name: p for name, p in parameters.items() if forms[name] not in ("dense", "codebook")}
        counts = {
            "random": sum(site.shape.numel() for site in self.sites()),
            "point estimates": sum(p.numel() for p in kept.values() if p.requires_grad),
            "frozen": sum(p.numel() for p in kept.values() if not p.requires_grad),
        }
        return {
            "likelihood": "none: the function alone" if self.likelihood is None else repr(self.likelihood),
            "num_data": None if self.num_data is None else display.number(self.num_data),
            "prior": self._priors_in_words(),
            "parameters": ", ".join(f"{count:,} {what}" for what, count in counts.items() if count),
        }

    def _priors_in_words(self) -> str:
        """The prior of all sites, or each with the number of sites that it is for."""
        of_sites: Mapping[str, Prior] = self.__dict__.get("priors", {})
        found = [display.argument(prior) for prior in of_sites.values()]
        each = dict.fromkeys(found)
        if not each:
            return display.argument(self.prior)
        return ", ".join(f"{one} ({found.count(one)} of {len(found)})" if len(each) > 1 else one for one in each)

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

    def selected(
        self, select: Select, candidates: Mapping[str, Tensor], option: str = "select", what: str = "parameters"
    ) -> list[str]:
        """The names of the parameters that a selection matches; see :func:`~pyro_bnn.selection.select_parameters`."""
        known: weakref.ref[nn.Module] | None = self.__dict__.get("_given")
        given = None if known is None else known()
        return select_parameters(select, candidates, self.core().net, given=given, option=option, what=what)

    def selected_random(
        self, select: Select, candidates: Mapping[str, Tensor], option: str = "select", what: str = "parameters"
    ) -> list[str]:
        """As :meth:`selected`, for parameters that are to be random.

        :raises ValueError: also when one of them cannot be; see :mod:`pyro_bnn.given.fixed`.
        """
        names = self.selected(select, candidates, option, what)
        require_random(self.core().net, names)
        return names

    def held(self, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Draws ``{site: [*lead, *event]}`` in which the padding rows of embedding tables do not vary.

        These rows are not random: values that the site of a whole table has for them have no effect.
        """
        core, found = self.core(), dict(draws)
        for name, row in core.padding.items():
            site, own = self.site(name), core.net.get_parameter(name)
            if site in found:
                found[site] = with_row_of(found[site], own, row)
        return found

    # ---------------------------------------------------------------------------------- what a method defines

    def sites(self) -> list[Site]:
        """The latent sites, in the order in which model and guide sample them."""
        raise NotImplementedError(f"{type(self).__name__} must define sites()")

    def sample_latents(self) -> dict[str, Tensor]:
        """Samples all latent sites inside the members plate, in the order of :meth:`sites`."""
        raise NotImplementedError(f"{type(self).__name__} must define sample_latents()")

    def function(self, x: Inputs, latents: dict[str, Tensor], size: int) -> Tensor:
        """The network's output for given latents, ``[*members, 1 ..., size, *output]``."""
        raise NotImplementedError(f"{type(self).__name__} must define function()")

    def forms(self) -> dict[str, Form]:
        """The form in which each parameter is random; ``"point"`` is trained but not random, ``"frozen"`` neither."""
        parameters = self.core().parameters_by_name()
        return {name: "point" if p.requires_grad else "frozen" for name, p in parameters.items()}

    def weights_of(self, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``{parameter: value}``: the parameters of the plain network for one draw of one member.

        Parameters that it leaves out have the values in :meth:`core`.

        :param latents: ``{site: [*event]}``, one of the n draws of ``posterior.sample(n)``.
        :raises TypeError: for a model whose draws are not weights.
        """
        raise TypeError(
            f"the draws of {type(self).__name__} are not weights: use posterior.predict(x) for its functions"
        )

    def decayed(self) -> list[nn.Parameter]:
        """The point-estimated weights W, to which an optimiser's weight decay applies."""
        return []

    def moving_layers(self) -> dict[str, _NormBase]:
        """The layers whose running statistics training updates, by name."""
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
        if own.numel() == 1 or own == lead:
            shape = (own.numel(), rows) + event
            return value if value.shape == shape else value.reshape(shape)
        value = value.reshape(own + (rows,) + event)
        return value.expand(lead + (rows,) + event).reshape((-1, rows) + event)

    def unfold(self, f: Tensor, lead: torch.Size) -> Tensor:
        """``[members, size, *output] -> [*lead, 1 ..., size, *output]``."""
        return f.reshape(lead + (1,) * (-self.members_dim - 2) + f.shape[1:])

    def plated(self, value: Tensor) -> Tensor:
        """``[draws, members, *event] -> [draws, members, 1 ..., *event]``: with the axes of the plates of a program."""
        return value.reshape(value.shape[:2] + (1,) * (-self.members_dim - 1) + value.shape[2:])

    # -------------------------------------------------------------------------- weights under their priors

    def list_weight_sites(self, priors: dict[str, Prior], centers: dict[str, Tensor]) -> list[Site]:
        """The sites of weights and of the scales of their priors, in the order of :meth:`sample_weights`."""
        scales, weights = [], []
        for name, value in centers.items():
            prior = priors[name]
            if prior.has_tau:
                scales.append(Site(self.site(f"{name}_tau"), torch.Size(), "scale", prior.typical_tau()))
            if prior.has_inclusion:
                scales.append(Site(self.site(f"{name}_inclusion"), torch.Size(), "share", prior.typical_share()))
            if prior.has_lambda:
                scales.append(Site(self.site(f"{name}_lambda"), value.shape, "scale", 1.0))
            weights.append(Site(self.site(name), value.shape, "weight", value))
        if self.likelihood is not None and self.likelihood.learns_noise:
            scales.append(Site(self.site("noise"), torch.Size(), "scale", 1.0))
        return scales + weights

    def sample_weights(
        self,
        priors: dict[str, Prior],
        likes: dict[str, Tensor],
        centers: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> dict[str, Tensor]:
        """Samples the weights given their scales, all inside the members plate; ``{site: value}``.

        :param likes: ``{name: tensor with the shape of the weight}``, under a pretrained prior its given value.
        :param centers: the location that ``loc=None`` stands for, by name, where it is not 0.
        """
        values: dict[str, Tensor] = {}
        given: dict[str, tuple[Prior, Tensor | None, Tensor | None]] = {}
        for name, like in likes.items():
            site = self.site(name)
            tau = self.sample_scale(priors[name], like, site)
            prior, share = sample_share(priors[name], like, site)
            local = sample_local(prior, like, site)
            given[name] = prior, tau, local
            for suffix, value in (("tau", tau), ("inclusion", share), ("lambda", local)):
                if value is not None:
                    values[f"{site}_{suffix}"] = value
        values |= self.sample_noise()
        for name, like in likes.items():
            site, (prior, tau, local) = self.site(name), given[name]
            center = centers.get(name, like if prior.is_pretrained else 0.0)
            values[site] = sample(site, self.prior_of(site, prior, center, like, tau, local))
        return values

    def sample_scale(self, prior: Prior, like: Tensor, site: str) -> Tensor | None:
        """Samples the layer's ``<site>_tau``; ``None`` if the prior has none."""
        if not prior.has_tau:
            return None
        return sample(site := f"{site}_tau", self._constant(site, like, lambda: SitePrior(prior.tau(like), ())))

    def sample_noise(self) -> dict[str, Tensor]:
        """The latent noise scale of a :class:`~pyro_bnn.likelihoods.Gaussian` that learns it, else empty."""
        likelihood = self.likelihood
        if not isinstance(likelihood, Gaussian) or not likelihood.learns_noise:
            return {}
        name = self.site("noise")
        like = self.like()
        return {name: sample(name, self._constant(name, like, lambda: SitePrior(likelihood.noise_prior(like), ())))}

    # ------------------------------------------------------------------------------------------- the program

    def prior_of(
        self, name: str, prior: Prior, center: float | Tensor, like: Tensor, tau: Tensor | None, local: Tensor | None
    ) -> dist.TorchDistribution:
        """The prior of the site of this name given its scales.

        :param center: see :meth:`~pyro_bnn.priors.Prior.elements`; a tensor holds the values of frozen parameters.
        """
        if not prior.is_constant:
            return site_distribution(prior, center, like, tau, local)
        return self._constant(name, like, lambda: site_distribution(prior, center, like, None, None))

    def _constant(self, name: str, like: Tensor, build: Callable[[], dist.TorchDistribution]) -> dist.TorchDistribution:
        """The distribution of a site that nothing but device and dtype can change, built once for each of these."""
        validate = torch.distributions.Distribution._validate_args
        key = (like.device, like.dtype, torch.is_inference_mode_enabled(), validate)
        constants: dict[str, tuple[object, dist.TorchDistribution]] = self.__dict__["_constants"]
        if name not in constants or constants[name][0] != key:
            constants[name] = key, build()
        return constants[name][1]

    def members_plate(self) -> pyro.plate:
        """The members plate of the last call, to be entered around your own observation."""
        try:
            plate: pyro.plate = self.__dict__["_members"]
        except KeyError:
            raise RuntimeError(
                "members_plate() belongs to a call: run f = model(x) before `with model.members_plate()`"
            ) from None
        return plate

    @contextlib.contextmanager
    def recording_outputs(self) -> Iterator[list[Tensor]]:
        """Yields a list to which calls inside append the result of :meth:`function`, ``[*members, ..., size, ...]``.

        It gives access to the outputs of the network, with their gradients, in a program that observes them.
        """
        outputs: list[Tensor] = []
        self.__dict__["_outputs"] = outputs
        try:
            yield outputs
        finally:
            del self.__dict__["_outputs"]

    def rows_plate(self) -> contextlib.AbstractContextManager[object]:
        """The plate of latents that a guide may draw separately for every row of a batch."""
        return plate(self.site("rows"), 1, -1, self.like().device)

    def forward(self, x: Inputs, y: Tensor | None = None) -> Tensor:
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
        # outside inference nothing reads this factor, and Pyro would warn about it
        if is_traced() and (log_prior := self.log_prior()) is not None:
            factor(self.site("weight_prior"), log_prior)
        self.__dict__["_members"] = members = plate(self.site("members"), 1, self.members_dim, like.device)
        with members:
            latents = self.sample_latents()
        f = widened(self.function(x, latents, size), like)
        if (outputs := self.__dict__.get("_outputs")) is not None:
            outputs.append(f)
        likelihood = self.likelihood
        if likelihood is None:
            return f
        data = plate(self.site("data"), self.num_data, -1, like.device, count=size)
        noise = latents.get(self.site("noise"))
        lead = len(self.lead_shape(latents)) - self.members_dim - 1
        tempered = scale(1.0 / likelihood.temperature) if likelihood.temperature != 1 else contextlib.nullcontext()
        with members, data, tempered:
            return sample(self.site("obs"), likelihood.given(f, y, noise, lead), obs=y)


def like_of(model: object) -> Tensor | None:
    """A tensor on the device and with the dtype of a model of this package; ``None`` for any other."""
    return model.like() if isinstance(model, BayesianNetwork) else None


def _plates(value: Tensor, event_dim: int, members_dim: int) -> torch.Size:
    """The plate axes of a value from the members plate to the left."""
    return value.shape[: max(0, value.dim() - event_dim + members_dim + 1)]
