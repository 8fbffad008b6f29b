"""Makes the files that test_saved_before.py reads: files.tar.xz, and what was predicted from them, expected.json.

It was run with the code of commit 53c5958 (version 0.1.0, with torch 2.14), and says by which calls the files were
made. They are not to be made anew by later code: that they are of earlier code is what they are for. To make them
again, check that commit out and run in ``tests/``::

    OMP_NUM_THREADS=1 python -m saved.make

All formats are at their version 1. The archive holds

- ``posteriors/NAME/``: what ``posterior.save`` wrote, one for each model, guide and engine;
- ``adapters/particle_I/``: what ``pb.models.save_adapters`` wrote;
- ``checkpoints/NAME/``: what an engine with ``checkpoint=`` left when it was stopped after half of its epochs;
- ``runs/``: a run folder of `pyro-bnn fit` for each method, without what `pyro-bnn evaluate` does not read, and its
  data. The networks of the command line have thousands of weights, which are rounded here so that they take less
  space; metrics.json is what `pyro-bnn evaluate` gave after that.
"""

from __future__ import annotations

import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro.distributions as dist
import safetensors.torch
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoNormal
from saved.networks import NETWORKS, ROWS, TARGETS, inputs, numbers
from torch import Tensor
from typer.testing import CliRunner

import pyro_bnn as pb
from pyro_bnn.cli import app
from pyro_bnn.inference import SGHMC, SGHMCEM, SVGD, SWAG, AutoParticles, DeepEnsemble, LastLayerLaplace, MCDropout
from pyro_bnn.likelihoods import Bernoulli, Categorical, Gaussian, HeteroscedasticGaussian, Poisson
from pyro_bnn.models import (
    Bella,
    CodebookGuide,
    Dense,
    MeanFieldGuide,
    MergeCodes,
    ParticleGuide,
    PointGuide,
    Rank1,
    Rank1Guide,
    SharedWeights,
    SpikeSlab,
    WeightSharing,
    save_adapters,
)
from pyro_bnn.priors import (
    Cauchy,
    GaussianMixture,
    HierarchicalCauchy,
    HierarchicalNormal,
    Horseshoe,
    InverseGamma,
    Laplace,
    Normal,
    SpikeAndSlab,
    StudentT,
)

HERE = Path(__file__).parent
QUIET: dict[str, Any] = {"progress": False, "seed": 0}
SHORT: dict[str, Any] = {"epochs": 2, "batch_size": 6, "lr": 0.02} | QUIET
CODES = {r".*weight": GaussianMixture(), ".*": Normal()}

# ------------------------------------------------------------------------------------------------ posteriors

#: ``{name: (function that makes it, network, targets)}``
POSTERIORS: dict[str, tuple[Callable[[Any, Any], pb.Posterior], str, str]] = {}


def made_on(network: str, targets: str = "labels") -> Callable[[Any], Any]:
    """Decorator of a function ``(net, (x, y)) -> posterior``."""

    def register(make: Any) -> Any:
        POSTERIORS[make.__name__] = make, network, targets
        return make

    return register


@made_on("images")
def rank1_of_images(net: Any, data: Any) -> pb.Posterior:
    model = Rank1(net, Categorical(), ROWS)
    return pb.inference.fit(model, Rank1Guide(model, components=2), data, **SHORT)


@made_on("images")
def rank1_as_draws(net: Any, data: Any) -> pb.Posterior:
    return rank1_of_images(net, data).as_draws(2, seed=3)


@made_on("table with one output", "numbers")
def rank1_with_prefix_and_noise(net: Any, data: Any) -> pb.Posterior:
    options: dict[str, Any] = {"prefix": "slope", "members_dim": -3, "member_bias": False, "clip": 10.0}
    model = Rank1(net, Gaussian(scale=None), ROWS, prior=Horseshoe(), weight_prior=Laplace(), **options)
    return pb.inference.fit(model, Rank1Guide(model, components=2, draws="member"), data, **SHORT)


