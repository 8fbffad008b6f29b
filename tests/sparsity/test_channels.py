"""`Channels` removes what masked weights leave without effect, and predictions stay those of the masked network.

Networks are compared in float64 with random biases and normalisation statistics: a channel that is taken out although
it is not silent, or whose neighbours move into a wrong place, then shows.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models import ConvNeXt, DenseNet, VisionTransformer
from torchvision.models.convnext import CNBlockConfig

from pyro_bnn.models import architectures
from pyro_bnn.sparsity.channels import Channels, Size, count

Masks = dict[str, Tensor]


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def all_kept(net: nn.Module) -> Masks:
    return {name: torch.ones(p.shape, dtype=torch.bool) for name, p in net.named_parameters()}


def without(net: nn.Module, **entries: Any) -> Masks:
    """Masks that drop some entries: ``a__b=0`` is row 0 of parameter ``a.b``; a list holds several indices."""
    kept = all_kept(net)
    for name, indices in entries.items():
        for index in indices if isinstance(indices, list) else [indices]:
            kept[name.replace("__", ".")][index] = False
    return kept


def randomised(net: Any, x: Tensor | None = None) -> Any:
    """Every parameter drawn anew, and normalisation statistics that are near those of x but not the same."""
    net = net.to_empty(device="cpu").double().eval()
    norms = [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=(3 / (parameter[0].numel() if parameter.dim() > 1 else 40)) ** 0.5)
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = 1.0
            if norm.affine:
                norm.weight.uniform_(0.8, 1.6)
        if x is not None:
            net.train()(x)
        for norm in norms:
            assert norm.running_mean is not None and norm.running_var is not None
            norm.running_mean += 0.3 * norm.running_var.sqrt() * torch.randn_like(norm.running_var)
            norm.running_var *= 0.5 + torch.rand_like(norm.running_var)
    return net.eval()


def random_masks(net: nn.Module, share: float = 0.15) -> Masks:
    """For every weight whole rows, columns and kernels at random, and one weight in ten."""
    kept = {}
    for name, parameter in net.named_parameters():
        if parameter.dim() > 1:
            rows, columns = parameter.shape[:2]
            inner = [1] * (parameter.dim() - 2)
            mask = torch.rand(rows, 1, *inner) > share
            mask = mask & (torch.rand(1, columns, *inner) > share * (columns > 1))
            mask = mask & (torch.rand(rows, columns, *inner) > share)
            kept[name] = mask & (torch.rand(parameter.shape) > 0.1)
    return kept


def by_hand(net: nn.Module, kept: Masks) -> nn.Module:
    """The network with the masks as they are."""
    net = copy.deepcopy(net)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.mul_(kept[name] if name in kept else 1)
    return net


def predict(net: nn.Module, x: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = net(*x) if isinstance(x, tuple) else net(x)
    return out


def difference(a: Tensor, b: Tensor) -> float:
    assert a.isfinite().all() and b.isfinite().all()
    return float((a - b).abs().max() / a.abs().max())


def check(net: nn.Module, kept: Masks, x: Any) -> Channels:
    """What holds for every network and all masks."""
    before = copy.deepcopy(net.state_dict())
    channels = Channels(net, kept)
    masked, smaller = channels.masked(), channels.smaller()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
    assert all(not (channels.kept[n] & ~mask.to(channels.kept[n].device)).any() for n, mask in kept.items()), (
        "a masked weight came back"
    )
    for name, p in masked.named_parameters():
        assert torch.equal(p, net.get_parameter(name) * channels.kept[name])
        assert torch.equal(smaller.get_parameter(name), channels.cut(name, p))
    for name, buffer in net.named_buffers():
        assert torch.equal(smaller.get_buffer(name), channels.cut(name, buffer))
    for layer in smaller.modules():
        if isinstance(layer, nn.Linear):
            assert layer.weight.shape == (layer.out_features, layer.in_features)
        elif isinstance(layer, nn.modules.conv._ConvNd):
            out, into = layer.out_channels, layer.in_channels
            axes = (into, out // layer.groups) if layer.transposed else (out, into // layer.groups)
            assert layer.weight.shape[:2] == axes
        elif isinstance(layer, nn.BatchNorm2d) and layer.running_var is not None:
            assert layer.weight.shape == layer.running_var.shape == (layer.num_features,)
    assert difference(predict(masked, x), predict(smaller, x)) < 1e-12
    return channels


def stored(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def stays(channels: Channels, name: str) -> list[list[int] | None]:
    return [None if index is None else index.tolist() for index in channels.index[name]]


class Net(nn.Module):
    """Layers by name, and a function of them and the input."""

    def __init__(self, function: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


# ------------------------------------------------------------------------------------------------------ whole networks


def vgg() -> nn.Module:
    net = torchvision.models.vgg11_bn(num_classes=10)
    net.classifier[0] = nn.Linear(512 * 49, 24)
    net.classifier[3] = nn.Linear(24, 24)
    net.classifier[6] = nn.Linear(24, 10)
    return net


def convolutions() -> nn.Module:
    """Padding of all kinds, strides, dilation, transposed and one-dimensional convolutions, dropout."""

    def forward(net: Any, x: Tensor) -> Tensor:
        x = F.pad(net.a(x), (1, 2, 0, 1))
        x = net.drop(F.leaky_relu(net.b(net.pad(x)), 0.2))
        x = F.pad(net.c(x), (1, 1), value=0.5)
        x = F.avg_pool2d(net.norm(net.d(x)), 2)
        x = torch.tanh(net.e(F.interpolate(x, scale_factor=2)))
        x = F.dropout(net.act(net.f(x.mean(3))), training=net.training)
        return net.h(net.norm1(net.g(x.view(x.size(0), -1)).mul(0.5)))

    return Net(
        forward,
        a=nn.Conv2d(3, 10, 3, stride=2, padding=1),
        pad=nn.ReflectionPad2d(2),
        b=nn.Conv2d(10, 12, 3, dilation=2, padding=1, padding_mode="circular"),
        drop=nn.Dropout2d(),
        c=nn.ConvTranspose2d(12, 10, 3, stride=2, output_padding=1),
        d=nn.Conv2d(10, 12, (1, 3)),
        norm=nn.BatchNorm2d(12),
        e=nn.ConvTranspose2d(12, 10, 2, bias=False),
        f=nn.Conv1d(10, 8, 3, padding="same"),
        act=nn.GELU(),
        g=nn.Linear(8 * 25, 30),
        norm1=nn.BatchNorm1d(30),
        h=nn.Linear(30, 3),
    )


def vit() -> nn.Module:
    sizes = {"image_size": 16, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 24}
    return VisionTransformer(**sizes, num_classes=10)


def convnext() -> nn.Module:
    return ConvNeXt([CNBlockConfig(8, 12, 2), CNBlockConfig(12, None, 1)], num_classes=10)


def densenet() -> nn.Module:
    return DenseNet(growth_rate=8, block_config=(2, 3), num_init_features=12, bn_size=2, num_classes=10)


tv = torchvision.models
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], float]] = {
    "mlp": (lambda: architectures.mlp(20, [30, 20], 3), (20,), 0.15),
    "lenet-300-100": (architectures.LeNet300100, (1, 28, 28), 0.15),
    "lenet-5": (architectures.LeNet5, (1, 28, 28), 0.15),
    "digits": (architectures.digits_cnn, (1, 8, 8), 0.15),
    "resnet18-cifar": (architectures.resnet18, (3, 8, 8), 0.15),
    "wide-resnet": (lambda: architectures.WideResNet(10, 2), (3, 16, 16), 0.15),
    "resnet18": (lambda: tv.resnet18(num_classes=10), (3, 32, 32), 0.15),
    "resnet50": (lambda: tv.resnet50(num_classes=10, width_per_group=16), (3, 32, 32), 0.15),
    "mobilenet": (lambda: tv.mobilenet_v2(num_classes=10), (3, 32, 32), 0.05),
    "efficientnet": (lambda: tv.efficientnet_b0(num_classes=10), (3, 32, 32), 0.04),
    "vgg": (vgg, (3, 32, 32), 0.1),
    "densenet": (densenet, (3, 32, 32), 0.15),
    "squeezenet": (lambda: tv.squeezenet1_1(num_classes=10), (3, 48, 48), 0.15),
    "convolutions": (convolutions, (3, 16, 16), 0.15),
    "vit": (vit, (3, 16, 16), 0.15),
    "convnext": (convnext, (3, 32, 32), 0.15),
    "shufflenet": (lambda: tv.shufflenet_v2_x0_5(num_classes=10), (3, 32, 32), 0.15),
}


def network(name: str) -> tuple[Any, Masks, Tensor]:
    make, shape, share = NETWORKS[name]
    with torch.device("meta"):
        net = make()
    with seeded():
        x = torch.randn(12, *shape, dtype=torch.float64)
        net = randomised(net, x)
        return net, random_masks(net, share), x[:3]


@pytest.mark.parametrize("name", NETWORKS)
def test_smaller_networks_predict_what_masked_ones_do(name: str) -> None:
    """Proves exactness and that channels go, with masks that drop rows, columns, kernels and single weights."""
    net, kept, x = network(name)
    channels = check(net, kept, x)
    out = predict(channels.masked(), x)
    assert out.std(0).mean() > 0.01 * out.abs().mean(), "the test could not tell networks apart"
    assert stored(channels.smaller()) < 0.97 * stored(net)


@pytest.mark.parametrize("name", ["lenet-5", "digits", "wide-resnet", "mobilenet", "densenet", "convolutions"])
def test_masks_lose_nothing_else_where_zeros_stay_zeros(name: str) -> None:
    """Proves, in networks without shifts, that what the class masks on top has no effect on any prediction."""
    net, kept, x = network(name)
    for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
        if name.endswith(("bias", "running_mean")):
            tensor.data.zero_()
    channels = Channels(net, kept)
    assert sum(int(m.sum()) for n, m in channels.kept.items() if n in kept) < sum(int(m.sum()) for m in kept.values())
    out = predict(by_hand(net, kept), x)
    assert out.std(0).mean() > 0.01 * out.abs().mean()
    assert difference(out, predict(channels.masked(), x)) < 1e-12
    assert difference(out, predict(channels.smaller(), x)) < 1e-12


@pytest.mark.parametrize("name", ["lenet-5", "digits", "densenet", "vit"])
def test_networks_without_masked_rows_and_columns_keep_their_shape(name: str) -> None:
    """Proves that scattered zeros cut nothing, and that with nothing masked the networks are equal bit for bit."""
    net, kept, x = network(name)
    kept = {n: torch.ones_like(mask) for n, mask in kept.items()}
    for same in (Channels(net, {}), Channels(net, kept)):
        for copied in (same.masked(), same.smaller()):
            assert all(torch.equal(a, b) for a, b in zip(net.parameters(), copied.parameters(), strict=True))
            assert torch.equal(predict(net, x), predict(copied, x))
    for mask in kept.values():
        if mask[0].numel() > 1:
            mask[0].view(-1)[0] = False
    channels = check(net, kept, x)
    assert all(index is None for indices in channels.index.values() for index in indices)
    assert all(torch.equal(channels.kept[n], mask) for n, mask in kept.items())


def test_transformers_lose_hidden_units_only() -> None:
    """Proves that only the two layers of each MLP block change their shape."""
    net, kept, x = network("vit")
    channels = check(net, kept, x)
    cut = {name for name, indices in channels.index.items() if any(index is not None for index in indices)}
    assert cut == {f"encoder.layers.encoder_layer_{i}.mlp.{own}" for i in (0, 1) for own in MLP}


MLP = ("0.weight", "0.bias", "3.weight")


# --------------------------------------------------------------------------------------------------- by hand, by rule


def mlp(*widths: int) -> Any:
    layers: list[nn.Module] = []
    for into, out in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(into, out), nn.ReLU()]
    with seeded():
        return randomised(nn.Sequential(*layers[:-1]))


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("entries", [{"0__weight": 1}, {"2__weight": (slice(None), 1)}], ids=["dead", "unread"])
def test_a_dead_and_an_unread_hidden_unit(entries: dict[str, Any]) -> None:
    """Proves the exact entries that go with one unit: its row, its bias and its column."""
    net = mlp(2, 3, 2)
    channels = check(net, without(net, **entries), randn(5, 2))
    expected: dict[str, list[list[int] | None]] = {
        "0.weight": [[0, 2], None],
        "0.bias": [[0, 2]],
        "2.weight": [None, [0, 2]],
        "2.bias": [None],
    }
    assert {name: stays(channels, name) for name in channels.index} == expected
    assert channels.kept["0.weight"].tolist() == [[True] * 2, [False] * 2, [True] * 2]
    assert channels.kept["0.bias"].tolist() == [True, False, True]
    assert channels.kept["2.weight"].tolist() == [[True, False, True]] * 2
    assert channels.kept["2.bias"].all()
    assert repr(channels.smaller().get_submodule("0")) == "Linear(in_features=2, out_features=2, bias=True)"


def test_the_ends_of_a_network_stay() -> None:
    """Proves that inputs that nobody reads and outputs that nothing makes stay, and the outputs keep their bias."""
    net = mlp(3, 4, 3)
    given = without(net, **{"0__weight": (slice(None), 1), "2__weight": 0})
    channels = check(net, given, randn(5, 3))
    assert all(torch.equal(channels.kept[name], mask) for name, mask in given.items())
    assert all(index is None for indices in channels.index.values() for index in indices)


def test_chain_reactions_run_both_ways() -> None:
    """Proves that a dead unit kills the unit that reads only it, and an unread one those that only it reads."""
    net = mlp(2, 3, 3, 3, 2)
    kept = all_kept(net)
    kept["2.weight"] = kept["4.weight"] = torch.eye(3, dtype=torch.bool)
    kept["0.weight"][0] = False  # dead: unit 0 everywhere
    kept["6.weight"][:, 2] = False  # unread: unit 2 everywhere
    channels = check(net, kept, randn(5, 2))
    for name in ("0", "2", "4"):
        assert stays(channels, f"{name}.weight")[0] == stays(channels, f"{name}.bias")[0] == [1]
        assert channels.kept[f"{name}.bias"].tolist() == [False, True, False]
    assert channels.kept["6.weight"].tolist() == [[False, True, False]] * 2


def test_chain_reactions_cross_residual_blocks() -> None:
    """Proves that a channel whose last maker dies late is found: three rounds through the network are needed."""
    layers = {name: nn.Linear(3, 3) for name in ("stem", "a", "b", "c", "d", "head")}

    def forward(net: Any, x: Tensor) -> Tensor:
        h = net.stem(x)
        h = h + net.b(F.relu(net.a(h)))
        return net.head(h + net.d(F.relu(net.c(h))))

    with seeded():
        net = randomised(Net(forward, **layers))
    kept = all_kept(net)
    kept["stem.weight"][0] = kept["a.weight"][0] = kept["d.weight"][0] = False
    kept["b.weight"][0, 1:] = False  # channel 0 is made by unit 0 of a, which is dead
    kept["c.weight"][0, 1:] = False  # unit 0 of c reads only channel 0
    channels = check(net, kept, randn(4, 3))
    for name in ("stem", "a", "b", "c", "d"):
        assert stays(channels, f"{name}.bias") == [[1, 2]] and not channels.kept[f"{name}.bias"][0]


def test_a_layer_that_is_all_dead_keeps_one_silent_channel() -> None:
    """Proves that shapes stay valid when everything goes, and that predictions are then the last layer's bias."""
    net = mlp(4, 5, 6, 3)
    channels = check(net, without(net, **{"2__weight": slice(None)}), randn(5, 4))
    smaller: Any = channels.smaller()
    assert [tuple(p.shape) for p in smaller.parameters()] == [(1, 4), (1,), (1, 1), (1,), (3, 1), (3,)]
    assert all(not p.any() for p in list(smaller.parameters())[:-1])
    assert torch.equal(predict(smaller, randn(5, 4)), net[4].bias.expand(5, 3))


