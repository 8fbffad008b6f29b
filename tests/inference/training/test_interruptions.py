"""A run that is interrupted within an epoch, killed or asked to stop, resumes to the same bits."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import killed
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import pyro_bnn as pb
from pyro_bnn.inference import SVGD, SWAG, AutoParticles, Callback, Checkpoint, DeepEnsemble, FitState, cosine, fit
from pyro_bnn.inference.checkpoint import read
from pyro_bnn.likelihoods import Gaussian
from pyro_bnn.models import CodebookGuide, Dense, MeanFieldGuide, MergeCodes, ParticleGuide, WeightSharing

N = 12
Engine = Callable[..., pb.Posterior]


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """A shell that starts pytest in the background has Ctrl-C ignored in it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def data() -> tuple[Tensor, Tensor]:
    x = torch.randn(N, 2, generator=torch.Generator().manual_seed(0))
    return x, x[:, :1]


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Inputs that are augmented at random at every reading."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        x, y = data()
        return x[i] + 0.1 * torch.randn(2), y[i]


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.BatchNorm1d(3), nn.Linear(3, 1))


def options_of(path: Path | None, **options: Any) -> dict[str, Any]:
    checkpoint = None if path is None else Checkpoint(path, steps=2)
    return {"batch_size": 3, "seed": 0, "progress": False, "checkpoint": checkpoint} | options


def svi(path: Path | None, **options: Any) -> pb.Posterior:
    model = Dense(net(), Gaussian(0.5), N)
    own = options_of(path, schedule=cosine(), lr=0.01, epochs=4) | options
    return fit(model, MeanFieldGuide(model), own.pop("data", data()), **own)


def augmented(path: Path | None, **options: Any) -> pb.Posterior:
    """A loader that shuffles, whose data set draws from torch's generator."""
    return svi(path, **({"data": DataLoader(Noisy(), 3, shuffle=True)} | options))


def validated(path: Path | None, **options: Any) -> pb.Posterior:
    return svi(path, **({"validation": data(), "patience": 3, "lr": 0.3} | options))


def accumulated(path: Path | None, **options: Any) -> pb.Posterior:
    return svi(path, **({"accumulate": 2, "batch_size": 2} | options))


def scaled(path: Path | None, **options: Any) -> pb.Posterior:
    return svi(path, **({"precision": "fp16"} | options))


def svgd(path: Path | None, **options: Any) -> pb.Posterior:
    torch.manual_seed(2)
    model = pb.models.Bella(net(), Gaussian(0.5), N, rank=1)
    return SVGD(model, ParticleGuide(model, 2), lr=0.01).fit(data(), **options_of(path, epochs=4) | options)


def particles(path: Path | None, **options: Any) -> pb.Posterior:
    torch.manual_seed(2)
    model = Dense(nn.Linear(2, 1), Gaussian(0.5), N)
    return SVGD(model, AutoParticles(model, 2), lr=0.01).fit(data(), **options_of(path, epochs=4) | options)


def ensemble(path: Path | None, **options: Any) -> pb.Posterior:
    engine = DeepEnsemble(net(), Gaussian(0.5), N, num_networks=2)
    return engine.fit(data(), **options_of(path, epochs=4) | options)


def swag(path: Path | None, **options: Any) -> pb.Posterior:
    return SWAG(net(), Gaussian(0.5), N).fit(data(), **options_of(path, epochs=4, num_samples=3) | options)


def codebook(path: Path | None, **options: Any) -> pb.Posterior:
    torch.manual_seed(2)
    model = WeightSharing(nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1)), Gaussian(0.5), N)
    own = options_of(path, epochs=4) | options
    own["callbacks"] = [MergeCodes(start=2, tightness=2.0), *own.get("callbacks", [])]
    return fit(model, CodebookGuide(model, codes=6), data(), **own)


ENGINES: list[Engine] = [svi, augmented, validated, accumulated, scaled, svgd, particles, ensemble, swag, codebook]


class At(Callback):
    """Sends a signal to this process after so many steps of this call."""

    def __init__(self, step: int, number: int) -> None:
        self.left, self.number = step, number

    def after_step(self, state: FitState) -> None:
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), self.number)


