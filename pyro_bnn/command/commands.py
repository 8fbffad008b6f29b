"""The commands of `pyro-bnn`.

`fit` trains a Bayesian network and its deterministic twin, `evaluate` computes their metrics again, `predict` applies
the Bayesian network to new rows, `report` writes a page about a run, and `compare` one about several methods.
"""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from pyro_bnn.command import runs
from pyro_bnn.command.fit import fit
from pyro_bnn.command.options import NetworkName
from pyro_bnn.command.recipes import find_device, score
from pyro_bnn.command.terminal import (
    DEFAULT_DATA,
    BatchSize,
    CategoryColumns,
    DataOptions,
    DropColumns,
    Impute,
    SplitRows,
    TargetColumn,
    TaskOption,
    notes_of,
    parse_split,
    require_folder,
    require_free,
    table_of_metrics,
    user_errors,
)
from pyro_bnn.data.run_folder import predict as predict_new
from pyro_bnn.files import replacing

#: what :mod:`~pyro_bnn.command.cli` runs
app = typer.Typer(rich_markup_mode=None)

app.command()(fit)


@app.command()
def evaluate(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="run folder of `pyro-bnn fit`")],
    data: Annotated[str | None, typer.Option(help="other data of the same form; its test part is used")] = None,
    target: Annotated[str | None, typer.Option(help="target column of a .csv [default: that of the run]")] = None,
    drop: Annotated[
        list[str] | None, typer.Option(help="column that training did not have; repeat for several")
    ] = None,
    split: Annotated[str | None, typer.Option(help="share or column, as for `fit` [default: that of the run]")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", help="print nothing but errors")] = False,
) -> None:
    """Computes the metrics of a saved run again, on its test data (metrics.json) or others (metrics-NAME.json)."""
    with user_errors(ValueError, OSError):
        place = find_device(device)
        run = runs.read(folder)
        task = run.task(data, target, drop=drop or (), split=parse_split(split))
        net = run.network().to(place)
        posterior, twin = run.posterior(net), run.posterior(net, "deterministic")
        known = run.metrics() if run.is_measured else {}
        metrics = known | score(posterior, task, run.options)
        metrics["deterministic"] = known.get("deterministic", {}) | score(twin, task, run.options)
        runs.write_metrics(folder / ("metrics.json" if data is None else f"metrics-{task.name}.json"), metrics)
    Console(quiet=quiet).print(table_of_metrics(metrics, run.options, task.name))


@app.command()
def predict(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="run folder of `pyro-bnn fit`")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="rows without a target: a file like that of training")],
    out: Annotated[Path | None, typer.Option(help=".csv file to write [default: the console]")] = None,
    level: Annotated[float, typer.Option(help="probability of the interval of a number")] = 0.95,
    samples: Annotated[int | None, typer.Option(min=1, help="number of draws [default: that of the run]")] = None,
    drop: Annotated[
        list[str] | None, typer.Option(help="column that training did not have; repeat for several")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the file that is there")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
) -> None:
    """Predicts rows without a target, in the unit of the training file, as comma-separated values."""
    with user_errors(ValueError, OSError):
        place = find_device(device)
        if out is not None:
            if out.is_dir():
                raise IsADirectoryError(f"--out {out} is a folder; give a file")
            require_free(out, f"{str(out)!r} exists already", overwrite)
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
    """Writes one self-contained page about a saved run: whether to trust it, its metrics and plots."""
    from pyro_bnn.diagnostics.pages.report import report as write_report  # takes seconds to import

    with user_errors(ValueError, OSError):
        place = find_device(device)
        run = runs.read(folder)
        path = out or folder / "report.html"
        require_free(path, f"{str(path)!r} exists already", overwrite)
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
        str | None, typer.Option(help="as for `fit` [default: that of the first of --runs, or digits-100]")
    ] = None,
    target: TargetColumn = None,
    task_: TaskOption = None,
    drop: DropColumns = None,
    split: SplitRows = None,
    category: CategoryColumns = None,
    impute: Impute = False,
    methods: Annotated[
        list[str] | None,
        typer.Option(help="methods to train, with commas or repeated [default: all, or none with --runs]"),
    ] = None,
    runs_: Annotated[
        list[Path] | None, typer.Option("--runs", help="folder of a finished run to include; repeat for several")
    ] = None,
    network: Annotated[NetworkName, typer.Option(help="auto: cnn for images, mlp otherwise")] = "auto",
    epochs: Annotated[int, typer.Option(min=1, help="passes over the training data, the same for every method")] = 60,
    batch_size: BatchSize = None,
    lr: Annotated[float, typer.Option(help="as for `fit`")] = 1e-2,
    seed: Annotated[int, typer.Option(min=0, help="of weights, batches and draws")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    out: Annotated[Path | None, typer.Option(help="folder [default: runs/compare-DATA]")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace the comparison there, and runs with other options")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="print nothing but errors")] = False,
) -> None:
    """Trains several methods with the same budget, and their deterministic twin once; compares all on the test data.

    Each method is a run in its own folder under --out. Runs that are already finished there, with the same options, are
    not trained again.
    """
    from pyro_bnn.command import compare as comparing  # takes seconds to import, for this command alone

    console = Console(quiet=quiet)
    with user_errors(ArithmeticError, ValueError, OSError):
        chosen = comparing.parse_methods(methods, default_all=not runs_)
        place = find_device(device)
        given = [runs.read(folder) for folder in runs_ or []]
        if data is None and given:
            data, target = given[0].options.data, target or given[0].options.target
        source = DataOptions(data or DEFAULT_DATA, target, task_, drop, split, category, impute)
        task = source.read(given[0].encoding if given else None)
        folder = out or Path("runs") / f"compare-{task.name}"
        require_folder(folder)
        require_free(folder / "comparison.json", f"{str(folder)!r} already holds a comparison", overwrite)
        asked: dict[str, Any] = {
            **source.asked(),
            "network": None if network == "auto" else network,
            "epochs": epochs,
            "batch_size": batch_size,
            "lr": lr,
            "seed": seed,
            "device": str(place),
        }
        for note in notes_of(task):
            console.print(f"Note: {note}", soft_wrap=True, highlight=False)
        plan = comparing.plan(folder, chosen, asked, task, overwrite)
        comparing.require_same_data(given, task)
        found = [*given, *comparing.train_all(plan, task, console, overwrite)]
        console.print(comparing.write(folder, found, task, place))
    console.print(f"Saved in {folder}", soft_wrap=True, highlight=False)
