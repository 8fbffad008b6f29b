"""What commands have in common: options that say how a file is read, refusals in one line, and the table of metrics."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from pyro_bnn.command.options import Options
from pyro_bnn.command.recipes import Metrics
from pyro_bnn.data.task import TaskKind
from pyro_bnn.diagnostics.pages.glossary import formats_of

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


def table_of_metrics(metrics: Metrics, options: Options, name: str) -> Table:
    title = f"{name}, {options.network}, {options.epochs} epochs"
    table = Table("on test data", options.describe(), "deterministic", title=title)
    for key, shown in formats_of(metrics):
        if key in PRINTED:
            table.add_row(shown.label, shown.text(metrics[key]), shown.text(metrics["deterministic"].get(key)))
    return table


def parse_split(given: str | None) -> str | float | None:
    """A share where there is a number, else the name of a column."""
    try:
        return None if given is None else float(given)
    except ValueError:
        return given


def require_folder(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"--out {path} is a file; give a folder")


def require_free(path: Path, what: str, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise FileExistsError(f"{what}; give another --out, or --overwrite")


@contextmanager
def user_errors(*kinds: type[Exception], exit_code: int = 2) -> Iterator[None]:
    """Turns what the user can mend into one line on standard error and an exit code."""
    try:
        yield
    except kinds as error:
        typer.echo(f"pyro-bnn: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(exit_code) from error
