"""`pyro-bnn predict` and `pb.predict`: rows without a target, in the units of the training file."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from command_runs import run
from PIL import Image

import pyro_bnn as pb
from pyro_bnn.models import architectures

SHORT = ("--method", "dense", "--epochs", 3, "--batch-size", 64, "--samples", 3, "--quiet")


def houses(rows: int = 60) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"size": rng.normal(50, 10, rows), "kind": rng.choice(["cat", "dog"], rows)})
    return frame.assign(price=1000 + 30 * frame["size"] + rng.normal(size=rows))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on a table with numbers and with classes, on arrays and on images, and their data."""
    folder = tmp_path_factory.mktemp("runs")
    houses().to_csv(folder / "houses.csv", index=False)
    run("fit", "--data", folder / "houses.csv", "--target", "price", "--out", folder / "price", *SHORT)
    run("fit", "--data", folder / "houses.csv", "--target", "kind", "--out", folder / "kind", *SHORT)
    x = np.random.default_rng(0).integers(0, 256, (20, 8, 8)).astype(np.uint8)
    np.savez(folder / "pixels.npz", x_train=x, x_test=x[:6], y_train=np.arange(20) % 2, y_test=np.arange(6) % 2)
    run("fit", "--data", folder / "pixels.npz", "--network", "mlp", "--out", folder / "pixels", *SHORT)
    for name, colour in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
        (folder / "images" / name).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (8, 8), colour).save(folder / "images" / name / f"{i}.png")
    run("fit", "--data", folder / "images", "--network", "mlp", "--out", folder / "colours", *SHORT)
    return folder


def test_numbers_are_in_the_unit_of_the_training_file(runs: Path, tmp_path: Path) -> None:
    """Proves that mean, spreads and interval are those of the posterior, scaled back, and that a file, the console and
    Python say the same."""
    new = tmp_path / "new.csv"
    houses()[["kind", "size"]].head(7).to_csv(new, index=False)
    run("predict", runs / "price", new, "--out", tmp_path / "out.csv")
    table = pd.read_csv(tmp_path / "out.csv")
    assert list(table) == ["mean", "std", "aleatoric_std", "epistemic_std", "2.5%", "97.5%"] and len(table) == 7
    encoding = pb.data.Encoding.from_json(json.loads((runs / "price" / "config.json").read_text())["encoding"])
    x = pb.data.load_inputs(new, encoding).x
    raw = pb.load(runs / "price").predict(x, num_samples=3, seed=0).to_dataframe()
    np.testing.assert_allclose(table["mean"], raw.iloc[:, 0] * encoding.y_scale + encoding.y_mean, rtol=1e-6)
    np.testing.assert_allclose(table["std"], raw.iloc[:, 1] * encoding.y_scale, rtol=1e-6)
    np.testing.assert_allclose(table["std"] ** 2, table["aleatoric_std"] ** 2 + table["epistemic_std"] ** 2, rtol=1e-5)
    assert (table["2.5%"] < table["mean"]).all() and (table["mean"] < table["97.5%"]).all()
    printed = pd.read_csv(io.StringIO(run("predict", runs / "price", new).stdout))
    pd.testing.assert_frame_equal(printed, table)
    pd.testing.assert_frame_equal(pb.predict(runs / "price", new), table)
    narrow = pb.predict(runs / "price", new, level=0.5)
    assert (narrow["75%"] < table["97.5%"]).all()


def test_classes_have_their_names_and_entropy_its_parts(runs: Path) -> None:
    table = pb.predict(runs / "kind", runs / "houses.csv")
    assert list(table) == ["class", "p_cat", "p_dog", "entropy", "aleatoric", "epistemic"] and len(table) == 60
    np.testing.assert_allclose(table["p_cat"] + table["p_dog"], 1, rtol=1e-6)
    np.testing.assert_allclose(table["entropy"], table["aleatoric"] + table["epistemic"], atol=1e-6)
    assert (table["class"] == np.where(table["p_cat"] >= table["p_dog"], "cat", "dog")).all()


@pytest.mark.parametrize("count", [0, 1, 3])
def test_any_number_of_rows(runs: Path, tmp_path: Path, count: int) -> None:
    """Proves that a file with few rows, or a header alone, gives as many rows and the same columns."""
    for name in ("price", "kind"):
        houses().drop(columns=name).head(count).to_csv(tmp_path / "new.csv", index=False)
        table = pb.predict(runs / name, tmp_path / "new.csv")
        assert len(table) == count and list(table) == list(pb.predict(runs / name, runs / "houses.csv"))
        again = pb.predict(runs / name, runs / "houses.csv").head(count)
        # epistemic is a difference of entropies, each of which float32 rounds by some 1e-7 nats
        pd.testing.assert_frame_equal(table, again, check_dtype=False, atol=1e-6)
    np.save(tmp_path / "new.npy", np.zeros((count, 8, 8), np.uint8))
    assert len(pb.predict(runs / "pixels", tmp_path / "new.npy")) == count


