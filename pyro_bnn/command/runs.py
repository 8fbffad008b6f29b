"""Run folders, which `pyro-bnn fit` writes and the other commands read.

A run folder holds

- ``config.json``: every option as it was used, the shape of the inputs and how raw data became tensors;
- ``metrics.json``: the metrics of the Bayesian network, under ``deterministic`` those of its twin, and a digest;
- ``posterior/`` and ``deterministic/``: the two fitted posteriors, for `pyro_bnn.load`;
- ``posterior.nc``: the posterior and its predictions on test data, for ArviZ;
- ``report.html``: the page of `pyro-bnn report`, if it was run.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

import pyro_bnn as pb
from pyro_bnn.command.options import Options
from pyro_bnn.command.recipes import Fitted, Metrics, Trained
from pyro_bnn.data import Encoding, Task
from pyro_bnn.data import load as load_data
from pyro_bnn.data.run_folder import RUN_FORMAT, read_run
from pyro_bnn.files import read_json, replacing, require_seal, sealed, write_json
from pyro_bnn.models.architectures.named import build_network
from pyro_bnn.posterior.draw_source import POSTERIOR_DRAWS

ARVIZ_ROWS = 1000


class ArvizFileError(Exception):
    """Raised when a run was saved, but ``posterior.nc`` could not be written."""


@dataclass(frozen=True)
class Run:
    """A finished run.

    :param folder: the run folder.
    :param options: the options of the run.
    :param in_shape: shape of one row of its inputs.
    :param encoding: how raw data became tensors.
    """

    folder: Path
    options: Options
    in_shape: tuple[int, ...]
    encoding: Encoding

    def task(
        self,
        data: str | None = None,
        target: str | None = None,
        *,
        drop: Sequence[str] = (),
        split: str | float | None = None,
    ) -> Task:
        """The data of the run, or other data of the same form, read in the same way.

        :param drop, split: see :func:`pyro_bnn.data.from_csv`.
        :raises ValueError: when the data have another form.
        :raises OSError: when they cannot be read.
        """
        if target is None and (data is None or Path(data).suffix.lower() == ".csv"):
            target = self.options.target
        task = load_data(data or self.options.data, target, self.encoding, self.in_shape[-1], drop=drop, split=split)
        if tuple(task.x_test.shape[1:]) != self.in_shape:
            raise ValueError(
                f"a row of {data or self.options.data!r} has shape {tuple(task.x_test.shape[1:])}, "
                f"but the network of {str(self.folder)!r} takes {self.in_shape}"
            )
        return task

    def network(self) -> nn.Module:
        """A new network with the architecture of the run."""
        return build_network(self.options.network, self.in_shape, len(self.encoding.classes) or 1)

    def posterior(self, net: nn.Module, name: str = "posterior") -> pb.Posterior:
        """The posterior of the Bayesian network or, for the name ``"deterministic"``, of its twin."""
        return pb.load(self.folder / name, net)

    def twin(self, net: nn.Module) -> Trained:
        known = self.metrics().get("deterministic", {})
        cost = {key: known.get(key) for key in ("seconds", "trainable_parameters")}
        return Trained(self.posterior(net, "deterministic"), cost)

    @property
    def is_measured(self) -> bool:
        return (self.folder / "metrics.json").is_file()

    def metrics(self) -> Metrics:
        """The metrics of the run, and under ``deterministic`` those of its twin.

        :raises FileNotFoundError: when the run has no metrics.
        :raises ValueError: when the file is damaged, or does not hold the metrics of a run and its twin.
        """
        if not self.is_measured:
            raise FileNotFoundError(
                f"the run in {str(self.folder)!r} has no metrics.json; `pyro-bnn evaluate {self.folder}` makes one"
            )
        path = self.folder / "metrics.json"
        found = read_json(path)
        try:
            if "digest" in found:  # older files have none
                require_seal(found, path)
        except ValueError as error:
            raise ValueError(f"{error}; or remove it, and `pyro-bnn evaluate {self.folder}` makes one") from None
        found.pop("digest", None)
        scores = {name: value for name, value in found.items() if not isinstance(value, dict)}
        twin = found.get("deterministic")
        if not isinstance(twin, dict) or not scores or not _are_scores(scores, found) or not _are_scores(twin, twin):
            raise ValueError(
                f"{str(path)!r} does not hold the scores of a run: it is damaged. Remove it, and `pyro-bnn evaluate "
                f"{self.folder}` makes one"
            )
        return found


def _are_scores(scores: Metrics, found: Metrics) -> bool:
    """Whether all scores are numbers, or ``None`` because the data do not allow them, beside a shift."""
    from pyro_bnn.diagnostics import Shift  # takes a second to import

    try:
        if "shift" in found:  # older runs have none
            Shift.from_json(found["shift"])
    except (TypeError, KeyError, ValueError, AttributeError):
        return False
    return all(value is None or isinstance(value, (int, float)) for name, value in scores.items() if name != "shift")


def read(folder: Path) -> Run:
    """Reads the run in a folder.

    :raises FileNotFoundError: when there is none.
    :raises ValueError: when this version cannot read its configuration.
    """
    found = read_run(folder)
    try:
        options: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in found.options.items()
        }
        return Run(folder, Options(**options), found.in_shape, found.encoding)
    except TypeError as error:
        path = folder / "config.json"
        raise ValueError(f"{str(path)!r} is not the configuration of a run: {error}") from error


def save(folder: Path, task: Task, options: Options, fitted: Fitted) -> None:
    """Writes everything that the other commands read.

    ``config.json`` is written last: without it a folder is not a run, whatever else a killed process left in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stale in ("config.json", "posterior.nc", "report.html"):
        (folder / stale).unlink(missing_ok=True)
    fitted.posterior.save(folder / "posterior")
    fitted.twin.posterior.save(folder / "deterministic")
    write_metrics(folder / "metrics.json", fitted.metrics)
    config = {
        "format": RUN_FORMAT,
        "options": asdict(options),
        "in_shape": list(task.x_train.shape[1:]),
        "encoding": asdict(task.encoding),
    }
    write_json(folder / "config.json", sealed(config))


def write_metrics(path: Path, metrics: Metrics) -> None:
    """Writes metrics with a digest, which reveals damage to the file."""
    write_json(path, sealed(metrics))


def save_for_arviz(folder: Path, task: Task, options: Options, posterior: pb.Posterior) -> None:
    """Writes ``posterior.nc`` into the folder of a saved run, which is complete without it.

    :raises ArvizFileError: when the file cannot be written, because ArviZ lacks a library or the disk is full.
    """
    source = posterior.draw_source
    num_samples = source.count_all(None, math.ceil(POSTERIOR_DRAWS / source.num_members))
    try:
        with warnings.catch_warnings(), replacing(folder / "posterior.nc") as path:
            warnings.simplefilter("ignore", FutureWarning)  # ArviZ 0.x announces its next release
            draws = pb.diagnostics.to_arviz(
                posterior,
                task.x_test[:ARVIZ_ROWS],
                task.y_test[:ARVIZ_ROWS],
                num_samples=num_samples,
                seed=options.seed,
            )
            draws.to_netcdf(str(path))
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise ArvizFileError(
            f"posterior.nc could not be written ({type(error).__name__}: {error}). The run in {str(folder)!r} is "
            "complete without this file for ArviZ: `evaluate`, `report` and `compare` work. Once the cause is fixed, "
            f"`pyro_bnn.load` reads {str(folder / 'posterior')!r} and `pyro_bnn.diagnostics.to_arviz` makes the file"
        ) from error
