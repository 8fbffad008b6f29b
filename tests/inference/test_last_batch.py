"""A last batch of one row under batch normalisation is refused before anything trains, with advice that works."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_bnn as pb

LIKELIHOOD = pb.likelihoods.Categorical()
Data = Any


def table(n: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    return net, (torch.randn(n, 3), torch.randint(0, 2, (n,)))


def fit(net: nn.Module, n: int, data: Data, **options: Any) -> None:
    model = pb.models.Dense(net, LIKELIHOOD, n)
    pb.inference.fit(model, pb.models.MeanFieldGuide(model), data, epochs=1, progress=False, **options)


def rank1(net: nn.Module, n: int, data: Data, **options: Any) -> None:
    model = pb.models.Rank1(net, LIKELIHOOD, n)
    guide = pb.models.Rank1Guide(model, 1)
    pb.inference.fit(model, guide, data, epochs=1, progress=False, **options)


def svgd(net: nn.Module, n: int, data: Data, **options: Any) -> None:
    model = pb.models.Dense(net, LIKELIHOOD, n)
    guide = pb.inference.AutoParticles(model, 2)
    pb.inference.SVGD(model, guide).fit(data, epochs=1, progress=False, **options)


def ensemble(net: nn.Module, n: int, data: Data, **options: Any) -> None:
    engine = pb.inference.DeepEnsemble(net, LIKELIHOOD, n, num_networks=1)
    engine.fit(data, epochs=1, progress=False, **options)


def sghmc(net: nn.Module, n: int, data: Data, **options: Any) -> None:
    model = pb.models.SpikeSlab(net, LIKELIHOOD, n)
    kernel = pb.inference.SGHMC(model, data, step_size=1e-3, friction=0.1, **options)
    pb.inference.sample(kernel, num_samples=2, warmup_steps=2, progress=False)


ENGINES: list[Callable[..., None]] = [fit, rank1, svgd, ensemble, sghmc]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_last_batch_of_one_row_is_refused_before_training(engine: Callable[..., None]) -> None:
    """Proves it for data in memory and in a loader, and that both remedies train."""
    net, data = table(9)
    before = [p.detach().clone() for p in net.parameters()]
    loader = DataLoader(TensorDataset(*data), batch_size=4, shuffle=True)
    for given, options in ((data, {"batch_size": 4}), (loader, {})):
        with pytest.raises(
            ValueError,
            match="last batch .* one row, because 9 rows are split into batches of 4, .*batch_size=.*drop_last",
        ):
            engine(net, 9, given, **options)
    assert all(torch.equal(p, value) for p, value in zip(net.parameters(), before, strict=True))
    engine(net, 9, data, batch_size=3)
    engine(net, 9, DataLoader(TensorDataset(*data), batch_size=4, shuffle=True, drop_last=True))


def test_layers_that_average_over_more_than_rows_take_one() -> None:
    """Proves that images, whose pixels are averaged too, are not refused, and networks without such a layer neither."""
    images = torch.randn(5, 1, 6, 6), torch.randint(0, 2, (5,))
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 2))
    fit(net, 5, images, batch_size=4)
    one_pixel = nn.Sequential(nn.Conv2d(1, 3, 6), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 2))
    with pytest.raises(ValueError, match="one row, because 5 rows are split into batches of 4"):
        fit(one_pixel, 5, images, batch_size=4)
    fit(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)), 5, table(5)[1], batch_size=4)


def test_bella_whose_statistics_stay_takes_one_row() -> None:
    net, data = table(9)
    model = pb.models.Bella(net, LIKELIHOOD, 9)
    pb.inference.SVGD(model, pb.models.ParticleGuide(model, 2)).fit(data, epochs=1, batch_size=4, progress=False)


def test_one_row_alone_is_refused() -> None:
    net, data = table(1)
    with pytest.raises(ValueError, match="one row, because 1 rows"):
        fit(net, 1, data)
