"""`pyro-bnn compare`: trains several methods with the same budget on the same data, in one folder.

The folder holds one run folder for each method that was trained, ``comparison.json`` and ``comparison.html``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import torch
from rich.console import Console
from rich.table import Table

import pyro_bnn as pb
from pyro_bnn.command import runs
from pyro_bnn.command.options import MethodName, Options, check, complete
from pyro_bnn.command.recipes import Metrics, Trained, new_network, train_and_score
from pyro_bnn.command.runs import Run
from pyro_bnn.command.unfinished import Unfinished
from pyro_bnn.data import Task
from pyro_bnn.data.run_folder import is_run
from pyro_bnn.diagnostics.pages.comparison import Candidate, PairedDifference, comparison
from pyro_bnn.diagnostics.pages.glossary import best_of, formats_of
from pyro_bnn.distributed import processes
from pyro_bnn.files import write_json

COMPARISON_FORMAT = 1
#: metrics that are printed; the page has all of them
COLUMNS = {"accuracy", "rmse", "nll", "crps", "ece", "coverage", "ood_auroc", "cA", "cRMSE", "cNLL", "seconds"}


@dataclass(frozen=True)
class Planned:
    """A run that is finished, or still has to be trained."""

    folder: Path
    options: Options
    finished: Run | None


def parse_methods(given: Sequence[str] | None, default_all: bool) -> list[MethodName]:
    """The methods named in comma-separated lists, each once and in the given order.

    :raises ValueError: for an unknown name.
    """
    known: tuple[MethodName, ...] = get_args(MethodName)
    if given is None:
        return list(known) if default_all else []
    names = [name.strip() for piece in given for name in piece.split(",") if name.strip()]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"--methods: there is no {unknown[0]!r}; the methods are {', '.join(known)}")
    if not names:
        raise ValueError(f"--methods is empty; the methods are {', '.join(known)}")
    return [method for name in dict.fromkeys(names) for method in known if method == name]


def plan(
    folder: Path, methods: Sequence[MethodName], asked: Mapping[str, object], task: Task, overwrite: bool
) -> list[Planned]:
    """The runs of a comparison: those that are finished, and those to train.

    :raises ValueError: when an option is out of range, or the folder has a run on other data.
    :raises FileExistsError: when the folder has a run with other options and ``overwrite`` is not set.
    """
    planned = []
    for method in methods:
        check(method, asked)
        options, place = complete(method, asked, task), folder / method
        finished = runs.read(place) if is_run(place) else None
        if finished is not None and overwrite and (finished.options, finished.encoding) != (options, task.encoding):
            finished = None
        if finished is not None:
            _require_same_options(finished, options)
            require_same_data([finished], task)
        planned.append(Planned(place, options, finished))
    return planned


def _require_same_options(run: Run, options: Options) -> None:
    theirs = asdict(run.options)
    other = [f"{name} {theirs[name]}, not {value}" for name, value in asdict(options).items() if theirs[name] != value]
    if other:
        raise FileExistsError(
            f"{str(run.folder)!r} holds a run with other options ({'; '.join(other)}); give another --out, or "
            "--overwrite"
        )


def require_same_data(found: Sequence[Run], task: Task) -> None:
    """Checks that runs and task have the same test data.

    :raises ValueError: when the test data of a run, or the unit of its target, differ from those of the task.
    """
    for run in found:
        theirs = run.task()
        ours, own = task.encoding, theirs.encoding
        same_unit = _same(torch.tensor([ours.y_mean, ours.y_scale]), torch.tensor([own.y_mean, own.y_scale]))
        if not (
            same_unit
            and theirs.encoding.classes == task.encoding.classes
            and _same(theirs.x_test, task.x_test)
            and _same(theirs.y_test, task.y_test)
        ):
            raise ValueError(
                f"the test data of {str(run.folder)!r} ({run.options.data}) differ from those of the others; a "
                "comparison needs the same test data for all"
            )


def _save_for_arviz(one: Planned, task: Task, posterior: pb.Posterior) -> None:
    """Writes the file for ArviZ. A failure is printed, not raised, as no comparison reads the file."""
    try:
        runs.save_for_arviz(one.folder, task, one.options, posterior)
    except runs.ArvizFileError as error:
        Console(stderr=True).print(f"pyro-bnn: {error}", soft_wrap=True, highlight=False)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equality up to the rounding of float32, in which older runs computed their means."""
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-6, atol=1e-6)


