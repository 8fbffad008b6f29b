"""`pyro-bnn fit --resume RUN` ends a run that was interrupted as the run that was not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import killed
import pytest
from command.test_kills import require_same_runs
from command_runs import metrics_of, run, small_npz
from typer.testing import CliRunner

from pyro_bnn.command import unfinished
from pyro_bnn.command.cli import app
from pyro_bnn.inference.training.loop import _Loop

METHODS: dict[str, list[str]] = {
    "rank1": [],
    "dense": [],
    "bella": ["--particles", "2", "--rank", "1"],
    "spike-slab": ["--samples", "4"],
    "weight-sharing": ["--codes", "8"],
}


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """A shell that starts pytest in the background has Ctrl-C ignored in it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def command(method: str, data: Path, out: Path, *others: str) -> list[str]:
    options = [*METHODS[method], "--epochs", "3", "--device", "cpu", "--quiet", *others]
    return ["fit", "--method", method, "--data", str(data), *options, "--out", str(out)]


def interrupted(arguments: list[str], step: int, number: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """Runs a command in a child that gets a signal before the step of that number; its exit code."""
    left = [step]

    def counted(self: Any, parts: Any, step: Any = _Loop._step) -> Any:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), number)
        return step(self, parts)

    def work() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(_Loop, "_step", counted)
            patch.setattr(unfinished, "EVERY", 1e-9)  # after every step
            found = CliRunner().invoke(app, arguments)
            said.write_text(found.output)
            os._exit(found.exit_code)

    said = Path(arguments[-1] + ".said")
    return killed.wait(killed.start(work)), said.read_text() if said.exists() else ""


#: in the default tests three pairs; the slow ones have all
QUICK = {("rank1", signal.SIGKILL), ("spike-slab", signal.SIGINT), ("dense", signal.SIGTERM)}
ENDINGS = [
    pytest.param(method, number, marks=() if (method, number) in QUICK else pytest.mark.slow)
    for number in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
    for method in METHODS
]


@pytest.mark.parametrize(("method", "number"), ENDINGS)
def test_an_interrupted_run_is_resumed_to_the_same_end(
    method: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice at seeded steps, in the deterministic network or the Bayesian one; proves weights to the last bit, metrics,
    what the command says and ends with, and that nothing is left of its state."""
    data = small_npz(tmp_path / "small.npz")
    run(*command(method, data, tmp_path / "whole" / "run"))
    place, rng = tmp_path / "parts" / "run", random.Random(method)
    place.parent.mkdir()
    code, said = interrupted(command(method, data, place), rng.randint(1, 3), number, monkeypatch)
    assert code == {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}[signal.Signals(number)]
    assert not (place / "config.json").exists() and (place / "unfinished" / "command.json").is_file()
    if number != signal.SIGKILL:
        assert f"`pyro-bnn fit --resume {place}` goes on" in " ".join(said.split())
    again = ["fit", "--quiet", "--resume", str(place)]
    code, _ = interrupted(again, rng.randint(1, 3), number, monkeypatch)
    if code != 0:  # a chain has no steps of the loop
        run(*again)
    (tmp_path / "parts" / "run.said").unlink(missing_ok=True)
    require_same_runs(tmp_path / "parts", tmp_path / "whole")


def test_what_cannot_be_resumed_says_why(tmp_path: Path) -> None:
    data = small_npz(tmp_path / "small.npz")
    none = run("fit", "--resume", tmp_path / "none", expect=2)
    assert "there is no unfinished run in" in none.output
    run(*command("dense", data, tmp_path / "run"))
    finished = run("fit", "--resume", tmp_path / "run", expect=2)
    assert "(the run is finished)" in finished.output
    other = run("fit", "--resume", tmp_path / "run", "--lr", "0.1", "--epochs", "3", expect=2)
    assert "leave out --lr, --epochs" in other.output


def test_another_command_does_not_go_on_with_an_unfinished_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, place = small_npz(tmp_path / "small.npz"), tmp_path / "run"
    interrupted(command("dense", data, place), 2, signal.SIGKILL, monkeypatch)
    other = run(*command("dense", data, place, "--lr", "0.5"), expect=2)
    said = " ".join(other.output.split())
    assert "holds an unfinished run with other options" in said and "lr 0.01, not 0.5" in said
    assert "--overwrite starts afresh" in said
    run(*command("dense", data, place, "--lr", "0.5", "--overwrite"))
    assert metrics_of(place)["deterministic"] and not (place / "unfinished").exists()


def test_two_processes_train_what_one_trains(tmp_path: Path) -> None:
    """By torchrun: metrics within noise of those of one process, and one run folder, whose files are the same."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    data = small_npz(tmp_path / "small.npz", 400)
    options = [
        "fit",
        "--method",
        "rank1",
        "--data",
        str(data),
        "--epochs",
        "10",
        "--components",
        "2",
        "--device",
        "cpu",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    place = tmp_path / "two"
    done = subprocess.run(
        [*torchrun, "-m", "pyro_bnn", *options, "--out", str(place)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Saved in") == 1
    run(*options, "--quiet", "--out", tmp_path / "one")
    two, one = metrics_of(place), metrics_of(tmp_path / "one")
    # 20 test rows, of which a network that has learned anything gets 18 or more
    for found, other in ((two, one), (two["deterministic"], one["deterministic"])):
        assert abs(found["accuracy"] - other["accuracy"]) <= 0.1 and found["accuracy"] >= 0.85
        assert found["nll"] == pytest.approx(other["nll"], abs=0.1)
    assert sorted(file.name for file in place.iterdir()) == sorted(file.name for file in (tmp_path / "one").iterdir())
