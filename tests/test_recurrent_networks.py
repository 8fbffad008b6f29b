"""Recurrent networks of two layers of 256 x models: up to two million weights."""

from pathlib import Path

import pytest
import torch
from network_ways import CLASSES, MODELS, Kind, whole_way
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

N = 2


def sequences() -> Tensor:
    return torch.randn(N, 7, 32)


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


NETWORKS: dict[str, Kind] = {
    "LSTM": Kind(Recurrent, sequences),
    "loop over LSTM cells": Kind(Cells, sequences),
    "GRU on packed sequences": Kind(Packed, lambda: (sequences(), torch.tensor([7, 3]))),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", NETWORKS)
def test_recurrent_network(name: str, model: str, tmp_path: Path) -> None:
    """Proves that the pair works, from gradients like those of plain autograd to ArviZ, or is refused as documented."""
    whole_way(NETWORKS[name], model, tmp_path, N)
