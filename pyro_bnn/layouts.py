"""Which entries of its parameters belong to which channels of a network, followed through the graph of its operations.

The network is traced, and every tensor in it whose channels can be followed gets a layout: the spaces of channels over
which one of its axes runs. Layers tie entries of their parameters to these spaces. A channel goes when all that makes
it is masked (it is dead) or all that reads it is (it is unread). Everything else that belongs to it is then masked
too, and that may be all that made or read another channel. Operations without a rule in the table below are barriers:
every channel of the tensors that they touch stays as it is.
"""

from __future__ import annotations

import copy
import functools
import inspect
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torchvision.ops import stochastic_depth


def all_true(shape: Any) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


class _Space:
    """Channels that several tensors share, and the entries of parameters and buffers that belong to them.

    Each maker and each reader is a function that tells for which of the channels it does nothing any more.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.makers: list[Callable[[], Tensor]] = []
        self.readers: list[Callable[[], Tensor]] = []
        self.blocks: list[Block] = []
        self.tied: dict[str, list[Block]] = {"makers": [], "readers": []}
        self.dead, self.unread, self.stays = ~all_true(size), ~all_true(size), all_true(size)
        self._into: _Space | None = None

    @property
    def root(self) -> _Space:
        space = self
        while space._into is not None:
            space = space._into
        return space

    def merge(self, other: _Space) -> None:
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
    """The entries along one axis of a tensor that belong to a space: for each of its channels a run of them."""

    name: str
    axis: int
    start: int
    size: int
    run: int

    def of(self, tensor: Tensor) -> Tensor:
        """``[size, run, ...]``, its view of a tensor that has this axis first."""
        return tensor.narrow(0, self.start, self.size * self.run).unflatten(0, (self.size, self.run))


@dataclass(frozen=True)
class Dead:
    """Channels of one space that no weight makes any more.

    :param channels: their numbers in the space.
    :param makers, readers: the entries of weights that made and that read the channels of the space.
    :param traced: whether nothing else reads them.
    """

    channels: Tensor
    makers: list[Block]
    readers: list[Block]
    traced: bool


@dataclass(frozen=True)
class _Layout:
    """The channels of a tensor: they run over the spaces in turn, along the axis with ``spatial`` more behind it.

    In a ``flat`` tensor ``[N, features]`` each channel is a run of features, one for every position that it had. A
    layout without spaces says nothing: such a tensor may be anything, and all its channels stay.
    """

    spaces: tuple[_Space, ...] = ()
    spatial: int = -1
    flat: bool = False

    @property
    def sizes(self) -> list[int]:
        return [space.size for space in self.spaces]

    def like(self, other: _Layout) -> bool:
        same = (self.sizes, self.spatial, self.flat) == (other.sizes, other.spatial, other.flat)
        return bool(self.spaces) and same

    def flattened(self) -> _Layout:
        return replace(self, spatial=0, flat=True) if self.spatial > 0 else self


class Walk:
    """One way through the graph of a network, on which its parameters are tied to spaces of channels."""

    def __init__(self, net: nn.Module, kept: dict[str, Tensor], held: Mapping[str, Tensor]) -> None:
        net = copy.deepcopy(net).eval()  # tracing leaves constants in the module
        self.kept, self.held = kept, held
        self.spaces: list[_Space] = []
        self.couples: list[tuple[_Space, _Space]] = []  # a channel is taken out of both or of neither
        self.sizes: list[tuple[str, str, str, int]] = []  # module, attribute, and the tensor and axis of that size
        self.names = {id(tensor): name for name, tensor in [*net.named_parameters(), *net.named_buffers()]}
        self.modules = dict(net.named_modules(remove_duplicate=False))
        self.layouts: dict[fx.Node, _Layout] = {}
        graph = _trace(net)
        self.uses = Counter(id(t) for m in net.modules() for t in [*m._parameters.values(), *m._buffers.values()])
        for node in graph.nodes:
            if node.op == "get_attr":
                self.uses[id(operator.attrgetter(node.target)(net))] += 1
            elif node.op == "call_module":
                self.uses.update(id(t) for t in _tensors(self.layer(node)))
        for node in graph.nodes:
            inputs = [self.layouts[source] for source in node.all_input_nodes]
            rule = self._rule(node, _ONE if len(inputs) == 1 else _SEVERAL) if inputs else None
            layout = rule(self, node, *inputs) if rule else None
            if layout is None:
                for x in inputs:
                    self.hold(x, "makers", "readers")
            self.layouts[node] = layout or _Layout()

    def _rule(self, node: fx.Node, rules: dict[Any, _Rule]) -> _Rule | None:
        if node.op != "call_module":
            return rules.get(node.target) if node.op.startswith("call") else None
        layer = self.layer(node)
        altered = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
        shared = any(self.uses[id(tensor)] > 2 for tensor in _tensors(layer))  # more than one owner and one call
        return None if altered or shared else rules.get(type(layer))

    def layer(self, node: fx.Node) -> Any:
        return self.modules[str(node.target)]

    def new(self, sizes: list[int], spatial: int, flat: bool = False) -> _Layout:
        x = _Layout(tuple(_Space(size) for size in sizes), spatial, flat)
        self.spaces += x.spaces
        return x

    def read_after(self, node: fx.Node, x: _Layout) -> bool:
        """Whether a tensor that may be this one is used by an operation after a node."""
        roots = {space.root for space in x.spaces}
        same = [other for other, y in self.layouts.items() if any(space.root in roots for space in y.spaces)]
        return any(user is not node and user not in self.layouts for other in same for user in other.users)

    def hold(self, x: _Layout, *roles: str) -> None:
        """Adds a maker that is never silent, or a reader that always reads."""
        for space in x.spaces:
            for role in roles:
                getattr(space.root, role).append((~all_true(space.size)).clone)

    def tie(self, node: fx.Node, own: str, axis: int, x: _Layout, role: str | None, *attributes: str) -> bool:
        """Ties one axis of a layer's tensor to the channels of a layout; False when it has not as many entries.

        :param role: whether the entries are ``"makers"`` or ``"readers"`` of the channels, or only belong to them.
        :param attributes: of the layer, which are the size of that axis.
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
        """Masks what belongs to dead and unread channels until no more of them turn up, then says which stay."""
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
                    if block.name in self.kept:  # not the statistics of a normalisation
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
            raise NotImplementedError("it would take the forward of the class, not the one that was put in its place")
        return fx.Tracer().trace(net, defaults or None)
    except Exception as error:  # anything that a network does with the stand-ins for its tensors
        raise ValueError(
            f"the channels of {type(net).__name__} cannot be followed, because torch.fx cannot trace it "
            f"({type(error).__name__}: {error}). Keep the masks without removing channels (shrink=False)."
        ) from error