@made_on("words")
def rank1_of_words(net: Any, data: Any) -> pb.Posterior:
    prior = {"embedding.*": StudentT(scale=0.1), r".*\.s": StudentT(4.0), r"head.*": Cauchy(scale=0.1)}
    prior |= {".*": HierarchicalCauchy(0.2)}
    model = Rank1(net, Categorical(), ROWS, prior=prior, output="logits", weight_prior=None)
    guide = Rank1Guide(model, components=2, family="cauchy", init_dropout_rate=1e-6)
    return pb.inference.fit(model, guide, data, **SHORT)


@made_on("table in double precision", "none")
def rank1_function(net: Any, data: Any) -> pb.Posterior:
    model = Rank1(net, None, prefix="f")
    return pb.Posterior(model, Rank1Guide(model, components=2))


@made_on("table with one output", "numbers")
def mean_field_with_noise(net: Any, data: Any) -> pb.Posterior:
    model = Dense(net, Gaussian(scale=None, noise_prior_scale=0.5), ROWS)
    return pb.inference.fit(model, MeanFieldGuide(model, init_scale=0.2), data, **SHORT)


@made_on("table", "numbers")
def mean_field_mixture_of_some_weights(net: Any, data: Any) -> pb.Posterior:
    model = Dense(net, HeteroscedasticGaussian(), ROWS, prior=Laplace(), select=["0.weight", "2.bias"], chunk_size=1)
    return pb.inference.fit(model, MeanFieldGuide(model, components=2, init_scale=0.2), data, **SHORT)


@made_on("table")
def mean_field_under_horseshoe(net: Any, data: Any) -> pb.Posterior:
    model = Dense(net, Categorical(temperature=0.5), ROWS, prior=Horseshoe(0.3))
    return pb.inference.fit(model, MeanFieldGuide(model, init_scale=0.2), data, **SHORT)


@made_on("table with one output", "counts")
def mean_field_under_hierarchical_normal(net: Any, data: Any) -> pb.Posterior:
    model = Dense(net, Poisson(), ROWS, prior=HierarchicalNormal(), prefix="rate")
    return pb.inference.fit(model, MeanFieldGuide(model, init_scale=0.2), data, **SHORT)


@made_on("table with one output", "zeros and ones")
def mean_field_under_gaussian_mixture(net: Any, data: Any) -> pb.Posterior:
    model = Dense(net, Bernoulli(), ROWS, prior=GaussianMixture([0.0, 0.5], [0.1, 1.0], [0.75, 0.25]))
    return pb.inference.fit(model, MeanFieldGuide(model, init_scale=0.2), data, **SHORT)


@made_on("table")
def mean_field_under_spike_and_slab(net: Any, data: Any) -> pb.Posterior:
    prior = {r".*weight": SpikeAndSlab(0.05, 1.0, group="input", spike="laplace"), ".*": Normal()}
    model = Dense(net, Categorical(), ROWS, prior=prior)
    return pb.inference.fit(model, MeanFieldGuide(model, init_scale=0.2), data, **SHORT)


@made_on("images")
def deterministic_of_images(net: Any, data: Any) -> pb.Posterior:
    model = Dense(net, Categorical(), ROWS)
    return pb.inference.fit(model, PointGuide(model), data, **SHORT)


@made_on("table", "labels")
def without_prior(net: Any, data: Any) -> pb.Posterior:
    model = Dense(net, Categorical(), ROWS, prior=dist.Laplace(0.0, 0.5))
    return pb.inference.fit(model, MeanFieldGuide(model, init_scale=0.2), data, **SHORT)


@made_on("sparse")
def weight_sharing_by_codebook(net: Any, data: Any) -> pb.Posterior:
    model = WeightSharing(net, Categorical(), ROWS, prior=CODES)
    guide = CodebookGuide(model, codes=8, blend=0.05, outliers=0.02, init_scale=0.1)
    return pb.inference.fit(model, guide, data, **SHORT)


