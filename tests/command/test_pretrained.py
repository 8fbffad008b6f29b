"""Weights of torchvision on the command line, offline: the cache of torch.hub holds what the tests put there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from command_runs import metrics_of, run, small_npz, without_seconds
from PIL import Image
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn.models.architectures import pretrained
from pyro_bnn.models.architectures.named import build_network
from pyro_bnn.models.architectures.pretrained import Pretrained, find_weights

NAME = "MobileNet_V3_Small_Weights.IMAGENET1K_V1"
FILE = "mobilenet_v3_small-047dcff4.pth"


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which torch.hub looks, with nothing in it and no way to fill it."""

    def no_network(url: str, *_: Any, **__: Any) -> None:
        raise URLError(f"no way to {url}")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def untrained(architecture: str = "mobilenet_v3_small") -> nn.Module:
    torch.manual_seed(5)
    return torchvision.models.get_model(architecture)


def images(path: Path, channels: tuple[int, ...] = (), rows: int = 12) -> Path:
    """Dark and bright noise."""
    y = np.arange(rows) % 2
    x = np.random.default_rng(0).integers(0, 128, (rows, *channels, 8, 8)) + 127 * y.reshape(
        -1, *[1] * (len(channels) + 2)
    )
    x = x.astype(np.uint8)
    np.savez(path, x_train=x, y_train=y, x_test=x[:4], y_test=y[:4])
    return path


def test_particles_around_weights_of_torchvision(tmp_path: Path, hub: Path) -> None:
    """Proves that particles lie around the given weights and not around the twin, which is tuned as a whole, that
    each has a last layer of its own, and that the run is scored again and loaded where the weights are not."""
    given = untrained()
    torch.save(given.state_dict(), hub / FILE)
    folder = tmp_path / "run"
    options = ("--particles", 2, "--rank", 1, "--epochs", 1, "--batch-size", 6, "--lr", 1e-3, "--out", folder)
    output = run(
        "fit", "--method", "bella", "--data", images(tmp_path / "x.npz"), "--pretrained", NAME, *options
    ).output
    assert f"{NAME} with a new last layer: first the deterministic network is fine-tuned" in output
    assert "particles start from the given weights" in output
    (hub / FILE).unlink()
    before = metrics_of(folder)
    run("evaluate", folder, "--quiet")
    assert without_seconds(metrics_of(folder)) == without_seconds(before)
    config = json.loads((folder / "config.json").read_text())
    assert config["options"]["pretrained"] == config["options"]["network"] == NAME
    net = build_network(NAME, (1, 8, 8), 2)
    posterior = pb.load(folder / "posterior", net)
    frozen = dict(posterior.model.core().net.named_parameters())  # type: ignore[attr-defined]
    head = {"net.classifier.3.weight", "net.classifier.3.bias"}
    shared = {f"net.{name}": value for name, value in given.named_parameters() if f"net.{name}" not in head}
    assert frozen.keys() == shared.keys() | head
    assert all(torch.equal(frozen[name], value) for name, value in shared.items())
    draws = posterior.draws(1)
    assert draws["net.classifier.3.weight"].shape == (1, 2, 2, 1024)
    assert not torch.equal(*draws["net.classifier.3.weight"][0])
    assert sum(name.endswith(".A") for name in draws) > 30 and "net.classifier.3.weight.A" not in draws
    twin = pb.load(folder / "deterministic", net).draws(1)
    assert not any(torch.equal(twin[name][0, 0], value) for name, value in shared.items() if name in twin)


@pytest.mark.slow
def test_a_folder_of_images_is_read_at_the_size_of_the_weights(tmp_path: Path, hub: Path) -> None:
    """Proves that images are not made small first, neither in training nor when the run is scored again."""
    torch.save(untrained().state_dict(), hub / FILE)
    for name, colour in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (60, 50), colour).save(tmp_path / "images" / name / f"{number}.png")
    options = ("--particles", 1, "--rank", 1, "--epochs", 1, "--lr", 1e-3, "--out", tmp_path / "run", "--quiet")
    run("fit", "--method", "bella", "--data", tmp_path / "images", "--pretrained", NAME, *options)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["in_shape"] == [3, 256, 256]
    before = metrics_of(tmp_path / "run")
    run("evaluate", tmp_path / "run", "--quiet")
    assert without_seconds(metrics_of(tmp_path / "run")) == without_seconds(before)