# ------------------------------------------------- rules: from the layouts of the inputs to that of the result, or None


def _layer(walk: Walk, node: fx.Node, x: _Layout) -> _Layout | None:
    """Linear layers and convolutions make new channels of those that they read."""
    layer = walk.layer(node)
    spatial, groups = len(getattr(layer, "kernel_size", ())), getattr(layer, "groups", 1)
    if x.spaces and x.spatial != spatial:
        return None
    kind = "channels" if spatial else "features"
    out, into = (1, 0) if getattr(layer, "transposed", False) else (0, 1)
    if groups == 1:
        y = walk.new([layer.weight.shape[out]], spatial)
        read: tuple[str, ...] = (f"in_{kind}",)
    elif x.spaces and groups == layer.in_channels == layer.out_channels:
        # depthwise: a masked kernel leaves one channel unread and another, in the same place, dead
        y = walk.new(x.sizes, spatial)
        walk.couples += zip(x.spaces, y.spaces, strict=True)
        out, into, read = 0, 0, ("in_channels", "groups")
    else:
        return None
    if x.spaces and not walk.tie(node, "weight", into, x, "readers", *read):
        return None
    walk.tie(node, "weight", out, y, "makers", f"out_{kind}")
    if layer.bias is not None:
        walk.tie(node, "bias", 0, y, None)
    return y


def _norm(walk: Walk, node: fx.Node, x: _Layout, spatial: tuple[int, ...]) -> _Layout | None:
    """A channel without scale and shift is zero whatever its statistics; one that never had them is not."""
    layer = walk.layer(node)
    own = [name for name, t in [*layer._parameters.items(), *layer._buffers.items()] if t is not None and t.dim()]
    if x.spatial not in spatial or not own or not all(walk.tie(node, n, 0, x, None, "num_features") for n in own):
        return None
    if not layer.affine:
        walk.hold(x, "makers")
    return x


