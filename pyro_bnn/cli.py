"""The command line: `pyro-bnn fit` trains a Bayesian network beside its deterministic twin, `evaluate` scores it again.

A run folder holds

- ``config.json``: every option as it was used, the shape of the inputs and how raw data became tensors;
- ``metrics.json``: the metrics of the Bayesian network, and under ``deterministic`` those of its twin;
- ``posterior/`` and ``deterministic/``: the two fitted posteriors, for `pyro_bnn.load`;
- ``posterior.nc``: the posterior and its predictions on test data, for ArviZ.
"""

import io
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

import pyro_bnn as pb
from pyro_bnn.data import IMAGE_SIZE, Encoding, Task, load
from pyro_bnn.pretrained import find_weights, image_size
from pyro_bnn.recipes import (
    DEFAULT_PRIORS,
    Family,
    Group,
    Method,
    Metrics,
    Network,
    Options,
    Prior,
    Sampling,
    Trained,
    Update,
    bayesian,
    build_network,
    codebook,
    deterministic,
    find_device,
    particles,
    sample,
    sparsity_of,
    train,
    trained_network,
)

FORMAT = 1
ARVIZ_DRAWS = 100
ARVIZ_ROWS = 1000

app = typer.Typer(
    help="Bayesian neural networks as Pyro programs.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.command()
def fit(
    data: Annotated[
        str, typer.Option(help="digits, or a path: .npz, .csv (with --target) or a folder of images")
    ] = "digits",
    target: Annotated[str | None, typer.Option(help="column of a .csv that is to be predicted")] = None,
    method: Annotated[
        Method,
        typer.Option(
            help="rank-1 factors, mean-field Normals on all weights, SGHMC under spike and slab, low-rank particles, "
            "or a codebook of Normals that all weights share"
        ),
    ] = "rank1",
    network: Annotated[Network, typer.Option(help="auto: cnn for images, mlp otherwise")] = "auto",
    epochs: Annotated[
        int, typer.Option(min=1, help="passes over the training data; spike-slab: of warm-up, then one for each draw")
    ] = 60,
    components: Annotated[int | None, typer.Option(min=1, help="of the guide's mixture; rank1: 4, dense: 1")] = None,
    prior: Annotated[
        Prior | None,
        typer.Option(help="rank1: hierarchical-cauchy, dense: normal, weight-sharing: gaussian-mixture of its codes"),
    ] = None,
    family: Annotated[Family, typer.Option(help="of the guide; cauchy for rank1 alone")] = "normal",
    group: Annotated[Group, typer.Option(help="what a spike-and-slab prior includes together")] = "weight",
    sparsity: Annotated[
        float | None, typer.Option(min=0, max=0.999, help="share of weights to remove; spike-slab alone, there 0.8")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="1 is the posterior; spike-slab alone")] = 1.0,
    particles_: Annotated[int | None, typer.Option("--particles", min=1, help="of bella, there 5")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="of what bella adds to each weight, there 4")] = None,
    update: Annotated[Update | None, typer.Option(help="of bella's particles, there svgd")] = None,
    pretrained: Annotated[
        str | None,
        typer.Option(
            help="what bella and weight-sharing start from, instead of training: the network of a run folder (for "
            "weight-sharing the mean field of a dense run, else the deterministic one), or, for bella, weights of "
            "torchvision (ResNet18_Weights.DEFAULT) with a new last layer"
        ),
    ] = None,
    codes: Annotated[int | None, typer.Option(min=1, help="of weight-sharing, there 256")] = None,
    sampling: Annotated[
        Sampling | None, typer.Option(help="of weight-sharing: weights share Normals (codebook), or values (shared)")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="rows of a training step")] = 64,
    lr: Annotated[
        float, typer.Option(help="of AdamW, falling to 0 along a cosine; spike-slab: also the step size squared")
    ] = 1e-2,
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="draws (from each component) for a prediction, 16; bella's are its particles"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="of weights, batches and draws")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    out: Annotated[Path | None, typer.Option(help="run folder [default: runs/METHOD-DATA]")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the run in that folder")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="print nothing but errors")] = False,
) -> None:
    """Trains a Bayesian network and, with the same budget, its deterministic twin; compares both on test data."""
    console = Console(quiet=quiet)
    with _user_errors(ValueError, OSError):
        if not (lr > 0 and math.isfinite(lr)):
            raise ValueError(f"--lr must be a positive number, got {lr}")
        if method == "dense" and family != "normal":
            raise ValueError(f"--family {family} goes with --method rank1; --method dense has Normals")
        spike_slab = method == "spike-slab"
        if not spike_slab and (sparsity is not None or temperature != 1):
            raise ValueError("--sparsity and --temperature go with --method spike-slab")
        if spike_slab and (family != "normal" or components is not None or prior not in (None, "spike-and-slab")):
            raise ValueError(
                "--method spike-slab has a prior of its own and no guide: no --prior, --family, --components"
            )
        bella = method == "bella"
        sharing = method == "weight-sharing"
        if not bella and (particles_, rank, update) != (None,) * 3:
            raise ValueError("--particles, --rank and --update go with --method bella")
        if bella and (family != "normal" or components is not None or samples is not None):
            raise ValueError("--method bella has particles: no --family, --components, --samples")
        if not sharing and (codes, sampling) != (None,) * 2:
            raise ValueError("--codes and --sampling go with --method weight-sharing")
        if sharing and (family != "normal" or components is not None):
            raise ValueError("--method weight-sharing has a codebook of Normals: no --family, --components")
        if not bella and not sharing and pretrained is not None:
            raise ValueError("--pretrained goes with --method bella or weight-sharing")
        weights = None
        if bella and pretrained is not None and not Path(pretrained).exists():
            weights = find_weights(pretrained)
        if weights is not None and network != "auto":
            raise ValueError(f"--pretrained {pretrained} has a network of its own: no --network")
        place = find_device(device)
        task = load(data, target, size=IMAGE_SIZE if weights is None else image_size(weights))
        folder = out or Path("runs") / f"{method}-{task.name}"
        _check_free(folder, overwrite)
        options = Options(
            data=data if data == "digits" else str(Path(data).resolve()),
            target=target,
            method=method,
            network=weights or (network if network != "auto" else "cnn" if task.x_train.dim() == 4 else "mlp"),
            epochs=epochs,
            components=components or (4 if method == "rank1" else 1),
            prior=prior or DEFAULT_PRIORS[method],
            family=family,
            group=group,
            sparsity=(0.8 if sparsity is None else sparsity) if spike_slab else 0.0,
            temperature=temperature,
            particles=particles_ or 5,
            rank=rank or 4,
            update=update or "svgd",
            pretrained=None if pretrained is None else weights or str(Path(pretrained).resolve()),
            codes=codes or 256,
            sampling=sampling or "codebook",
            batch_size=min(batch_size, len(task.x_train)),
            lr=lr,
            samples=samples or (1 if bella else 16),
            seed=seed,
            device=str(place),
        )
        torch.manual_seed(seed)
        with redirect_stdout(io.StringIO()) if quiet else nullcontext():  # torch.hub prints what it downloads
            net = build_network(options.network, tuple(task.x_train.shape[1:]), task.out_features, load=True).to(place)
        known, field = None, None
        if pretrained is not None and not weights:
            known, field = _pretrained(Path(pretrained), options, net, task)
        folder.mkdir(parents=True, exist_ok=True)

    with _user_errors(ArithmeticError, ValueError):
        if known is not None:
            which = "mean field" if sharing and field is not None else "deterministic network"
            console.print(f"The {which} of {pretrained}", soft_wrap=True, highlight=False)
        elif weights is not None:
            console.print(
                f"{weights} with a new last layer: first all of it is tuned as the deterministic network, then "
                "particles begin anew around the given weights, each with a last layer of its own",
                soft_wrap=True,
                highlight=False,
            )
        elif bella:
            console.print("No --pretrained: first the deterministic network, then particles around it")
        elif sharing:
            console.print("No --pretrained: first the deterministic network, then codes for its weights")
        twin = known or train(deterministic(net, task), task, options, console)
        compression: Metrics = {}
        if options.method == "spike-slab":
            found = sample(trained_network(twin.posterior), task, options, console)
        elif bella:
            found = particles(net if weights else trained_network(twin.posterior), task, options, console)
        elif sharing:
            found, compression = codebook(twin, field, task, options, console)
        else:
            found = train(bayesian(net, task, options), task, options, console)
    metrics = _measure(found.posterior, task, options) | found.cost
    metrics["deterministic"] = _measure(twin.posterior, task, options) | twin.cost
    if options.method == "spike-slab":
        metrics["sparsity"], metrics["deterministic"]["sparsity"] = sparsity_of(found.posterior), 0.0
    if sharing:
        metrics["compression"] = compression
        metrics["bits_per_coded_weight"] = 8 * compression["bytes"]["total"] / compression["weights"]
        metrics["deterministic"]["bits_per_coded_weight"] = 32.0
    with _user_errors(ValueError, OSError):
        _save(folder, task, options, found.posterior, twin.posterior, metrics)
    console.print(_table(metrics, options, task.name))
    console.print(f"Saved in {folder}", soft_wrap=True, highlight=False)