@made_on("table")
def weight_sharing_by_mixture(net: Any, data: Any) -> pb.Posterior:
    model = WeightSharing(net, Categorical(), ROWS, prefix="coded")
    field = MeanFieldGuide(model, init_scale=0.05)
    pb.inference.fit(model, field, data, **SHORT)
    options: dict[str, Any] = {"sampling": "mixture", "blend": 0.2, "outliers": 0.2, "zero": True}
    guide = CodebookGuide.from_mean_field(model, field, codes=6, **options)
    return pb.inference.fit(model, guide, data, **SHORT)


@made_on("table")
def weight_sharing_by_value(net: Any, data: Any) -> pb.Posterior:
    start = CodebookGuide(WeightSharing(net, Categorical(), ROWS), codes=5, blend=0.2, outliers=0.1)
    prior = {"codes": Normal(0.0, 0.5), "outliers": StudentT(), ".*": Normal()}
    model = SharedWeights(net, Categorical(), ROWS, codebook=start.book, prior=prior)
    return pb.inference.fit(model, model.shared_guide(start), data, **SHORT)


@made_on("images")
def spike_slab_by_sghmc_em(net: Any, data: Any) -> pb.Posterior:
    prior = SpikeAndSlab(0.05, 1.0, group="kernel", scale=InverseGamma(3.0, 2.0))
    model = SpikeSlab(net, Categorical(), ROWS, prior=prior, bias_prior=Normal(0.0, 2.0))
    rule = pb.inference.pruning.MagnitudeRule(0.5)
    kernel = SGHMCEM(model, data, step_size=0.1, friction=0.1, batch_size=6, thinning=2, prune=rule)
    return pb.inference.sample(kernel, 3, 4, **QUIET)


@made_on("images")
def spike_slab_sparsified(net: Any, data: Any) -> pb.Posterior:
    return spike_slab_by_sghmc_em(net, data).sparsify(0.6, example=data[0][:1], shrink=False).posterior


@made_on("images")
def chain_of_sghmc(net: Any, data: Any) -> pb.Posterior:
    kernel = SGHMC(Dense(net, Categorical(), ROWS), data, step_size=0.1, friction=0.1, batch_size=6)
    return pb.inference.sample(kernel, 2, 1, **QUIET)


@made_on("table")
def chains_of_sghmc(net: Any, data: Any) -> pb.Posterior:
    kernel = SGHMC(Dense(net, Categorical(), ROWS), data, step_size=0.1, friction=0.1, batch_size=6)
    return pb.inference.sample(kernel, 2, 1, num_chains=2, **QUIET)


@made_on("table with one output", "numbers")
def chain_of_nuts(net: Any, data: Any) -> pb.Posterior:
    model = Dense(net, Gaussian(0.5), ROWS)
    mcmc = MCMC(NUTS(model, step_size=0.05, adapt_step_size=False, max_tree_depth=3), 3, 2, disable_progbar=True)
    mcmc.run(*data)
    return pb.Posterior.from_mcmc(mcmc, model)


@made_on("table")
def bella_by_svgd(net: Any, data: Any) -> pb.Posterior:
    model = Bella(net, Categorical(), ROWS, rank=2)
    return SVGD(model, ParticleGuide(model, 3, init_scale=0.3), lr=0.02).fit(data, 2, batch_size=6, **QUIET)


@made_on("images")
def bella_with_head_and_gains_by_wgd(net: Any, data: Any) -> pb.Posterior:
    options: dict[str, Any] = {"select": ["conv"], "head": "head", "affine": True, "head_prior": Normal(0.0, 0.5)}
    model = Bella(net, Categorical(), ROWS, rank=2, rank_stabilised=True, affine_prior=Normal(scale=0.2), **options)
    return SVGD(model, ParticleGuide(model, 2, init_scale=0.3), method="wgd", lr=0.02).fit(
        data, 2, batch_size=6, **QUIET
    )