def _elementwise(walk: Walk, node: fx.Node, x: _Layout, *others: _Layout) -> _Layout | None:
    """A function of the numbers in one place: no channel is silent any more where it does not take zeros to zero."""
    if not all(x.like(other) for other in (x, *others)):
        return None
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda _: torch.zeros(1, dtype=torch.float64))
    function: Any = walk.layer(node) if node.op == "call_module" else node.target
    zero = getattr(args[0], function)(*args[1:], **kwargs) if node.op == "call_method" else function(*args, **kwargs)
    if not zero.isfinite().all():  # not even a channel that nobody reads may become NaN
        return None
    for other in others:
        for one, two in zip(x.spaces, other.spaces, strict=True):
            one.merge(two)
    if zero.any():
        walk.hold(x, "makers")
    return x


def _multiply(walk: Walk, node: fx.Node, x: _Layout, *others: _Layout) -> _Layout | None:
    """A product is silent where one factor is, and nobody needs the other there."""
    if len(others) != 1 or not x.like(others[0]):
        return None
    if node.kwargs or walk.read_after(node, x):  # a trace does not tell ``x *= y``, which others may then read as x
        return _elementwise(walk, node, x, *others)
    y = walk.new(x.sizes, x.spatial, x.flat)
    for one, two, product in zip(x.spaces, others[0].spaces, y.spaces, strict=True):
        product.makers.append(_either(one, "dead", two))
        one.root.readers.append(_either(product, "unread", two))
        two.root.readers.append(_either(product, "unread", one))
        walk.couples += [(one, product), (two, product)]
    return y


def _either(space: _Space, fate: str, factor: _Space) -> Callable[[], Tensor]:
    return lambda: getattr(space.root, fate) | factor.root.dead


def _carry(walk: Walk, node: fx.Node, x: _Layout, spatial: Iterable[int] = range(-1, 4)) -> _Layout | None:
    """What leaves every channel to itself, and zeros at zero."""
    return x if x.spatial in spatial else None


def _pad(walk: Walk, node: fx.Node, x: _Layout) -> _Layout | None:
    if len(_argument(walk, node, 1, "pad", ())) > 2 * x.spatial:
        return None
    if _argument(walk, node, 3, "value", None):
        walk.hold(x, "makers")
    return x


def _mean(walk: Walk, node: fx.Node, x: _Layout) -> _Layout | None:
    dim, rank = _argument(walk, node, 1, "dim", None), x.spatial + 2
    axes = {axis % rank for axis in ((dim,) if isinstance(dim, int) else dim or ())} if x.spatial > 0 else {0}
    if min(axes, default=0) < 2:
        return None
    return x if _argument(walk, node, 2, "keepdim", False) else replace(x, spatial=x.spatial - len(axes))


def _flatten(walk: Walk, node: fx.Node, x: _Layout) -> _Layout | None:
    axes = _argument(walk, node, 1, "start_dim", 0), _argument(walk, node, 2, "end_dim", -1)
    return x.flattened() if axes == (1, -1) else None


def _view(walk: Walk, node: fx.Node, x: _Layout, *sizes: _Layout) -> _Layout | None:
    """``x.view(x.size(0), -1)`` and the like; the length of another tensor may be another number."""
    shape: Any = node.args[1] if len(node.args) == 2 else node.args[1:]
    flat = isinstance(shape, (tuple, list)) and len(shape) == 2 and shape[1] == -1
    return x.flattened() if flat and _length_of(shape[0]) is node.args[0] else None


def _length_of(node: Any) -> Any:
    """The tensor whose length along axis 0 this is, if it is one."""
    if not isinstance(node, fx.Node):
        return None
    if node.target is operator.getitem and node.args[1] == 0 and isinstance(shape := node.args[0], fx.Node):
        return shape.args[0] if shape.target in (getattr, "size") and shape.args[1:] in ((), ("shape",)) else None
    return node.args[0] if node.target == "size" and node.args[1:] == (0,) else None


def _shape(walk: Walk, node: fx.Node, x: _Layout) -> _Layout | None:
    """The number of samples may be read; that of channels may change."""
    readers = [node] if node.args[1:] == (0,) else node.users
    return _Layout() if all(_length_of(reader) is node.args[0] for reader in readers) else None