def test_images_have_their_files(runs: Path) -> None:
    table = pb.predict(runs / "colours", runs / "images")
    assert table["file"][0] == "blue/0.png" and len(table) == 12
    one = pb.predict(runs / "colours", runs / "images" / "red" / "0.png")
    assert one["file"].tolist() == ["0.png"] and one["p_red"][0] == pytest.approx(table["p_red"][6], abs=1e-6)


def test_a_run_folder_is_loaded_with_and_without_a_network(runs: Path) -> None:
    """Proves that the run, its posterior and its twin are found, and that anything else says what is missing."""
    x = torch.zeros(2, 1, 8, 8)
    expected = pb.load(runs / "pixels").predict(x, seed=0).probs
    net = architectures.mlp(64, (128, 128), 2)
    for given in (pb.load(runs / "pixels", net), pb.load(runs / "pixels" / "posterior")):
        assert torch.equal(given.predict(x, seed=0).probs, expected)
    assert pb.load(runs / "pixels" / "deterministic").is_deterministic
    with pytest.raises(ValueError, match="is not a run folder, which would know its network"):
        pb.load(runs / "images")
    with pytest.raises(FileNotFoundError, match="there is no posterior at"):
        pb.load(runs / "nowhere")


BAD: dict[str, tuple[str, str, str | bytes, str]] = {
    "missing column": ("price", "n.csv", "kind\ncat\n", "column 'size', on which the network was trained, is missing"),
    "extra column": ("price", "n.csv", "kind,size,b\ncat,1,1\n", "column 'b' did not occur in training"),
    "bad cell": ("price", "n.csv", "kind,size\ncat,1\ncat,big\n", "'big' in row 2 (line 3)"),
    "missing cell": ("price", "n.csv", "kind,size\ncat,\n", "values are missing in size (1): row 1"),
    "unknown category": ("price", "n.csv", "kind,size\ncow,1\n", "column 'kind' has 'cow' in row 1"),
    "infinite": ("price", "n.csv", "kind,size\ncat,inf\n", "'inf' in row 1"),
    "too large": ("price", "n.csv", "kind,size\ncat,1e300\n", "too large for float32"),
    "empty": ("price", "n.csv", "", "it is empty"),
    "ragged": ("price", "n.csv", "kind,size\ncat,1,2\n", "line 2 has 3 cells"),
    "latin 1": ("price", "n.csv", b"kind,size\n\xe9,1\n", "line 2 is not UTF-8"),
    "binary": ("price", "n.csv", b"kind,size\n\0,1\n", "line 2 holds a zero byte"),
    "open quote": ("price", "n.csv", 'kind,size\n"cat,1\n', "is a quote open"),
    "duplicate": ("price", "n.csv", "kind,size,size\ncat,1,1\n", "two columns have the name 'size'"),
    "semicolons": ("price", "n.csv", "kind;size\ncat;1\n", "expected commas"),
    "another kind of file": ("price", "n.npz", b"", "the network was trained on a .csv file; give one"),
    "an unknown kind of file": ("price", "n.xlsx", b"", "the network was trained on a .csv file; give one"),
    "no archive": ("pixels", "n.npz", b"no archive", "it is not an .npz file of plain arrays"),
    "empty archive": ("pixels", "n.npz", b"", "it is not an .npz file of plain arrays"),
    "cut archive": ("pixels", "n.npz", b"PK\x03\x04 cut short", "it is not an .npz file of plain arrays"),
    "no array": ("pixels", "n.npy", b"\x93NUMPY", "it is not an .npz file of plain arrays"),
    "a table for arrays": ("pixels", "n.csv", "a\n1\n", "the network was trained on arrays"),
    "an image for arrays": ("pixels", "n.png", b"", "the network was trained on arrays"),
    "no image": ("colours", "n.png", b"no image", "is not an image, or is damaged"),
    "empty image": ("colours", "n.png", b"", "is not an image, or is damaged"),
    "cut image": ("colours", "n.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "is not an image, or is damaged"),
    "a table for images": ("colours", "n.csv", "a\n1\n", "give an .npz file"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_message_and_exit_code_2(runs: Path, tmp_path: Path, name: str) -> None:
    which, file, content, message = BAD[name]
    (tmp_path / file).write_bytes(content.encode() if isinstance(content, str) else content)
    result = run("predict", runs / which, tmp_path / file, "--out", tmp_path / "out.csv", expect=2)
    assert message in result.stderr and result.stderr.count("\n") == 1 and file in result.stderr
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": np.zeros((2, 8, 8), np.uint8), "b": np.zeros(2)}, "expected one array, or the new rows under the name"),
        ({"x": np.zeros((2, 9, 9), np.uint8)}, "a row of x has shape (1, 9, 9), the network takes (1, 8, 8)"),
        ({"x": np.full((2, 1, 8, 8), 0.5)}, "give it in the same dtype"),
        ({"x": np.full((2, 1, 8, 8), np.nan)}, "NaN or infinite values in row 1, 2"),
        ({"x": np.array(["a"])}, "must hold numbers"),
        ({"x": np.array([{}], dtype=object)}, "it is not an .npz file of plain arrays"),
    ],
)
def test_bad_arrays_are_one_message(runs: Path, tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "n.npz", **arrays)
    result = run("predict", runs / "pixels", tmp_path / "n.npz", expect=2)
    assert message in result.stderr and result.stderr.count("\n") == 1


def test_wrong_calls_are_one_message(runs: Path, tmp_path: Path) -> None:
    new = runs / "houses.csv"
    (tmp_path / "there.csv").write_text("mine")
    for arguments, message in (
        ((runs / "nowhere", new), "is not the folder of a run"),
        ((runs / "price", "nowhere.csv"), "there is nothing at 'nowhere.csv'"),
        ((runs / "price", new, "--out", tmp_path / "there.csv"), "exists already; give another --out"),
        ((runs / "price", new, "--out", tmp_path), "is a folder; give a file"),
        ((runs / "price", new, "--level", 1), "level=1.0: expected a number in (0, 1)"),
        ((runs / "price", new, "--drop", "c"), "there is no column 'c'"),
        ((runs / "pixels", runs / "pixels.npz", "--drop", "c"), "--drop is for a .csv file"),
    ):
        result = run("predict", *arguments, expect=2)
        assert message in result.stderr and result.stderr.count("\n") == 1
    assert (tmp_path / "there.csv").read_text() == "mine"


def test_options_of_reading_reach_the_run_and_are_kept(tmp_path: Path) -> None:
    """Proves that a run with every option is evaluated to the same numbers, and predicts where cells are empty."""
    frame = houses().assign(part=["train"] * 40 + ["test"] * 20, other=1, code=[10, 20] * 30).astype({"size": object})
    frame.loc[[2, 50], "size"] = ""
    frame.to_csv(tmp_path / "a.csv", index=False)
    reading = ("--drop", "other", "--split", "part", "--category", "code", "--impute", "--task", "regression")
    run("fit", "--data", tmp_path / "a.csv", "--target", "price", *reading, "--out", tmp_path / "run", *SHORT)
    before = (tmp_path / "run" / "metrics.json").read_text()
    run("evaluate", tmp_path / "run", "--quiet")
    assert (tmp_path / "run" / "metrics.json").read_text() == before
    (tmp_path / "b.csv").write_text("code,size,kind\n10,,cat\n20,50,dog\n")
    assert len(pb.predict(tmp_path / "run", tmp_path / "b.csv")) == 2


def test_what_fit_left_out_or_found_missing_is_said(tmp_path: Path) -> None:
    """Proves that notes are printed, and that faults of a training file are one message before anything is begun."""
    houses().to_csv(tmp_path / "a.csv")
    common = ("--target", "kind", "--epochs", 1, "--samples", 1, "--method", "dense", "--out", tmp_path / "run")
    assert (
        "Note: column '' counts the rows and was left out" in run("fit", "--data", tmp_path / "a.csv", *common).output
    )
    frame = houses().astype({"size": object})
    frame.loc[4, "size"] = "?"
    frame.to_csv(tmp_path / "b.csv", index=False)
    refused = ("fit", "--data", tmp_path / "b.csv", "--target", "price", "--out", tmp_path / "no")
    result = run(*refused, expect=2)
    assert "row 5 (line 6)" in result.stderr and result.stderr.count("\n") == 1 and not (tmp_path / "no").exists()
    other = run("evaluate", tmp_path / "run", "--data", tmp_path / "b.csv", expect=2)
    assert "row 5 (line 6)" in other.stderr and other.stderr.count("\n") == 1


def test_encodings_survive_json(runs: Path) -> None:
    for name in ("price", "kind", "pixels", "colours"):
        encoding = pb.data.Encoding.from_json(json.loads((runs / name / "config.json").read_text())["encoding"])
        assert pb.data.Encoding.from_json(json.loads(json.dumps(dataclasses.asdict(encoding)))) == encoding