def residual() -> nn.Module:
    layers = {"stem": nn.Conv2d(2, 3, 3, padding=1), "branch": nn.Conv2d(3, 3, 3, padding=1), "bn": nn.BatchNorm2d(3)}
    with seeded():
        return randomised(
            Net(
                lambda net, x: net.head((net.bn(net.branch(F.relu(h := net.stem(x)))) + h).mean((2, 3))),
                **layers,
                head=nn.Linear(3, 2),
            )
        )


def test_a_residual_branch_keeps_its_channels_alive() -> None:
    """Proves that a channel goes only when the stem and the branch are both masked, and before that loses nothing."""
    net = residual()
    given = without(net, branch__weight=1)
    channels = check(net, given, randn(2, 2, 5, 5))
    assert all(torch.equal(channels.kept[name], mask) for name, mask in given.items())
    assert all(index is None for indices in channels.index.values() for index in indices)
    channels = check(net, without(net, head__weight=(slice(None), 1)), randn(2, 2, 5, 5))
    assert all(index is None for index in channels.index["stem.weight"]), "the branch reads it"
    channels = check(net, without(net, branch__weight=1, stem__weight=1), randn(2, 2, 5, 5))
    assert stays(channels, "branch.weight") == [[0, 2], [0, 2], None, None]
    for name in ("stem.bias", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"):
        assert stays(channels, name) == [[0, 2]]
    assert channels.kept["bn.bias"].tolist() == channels.kept["bn.weight"].tolist() == [True, False, True]
    assert stays(channels, "bn.num_batches_tracked") == []


FLATTEN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "module": lambda net, x: net.flatten(x),
    "function": lambda net, x: torch.flatten(x, 1),
    "method": lambda net, x: x.flatten(start_dim=1),
    "view": lambda net, x: x.view(x.size(0), -1),
    "reshape": lambda net, x: x.reshape((x.shape[0], -1)),
    "size": lambda net, x: torch.reshape(x, (x.size()[0], -1)),
}


