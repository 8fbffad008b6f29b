"""`pyro-bnn fit` and `compare` that are killed: the same command again gives the run that it would have given."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import killed
import pytest
from command_runs import metrics_of, run, small_npz, without_seconds
from safetensors.torch import load_file
from typer.testing import CliRunner

from pyro_bnn.command.cli import app

#: the command, whose run folder comes last
COMMANDS: dict[str, list[str]] = {
    "fit": ["fit", "--method", "dense"],
    "compare": ["compare", "--methods", "dense,rank1"],
}


def command(name: str, data: Path, out: Path) -> list[str]:
    return [*COMMANDS[name], "--data", str(data), "--epochs", "2", "--device", "cpu", "--quiet", "--out", str(out)]


def files_of(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))


def require_same_runs(found: Path, expected: Path) -> None:
    """The same files, networks to the last bit, and metrics but for the seconds."""
    assert files_of(found) == files_of(expected)
    for name in files_of(expected):
        if name.endswith("metrics.json"):
            assert without_seconds(metrics_of(found, name)) == without_seconds(metrics_of(expected, name))
        if name.endswith(".safetensors"):
            ours, theirs = load_file(found / name), load_file(expected / name)
            assert ours.keys() == theirs.keys() and all(bool((ours[n] == theirs[n]).all()) for n in theirs)


def kill_and_run_again(name: str, folder: Path, kills: int) -> None:
    data = small_npz(folder / "small.npz")
    start = time.perf_counter()
    run(*command(name, data, folder / "whole"))
    seconds = time.perf_counter() - start
    rng, ended = random.Random(kills), 0
    arguments = command(name, data, folder / "killed" / "run")
    for i in range(kills):
        moment = 0.6 * seconds * (i + rng.random()) / kills
        ended += killed.kill_after(lambda: CliRunner().invoke(app, arguments), moment) == -9
    assert ended, "no command was killed before it ended"
    if not (folder / "killed" / "run" / ("config.json" if name == "fit" else "comparison.json")).is_file():
        run(*arguments)
    elif name == "fit":
        run(*arguments, "--overwrite")
    require_same_runs(folder / "killed", _moved(folder / "whole", folder / "expected" / "run"))


def _moved(source: Path, target: Path) -> Path:
    target.parent.mkdir()
    source.rename(target)
    return target.parent


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_was_killed_is_run_again_to_the_same_end(name: str, tmp_path: Path) -> None:
    kill_and_run_again(name, tmp_path, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_was_killed_many_times_is_run_again_to_the_same_end(name: str, tmp_path: Path) -> None:
    kill_and_run_again(name, tmp_path, 10)


EDITS: list[Any] = [None, [], "x", 10**30, {"networks": 3}]


def test_a_damaged_configuration_or_posterior_of_a_run_is_one_line(tmp_path: Path) -> None:
    """Proves that the command line names the file, with exit code 2 and no traceback, for edits, truncations and
    flipped bits of the files of a run."""
    folder = tmp_path / "run"
    run(*command("fit", small_npz(tmp_path / "small.npz"), folder))
    rng = random.Random(0)
    for name in ("config.json", "posterior/posterior.json", "posterior/tensors.safetensors"):
        whole = (folder / name).read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) * 3 // 4] ^= 4
        damaged = [whole[: rng.randrange(len(whole))], bytes(flipped)]
        if name.endswith("json"):
            content = json.loads(whole)
            damaged += [json.dumps(content | {rng.choice(list(content)): edit}).encode() for edit in EDITS]
        for content in damaged:
            (folder / name).write_bytes(content)
            for what in ("evaluate", "report"):
                result = run(what, folder, "--device", "cpu", expect=2)
                assert result.stderr.startswith("pyro-bnn: ") and result.stderr.count("\n") == 1
                assert str(folder) in result.stderr
        (folder / name).write_bytes(whole)
    run("evaluate", folder, "--device", "cpu", "--quiet")