@made_on("words")
def bella_of_words_as_ensemble(net: Any, data: Any) -> pb.Posterior:
    prior = {r".*\.A": Laplace(), ".*": HierarchicalCauchy()}
    model = Bella(net, Categorical(), ROWS, rank=2, alpha=3, prior=prior, output="logits", prefix="bella")
    guide = ParticleGuide(model, 2, init_scale=0.3)
    return SVGD(model, guide, method="ensemble", lr=0.02).fit(data, 2, batch_size=6, **QUIET)


@made_on("table")
def particles_of_any_model(net: Any, data: Any) -> pb.Posterior:
    model = Dense(net, Categorical(), ROWS)
    return SVGD(model, AutoParticles(model, 3), lr=0.02).fit(data, 2, batch_size=6, **QUIET)


@made_on("table")
def draws_of_an_autoguide(net: Any, data: Any) -> pb.Posterior:
    model = Dense(net, Categorical(), ROWS)
    return pb.inference.fit(model, AutoNormal(model, init_scale=0.1), data, **SHORT).as_draws(3, seed=5)


@made_on("images")
def deep_ensemble(net: Any, data: Any) -> pb.Posterior:
    return DeepEnsemble(net, Categorical(), ROWS, members=2).fit(data, **SHORT)


@made_on("images")
def swag(net: Any, data: Any) -> pb.Posterior:
    return SWAG(net, Categorical(), ROWS, rank=2).fit(data, epochs=3, batch_size=6, num_samples=2, **QUIET)


@made_on("dropping")
def dropout(net: Any, data: Any) -> pb.Posterior:
    return MCDropout(net, Categorical(), ROWS, prior=Laplace()).fit(data, **SHORT)


@made_on("dropping with one output", "numbers")
def dropout_with_noise(net: Any, data: Any) -> pb.Posterior:
    return MCDropout(net, Gaussian(scale=None), ROWS).fit(data, **SHORT)


@made_on("images")
def laplace_of_images(net: Any, data: Any) -> pb.Posterior:
    return LastLayerLaplace(net, Categorical(), ROWS).fit(data, **SHORT)


@made_on("table with one output", "numbers")
def laplace_with_noise(net: Any, data: Any) -> pb.Posterior:
    return LastLayerLaplace(net, Gaussian(scale=None), ROWS, prior=Normal(0.0, 0.5)).fit(data, **SHORT)