@pytest.mark.parametrize("way", FLATTEN)
def test_flattening_keeps_the_positions_of_a_channel_together(way: str) -> None:
    """Proves which columns go after six ways to flatten: 3 channels of 2 x 2 positions, the second one masked."""
    with seeded():
        net = randomised(
            Net(
                lambda net, x: net.b(net.norm(FLATTEN[way](net, net.a(x)))),
                a=nn.Conv2d(1, 3, 2),
                flatten=nn.Flatten(),
                norm=nn.BatchNorm1d(12),
                b=nn.Linear(12, 2),
            )
        )
    channels = check(net, without(net, a__weight=1), randn(4, 1, 3, 3))
    columns = [0, 1, 2, 3, 8, 9, 10, 11]
    assert stays(channels, "b.weight") == [None, columns]
    assert stays(channels, "norm.running_mean") == stays(channels, "norm.bias") == [columns]
    assert not channels.kept["norm.bias"][4:8].any() and int(channels.kept["norm.bias"].sum()) == 8
    given = without(net, b__weight=[(slice(None), slice(0, 4)), (slice(None), 4)])
    assert stays(check(net, given, randn(4, 1, 3, 3)), "a.weight")[0] == [1, 2], "channel 1 is still read"


def test_depthwise_convolutions_pass_a_channel_on() -> None:
    """Proves that a masked kernel takes its channel out on both sides, with the groups, and an early dead one too."""
    with seeded():
        net = randomised(
            nn.Sequential(
                *(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.ReLU6()),
                *(nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), nn.ReLU6(), nn.Conv2d(4, 2, 1)),
            )
        )
    x = randn(2, 2, 5, 5)
    kept = without(net, **{"0__weight": 0, "3__weight": 1, "6__weight": (slice(None), 2)})
    channels = check(net, kept, x)
    assert stays(channels, "0.weight")[0] == stays(channels, "3.weight")[0] == stays(channels, "6.weight")[1] == [3]
    assert all(channels.kept[f"{i}.bias"].tolist() == [False] * 3 + [True] for i in (0, 1, 3, 4))
    layer = channels.smaller().get_submodule("3")
    assert (layer.groups, layer.in_channels, layer.out_channels) == (1, 1, 1)

    with seeded():
        net = randomised(
            Net(
                lambda net, x: net.b((h := net.a(x)) + net.dw(h)),
                **{"a": nn.Conv2d(2, 4, 1), "dw": nn.Conv2d(4, 4, 3, padding=1, groups=4), "b": nn.Conv2d(4, 2, 1)},
            )
        )
    channels = check(net, without(net, dw__weight=0), x)
    assert all(index is None for indices in channels.index.values() for index in indices)