def require_same(one: pb.Posterior, other: pb.Posterior) -> None:
    assert one.losses == other.losses
    draws = [posterior.draws(posterior.num_stored or 2, seed=1) for posterior in (one, other)]
    assert all(torch.equal(value, draws[1][name]) for name, value in draws[0].items())
    x, _ = data()
    predictions = [posterior.predict(x, 2, seed=0).outputs for posterior in (one, other)]
    assert torch.equal(*predictions)  # with the statistics of normalisation layers


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_that_is_killed_at_ten_steps_resumes_to_the_same_bits(engine: Engine, tmp_path: Path) -> None:
    """SIGKILL at seeded steps, most of them within an epoch and not at a checkpoint; each time the run goes on."""
    torch.manual_seed(5)
    whole = engine(None, seed=None)
    rng, path, ended = random.Random(0), tmp_path / "run.pt", 0

    def run(step: int) -> None:
        torch.manual_seed(5)
        engine(path, seed=None, callbacks=[At(step, signal.SIGKILL)])

    for _ in range(10):
        ended += killed.wait(killed.start(lambda: run(rng.randint(1, 5)))) == -signal.SIGKILL
        rng.random()
    assert ended >= 3
    torch.manual_seed(5)
    require_same(engine(path, seed=None), whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("engine", [svi, svgd, ensemble])
def test_a_run_that_is_asked_to_stop_saves_first(engine: Engine, number: int, tmp_path: Path) -> None:
    """Proves that the step of the signal is in the checkpoint, though none was due, and what the process ends with."""
    path = tmp_path / "run.pt"
    never = {"checkpoint": Checkpoint(path, epochs=1000)}

    def work() -> None:
        try:
            engine(None, **never, callbacks=[At(6, number)])
        except KeyboardInterrupt as stopped:
            assert number == signal.SIGINT and "the same call resumes from it" in str(stopped)
            os._exit(5)
        except SystemExit as stopped:
            assert number == signal.SIGTERM
            os._exit(int(str(stopped.code)) - 100)

    assert killed.wait(killed.start(work)) == (5 if number == signal.SIGINT else 43)
    [file] = tmp_path.iterdir()
    state = read(file)
    assert state is not None and state["step"] == 6 and state["batch"] == 2
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    require_same(engine(None, **never), engine(None))


def test_a_second_ctrl_c_interrupts_at_once(tmp_path: Path) -> None:
    class Twice(Callback):
        def after_step(self, state: FitState) -> None:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        svi(tmp_path / "run.pt", callbacks=[Twice()])
    assert not (tmp_path / "run.pt").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_run_without_a_checkpoint_leaves_signals_alone() -> None:
    found: list[Any] = []
    svi(None, epochs=1, callbacks=[lambda state: found.append(signal.getsignal(signal.SIGTERM))])
    assert found == [signal.SIG_DFL]


def test_a_run_cut_short_by_steps_resumes_to_the_same_bits(tmp_path: Path) -> None:
    whole = svi(None)
    for most in (1, 2, 5, 8, 11):
        assert len(svi(tmp_path / "run.pt", max_steps=most).losses) == most
    require_same(svi(tmp_path / "run.pt"), whole)


def test_the_last_files_are_kept_and_each_of_them_resumes(tmp_path: Path) -> None:
    whole = svi(None)
    svi(None, checkpoint=Checkpoint(tmp_path / "run.pt", steps=3, keep=3))
    steps = {file.name: read(file)["step"] for file in tmp_path.iterdir()}  # type: ignore[index]
    assert steps == {"run.pt": 16, "run-step-00000015.pt": 15, "run-step-00000012.pt": 12}
    for name in steps:
        require_same(svi(tmp_path / name), whole)


def test_a_damaged_file_names_an_older_one(tmp_path: Path) -> None:
    svi(None, checkpoint=Checkpoint(tmp_path / "run.pt", steps=3, keep=2))
    (tmp_path / "run.pt").write_bytes((tmp_path / "run.pt").read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"run.pt is not a readable checkpoint") as caught:
        svi(tmp_path / "run.pt")
    assert "run-step-00000015.pt' is the one before it: rename that" in "".join(caught.value.__notes__)


@pytest.mark.parametrize(
    ("every", "steps"),
    [
        ({"epochs": 2}, [8, 16]),
        ({"epochs": 3}, [12, 16]),
        ({"steps": 5}, [5, 10, 15, 16]),
        ({"epochs": 2, "steps": 7}, [7, 8, 14, 16]),
        ({"minutes": 1e-9}, [*range(1, 17)]),
        ({"minutes": 1e9}, [16]),
        ({}, [4, 8, 12, 16]),
    ],
)
def test_a_checkpoint_is_written_when_it_says(every: dict[str, Any], steps: list[int], tmp_path: Path) -> None:
    svi(None, checkpoint=Checkpoint(tmp_path / "run.pt", keep=100, **every))
    found = sorted(read(file)["step"] for file in tmp_path.iterdir())  # type: ignore[index]
    assert found == steps


class Counts(Callback):
    def __init__(self, held: Any = None) -> None:
        self.seen, self.held = 0, held

    def after_step(self, state: FitState) -> None:
        self.seen += 1

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "held": self.held}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


def test_the_state_of_a_callback_is_part_of_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    svi(path, max_steps=7, callbacks=[Counts({"x": torch.ones(2), "y": [1, None, "z"]})])
    resumed = Counts()
    svi(path, callbacks=[resumed])
    assert resumed.seen == 16
    with pytest.raises(ValueError, match=r"other callbacks: it holds the state of callback 0, a Counts, and this run"):
        svi(path, epochs=5)
    with pytest.raises(TypeError, match="the state of the callback 0, a Counts holds a object: expected tensors"):
        svi(tmp_path / "other.pt", callbacks=[Counts(object())])
    assert not (tmp_path / "other.pt").exists()


def test_the_history_of_mergers_survives(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    merge = [MergeCodes(start=1, tightness=2.0) for _ in range(3)]
    for own, to, epochs in zip(merge, (None, path, path), (4, 2, 4), strict=True):
        torch.manual_seed(2)
        model = WeightSharing(nn.Sequential(nn.Linear(2, 6), nn.Linear(6, 1)), Gaussian(0.5), N)
        fit(model, CodebookGuide(model, codes=3), data(), callbacks=[own], **options_of(to, epochs=epochs))
    assert merge[2].history == merge[0].history and len(merge[0].history) == 4
