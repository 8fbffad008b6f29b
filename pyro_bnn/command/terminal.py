"""Shared by all commands: options for reading files, errors in one line, and the table of metrics."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from pyro_bnn.command.options import Options
from pyro_bnn.command.recipes import Metrics
from pyro_bnn.command.shifts import shift_note
from pyro_bnn.data import IMAGE_SIZE, Encoding, Task
from pyro_bnn.data import load as load_data
from pyro_bnn.data.digits import number_of_digits
from pyro_bnn.data.task import TaskKind
from pyro_bnn.diagnostics.pages.glossary import formats_of

#: metrics that `fit` and `evaluate` print; metrics.json and the page of `report` have all
PRINTED = frozenset(
    "accuracy rmse nll crps brier ece coverage width aurc ood_auroc cA cRMSE cNLL cECE "
    "seconds trainable_parameters sparsity bits_per_coded_weight".split()
)

#: few digits: of all 1,257 a deterministic network misses hardly one in a hundred, and there is little to gain
DEFAULT_DATA = "digits-100"

# options of the commands that train
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="rows of a training step [default: 64, or a quarter of the rows if fewer]")
]
TargetColumn = Annotated[str | None, typer.Option(help="column of a .csv to predict")]
TaskOption = Annotated[
    TaskKind | None,
    typer.Option("--task", help="whether the target is a class or a number, if its values leave that open"),
]
DropColumns = Annotated[list[str] | None, typer.Option(help="column of a .csv to ignore; repeat for several")]
SplitRows = Annotated[
    str | None,
    typer.Option(help="share of the rows for testing [default: 0.3], or a column of a .csv with train and test"),
]
CategoryColumns = Annotated[
    list[str] | None,
    typer.Option(help="column of a .csv with categories that look like numbers; repeat for several"),
]
Impute = Annotated[
    bool,
    typer.Option("--impute", help="fill empty cells of a .csv with the median, and add an input that says where"),
]


@dataclass(frozen=True)
class DataOptions:
    """The options of the commands that train, for reading files, as they were given."""

    data: str
    target: str | None
    task: TaskKind | None
    drop: list[str] | None
    split: str | None
    category: list[str] | None
    impute: bool

    def read(self, encoding: Encoding | None = None, size: int = IMAGE_SIZE) -> Task:
        """Reads the data; for the parameters and errors see :func:`pyro_bnn.data.load`."""
        return load_data(
            self.data,
            self.target,
            encoding,
            size,
            task=self.task,
            drop=self.drop or (),
            split=parse_split(self.split),
            category=self.category or (),
            impute=self.impute,
        )

    def asked(self) -> dict[str, Any]:
        """The same by their names in :class:`Options`: ``None`` if not given, and paths that hold in any folder."""
        return {
            "data": self.data if number_of_digits(self.data) else str(Path(self.data).resolve()),
            "target": self.target,
            "task": self.task,
            "drop": tuple(self.drop or ()) or None,
            "split": parse_split(self.split),
            "category": tuple(self.category or ()) or None,
            "impute": self.impute or None,
        }


def table_of_metrics(metrics: Metrics, options: Options, name: str) -> Table:
    title = f"{name}, {options.network}, {options.epochs} epochs"
    table = Table("on test data", options.describe(), "deterministic", title=title)
    for key, shown in formats_of(metrics):
        if key in PRINTED:
            table.add_row(shown.label, shown.text(metrics[key]), shown.text(metrics["deterministic"].get(key)))
    return table


def notes_of(task: Task) -> list[str]:
    """What the user should know about the data, and about what is not done with them."""
    own = shift_note(task)
    return [*task.notes, *([own] if own else [])]


def parse_split(given: str | None) -> str | float | None:
    """A share if it is a number, otherwise the name of a column."""
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
    """Context that turns errors that the user can fix into one line on standard error and an exit code."""
    try:
        yield
    except kinds as error:
        typer.echo(f"pyro-bnn: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(exit_code) from error
