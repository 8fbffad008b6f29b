"""What version 0.1.0 saved still loads, and predicts what it predicted then; make.py says how the files were made.

Posteriors and adapters are loaded into networks with other weights than those they were saved with, where all weights
come from the file. Files are copied before anything is written beside them.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from saved.networks import NETWORKS, ROWS, TARGETS, inputs
from typer.testing import CliRunner

import pyro_bnn as pb
from pyro_bnn.command.cli import app

HERE = Path(__file__).parent
EXPECTED: dict[str, Any] = json.loads((HERE / "expected.json").read_text())
RUNS = ("rank1", "images", "dense", "regression", "spike-slab", "bella", "weight-sharing")
#: what training found, which evaluation leaves as it is
OF_TRAINING = {"seconds", "trainable_parameters", "sparsity", "compression", "bits_per_coded_weight"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    with tarfile.open(HERE / "files.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def require_close(found: Any, expected: Any, name: str = "") -> None:
    """Numbers, and lists and dicts of them, up to the rounding of single precision on another processor."""
    if isinstance(expected, dict):
        for key, value in expected.items():
            require_close(found[key], value, f"{name}.{key}")
        return
    if expected is None or isinstance(expected, str):
        assert found == expected, name
        return
    found, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (found, expected))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=lambda text: f"{name}: {text}")


def require_predictions(posterior: pb.Posterior, network: str, expected: dict[str, Any]) -> None:
    predicted = posterior.predict(inputs(network, 4, seed=3), num_samples=expected["num_samples"], seed=0)
    for what in ("mean", "aleatoric", "epistemic"):
        if what in expected:
            require_close(getattr(predicted, what), expected[what], what)


def test_the_files_are_of_the_first_version_of_each_format(files: Path) -> None:
    for path in files.glob("posteriors/*/posterior.json"):
        content = json.loads(path.read_text())
        assert (content["format"], content["version"]) == ("pyro_bnn posterior", 1)
    for path in files.glob("checkpoints/*/*.pt"):
        content = torch.load(path, weights_only=True)
        assert (content["format"], content["version"]) == ("pyro_bnn checkpoint", 1)
    for path in files.glob("runs/*/config.json"):
        assert json.loads(path.read_text())["format"] == 1
    assert {path.name for path in files.glob("posteriors/*")} == EXPECTED["posteriors"].keys()
    assert {path.parent.name for path in files.glob("runs/*/config.json")} == set(RUNS)


# ------------------------------------------------------------------------------------------------ posteriors


def load(folder: Path) -> pb.Posterior:
    """A saved posterior, on a network that has other weights."""
    options: dict[str, Any] = {"prior": dist.Laplace(0.0, 0.5)} if folder.name == "without_prior" else {}
    return pb.load(folder, NETWORKS[EXPECTED["posteriors"][folder.name]["network"]](2), **options)


@pytest.mark.parametrize("name", EXPECTED["posteriors"])
def test_a_saved_posterior_predicts_as_it_did(name: str, files: Path) -> None:
    expected = EXPECTED["posteriors"][name]
    require_predictions(load(files / "posteriors" / name), expected["network"], expected)


@pytest.mark.parametrize("name", EXPECTED["posteriors"])
def test_a_saved_posterior_has_the_joint_density_it_had(name: str, files: Path) -> None:
    """Which model, prior, likelihood and size of the data are all in."""
    expected, posterior = EXPECTED["posteriors"][name], load(files / "posteriors" / name)
    draw = {site: value[0, 0] for site, value in posterior.draws(1, seed=0).items()}
    x, y = inputs(expected["network"]), TARGETS.get(expected["targets"])
    with torch.no_grad():
        trace = poutine.trace(poutine.condition(posterior.model, draw)).get_trace(x, y)
        found = trace.log_prob_sum(lambda name, site: site["is_observed"] or name in draw)
    require_close(found, expected["log_joint"])


@pytest.mark.parametrize("name", EXPECTED["posteriors"])
def test_a_saved_posterior_knows_where_it_came_from(name: str, files: Path) -> None:
    expected, posterior = EXPECTED["posteriors"][name], load(files / "posteriors" / name)
    assert posterior.num_members == expected["members"] and posterior.num_stored == expected["stored"]
    assert posterior.num_chains == expected["chains"] and posterior.is_sampled == expected["sampled"]
    assert posterior.is_deterministic == expected["points"]
    assert posterior.losses == expected["losses"] and posterior.sampler == expected["sampler"]


@pytest.mark.parametrize("name", [name for name, one in EXPECTED["posteriors"].items() if "inclusion" in one])
def test_a_saved_spike_and_slab_posterior_has_the_inclusion_probabilities_it_had(name: str, files: Path) -> None:
    found = load(files / "posteriors" / name).inclusion_probabilities(3, seed=0)
    require_close(found, EXPECTED["posteriors"][name]["inclusion"])


@pytest.mark.parametrize("name", [name for name, one in EXPECTED["posteriors"].items() if "compression" in one])
def test_a_saved_codebook_takes_the_bytes_it_took(name: str, files: Path) -> None:
    guide: Any = load(files / "posteriors" / name).guide
    require_close(guide.compression_report(), EXPECTED["posteriors"][name]["compression"])


def test_a_codebook_was_saved_with_labels_of_both_kinds(files: Path) -> None:
    """Of a fixed width and entropy coded, so that the tests above read both."""
    coded = [EXPECTED["posteriors"][f"weight_sharing_by_{name}"]["compression"] for name in ("codebook", "mixture")]
    assert coded[0]["label_bits"] != 3 and coded[1]["label_bits"] >= 3
    assert all(one["between"] and one["outliers"] for one in coded)


def test_a_posterior_saved_without_its_prior_asks_for_it(files: Path) -> None:
    with pytest.raises(ValueError, match="saved without its prior"):
        pb.load(files / "posteriors" / "without_prior", NETWORKS["table"](2))


@pytest.mark.parametrize("name", ["chain_of_sghmc", "mean_field_with_noise"])
def test_a_posterior_of_before_samplers_were_described_loads(name: str, files: Path, tmp_path: Path) -> None:
    """The first files of version 1 lack two entries."""
    folder = shutil.copytree(files / "posteriors" / name, tmp_path / name)
    content = json.loads((folder / "posterior.json").read_text())
    del content["sampler"]
    content["guide"].pop("sampled", None)
    (folder / "posterior.json").write_text(json.dumps(content))
    expected, posterior = EXPECTED["posteriors"][name], load(folder)
    require_predictions(posterior, expected["network"], expected)
    assert posterior.is_sampled == expected["sampled"] and posterior.sampler == {}


# -------------------------------------------------------------------------------------------------- adapters


def adapted() -> tuple[pb.models.Bella, pb.models.ParticleGuide]:
    options: dict[str, Any] = {"select": ["conv"], "head": "head", "affine": True}
    model = pb.models.Bella(NETWORKS["images"](1), pb.likelihoods.Categorical(), ROWS, rank=2, **options)
    return model, pb.models.ParticleGuide(model, 2)


def test_saved_adapters_predict_as_they_did(files: Path) -> None:
    model, guide = adapted()
    pb.models.load_adapters(model, guide, [files / "adapters" / f"particle_{i}" for i in range(2)])
    require_predictions(pb.Posterior(model, guide), "images", EXPECTED["adapters"])


# ----------------------------------------------------------------------------------------------- checkpoints


def run_rank1(data: Any, epochs: int, **options: Any) -> pb.Posterior:
    model = pb.models.Rank1(NETWORKS["images"](1), pb.likelihoods.Categorical(), ROWS)
    guide = pb.models.Rank1Guide(model, components=2)
    options |= {"schedule": pb.inference.cosine(warmup=1.0), "kl_annealing": 3.0}
    return pb.inference.fit(model, guide, data, epochs=epochs, **options)


def run_weight_sharing(data: Any, epochs: int, **options: Any) -> pb.Posterior:
    prior = {r".*weight": pb.priors.CodebookPrior(), ".*": pb.priors.Normal()}
    model = pb.models.WeightSharing(NETWORKS["table"](1), pb.likelihoods.Categorical(), ROWS, prior=prior)
    guide = pb.models.CodebookGuide(model, codes=6, blend=0.1, outliers=0.1, init_scale=0.1)
    callbacks = [pb.models.MergeCodes(tightness=0.5), *options.pop("callbacks")]
    return pb.inference.fit(model, guide, data, epochs=epochs, optim="sgd", callbacks=callbacks, **options)


def dense() -> pb.models.Dense:
    return pb.models.Dense(NETWORKS["table"](1), pb.likelihoods.Categorical(), ROWS)


def run_autoguide(data: Any, epochs: int, **options: Any) -> pb.Posterior:
    model = dense()
    return pb.inference.fit(model, AutoNormal(model, init_scale=0.1), data, epochs=epochs, **options)


def run_svgd(data: Any, epochs: int, **options: Any) -> pb.Posterior:
    model, guide = adapted()
    return pb.inference.SVGD(model, guide, lr=options.pop("lr")).fit(data, epochs, **options)


def run_svgd_of_any_model(data: Any, epochs: int, **options: Any) -> pb.Posterior:
    model = dense()
    guide = pb.inference.AutoParticles(model, 2)
    return pb.inference.SVGD(model, guide, lr=options.pop("lr")).fit(data, epochs, **options)


def run_ensemble(data: Any, epochs: int, **options: Any) -> pb.Posterior:
    engine = pb.inference.DeepEnsemble(NETWORKS["images"](1), pb.likelihoods.Categorical(), ROWS, num_networks=2)
    return engine.fit(data, epochs=epochs, **options)


def run_dropout(data: Any, epochs: int, **options: Any) -> pb.Posterior:
    engine = pb.inference.MCDropout(NETWORKS["dropping"](1), pb.likelihoods.Categorical(), ROWS)
    return engine.fit(data, epochs=epochs, **options)


def run_laplace(data: Any, epochs: int, **options: Any) -> pb.Posterior:
    engine = pb.inference.LastLayerLaplace(NETWORKS["table"](1), pb.likelihoods.Categorical(), ROWS)
    return engine.fit(data, epochs=epochs, **options)


ENGINES: dict[str, Callable[..., pb.Posterior]] = {
    "rank1": run_rank1,
    "weight_sharing": run_weight_sharing,
    "autoguide": run_autoguide,
    "svgd": run_svgd,
    "svgd_of_any_model": run_svgd_of_any_model,
    "ensemble": run_ensemble,
    "dropout": run_dropout,
    "laplace": run_laplace,
}


@pytest.mark.parametrize("name", EXPECTED["checkpoints"])
@pytest.mark.parametrize(("when", "epochs", "seen"), [("stopped", 2, []), ("finished", 4, [3, 4])])
def test_a_stopped_run_goes_on_to_the_end_it_had(
    name: str, when: str, epochs: int, seen: list[int], files: Path, tmp_path: Path
) -> None:
    """Of two epochs nothing is left to do, and the posterior is that of the checkpoint itself; of four there is."""
    expected, ended = EXPECTED["checkpoints"][name], []
    checkpoint = shutil.copytree(files / "checkpoints" / name, tmp_path / name) / "run.pt"
    options: dict[str, Any] = {"batch_size": 6, "lr": 0.02, "progress": False, "seed": 0}
    options["callbacks"] = [lambda state: ended.append(state.epoch)]
    data = inputs(expected["network"]), TARGETS["labels"]
    torch.manual_seed(2)
    posterior = ENGINES[name](data, epochs, checkpoint=checkpoint, **options)
    assert ended == seen
    require_close(posterior.losses, expected[when]["losses"], "losses")
    require_predictions(posterior, expected["network"], expected[when])


# -------------------------------------------------------------------------------------- runs of the command line


def evaluated(run: Path) -> dict[str, Any]:
    """The metrics that `pyro-bnn evaluate` finds."""
    (run / "metrics.json").unlink()
    result = CliRunner().invoke(app, ["evaluate", run.name, "--device", "cpu"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads((run / "metrics.json").read_text())


@pytest.fixture
def runs(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run folders, in which their relative paths of data lead somewhere."""
    folder = shutil.copytree(files / "runs", tmp_path / "runs")
    monkeypatch.chdir(folder)
    return folder


