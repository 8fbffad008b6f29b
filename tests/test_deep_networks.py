"""Networks of sequences with one to eleven million weights x models."""

from pathlib import Path

import pytest
import torch
from network_ways import CLASSES, MODELS, Kind, whole_way
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint_sequential

N, WORDS = 2, 100


def sequences() -> Tensor:
    return torch.randn(N, 7, 32)


def words() -> Tensor:
    return torch.randint(2, WORDS, (N, 6))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(32, 256, num_layers=2, bidirectional=True, batch_first=True)
        self.fc = nn.Linear(512, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(x)[0][:, -1])


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LSTMCell(32, 256), nn.LSTMCell(256, 256)
        self.fc = nn.Linear(256, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        a = b = c = d = x.new_zeros(len(x), 256)
        for step in x.unbind(1):
            a, b = self.first(step, (a, b))
            c, d = self.second(a, (c, d))
        return self.fc(c)


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(32, 256, num_layers=2, bidirectional=True, batch_first=True)
        self.fc = nn.Linear(512, CLASSES)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        return self.fc(pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0].sum(1))


class Translates(nn.Module):
    """nn.Transformer with its 6 + 6 layers, at half their width."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Embedding(WORDS, 256, padding_idx=0), nn.Linear(256, CLASSES)
        self.core = nn.Transformer(256, dim_feedforward=1024, batch_first=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.fc(self.core(self.embed(x), self.embed(y)).mean(1))


class Checkpointed(nn.Module):
    """Twelve layers that run again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.TransformerEncoderLayer(128, 4, 512, batch_first=True) for _ in range(12)]
        self.body, self.fc = nn.Sequential(*layers), nn.Linear(128, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(checkpoint_sequential(self.body, 4, x, use_reentrant=False).mean(1))


NETWORKS: dict[str, Kind] = {
    "LSTM": Kind(Recurrent, sequences),
    "loop over LSTM cells": Kind(Cells, sequences),
    "GRU on packed sequences": Kind(Packed, lambda: (sequences(), torch.tensor([7, 3]))),
    "nn.Transformer": Kind(Translates, lambda: (words(), words())),
    "checkpointing": Kind(Checkpointed, lambda: torch.randn(N, 7, 128)),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", NETWORKS)
def test_deep_network(name: str, model: str, tmp_path: Path) -> None:
    """Proves that the pair works, from gradients like those of plain autograd to ArviZ, or is refused as documented."""
    whole_way(NETWORKS[name], model, tmp_path, N)
