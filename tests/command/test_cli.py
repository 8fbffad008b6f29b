"""The command line trains, saves, scores again and refuses, on built-in data and on the user's own."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from command_runs import metrics_of, run, small_npz, without_seconds
from html_page import require_self_contained
from PIL import Image

import pyro_bnn as pb
from pyro_bnn import data
from pyro_bnn.command import commands
from pyro_bnn.command.cli import COMMANDS, app
from pyro_bnn.command.options import MethodName, complete
from pyro_bnn.models import architectures

MEASURED = {
    *("accuracy", "nll", "brier", "ece", "ece_adaptive", "ece_classwise", "aurc", "augrc", "risk_at_80"),
    *("aleatoric", "epistemic", "disagreement"),
    *(
        f"ood_{name}{of}"
        for name in ("auroc", "aupr", "fpr95")
        for of in ("", "_max_probability", "_mutual_information")
    ),
    *("cA", "cNLL", "cECE"),
}
DIGITS = ("fit", "--data", "digits")
OF_NUMBERS = {"nll", "rmse", "crps", "coverage", "width", "aleatoric", "epistemic", "cRMSE", "cNLL", "shift"}
COST = {"seconds", "trainable_parameters"}


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run on the digits with an MLP, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    return folder, run(*DIGITS, "--network", "mlp", "--epochs", 2, "--samples", 4, "--out", folder).output


def test_fit_writes_the_run_folder_and_prints_both_networks(digits_run: tuple[Path, str]) -> None:
    """Proves that a run holds every promised file and key, and shows both networks in one table."""
    folder, output = digits_run
    names = {"config.json", "metrics.json", "posterior", "deterministic", "posterior.nc"}
    assert {path.name for path in folder.iterdir()} == names, "and no temporary files"
    metrics = metrics_of(folder)
    assert set(metrics) == MEASURED | COST | {"deterministic", "shift"}
    assert set(metrics["deterministic"]) == MEASURED | COST | {"shift"}
    net = architectures.mlp(64, (128, 128), 10)
    assert metrics["deterministic"]["trainable_parameters"] == sum(p.numel() for p in net.parameters())
    assert metrics["trainable_parameters"] > metrics["deterministic"]["trainable_parameters"]
    for text in ("rank1, 4 components", "deterministic", f"{metrics['accuracy']:.4f}", f"{metrics['nll']:.4f}"):
        assert text in output
    config = json.loads((folder / "config.json").read_text())
    assert config["options"]["prior"] == "hierarchical-cauchy" and config["options"]["network"] == "mlp"


@pytest.mark.parametrize("error", [ImportError("No module named 'h5py'"), OSError("No space left on device")], ids=repr)
def test_a_run_is_whole_when_the_file_for_arviz_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Proves that a failure at the last file says what is missing, and that the other commands work on the run."""

    def fail(*_: object, **__: object) -> None:
        raise error

    folder, source = tmp_path / "run", small_npz(tmp_path / "small.npz")
    common = ("fit", "--data", source, "--epochs", 1, "--samples", 2, "--out", folder)
    run(*common, "--quiet")
    assert (folder / "posterior.nc").is_file()
    with monkeypatch.context() as patched:
        patched.setattr(pb.diagnostics, "to_arviz", fail, raising=False)
        result = run(*common, "--overwrite", expect=1)
    assert result.stderr.count("\n") == 1 and str(error) in result.stderr
    assert "posterior.nc could not be written" in result.stderr and str(folder) in result.stderr
    assert f"Saved in {folder}" in result.stdout, "the table is printed all the same"
    names = {"config.json", "metrics.json", "posterior", "deterministic"}
    assert {path.name for path in folder.iterdir()} == names, "and no file of the run that was replaced"
    before = metrics_of(folder)
    run("evaluate", folder, "--quiet")
    assert metrics_of(folder) == before
    run("report", folder, "--quiet")
    assert (folder / "report.html").is_file()


