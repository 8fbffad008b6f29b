"""Rules for operations on channels: from the layouts of the inputs to that of the result, or ``None``."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torchvision.ops import stochastic_depth

from pyro_bnn.sparsity.walk import ChannelLayout, Rules, Space, Walk


def _layer(walk: Walk, node: fx.Node, x: ChannelLayout) -> ChannelLayout | None:
    """Linear layers and convolutions make new channels from those that they read."""
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
        # depthwise: a masked kernel leaves its input channel unread and its output channel dead
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


def _norm(walk: Walk, node: fx.Node, x: ChannelLayout, spatial: tuple[int, ...]) -> ChannelLayout | None:
    """A channel whose scale and shift are masked is zero; in a layer without scale and shift no channel is."""
    layer = walk.layer(node)
    own = [name for name, t in [*layer._parameters.items(), *layer._buffers.items()] if t is not None and t.dim()]
    if x.spatial not in spatial or not own or not all(walk.tie(node, n, 0, x, None, "num_features") for n in own):
        return None
    if not layer.affine:
        walk.hold(x, "makers")
    return x


def _elementwise(walk: Walk, node: fx.Node, x: ChannelLayout, *others: ChannelLayout) -> ChannelLayout | None:
    """An elementwise function. If it does not map zeros to zero, no channel of the result is silent."""
    if not all(x.like(other) for other in (x, *others)):
        return None
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda _: torch.zeros(1, dtype=torch.float64))
    function: Any = walk.layer(node) if node.op == "call_module" else node.target
    zero = getattr(args[0], function)(*args[1:], **kwargs) if node.op == "call_method" else function(*args, **kwargs)
    if not zero.isfinite().all():  # not even an unread channel may become NaN
        return None
    for other in others:
        for one, two in zip(x.spaces, other.spaces, strict=True):
            one.merge(two)
    if zero.any():
        walk.hold(x, "makers")
    return x


def _multiply(walk: Walk, node: fx.Node, x: ChannelLayout, *others: ChannelLayout) -> ChannelLayout | None:
    """A product is zero where one factor is, and the other factor is not needed there."""
    if len(others) != 1 or not x.like(others[0]):
        return None
    if node.kwargs or walk.read_after(node, x):  # a trace does not show ``x *= y``, after which x is the product
        return _elementwise(walk, node, x, *others)
    y = walk.new(x.sizes, x.spatial, x.flat)
    for one, two, product in zip(x.spaces, others[0].spaces, y.spaces, strict=True):
        product.makers.append(_either(one, "dead", two))
        one.root.readers.append(_either(product, "unread", two))
        two.root.readers.append(_either(product, "unread", one))
        walk.couples += [(one, product), (two, product)]
    return y


def _either(space: Space, fate: str, factor: Space) -> Callable[[], Tensor]:
    return lambda: getattr(space.root, fate) | factor.root.dead


def _carry(walk: Walk, node: fx.Node, x: ChannelLayout, spatial: Iterable[int] = range(-1, 4)) -> ChannelLayout | None:
    """Operations that keep channels separate, and zeros at zero."""
    return x if x.spatial in spatial else None


def _pad(walk: Walk, node: fx.Node, x: ChannelLayout) -> ChannelLayout | None:
    if len(_argument(walk, node, 1, "pad", ())) > 2 * x.spatial:
        return None
    if _argument(walk, node, 3, "value", None):
        walk.hold(x, "makers")
    return x


def _mean(walk: Walk, node: fx.Node, x: ChannelLayout) -> ChannelLayout | None:
    dim, rank = _argument(walk, node, 1, "dim", None), x.spatial + 2
    axes = {axis % rank for axis in ((dim,) if isinstance(dim, int) else dim or ())} if x.spatial > 0 else {0}
    if min(axes, default=0) < 2:
        return None
    return x if _argument(walk, node, 2, "keepdim", False) else replace(x, spatial=x.spatial - len(axes))


def _flatten(walk: Walk, node: fx.Node, x: ChannelLayout) -> ChannelLayout | None:
    axes = _argument(walk, node, 1, "start_dim", 0), _argument(walk, node, 2, "end_dim", -1)
    return x.flattened() if axes == (1, -1) else None


def _view(walk: Walk, node: fx.Node, x: ChannelLayout, *sizes: ChannelLayout) -> ChannelLayout | None:
    """``x.view(x.size(0), -1)`` and the like; the length must be that of x, because another tensor may differ."""
    shape: Any = node.args[1] if len(node.args) == 2 else node.args[1:]
    flat = isinstance(shape, (tuple, list)) and len(shape) == 2 and shape[1] == -1
    return x.flattened() if flat and _length_of(shape[0]) is node.args[0] else None


def _length_of(node: Any) -> Any:
    """The tensor whose length along axis 0 this node is; ``None`` for other nodes."""
    if not isinstance(node, fx.Node):
        return None
    if node.target is operator.getitem and node.args[1] == 0 and isinstance(shape := node.args[0], fx.Node):
        return shape.args[0] if shape.target in (getattr, "size") and shape.args[1:] in ((), ("shape",)) else None
    return node.args[0] if node.target == "size" and node.args[1:] == (0,) else None


def _shape(walk: Walk, node: fx.Node, x: ChannelLayout) -> ChannelLayout | None:
    """Code may read the number of samples, but not that of channels, which may change."""
    readers = [node] if node.args[1:] == (0,) else node.users
    return ChannelLayout() if all(_length_of(reader) is node.args[0] for reader in readers) else None


def _cat(walk: Walk, node: fx.Node, *inputs: ChannelLayout) -> ChannelLayout | None:
    tensors = _argument(walk, node, 0, "tensors", ())
    parts = [walk.layouts[tensor] for tensor in tensors]
    spatial = parts[0].spatial
    if any(not x.spaces or x.flat or x.spatial != spatial for x in parts):
        return None
    if _argument(walk, node, 1, "dim", 0) not in ((1, -1 - spatial) if spatial else (-1,)):
        return None  # axis 1 of a linear layer's output may be time
    return ChannelLayout(tuple(space for x in parts for space in x.spaces), spatial)


def _argument(walk: Walk, node: fx.Node, position: int, name: str, default: Any) -> Any:
    if node.op == "call_module":
        return getattr(walk.layer(node), name)
    return node.kwargs.get(name, node.args[position] if position < len(node.args) else default)


def _keys(names: str, *places: object) -> list[Any]:
    return [getattr(place, name) for name in names.split() for place in places if hasattr(place, name)]


# Functions are found by object, methods by name, layers by exact type: a subclass may behave differently.
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

_ELEMENTWISE: Rules = dict.fromkeys([*_FUNCTIONS.split(), *_keys(_FUNCTIONS, torch, F, operator, nn)], _elementwise)
ONE: Rules = {
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
SEVERAL: Rules = {
    **_ELEMENTWISE,
    **dict.fromkeys([*_PRODUCTS.split(), *_keys(_PRODUCTS, torch, operator)], _multiply),
    **dict.fromkeys([torch.cat, torch.concat, torch.concatenate], _cat),
    **dict.fromkeys(["view", "reshape", torch.reshape], _view),
}