def test_depthwise_convolutions_of_a_fixed_input_keep_its_channels() -> None:
    """Proves that a channel which the other side needs stays in its place, silent."""
    with seeded():
        net = randomised(
            Net(
                lambda net, x: net.b(net.dw(net.norm(net.a(x)))),
                **{"a": nn.Conv2d(2, 4, 1), "norm": nn.GroupNorm(2, 4), "b": nn.Conv2d(4, 2, 1)},
                dw=nn.Conv2d(4, 4, 3, groups=4),
            )
        )
    channels = check(net, without(net, dw__weight=0, b__weight=(slice(None), 1)), randn(2, 2, 5, 5))
    assert all(index is None for indices in channels.index.values() for index in indices)
    with seeded():
        net = randomised(
            Net(
                lambda net, x: net.norm(h := net.a(x)).mean((2, 3)) + net.b(net.dw(h)).mean((2, 3)),
                **{"a": nn.Conv2d(2, 4, 1), "norm": nn.GroupNorm(2, 4), "b": nn.Conv2d(4, 4, 1)},
                dw=nn.Conv2d(4, 4, 3, groups=4),
            )
        )
    channels = check(net, without(net, dw__weight=0, a__weight=1), randn(2, 2, 5, 5))
    assert all(index is None for indices in channels.index.values() for index in indices)
    assert channels.kept["dw.bias"].tolist() == [False, True, True, True] and channels.kept["a.bias"].all()
    assert channels.kept["b.weight"].flatten(1).tolist() == [[False, True, True, True]] * 4