@app.command()
def evaluate(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="run folder of `pyro-bnn fit`")],
    data: Annotated[str | None, typer.Option(help="other data of the same form; their test part is scored")] = None,
    target: Annotated[str | None, typer.Option(help="column of a .csv [default: that of the run]")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", help="print nothing but errors")] = False,
) -> None:
    """Scores a saved run again, on its own test data (metrics.json) or on others (metrics-NAME.json)."""
    with _user_errors(ValueError, OSError):
        place = find_device(device)
        options, in_shape, encoding = _read_config(folder)
        if target is None and (data is None or Path(data).suffix.lower() == ".csv"):
            target = options.target
        task = load(data or options.data, target, encoding, in_shape[-1])
        if tuple(task.x_test.shape[1:]) != in_shape:
            raise ValueError(
                f"a row of {data or options.data!r} has shape {tuple(task.x_test.shape[1:])}, "
                f"the network of {str(folder)!r} takes {in_shape}"
            )
        net = build_network(options.network, in_shape, task.out_features).to(place)
        posterior = pb.load(folder / "posterior", net)
        twin = pb.load(folder / "deterministic", net)
        known = _read_json(folder / "metrics.json")

    metrics = known | _measure(posterior, task, options)
    metrics["deterministic"] = known.get("deterministic", {}) | _measure(twin, task, options)
    with _user_errors(ValueError, OSError):
        _write_json(folder / ("metrics.json" if data is None else f"metrics-{task.name}.json"), metrics)
    Console(quiet=quiet).print(_table(metrics, options, task.name))


