"""Particles that are the members of a guide of points, with the energy and gradient of each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import pyro
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from torch import Tensor, nn

from pyro_bnn.distributed import ALONE, Processes
from pyro_bnn.entry.threads import one_at_a_time
from pyro_bnn.inference.potential import LogJoint
from pyro_bnn.inference.stein.particles import Segment
from pyro_bnn.modes import RunningStatistics, keeping_modes, training_mode
from pyro_bnn.precision import asked, full_precision
from pyro_bnn.program.divergences import closed_form, kl_of_sites
from pyro_bnn.program.factorised import PointBlock
from pyro_bnn.program.guide import MixtureGuide
from pyro_bnn.program.model import BayesianNetwork
from pyro_bnn.program.sites import Program
from pyro_bnn.program.statements import NotTraceableError, StatementTrace, is_traceable, traced
from pyro_bnn.randomness import RandomState

#: ``outputs of the networks on a batch [n, d] -> force on them [n, d]``, which is treated as a constant
Force = Callable[[Tensor], Tensor]


class MemberParticles:
    """Base class: the members of a guide as particles, whose coordinates theta are the blocks of the guide.

    :param model: a network of this package, or a Pyro program around one.
    :param guide: a guide whose members are all points; its members are the particles.
    :param together: processes that divide the particles: each computes the energies and gradients of some of them.
    """

    def __init__(self, model: Program, guide: MixtureGuide, together: Processes = ALONE) -> None:
        self.model, self.guide, self.together = model, guide, together
        self.plate = f"{guide.prefix}.members" if guide.prefix else "members"
        self.kinds = [block.kind for block in guide.blocks()]
        self.blocks = [block.parameter for block in guide.blocks()]
        self.segments: list[Segment] = []
        for number, block in enumerate(guide.blocks()):
            start = 0
            for site in block.sites:
                stop = start + site.shape.numel()
                self.segments.append(Segment(site.name, number, start, stop, site.shape))
                start = stop
        own = model.parameters() if isinstance(model, nn.Module) else ()
        #: weights that all particles share, point estimates
        self.shared = [p for p in own if p.requires_grad]

    def backward(
        self,
        args: tuple[object, ...],
        attraction: Tensor | float = 1.0,
        weight: Tensor | float = 1.0,
        force: Force | None = None,
    ) -> Tensor:
        """Sets the gradient of every block to that of ``attraction * U - <force(f), f>``, times ``weight``.

        f are the outputs of the networks on this batch. Weights that all particles share get the gradient of
        ``mean_i U_i``, times ``weight``.

        :param args: the arguments of the model.
        :return: U of each particle in nats, ``[n]``.
        """
        for parameter in (*self.blocks, *self.shared):
            parameter.grad = None
        with _inside_an_engine(train=True):
            energies = self._differentiate(args, attraction, force, weight)
        if self.together.are_several:
            for parameter in (*self.blocks, *self.shared):
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                self.together.sum_(parameter.grad)
            self.together.sum_(energies)
        for parameter in self.shared:
            if parameter.grad is not None:
                parameter.grad /= self.guide.num_members * attraction
        for block in self.blocks:
            block.grad = torch.zeros_like(block) if block.grad is None else block.grad
        return energies.detach()

    def _differentiate(
        self, args: tuple[object, ...], attraction: Tensor | float, force: Force | None, weight: Tensor | float
    ) -> Tensor:
        """Adds the gradients of ``weight (attraction sum_i U_i - <force(f), f>)``; returns U of each, ``[n]``."""
        raise NotImplementedError(f"{type(self).__name__} must define _differentiate()")

    def _pull(
        self, objective: Tensor, outputs: list[Tensor], force: Tensor | None, leaves: Sequence[nn.Parameter | Tensor]
    ) -> None:
        """Adds the gradients of ``objective - <force, f>``; the force does not act on shared weights."""
        with full_precision():  # autocast is for the pass forward
            if force is None:
                objective.backward()
                return
            work = (force * _rows(outputs, len(leaves[0]))).sum()
            if not self.shared:
                (objective - work).backward()
            else:
                objective.backward(retain_graph=True)
                (-work).backward(inputs=leaves)

    def offending_site(self, particle: int, args: tuple[object, ...]) -> str:
        """The name of the first site whose value or log density is not finite in this particle."""
        values = self.natural([block.detach()[particle : particle + 1] for block in self.blocks])
        for name, value in values.items():
            if not bool(torch.isfinite(value).all()):
                return name
        with torch.no_grad(), _inside_an_engine(train=False):
            trace = poutine.trace(poutine.condition(self.model, data=values)).get_trace(*args)
            trace.compute_log_prob()
        nodes: dict[str, Any] = trace.nodes
        for name, site in nodes.items():
            if "log_prob_sum" in site and not bool(torch.isfinite(site["log_prob_sum"])):
                return name
        return "unknown"

    def natural(self, rows: list[Tensor]) -> dict[str, Tensor]:
        """The value of every site, ``[1, 1 ..., *shape]`` in the model's units, from one row of every block."""
        plates = (1,) * -self.guide.members_dim
        values = {}
        for segment in self.segments:
            value = rows[segment.block][:, segment.start : segment.stop]
            kind = self.kinds[segment.block]
            values[segment.name] = _in_units(kind, value).reshape(plates + segment.shape)
        return values

    def log_jacobian(self, rows: Sequence[Tensor]) -> Tensor:
        """``log |dz / dtheta|`` of each row of the blocks: z = exp(theta) for scales, sigmoid(theta) for shares."""
        total = rows[0].new_zeros(len(rows[0]))
        for kind, values in zip(self.kinds, rows, strict=True):
            if kind == "scale_loc":
                total = total + values.sum(1)
            elif kind == "share_loc":
                total = total + (F.logsigmoid(values) + F.logsigmoid(-values)).sum(1)
        return total

    def _log_joint(self, rows: Sequence[Tensor], args: tuple[object, ...]) -> Tensor | None:
        """log p(y, z) of the member in each row of the blocks, ``[n]``; ``None`` where only Pyro can trace the model.

        The log densities of all points of a block that have one kind of prior are computed together.
        """
        if not isinstance(self.model, BayesianNetwork) or not is_traceable(self.model) or asked():
            return None
        draw = StatementTrace()
        draw.counts[self.plate] = len(rows[0])
        for block, row in zip(self.guide.blocks(), rows, strict=True):
            value = _in_units(block.kind, row).reshape(len(row), *(1,) * (-self.guide.members_dim - 1), -1)
            for site, fn in zip(block.sites, PointBlock(value, [s.shape for s in block.sites]).parts(), strict=True):
                draw.add_node(site.name, fn=fn, value=fn.v)
        try:
            trace = traced(self.model, args, {}, draw)
        except NotTraceableError:
            return None
        total: Any = 0.0
        groups: dict[object, list[str]] = {}
        points: dict[str, Any] = {name: site["fn"] for name, site in draw.nodes.items()}
        nodes: dict[str, Any] = trace.nodes
        for name, site in nodes.items():
            _require_particles(name, site, points)
            own: Any = points.get(name)
            form = None if own is None else closed_form(own, site["fn"])
            if form is None:
                with full_precision():
                    density = site["fn"].log_prob(site["value"])
                    total = total + _of_members(scale_and_mask(density, site["scale"], site["mask"]), site, self.plate)
            else:
                groups.setdefault((id(own.block), form), []).append(name)
        for names in groups.values():
            kl = kl_of_sites([points[name] for name in names], [nodes[name]["fn"] for name in names])
            total = total - kl.reshape(-1)
        joint: Tensor = total
        return joint

    @contextlib.contextmanager
    def outputs(self) -> Iterator[list[Tensor]]:
        """Inside, collects what the network returns, one entry for each call; none for another Pyro program."""
        if isinstance(self.model, BayesianNetwork):
            with self.model.recording_outputs() as outputs:
                yield outputs
        else:
            yield []