def require_metrics(found: dict[str, Any], before: dict[str, Any]) -> None:
    twin = before.pop("deterministic")
    require_close(found, {name: value for name, value in before.items() if name not in OF_TRAINING})
    require_close(found["deterministic"], {name: value for name, value in twin.items() if name not in OF_TRAINING})


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_the_command_line_is_evaluated_as_it_was(name: str, runs: Path) -> None:
    before = json.loads((runs / name / "metrics.json").read_text())
    require_metrics(evaluated(runs / name), before)


def test_a_run_of_before_there_were_all_methods_is_evaluated(runs: Path) -> None:
    """Its options lack those of later methods."""
    before = json.loads((runs / "rank1" / "metrics.json").read_text())
    path = runs / "rank1" / "config.json"
    config = json.loads(path.read_text())
    for option in ("particles", "rank", "update", "pretrained", "codes", "sampling"):
        del config["options"][option]
    path.write_text(json.dumps(config))
    require_metrics(evaluated(path.parent), before)


@pytest.mark.parametrize(("name", "new"), [("rank1", "labels.csv"), ("regression", "numbers.csv")])
def test_a_run_of_before_predicts_new_rows(name: str, new: str, runs: Path) -> None:
    """Proves that columns are found by name without what newer runs know of them, the target standing among them."""
    table = pb.predict(runs / name, runs / new)
    with open(runs / new) as file:
        assert len(table) == len(file.readlines()) - 1
    assert table.select_dtypes("number").notna().all(axis=None)