def short(value: Any) -> Any:
    """Numbers with the nine digits that single precision has."""
    if isinstance(value, Tensor):
        return short(value.tolist())
    if isinstance(value, dict):
        return {name: short(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [short(one) for one in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


def predictions(posterior: pb.Posterior, network: str, num_samples: int | None = None) -> dict[str, Any]:
    predicted = posterior.predict(inputs(network, 4, seed=3), num_samples=num_samples, seed=0)
    found = {"num_samples": num_samples, "mean": short(predicted.mean)}
    if predicted.likelihood is not None:
        found |= {"aleatoric": short(predicted.aleatoric), "epistemic": short(predicted.epistemic)}
    return found


def log_joint(posterior: pb.Posterior, network: str, targets: str) -> float:
    """``log p(y, weights | x)`` of the first draw, which model, prior and likelihood are all in."""
    draw = {name: value[0, 0] for name, value in posterior.draws(1, seed=0).items()}
    y = None if targets == "none" else TARGETS[targets]
    with torch.no_grad():
        trace = poutine.trace(poutine.condition(posterior.model, draw)).get_trace(inputs(network), y)
        return float(trace.log_prob_sum(lambda name, site: site["is_observed"] or name in draw))


def save_posteriors(folder: Path) -> dict[str, Any]:
    expected: dict[str, Any] = {}
    for name, (make, network, targets) in POSTERIORS.items():
        torch.manual_seed(0)
        posterior = make(NETWORKS[network](1), (inputs(network), TARGETS.get(targets)))
        posterior.save(folder / name, prior=name != "without_prior")
        given: dict[str, Any] = {"prior": dist.Laplace(0.0, 0.5)} if name == "without_prior" else {}
        loaded = pb.load(folder / name, NETWORKS[network](2), **given)
        own: dict[str, Any] = {"network": network, "targets": targets}
        own |= predictions(posterior, network, min(3, posterior.stored or 3))
        assert own["mean"] == predictions(loaded, network, own["num_samples"])["mean"], name
        # of the loaded one: the weights of a network with dropout are frozen before, and so without a prior
        own |= {"log_joint": short(log_joint(loaded, network, targets)), "losses": posterior.losses}
        for what in ("members", "stored", "chains", "sampled", "points", "sampler"):
            own[what] = getattr(posterior, what)
        if name.startswith("spike_slab") or name.endswith("spike_and_slab"):
            own["inclusion"] = short(posterior.inclusion_probabilities(3))
        if name in ("weight_sharing_by_codebook", "weight_sharing_by_mixture"):
            guide: Any = posterior.guide
            own["compression"] = short(guide.compression_report())
        expected[name] = own
    return expected


# -------------------------------------------------------------------------------------------------- adapters


def adapted() -> tuple[Bella, ParticleGuide]:
    model = Bella(NETWORKS["images"](1), Categorical(), ROWS, rank=2, select=["conv"], head="head", affine=True)
    return model, ParticleGuide(model, 2, init_scale=0.3)


def save_particles(folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    model, guide = adapted()
    posterior = SVGD(model, guide, lr=0.02).fit((inputs("images"), TARGETS["labels"]), 2, batch_size=6, **QUIET)
    save_adapters(model, guide, folder)
    return {"network": "images"} | predictions(posterior, "images", 1)


# ----------------------------------------------------------------------------------------------- checkpoints


class Stopped(Exception):
    """What a run is stopped with."""


def stopping_after(epochs: int) -> Callable[[Any], None]:
    """A callback that lets so many epochs end."""
    left = [epochs]

    def callback(state: Any) -> None:
        left[0] -= 1
        if not left[0]:
            raise Stopped

    return callback


def run_rank1(data: Any, epochs: int, **options: Any) -> pb.Posterior:
    model = Rank1(NETWORKS["images"](1), Categorical(), ROWS)
    options |= {"schedule": pb.inference.cosine(warmup=1.0), "kl_annealing": 3.0}
    return pb.inference.fit(model, Rank1Guide(model, components=2), data, epochs=epochs, **options)


def run_weight_sharing(data: Any, epochs: int, callbacks: Any = (), **options: Any) -> pb.Posterior:
    model = WeightSharing(NETWORKS["table"](1), Categorical(), ROWS, prior=CODES)
    guide = CodebookGuide(model, codes=6, blend=0.1, outliers=0.1, init_scale=0.1)
    callbacks = [MergeCodes(tightness=0.5), *callbacks]
    return pb.inference.fit(model, guide, data, epochs=epochs, optim="sgd", callbacks=callbacks, **options)


def run_autoguide(data: Any, epochs: int, **options: Any) -> pb.Posterior:
    model = Dense(NETWORKS["table"](1), Categorical(), ROWS)
    return pb.inference.fit(model, AutoNormal(model, init_scale=0.1), data, epochs=epochs, **options)


def run_svgd(data: Any, epochs: int, **options: Any) -> pb.Posterior:
    model, guide = adapted()
    return SVGD(model, guide, lr=options.pop("lr")).fit(data, epochs, **options)


def run_svgd_of_any_model(data: Any, epochs: int, **options: Any) -> pb.Posterior:
    model = Dense(NETWORKS["table"](1), Categorical(), ROWS)
    return SVGD(model, AutoParticles(model, 2), lr=options.pop("lr")).fit(data, epochs, **options)


def run_ensemble(data: Any, epochs: int, **options: Any) -> pb.Posterior:
    return DeepEnsemble(NETWORKS["images"](1), Categorical(), ROWS, members=2).fit(data, epochs=epochs, **options)


def run_dropout(data: Any, epochs: int, **options: Any) -> pb.Posterior:
    return MCDropout(NETWORKS["dropping"](1), Categorical(), ROWS).fit(data, epochs=epochs, **options)


def run_laplace(data: Any, epochs: int, **options: Any) -> pb.Posterior:
    return LastLayerLaplace(NETWORKS["table"](1), Categorical(), ROWS).fit(data, epochs=epochs, **options)


#: ``{name: (engine, network, epochs after which it is stopped)}``; the ensemble is, within its second network
CHECKPOINTS: dict[str, tuple[Callable[..., pb.Posterior], str, int]] = {
    "rank1": (run_rank1, "images", 2),
    "weight_sharing": (run_weight_sharing, "table", 2),
    "autoguide": (run_autoguide, "table", 2),
    "svgd": (run_svgd, "images", 2),
    "svgd_of_any_model": (run_svgd_of_any_model, "table", 2),
    "ensemble": (run_ensemble, "images", 6),
    "dropout": (run_dropout, "dropping", 2),
    "laplace": (run_laplace, "table", 2),
}


def save_checkpoints(folder: Path, spare: Path) -> dict[str, Any]:
    """Stops every engine after half of its four epochs, and says what was predicted then and at the end."""
    expected: dict[str, Any] = {}
    for name, (run, network, stop) in CHECKPOINTS.items():
        data = inputs(network), TARGETS["labels"]
        options: dict[str, Any] = {"batch_size": 6, "lr": 0.02} | QUIET
        torch.manual_seed(0)
        try:
            run(data, 4, checkpoint=folder / name / "run.pt", callbacks=[stopping_after(stop)], **options)
        except Stopped:
            pass
        expected[name] = {"network": network}
        for when, epochs in (("stopped", 2), ("finished", 4)):
            copy = shutil.copytree(folder / name, spare / name / when)
            torch.manual_seed(1)
            posterior = run(data, epochs, checkpoint=copy / "run.pt", **options)
            expected[name][when] = predictions(posterior, network, min(2, posterior.stored or 2))
            expected[name][when]["losses"] = short(posterior.losses)
        torch.manual_seed(0)
        whole = predictions(run(data, 4, **options), network, expected[name]["finished"]["num_samples"])
        assert whole["mean"] == expected[name]["finished"]["mean"], f"{name}: resumed and unbroken runs differ"
    return expected


# -------------------------------------------------------------------------------------- runs of the command line

RUNS: dict[str, list[str]] = {
    "rank1": ["--method", "rank1", "--components", "2"],
    "images": ["--method", "rank1", "--components", "2", "--data", "images.npz", "--network", "cnn"],
    "dense": ["--method", "dense"],
    "regression": ["--method", "dense", "--data", "numbers.csv"],
    "spike-slab": ["--method", "spike-slab"],
    "bella": ["--method", "bella", "--particles", "2", "--rank", "1", "--pretrained", "dense"],
    "weight-sharing": ["--method", "weight-sharing", "--codes", "8", "--pretrained", "dense"],
}


def write_data(folder: Path) -> None:
    x = numbers(60, 2, seed=11)
    rows: dict[str, list[str]] = {"labels.csv": ["a,b,colour,y"], "numbers.csv": ["a,b,colour,y"]}
    for i, (a, b) in enumerate(x.tolist()):
        own = f"{a:.4f},{b:.4f},{('red', 'blue')[i % 2]}"
        rows["labels.csv"].append(f"{own},{'yes' if a + b > 0 else 'no'}")
        rows["numbers.csv"].append(f"{own},{10 + 5 * a - b:.3f}")
    for name, lines in rows.items():
        (folder / name).write_text("\n".join(lines) + "\n")
    pixels = (numbers(36, 4, 4, seed=12) * 127 + 128).byte().numpy()
    pixels[::2, :2] //= 2
    y = np.arange(36) % 2
    parts: dict[str, Any] = {"x_train": pixels[:24], "y_train": y[:24], "x_test": pixels[24:], "y_test": y[24:]}
    np.savez_compressed(folder / "images.npz", **parts, x_ood=255 - pixels[:6])


def round_weights(folder: Path) -> None:
    """Rounds the tensors of a posterior so that they compress: large ones to multiples of 1/8, others to 8 bits."""
    file = folder / "tensors.safetensors"
    tensors = safetensors.torch.load_file(file)
    for name, value in tensors.items():
        if value.is_floating_point() and value.numel() > 4000:
            tensors[name] = (value * 8).round() / 8 + 0.0  # and no minus zero
        elif value.is_floating_point() and value.numel() > 100:
            tensors[name] = value.bfloat16().float()
    safetensors.torch.save_file(tensors, file)


def command(*arguments: str) -> None:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output


def save_runs(folder: Path) -> None:
    """Run folders, with data and other runs named by paths relative to ``folder``."""
    folder.mkdir()
    write_data(folder)
    before = Path.cwd()
    os.chdir(folder)
    try:
        for name, options in RUNS.items():
            usual = ["--data", "labels.csv", "--target", "y", "--network", "mlp", "--epochs", "1", "--samples", "2"]
            if "images.npz" in options:
                usual = usual[4:]
            if "bella" in options:
                usual = usual[:-2]
            command("fit", *usual, *options, "--device", "cpu", "--out", name, "--quiet")
            for part in ("posterior", "deterministic"):
                round_weights(Path(name, part))
            Path(name, "posterior.nc").unlink()
            config = json.loads(Path(name, "config.json").read_text())
            for option in ("data", "pretrained"):
                if config["options"][option] is not None:
                    config["options"][option] = Path(config["options"][option]).name
            Path(name, "config.json").write_text(json.dumps(config, indent=2) + "\n")
            command("evaluate", name, "--device", "cpu", "--quiet")
    finally:
        os.chdir(before)


# ------------------------------------------------------------------------------------------------- the archive


def pack(folder: Path, archive: Path) -> None:
    """Packs a folder without times and owners, the files of like names side by side."""

    def anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.uid = info.gid = info.mtime = 0
        info.uname = info.gname = ""
        info.mode = 0o755 if info.isdir() else 0o644
        return info

    files = [path for path in folder.rglob("*") if path.is_file()]
    with tarfile.open(archive, "w:xz", preset=9, format=tarfile.USTAR_FORMAT) as tar:
        for path in sorted(files, key=lambda path: (path.suffix, str(path))):
            tar.add(path, path.relative_to(folder), filter=anonymous)


def require_no_places(folder: Path) -> None:
    """No file says where it was made."""
    places = [tempfile.gettempdir(), str(Path.home()), str(Path(pb.__file__).parents[1]), str(HERE.parents[1])]
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            host = [os.uname().nodename] if path.suffix in (".json", ".csv") else []
            for place in (*places, *host):
                assert place.encode() not in content, f"{path.relative_to(folder)} holds {place!r}"


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made, tempfile.TemporaryDirectory() as spare:
        folder = Path(made)
        expected = {
            "posteriors": save_posteriors(folder / "posteriors"),
            "adapters": save_particles(folder / "adapters"),
            "checkpoints": save_checkpoints(folder / "checkpoints", Path(spare)),
        }
        save_runs(folder / "runs")
        require_no_places(folder)
        pack(folder, HERE / "files.tar.xz")
    lines = [
        f'"{kind}": {{\n' + ",\n".join(f' "{name}": {json.dumps(one)}' for name, one in found.items()) + "\n}"
        for kind, found in expected.items()
    ]
    (HERE / "expected.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