def test_squeeze_and_excitation_is_silent_where_its_input_is() -> None:
    """Proves the rule for products: what is dead in one factor is not needed in the other."""
    with seeded():
        net = randomised(
            Net(
                lambda net, x: net.b(torch.sigmoid(net.fc((h := F.relu(net.a(x))).mean((2, 3), keepdim=True))) * h),
                **{"a": nn.Conv2d(2, 4, 1), "fc": nn.Conv2d(4, 4, 1), "b": nn.Conv2d(4, 2, 1)},
            )
        )
    kept = without(net, a__weight=0, fc__weight=[1, (slice(None), 2)], b__weight=(slice(None), 2))
    channels = check(net, kept, randn(2, 2, 5, 5))
    assert stays(channels, "fc.weight")[0] == stays(channels, "b.weight")[1] == [1, 3]
    assert channels.kept["fc.bias"].tolist() == [False, True, False, True], "a masked row still has its bias"


def test_products_in_place_are_read_where_their_factor_is() -> None:
    """Proves that a factor stays when the product took the other one's place and is read under its name."""

    def first(net: Any, x: Tensor) -> Tensor:
        h = net.a(x)
        product = F.relu(h, inplace=True)
        product *= net.fc(x)  # which the trace takes for a product in a place of its own
        return net.b(h)

    def second(net: Any, x: Tensor) -> Tensor:
        h = net.a(x)
        h.mul_(net.fc(x))
        return net.b(h)

    for function in (first, second):
        with seeded():
            layers = {"a": nn.Conv2d(2, 4, 1), "fc": nn.Conv2d(2, 4, 1), "b": nn.Conv2d(4, 2, 1)}
            net = randomised(Net(function, **layers))
        kept = without(net, a__weight=0, b__weight=(slice(None), 1))
        channels = check(net, kept, randn(2, 2, 5, 5))
        assert stays(channels, "fc.weight")[0] == [0, 2, 3] and channels.kept["a.bias"].tolist()[0]


def test_concatenated_channels_keep_their_order() -> None:
    """Proves which columns go when one of two concatenated layers loses a channel."""
    with seeded():
        net = randomised(
            Net(
                lambda net, x: net.c(net.norm(torch.cat([net.a(x), F.relu(net.b(x)), net.a2(x)], dim=1))),
                **{"a": nn.Conv2d(1, 2, 1), "b": nn.Conv2d(1, 3, 1), "a2": nn.Conv2d(1, 2, 1)},
                **{"norm": nn.BatchNorm2d(7), "c": nn.Conv2d(7, 2, 1)},
            )
        )
    channels = check(net, without(net, b__weight=1, c__weight=(slice(None), 6)), randn(2, 1, 4, 4))
    assert stays(channels, "norm.weight") == [[0, 1, 2, 4, 5]] and stays(channels, "c.weight")[1] == [0, 1, 2, 4, 5]
    assert stays(channels, "a2.weight")[0] == [0] and stays(channels, "b.weight")[0] == [0, 2]


def test_transposed_convolutions_store_their_input_first() -> None:
    """Proves which axis of a transposed convolution makes and which reads."""
    with seeded():
        net = randomised(nn.Sequential(nn.ConvTranspose2d(2, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 3, 3)))
    channels = check(net, without(net, **{"0__weight": (slice(None), 0), "2__weight": 3}), randn(2, 2, 4, 4))
    assert stays(channels, "0.weight")[:2] == [None, [1, 2]] and stays(channels, "2.weight")[:2] == [[1, 2], None]


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: getattr(F, name) for name in ("relu", "gelu", "silu", "leaky_relu", "elu", "hardswish", "softsign")},
    **{name: getattr(torch, name) for name in ("tanh", "sigmoid", "exp", "cos", "sin", "abs")},
    "method": lambda x: x.relu(),
    "in place": lambda x: F.relu(x, inplace=True),
    "scaled": lambda x: -x * 3 / 2,
    "shifted": lambda x: x + 1,
    "from one": lambda x: 1 - x,
    "softplus": F.softplus,
    "clamp": lambda x: x.clamp(min=0.5),
    "clamp at zero": lambda x: torch.clamp(x, 0, 6),
    "square": lambda x: x * x,
    "maximum": lambda x: torch.maximum(x, 2 * x),
    **{kind.__name__: kind() for kind in (nn.ReLU6, nn.GELU, nn.SiLU, nn.Mish, nn.SELU, nn.Sigmoid, nn.Dropout)},
    "Hardtanh": nn.Hardtanh(0.5, 1.0),
    "Identity": nn.Identity(),
}
LOUD = {"sigmoid", "exp", "cos", "shifted", "from one", "softplus", "clamp", "Sigmoid", "Hardtanh"}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_let_silence_through_when_they_take_zero_to_zero(name: str) -> None:
    """Proves, by function: a dead unit goes only before f(0) = 0, and otherwise keeps its bias; an unread one goes."""
    function = FUNCTIONS[name]
    with seeded():
        net = randomised(Net(lambda net, x: net.b(function(net.a(x))), a=nn.Linear(2, 4), b=nn.Linear(4, 2)))
    if isinstance(function, nn.Module):
        net.add_module("f", function)
        net.function = lambda net, x: net.b(net.f(net.a(x)))
    channels = check(net.eval(), without(net, a__weight=0, b__weight=(slice(None), 3)), randn(3, 2))
    assert stays(channels, "a.bias") == [[0, 1, 2] if name in LOUD else [1, 2]]
    assert bool(channels.kept["a.bias"][0]) == (name in LOUD)