def _pretrained(folder: Path, options: Options, net: nn.Module, task: Task) -> tuple[Trained, pb.Posterior | None]:
    """The deterministic network of another run on data of the same form, and its mean field, if it has one."""
    theirs, in_shape, _ = _read_config(folder)
    if (theirs.network, in_shape) != (options.network, tuple(task.x_train.shape[1:])):
        raise ValueError(
            f"--pretrained {folder} holds the network {theirs.network!r} for inputs of shape {in_shape}; this run has "
            f"{options.network!r} for {tuple(task.x_train.shape[1:])}"
        )
    posterior = pb.load(folder / "deterministic", net)
    known = _read_json(folder / "metrics.json").get("deterministic", {})
    twin = Trained(posterior, {key: known.get(key) for key in ("seconds", "trainable_parameters")})
    field = theirs.method == "dense" and theirs.components == 1
    return twin, pb.load(folder / "posterior", net) if field else None


def _measure(posterior: pb.Posterior, task: Task, options: Options) -> Metrics:
    """Metrics on the test data, those of a regression in the target's own unit."""
    ood = task.x_ood if task.kind == "classification" else None
    metrics: Metrics = pb.diagnostics.evaluate(
        posterior, (task.x_test, task.y_test), ood, num_samples=options.samples, seed=options.seed
    )
    if task.kind == "classification":
        return {"ood_auroc": None} | metrics
    metrics["rmse"] *= task.encoding.y_scale
    metrics["nll"] += math.log(task.encoding.y_scale)
    return metrics