class Together(MemberParticles):
    """Runs all members in one pass, in Pyro's members plate."""

    def _differentiate(
        self, args: tuple[object, ...], attraction: Tensor | float, force: Force | None, weight: Tensor | float
    ) -> Tensor:
        with self.outputs() as outputs:
            joint = self._log_joint(self.blocks, args)
            if joint is None:
                outputs.clear()
                draw = poutine.trace(self.guide).get_trace(*args)
                with _MemberDensities(self.plate, draw.nodes) as densities:
                    poutine.replay(self.model, trace=draw)(*args)
                joint = densities.total
        energies = -(joint + self.log_jacobian(self.blocks))
        pull = None if force is None else weight * force(_rows(outputs, self.guide.num_members).detach())
        self._pull(weight * attraction * energies.sum(), outputs, pull, self.blocks)
        return energies


class OneByOne(MemberParticles):
    """Runs one member after the other, which takes the memory of one.

    The force needs the outputs of all members: an earlier pass computes them without gradients, with the same noise.
    """

    def _differentiate(
        self, args: tuple[object, ...], attraction: Tensor | float, force: Force | None, weight: Tensor | float
    ) -> Tensor:
        n = self.guide.num_members
        # another Pyro program may draw a subsample, which must be the same for all members
        same = None if isinstance(self.model, BayesianNetwork) else RandomState(self.guide.like())
        noise: Sequence[RandomState | None] = [same] * n
        forces: Sequence[Tensor | None] = [None] * n
        if force is not None:
            f, noise = self._outputs_of_all(args, same)
            forces = [*(weight * force(f))]
        statistics = RunningStatistics(self._moving_layers())
        found = self.blocks[0].new_zeros(n)
        for i in self.together.mine(n):
            with statistics.one_pass():
                energy, outputs, rows = self._energy(i, args, noise[i])
                self._pull(weight * attraction * energy, outputs, forces[i], rows)
            for block, row in zip(self.blocks, rows, strict=True):
                block.grad = torch.zeros_like(block) if block.grad is None else block.grad
                if row.grad is not None:
                    block.grad[i] = row.grad[0]
            found[i] = energy.detach()
        statistics.average()
        return found

    def _outputs_of_all(self, args: tuple[object, ...], same: RandomState | None) -> tuple[Tensor, list[RandomState]]:
        """The outputs of all members, ``[n, d]``, and the random state before each."""
        statistics = RunningStatistics(self._moving_layers())  # restored after each of these passes
        n = self.guide.num_members
        noise, outputs = [same or RandomState(self.guide.like())] * n, {}
        for i in self.together.mine(n):
            noise[i] = same or RandomState(self.guide.like())
            with torch.no_grad(), statistics.one_pass():
                outputs[i] = _rows(self._energy(i, args, noise[i])[1], 1)
        width = self.together.gather(max((f.shape[1] for f in outputs.values()), default=0))
        f = self.blocks[0].new_zeros(n, max(width))
        for i, own in outputs.items():
            f[i] = own[0]
        self.together.sum_(f)
        return f, noise

    def _energy(
        self, i: int, args: tuple[object, ...], noise: RandomState | None
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """U of particle i (a scalar), the outputs of the network, and the leaf tensors that both depend on."""
        if noise is not None:
            noise.restore()
        rows = [block.detach()[i : i + 1].requires_grad_() for block in self.blocks]
        with self.outputs() as outputs:
            joint = self._log_joint(rows, args)
            if joint is None:
                outputs.clear()
                values = self.natural(rows)
                with _MemberDensities(self.plate, values) as densities:
                    poutine.condition(self.model, data=values)(*args)
                joint = densities.total
        energy = -(joint.sum() + self.log_jacobian(rows).sum())
        return energy, outputs, rows

    def _moving_layers(self) -> list[nn.Module]:
        return [*self.model.moving_layers().values()] if isinstance(self.model, BayesianNetwork) else []


class _MemberDensities(LogJoint):
    """Adds up the log densities of each member, ``[n]``.

    Pyro scales the log density of each of n members by 1/n. Here each counts in full, as do sites outside the plate.
    """

    def __init__(self, plate: str, known: Collection[str]) -> None:
        super().__init__()
        self._plate, self._known = plate, known

    def _pyro_post_sample(self, msg: Any) -> None:
        _require_particles(msg["name"], msg, self._known)
        super()._pyro_post_sample(msg)

    def _sum(self, density: Tensor, msg: Any) -> Tensor:
        return _of_members(density, msg, self._plate)


def _of_members(density: Tensor, site: Any, plate: str) -> Tensor:
    """The log density of each member, ``[n]``, in full, of a site in their plate; the sum of one outside."""
    frame = next((f for f in site["cond_indep_stack"] if f.name == plate), None)
    if frame is None:
        return density.sum()
    return density.movedim(frame.dim, 0).reshape(frame.size, -1).sum(1) * frame.size


def _require_particles(name: str, site: Any, known: Collection[str]) -> None:
    if not site["is_observed"] and not poutine.util.site_is_subsample(site) and name not in known:
        raise ValueError(
            f"the guide has no particles of the latent site {name!r}: use AutoParticles, which has particles of all "
            "latent sites of a model"
        )


def _in_units(kind: str, value: Tensor) -> Tensor:
    """Coordinates of a block in the units of the model."""
    return value.exp() if kind == "scale_loc" else value.sigmoid() if kind == "share_loc" else value


def _rows(outputs: list[Tensor], n: int) -> Tensor:
    """The outputs of n networks, ``[n, d]``."""
    return torch.cat([f.reshape(n, -1) for f in outputs], 1)


def prior_and_guide(
    model: Callable[..., Any], guide: MixtureGuide, args: tuple[Any, ...]
) -> tuple[poutine.Trace, poutine.Trace]:
    """A trace of the model at the members of the guide, and the trace of the guide."""
    with torch.no_grad(), keeping_modes(model, guide), _inside_an_engine(train=False):
        draw = poutine.trace(guide).get_trace(*args)
        return poutine.trace(poutine.replay(model, trace=draw)).get_trace(*args), draw


@contextlib.contextmanager
def _inside_an_engine(train: bool) -> Iterator[None]:
    """Inside, the model runs hidden from outer Pyro handlers; Pyro's parameter store is restored afterwards."""
    store = pyro.get_param_store()
    with one_at_a_time, store.scope(store.get_state()):
        with poutine.block(), pyro.validation_enabled(False), training_mode(train):
            yield
