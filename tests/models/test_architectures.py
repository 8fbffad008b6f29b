"""The networks in `pyro_bnn.models.architectures` have the published sizes, layers and starting weights."""

import math

import pytest
import torch
from torch import nn

from pyro_bnn.models import architectures


def count(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


@pytest.fixture(scope="module")
def wrn_28_10() -> nn.Module:
    return architectures.wide_resnet_28_10()


def test_wrn_28_10_has_the_published_size(wrn_28_10: nn.Module) -> None:
    """Proves the counts behind the published tables: 36.5 million parameters, 19,581 input and output channels."""
    layers = [module for module in wrn_28_10.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert sum(layer.weight.shape[0] + layer.weight.shape[1] for layer in layers) == 19_581
    assert round(count(wrn_28_10) / 1e6, 1) == 36.5
    assert len(layers) == 29, "25 convolutions of 3 x 3, 3 projections and the classifier"


def test_wrn_28_10_starts_from_he_normal_weights(wrn_28_10: nn.Module) -> None:
    """Proves that every weight starts with variance 2 / fan_in, cut at two standard deviations of the uncut normal."""
    for layer in wrn_28_10.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            weight = layer.weight.detach()
            std = math.sqrt(2 / weight[0].numel())
            standard_error = std / math.sqrt(2 * weight.numel())
            assert abs(weight.std().item() - std) < 5 * standard_error
            assert weight.abs().max() <= 2 * std / 0.879


def test_wide_resnet_layers_are_as_the_paper_says() -> None:
    """Proves: one bias, in the classifier; a 1 x 1 projection of the raw input; batch-norm constants; 8 x 8 pooling."""
    net = architectures.WideResNet(depth=10, width=1).eval()
    assert [name for name, _ in net.named_parameters() if name.endswith("bias") and "bn" not in name] == [
        "classifier.bias"
    ]
    assert all((m.eps, m.momentum) == (1e-5, 0.1) for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    assert not any(isinstance(module, nn.Dropout) for module in net.modules())

    seen: dict[str, torch.Tensor] = {}
    block = net.groups[1][0]
    block.register_forward_pre_hook(lambda module, args: seen.update(block=args[0]))
    block.shortcut.register_forward_pre_hook(lambda module, args: seen.update(shortcut=args[0]))
    net.bn.register_forward_pre_hook(lambda module, args: seen.update(last=args[0]))
    logits = net(torch.randn(2, 3, 32, 32))
    assert seen["shortcut"] is seen["block"]
    assert block.shortcut.kernel_size == (1, 1) and isinstance(net.groups[0][0].shortcut, nn.Identity)
    assert seen["last"].shape == (2, 64, 8, 8) and logits.shape == (2, 10)


@pytest.mark.parametrize(("depth", "width", "message"), [(27, 10, "6 n"), (4, 10, "6 n"), (28, 0, "width")])
def test_wide_resnet_refuses_impossible_sizes(depth: int, width: int, message: str) -> None:
    """Proves that a depth that no whole number of blocks gives, or no width, is refused."""
    with pytest.raises(ValueError, match=message):
        architectures.WideResNet(depth, width)


def test_resnet18_keeps_small_images_large() -> None:
    """Proves the small-image stem: 3 x 3 without stride or pooling, so the first group sees all 32 x 32 pixels."""
    net = architectures.resnet18(num_classes=7, in_channels=1)
    shapes = []
    net.layer1.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape))
    assert net(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    assert shapes == [(2, 64, 32, 32)]
    assert count(architectures.resnet18()) == 11_173_962


def test_lenets_have_the_published_sizes() -> None:
    """Proves the parameter counts under which compression ratios are published: 266,610 and 431,080."""
    images = torch.randn(2, 1, 28, 28)
    for net, size in ((architectures.LeNet300100(), 266_610), (architectures.LeNet5(), 431_080)):
        assert count(net) == size
        assert net(images).shape == (2, 10)


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (architectures.mlp(64, [32, 16], 10), (1, 8, 8)),
        (architectures.mlp(3, [], 10), (3,)),
        (architectures.digits_cnn(), (1, 8, 8)),
        (architectures.digits_cnn(in_channels=3), (3, 33, 20)),
        (architectures.LSTMClassifier(5, 8, 10), (4, 5)),
        (architectures.LSTMClassifier(5, 8, 10, num_layers=2, bidirectional=True), (4, 5)),
    ],
    ids=["mlp", "linear", "cnn", "cnn-rgb", "lstm", "lstm-bidirectional"],
)
def test_small_networks_map_rows_to_ten_numbers(net: nn.Module, shape: tuple[int, ...]) -> None:
    """Proves the shapes, and that all parameters take part in the output."""
    out = net(torch.randn(3, *shape))
    assert out.shape == (3, 10)
    out.square().sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_lstm_classifier_reads_the_last_state_of_both_directions() -> None:
    """Proves that the classifier sees the forward state after the last step and the backward state after the first."""
    net = architectures.LSTMClassifier(5, 8, 10, num_layers=2, bidirectional=True)
    x = torch.randn(3, 4, 5)
    outputs, _ = net.lstm(x)
    states = torch.cat([outputs[:, -1, :8], outputs[:, 0, 8:]], dim=1)
    torch.testing.assert_close(net(x), net.classifier(states))
