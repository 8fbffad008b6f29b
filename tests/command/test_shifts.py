"""The command line says how predictions fare on corrupted test data, in tables, files and pages."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_runs import metrics_of, run, small_npz
from html_page import require_self_contained

import pyro_bnn as pb
from pyro_bnn.command.shifts import FUNCTIONS, ROWS, shift_note, shift_scores
from pyro_bnn.data import Encoding, Task, digits
from pyro_bnn.data.corruptions import IMAGE_KINDS, TABLE_KINDS, corrupt, corrupt_table
from pyro_bnn.files import sealed
from pyro_bnn.models import architectures


@pytest.fixture(scope="module")
def table_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run on a small table of two classes, and what it printed."""
    folder = tmp_path_factory.mktemp("runs")
    source = small_npz(folder / "small.npz")
    printed = run("fit", "--data", source, "--epochs", 1, "--samples", 2, "--components", 2, "--out", folder / "run")
    return folder / "run", printed.output


def images_npz(path: Path, low: float = 0.0, high: float = 1.0, channels: int = 1) -> Path:
    """Images of floats between two values."""
    rng = np.random.default_rng(0)
    x = rng.uniform(low, high, (24, channels, 8, 8)).astype(np.float32)
    x[0, 0, 0, :2] = low, high
    y = np.arange(24) % 2
    np.savez(path, x_train=x, y_train=y, x_test=x[:12], y_test=y[:12])
    return path


def network(outputs: int = 10) -> pb.Posterior:
    """A rank-1 posterior of three components for the digits, never trained."""
    torch.manual_seed(0)
    model = pb.models.Rank1(architectures.mlp(64, (8,), outputs), pb.likelihoods.Categorical(), 30)
    return pb.Posterior(model, pb.models.Rank1Guide(model, components=3))


def test_a_run_holds_and_shows_its_shift(table_run: tuple[Path, str], tmp_path: Path) -> None:
    """Proves that metrics.json, the console and the page have the same numbers, by kind and on average."""
    folder, printed = table_run
    metrics = metrics_of(folder)
    run("report", folder, "--out", tmp_path / "r.html", "--quiet")
    reader = require_self_contained((tmp_path / "r.html").read_text(encoding="utf-8"))
    shown = reader.numbers(of_shift=True)
    assert len(shown) == 2 * 3 * (2 + len(TABLE_KINDS))
    for label, found in (("Bayesian", metrics), ("deterministic", metrics["deterministic"])):
        shift = found["shift"]
        assert set(shift["kinds"]) == set(TABLE_KINDS)
        for name, mean in {"accuracy": "cA", "nll": "cNLL", "ece": "cECE"}.items():
            every = [value for of in shift["kinds"].values() for value in of[name]]
            assert found[mean] == pytest.approx(sum(every) / 10) == shown[f"shift_{name}_mean", label]
            assert f"{found[mean]:.4f}" in printed
            assert shown[f"shift_{name}_clean", label] == shift["clean"][name]
            for kind, of in shift["kinds"].items():
                assert shown[f"shift_{name}_{kind}", label] == pytest.approx(sum(of[name]) / 5)
    text = reader.text
    assert "Distribution shift" in text and "20 test rows" in text and "Bayesian 4, deterministic 1" in text
    (words,) = (image["alt"] for image in reader.all("img") if "severity of each kind" in image["alt"])
    assert f"Bayesian {metrics['shift']['clean']['nll']:.3f} without corruption" in words


def test_images_are_corrupted_by_all_kinds_with_rows_and_draws_that_take_little_time() -> None:
    """Proves the numbers for one kind by hand, and that rows and functions are no more than the page says."""
    posterior, task = network(), digits()
    shift = shift_scores(posterior, task, 16, 3)
    assert shift is not None and list(shift) == list(IMAGE_KINDS) and shift_note(task) is None
    assert shift.rows == ROWS < len(task.x_test) and FUNCTIONS <= shift.functions == 6
    rows = torch.randperm(len(task.x_test), generator=torch.Generator().manual_seed(0))[:ROWS].sort().values
    x, y = task.x_test[rows], task.y_test[rows]
    for severity in (1, 5):
        by_hand = pb.diagnostics.evaluate(posterior, (corrupt(x, "blur", severity), y), num_samples=2, seed=3)
        for name in ("accuracy", "nll", "ece"):
            assert shift["blur"][name][severity - 1] == pytest.approx(by_hand[name], abs=1e-6)
    assert shift.clean["nll"] == pytest.approx(
        pb.diagnostics.evaluate(posterior, (x, y), num_samples=2, seed=3)["nll"], abs=1e-6
    )
    fewer = shift_scores(posterior, task, 1, 3)
    assert fewer is not None and fewer.functions == 3, "no more draws than were asked for"