def _cat(walk: Walk, node: fx.Node, *inputs: _Layout) -> _Layout | None:
    tensors = _argument(walk, node, 0, "tensors", ())
    parts = [walk.layouts[tensor] for tensor in tensors]
    spatial = parts[0].spatial
    if any(not x.spaces or x.flat or x.spatial != spatial for x in parts):
        return None
    if _argument(walk, node, 1, "dim", 0) not in ((1, -1 - spatial) if spatial else (-1,)):
        return None  # axis 1 of a linear layer's output may be the time
    return _Layout(tuple(space for x in parts for space in x.spaces), spatial)


def _argument(walk: Walk, node: fx.Node, position: int, name: str, default: Any) -> Any:
    if node.op == "call_module":
        return getattr(walk.layer(node), name)
    return node.kwargs.get(name, node.args[position] if position < len(node.args) else default)


def _keys(names: str, *places: Any) -> list[Any]:
    return [getattr(place, name) for name in names.split() for place in places if hasattr(place, name)]


# Functions go by the object, methods by their name, layers by their exact type: a subclass may do anything.
_PRODUCTS = "mul multiply"
_FUNCTIONS = (
    "add add_ iadd sub sub_ isub mul_ imul div div_ truediv itruediv neg abs square maximum minimum clamp clamp_ "
    "sin cos exp erf "
    "relu relu_ relu6 gelu silu mish elu selu celu leaky_relu leaky_relu_ hardswish hardtanh hardsigmoid hardshrink "
    "softshrink softsign softplus tanhshrink logsigmoid tanh tanh_ sigmoid sigmoid_ "
    "ReLU ReLU6 GELU SiLU Mish ELU SELU CELU LeakyReLU Hardswish Hardtanh Hardsigmoid Hardshrink Softshrink Softsign "
    "Softplus Tanhshrink LogSigmoid Threshold Tanh Sigmoid "
) + _PRODUCTS
_IDENTITIES = "Identity Dropout Dropout1d Dropout2d Dropout3d dropout dropout1d dropout2d dropout3d"
_METHODS = "contiguous clone detach float double"
_POOLS = (
    "MaxPool{0}d AvgPool{0}d AdaptiveMaxPool{0}d AdaptiveAvgPool{0}d max_pool{0}d avg_pool{0}d adaptive_max_pool{0}d "
    "adaptive_avg_pool{0}d ZeroPad{0}d ReflectionPad{0}d ReplicationPad{0}d CircularPad{0}d"
)

_Rule = Callable[..., _Layout | None]
_ELEMENTWISE: dict[Any, _Rule] = dict.fromkeys(
    [*_FUNCTIONS.split(), *_keys(_FUNCTIONS, torch, F, operator, nn)], _elementwise
)
_ONE: dict[Any, _Rule] = {
    **_ELEMENTWISE,
    **dict.fromkeys(_keys("Linear Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d", nn), _layer),
    nn.BatchNorm1d: functools.partial(_norm, spatial=(0, 1)),
    nn.BatchNorm2d: functools.partial(_norm, spatial=(2,)),
    nn.BatchNorm3d: functools.partial(_norm, spatial=(3,)),
    **dict.fromkeys([*_keys(_IDENTITIES, nn, F), *_METHODS.split(), stochastic_depth], _carry),
    **{key: functools.partial(_carry, spatial=(d,)) for d in (1, 2, 3) for key in _keys(_POOLS.format(d), nn, F)},
    **dict.fromkeys([nn.Upsample, F.interpolate], functools.partial(_carry, spatial=(1, 2, 3))),
    **dict.fromkeys(["mean", "sum", "amax", torch.mean, torch.sum, torch.amax], _mean),
    **dict.fromkeys([nn.Flatten, "flatten", torch.flatten], _flatten),
    **dict.fromkeys(["size", getattr], _shape),
    F.pad: _pad,
}
_SEVERAL: dict[Any, _Rule] = {
    **_ELEMENTWISE,
    **dict.fromkeys([*_PRODUCTS.split(), *_keys(_PRODUCTS, torch, operator)], _multiply),
    **dict.fromkeys([torch.cat, torch.concat, torch.concatenate], _cat),
    **dict.fromkeys(["view", "reshape", torch.reshape], _view),
}