def _table(metrics: Metrics, options: Options, name: str) -> Table:
    kind = f"{options.method}, {options.components} component{'s' if options.components > 1 else ''}"
    if options.method == "spike-slab":
        kind = f"spike-slab, {options.samples} draws"
    elif options.method == "bella":
        kind = f"bella, {options.particles} particles by {options.update}"
    elif options.method == "weight-sharing":
        kind = f"weight sharing, at most {options.codes} codes"
    table = Table("on test data", kind, "deterministic", title=f"{name}, {options.network}, {options.epochs} epochs")
    formats: Mapping[str, tuple[str, Callable[[Any], str]]] = {
        "accuracy": ("accuracy", "{:.4f}".format),
        "rmse": ("RMSE", "{:.4g}".format),
        "nll": ("NLL (nats)", "{:.4f}".format),
        "brier": ("Brier score", "{:.4f}".format),
        "ece": ("ECE", "{:.4f}".format),
        "coverage": ("coverage of 95 % intervals", "{:.3f}".format),
        "ood_auroc": ("OOD AUROC", "{:.4f}".format),
        "seconds": ("training (s)", "{:.1f}".format),
        "trainable_parameters": ("trainable parameters", "{:,}".format),
        "sparsity": ("parameters removed", "{:.1%}".format),
        "bits_per_coded_weight": ("bits a coded weight", "{:.2f}".format),
    }
    for key, (label, text) in formats.items():
        if metrics.get(key) is not None:
            table.add_row(label, text(metrics[key]), text(metrics["deterministic"][key]))
    return table


def _check_free(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"--out {folder} is a file; give a folder")
    if not overwrite and (folder / "config.json").exists():
        raise FileExistsError(f"{str(folder)!r} holds a run already; give another --out, or --overwrite")


def _save(
    folder: Path, task: Task, options: Options, bayesian: pb.Posterior, twin: pb.Posterior, metrics: Metrics
) -> None:
    """Writes ``config.json`` last: a folder without it is no run, whatever else a killed process left in it."""
    (folder / "config.json").unlink(missing_ok=True)
    bayesian.save(folder / "posterior")
    twin.save(folder / "deterministic")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # ArviZ announces its next release on import
        draws = pb.diagnostics.to_arviz(
            bayesian,
            task.x_test[:ARVIZ_ROWS],
            task.y_test[:ARVIZ_ROWS],
            num_samples=bayesian.stored
            or (1 if options.method == "bella" else math.ceil(ARVIZ_DRAWS / bayesian.members)),
            seed=options.seed,
        )
        with _replacing(folder / "posterior.nc") as path:
            draws.to_netcdf(str(path))
    _write_json(folder / "metrics.json", metrics)
    config = {
        "format": FORMAT,
        "options": asdict(options),
        "in_shape": list(task.x_train.shape[1:]),
        "encoding": asdict(task.encoding),
    }
    _write_json(folder / "config.json", config)


def _read_config(folder: Path) -> tuple[Options, tuple[int, ...], Encoding]:
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{str(folder)!r} is not the folder of a run: it has no config.json")
    config = _read_json(path)
    if config.get("format") != FORMAT:
        raise ValueError(f"{str(path)!r} has format {config.get('format')!r}, this version reads format {FORMAT}")
    try:
        encoding = Encoding.from_json(config["encoding"])
        return Options(**config["options"]), tuple(config["in_shape"]), encoding
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(path)!r} is not the configuration of a run: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} holds {type(content).__name__}, expected an object with names")
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with _replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of ``path`` once all is written."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _user_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turns what the user can mend into one line and exit code 2."""
    try:
        yield
    except kinds as error:
        message = " ".join(str(error).split())
        typer.echo(f"pyro-bnn: {message}", err=True)
        raise typer.Exit(2) from error
