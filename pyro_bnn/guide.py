"""Mixtures of factorised guides: K components as members, rows with draws of their own, all in Pyro's plates.

The parameters of all sites of a kind lie in one flat tensor ``[K, n]``: a large network has hundreds of sites, but the
optimiser sees a handful of parameters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_bnn.factorised import FactorisedNormal
from pyro_bnn.model import BayesianNetwork, Site, enter_mode, picklable_state, register_parameters
from pyro_bnn.network import batch_size

Family = Literal["normal", "cauchy", "point"]
SMALLEST_SCALE = 1e-7


def _cauchy(loc: Tensor, scale: Tensor, events: int) -> dist.TorchDistribution:
    return dist.Cauchy(loc, scale).to_event(events)


def _log_normal(loc: Tensor, scale: Tensor, events: int) -> dist.TorchDistribution:
    return dist.LogNormal(loc, scale).to_event(events)


_FAMILIES: dict[str, Callable[[Tensor, Tensor, int], dist.TorchDistribution]] = {
    "normal": FactorisedNormal,
    "cauchy": _cauchy,
}


class _Flat:
    """Where each site lies in a flat tensor."""

    def __init__(self, sites: list[Site]) -> None:
        self.sites = sites
        self.sizes = [site.shape.numel() for site in sites]

    def split(self, flat: Tensor) -> list[Tensor]:
        """``[K, n] -> [K, *shape]`` for each site."""
        parts = flat.split(self.sizes, -1)
        return [part.reshape(part.shape[:-1] + site.shape) for part, site in zip(parts, self.sites, strict=True)]


class MixtureGuide(PyroModule):
    """``q = (1/K) sum_k q_k``, one component index for the whole network, each ``q_k`` factorised over elements.

    Weights and factors are Normal or Cauchy with scale ``softplus(rho) + 1e-7``, positive scales are LogNormal, and
    sites with the role ``bias`` are points. In train mode a call samples all K members (and, with ``rows=True``, a draw
    for every row of the batch); in eval mode one draw of one component, taken at random; inside
    :meth:`every_member` one draw for each member.

    :param model: the model whose sites it is for; the guide keeps their names and shapes, not the model.
    :param components: number K of components.
    :param family: ``"normal"`` or ``"cauchy"`` weights; ``"point"`` makes all sites points (MAP).
    :param rows: whether in train mode every row of the batch has a draw of its own (factors only).
    """

    def __init__(
        self, model: BayesianNetwork, components: int = 1, family: Family = "normal", rows: bool = False
    ) -> None:
        if not isinstance(model, BayesianNetwork):
            raise TypeError(f"{type(self).__name__} takes one of pyro_bnn.models, got {type(model).__name__}")
        super().__init__(f"{model.prefix}_guide" if model.prefix else "guide")
        if not isinstance(components, int) or components < 1:
            raise ValueError(f"components={components!r}: expected the number of mixture components, at least 1")
        if family not in (*_FAMILIES, "point"):
            raise ValueError(f"family={family!r}: expected one of {', '.join(map(repr, _FAMILIES))}, 'point'")
        sites = model.sites()
        like = model.like()
        self.num_members = components
        self.family = family
        self.per_row = rows
        self.prefix, self.members_dim = model.prefix, model.members_dim
        self._every = False
        self._random = _Flat([s for s in sites if s.role in ("weight", "factor")])
        self._in_rows = bool(self._random.sites) and self._random.sites[0].role == "factor"
        self._scale = _Flat([s for s in sites if s.role == "scale"])
        self._point = _Flat([s for s in sites if s.role == "bias"])
        self._order = [s for s in sites if s.role in ("scale", "bias")]
        for name, flat in (("loc", self._random), ("scale_loc", self._scale), ("point", self._point)):
            value = _centers(flat, like, log=name == "scale_loc").expand(components, -1).clone()
            self.register_parameter(name, nn.Parameter(value))
            if name != "point" and family != "point":
                rho = name.replace("loc", "rho")
                self.register_parameter(rho, nn.Parameter(torch.full_like(value, inverse_softplus(0.1))))

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments as JSON, apart from those that only say where training starts."""
        return {}

    def __getstate__(self) -> dict[str, Any]:
        return picklable_state(self)

    @contextlib.contextmanager
    def every_member(self) -> Iterator[None]:
        """Inside, a call gives one draw for each member and no rows, whatever the mode: for prediction."""
        self._every = True
        try:
            yield
        finally:
            self._every = False

    def forward(self, x: Any, y: Tensor | None = None) -> dict[str, Tensor]:
        enter_mode(self)
        register_parameters(self, self._named())
        p: dict[str, Tensor] = {n: q for n, q in self._parameters.items() if q is not None}
        device = p["loc"].device
        values: dict[str, Tensor] = {}
        with contextlib.ExitStack() as stack:
            if self.training or self._every:
                members = self._plate("members", self.num_members, self.members_dim, device)
                component = None
            else:
                members = self._plate("members", 1, self.members_dim, device)
                component = self._component(stack, members, p["loc"])
            stack.enter_context(members)
            take = _taker(component, self.members_dim)
            points = iter(self._point.split(take(p["point"])))
            scales = iter(self._distributions(self._scale, p, take, "scale_loc", "scale_rho"))
            for site in self._order:
                d = next(scales) if site.role == "scale" else dist.Delta(next(points), event_dim=len(site.shape))
                values[site.name] = pyro.sample(site.name, d)
            if self._in_rows:
                rows = batch_size(x, y) if self.training and self.per_row and not self._every else 1
                stack.enter_context(self._plate("rows", rows, -1, device))
            for site, d in zip(
                self._random.sites, self._distributions(self._random, p, take, "loc", "rho"), strict=True
            ):
                values[site.name] = pyro.sample(site.name, d)
        return values

    def _distributions(
        self, flat: _Flat, p: dict[str, Tensor], take: Callable[[Tensor], Tensor], loc: str, rho: str
    ) -> list[dist.TorchDistribution]:
        """The distribution of each site of one kind."""
        positive = flat is self._scale
        locs = flat.split(take(p[loc].exp() if positive and self.family == "point" else p[loc]))
        if self.family == "point":
            return [dist.Delta(v, event_dim=len(s.shape)) for v, s in zip(locs, flat.sites, strict=True)]
        family = _log_normal if positive else _FAMILIES[self.family]
        scales = flat.split(take(F.softplus(p[rho]).add_(SMALLEST_SCALE)))
        return [family(m, v, len(site.shape)) for m, v, site in zip(locs, scales, flat.sites, strict=True)]

    def points(self) -> list[nn.Parameter]:
        """The members' own biases, which are points and not random."""
        return [p for name, p in self._named() if name == "point"]

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self._parameters.items() if p is not None and p.numel()]

    def _plate(self, name: str, size: int, dim: int, device: torch.device) -> pyro.plate:
        full = f"{self.prefix}.{name}" if self.prefix else name
        return pyro.plate(full, 1, subsample=torch.arange(size, device=device), dim=dim, device=str(device))

    def _component(self, stack: contextlib.ExitStack, members: pyro.plate, like: Tensor) -> Tensor | None:
        """The index of a random component for every draw, ``[..., 1 ...]``."""
        if self.num_members == 1:
            return None
        name = f"{self.prefix}.component" if self.prefix else "component"
        with members:
            weights = dist.Categorical(logits=like.new_zeros(self.num_members))
            index: Tensor = pyro.sample(name, weights, infer={"is_auxiliary": True})
        return index


def _taker(component: Tensor | None, members_dim: int) -> Callable[[Tensor], Tensor]:
    """Puts the components of a flat ``[K, n]`` on the members axis: ``[K, 1 ..., n]``, or the chosen one."""

    def take(flat: Tensor) -> Tensor:
        if component is not None:
            return flat[component]
        return flat.reshape(flat.shape[:1] + (1,) * (-members_dim - 1) + flat.shape[1:])

    return take


def _centers(flat: _Flat, like: Tensor, log: bool) -> Tensor:
    parts = [
        torch.as_tensor(site.center, dtype=like.dtype, device=like.device).expand(site.shape).reshape(-1)
        for site in flat.sites
    ]
    value = torch.cat(parts) if parts else like.new_zeros(0)
    return value.detach().log() if log else value.detach()


def inverse_softplus(value: float) -> float:
    """rho with ``softplus(rho) = value``."""
    return float(torch.tensor(value, dtype=torch.float64).expm1().log())
