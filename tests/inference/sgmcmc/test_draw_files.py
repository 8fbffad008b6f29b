"""Draws that go to disk as they come: how many there are, and how they are read after a kill."""

from __future__ import annotations

from pathlib import Path

import killed
import numpy as np
import pytest
import torch
from torch import nn

import pyro_bnn as pb
from pyro_bnn.inference import SGHMC, load_stream, sample

N = 8
X = torch.linspace(-1, 1, N)[:, None]


def model(norm: bool = False) -> pb.models.Dense:
    torch.manual_seed(0)
    layers = [nn.Linear(1, 3), *([nn.BatchNorm1d(3)] if norm else []), nn.Tanh(), nn.Linear(3, 1)]
    return pb.models.Dense(nn.Sequential(*layers), pb.likelihoods.Gaussian(0.5), N)


def run(folder: Path | None, samples: int, chains: int = 1, norm: bool = False) -> pb.Posterior:
    kernel = SGHMC(model(norm), (X, X), step_size=0.01, friction=0.1, batch_size=4)
    return sample(kernel, samples, 1, chains, stream=folder, seed=0, progress=False)


@pytest.mark.parametrize(("chains", "norm"), [(1, False), (2, False), (1, True)])
def test_streamed_draws_are_read_as_the_run_returned_them(chains: int, norm: bool, tmp_path: Path) -> None:
    """Proves it for several chains, and for statistics of normalisation that belong to each draw."""
    returned = run(tmp_path, 4, chains, norm)
    loaded = load_stream(tmp_path, model(norm))
    assert (loaded.num_stored, loaded.num_chains, loaded.is_sampled) == (4 * chains, chains, True)
    for one in (returned, run(None, 4, chains, norm)):
        assert torch.equal(loaded.predict(X).outputs, one.predict(X).outputs)


@pytest.mark.parametrize("chains", [1, 2])
def test_a_run_that_was_killed_has_the_draws_that_it_counted(chains: int, tmp_path: Path) -> None:
    """Proves that these are the first draws of the same run, that zeros behind them are left out, and that a run into
    the folder says what to do."""
    child = killed.start(lambda: run(tmp_path / "draws", 100_000, chains))
    count = tmp_path / "draws" / "draws.count"
    while not count.exists() or int(count.read_bytes() or b"0") < 5:
        assert killed.is_running(child)
    killed.kill(child)
    found = int(count.read_bytes())
    assert 5 <= found < 100_000
    loaded = load_stream(tmp_path / "draws", model())
    assert loaded.num_stored == found * chains and loaded.num_chains == chains
    draws = loaded.draw_source.stored.draws()  # type: ignore[union-attr]
    whole = run(None, 5, chains).draw_source.stored.draws()  # type: ignore[union-attr]
    for name, value in draws.items():
        own = value.reshape(chains, found, *value.shape[1:])
        assert torch.equal(own[:, :5].flatten(0, 1), whole[name])
        assert bool((own.flatten(2) != 0).any(2).all())
    with pytest.raises(ValueError, match=r"without draws of an earlier run. Read those with .*load_stream"):
        run(tmp_path / "draws", 5, chains)
    assert load_stream(tmp_path / "draws", model()).num_stored == found * chains


def test_damaged_streams_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no streamed draws"):
        load_stream(tmp_path, model())
    run(tmp_path, 4)
    whole = {file: file.read_bytes() for file in tmp_path.iterdir()}
    weight, statistics = tmp_path / "0.weight.npy", tmp_path / "draws.json"
    other = np.zeros((3, 2))
    np.save(tmp_path / "other.npy", other)
    damages: list[tuple[Path, bytes, str]] = [
        (weight, whole[weight][:-4], "0.weight.npy' is damaged"),
        (weight, b"", "0.weight.npy' is damaged"),
        (weight, (tmp_path / "other.npy").read_bytes(), r"0.weight.npy' is damaged: it has shape \(3, 2\)"),
        (tmp_path / "draws.count", b"x", "draws.count' is damaged"),
        (tmp_path / "draws.count", b"5", "says 5 draws, and the files have room for 4"),
        (tmp_path / "draws.count", b"0", "holds no draw yet"),
        (
            statistics,
            whole[statistics].replace(b'"samples": 4', b'"samples": 3'),
            "draws.json' is damaged or was edited",
        ),
        (statistics, b"{", "draws.json' is not JSON"),
        (statistics, b"{}", "draws.json' is not a file of"),
    ]
    for file, content, message in damages:
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_stream(tmp_path, model())
        file.write_bytes(whole[file])
    assert load_stream(tmp_path, model()).num_stored == 4
