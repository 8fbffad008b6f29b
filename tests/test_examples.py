"""The example scripts find what was put into their data."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from fastapi.testclient import TestClient

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


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", pytest.param("bf16-mixed", marks=pytest.mark.slow)])
def test_lightning_trains(precision: str) -> None:
    pytest.importorskip("lightning", reason="PyTorch Lightning is not installed: pip install lightning")
    assert accuracy(run("with_lightning.py", "--epochs", "10", "--precision", precision)) > 0.9


@pytest.mark.slow
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
    chosen, used = found(
        run("variable_selection.py", "--inputs", "100", "--rows", "2048", "--warmup", "250", "--samples", "50")
    )
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


def test_a_posterior_is_served_to_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every answer is that of `predict` with the same seed, however many requests there are at once."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    serve = importlib.import_module("serve")
    posterior = serve.trained(epochs=2)
    client = TestClient(serve.server_of(posterior, width=1))

    def ask(count: int) -> dict[str, list[float]]:
        answer = client.post("/predict", json={"rows": [[i / 10] for i in range(count)]})
        assert answer.status_code == 200
        return dict(answer.json())

    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(ask, range(1, 33)))
    for count, answer in enumerate(answers, 1):
        prediction = posterior.predict(torch.arange(count)[:, None] / 10, seed=0)
        expected = {"mean": prediction.mean, "std": prediction.std, "epistemic_std": prediction.epistemic.sqrt()}
        for name, values in expected.items():
            torch.testing.assert_close(torch.tensor(answer[name]), values.flatten(), rtol=0, atol=1e-5)
    for wrong in ({"rows": []}, {"rows": [[1.0, 2.0]]}, {"rows": "x"}, {}):
        assert client.post("/predict", json=wrong).status_code == 422


@pytest.mark.slow
def test_language_models_say_what_they_do_not_know(tmp_path: Path) -> None:
    """Shuffled letters are less probable; each particle is a checkpoint of the same logits, with which PEFT writes."""
    pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")
    pytest.importorskip("peft", reason="PEFT is not installed: pip install peft")
    output = run("language_model.py", "--epochs", "4", "--out", str(tmp_path / "particles"))
    auroc = [float(value) for value in re.findall(r"AUROC of shuffled text by log probability ([\d.]+)", output)]
    assert len(auroc) == 2 and min(auroc) > 0.9
    differences = re.findall(r"particle_\d in PEFT, largest difference of logits (\S+): '(the .+)'", output)
    assert len(differences) == 3 and all(float(difference) < 1e-4 for difference, _ in differences)
    assert re.search(r"averaged at every token: 'the .+'", output)
    files = ("adapter_config.json", "adapter_model.safetensors")
    assert all((tmp_path / "particles" / f"particle_{i}" / file).is_file() for i in range(3) for file in files)
    found = re.search(r"accuracy ([\d.]+) of words", output)
    assert "MiniLM is left out" in output or found and float(found[1]) > 0.7
