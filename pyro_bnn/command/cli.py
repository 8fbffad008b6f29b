"""The command line: `pyro-bnn fit` trains a Bayesian network beside its deterministic twin, `evaluate` scores it again,
`predict` applies it to new rows, `report` makes a page of a run and `compare` one of several methods."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from torch import nn

import pyro_bnn as pb
from pyro_bnn.command import runs
from pyro_bnn.command.options import (
    FamilyName,
    GroupName,
    MethodName,
    NetworkName,
    Options,
    PriorName,
    SamplingName,
    UpdateName,
    check,
    complete,
)
from pyro_bnn.command.recipes import Metrics, Trained, find_device, new_network, score, train_and_score
from pyro_bnn.data import IMAGE_SIZE, Task
from pyro_bnn.data import load as load_data
from pyro_bnn.data.run_folder import predict as predict_new
from pyro_bnn.data.task import TaskKind
from pyro_bnn.diagnostics.pages.glossary import formats_of
from pyro_bnn.files import replacing, write_json
from pyro_bnn.models.architectures.pretrained import find_weights, image_size

#: metrics that `fit` and `evaluate` print; the others are in metrics.json and on the page of `report`
PRINTED = frozenset(
    "accuracy rmse nll crps brier ece coverage width aurc ood_auroc "
    "seconds trainable_parameters sparsity bits_per_coded_weight".split()
)

# how a file is read, in the commands that train
TargetColumn = Annotated[str | None, typer.Option(help="column of a .csv that is to be predicted")]
TaskOption = Annotated[
    TaskKind | None, typer.Option("--task", help="whether the target is a class or a number, if values do not tell")
]
DropColumns = Annotated[list[str] | None, typer.Option(help="column of a .csv that is no input; repeat for several")]
SplitRows = Annotated[
    str | None,
    typer.Option(help="share of the rows for testing [default: 0.3], or a column of a .csv with train and test"),
]
CategoryColumns = Annotated[
    list[str] | None, typer.Option(help="column of a .csv with categories that look like numbers; repeat")
]
Impute = Annotated[
    bool, typer.Option("--impute", help="empty cells of a .csv: the median, and an input that says where")
]

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
    target: TargetColumn = None,
    task_: TaskOption = None,
    drop: DropColumns = None,
    split: SplitRows = None,
    category: CategoryColumns = None,
    impute: Impute = False,
    method: Annotated[
        MethodName,
        typer.Option(
            help="rank-1 factors, mean-field Normals on all weights, SGHMC under spike and slab, low-rank particles, "
            "or a codebook of Normals that all weights share"
        ),
    ] = "rank1",
    network: Annotated[NetworkName, typer.Option(help="auto: cnn for images, mlp otherwise")] = "auto",
    epochs: Annotated[
        int, typer.Option(min=1, help="passes over the training data; spike-slab: of warm-up, then one for each draw")
    ] = 60,
    components: Annotated[int | None, typer.Option(min=1, help="of the guide's mixture; rank1: 4, dense: 1")] = None,
    prior: Annotated[
        PriorName | None,
        typer.Option(help="rank1: hierarchical-cauchy, dense: normal, weight-sharing: gaussian-mixture of its codes"),
    ] = None,
    family: Annotated[FamilyName, typer.Option(help="of the guide; cauchy for rank1 alone")] = "normal",
    group: Annotated[GroupName, typer.Option(help="what a spike-and-slab prior includes together")] = "weight",
    sparsity: Annotated[
        float | None, typer.Option(min=0, max=0.999, help="share of weights to remove; spike-slab alone, there 0.8")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="1 is the posterior; spike-slab alone")] = 1.0,
    particles_: Annotated[int | None, typer.Option("--particles", min=1, help="of bella, there 5")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="of what bella adds to each weight, there 4")] = None,
    update: Annotated[UpdateName | None, typer.Option(help="of bella's particles, there svgd")] = None,
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
        SamplingName | None,
        typer.Option(help="of weight-sharing: weights share Normals (codebook), or values (shared)"),
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
        asked: dict[str, Any] = {
            "data": data if data == "digits" else str(Path(data).resolve()),
            "target": target,
            "task": task_,
            "drop": tuple(drop or ()) or None,
            "split": _split(split),
            "category": tuple(category or ()) or None,
            "impute": impute or None,
            "network": None if network == "auto" else network,
            "epochs": epochs,
            "components": components,
            "prior": prior,
            "family": family,
            "group": group,
            "sparsity": sparsity,
            "temperature": temperature,
            "particles": particles_,
            "rank": rank,
            "update": update,
            "pretrained": pretrained,
            "codes": codes,
            "sampling": sampling,
            "batch_size": batch_size,
            "lr": lr,
            "samples": samples,
            "seed": seed,
        }
        check(method, asked)
        weights = None
        if method == "bella" and pretrained is not None and not Path(pretrained).exists():
            weights = find_weights(pretrained)
        if weights is not None and network != "auto":
            raise ValueError(f"--pretrained {pretrained} has a network of its own: no --network")
        place = find_device(device)
        task = load_data(
            data,
            target,
            size=IMAGE_SIZE if weights is None else image_size(weights),
            task=task_,
            drop=drop or (),
            split=_split(split),
            category=category or (),
            impute=impute,
        )
        folder = out or Path("runs") / f"{method}-{task.name}"
        _require_folder(folder)
        _require_free(folder / "config.json", f"{str(folder)!r} holds a run already", overwrite)
        asked["device"] = str(place)
        if weights is not None:
            asked["network"] = asked["pretrained"] = weights
        elif pretrained is not None:
            asked["pretrained"] = str(Path(pretrained).resolve())
        options = complete(method, asked, task)
        net = new_network(options, task, console)
        known, field = None, None
        if pretrained is not None and not weights:
            known, field = _pretrained(Path(pretrained), options, net, task)
        folder.mkdir(parents=True, exist_ok=True)

    with _user_errors(ArithmeticError, ValueError, OSError):
        if known is not None:
            which = "mean field" if method == "weight-sharing" and field is not None else "deterministic network"
            console.print(f"The {which} of {pretrained}", soft_wrap=True, highlight=False)
        elif weights is not None:
            console.print(
                f"{weights} with a new last layer: first all of it is tuned as the deterministic network, then "
                "particles begin anew around the given weights, each with a last layer of its own",
                soft_wrap=True,
                highlight=False,
            )
        elif method == "bella":
            console.print("No --pretrained: first the deterministic network, then particles around it")
        elif method == "weight-sharing":
            console.print("No --pretrained: first the deterministic network, then codes for its weights")
        for note in task.notes:
            console.print(f"Note: {note}", soft_wrap=True, highlight=False)
        fitted = train_and_score(net, task, options, console, known, field)
        runs.save(folder, task, options, fitted)
    console.print(_table(fitted.metrics, options, task.name))
    console.print(f"Saved in {folder}", soft_wrap=True, highlight=False)
    with _user_errors(runs.ArvizFileError, exit_code=1):
        runs.save_for_arviz(folder, task, options, fitted.posterior)


@app.command()
def evaluate(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="run folder of `pyro-bnn fit`")],
    data: Annotated[str | None, typer.Option(help="other data of the same form; their test part is scored")] = None,
    target: Annotated[str | None, typer.Option(help="column of a .csv [default: that of the run]")] = None,
    drop: Annotated[
        list[str] | None, typer.Option(help="column that training did not have; repeat for several")
    ] = None,
    split: Annotated[str | None, typer.Option(help="share or column, as for `fit` [default: that of the run]")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", help="print nothing but errors")] = False,
) -> None:
    """Scores a saved run again, on its own test data (metrics.json) or on others (metrics-NAME.json)."""
    with _user_errors(ValueError, OSError):
        place = find_device(device)
        run = runs.read(folder)
        task = run.task(data, target, drop=drop or (), split=_split(split))
        net = run.network().to(place)
        posterior, twin = run.posterior(net), run.posterior(net, "deterministic")
        known = run.metrics() if run.is_measured else {}
        metrics = known | score(posterior, task, run.options)
        metrics["deterministic"] = known.get("deterministic", {}) | score(twin, task, run.options)
        write_json(folder / ("metrics.json" if data is None else f"metrics-{task.name}.json"), metrics)
    Console(quiet=quiet).print(_table(metrics, run.options, task.name))


@app.command()
def predict(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="run folder of `pyro-bnn fit`")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="rows without a target: a file as that of training")],
    out: Annotated[Path | None, typer.Option(help="file of comma-separated values [default: to the console]")] = None,
    level: Annotated[float, typer.Option(help="probability of the interval of a number")] = 0.95,
    samples: Annotated[int | None, typer.Option(min=1, help="draws [default: those of the run]")] = None,
    drop: Annotated[
        list[str] | None, typer.Option(help="column that training did not have; repeat for several")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the file that is there")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
) -> None:
    """Predicts rows without a target, in the units of the training file, as comma-separated values."""
    with _user_errors(ValueError, OSError):
        place = find_device(device)
        if out is not None:
            if out.is_dir():
                raise IsADirectoryError(f"--out {out} is a folder; give a file")
            _require_free(out, f"{str(out)!r} is there already", overwrite)
        table = predict_new(folder, new, level=level, num_samples=samples, drop=drop or (), device=place)
        if out is None:
            typer.echo(table.to_csv(index=False), nl=False)
            return
        with replacing(out) as temporary:
            table.to_csv(temporary, index=False)
    typer.echo(f"Saved {len(table)} rows in {out}", err=True)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="run folder of `pyro-bnn fit`")],
    out: Annotated[Path | None, typer.Option(help="the page [default: RUN/report.html]")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the page that is there")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", help="print nothing but errors")] = False,
) -> None:
    """Makes one self-contained page of a saved run: what to trust, its metrics, pictures."""
    from pyro_bnn.diagnostics.pages.report import report as write_report  # takes seconds, as in `compare`

    with _user_errors(ValueError, OSError):
        place = find_device(device)
        run = runs.read(folder)
        path = out or folder / "report.html"
        _require_free(path, f"{str(path)!r} is there already", overwrite)
        task = run.task()
        net = run.network().to(place)
        write_report(
            run.posterior(net),
            (task.x_test, task.y_test),
            path=path,
            ood=task.x_ood if task.kind == "classification" else None,
            twin=run.posterior(net, "deterministic"),
            title=f"{task.name}: {run.options.describe()}",
            metrics=run.metrics(),
            settings=run.options.used(),
            num_samples=run.options.samples,
            seed=run.options.seed,
        )
    Console(quiet=quiet).print(f"Saved {path}", soft_wrap=True, highlight=False)


@app.command()
def compare(
    data: Annotated[
        str | None, typer.Option(help="as for `fit` [default: that of the first of --runs, or digits]")
    ] = None,
    target: TargetColumn = None,
    task_: TaskOption = None,
    drop: DropColumns = None,
    split: SplitRows = None,
    category: CategoryColumns = None,
    impute: Impute = False,
    methods: Annotated[
        list[str] | None,
        typer.Option(help="to train, with commas or repeated [default: all, or with --runs none]"),
    ] = None,
    runs_: Annotated[
        list[Path] | None, typer.Option("--runs", help="folder of a run to take in; repeat for several")
    ] = None,
    network: Annotated[NetworkName, typer.Option(help="auto: cnn for images, mlp otherwise")] = "auto",
    epochs: Annotated[int, typer.Option(min=1, help="passes over the training data, the same for every method")] = 60,
    batch_size: Annotated[int, typer.Option(min=1, help="rows of a training step")] = 64,
    lr: Annotated[float, typer.Option(help="as for `fit`")] = 1e-2,
    seed: Annotated[int, typer.Option(min=0, help="of weights, batches and draws")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    out: Annotated[Path | None, typer.Option(help="folder [default: runs/compare-DATA]")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace the comparison there, and runs of other options")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="print nothing but errors")] = False,
) -> None:
    """Trains several methods with the same budget, and their deterministic twin once; compares all on the test data.

    Each is a run in a folder of its own under --out. What is finished there already, with the same options, is not
    trained again.
    """
    from pyro_bnn.command import compare as comparing  # takes seconds, which no other command should pay

    console = Console(quiet=quiet)
    with _user_errors(ArithmeticError, ValueError, OSError):
        chosen = comparing.parse_methods(methods, default_all=not runs_)
        place = find_device(device)
        given = [runs.read(folder) for folder in runs_ or []]
        if data is None and given:
            data, target = given[0].options.data, target or given[0].options.target
        task = load_data(
            data or "digits",
            target,
            given[0].encoding if given else None,
            task=task_,
            drop=drop or (),
            split=_split(split),
            category=category or (),
            impute=impute,
        )
        folder = out or Path("runs") / f"compare-{task.name}"
        _require_folder(folder)
        _require_free(folder / "comparison.json", f"{str(folder)!r} holds a comparison already", overwrite)
        asked: dict[str, Any] = {
            "data": str(Path(data).resolve()) if data not in (None, "digits") else "digits",
            "target": target,
            "task": task_,
            "drop": tuple(drop or ()) or None,
            "split": _split(split),
            "category": tuple(category or ()) or None,
            "impute": impute or None,
            "network": None if network == "auto" else network,
            "epochs": epochs,
            "batch_size": batch_size,
            "lr": lr,
            "seed": seed,
            "device": str(place),
        }
        for note in task.notes:
            console.print(f"Note: {note}", soft_wrap=True, highlight=False)
        plan = comparing.plan(folder, chosen, asked, task, overwrite)
        comparing.require_same_data(given, task)
        found = [*given, *comparing.train_all(plan, task, console)]
        console.print(comparing.write(folder, found, task, place))
    console.print(f"Saved in {folder}", soft_wrap=True, highlight=False)


def _pretrained(folder: Path, options: Options, net: nn.Module, task: Task) -> tuple[Trained, pb.Posterior | None]:
    """The deterministic network of another run on data of the same form, and its mean field, if it has one."""
    theirs = runs.read(folder)
    if (theirs.options.network, theirs.in_shape) != (options.network, tuple(task.x_train.shape[1:])):
        raise ValueError(
            f"--pretrained {folder} holds the network {theirs.options.network!r} for inputs of shape "
            f"{theirs.in_shape}; this run has {options.network!r} for {tuple(task.x_train.shape[1:])}"
        )
    field = theirs.options.method == "dense" and theirs.options.components == 1
    return theirs.twin(net), theirs.posterior(net) if field else None


def _table(metrics: Metrics, options: Options, name: str) -> Table:
    title = f"{name}, {options.network}, {options.epochs} epochs"
    table = Table("on test data", options.describe(), "deterministic", title=title)
    for key, shown in formats_of(metrics):
        if key in PRINTED:
            table.add_row(shown.label, shown.text(metrics[key]), shown.text(metrics["deterministic"].get(key)))
    return table


def _split(given: str | None) -> str | float | None:
    """A share where there is a number, else the name of a column."""
    try:
        return None if given is None else float(given)
    except ValueError:
        return given


def _require_folder(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"--out {path} is a file; give a folder")


def _require_free(path: Path, what: str, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise FileExistsError(f"{what}; give another --out, or --overwrite")


@contextmanager
def _user_errors(*kinds: type[Exception], exit_code: int = 2) -> Iterator[None]:
    """Turns what the user can mend into one line on standard error and an exit code."""
    try:
        yield
    except kinds as error:
        typer.echo(f"pyro-bnn: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(exit_code) from error


if __name__ == "__main__":
    app(prog_name="pyro-bnn")
