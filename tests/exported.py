"""Small networks, posteriors of them in every form, and inputs, for tests of exported modules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torchvision.models import VisionTransformer, resnet18
from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification

import pyro_bnn as pb
from pyro_bnn.likelihoods import Categorical
from pyro_bnn.models import (
    Bella,
    CodebookGuide,
    Dense,
    MeanFieldGuide,
    ParticleGuide,
    Rank1,
    Rank1Guide,
    WeightSharing,
)

NUM_DATA, CLASSES = 100, Categorical()


def of_floats(*shape: int) -> Callable[[int], Tensor]:
    def make(rows: int) -> Tensor:
        return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(rows))

    return make


def of_tokens(rows: int) -> dict[str, Tensor]:
    """Token ids and a mask that hides the end of every second text."""
    ids = torch.randint(0, 40, (rows, 6), generator=torch.Generator().manual_seed(rows))
    mask = torch.ones_like(ids)
    mask[::2, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def lenet() -> nn.Module:
    first = (nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2))
    return with_statistics(nn.Sequential(*first, nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)))


def resnet() -> nn.Module:
    return with_statistics(resnet18(num_classes=10))


def with_statistics(net: nn.Module) -> nn.Module:
    """The network with running statistics that are not those of a new layer."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.8, 1.2)
    return net


def torchvision_vit() -> nn.Module:
    net = VisionTransformer(8, 4, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=3)
    nn.init.normal_(net.heads.head.weight)  # a new one is zero
    return net


def transformers_vit() -> nn.Module:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **sizes))


def bert() -> nn.Module:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertForSequenceClassification(BertConfig(vocab_size=40, max_position_embeddings=8, num_labels=3, **sizes))


class LSTMClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.lstm(x)[0][:, -1])
        return y


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any]]] = {
    "mlp": (mlp, of_floats(4)),
    "lenet": (lenet, of_floats(1, 12, 12)),
    "resnet18": (resnet, of_floats(3, 32, 32)),
    "torchvision_vit": (torchvision_vit, of_floats(3, 8, 8)),
    "transformers_vit": (transformers_vit, of_floats(3, 8, 8)),
    "lstm": (LSTMClassifier, of_floats(3, 3)),
    "bert": (bert, of_tokens),
}


def rank1(net: nn.Module, likelihood: Any = CLASSES) -> pb.Posterior:
    model = Rank1(net, likelihood, NUM_DATA).eval()
    return pb.Posterior(model, Rank1Guide(model, 2, init_dropout_rate=0.05).eval())


def bella(net: nn.Module, likelihood: Any = CLASSES) -> pb.Posterior:
    model = Bella(net, likelihood, NUM_DATA, rank=2).eval()
    return pb.Posterior(model, ParticleGuide(model, 3, init_scale=0.1).eval())


def codebook(net: nn.Module, likelihood: Any = CLASSES) -> pb.Posterior:
    model = WeightSharing(net, likelihood, NUM_DATA).eval()
    return pb.Posterior(model, CodebookGuide(model, 8, init_scale=0.05).eval())


def dense(net: nn.Module, likelihood: Any = CLASSES) -> pb.Posterior:
    model = Dense(net, likelihood, NUM_DATA).eval()
    return pb.Posterior(model, MeanFieldGuide(model, init_scale=0.05).eval())


FORMS: dict[str, Callable[..., pb.Posterior]] = {"rank1": rank1, "bella": bella, "codebook": codebook, "dense": dense}


def called(module: Callable[..., Any], x: Any) -> Any:
    """The module called as the network is."""
    return module(**x) if isinstance(x, dict) else module(*x) if isinstance(x, tuple) else module(x)


def parts(x: Any) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Positional arguments and those by name."""
    return ((), x) if isinstance(x, dict) else (x, {}) if isinstance(x, tuple) else ((x,), {})


def of_any_size(x: Any) -> Any:
    """``dynamic_shapes`` with any number of samples."""
    args, kwargs = parts(x)
    return {name: {0: Dim.DYNAMIC} for name in kwargs} if kwargs else tuple({0: Dim.DYNAMIC} for _ in args)


def to_onnx(module: Any, x: Any, path: Path) -> Callable[[Any], dict[str, Any]]:
    """Writes the module to a file, and gives a function that runs it in ONNX Runtime."""
    import onnxruntime

    args, kwargs = parts(x)
    torch.onnx.export(
        module,
        args,
        path,
        kwargs=kwargs,
        dynamo=True,
        verbose=False,
        dynamic_shapes=of_any_size(x),
        output_names=[f"posterior_{name}" for name in module.outputs],
    )
    session = onnxruntime.InferenceSession(path)

    def run(given: Any) -> dict[str, Any]:
        args, kwargs = parts(given)
        names = [one.name for one in session.get_inputs()]
        assert names == list(module.inputs)
        feed = dict(zip(names, args or kwargs.values(), strict=True))
        found = session.run(None, {name: value.numpy() for name, value in feed.items()})
        return dict(zip([one.name.removeprefix("posterior_") for one in session.get_outputs()], found, strict=True))

    return run