@pytest.mark.parametrize("channels", [1, 3])
def test_preprocessing_is_that_of_the_weights(channels: int, hub: Path) -> None:
    """Proves channels, size, crop and standardisation against the same by hand; the new layer has as many outputs."""
    torch.save(untrained().state_dict(), hub / FILE)
    net = pretrained.build(NAME, (channels, 20, 30), 5, load=True).eval()
    x = torch.rand(2, channels, 20, 30)
    big = torch.nn.functional.interpolate(x, (256, 384), mode="bilinear", antialias=True)
    big = big[:, :, 16:240, 80:304].expand(-1, 3, -1, -1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    seen = []
    net.net.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    assert net(x).shape == (2, 5)
    torch.testing.assert_close(seen[0], (big - mean) / std, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "head"),
    [
        ("resnet18", "net.fc"),
        ("densenet121", "net.classifier"),
        ("vit_b_16", "net.heads.head"),
        ("swin_t", "net.head"),
        ("convnext_tiny", "net.classifier.2"),
        ("efficientnet_b0", "net.classifier.1"),
        ("vgg11", "net.classifier.6"),
        ("maxvit_t", "net.classifier.5"),
    ],
)
def test_the_last_layer_of_an_architecture(architecture: str, head: str) -> None:
    """Proves which layer is replaced, with or without its bias, by one of the right size."""
    weights = torchvision.models.get_model_weights(architecture).DEFAULT
    with torch.device("meta"):
        net = torchvision.models.get_model(architecture)
        bias = net.get_submodule(head.removeprefix("net.")).bias is not None
        built = Pretrained(net, weights, 7)
    layer = built.get_submodule(head)
    assert built.head == head and isinstance(layer, nn.Linear) and layer.out_features == 7
    assert (layer.bias is not None) == bias and isinstance(layer.weight, Tensor)


def test_default_is_a_name_for_weights() -> None:
    assert find_weights("MobileNet_V3_Small_Weights.DEFAULT") == NAME
    assert all(find_weights(name) == str(weights) for name, (_, weights) in pretrained.known().items())


@pytest.mark.parametrize(
    ("name", "data", "options", "said"),
    [
        ("MobileNet_V3_Smal_Weights.IMAGENET1K_V1", "x", (), f"similar names are {NAME}"),
        ("resnet18", "x", (), "ResNet18_Weights"),
        ("nowhere", "x", (), "'nowhere' is not the folder of a run, and torchvision has no image weights of this name"),
        (NAME, "x", ("--network", "cnn"), f"--pretrained {NAME} has its own network: leave out --network"),
        (NAME, "table", (), "takes images [1 or 3, height, width], but a row of the data has shape (2,)"),
        (NAME, "five", (), "a row of the data has shape (5, 8, 8)"),
        ("SqueezeNet1_1_Weights.DEFAULT", "x", (), "ends in a Conv2d ('classifier.1'): expected a linear layer"),
        ("GoogLeNet_Weights.DEFAULT", "x", (), "several outputs in training"),
        ("ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1", "x", (), "is for another image size"),
    ],
)
def test_users_errors_are_one_line(
    name: str, data: str, options: tuple[str, ...], said: str, tmp_path: Path, hub: Path
) -> None:
    """Proves that what cannot be is refused before anything is trained, in one line that says what can."""
    files = {
        "x": images(tmp_path / "x.npz"),
        "five": images(tmp_path / "five.npz", (5,)),
        "table": small_npz(tmp_path / "small.npz"),
    }
    torch.save(untrained("squeezenet1_1").state_dict(), hub / "squeezenet1_1-b8a52dc0.pth")
    if "SWAG" in name:
        net = torchvision.models.vit_b_16(image_size=384)
        torch.save(net.state_dict(), hub / "vit_b_16_swag-9ac1b537.pth")
    arguments = ("fit", "--method", "bella", "--data", files[data], "--pretrained", name, "--out", tmp_path / "run")
    result = run(*arguments, *options, "--quiet", expect=2)
    assert said in result.stderr and result.stderr.count("\n") == 1 and result.stdout == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [None, b"nothing", b"", "another"])
def test_weights_that_are_not_to_be_had(content: Any, tmp_path: Path, hub: Path) -> None:
    """Proves that a failed download and a damaged or foreign file end in one line with name, place and remedy."""
    if content == "another":
        torch.save(untrained("alexnet").state_dict(), hub / FILE)
    elif content is not None:
        (hub / FILE).write_bytes(content)
    arguments = ("--data", images(tmp_path / "x.npz"), "--pretrained", NAME, "--out", tmp_path / "run", "--quiet")
    result = run("fit", "--method", "bella", *arguments, expect=2)
    assert result.stderr.count("\n") == 1 and result.stdout == "" and not (tmp_path / "run").exists()
    remedy = "put the file from https://" if content is None else "remove this file, which is damaged"
    for said in (f"the weights {NAME} could not be loaded", f"expected them in {hub / FILE}", remedy, "TORCH_HOME"):
        assert said in result.stderr