class Scaled(nn.Linear):
    """A subclass may do anything."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + 1


def parametrised(layer: nn.Module) -> nn.Module:
    return nn.utils.parametrize.register_parametrization(layer, "weight", nn.Softplus())


class Twice(nn.Module):
    """A convolution over the frames of a video, which are then put side by side for the linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 2), nn.Linear(48, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x.view(-1, 2, 3, 3))
        return self.b(h.view(x.size(0), -1))


IMAGE, ROW, SEQUENCE = (2, 2, 4, 4), (3, 2), (3, 4, 2)
BARRIERS: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, nn.Module], tuple[int, ...]]] = {
    "softmax": (lambda net, x: net.b(net.a(x).softmax(-1)), {}, ROW),
    "layer norm": (lambda net, x: net.b(net.f(net.a(x))), {"f": nn.LayerNorm(4)}, ROW),
    "division": (lambda net, x: net.b(1 / net.a(x)), {}, ROW),
    "logarithm": (lambda net, x: net.b(torch.log1p(net.a(x) ** 2)), {}, ROW),
    "a constant": (lambda net, x: net.b(net.a(x) * torch.tensor([1.0, 2.0, 3.0, 4.0])), {}, ROW),
    "an index": (lambda net, x: net.b(net.a(x)[:, [3, 2, 1, 0]]), {}, ROW),
    "split": (lambda net, x: net.b(torch.cat(net.a(x).chunk(2, 1), 1)), {}, ROW),
    "attention": (
        lambda net, x: net.b(net.f(h := net.a(x), h, h)[0]),
        {"f": nn.MultiheadAttention(4, 2, batch_first=True)},
        SEQUENCE,
    ),
    "recurrent": (lambda net, x: net.b(net.f(net.a(x))[0]), {"f": nn.GRU(4, 4, batch_first=True)}, SEQUENCE),
    "over time": (lambda net, x: net.b(net.a(x).transpose(1, 2)), {}, SEQUENCE),
    "time concatenated": (
        lambda net, x: net.b(
            torch.cat([net.c(x[:, :1]), net.d(x)], 1) * torch.cat([net.e(x), net.a(x[:, :1])], 1),
        ),
        {own: nn.Linear(2, 4) for own in "cde"},
        SEQUENCE,
    ),
    "time flattened": (lambda net, x: net.b(net.a(x).flatten(1)), {"b": nn.Linear(16, 2)}, SEQUENCE),
    "pooled features": (lambda net, x: net.b(net.f(net.a(x))), {"f": nn.AvgPool1d(3, 1, 1)}, SEQUENCE),
    "group norm": (
        lambda net, x: net.b(net.f(net.a(x))),
        {"a": nn.Conv2d(2, 4, 1), "f": nn.GroupNorm(2, 4), "b": nn.Conv2d(4, 2, 1)},
        IMAGE,
    ),
    "groups": (
        lambda net, x: net.b(net.f(net.a(x))),
        {"a": nn.Conv2d(2, 4, 1), "f": nn.Conv2d(4, 4, 1, groups=2), "b": nn.Conv2d(4, 2, 1)},
        IMAGE,
    ),
    "over the width": (lambda net, x: net.b(net.a(x)), {"a": nn.Conv2d(2, 4, 1), "b": nn.Linear(4, 2)}, IMAGE),
    "width normalised": (
        lambda net, x: net.b(net.f(net.a(net.first(x)))),
        {"first": nn.Conv1d(2, 4, 1), "f": nn.BatchNorm1d(4), "a": nn.Linear(4, 4)},
        (2, 2, 4),
    ),
    "a fixed shape": (
        lambda net, x: net.b(net.a(x).view(-1, 16)),
        {"a": nn.Conv2d(2, 4, 3), "b": nn.Linear(16, 2)},
        IMAGE,
    ),
    "the number of channels": (
        lambda net, x: net.b(h := net.a(x)) / h.size(1),
        {"a": nn.Conv2d(2, 4, 3), "b": nn.Conv2d(4, 2, 1)},
        IMAGE,
    ),
    "flattened from the front": (
        lambda net, x: net.b(net.a(x).flatten(2)),
        {"a": nn.Conv2d(2, 4, 3), "b": nn.Linear(4, 2)},
        IMAGE,
    ),
    "channels padded": (
        lambda net, x: net.b(F.pad(net.a(x), (0, 0, 0, 0, 1, -1))),
        {"a": nn.Conv2d(2, 4, 3), "b": nn.Conv2d(4, 2, 1)},
        IMAGE,
    ),
    "channels averaged": (
        lambda net, x: net.b(net.a(x).mean(1)),
        {"a": nn.Conv2d(2, 4, 1), "b": nn.Conv1d(4, 2, 1)},
        IMAGE,
    ),
    "unequal features": (
        lambda net, x: net.b(torch.cat([F.max_pool2d(net.a(x), 2).flatten(1), net.c(x).flatten(1)], 1)),
        {"a": nn.Conv2d(2, 4, 3), "c": nn.Conv2d(2, 4, (3, 2)), "b": nn.Linear(28, 2)},
        IMAGE,
    ),
    "sizes added": (lambda net, x: net.b(net.a(x).view(x.size()[:1] + (4,))), {}, ROW),
    "frames": (lambda net, x: net.t(x), {"t": Twice()}, (2, 3, 2, 3, 3)),
    "used twice": (lambda net, x: net.b(net.a(net.a(x))), {"a": nn.Linear(4, 4)}, (3, 4)),
    "used directly": (lambda net, x: net.b(net.a(x)) + net.a.weight.sum() + net.b.bias.sum(), {}, ROW),
    "a subclass": (lambda net, x: net.b(net.a(x)), {"a": Scaled(2, 4), "b": Scaled(4, 2)}, ROW),
    "parametrised": (
        lambda net, x: net.b(net.a(x)),
        {"a": parametrised(nn.Linear(2, 4)), "b": parametrised(nn.Linear(4, 2))},
        ROW,
    ),
}


