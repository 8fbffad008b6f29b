"""Memory and time of evaluation: ``python -m tests.benchmarks.evaluating``.

``pb.diagnostics.evaluate`` of a LeNet-5 whose weights are all random, with images of 28 x 28 from elsewhere beside
those of the task: peak memory beyond that of the process that has imported everything. It does not grow with the number
of batches, but for some 25 bytes that are kept of each row; nor with the number of draws, once a group of draws fills
its fixed budget of 2^24 numbers, as the activations of one batch for ten draws do.

Then the time of ``evaluate`` and ``check`` over that of ``predict``, of a 784-400-400-10 network with 16 draws on 2,560
rows, in the same batches on one thread.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import pyro_bnn as pb
from pyro_bnn.models.architectures import LeNet5
from tests.benchmarks.measure import interleaved, peak_memory, report

IMAGES, BATCH = 60_000, 256
#: times the memory of the reference, at most
TARGET = 1.1


class Noise(Dataset[tuple[Tensor, Tensor]]):
    """Images that are made when they are asked for."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitems__(self, index: list[int]) -> list[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(index[0])
        x = torch.randn(len(index), 1, 28, 28, generator=generator)
        return list(zip(x, torch.randint(10, (len(index),), generator=generator), strict=True))


def build(draws: int, images: int) -> Callable[[], Any]:
    torch.manual_seed(0)
    model = pb.models.Dense(LeNet5(), pb.likelihoods.Categorical(), IMAGES)
    posterior = pb.Posterior(model, pb.models.MeanFieldGuide(model))
    return partial(
        pb.diagnostics.evaluate, posterior, Noise(images), Noise(images), num_samples=draws, batch_size=BATCH, seed=0
    )


def posteriors() -> dict[str, pb.Posterior]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 10))
    dense = pb.models.Dense(net, pb.likelihoods.Categorical(), IMAGES)
    rank1 = pb.models.Rank1(net, pb.likelihoods.Categorical(), IMAGES)
    return {
        "Dense": pb.Posterior(dense, pb.models.MeanFieldGuide(dense)),
        "Rank1, 4 components": pb.Posterior(rank1, pb.models.Rank1Guide(rank1, components=4)),
    }


def times() -> list[dict[str, Any]]:
    x, y = torch.randn(10 * BATCH, 784), torch.randint(10, (10 * BATCH,))
    settings: dict[str, Any] = {"num_samples": 16, "batch_size": BATCH, "seed": 0}
    rows = []
    for name, posterior in posteriors().items():
        seconds = interleaved(
            {
                "predict": lambda: posterior.predict(x, **settings).probs,  # noqa: B023
                "evaluate": lambda: pb.diagnostics.evaluate(posterior, (x, y), **settings),  # noqa: B023
                "check": lambda: pb.diagnostics.check(posterior, (x, y), **settings),  # noqa: B023
            },
            rounds=9,
        )
        for step, target in (("evaluate", 1.1), ("check", 1.3)):
            row = {"step": f"{step}, {name}", "reference": "predict", "ratio": seconds[step] / seconds["predict"]}
            rows.append(row | {"seconds": seconds[step], "target": target})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=IMAGES)
    images = parser.parse_args().images
    rows: list[dict[str, Any]] = []
    for reference, other in (((10, images // 10), (10, images)), ((40, images // 100), (160, images // 100))):
        base = 0.0
        for draws, count in (reference, other):
            megabytes = peak_memory(partial(build, draws, count), steps=1)
            base = base or megabytes
            rows.append(
                {
                    "step": f"evaluate, {draws} draws on {count} images",
                    "reference": f"{reference[0]} draws on {reference[1]} images",
                    "peak_mb": megabytes,
                    "ratio": megabytes / base,
                    "target": TARGET,
                }
            )
    torch.set_num_threads(1)
    report("evaluating", rows + times())


if __name__ == "__main__":
    main()
