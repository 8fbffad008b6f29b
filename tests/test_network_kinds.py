"""Kinds of networks x models: gradients of plain autograd on explicit weights, a step, predictions, files, ArviZ.

Every pair works, or is refused for a reason that docs/networks.md lists.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from network_ways import CLASSES, MODELS, Kind, whole_way, without
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint
from torchvision.models.convnext import CNBlockConfig

N = 6


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.a, self.b = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.stem(x)).relu()
        return self.fc((h + self.b(self.a(h))).relu().mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn, self.fc = kind(4, 5, batch_first=True), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(x)[0][:, -1])


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.fc = nn.LSTMCell(4, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        assert state is not None
        return self.fc(state[0])


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(checkpoint(self.body, x, use_reentrant=False))


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.fc = nn.GRU(4, 5, batch_first=True), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        return self.fc(pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0].sum(1))


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Embedding(9, 8, padding_idx=0), nn.Linear(8, CLASSES)
        self.core = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        return self.fc(self.core(h, h).mean(1))


class SharedLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(self.a(x).tanh()).tanh())


def partly_frozen() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, CLASSES))
    net[2].requires_grad_(False)
    return net


def spectral() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 6), nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)), nn.Linear(6, CLASSES)
    )


def weight_normed() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.utils.parametrizations.weight_norm(nn.Linear(6, CLASSES)))


def pictures(side: int = 8) -> Tensor:
    return torch.randn(N, 3, side, side)


def vectors() -> Tensor:
    return torch.randn(N, 4)


def sequences() -> Tensor:
    return torch.randn(N, 5, 4)


def words() -> Tensor:
    return torch.randint(1, 9, (N, 5))


def config(name: str, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, f"{name}Config")(vocab_size=20, num_labels=CLASSES, pad_token_id=0, **options)


def language(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        made: nn.Module = getattr(transformers, f"{name}ForSequenceClassification")(config(name, **options))
        return made.eval()

    return make


def tokens() -> dict[str, Tensor]:
    ids = torch.randint(2, 20, (N, 6))
    ids[:, -1] = 1
    return {"input_ids": ids}


COMPUTED = "computes its weight"
NO_SPECTRAL = {
    "Dense": "spectral_norm",
    "SpikeSlab": "spectral_norm",
    "WeightSharing": "spectral_norm",
    "Rank1": COMPUTED,
    "Bella": COMPUTED,
}
SMALL: dict[str, Kind] = {
    "residual": Kind(Residual, pictures),
    "convnext": Kind(
        lambda: torchvision.models.ConvNeXt([CNBlockConfig(8, 12, 1), CNBlockConfig(12, None, 1)], num_classes=CLASSES),
        lambda: pictures(16),
    ),
    "vit": Kind(lambda: torchvision.models.VisionTransformer(8, 4, 1, 2, 8, 16, num_classes=CLASSES), pictures),
    "lstm": Kind(lambda: Recurrent(nn.LSTM), sequences),
    "loop over lstm cells": Kind(Cells, sequences),
    "gru on packed sequences": Kind(Packed, lambda: (sequences(), torch.tensor([5, 2, 4, 1, 3, 5]))),
    "transformer": Kind(Attends, words),
    "checkpointing": Kind(Checkpointed, vectors),
    "shared layers": Kind(SharedLayers, vectors),
    "frozen parts": Kind(partly_frozen, vectors),
    "spectral norm": Kind(spectral, vectors, refused=NO_SPECTRAL),
    "spectral norm, left out": Kind(spectral, vectors, select=dict.fromkeys(MODELS, without("1."))),
    "weight norm": Kind(weight_normed, vectors, refused={"Rank1": COMPUTED, "Bella": COMPUTED}),
    "segmentation": Kind(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, CLASSES, 1)), pictures
    ),
}
LARGE: dict[str, Kind] = {
    "densenet": Kind(lambda: torchvision.models.DenseNet(4, (2, 2), 8, num_classes=CLASSES), lambda: pictures(32)),
    "bert": Kind(
        language("Bert", hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16), tokens
    ),
    "gpt2": Kind(language("GPT2", n_embd=8, n_layer=1, n_head=2, n_positions=16), tokens),
    "llama": Kind(
        language(
            "Llama",
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=16,
        ),
        tokens,
    ),
    "t5": Kind(
        language("T5", d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, eos_token_id=1, decoder_start_token_id=0),
        tokens,
        select={"Rank1": without("relative_attention_bias")},  # the table of distances is the same for all rows
    ),
    "resnet18": Kind(lambda: torchvision.models.resnet18(num_classes=CLASSES), lambda: pictures(32)),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", SMALL)
def test_small_network(name: str, model: str, tmp_path: Path) -> None:
    whole_way(SMALL[name], model, tmp_path, N)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", LARGE)
def test_larger_network(name: str, model: str, tmp_path: Path) -> None:
    whole_way(LARGE[name], model, tmp_path, N)
