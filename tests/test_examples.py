"""The example scripts find what was put into their data."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=900, cwd=EXAMPLES)
    assert done.returncode == 0, done.stderr
    return done.stdout


def found(output: str) -> tuple[list[int], list[int]]:
    """The inputs that were chosen, and those that the function uses."""
    first, second = (re.search(f"{label}.*: *(.*)", output) for label in ("at least 1/2", "function uses"))
    assert first and second
    return [int(i) for i in re.findall(r"\d+", first[1])], [int(i) for i in re.findall(r"\d+", second[1])]


def accuracy(output: str) -> float:
    found = re.findall(r"^accuracy ([\d.]+), NLL [\d.]+$", output, re.MULTILINE)
    assert len(found) == 1  # one process speaks for all
    return float(found[0])


def in_two_processes(*command: str) -> str:
    return run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command)


def test_a_loop_of_ones_own_trains() -> None:
    output = run("own_loop.py", "--epochs", "10")
    assert accuracy(output) > 0.9
    assert re.search(r"^epoch 10: [\d.]+ nats per datum on held-out rows$", output, re.MULTILINE)


@pytest.mark.parametrize("precision", ["32-true", pytest.param("bf16-mixed", marks=pytest.mark.slow)])
def test_lightning_trains(precision: str) -> None:
    pytest.importorskip("lightning", reason="PyTorch Lightning is not installed: pip install lightning")
    assert accuracy(run("with_lightning.py", "--epochs", "10", "--precision", precision)) > 0.9


@pytest.mark.parametrize("precision", ["no", pytest.param("bf16", marks=pytest.mark.slow)])
def test_accelerate_trains(precision: str) -> None:
    pytest.importorskip("accelerate", reason="Accelerate is not installed: pip install accelerate")
    options = ("--epochs", "10", "--precision", precision, "--accumulate", "2")
    assert accuracy(run("with_accelerate.py", *options)) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("script", ["with_ddp.py", "with_accelerate.py"])
def test_two_processes_train(script: str) -> None:
    if script == "with_accelerate.py":
        pytest.importorskip("accelerate", reason="Accelerate is not installed: pip install accelerate")
    assert accuracy(in_two_processes(script, "--epochs", "10")) > 0.9


def test_variables_are_selected() -> None:
    """A tenth of the inputs of example 1, in regression: exactly the five that matter."""
    chosen, used = found(run("variable_selection.py", "--inputs", "100", "--rows", "4096", "--warmup", "250"))
    assert chosen == used == [0, 1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["0", "1", "2"])
def test_example_1(seed: str) -> None:
    """p = 1000, n = 10240: exact support, and a test MSE of at most 1.15 where the noise alone has 1."""
    output = run("variable_selection.py", "--seed", seed)
    chosen, used = found(output)
    assert chosen == used == [0, 1, 2, 3, 4]
    error = re.search(r"MSE: ([\d.]+)", output)
    assert error and float(error[1]) <= 1.15


@pytest.mark.slow
def test_the_same_script_classifies() -> None:
    chosen, used = found(run("variable_selection.py", "--function", "interaction", "--likelihood", "bernoulli"))
    assert chosen == used == [0, 1, 2, 3]
