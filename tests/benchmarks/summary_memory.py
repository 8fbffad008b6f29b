"""Memory of training by ``pb.summary`` beside the measured peak: ``python -m tests.benchmarks.summary_memory``.

Each network is trained by ``pb.inference.fit`` for two epochs of two batches in a process of its own; what that
process needs beyond what it has imported is the peak. The estimate is made in another process.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn.likelihoods import Categorical
from pyro_bnn.models import Dense, MeanFieldGuide, Rank1, Rank1Guide
from pyro_bnn.models.architectures import resnet18
from pyro_bnn.priors import Normal
from tests.benchmarks.measure import peak_memory, report

BATCHES = 2


class Encoder(nn.Module):
    """Four layers of ``nn.TransformerEncoder`` over 64 tokens, and a class from their mean."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True)
        self.table, self.encoder = nn.Embedding(5000, 256), nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.out = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.encoder(self.table(x)).mean(1))
        return y


def images(batch: int) -> tuple[nn.Module, Any]:
    return resnet18(10), torch.randn(BATCHES * batch, 3, 32, 32)


def tokens(batch: int) -> tuple[nn.Module, Any]:
    return Encoder(), torch.randint(5000, (BATCHES * batch, 64))


def rank1(net: nn.Module, n: int) -> tuple[Any, Any]:
    model = Rank1(net, Categorical(), n, prior=Normal(1.0, 0.1))
    return model, Rank1Guide(model, 4)


def dense(net: nn.Module, n: int) -> tuple[Any, Any]:
    model = Dense(net, Categorical(), n)
    return model, MeanFieldGuide(model)


Case = tuple[Callable[[int], tuple[nn.Module, Any]], Callable[[nn.Module, int], tuple[Any, Any]], int]
CASES: dict[str, Case] = {
    "ResNet-18, rank-1 of 4 components": (images, rank1, 16),
    "ResNet-18, mean field": (images, dense, 16),
    "ResNet-18, mean field, large batch": (images, dense, 64),
    "transformer, rank-1 of 4 components": (tokens, rank1, 16),
    "transformer, mean field": (tokens, dense, 16),
}


class Training:
    """Builds a case in the process that is measured."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self) -> Callable[[], Any]:
        torch.manual_seed(0)
        data_of, model_of, batch = CASES[self.name]
        net, x = data_of(batch)
        model, guide = model_of(net, len(x))
        del net
        y = torch.randint(10, (len(x),))
        return lambda: pb.inference.fit(model, guide, (x, y), epochs=2, batch_size=batch, progress=False)


def estimate(name: str) -> pb.Summary:
    data_of, model_of, batch = CASES[name]
    net, x = data_of(batch)
    model, guide = model_of(net, len(x))
    return pb.summary(model, guide, batch_size=batch, example=x[:1])


def compare(name: str) -> dict[str, Any]:
    memory = estimate(name).memory
    assert memory is not None
    measured = peak_memory(Training(name), steps=1) * 2**20
    estimated = memory.total
    return {
        "network": name,
        "batch": CASES[name][2],
        "estimated_MB": round(estimated / 1e6, 1),
        "measured_MB": round(measured / 1e6, 1),
        "ratio": round(estimated / measured, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="networks whose names hold this")
    only = parser.parse_args().only
    rows = []
    for name in CASES:
        if only in name:
            rows.append(compare(name))
            print(rows[-1], flush=True)
    if not only:
        report("summary_memory", rows)


if __name__ == "__main__":
    main()
