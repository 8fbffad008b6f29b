"""Finds which entries of parameters belong to which channels of a network, by following the graph of its operations.

The network is traced, and every tensor in it whose channels can be followed gets a layout: the spaces of channels over
which one of its axes runs. Layers tie entries of their parameters to these spaces. A channel is removed when everything
that makes it is masked (it is dead), or everything that reads it (it is unread). Everything else that belongs to it is
then masked too, which may leave another channel dead or unread. Operations without a rule in ``channel_rules`` are
barriers: every channel of the tensors that they touch stays as it is.
"""

from __future__ import annotations

import copy
import functools
import inspect
import operator
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn


def all_true(shape: Any) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


class Space:
    """Channels that several tensors share, and the entries of parameters and buffers that belong to them.

    Each maker and each reader is a function that returns for which of the channels it no longer does anything.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.makers: list[Callable[[], Tensor]] = []
        self.readers: list[Callable[[], Tensor]] = []
        self.blocks: list[Block] = []
        self.tied: dict[str, list[Block]] = {"makers": [], "readers": []}
        self.dead, self.unread, self.stays = ~all_true(size), ~all_true(size), all_true(size)
        self._into: Space | None = None

    @property
    def root(self) -> Space:
        space = self
        while space._into is not None:
            space = space._into
        return space

    def merge(self, other: Space) -> None:
        mine, theirs = self.root, other.root
        if mine is not theirs:
            mine.makers += theirs.makers
            mine.readers += theirs.readers
            mine.blocks += theirs.blocks
            for role, blocks in theirs.tied.items():
                mine.tied[role] += blocks
            theirs._into = mine


@dataclass(frozen=True)
class Block:
    """The entries along one axis of a tensor that belong to a space: ``run`` successive ones for each channel."""

    name: str
    axis: int
    start: int
    size: int
    run: int

    def of(self, tensor: Tensor) -> Tensor:
        """The block as a view ``[size, run, ...]`` of a tensor that has its axis first."""
        return tensor.narrow(0, self.start, self.size * self.run).unflatten(0, (self.size, self.run))


@dataclass(frozen=True)
class Dead:
    """The channels of one space that no weight makes any more.

    :param channels: their indices in the space.
    :param makers, readers: the entries of weights that make and that read the channels of the space.
    :param traced: whether nothing but these readers reads them.
    """

    channels: Tensor
    makers: list[Block]
    readers: list[Block]
    traced: bool


@dataclass(frozen=True)
class ChannelLayout:
    """The channels of a tensor: those of each space in turn, along the axis that ``spatial`` more axes follow.

    In a ``flat`` tensor ``[N, features]`` each channel is a run of features, one for every position that it had. A
    layout without spaces means that nothing is known about the tensor: all its channels stay.
    """

    spaces: tuple[Space, ...] = ()
    spatial: int = -1
    flat: bool = False

    @property
    def sizes(self) -> list[int]:
        return [space.size for space in self.spaces]

    def like(self, other: ChannelLayout) -> bool:
        same = (self.sizes, self.spatial, self.flat) == (other.sizes, other.spatial, other.flat)
        return bool(self.spaces) and same

    def flattened(self) -> ChannelLayout:
        return replace(self, spatial=0, flat=True) if self.spatial > 0 else self


#: ``(walk, node, *layouts of the inputs) -> layout of the result``, or ``None`` where channels cannot be followed
Rule = Callable[..., ChannelLayout | None]
#: rules by function, name of a method, or type of a layer
Rules = Mapping[Any, Rule]


class Walk:
    """Follows the graph of a network, and ties its parameters to spaces of channels.

    :param net: a module that ``torch.fx`` can trace.
    :param kept: masks of its parameters, which are changed in place.
    :param held: by name of a layer's weight, the outputs that are never taken for dead.
    :param one, several: the rules of operations with one and with several inputs.
    """

    def __init__(
        self, net: nn.Module, kept: dict[str, Tensor], held: Mapping[str, Tensor], one: Rules, several: Rules
    ) -> None:
        net = copy.deepcopy(net).eval()  # tracing leaves constants in the module
        self.kept, self.held = kept, held
        self.spaces: list[Space] = []
        self.couples: list[tuple[Space, Space]] = []  # a channel is removed from both or from neither
        self.sizes: list[tuple[str, str, str, int]] = []  # module, attribute, and the tensor and axis of that size
        self.names = {id(tensor): name for name, tensor in [*net.named_parameters(), *net.named_buffers()]}
        self.modules = dict(net.named_modules(remove_duplicate=False))
        self.layouts: dict[fx.Node, ChannelLayout] = {}
        graph = _trace(net)
        self.uses = Counter(id(t) for m in net.modules() for t in [*m._parameters.values(), *m._buffers.values()])
        for node in graph.nodes:
            if node.op == "get_attr":
                self.uses[id(operator.attrgetter(node.target)(net))] += 1
            elif node.op == "call_module":
                self.uses.update(id(t) for t in _tensors(self.layer(node)))
        for node in graph.nodes:
            inputs = [self.layouts[source] for source in node.all_input_nodes]
            rule = self._rule(node, one if len(inputs) == 1 else several) if inputs else None
            layout = rule(self, node, *inputs) if rule else None
            if layout is None:
                for x in inputs:
                    self.hold(x, "makers", "readers")
            self.layouts[node] = layout or ChannelLayout()

    def _rule(self, node: fx.Node, rules: Rules) -> Rule | None:
        if node.op != "call_module":
            return rules.get(node.target) if node.op.startswith("call") else None
        layer = self.layer(node)
        altered = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
        shared = any(self.uses[id(tensor)] > 2 for tensor in _tensors(layer))  # more than one owner and one call
        return None if altered or shared else rules.get(type(layer))

    def layer(self, node: fx.Node) -> Any:
        return self.modules[str(node.target)]

    def new(self, sizes: list[int], spatial: int, flat: bool = False) -> ChannelLayout:
        x = ChannelLayout(tuple(Space(size) for size in sizes), spatial, flat)
        self.spaces += x.spaces
        return x

    def read_after(self, node: fx.Node, x: ChannelLayout) -> bool:
        """Whether an operation after ``node`` uses ``x``, or a tensor that may be the same."""
        roots = {space.root for space in x.spaces}
        same = [other for other, y in self.layouts.items() if any(space.root in roots for space in y.spaces)]
        return any(user is not node and user not in self.layouts for other in same for user in other.users)

    def hold(self, x: ChannelLayout, *roles: str) -> None:
        """Adds a maker that is never silent, or a reader that always reads."""
        for space in x.spaces:
            for role in roles:
                getattr(space.root, role).append((~all_true(space.size)).clone)

    def tie(self, node: fx.Node, own: str, axis: int, x: ChannelLayout, role: str | None, *attributes: str) -> bool:
        """Ties one axis of a layer's tensor to the channels of a layout; False when their numbers do not fit.

        :param role: whether the entries are ``"makers"`` or ``"readers"`` of the channels, or only belong to them.
        :param attributes: the attributes of the layer that hold the size of that axis.
        """
        tensor = getattr(self.layer(node), own)
        run, rest = divmod(tensor.shape[axis], sum(x.sizes))
        if rest or (run != 1 and not x.flat):
            return False
        start = 0
        for space in x.spaces:
            block = Block(self.names[id(tensor)], axis, start, space.size, run)
            space.root.blocks.append(block)
            if role:
                getattr(space.root, role).append(functools.partial(self._masked, block))
                space.root.tied[role].append(block)
                if role == "makers" and block.name in self.held:
                    space.root.makers.append((~block.of(self.held[block.name]).any(1)).clone)
            start += space.size * run
        self.sizes += [(str(node.target), attribute, own, axis) for attribute in attributes]
        return True

    def _masked(self, block: Block) -> Tensor:
        kept = self.kept[block.name]
        return ~block.of(kept.any(dim=[axis for axis in range(kept.dim()) if axis != block.axis])).any(1)

    def settle(self) -> None:
        """Masks what belongs to dead and unread channels until there are no new ones, then sets which channels stay."""
        roots = [space for space in self.spaces if space.root is space]
        changed = True
        while changed:
            changed = False
            for space in (*roots, *reversed(roots)):
                dead, unread = (
                    functools.reduce(torch.logical_and, (masked() for masked in role), all_true(space.size))
                    for role in (space.makers, space.readers)
                )
                if torch.equal(dead, space.dead) and torch.equal(unread, space.unread):
                    continue
                changed, space.dead, space.unread, space.stays = True, dead, unread, ~(dead | unread)
                for block in space.blocks:
                    if block.name in self.kept:  # statistics of normalisation layers have no mask
                        block.of(self.kept[block.name].movedim(block.axis, 0))[~space.stays] = False
        while any(not torch.equal(a.root.stays, b.root.stays) for a, b in self.couples):
            for a, b in self.couples:
                a.root.stays = b.root.stays = a.root.stays | b.root.stays
        for space in roots:
            space.stays[0] |= ~space.stays.any()  # no layer can be without channels

    def dead(self) -> list[Dead]:
        """The dead channels of every space that has some."""
        roots = [space for space in self.spaces if space.root is space and bool(space.dead.any())]
        return [
            Dead(
                s.dead.nonzero().squeeze(1),
                s.tied["makers"],
                s.tied["readers"],
                len(s.readers) == len(s.tied["readers"]),
            )
            for s in roots
        ]

    def index(self, shapes: dict[str, torch.Size]) -> dict[str, tuple[Tensor | None, ...]]:
        """For each parameter and buffer the indices that stay along each axis; ``None`` where all do."""
        stays = {name: [all_true(size) for size in shape] for name, shape in shapes.items()}
        for space in {space.root for space in self.spaces}:
            for block in space.blocks:
                block.of(stays[block.name][block.axis])[:] = space.stays[:, None]
        return {n: tuple(None if a.all() else a.nonzero().squeeze(1) for a in axes) for n, axes in stays.items()}


def _tensors(layer: nn.Module) -> list[Tensor]:
    return [*layer.parameters(), *layer.buffers()]


def _trace(net: nn.Module) -> fx.Graph:
    arguments = inspect.signature(net.forward).parameters.values()
    defaults = {a.name: a.default for a in arguments if a.default is not inspect.Parameter.empty}
    try:
        if "forward" in vars(net):
            raise NotImplementedError("it would trace the forward of the class, not the one that was put in its place")
        return fx.Tracer().trace(net, defaults or None)
    except Exception as error:  # anything that a network does with the stand-ins for its tensors
        raise ValueError(
            f"the channels of {type(net).__name__} cannot be followed, because torch.fx cannot trace it "
            f"({type(error).__name__}: {error}). Keep the masks without removing channels (shrink=False)."
        ) from error
