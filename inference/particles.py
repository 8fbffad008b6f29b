"""Particles: n values of all latents of a model at once, with the energy and gradient of each."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import biject_to
from torch.func import grad_and_value, vmap

from pyro_bnn.guide import MixtureGuide
from pyro_bnn.inference.potential import Potential
from pyro_bnn.model import BayesianNetwork, training_mode

#: standard deviation of unconstrained coordinates at ``init="small"``
_SMALL = 0.1


class AutoParticles(PyroModule):
    """n particles as a guide for any Pyro model with continuous latents, in one parameter ``[n, dim]``.

    It is set up at its first call, with what the model is called with. A call gives one particle, at random.

    :param model: any Pyro model; see :class:`~pyro_bnn.inference.potential.Potential` for what its latents may be.
    :param particles: number n of particles.
    :param init: where they start: ``"prior"`` draws, ``"small"`` unconstrained numbers from N(0, 0.1^2), or ``{site:
        [n, *shape]}`` in the model's units, with prior draws for the sites that it leaves out.
    :raises ValueError: for numbers out of range, and, when set up, for starting values that do not fit.
    """

    theta: nn.Parameter

    def __init__(
        self,
        model: Callable[..., Any],
        particles: int = 5,
        *,
        init: Literal["prior", "small"] | dict[str, Tensor] = "prior",
    ) -> None:
        super().__init__("particles")
        if not isinstance(particles, int) or particles < 1:
            raise ValueError(f"particles={particles!r}: expected a whole number, at least 1")
        if not isinstance(init, dict) and init not in ("prior", "small"):
            raise ValueError(f"init={init!r}: expected 'prior', 'small' or starting values {{site: [n, *shape]}}")
        self.num_members, self.init = particles, init
        self.__dict__["model"] = model  # past nn.Module, for its parameters are not the guide's
        self.potential: Potential | None = None
        self._plates: dict[str, list[Any]] = {}
        self._events: dict[str, int] = {}

    def setup(self, *args: Any, **kwargs: Any) -> Potential:
        """Finds the sites and the starting points; later calls change nothing."""
        if self.potential is not None:
            return self.potential
        potential = Potential(self.__dict__["model"], *args, **kwargs)
        traces: list[dict[str, Any]] = [_prior_draw(potential).nodes for _ in range(self.num_members)]
        for name in potential.shapes:
            self._plates[name] = [f for f in traces[0][name]["cond_indep_stack"] if f.vectorized]
            self._events[name] = traces[0][name]["fn"].event_dim
        values = {name: torch.stack([t[name]["value"] for t in traces]) for name in potential.shapes}
        if isinstance(self.init, dict):
            for name, start in self.init.items():
                values[name] = self._given(name, start, values.get(name))
        theta = potential.join({name: potential.transforms[name].inv(value) for name, value in values.items()})
        if self.init == "small":
            theta = _SMALL * torch.randn_like(theta)
        if not bool(torch.isfinite(theta).all()):
            raise ValueError("a particle starts outside of the support of its site, or at its edge")
        self.theta = nn.Parameter(theta.detach().clone())
        self.potential = potential
        return potential

    def _given(self, name: str, start: Tensor, like: Tensor | None) -> Tensor:
        if like is None:
            raise ValueError(f"init has values for {name!r}, which is no latent site of the model")
        if start.numel() != like.numel() or len(start) != self.num_members:
            raise ValueError(f"init of {name!r} has shape {tuple(start.shape)}: expected {tuple(like.shape)}")
        return start.to(like).reshape(like.shape)

    def particles(self) -> dict[str, Tensor]:
        """``{site: [n, *shape]}`` in the model's units.

        :raises RuntimeError: before the first call.
        """
        if self.potential is None:
            raise RuntimeError("the particles are set up at the first call, which has not been yet")
        return self.potential.constrain(self.potential.split(self.theta.detach().clone()))

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        potential = self.setup(*args, **kwargs)
        uniform = dist.Categorical(logits=self.theta.new_zeros(self.num_members))
        index = pyro.sample("particle", uniform, infer={"is_auxiliary": True})
        values = potential.constrain(potential.split(self.theta[index]))
        plates = {f.name: f for frames in self._plates.values() for f in frames}
        opened = {name: pyro.plate(name, f.size, dim=f.dim) for name, f in plates.items()}
        for name, value in values.items():
            with contextlib.ExitStack() as stack:
                for frame in self._plates[name]:
                    stack.enter_context(opened[frame.name])
                values[name] = pyro.sample(name, dist.Delta(value, event_dim=self._events[name]))
        return values


def _prior_draw(potential: Potential) -> poutine.Trace:
    """A trace with all sites drawn from their priors, those of a network too."""

    def value(site: Any) -> Tensor:
        fn = site["fn"]
        try:
            draw: Tensor = fn.sample()
        except NotImplementedError:  # an improper prior: a point of its support
            draw = biject_to(fn.support)(torch.rand(fn.shape()) * 2 - 1)
        return draw

    args, kwargs = potential._arguments
    with torch.no_grad(), potential._running(train=False), InitMessenger(value):
        return poutine.trace(potential.model).get_trace(*args, **kwargs)


# ------------------------------------------------------------------------------------------- energies and gradients


class Segment(NamedTuple):
    """Where a site lies: columns ``start`` to ``stop`` of one of the blocks ``[n, d]``."""

    name: str
    block: int
    start: int
    stop: int
    shape: torch.Size


#: ``function values [n, d] -> force [n, d]``
Force = Callable[[Tensor], Tensor]


class AnyParticles:
    """The particles of an :class:`AutoParticles`: one gradient of its potential, vectorised over them."""

    def __init__(self, guide: AutoParticles, sequential: bool, args: tuple[Any, ...]) -> None:
        self.potential = guide.setup(*args)
        self.blocks: list[nn.Parameter] = [guide.theta]
        self.shared: list[nn.Parameter] = []
        self.segments: list[Segment] = []
        start = 0
        for name, shape in self.potential.shapes.items():
            self.segments.append(Segment(name, 0, start, start + shape.numel(), shape))
            start += shape.numel()
        self._in_turn = sequential

    def backward(self, args: tuple[Any, ...], attraction: float = 1.0, force: Force | None = None) -> Tensor:
        """Sets the gradient of every block to those of ``attraction * U``; U of each particle, ``[n]``."""
        assert force is None
        (theta,) = self.blocks
        random = _RandomState(theta)
        gradient = energies = None
        failure = None
        if not self._in_turn:
            try:
                both = vmap(grad_and_value(lambda row: self._energy(row, args)), randomness="same")
                gradient, energies = both(theta.detach())
            except Exception as error:  # the loop says whether the model or its vectorisation is at fault
                failure = error
        if gradient is None or energies is None:
            rows = []
            for row in theta.detach():
                random.restore()  # a plate that draws its subsample draws the same one for all
                rows.append(grad_and_value(lambda r: self._energy(r, args))(row))
            gradient, energies = (torch.stack(part) for part in zip(*rows, strict=True))
        if failure is not None:
            self._in_turn = True
            first_line = str(failure).strip().partition("\n")[0]
            warnings.warn(
                f"the model could not be vectorised over particles ({type(failure).__name__}: {first_line}); from now "
                "on they run one by one. sequential=True silences this",
                stacklevel=4,
            )
        theta.grad = gradient.detach() * attraction
        return energies.detach()

    def _energy(self, row: Tensor, args: tuple[Any, ...]) -> Tensor:
        return self.potential(self.potential.split(row), *args)

    def offending_site(self, particle: int, args: tuple[Any, ...]) -> str:
        return self.potential.offending_site(self.blocks[0].detach()[particle], *args)


class MemberParticles:
    """The members of a point-estimate guide: all in Pyro's members plate, or one after the other."""

    def __init__(self, model: Callable[..., Any], guide: MixtureGuide, sequential: bool) -> None:
        self.model, self.guide, self._in_turn = model, guide, sequential
        self.plate = f"{guide.prefix}.members" if guide.prefix else "members"
        self.blocks: list[nn.Parameter] = []
        self.segments: list[Segment] = []
        self._kinds: list[str] = []
        for kind, groups in guide._blocks.items():
            for sites, parameter in zip(groups, guide._block_parameters(kind), strict=True):
                assert isinstance(parameter, nn.Parameter)
                start = 0
                for site in sites:
                    stop = start + site.shape.numel()
                    self.segments.append(Segment(site.name, len(self.blocks), start, stop, site.shape))
                    start = stop
                self.blocks.append(parameter)
                self._kinds.append(kind)
        own = model.parameters() if isinstance(model, nn.Module) else ()
        #: weights that all particles share, point estimates
        self.shared = [p for p in own if p.requires_grad]

    def backward(self, args: tuple[Any, ...], attraction: float = 1.0, force: Force | None = None) -> Tensor:
        """Sets the gradient of every block to those of ``attraction * U - <force(f), f>``; U of each particle, ``[n]``.

        f are the outputs of the networks on this batch, and the force counts as a constant. Weights that all particles
        share get the gradient of ``mean_i U_i``.
        """
        n = self.guide.num_members
        for parameter in (*self.blocks, *self.shared):
            parameter.grad = None
        random = _RandomState(self.guide.like())
        with poutine.block(), pyro.validation_enabled(False), training_mode(True), _users_store():
            if not self._in_turn:
                with self._outputs(force) as outputs:
                    energies = self._all_at_once(args)
                output = _rows(outputs, n) if force is not None else None
                pull = force(output.detach()) if force is not None and output is not None else None
                self._differentiate(attraction * energies.sum(), output, pull, self.blocks)
            else:
                forces: list[Any] = [None] * n
                if force is not None:
                    with torch.no_grad():
                        forces = [*force(torch.cat([self._one(i, args, random, force)[1] for i in range(n)]))]
                found = []
                for i in range(n):
                    energy, output, rows = self._one(i, args, random, force)
                    self._differentiate(attraction * energy, output, forces[i], rows)
                    for block, row in zip(self.blocks, rows, strict=True):
                        block.grad = torch.zeros_like(block) if block.grad is None else block.grad
                        if row.grad is not None:
                            block.grad[i] = row.grad[0]
                    found.append(energy.detach())
                energies = torch.stack(found)
        for parameter in self.shared:
            if parameter.grad is not None:
                parameter.grad /= n * attraction
        for block in self.blocks:
            block.grad = torch.zeros_like(block) if block.grad is None else block.grad
        return energies.detach()

    def _differentiate(
        self, objective: Tensor, output: Tensor | None, force: Tensor | None, leaves: Sequence[Tensor]
    ) -> None:
        if force is None or output is None:
            objective.backward()
        elif not self.shared:
            (objective - (force * output).sum()).backward()
        else:  # no force acts on what all particles share
            objective.backward(retain_graph=True)
            (-(force * output).sum()).backward(inputs=leaves)

    def _all_at_once(self, args: tuple[Any, ...]) -> Tensor:
        """U of each particle, ``[n]``."""
        draw = poutine.trace(self.guide).get_trace(*args)
        with _MemberDensities(self.plate) as joint:
            poutine.replay(self.model, trace=draw)(*args)
        jacobian = sum(_log_jacobian(kind, block) for kind, block in zip(self._kinds, self.blocks, strict=True))
        return -(joint.total + jacobian)

    def _one(
        self, i: int, args: tuple[Any, ...], random: _RandomState, force: Force | None
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """U of particle i, a scalar, what the network says ``[1, d]``, and the leaves that they depend on."""
        random.restore()
        rows = [block.detach()[i : i + 1].requires_grad_() for block in self.blocks]
        values = self._natural(rows)
        jacobian = sum(_log_jacobian(kind, row).sum() for kind, row in zip(self._kinds, rows, strict=True))
        with self._outputs(force) as outputs, _MemberDensities(self.plate) as joint:
            poutine.condition(self.model, data=values)(*args)
        energy = -(joint.total.sum() + jacobian)
        return energy, _rows(outputs, 1) if force is not None else energy.detach(), rows

    def _natural(self, rows: list[Tensor]) -> dict[str, Tensor]:
        """``{site: [1, 1 ..., *shape]}`` in the model's units, from one row of every block."""
        plates = (1,) * -self.guide.members_dim
        values = {}
        for segment in self.segments:
            value = rows[segment.block][:, segment.start : segment.stop]
            kind = self._kinds[segment.block]
            natural = value.exp() if kind == "scale_loc" else value.sigmoid() if kind == "share_loc" else value
            values[segment.name] = natural.reshape(plates + segment.shape)
        return values

    @contextlib.contextmanager
    def _outputs(self, force: Force | None) -> Iterator[list[Tensor]]:
        """What the network's function returns inside, where a force needs it."""
        outputs: list[Tensor] = []
        model = self.model
        if force is None or not isinstance(model, BayesianNetwork):
            yield outputs
            return
        function = model.function

        def noted(*args: Any, **kwargs: Any) -> Tensor:
            outputs.append(function(*args, **kwargs))
            return outputs[-1]

        model.__dict__["function"] = noted  # in front of the method of its class
        try:
            yield outputs
        finally:
            del model.__dict__["function"]

    def offending_site(self, particle: int, args: tuple[Any, ...]) -> str:
        """The first site that is not finite in this particle, or whose log density is not."""
        rows = [block.detach()[particle : particle + 1] for block in self.blocks]
        values = self._natural(rows)
        for name, value in values.items():
            if not bool(torch.isfinite(value).all()):
                return name
        quiet = pyro.validation_enabled(False)
        with torch.no_grad(), poutine.block(), quiet, training_mode(False), _users_store():
            trace = poutine.trace(poutine.condition(self.model, data=values)).get_trace(*args)
            trace.compute_log_prob()
        nodes: dict[str, Any] = trace.nodes
        for name, site in nodes.items():
            if "log_prob_sum" in site and not bool(torch.isfinite(site["log_prob_sum"])):
                return name
        return "unknown"


class _MemberDensities(Messenger):
    """Adds up the log densities of each member while the model runs, ``[n]``: see :class:`_LogJoint` of the potential.

    Pyro's plate rule weighs n members by 1/n; here each counts in full, and so does what lies outside of the plate.
    """

    def __init__(self, plate: str) -> None:
        super().__init__()
        self.total: Any = 0.0
        self._plate = plate

    def _pyro_post_sample(self, msg: Any) -> None:
        if poutine.util.site_is_subsample(msg):
            return
        density = msg["fn"].log_prob(msg["value"], *msg["args"], **msg["kwargs"])
        density = scale_and_mask(density, msg["scale"], msg["mask"])
        frame = next((f for f in msg["cond_indep_stack"] if f.name == self._plate), None)
        if frame is not None:
            density = density.movedim(frame.dim, 0).reshape(frame.size, -1).sum(1) * frame.size
        self.total = self.total + (density if frame is not None else density.sum())


def _log_jacobian(kind: str, values: Tensor) -> Tensor:
    """log |dz / dtheta| of each row of a block: z = exp(theta) for scales, sigmoid(theta) for shares."""
    if kind == "scale_loc":
        return values.sum(1)
    if kind == "share_loc":
        return (F.logsigmoid(values) + F.logsigmoid(-values)).sum(1)
    return values.new_zeros(len(values))


def _rows(outputs: list[Tensor], n: int) -> Tensor:
    return torch.cat([f.reshape(n, -1) for f in outputs], 1)


def _users_store() -> contextlib.AbstractContextManager[Any]:
    """Pyro's parameter store as the user left it, and will find it."""
    store = pyro.get_param_store()
    return store.scope(store.get_state())


class _RandomState:
    """The random state at its making, on the processor and on the device of ``like``."""

    def __init__(self, like: Tensor) -> None:
        self._state = torch.get_rng_state()
        self._device = like.device if like.is_cuda else None
        self._cuda = torch.cuda.get_rng_state(self._device) if self._device is not None else None

    def restore(self) -> None:
        torch.set_rng_state(self._state)
        if self._cuda is not None and self._device is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)
