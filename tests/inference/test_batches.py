"""The size of the data is the number of samples that passes of training see, whatever data set lies behind."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import pyro_bnn as pb

N = 40
DATA = TensorDataset(torch.randn(N, 1, generator=torch.Generator().manual_seed(0)), torch.zeros(N))


class Indexed(Dataset[Any]):
    """Takes a batch of indices at once."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        return DATA[index]


class Odd(Sampler[int]):
    """Every second sample."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(1, N, 2))

    def __len__(self) -> int:
        return N // 2


class Changing(Sampler[int]):
    """Other samples in every pass."""

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(N)[:10].tolist())

    def __len__(self) -> int:
        return 10


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return (DATA[i] for i in range(24))

    def __len__(self) -> int:
        return 24


LOADERS: dict[str, tuple[Callable[[], DataLoader[Any]], int]] = {
    "subset": (lambda: DataLoader(Subset(DATA, list(range(12))), 4), 12),
    "sampler of a subset": (lambda: DataLoader(DATA, 4, sampler=SubsetRandomSampler(range(10))), 10),
    "sampler of a subset, drop_last": (
        lambda: DataLoader(DATA, 4, sampler=SubsetRandomSampler(range(10)), drop_last=True),
        10,
    ),
    "weights": (lambda: DataLoader(DATA, 4, sampler=WeightedRandomSampler([1.0] * 15 + [0.0] * 25, 60)), 15),
    "distributed": (lambda: DataLoader(DATA, 4, sampler=DistributedSampler(DATA, 2, 0)), N),
    "few at random": (lambda: DataLoader(DATA, 4, sampler=RandomSampler(DATA, num_samples=8)), N),
    "drop_last in order": (lambda: DataLoader(DATA, 15, drop_last=True), 30),
    "drop_last shuffled": (lambda: DataLoader(DATA, 15, drop_last=True, shuffle=True), N),
    "own sampler": (lambda: DataLoader(DATA, 4, sampler=Odd()), 20),
    "own sampler that changes": (lambda: DataLoader(DATA, 4, sampler=Changing()), N),
    "own batches": (lambda: DataLoader(DATA, batch_sampler=[[0, 1], [2, 3], [4, 5]]), 6),  # type: ignore[arg-type]
    "batches of indices": (
        lambda: DataLoader(Indexed(), batch_size=None, sampler=BatchSampler(SubsetRandomSampler(range(8)), 4, False)),
        8,
    ),
    "stream with a length": (lambda: DataLoader(Stream(), 4), 24),
    "items are batches": (lambda: DataLoader([DATA[:9], DATA[9:18]], batch_size=None), 18),  # type: ignore[arg-type]
}


def model(size: int) -> pb.models.Dense:
    torch.manual_seed(0)
    return pb.models.Dense(nn.Linear(1, 1), pb.likelihoods.Gaussian(scale=1.0), size)


def by_fit(size: int, loader: Any) -> None:
    dense = model(size)
    pb.inference.fit(dense, pb.models.MeanFieldGuide(dense), loader, epochs=1, progress=False, seed=0)


def by_svgd(size: int, loader: Any) -> None:
    dense = model(size)
    pb.inference.SVGD(dense, pb.inference.AutoParticles(dense, 2)).fit(loader, 1, progress=False, seed=0)


def by_sghmc(size: int, loader: Any) -> None:
    kernel = pb.inference.SGHMC(model(size), loader, step_size=0.01, friction=0.1, thinning=12)
    pb.inference.sample(kernel, 1, progress=False, seed=0)


def by_ensemble(size: int, loader: Any) -> None:
    ensemble = pb.inference.DeepEnsemble(nn.Linear(1, 1), pb.likelihoods.Gaussian(scale=1.0), size, num_networks=2)
    ensemble.fit(loader, epochs=1, progress=False, seed=0)


def by_swag(size: int, loader: Any) -> None:
    swag = pb.inference.SWAG(nn.Linear(1, 1), pb.likelihoods.Gaussian(scale=1.0), size)
    swag.fit(loader, epochs=2, warmup_epochs=1, num_samples=1, progress=False, seed=0)


@pytest.mark.parametrize("name", LOADERS)
def test_the_size_is_what_passes_see(name: str) -> None:
    """Proves that the right number is taken, and that others, such as the length of the data set, are refused."""
    make, size = LOADERS[name]
    by_fit(size, make())
    for wrong in {N, 50} - {size}:
        with pytest.raises(ValueError, match=f"num_data={wrong}, but the data has {size} samples"):
            by_fit(wrong, make())


@pytest.mark.parametrize("engine", [by_svgd, by_sghmc, by_ensemble, by_swag])
@pytest.mark.parametrize("name", ["sampler of a subset", "weights", "own sampler", "stream with a length"])
def test_every_engine_has_the_same_size(engine: Any, name: str) -> None:
    make, size = LOADERS[name]
    engine(size, make())
    with pytest.raises(ValueError, match=f"num_data={N}, but the data has {size} samples"):
        engine(N, make())


def test_counting_the_samples_of_a_sampler_draws_nothing() -> None:
    """Proves that two fits from one random state are equal, with and without a sampler whose passes are counted."""
    found = []
    for sampler in (Changing(), None):
        torch.manual_seed(3)
        loader = DataLoader(DATA, 4, sampler=sampler)
        before = torch.get_rng_state()
        pb.inference.SGHMC(model(N), loader, step_size=0.01, friction=0.1).setup(0)
        found.append(torch.equal(before, torch.get_rng_state()))
    assert found[0] == found[1]


@pytest.mark.parametrize(("weights", "warns"), [([1.0, 2.0] * 20, True), ([3.0] * 20 + [0.0] * 20, False)])
def test_samples_that_are_drawn_more_often_than_others_are_told(weights: list[float], warns: bool) -> None:
    """Proves the warning where a sampler weighs the data, and none where it draws a subset evenly."""
    loader = DataLoader(DATA, 4, sampler=WeightedRandomSampler(weights, 40))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        by_fit(sum(weight > 0 for weight in weights), loader)
    assert any("draws some samples more often" in str(one.message) for one in caught) is warns