def train_all(planned: Sequence[Planned], task: Task, console: Console, overwrite: bool) -> list[Run]:
    """Trains the runs that are not finished. The deterministic network is trained once, or taken from a finished run.

    :raises ArithmeticError, ValueError: when training diverges, or the network does not accept the data.
    """
    twin: Trained | None = None
    for one in planned:
        if one.finished is not None and twin is None:
            twin = one.finished.twin(new_network(one.options, task, console))
    found = []
    for one in planned:
        if one.finished is not None:
            console.print(f"{one.options.method}: already finished", highlight=False)
            found.append(one.finished)
            if not (one.folder / "posterior.nc").exists():  # the process was killed, or the disk was full
                _save_for_arviz(one, task, one.finished.posterior(new_network(one.options, task, console)))
            continue
        console.print(f"{one.options.method}:", highlight=False)
        state = Unfinished(one.folder, "the same command")
        state.begin(json.loads(json.dumps(asdict(one.options))), overwrite)
        net = new_network(one.options, task, console)
        with state.stopping():
            fitted = train_and_score(net, task, one.options, console, state, twin)
        twin = fitted.twin
        if processes().is_first:
            runs.save(one.folder, task, one.options, fitted)
            state.end()
            _save_for_arviz(one, task, fitted.posterior)
        processes().gather(None)
        found.append(runs.read(one.folder))
    return found


def write(folder: Path, found: Sequence[Run], task: Task, device: torch.device) -> Table:
    """Writes ``comparison.html`` and ``comparison.json``.

    :returns: the main metrics as a table for the console.
    """
    candidates = _candidates(found, device)
    shared = found[0].options.used()
    for run in found[1:]:
        theirs = run.options.used()
        shared = {name: value for name, value in shared.items() if theirs.get(name) == value}
    folder.mkdir(parents=True, exist_ok=True)
    gaps = comparison(
        candidates,
        (task.x_test, task.y_test),
        path=folder / "comparison.html",
        ood=task.x_ood if task.kind == "classification" else None,
        title=f"Comparison: {task.name}",
        settings=shared,
        seed=found[0].options.seed,
    )
    content = {
        "format": COMPARISON_FORMAT,
        "settings": shared,
        "runs": {name: str(run.folder.resolve()) for name, run in _labels(found).items()},
        "metrics": {name: one.metrics for name, one in candidates.items()},
        "nll_difference": {name: asdict(gap) for name, gap in gaps.items()},
    }
    write_json(folder / "comparison.json", content)
    return _table(candidates, gaps, task.name)


def _labels(found: Sequence[Run]) -> dict[str, Run]:
    """Runs by the names of their folders, or by their paths if names repeat."""
    names = [run.folder.resolve().name for run in found]
    if len(set(names)) < len(names):
        names = [str(run.folder) for run in found]
    return dict(zip(names, found, strict=True))


def _candidates(found: Sequence[Run], device: torch.device) -> dict[str, Candidate]:
    """All runs, followed by their distinct deterministic networks."""
    candidates: dict[str, Candidate] = {}
    twins: list[tuple[str, Candidate]] = []
    for label, run in _labels(found).items():
        net = run.network().to(device)
        metrics = run.metrics()
        about = f"{run.options.describe()}, {run.options.epochs} epochs"
        candidates[label] = _candidate(run.posterior(net), metrics, run.options.samples, about)
        twin = run.posterior(net, "deterministic")
        if not any(_same_weights(twin, known.posterior) for _, known in twins):
            about = f"{run.options.network}, {run.options.epochs} epochs"
            twins.append((label, _candidate(twin, metrics["deterministic"], run.options.samples, about)))
    for label, known in twins:
        candidates["deterministic" if len(twins) == 1 else f"deterministic of {label}"] = known
    return candidates


def _candidate(posterior: pb.Posterior, metrics: Metrics, samples: int, about: str) -> Candidate:
    own = {name: value for name, value in metrics.items() if name == "shift" or not isinstance(value, dict)}
    return Candidate(posterior, own, samples, about)


def _same_weights(one: pb.Posterior, other: pb.Posterior) -> bool:
    ours, theirs = one.draws(1), other.draws(1)
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def _table(candidates: Mapping[str, Candidate], gaps: Mapping[str, PairedDifference], name: str) -> Table:
    shown = {key: one for key, one in formats_of(*(c.metrics for c in candidates.values())) if key in COLUMNS}
    table = Table(title=f"{name}, on test data", caption="* best", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("", no_wrap=True)
    for one in shown.values():
        table.add_column(one.label, justify="right")
    table.add_column("NLL − best", justify="right", no_wrap=True)
    best = {key: best_of(one, [c.metrics.get(key) for c in candidates.values()]) for key, one in shown.items()}
    for label, candidate in candidates.items():
        cells = []
        for key, one in shown.items():
            value = candidate.metrics.get(key)
            cells.append(one.text(value) + ("*" if value is not None and value == best[key] else ""))
        table.add_row(label, *cells, str(gaps[label]))
    return table
