"""Particles: n values of all latents of a model at once, with the energy and gradient of each."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import pyro
import torch
import torch.nn.functional as F
from pyro import poutine
from torch import Tensor, nn
from torch.func import grad_and_value, vmap

from pyro_bnn.guide import MixtureGuide
from pyro_bnn.inference.potential import LogJoint
from pyro_bnn.inference.stein.autoparticles import AutoParticles
from pyro_bnn.model import BayesianNetwork
from pyro_bnn.modes import training_mode


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
                leaf = row.clone().requires_grad_()
                energy = self._energy(leaf, args)
                rows.append((torch.autograd.grad(energy, leaf)[0], energy.detach()))
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
        random = None if isinstance(self.model, BayesianNetwork) else _RandomState(self.guide.like())
        with poutine.block(), pyro.validation_enabled(False), training_mode(True), _users_store():
            if not self._in_turn:
                with self._outputs(force) as outputs:
                    energies = self._all_at_once(args)
                output = _rows(outputs, n) if force is not None else None
                pull = force(output.detach()) if force is not None and output is not None else None
                self._differentiate(attraction * energies.sum(), output, pull, self.blocks)
            else:
                forces: list[Any] = [None] * n
                again: list[Any] = [random] * n
                statistics = _Statistics(self.model)
                if force is not None:
                    outputs = []
                    for i in range(n):
                        again[i] = random or _RandomState(self.guide.like())  # the second time with the same noise
                        with torch.no_grad():
                            outputs.append(self._one(i, args, again[i], force)[1])
                        statistics.restore()
                    forces = [*force(torch.cat(outputs))]
                found = []
                for i in range(n):
                    energy, output, rows = self._one(i, args, again[i], force)
                    self._differentiate(attraction * energy, output, forces[i], rows)
                    for block, row in zip(self.blocks, rows, strict=True):
                        block.grad = torch.zeros_like(block) if block.grad is None else block.grad
                        if row.grad is not None:
                            block.grad[i] = row.grad[0]
                    found.append(energy.detach())
                    statistics.restore(note=True)
                energies = torch.stack(found)
                statistics.average()
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
        with _MemberDensities(self.plate, draw.nodes) as joint:
            poutine.replay(self.model, trace=draw)(*args)
        jacobian = sum(_log_jacobian(kind, block) for kind, block in zip(self._kinds, self.blocks, strict=True))
        return -(joint.total + jacobian)

    def _one(
        self, i: int, args: tuple[Any, ...], random: _RandomState | None, force: Force | None
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """U of particle i, a scalar, what the network says ``[1, d]``, and the leaves that they depend on."""
        if random is not None:
            random.restore()
        rows = [block.detach()[i : i + 1].requires_grad_() for block in self.blocks]
        values = self._natural(rows)
        jacobian = sum(_log_jacobian(kind, row).sum() for kind, row in zip(self._kinds, rows, strict=True))
        with self._outputs(force) as outputs, _MemberDensities(self.plate, values) as joint:
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


class _MemberDensities(LogJoint):
    """Adds up the log densities of each member, ``[n]``.

    Pyro's plate rule weighs n members by 1/n; here each counts in full, and so does what lies outside of the plate.
    """

    def __init__(self, plate: str, known: Collection[str]) -> None:
        super().__init__()
        self._plate, self._known = plate, known

    def _pyro_post_sample(self, msg: Any) -> None:
        latent = not msg["is_observed"] and not poutine.util.site_is_subsample(msg)
        if latent and msg["name"] not in self._known:
            raise ValueError(
                f"the guide has no particles of the latent site {msg['name']!r}: use AutoParticles, which has them of "
                "all sites of a model"
            )
        super()._pyro_post_sample(msg)

    def _sum(self, density: Tensor, msg: Any) -> Tensor:
        frame = next((f for f in msg["cond_indep_stack"] if f.name == self._plate), None)
        if frame is None:
            return density.sum()
        return density.movedim(frame.dim, 0).reshape(frame.size, -1).sum(1) * frame.size


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


class _Statistics:
    """Running statistics of normalisation layers, which every particle moves from where they began."""

    def __init__(self, model: Any) -> None:
        layers = model.moving_layers().values() if isinstance(model, BayesianNetwork) else ()
        self._buffers = [buffer for layer in layers for buffer in layer.buffers()]
        self._begin = [buffer.clone() for buffer in self._buffers]
        self._ends: list[list[Tensor]] = []

    def restore(self, note: bool = False) -> None:
        if note:
            self._ends.append([buffer.clone() for buffer in self._buffers])
        for buffer, begin in zip(self._buffers, self._begin, strict=True):
            buffer.copy_(begin)

    def average(self) -> None:
        """They move once: to the average of where the particles took them."""
        for buffer, *ends in zip(self._buffers, *self._ends, strict=True):
            buffer.copy_(torch.stack(ends).mean(0) if buffer.is_floating_point() else ends[0])


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