@pytest.mark.parametrize("name", BARRIERS)
def test_barriers_stop_everything(name: str) -> None:
    """Proves that neither a masked row before nor a masked column behind such an operation has further effects."""
    function, layers, shape = BARRIERS[name]
    with seeded():
        net = Net(function, **{"a": nn.Linear(2, 4), "b": nn.Linear(4, 2)} | copy.deepcopy(layers)).double().eval()
    given = all_kept(net)
    for parameter, mask in given.items():
        module, _, own = parameter.rpartition(".")
        if own in ("weight", "original") and mask.dim() > 1:
            if module.split(".")[-1] in ("a", "f") or "parametrizations" in module:
                mask[1] = False
            if module.split(".")[-1] != "first":
                mask[:, 0] = False
    assert not all(mask.all() for mask in given.values())
    channels = check(net, given, randn(*shape))
    assert all(index is None for indices in channels.index.values() for index in indices)
    assert all(torch.equal(channels.kept[parameter], mask) for parameter, mask in given.items())


def test_normalisation_without_shift_is_never_silent() -> None:
    """Proves that a dead channel stays where running statistics alone would make it a constant."""
    with seeded():
        net = randomised(nn.Sequential(nn.Conv1d(1, 3, 2), nn.BatchNorm1d(3, affine=False), nn.Conv1d(3, 2, 1)))
    channels = check(net, without(net, **{"0__weight": 0, "2__weight": (slice(None), 1)}), randn(2, 1, 5))
    assert stays(channels, "0.bias") == stays(channels, "1.running_var") == [[0, 2]]
    assert channels.smaller().get_submodule("1").num_features == 2


def test_tied_weights_stay_tied() -> None:
    """Proves that a weight with two owners is a barrier, is masked in both, and is still one tensor in the copies."""
    net = mlp(3, 3, 3, 3)
    net[2].weight = net[0].weight
    channels = check(net, without(net, **{"0__weight": 0, "4__weight": (slice(None), 0)}), randn(4, 3))
    assert "2.weight" not in channels.kept
    copied: Any
    for copied in (channels.masked(), channels.smaller()):
        assert copied[2].weight is copied[0].weight and not copied[0].weight[0].any()
    assert stays(channels, "0.weight") == [None, None]


def test_hooks_and_replaced_forwards_make_a_layer_a_barrier() -> None:
    """Proves that layers which do more than their type says are left alone."""
    for change in (
        lambda layer: layer.register_forward_hook(lambda module, args, out: out + 1),
        lambda layer: layer.register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
        lambda layer: setattr(layer, "forward", MethodType(lambda self, x: F.linear(x, self.weight) + 1, layer)),
    ):
        net = mlp(2, 3, 2)
        change(net[0])
        channels = check(net, without(net, **{"0__weight": 0}), randn(4, 2))
        assert stays(channels, "0.weight") == [None, None] and channels.kept["0.bias"].all()


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, mask: Tensor | None = None, softmax: bool = False) -> Tensor:
        h = self.a(x)
        h = h if mask is None else h * mask
        return self.b(h.softmax(-1) if softmax or self.training else h)


def test_networks_are_traced_in_eval_mode_with_defaults() -> None:
    """Proves that a network with switches is followed as ``net(x)`` runs it in eval mode, whatever mode it is in."""
    with seeded():
        net = randomised(Optional())
    assert stays(check(net, without(net, a__weight=0), randn(3, 2)), "a.bias") == [[1, 2, 3]]
    assert stays(Channels(net.train(), without(net, a__weight=0)), "a.bias") == [[1, 2, 3]] and net.training


def test_networks_keep_mode_dtype_and_requires_grad() -> None:
    """Proves that the copies differ in nothing but what was removed, whatever the mode the network is in."""
    net, kept, _ = network("digits")
    net = net.float().train()
    net[3].eval()
    for parameter in net[3].parameters():
        parameter.requires_grad_(False)
    channels = Channels(net, kept)
    for copied in (channels.masked(), channels.smaller()):
        assert [m.training for m in copied.modules()] == [m.training for m in net.modules()]
        for a, b in zip(net.parameters(), copied.parameters(), strict=True):
            assert (b.dtype, b.requires_grad) == (torch.float32, a.requires_grad) and b.grad_fn is None
    assert channels.smaller().get_parameter("3.weight").shape[1] < 32


