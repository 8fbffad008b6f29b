"""Mixtures of factorised guides: K components as members and, optionally, separate draws for rows, in Pyro's plates.

The parameters of sites of the same kind lie side by side in blocks ``[K, n]``: a large network has hundreds of sites,
but the optimiser sees only a few parameters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_bnn import display
from pyro_bnn.entry import checks
from pyro_bnn.inputs import Inputs
from pyro_bnn.modes import enter_mode
from pyro_bnn.network import batch_size
from pyro_bnn.program.factorised import LogNormalBlock, NormalBlock, PointBlock, split
from pyro_bnn.program.model import BayesianNetwork, Form
from pyro_bnn.program.module import ProgramModule, picklable_state, register_parameters
from pyro_bnn.program.positive import inverse_softplus, positive
from pyro_bnn.program.sites import Site
from pyro_bnn.program.statements import plate, sample

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Family = Literal["normal", "cauchy", "point"]
#: Sites share a block up to this many elements; a larger site has its own block. Allocators serve tensors of tens of
#: megabytes with fresh pages from the system every time, which costs more than the arithmetic on them.
BLOCK_SIZE = 2**18


def _blocks(sites: list[Site]) -> list[list[Site]]:
    """Neighbouring sites in groups of at most ``BLOCK_SIZE`` elements."""
    blocks: list[list[Site]] = []
    size = BLOCK_SIZE
    for site in sites:
        size += site.shape.numel()
        if size > BLOCK_SIZE:
            blocks.append([])
            size = site.shape.numel()
        blocks[-1].append(site)
    return blocks


class Block(NamedTuple):
    """Sites that are stored side by side in one parameter.

    :param kind: what their columns are: ``"loc"`` and ``"point"`` the values themselves (or where they are centred),
        ``"scale_loc"`` logarithms, ``"share_loc"`` logits.
    :param parameter: ``[K, n]``, where n is the number of elements of all the sites.
    """

    kind: str
    sites: list[Site]
    parameter: nn.Parameter


class MixtureGuide(ProgramModule):
    """``q = (1/K) sum_k q_k``, one component index for the whole network, each ``q_k`` factorised over elements.

    Weights and factors are Normal or Cauchy with scale ``softplus(rho) + 1e-7``, positive scales are LogNormal, shares
    have a Normal logit, and sites with the role ``bias`` are points. In train mode, a call samples all K members (with
    ``rows=True``, one draw for every row of the batch); in eval mode, it returns one draw from a random component;
    inside :meth:`every_member`, one draw from each member.

    :param model: the model whose sites the guide samples; the guide keeps their names and shapes, not the model.
    :param components: number K of components.
    :param family: ``"normal"`` or ``"cauchy"`` weights; ``"point"`` makes all sites points (MAP).
    :param rows: whether, in train mode, every row of the batch has its own draw (for factors only).
    :param own: selects the sites that are factorised here, for a subclass that treats others differently; by default
        all.
    """

    # Lists of blocks [K, n]: of weights or factors, logarithms of positive scales, logits of shares, and biases.

    loc: nn.ParameterList
    rho: nn.ParameterList
    scale_loc: nn.ParameterList
    scale_rho: nn.ParameterList
    share_loc: nn.ParameterList
    share_rho: nn.ParameterList
    point: nn.ParameterList

    def __init__(
        self,
        model: BayesianNetwork,
        components: int = 1,
        family: Family = "normal",
        rows: bool = False,
        own: Callable[[Site], bool] | None = None,
    ) -> None:
        if not isinstance(model, BayesianNetwork):
            raise TypeError(f"{type(self).__name__} takes one of pyro_bnn.models, got {type(model).__name__}")
        super().__init__(f"{model.prefix}_guide" if model.prefix else "guide")
        components = checks.count("components", components)
        if family not in _FAMILIES:
            raise ValueError(f"family={family!r}: expected one of {', '.join(map(repr, _FAMILIES))}")
        sites = [site for site in model.sites() if own is None or own(site)]
        like = model.like()
        self.num_members = components
        self.family = family
        #: whether all draws of a member are equal
        self.is_deterministic = family == "point" and own is None
        self.per_row = rows
        self.prefix, self.members_dim = model.prefix, model.members_dim
        self._every = False
        self._in_rows = any(s.role == "factor" for s in sites)
        self._before_rows = [s.name for s in sites if s.role in ("scale", "share", "bias")]
        self._blocks: dict[str, list[list[Site]]] = {}
        for name, roles, link in (
            ("loc", ("weight", "factor"), None),
            ("scale_loc", ("scale",), torch.log),
            ("share_loc", ("share",), torch.logit),
            ("point", ("bias",), None),
        ):
            blocks = self._blocks[name] = _blocks([s for s in sites if s.role in roles])
            values = [_centers(b, like, link).expand(components, -1).clone() for b in blocks]
            setattr(self, name, nn.ParameterList(values))
            if name != "point" and family != "point":
                rhos = [torch.full_like(value, inverse_softplus(0.1)) for value in values]
                setattr(self, name.replace("loc", "rho"), nn.ParameterList(rhos))

    def start_scales(self, value: float) -> None:
        """Sets the standard deviation (Cauchy: the scale) of every weight or factor.

        :raises ValueError: unless it is positive, or for ``family="point"``, which has no scales.
        """
        value = checks.positive("value", value)
        if self.family == "point":
            raise ValueError("family='point': points have no standard deviation to set")
        with torch.no_grad():
            for rho in self._block_parameters("rho"):
                rho.fill_(inverse_softplus(value))

    def arguments(self) -> dict[str, object]:
        """The keyword arguments as JSON, without those that only set where training starts."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are saved for the guide, beside its arguments."""
        return {name: value.detach() for name, value in [*self.named_parameters(), *self.named_buffers()]}

    @classmethod
    def from_tensors(cls, model: Any, arguments: dict[str, Any], tensors: dict[str, Tensor]) -> MixtureGuide:
        """Rebuilds the guide from its :meth:`arguments` and :meth:`tensors`.

        :raises ValueError: when they belong to a guide for another model.
        """
        guide = cls(model, **arguments)
        guide._take_parameters(tensors)
        return guide

    def _take_parameters(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self.named_parameters():
            if name not in tensors or tensors[name].shape != parameter.shape:
                held = tuple(tensors[name].shape) if name in tensors else "missing"
                raise ValueError(
                    f"the stored guide is for another model: its {name!r} is {held}, expected {tuple(parameter.shape)}"
                )
            parameter.data = tensors[name].to(parameter.device)

    def means_of_network(self) -> dict[str, Tensor]:
        """Posterior means, by name, of the network's parameters for which nothing else needs to be saved."""
        return {}

    def summaries(self) -> dict[str, tuple[tuple[str, ...], Tensor]]:
        """``{name: (dimensions, values)}`` of summaries of the parameters, beyond one Normal for each weight."""
        return {}

    def figures(self) -> dict[str, Figure]:
        """``{what is to be seen: matplotlib.figure.Figure}``: plots of what is specific to a guide; here none.

        A page shows each once, under its name; the caller may change the size of a figure.
        """
        return {}

    def __getstate__(self) -> dict[str, object]:
        return picklable_state(self)

    def __repr__(self) -> str:
        return display.call(self, **self.repr_arguments())

    def repr_arguments(self) -> dict[str, object]:
        """The fields of the guide's ``repr``, by name."""
        sites = sum(len(block) for blocks in self._blocks.values() for block in blocks)
        numbers = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return {"components": self.num_members, "family": self.family, "sites": sites, "parameters": numbers}

    def forms(self) -> dict[str, Form]:
        """The forms of the network's parameters for which the guide knows more than the model does."""
        return {}

    def numbers_of_sites(self) -> dict[str, int]:
        """Number of trained values of each site that is factorised here."""
        views = [*self.coordinates().items(), *self.widths().items()]
        counts: dict[str, int] = {}
        for name, view in views:
            counts[name] = counts.get(name, 0) + view.numel()
        return counts

    @contextlib.contextmanager
    def every_member(self) -> Iterator[None]:
        """Inside, a call gives one draw for each member and none per row, in either mode: for prediction."""
        self._every = True
        try:
            yield
        finally:
            self._every = False

    def forward(self, x: Inputs, y: Tensor | None = None) -> dict[str, Tensor]:
        enter_mode(self)
        register_parameters(self, self._named())
        device = self.like().device
        values: dict[str, Tensor] = {}
        with contextlib.ExitStack() as stack:
            if self.training or self._every:
                members = self._plate("members", self.num_members, self.members_dim, device)
                component = None
            else:
                members = self._plate("members", 1, self.members_dim, device)
                component = self._component(members)
            stack.enter_context(members)
            take = _taker(component, self.members_dim)
            points = self.family == "point"
            before = self._distributions("scale_loc", _positive_points if points else _log_normals, take)
            before |= self._distributions("share_loc", _share_points if points else _logit_normals, take)
            before |= self._distributions("point", _points, take)
            for name in self._before_rows:
                values[name] = sample(name, before[name])
            if self._in_rows:
                rows = batch_size(x, y) if self.training and self.per_row and not self._every else 1
                stack.enter_context(self._plate("rows", rows, -1, device))
            for name, d in self._weights(take).items():
                values[name] = sample(name, d)
        return values

    def _weights(self, take: _Take) -> dict[str, dist.TorchDistribution]:
        """The distributions of weights or factors, by site."""
        return self._distributions("loc", _FAMILIES[self.family], take)

    def _block_parameters(self, name: str) -> list[nn.Parameter]:
        """The blocks of one kind, read past Pyro's attribute hooks."""
        blocks = self._modules[name]
        assert isinstance(blocks, nn.ParameterList)
        return [p for p in blocks._parameters.values() if p is not None]

    def _distributions(self, name: str, family: _Makes, take: _Take) -> dict[str, dist.TorchDistribution]:
        """The distribution of each site of one kind."""
        found: dict[str, dist.TorchDistribution] = {}
        rho = name.replace("loc", "rho")
        parameters = [self._block_parameters(n) for n in dict.fromkeys((name, rho)) if n in self._modules]
        for sites, *blocks in zip(self._blocks[name], *parameters, strict=True):
            made = family([site.shape for site in sites], *map(take, blocks))
            found |= zip((site.name for site in sites), made, strict=True)
        return found

    def blocks(self) -> list[Block]:
        """The parameters that hold the locations of all sites."""
        return [
            Block(kind, sites, parameter)
            for kind, groups in self._blocks.items()
            for sites, parameter in zip(groups, self._block_parameters(kind), strict=True)
        ]

    def coordinates(self) -> dict[str, Tensor]:
        """Views ``[K, *shape]`` of the locations of all sites: of weights themselves, logarithms of scales, logits."""
        return self._views(tuple(self._blocks))

    def widths(self) -> dict[str, Tensor]:
        """Views ``[K, *shape]`` of rho of the sites that are not points: deviations are ``softplus(rho) + 1e-7``."""
        if self.family == "point":
            return {}
        return self._views(tuple(kind for kind in self._blocks if kind != "point"), "rho")

    def _views(self, kinds: Sequence[str], what: str = "loc") -> dict[str, Tensor]:
        views: dict[str, Tensor] = {}
        for kind in kinds:
            for sites, block in zip(self._blocks[kind], self._block_parameters(kind.replace("loc", what)), strict=True):
                parts = split(block.detach(), [site.shape for site in sites])
                views |= zip((site.name for site in sites), parts, strict=True)
        return views

    def like(self) -> Tensor:
        """A tensor on the guide's device and with its dtype."""
        return self._block_parameters("loc")[0]

    def member_biases(self) -> list[nn.Parameter]:
        """The members' own biases, which are points and not random."""
        return [p for name, p in self._named() if name.startswith("point.")]

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        return [
            (f"{kind}.{i}", p)
            for kind, blocks in self._modules.items()
            if isinstance(blocks, nn.ParameterList)
            for i, p in blocks._parameters.items()
            if p is not None
        ]

    def _plate(self, name: str, size: int, dim: int, device: torch.device) -> contextlib.AbstractContextManager[object]:
        return plate(f"{self.prefix}.{name}" if self.prefix else name, 1, dim, device, count=size)

    def _component(self, members: contextlib.AbstractContextManager[object]) -> Tensor | None:
        """The index of a random component for every draw, ``[..., 1 ...]``."""
        if self.num_members == 1:
            return None
        name = f"{self.prefix}.component" if self.prefix else "component"
        with members:
            weights = dist.Categorical(logits=self.like().new_zeros(self.num_members))
            return sample(name, weights, infer={"is_auxiliary": True})


_Take = Callable[[Tensor], Tensor]


def _taker(component: Tensor | None, members_dim: int) -> _Take:
    """Puts the components of a block ``[K, n]`` on the members axis: ``[K, 1 ..., n]``, or the chosen one."""

    def take(block: Tensor) -> Tensor:
        if component is not None:
            return block[component]
        return block.reshape(block.shape[:1] + (1,) * (-members_dim - 1) + block.shape[1:])

    return take


_Makes = Callable[..., Sequence[dist.TorchDistribution]]


def _normals(shapes: list[torch.Size], loc: Tensor, rho: Tensor) -> Sequence[dist.TorchDistribution]:
    return NormalBlock(loc, positive(rho), shapes).parts()


def _cauchys(shapes: list[torch.Size], loc: Tensor, rho: Tensor) -> Sequence[dist.TorchDistribution]:
    parts = zip(split(loc, shapes), split(positive(rho), shapes), shapes, strict=True)
    return [dist.Cauchy(m, s).to_event(len(shape)) for m, s, shape in parts]


def _log_normals(shapes: list[torch.Size], loc: Tensor, rho: Tensor) -> Sequence[dist.TorchDistribution]:
    return LogNormalBlock(loc, positive(rho), shapes).parts()


def _logit_normals(shapes: list[torch.Size], loc: Tensor, rho: Tensor) -> Sequence[dist.TorchDistribution]:
    parts = zip(split(loc, shapes), split(positive(rho), shapes), shapes, strict=True)
    sigmoid = dist.transforms.SigmoidTransform()
    return [dist.TransformedDistribution(dist.Normal(m, s), [sigmoid]).to_event(len(shape)) for m, s, shape in parts]


def _points(shapes: list[torch.Size], value: Tensor) -> Sequence[dist.TorchDistribution]:
    return PointBlock(value, shapes).parts()


def _positive_points(shapes: list[torch.Size], log: Tensor) -> Sequence[dist.TorchDistribution]:
    return _points(shapes, log.exp())


def _share_points(shapes: list[torch.Size], logit: Tensor) -> Sequence[dist.TorchDistribution]:
    return _points(shapes, logit.sigmoid())


#: ``family(shapes, *parameters [*batch, n])``: the distributions of sites that lie side by side
_FAMILIES: dict[str, _Makes] = {"normal": _normals, "cauchy": _cauchys, "point": _points}


def _centers(sites: list[Site], like: Tensor, link: Callable[[Tensor], Tensor] | None) -> Tensor:
    value = torch.cat(
        [
            torch.as_tensor(site.center, dtype=like.dtype, device=like.device).expand(site.shape).reshape(-1)
            for site in sites
        ]
    ).detach()
    return value if link is None else link(value)