def test_a_comparison_goes_on_when_the_file_for_arviz_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proves that every method is trained and compared, with a warning for each run that lacks the file."""

    def fail(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(pb.diagnostics, "to_arviz", fail, raising=False)
    folder, source = tmp_path / "all", small_npz(tmp_path / "small.npz")
    result = run("compare", "--data", source, "--epochs", 1, "--methods", "rank1,dense", "--out", folder, "--quiet")
    assert result.stderr.count("No space left on device") == 2
    assert set(metrics_of(folder, "comparison.json")["metrics"]) == {"rank1", "dense", "deterministic"}
    assert not list(folder.rglob("posterior.nc"))


def test_saved_run_opens_without_the_command_line(digits_run: tuple[Path, str]) -> None:
    """Proves that posterior/ is what `pb.load` reads and posterior.nc what ArviZ reads, with 100 draws or more."""
    import arviz

    folder, _ = digits_run
    posterior = pb.load(folder / "posterior", architectures.mlp(64, (128, 128), 10))
    task = data.digits()
    accuracy = (posterior.predict(task.x_test, num_samples=4, seed=0).probs.argmax(-1) == task.y_test).float().mean()
    assert accuracy.item() == pytest.approx(metrics_of(folder)["accuracy"], abs=1e-6)
    tree = arviz.from_netcdf(str(folder / "posterior.nc"))
    assert tree["log_likelihood"]["obs"].sizes["draw"] >= 100
    assert tree["log_likelihood"]["obs"].shape[-1] == 540


def test_evaluate_finds_the_same_numbers(digits_run: tuple[Path, str]) -> None:
    """Proves that scoring a saved run gives exactly the metrics of its training, and keeps what training cost."""
    folder, _ = digits_run
    before = metrics_of(folder)
    (folder / "metrics.json").write_text(json.dumps(before | {"accuracy": -1.0}))  # as before there was a digest
    output = run("evaluate", folder).output
    assert metrics_of(folder) == before
    assert f"{before['nll']:.4f}" in output


def test_same_command_gives_the_same_metrics(digits_run: tuple[Path, str], tmp_path: Path) -> None:
    """Proves that the seed decides everything, whatever was drawn before, and that another seed gives other numbers."""
    folder, _ = digits_run
    torch.rand(3)
    common = (*DIGITS, "--network", "mlp", "--epochs", 2, "--samples", 4, "--quiet")
    assert run(*common, "--out", tmp_path / "same").output == ""
    assert without_seconds(metrics_of(tmp_path / "same")) == without_seconds(metrics_of(folder))
    run(*common, "--out", tmp_path / "other", "--seed", 1)
    assert metrics_of(tmp_path / "other")["nll"] != metrics_of(folder)["nll"]


@pytest.mark.parametrize("method", ["rank1", "dense"])
@pytest.mark.parametrize(
    "prior",
    [
        *("hierarchical-cauchy", "hierarchical-normal", "horseshoe", "normal", "cauchy", "laplace", "student-t"),
        "spike-and-slab",
    ],
)
def test_every_prior_trains_under_every_method(tmp_path: Path, method: str, prior: str) -> None:
    """Proves that each name of a prior reaches the model, trains, and comes back from the saved folder."""
    source = small_npz(tmp_path / "small.npz")
    run(
        "fit",
        "--data",
        source,
        "--method",
        method,
        "--prior",
        prior,
        "--epochs",
        1,
        "--out",
        tmp_path / "run",
        "--quiet",
    )
    before = metrics_of(tmp_path / "run")
    assert 0 < before["nll"] < 10 and before["ood_auroc"] is None
    run("evaluate", tmp_path / "run", "--quiet")
    assert metrics_of(tmp_path / "run") == before


def test_a_run_on_few_digits_is_scored_again_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that the built-in data of a run are kept by their name, and not as a path."""
    folder = tmp_path / "run"
    run("fit", "--data", "digits-30", "--network", "mlp", "--epochs", 1, "--samples", 1, "--quiet", "--out", folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["options"]["data"] == "digits-30" and config["options"]["batch_size"] == 7
    monkeypatch.chdir(tmp_path)
    before = metrics_of(folder)
    run("evaluate", folder, "--quiet")
    assert metrics_of(folder) == before


def test_spike_slab_removes_weights_and_comes_back(tmp_path: Path) -> None:
    """Proves that the sampler starts at the trained twin, removes the share asked for, and is scored again alike."""
    folder, task = tmp_path / "run", data.digits()
    arrays = {"x_train": task.x_train, "y_train": task.y_train, "x_test": task.x_test[:60], "y_test": task.y_test[:60]}
    np.savez(tmp_path / "digits.npz", **{name: values.numpy() for name, values in arrays.items()})
    common = ("--method", "spike-slab", "--epochs", 2, "--samples", 4, "--group", "kernel", "--out", folder)
    output = run("fit", "--data", tmp_path / "digits.npz", *common, "--sparsity", 0.6).output
    before = metrics_of(folder)
    assert "spike-slab, 4 draws" in output and 0.5 < before["sparsity"] <= 0.6
    assert (
        before["accuracy"] > 0.5 and before["trainable_parameters"] == before["deterministic"]["trainable_parameters"]
    )
    run("evaluate", folder, "--quiet")
    assert without_seconds(metrics_of(folder)) == without_seconds(before)
    posterior = pb.load(folder / "posterior", architectures.digits_cnn())
    assert posterior.inclusion_probabilities()["3.weight"].shape == (32, 32)


@pytest.mark.slow
def test_spike_slab_without_sparsity_removes_nothing(tmp_path: Path) -> None:
    common = ("--method", "spike-slab", "--epochs", 1, "--samples", 4, "--group", "kernel", "--out", tmp_path / "run")
    run(*DIGITS, *common, "--sparsity", 0, "--temperature", 0, "--quiet")
    assert metrics_of(tmp_path / "run")["sparsity"] == 0


def test_bella_starts_at_a_trained_network_and_comes_back(tmp_path: Path) -> None:
    """Proves that particles lie around the twin that is trained first or that another run has, which stays as it is."""
    common = (*DIGITS, "--method", "bella", "--network", "mlp", "--epochs", 3, "--particles", 3, "--rank", 2)
    output = run(*common, "--out", tmp_path / "a").output
    assert "No --pretrained: first the deterministic network" in output and "bella, 3 particles by svgd" in output
    first = metrics_of(tmp_path / "a")
    net = architectures.mlp(64, (128, 128), 10)
    twin = pb.load(tmp_path / "a" / "deterministic", net).draws(1)
    posterior = pb.load(tmp_path / "a" / "posterior", net)
    frozen = dict(posterior.model.core().net.named_parameters())  # type: ignore[attr-defined]
    assert all(torch.equal(frozen[name], value[0, 0]) for name, value in twin.items())
    shapes = {value.shape for name, value in posterior.draws(1).items() if name.endswith(".A")}
    assert shapes == {(1, 3, 2, 64), (1, 3, 2, 128)}
    assert first["accuracy"] > 0.5 and first["trainable_parameters"] == 3 * 2 * (64 + 4 * 128 + 10)
    again = run(*common, "--out", tmp_path / "b", "--pretrained", tmp_path / "a", "--update", "ensemble").output
    assert "The deterministic network of" in again and "3 particles by ensemble" in again
    assert metrics_of(tmp_path / "b")["deterministic"] == first["deterministic"]
    run("evaluate", tmp_path / "a", "--quiet")
    assert without_seconds(metrics_of(tmp_path / "a")) == without_seconds(first)
    other = (*DIGITS, "--method", "bella", "--network", "cnn", "--pretrained", tmp_path / "a", "--out", tmp_path / "c")
    assert "holds the network 'mlp'" in run(*other, expect=2).output


@pytest.mark.slow
def test_weight_sharing_starts_at_a_network_or_a_mean_field_and_comes_back(tmp_path: Path) -> None:
    """Proves where the codes come from, that they come back from disk, and that the report is that of the posterior."""
    net = ("--network", "mlp", "--epochs", 3)
    run("fit", "--method", "dense", *net, "--out", tmp_path / "dense", "--quiet")
    common = ("fit", "--method", "weight-sharing", *net, "--codes", 40)
    output = run(*common, "--out", tmp_path / "a").output
    assert "No --pretrained: first the deterministic network, then codes for its weights" in output
    assert "weight sharing, at most 40 codes" in output and "bits per coded weight" in output
    found = metrics_of(tmp_path / "a")
    assert found["accuracy"] > 0.5 and found["compression"]["codes"] <= 40
    posterior = pb.load(tmp_path / "a" / "posterior", architectures.mlp(64, (128, 128), 10))
    report = posterior.guide.compression_report()  # type: ignore[attr-defined]
    assert report == found["compression"] and 4 < found["bits_per_coded_weight"] < 8
    assert found["trainable_parameters"] == report["trainable"] + report["other_trainable"]  # no normalisation here
    run("evaluate", tmp_path / "a", "--quiet")
    assert without_seconds(metrics_of(tmp_path / "a")) == without_seconds(found)
    output = run(*common, "--out", tmp_path / "b", "--pretrained", tmp_path / "dense", "--sampling", "mixture").output
    assert "The mean field of" in output and "from the mean field" in output
    field = pb.load(tmp_path / "dense" / "posterior", architectures.mlp(64, (128, 128), 10)).guide
    codes = pb.load(tmp_path / "b" / "posterior", architectures.mlp(64, (128, 128), 10)).guide
    assert codes.sampling == "mixture"  # type: ignore[attr-defined]
    means = codes.means_of_network()["1.weight"]  # type: ignore[attr-defined]
    theirs = field.coordinates()["1.weight"].detach()[0]  # type: ignore[attr-defined]
    assert float(torch.corrcoef(torch.stack([means.flatten(), theirs.flatten()]))[0, 1]) > 0.95
    output = run(*common, "--out", tmp_path / "c", "--pretrained", tmp_path / "a", "--sampling", "shared").output
    assert "The deterministic network of" in output and "sampling shared" in output
    shared = pb.load(tmp_path / "c" / "posterior", architectures.mlp(64, (128, 128), 10))
    assert set(shared.draws(1)) >= {"codes", "1.bias"} and "1.weight" not in shared.draws(1)
    run(*common, "--out", tmp_path / "e", "--pretrained", tmp_path / "dense", "--sampling", "shared", "--quiet")
    shared = pb.load(tmp_path / "e" / "posterior", architectures.mlp(64, (128, 128), 10))
    biases = [guide.coordinates()["3.bias"].detach()[0] for guide in (shared.guide, field)]  # type: ignore[attr-defined]
    # three epochs at a thirtieth of the rate move a bias by a tenth of what training had moved it by
    untrained = shared.model.core().parameters_by_name()["3.bias"].detach()  # type: ignore[attr-defined]
    assert float((biases[0] - biases[1]).norm()) < 0.5 * float((biases[1] - untrained).norm())
    many = ("--codes", 10**6, "--pretrained", tmp_path / "a", "--out", tmp_path / "d")
    assert "codes=1000000, but there are only" in run(*common, *many, expect=2).output


def test_cauchy_family_and_components_reach_the_guide(tmp_path: Path) -> None:
    """Proves that --family and --components decide the number of parameters and are kept for evaluation."""
    source = small_npz(tmp_path / "small.npz")
    sizes = []
    for components in (1, 3):
        out = tmp_path / f"run{components}"
        options = ("--family", "cauchy", "--components", components, "--prior", "cauchy", "--epochs", 1, "--quiet")
        run("fit", "--data", source, *options, "--out", out)
        run("evaluate", out, "--quiet")
        sizes.append(metrics_of(out)["trainable_parameters"])
    assert sizes[1] > sizes[0]


def test_csv_regression_is_scored_in_the_unit_of_its_target(tmp_path: Path) -> None:
    """Proves that RMSE and NLL of a regression are those of the raw target, by a target that is 1000 times larger."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(120, 2))
    y = x @ np.array([1.0, -2.0]) + 0.3 * rng.normal(size=120)
    found = []
    for unit in (1.0, 1000.0):
        source = tmp_path / f"wind{unit:.0f}.csv"
        pd.DataFrame({"a": x[:, 0], "b": x[:, 1], "speed": 7 + unit * y}).to_csv(source, index=False)
        run(
            "fit",
            "--data",
            source,
            "--target",
            "speed",
            "--epochs",
            20,
            "--out",
            tmp_path / "run",
            "--overwrite",
            "--quiet",
        )
        found.append(metrics_of(tmp_path / "run"))
    assert set(found[0]) == OF_NUMBERS | {"deterministic"} | COST
    for one, thousand in ((found[0], found[1]), (found[0]["deterministic"], found[1]["deterministic"])):
        for name in ("rmse", "crps", "width", "cRMSE"):
            assert thousand[name] == pytest.approx(1000 * one[name], rel=1e-2)
        for name in ("aleatoric", "epistemic"):
            assert thousand[name] == pytest.approx(1e6 * one[name], rel=2e-2)
        assert thousand["nll"] == pytest.approx(one["nll"] + np.log(1000), abs=1e-2)
        assert thousand["cNLL"] == pytest.approx(one["cNLL"] + np.log(1000), abs=2e-2)
    run("evaluate", tmp_path / "run", "--quiet")
    assert metrics_of(tmp_path / "run") == found[1]


def test_evaluate_on_other_data_uses_the_run_s_encoding(tmp_path: Path) -> None:
    """Proves that new data are standardised as the training data were, and scored in a file of their own."""
    x = np.random.default_rng(0).normal(size=(200, 1))
    frame = pd.DataFrame({"x": x[:, 0], "y": 3 * x[:, 0]})
    frame.to_csv(tmp_path / "old.csv", index=False)
    frame.assign(y=frame["y"] + 100).to_csv(tmp_path / "new.csv", index=False)
    run("fit", "--data", tmp_path / "old.csv", "--target", "y", "--epochs", 20, "--out", tmp_path / "run", "--quiet")
    before = metrics_of(tmp_path / "run")
    run("evaluate", tmp_path / "run", "--data", tmp_path / "new.csv", "--quiet")
    assert metrics_of(tmp_path / "run") == before
    assert metrics_of(tmp_path / "run", "metrics-new.json")["rmse"] == pytest.approx(100, abs=4 * before["rmse"])


def test_image_folder_trains_a_convolutional_network(tmp_path: Path) -> None:
    """Proves that a folder of images is enough: red and blue squares, the network chosen by itself."""
    for name, colour in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (12, 12), colour).save(tmp_path / "images" / name / f"{number}.png")
    output = run("fit", "--data", tmp_path / "images", "--epochs", 1, "--out", tmp_path / "run").output
    assert "images, cnn, 1 epochs" in output
    run("evaluate", tmp_path / "run", "--quiet")


def test_resnet18_trains_on_the_digits_shape(tmp_path: Path) -> None:
    """Proves that the torchvision network is reachable by name on one-channel images of 8 x 8."""
    x = np.random.default_rng(0).integers(0, 255, (16, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "tiny.npz", x_train=x, y_train=np.arange(16) % 2, x_test=x[:4], y_test=np.arange(4) % 2)
    options = ("--network", "resnet18", "--epochs", 1, "--components", 2, "--samples", 1)
    run("fit", "--data", tmp_path / "tiny.npz", *options, "--out", tmp_path / "run", "--quiet")
    assert metrics_of(tmp_path / "run")["deterministic"]["trainable_parameters"] > 11_000_000


def test_a_run_is_not_overwritten_unasked(digits_run: tuple[Path, str]) -> None:
    """Proves that a second run into the same folder is refused before training, and leaves the first as it was."""
    folder, _ = digits_run
    before = (folder / "metrics.json").read_bytes()
    result = run("fit", "--out", folder, expect=2)
    assert "already holds a run; give another --out, or --overwrite" in result.stderr
    assert (folder / "metrics.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "--data", "nowhere.npz"], "no such data: 'nowhere.npz'"),
        (["fit", "--data", "table.csv"], "a target column is needed (--target); its columns are: a, b"),
        (["fit", "--data", "table.csv", "--target", "c"], "there is no column 'c'; its columns are: a, b"),
        (["fit", "--data", "empty.npz"], "it has no x_train, y_train, x_test, y_test"),
        (["fit", "--data", "notes.txt"], "expected an .npz file, a .csv file or a folder of images"),
        (["fit", "--target", "a"], "a target column ('a') is for a .csv file"),
        (["fit", "--lr", "0"], "--lr must be a positive number, got 0.0"),
        (["fit", "--lr", "nan"], "--lr must be a positive number, got nan"),
        (["fit", "--method", "dense", "--family", "cauchy"], "--family is for --method rank1, and not for dense"),
        (["fit", "--sparsity", "0.5"], "--sparsity is for --method spike-slab, and not for rank1"),
        (["fit", "--temperature", "0.5"], "--temperature is for --method spike-slab, and not for rank1"),
        (["fit", "--rank", "2"], "--rank is for --method bella, and not for rank1"),
        (["fit", "--method", "bella", "--components", "2"], "--components is for --method rank1 or dense"),
        (["fit", "--method", "bella", "--samples", "2"], "--samples is for --method rank1 or dense or spike-slab"),
        (["fit", "--codes", "16"], "--codes is for --method weight-sharing"),
        (["fit", "--pretrained", "runs"], "--pretrained is for --method bella or weight-sharing"),
        (["fit", "--method", "weight-sharing", "--family", "cauchy"], "--family is for --method rank1, and"),
        (["fit", "--method", "weight-sharing", "--pretrained", "nowhere"], "'nowhere' is not the folder of a run"),
        (["fit", "--method", "bella", "--pretrained", "nowhere"], "'nowhere' is not the folder of a run"),
        (["fit", "--method", "spike-slab", "--prior", "normal"], "--method spike-slab has its own prior"),
        (["fit", "--group", "input"], "--group input is for --prior spike-and-slab"),
        (["fit", "--data", "table.csv", "--target", "a", "--network", "cnn"], "--network cnn takes images"),
        (["fit", "--device", "abacus"], "--device abacus is not available on this machine"),
        (["fit", "--out", "notes.txt"], "--out notes.txt is a file; give a folder"),
        (["report", "nowhere"], "'nowhere' is not the folder of a run: it has no config.json"),
        (["report", "broken"], "'broken/config.json' is not JSON"),
        (["compare", "--methods", "rank1,vi"], "--methods: there is no 'vi'; the methods are rank1, dense, spike-slab"),
        (["compare", "--data", "nowhere.npz"], "no such data: 'nowhere.npz'"),
        (["compare", "--runs", "nowhere"], "'nowhere' is not the folder of a run"),
        (["compare", "--lr", "0"], "--lr must be a positive number, got 0.0"),
        (["compare", "--out", "notes.txt"], "--out notes.txt is a file; give a folder"),
        (["compare", "--methods", ","], "--methods is empty"),
        (["evaluate", "nowhere"], "'nowhere' is not the folder of a run: it has no config.json"),
        (["evaluate", "broken"], "'broken/config.json' is not JSON"),
        (["evaluate", "newer"], "has format 2, this version reads format 1"),
        (["evaluate", "foreign"], "is not the configuration of a run"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_users_errors_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    """Proves that what the user can mend ends in one line on standard error and exit code 2, without a traceback."""
    monkeypatch.chdir(tmp_path)
    pd.DataFrame({"a": np.arange(30) / 7, "b": np.arange(30)}).to_csv("table.csv", index=False)
    np.savez("empty.npz")
    Path("notes.txt").write_text("notes")
    for folder, config in (("broken", "{"), ("newer", '{"format": 2}'), ("foreign", '{"format": 1, "options": 3}')):
        Path(folder).mkdir()
        (Path(folder) / "config.json").write_text(config)
    result = run(*arguments, expect=2)
    assert result.stdout == "" and result.stderr.count("\n") == 1
    assert result.stderr.startswith("pyro-bnn: ") and message in result.stderr
    assert not Path("runs").exists(), "nothing was begun"


@pytest.mark.parametrize(
    "arguments",
    [["fit", "--epochs", "0"], ["fit", "--components", "0"], ["fit", "--prior", "flat"], ["fit", "--method", "vi"], []],
    ids=" ".join,
)
def test_options_out_of_range_are_refused(arguments: list[str]) -> None:
    """Proves that numbers and names outside what an option takes end in a usage message with exit code 2."""
    result = run(*arguments, expect=2)
    assert "Usage:" in result.output + result.stderr and "Traceback" not in result.output


def test_evaluate_refuses_data_of_another_shape(digits_run: tuple[Path, str], tmp_path: Path) -> None:
    """Proves that data which the network cannot read are refused with both shapes."""
    folder, _ = digits_run
    result = run("evaluate", folder, "--data", small_npz(tmp_path / "small.npz"), expect=2)
    assert "has shape (2,)" in result.stderr and "takes (1, 8, 8)" in result.stderr


def test_evaluate_refuses_a_broken_posterior(digits_run: tuple[Path, str], tmp_path: Path) -> None:
    """Proves that a run whose posterior is gone or cut short is refused in one line."""
    folder, _ = digits_run
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_bytes((folder / "config.json").read_bytes())
    result = run("evaluate", tmp_path / "run", expect=2)
    assert "posterior" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"{}", b'{"nll": 1.0}', b'{"nll": 1.0, "deterministic": [2]}', b"\xff"]
    + [b'{"nll": "low", "deterministic": {"nll": 1.0}}', b'{"deterministic": {"nll": 1.0}}'],
)
def test_scores_that_are_none_are_one_message(content: bytes, digits_run: tuple[Path, str], tmp_path: Path) -> None:
    """Proves for damage of all kinds that the file is named, and that what it held is not guessed."""
    folder = tmp_path / "run"
    shutil.copytree(digits_run[0], folder)
    require_refused_scores(folder, digits_run[0], content, tmp_path)


def test_a_score_that_was_changed_is_refused(digits_run: tuple[Path, str], tmp_path: Path) -> None:
    """Proves for every bit of one digit of a score that the digest tells what JSON alone cannot."""
    folder = tmp_path / "run"
    shutil.copytree(digits_run[0], folder)
    content = (folder / "metrics.json").read_bytes()
    place = content.index(b".", content.index(b'"nll"')) + 1
    flipped = (content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :] for bit in range(7))
    for damaged in flipped:
        require_refused_scores(folder, digits_run[0], damaged, tmp_path)


def require_refused_scores(folder: Path, other: Path, content: bytes, tmp_path: Path) -> None:
    (folder / "metrics.json").write_bytes(content)
    for command in (
        ("evaluate", folder),
        ("compare", "--runs", folder, "--runs", other, "--out", tmp_path / "c"),
    ):
        result = run(*command, expect=2)
        assert str(folder / "metrics.json") in result.stderr and result.stderr.count("\n") == 1
    assert (folder / "metrics.json").read_bytes() == content


def test_a_run_without_metrics_says_how_to_make_them(digits_run: tuple[Path, str], tmp_path: Path) -> None:
    """Proves that report and compare name the run, what it lacks and the command, and that this command mends it."""
    folder = tmp_path / "run"
    shutil.copytree(digits_run[0], folder)
    (folder / "metrics.json").unlink()
    message = f"the run in {str(folder)!r} has no metrics.json; `pyro-bnn evaluate {folder}` makes one"
    for command in (
        ("report", folder),
        ("compare", "--runs", folder, "--runs", digits_run[0], "--out", tmp_path / "c"),
    ):
        result = run(*command, expect=2)
        assert message in result.stderr and result.stderr.count("\n") == 1
    run("evaluate", folder, "--quiet")
    before = metrics_of(digits_run[0])
    assert metrics_of(folder)["nll"] == before["nll"] and metrics_of(folder)["deterministic"]["nll"]
    run("report", folder, "--quiet")
    assert run("report", folder, "--out", tmp_path, "--overwrite", expect=2).stderr.count("is a folder: give the") == 1


@pytest.mark.parametrize("module", ["pyro_bnn", pytest.param("pyro_bnn.command.cli", marks=pytest.mark.slow)])
def test_the_command_line_is_a_module_too(module: str) -> None:
    result = subprocess.run([sys.executable, "-m", module, "report", "nowhere"], capture_output=True, text=True)
    assert result.returncode == 2 and "'nowhere' is not the folder of a run" in result.stderr


def test_help_needs_neither_torch_nor_pyro_and_knows_every_command() -> None:
    """Proves that the list of commands is shown in a moment, and is that of the commands there are."""
    code = "import sys; from pyro_bnn.command import cli; print(*cli.COMMANDS, *{'torch', 'pyro'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert shown == [getattr(c.callback, "__name__", None) for c in commands.app.registered_commands]
    helped = run("--help").output
    assert all(f"{name} " in helped for name in shown)
    assert all(text.split(".")[0].split()[0] == _first_word(name) for name, text in COMMANDS.items())


def _first_word(command: str) -> str:
    """Of what the command itself says it does."""
    callback = next(c.callback for c in commands.app.registered_commands if c.callback.__name__ == command)
    return str(callback.__doc__).split()[0]


@pytest.mark.parametrize(("rows", "asked", "size"), [(100, None, 25), (256, None, 64), (3, None, 1), (100, 64, 64)])
def test_few_rows_are_passed_in_four_steps_or_more(rows: int, asked: int | None, size: int) -> None:
    """Proves the default of --batch-size, and that one which is given stands."""
    task = data.digits()
    few = dataclasses.replace(task, x_train=task.x_train[:rows], y_train=task.y_train[:rows])
    given = {"data": "digits", "epochs": 1, "batch_size": asked, "lr": 0.1, "seed": 0, "device": "cpu"}
    assert complete("rank1", given, few).batch_size == size


def test_a_method_has_its_own_options_alone() -> None:
    """Proves that a page shows no option of another method, nor what stands for nothing."""
    task = data.digits()
    asked = {"data": "digits", "epochs": 1, "batch_size": 8, "lr": 0.1, "seed": 0, "device": "cpu"}
    common = {*asked, "method", "network", "prior"}
    own: dict[MethodName, set[str]] = {
        "rank1": {"components", "family", "samples"},
        "dense": {"components", "samples"},
        "spike-slab": {"sparsity", "temperature", "samples", "group"},
        "bella": {"particles", "rank", "update"},
        "weight-sharing": {"codes", "sampling", "samples"},
    }
    for method, names in own.items():
        assert set(complete(method, asked, task).used()) == common | names
    given = complete("bella", asked | {"pretrained": "runs", "target": "y"}, task).used()
    assert given["pretrained"] == "runs" and given["target"] == "y"
    assert "group" in complete("dense", asked | {"prior": "spike-and-slab"}, task).used()


def test_report_has_every_number_of_the_run_and_no_other(digits_run: tuple[Path, str], tmp_path: Path) -> None:
    """Proves that the page of a run is whole, equals metrics.json in every number, and is not replaced unasked."""
    folder, _ = digits_run
    assert "Saved" in run("report", folder, "--out", tmp_path / "page.html").output
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    reader = require_self_contained(html)
    assert len(html) < 3_000_000
    metrics = metrics_of(folder)
    networks = {"Bayesian": metrics, "deterministic": metrics["deterministic"]}
    expected = {
        (name, network): value
        for network, found in networks.items()
        for name, value in found.items()
        if isinstance(value, (int, float))
    }
    assert reader.numbers() == expected and len(expected) == 2 * len(MEASURED | COST)
    settings = reader.text[reader.text.index("How it was made") :]
    assert "components" in settings and "particles" not in settings and "None" not in settings
    assert "digits: rank1, 4 components" in reader.text and f"{metrics['nll']:.4f}" in reader.text
    assert reader.text.index("Findings") < reader.text.index("NLL") < reader.text.index("Pictures")
    result = run("report", folder, "--out", tmp_path / "page.html", expect=2)
    assert "exists already; give another --out, or --overwrite" in result.stderr and result.stderr.count("\n") == 1
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == html


def test_compare_trains_the_twin_once_and_takes_up_where_it_was_stopped(tmp_path: Path) -> None:
    """Proves that methods share one twin and test data, that each is what `fit` gives, and that only what is missing is
    trained again."""
    source, folder = small_npz(tmp_path / "small.npz"), tmp_path / "all"
    common = ("--data", source, "--epochs", 2)
    output = run("compare", *common, "--methods", "rank1,bella", "--out", folder).output
    assert output.count("PointGuide") == 1 and "already finished" not in output and "NLL − best" in output
    run("fit", *common, "--method", "bella", "--out", tmp_path / "fit", "--quiet")
    both = {name: metrics_of(folder / name) for name in ("rank1", "bella")}
    assert without_seconds(both["bella"]) == without_seconds(metrics_of(tmp_path / "fit"))
    found = metrics_of(folder, "comparison.json")
    assert set(found["metrics"]) == {"rank1", "bella", "deterministic"} == set(found["nll_difference"])
    assert set(found["settings"]) == {"data", "network", "epochs", "batch_size", "lr", "seed", "device"}
    for name, metrics in both.items():
        assert found["metrics"][name] == {key: value for key, value in metrics.items() if key != "deterministic"}
    reader = require_self_contained((folder / "comparison.html").read_text(encoding="utf-8"))
    expected = {
        (name, of): value
        for of, all_ in found["metrics"].items()
        for name, value in all_.items()
        if isinstance(value, (int, float))
    }
    expected |= {("nll_difference", of): gap["mean"] for of, gap in found["nll_difference"].items()}
    assert reader.numbers() == expected
    best = min(found["metrics"], key=lambda name: found["metrics"][name]["nll"])
    for name, gap in found["nll_difference"].items():
        assert gap["mean"] == pytest.approx(found["metrics"][name]["nll"] - found["metrics"][best]["nll"], abs=1e-6)

    again = ("compare", *common, "--methods", "rank1", "--methods", "bella", "--out", folder)
    assert "already holds a comparison; give another --out" in run(*again, expect=2).stderr
    (folder / "comparison.json").unlink()
    (folder / "rank1" / "config.json").unlink()
    kept = (folder / "bella" / "metrics.json").stat().st_mtime_ns
    output = run(*again).output
    assert "bella: already finished" in output and "Rank1 with Rank1Guide" in output and "PointGuide" not in output
    assert (folder / "bella" / "metrics.json").stat().st_mtime_ns == kept
    assert without_seconds(metrics_of(folder, "comparison.json")) == without_seconds(found)

    (folder / "comparison.json").unlink()
    other = run("compare", "--data", source, "--epochs", 1, "--methods", "rank1,bella", "--out", folder, expect=2)
    assert "holds a run with other options (epochs 2, not 1)" in other.stderr and other.stderr.count("\n") == 1

    runs = ("--runs", folder / "rank1", "--runs", tmp_path / "fit")
    assert "deterministic" in run("compare", *runs, "--out", tmp_path / "given").output
    assert set(metrics_of(tmp_path / "given", "comparison.json")["metrics"]) == {"rank1", "fit", "deterministic"}
    with np.load(source) as arrays:
        np.savez(tmp_path / "other.npz", **{**arrays, "y_test": 1 - arrays["y_test"]})
    differing = run("compare", *runs, "--data", tmp_path / "other.npz", "--out", tmp_path / "no", expect=2)
    assert "needs the same test data for all" in differing.stderr and differing.stderr.count("\n") == 1
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_rank1_beats_the_deterministic_network_on_all_digits(tmp_path: Path) -> None:
    """Proves: over five seeds the mean NLL lies below that of the deterministic network trained with the same budget,
    with accuracy of at least 98 % and ECE of at most 0.02 for every seed."""
    found = []
    for seed in range(5):
        run(*DIGITS, "--seed", seed, "--out", tmp_path / str(seed), "--quiet")
        found.append(metrics_of(tmp_path / str(seed)))
    assert np.mean([m["nll"] for m in found]) < np.mean([m["deterministic"]["nll"] for m in found])
    assert min(m["accuracy"] for m in found) >= 0.98
    assert max(m["ece"] for m in found) <= 0.02


@pytest.mark.slow
def test_the_default_run_beats_the_deterministic_network_where_data_are_unlike_those_of_training(
    tmp_path: Path,
) -> None:
    """Proves the default command's promise: over ten seeds a lower NLL of corrupted images and a higher AUROC than the
    deterministic network with the same budget, by more than two standard errors of the difference, and an NLL of clean
    images that is not higher by as much."""
    found = []
    for seed in range(10):
        run("fit", "--seed", seed, "--out", tmp_path / str(seed), "--quiet")
        found.append(metrics_of(tmp_path / str(seed)))

    def in_errors(name: str) -> float:
        gaps = [m[name] - m["deterministic"][name] for m in found]
        return float(np.mean(gaps) / (np.std(gaps, ddof=1) / len(gaps) ** 0.5))

    assert in_errors("cNLL") < -2 and in_errors("ood_auroc") > 2 and in_errors("nll") < 2


def test_console_script_is_installed() -> None:
    """Proves that installation puts `pyro-bnn` on the path of its environment."""
    import importlib.metadata

    (script,) = importlib.metadata.entry_points(group="console_scripts", name="pyro-bnn")
    assert script.load() is app
    assert "pyro_bnn" in os.fspath(Path(pb.__file__).parent)