def test_a_regression_is_in_the_unit_of_its_target() -> None:
    """Proves RMSE and NLL by hand, on standardised columns."""
    torch.manual_seed(0)
    model = pb.models.Dense(architectures.mlp(3, (8,), 1), pb.likelihoods.Gaussian(scale=0.5), 30)
    posterior = pb.Posterior(model, pb.models.PointGuide(model))
    x, y, unit = torch.randn(40, 3), torch.randn(40), 7.0
    encoding = Encoding((), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (), 2.0, unit)
    shift = shift_scores(posterior, Task("t", x, y, x, y, encoding), 16, 0)
    assert shift is not None and shift.rows == 40 and shift.functions == 1
    by_hand = pb.diagnostics.evaluate(posterior, (corrupt_table(x, "missing", 2, mean=0.0, std=1.0), y), seed=0)
    assert shift["missing"]["rmse"][1] == pytest.approx(unit * by_hand["rmse"], rel=1e-5)
    assert shift["missing"]["nll"][1] == pytest.approx(by_hand["nll"] + math.log(unit), rel=1e-5)
    plain = pb.diagnostics.evaluate(posterior, (x, y), seed=0)
    assert shift.clean["rmse"] == pytest.approx(unit * plain["rmse"], rel=1e-5)


@pytest.mark.parametrize(
    ("low", "high", "channels", "message"),
    [
        (-1.0, 1.0, 1, "their values, from -1 to 1, are neither bytes nor in [0, 1]"),
        (0.0, 255.0, 3, "their values, from 0 to 255, are neither bytes"),
        (0.0, 1.0, 4, "neither a table nor grey or RGB images"),
    ],
)
def test_images_of_unknown_range_are_named_and_not_corrupted(
    tmp_path: Path, low: float, high: float, channels: int, message: str
) -> None:
    """Proves that nothing is guessed: the console says why, and no table or page has such numbers."""
    source = images_npz(tmp_path / "images.npz", low, high, channels)
    common = ("--data", source, "--network", "mlp", "--epochs", 1)
    printed = run("fit", *common, "--samples", 2, "--out", tmp_path / "run").output
    assert "Note: test i" in printed and message in printed and "under shift" not in printed
    metrics = metrics_of(tmp_path / "run")
    assert not {"shift", "cA", "cNLL", "cECE"} & (set(metrics) | set(metrics["deterministic"]))
    run("report", tmp_path / "run", "--quiet")
    assert "Distribution shift" not in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_evaluate_computes_the_same_shift_again(table_run: tuple[Path, str]) -> None:
    folder, _ = table_run
    before = metrics_of(folder)
    (folder / "metrics.json").unlink()
    run("evaluate", folder, "--quiet")
    after = metrics_of(folder)
    for of, was in ((after, before), (after["deterministic"], before["deterministic"])):
        assert of["shift"] == was["shift"] and of["cNLL"] == was["cNLL"]


def test_compare_shows_the_shift_of_every_network_and_names_runs_without(
    table_run: tuple[Path, str], tmp_path: Path
) -> None:
    """Proves that runs of older versions, which have no such scores, are compared in all else."""
    folder, _ = table_run
    old = tmp_path / "old"
    source = folder.parent / "small.npz"
    run("fit", "--data", source, "--epochs", 1, "--samples", 2, "--method", "dense", "--out", old, "--quiet")
    printed = run("compare", "--runs", folder, "--runs", old, "--out", tmp_path / "c").output
    assert "cNLL" in printed and "cA" in printed
    reader = require_self_contained((tmp_path / "c" / "comparison.html").read_text(encoding="utf-8"))
    shown = reader.numbers(of_shift=True)
    labels = {label for _, label in shown}
    assert {"run", "old"} < labels and "Not measured on these data" not in reader.text
    assert shown["shift_nll_mean", "old"] == pytest.approx(metrics_of(old)["cNLL"])
    metrics: dict[str, Any] = metrics_of(old)
    for of in (metrics, metrics["deterministic"]):
        for name in ("shift", "cA", "cNLL", "cECE"):
            del of[name]
    (old / "metrics.json").write_text(json.dumps(sealed(metrics)))
    run("compare", "--runs", folder, "--runs", old, "--out", tmp_path / "c", "--overwrite", "--quiet")
    reader = require_self_contained((tmp_path / "c" / "comparison.html").read_text(encoding="utf-8"))
    assert "Not measured on these data: old" in reader.text
    assert "old" not in {label for _, label in reader.numbers(of_shift=True)}


@pytest.mark.parametrize("damage", [[], {"kinds": {}}, 3, None], ids=repr)
def test_a_shift_that_is_none_is_damage(table_run: tuple[Path, str], tmp_path: Path, damage: object) -> None:
    """Proves that what is no shift is named as a damaged file, for the network and for its twin."""
    folder, _ = table_run
    for where in ("posterior", "deterministic"):
        metrics = metrics_of(folder)
        (metrics if where == "posterior" else metrics["deterministic"])["shift"] = damage
        copy = tmp_path / where
        copy.mkdir()
        for name in ("config.json", "posterior", "deterministic"):
            (copy / name).symlink_to(folder / name)
        (copy / "metrics.json").write_text(json.dumps(sealed(metrics)))
        result = run("report", copy, expect=2)
        assert "does not hold the scores of a run" in result.stderr and result.stderr.count("\n") == 1