def test_stacks_of_values_are_masked_and_cut_alike() -> None:
    """Proves that axes in front, of draws and members, stay, for parameters and buffers."""
    net, kept, _ = network("digits")
    channels = Channels(net, kept)
    smaller = channels.smaller()
    for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
        values = torch.stack([tensor, 2 * tensor]).expand(3, *[-1] * (tensor.dim() + 1))
        cut = channels.cut(name, channels.mask(name, values))
        assert cut.shape[:2] == (3, 2)
        assert torch.equal(cut[1, 0], {**dict(smaller.named_parameters()), **dict(smaller.named_buffers())}[name])
    nan = torch.full((20, 1, 5, 5), torch.nan)
    conv = Channels(architectures.LeNet5(), {"layers.0.weight": torch.zeros(20, 1, 5, 5, dtype=torch.bool)})
    assert not conv.mask("layers.0.weight", nan).any(), "zero is zero, whatever the weight was"


def test_errors_say_what_is_wrong() -> None:
    """Proves the refusals, with the name of what was given."""
    net = mlp(2, 3, 2)
    with pytest.raises(TypeError, match="torch.nn.Module, got str"):
        Channels("net", {})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no parameter '1.weight'; the network has 0.weight, 0.bias"):
        Channels(net, {"1.weight": torch.ones(3, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"'0.bias' has shape \(2,\), the parameter has \(3,\)"):
        Channels(net, {"0.bias": torch.ones(2, dtype=torch.bool)})
    for wrong in (torch.ones(3), [True] * 3):
        with pytest.raises(TypeError, match="'0.bias' must be a bool tensor"):
            Channels(net, {"0.bias": wrong})  # type: ignore[dict-item]
    channels = Channels(net, {})
    for method in (channels.mask, channels.cut):
        with pytest.raises(ValueError, match="no parameter or buffer 'a'"):
            method("a", torch.ones(3))
        with pytest.raises(ValueError, match="'0.bias'.*got"):
            method("0.bias", torch.ones(4, 2))
    with pytest.raises(
        ValueError, match="Net cannot be followed.*TraceError.*Keep the masks without removing channels"
    ):
        Channels(Net(lambda net, x: x if x.sum() > 0 else -x), {})
    net.forward = MethodType(lambda self, x: x, net)
    with pytest.raises(ValueError, match="put in its place"):
        Channels(net, {})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("masks_on", ["cpu", "cuda"])
def test_networks_stay_on_their_device(masks_on: str) -> None:
    """Proves that networks on the GPU give networks and masks there, wherever the masks were."""
    net, kept, x = network("digits")
    channels = check(net.cuda(), {name: mask.to(masks_on) for name, mask in kept.items()}, x.cuda())
    tensors = [*channels.smaller().parameters(), *channels.smaller().buffers(), *channels.kept.values()]
    assert all(tensor.is_cuda for tensor in tensors)


# -------------------------------------------------------------------------------------------------------------- counts


def test_counts_of_lenet_5_by_hand() -> None:
    """Proves the published parameter count, the products of its four layers, and what is saved."""
    net = architectures.LeNet5()
    x = torch.randn(1, 1, 28, 28)
    products = 24 * 24 * 20 * 25 + 8 * 8 * 50 * 20 * 25 + 800 * 500 + 500 * 10
    assert products == 2_293_000
    assert count(net, x) == Size(parameters=431_080, nonzero=431_080, bytes=4 * 431_080, multiply_adds=products)
    assert count(net, torch.cat([x, x])).multiply_adds == 2 * products
    assert count(net.double()) == Size(431_080, 431_080, 8 * 431_080)
    net.float().train()

    channels = Channels(net, without(net, layers__5__weight=slice(0, 400), layers__2__weight=slice(0, 10)))
    gone = 400 * 801 + 10 * 400 + 10 * 501 + 100 * 16 * 10
    parameters = 431_080 - gone
    assert count(net, kept=channels.kept) == Size(431_080, parameters, 4 * 431_080)
    assert count(channels.masked()) == Size(431_080, parameters, 4 * 431_080)
    products = 24 * 24 * 20 * 25 + 8 * 8 * 40 * 20 * 25 + 640 * 100 + 100 * 10
    assert count(channels.smaller(), x) == Size(parameters, parameters, 4 * parameters, products)
    assert all(module.training for module in net.modules())


def test_counts_see_attention_buffers_and_ties() -> None:
    """Proves that fused attention is counted, by hand, and that tensors are counted once."""
    net = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    length, width, hidden = 5, 8, 16
    products = 4 * length * width**2 + 2 * length**2 * width + 2 * length * width * hidden
    assert count(net, torch.randn(1, length, width)).multiply_adds == products
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    q = torch.randn(1, length, width)
    products = 4 * length * width**2 + 2 * length**2 * width
    assert count(attention, (q, q, q)).multiply_adds == products
    assert count(attention, {"query": q, "key": q, "value": q}).multiply_adds == products
    tied = mlp(3, 3, 3).float()
    tied[2].weight = tied[0].weight
    tied.add_module("norm", nn.BatchNorm1d(3))
    assert count(tied) == Size(9 + 6 + 6, 9 + 6 + 3, 4 * (21 + 6) + 8)
