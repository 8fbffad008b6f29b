"""Particles as a guide for any Pyro model with continuous latents."""

from __future__ import annotations

import contextlib
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_bnn import display
from pyro_bnn.entry import checks
from pyro_bnn.entry.threads import one_at_a_time
from pyro_bnn.inference.potential import Potential
from pyro_bnn.program.module import ProgramModule
from pyro_bnn.program.sites import Program

#: standard deviation of unconstrained coordinates at ``init="small"``
_SMALL = 0.1


class AutoParticles(ProgramModule):
    """n particles as a guide for any Pyro model with continuous latents, in one parameter ``[n, dim]``.

    Its first call, with the arguments of the model, sets it up. Every call returns one particle, at random.

    :param model: any Pyro model whose latents :class:`~pyro_bnn.inference.potential.Potential` supports.
    :param num_particles: n.
    :param init: the starting values: ``"prior"`` for draws from the prior, ``"small"`` for unconstrained values from
        N(0, 0.1^2), or constrained values ``{site: [n, *shape]}``, with prior draws for the sites that are left out.
    :raises ValueError: for numbers out of range, and, at the first call, for starting values that do not fit.
    """

    theta: nn.Parameter

    def __init__(
        self,
        model: Program,
        num_particles: int = 5,
        *,
        init: Literal["prior", "small"] | dict[str, Tensor] = "prior",
    ) -> None:
        super().__init__("particles")
        num_particles = checks.count("num_particles", num_particles)
        if not isinstance(init, dict) and init not in ("prior", "small"):
            raise ValueError(f"init={init!r}: expected 'prior', 'small' or starting values {{site: [n, *shape]}}")
        self.num_members, self.init = num_particles, init
        self.__dict__["model"] = model  # past nn.Module, for its parameters are not the guide's
        self.potential: Potential | None = None
        self._plates: dict[str, list[Any]] = {}
        self._events: dict[str, int] = {}

    def __repr__(self) -> str:
        model = display.name_of(self.__dict__["model"])
        start = "given" if isinstance(self.init, dict) else self.init
        return display.call(self, model=model, particles=self.num_members, init=start)

    @one_at_a_time
    def setup(self, *args: object, **kwargs: object) -> Potential:
        """Finds the sites and the starting points; later calls change nothing."""
        if self.potential is not None:
            return self.potential
        potential = Potential(self.__dict__["model"], *args, **kwargs)
        traces: list[dict[str, Any]] = [potential.prior_trace(at_network=False).nodes for _ in range(self.num_members)]
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
            raise ValueError("init: a particle starts outside the support of its site, or on its boundary")
        self.theta = nn.Parameter(theta.detach().clone())
        self.potential = potential
        return potential

    def _given(self, name: str, start: Tensor, like: Tensor | None) -> Tensor:
        if like is None:
            raise ValueError(f"init has values for {name!r}, which is not a latent site of the model")
        if start.numel() != like.numel() or len(start) != self.num_members:
            raise ValueError(f"init of {name!r} has shape {tuple(start.shape)}: expected {tuple(like.shape)}")
        return start.to(like).reshape(like.shape)

    def particles(self) -> dict[str, Tensor]:
        """The constrained values of all particles, ``{site: [n, *shape]}``.

        :raises RuntimeError: before the first call.
        """
        if self.potential is None:
            raise RuntimeError(
                "the particles do not exist before the first call: call the guide with the model's arguments"
            )
        return self.potential.constrain(self.potential.split(self.theta.detach().clone()))

    def forward(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
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
