"""A disk without room: errors name the place, what was there stays, and nothing half-written is left."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pyro_bnn as pb
from pyro_bnn.likelihoods import Gaussian

N = 8
X = torch.linspace(-1, 1, N)[:, None]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB, of which 40 kB are free."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("a small file system is mounted by root alone")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def model(width: int) -> pb.models.Dense:
    torch.manual_seed(0)
    return pb.models.Dense(nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1)), Gaussian(0.5), N)


def posterior(width: int) -> pb.Posterior:
    own = model(width)
    return pb.Posterior(own, pb.models.MeanFieldGuide(own))


def test_a_posterior_that_has_no_room_leaves_the_older_one(disk: Path) -> None:
    posterior(4).save(disk / "p")
    for path, left in ((disk / "p", "what was there before is as it was"), (disk / "new", "nothing is left of it")):
        with pytest.raises(OSError, match=rf"{path}.* could not be written \(.*No space left.*\); {left}"):
            posterior(4000).save(path)
    assert [str(file.relative_to(disk)) for file in sorted(disk.rglob("*"))] == [
        "p",
        "p/posterior.json",
        "p/tensors.safetensors",
    ]
    found = pb.load(disk / "p", model(4).core().net).predict(X, 2, seed=0).outputs
    assert torch.equal(found, posterior(4).predict(X, 2, seed=0).outputs)


def test_a_checkpoint_that_has_no_room_says_what_is_kept_and_training_goes_on_once_there_is(disk: Path) -> None:
    def run(epochs: int, width: int = 60) -> pb.Posterior:
        own = model(width)
        guide = pb.models.MeanFieldGuide(own)
        return pb.inference.fit(own, guide, (X, X), epochs=epochs, seed=0, progress=False, checkpoint=disk / "run.pt")

    whole = run(4)
    (disk / "run.pt").unlink()
    run(2)
    (disk / "filler").write_bytes(bytes(62_000 - (disk / "run.pt").stat().st_size))
    with pytest.raises(OSError, match=r"\(No space left on device\); what was there before .*run.pt") as caught:
        run(4)
    assert "Model and guide hold what training found in 3 epochs" in "".join(caught.value.__notes__)
    assert sorted(child.name for child in disk.iterdir()) == ["filler", "run.pt"]
    (disk / "filler").unlink()
    assert run(4).losses == whole.losses


def test_streamed_draws_that_have_no_room_are_refused_before_sampling(disk: Path) -> None:
    own = model(64)
    steps = 0

    class Counting(pb.inference.SGHMC):
        def sample(self, params: Any) -> Any:
            nonlocal steps
            steps += 1
            return super().sample(params)

    kernel = Counting(own, (X, X), step_size=0.01, friction=0.1, batch_size=4)
    with pytest.raises(OSError, match=r"no room for the draws, .*nothing was sampled.*\.npy"):
        pb.inference.sample(kernel, 200, stream=disk / "draws", progress=False, seed=0)
    assert steps == 0 and not [*(disk / "draws").iterdir()]
    pb.inference.sample(kernel, 2, stream=disk / "draws", progress=False, seed=0)
    assert pb.inference.load_stream(disk / "draws", own).num_stored == 2
