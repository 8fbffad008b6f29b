"""Access from Python to the run folders of the command line: their posterior, and its predictions for new data."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pyro_bnn import posterior as posteriors
from pyro_bnn.data.encoding import Encoding
from pyro_bnn.data.loading import load_inputs
from pyro_bnn.entry import checks
from pyro_bnn.files import read_json, require_seal
from pyro_bnn.likelihoods import Likelihood
from pyro_bnn.models.architectures.named import build_network
from pyro_bnn.posterior import Posterior, Prediction
from pyro_bnn.priors import PriorLike
from pyro_bnn.program.sites import Program

if TYPE_CHECKING:
    import pandas as pd

RUN_FORMAT = 1
#: number of rows that are predicted at once
ROWS = 4096


@dataclass(frozen=True)
class RunFolder:
    """The content of ``config.json`` of a run folder.

    :param folder: the run folder.
    :param options: every option of `pyro-bnn fit`, by name, with the value that was used.
    :param in_shape: shape of one row of the inputs.
    :param encoding: how raw data became tensors.
    """

    folder: Path
    options: dict[str, Any]
    in_shape: tuple[int, ...]
    encoding: Encoding

    def network(self) -> nn.Module:
        """A new network with the architecture of the run."""
        return build_network(str(self.options["network"]), self.in_shape, len(self.encoding.classes) or 1)


def is_run(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def read_run(folder: Path) -> RunFolder:
    """Reads the configuration of a run folder.

    :raises FileNotFoundError: when the folder is not a run folder.
    :raises ValueError: when this version cannot read its configuration.
    """
    path = folder / "config.json"
    if not is_run(folder):
        raise FileNotFoundError(f"{str(folder)!r} is not the folder of a run: it has no config.json")
    config = read_json(path)
    if config.get("format") != RUN_FORMAT:
        raise ValueError(f"{str(path)!r} has format {config.get('format')!r}, this version reads format {RUN_FORMAT}")
    if "digest" in config:  # older runs have none
        require_seal(config, path)
    try:
        encoding = Encoding.from_json(config["encoding"])
        options = dict(config["options"])
        str(options["network"])
        if encoding.table and encoding.target is None:  # older runs, without `target`
            encoding = dataclasses.replace(encoding, target=options["target"])
        return RunFolder(folder, options, tuple(int(n) for n in config["in_shape"]), encoding)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is not the configuration of a run: {error}") from error


def load(
    path: str | os.PathLike[str],
    net: nn.Module | None = None,
    *,
    model: Program | None = None,
    prior: PriorLike | None = None,
    likelihood: Likelihood | None = None,
    device: torch.device | str | None = None,
) -> Posterior:
    """Loads a posterior that :meth:`Posterior.save` wrote, or the posterior of a run folder of `pyro-bnn fit`.

    With the same ``seed`` it makes the same predictions as before, bit for bit.

    :param path: the folder of a saved posterior, or a run folder.
    :param net: a network of the same architecture. It is copied, and its weights do not matter. Not needed for a run
        folder, which knows its network.
    :param model: for draws of your own Pyro model, that model instead of ``net``. If it is a module it is copied, and
        the copy gets the saved parameters and buffers.
    :param prior: the prior, if it was not saved, or one that replaces the saved prior.
    :param likelihood: replaces the saved likelihood, for a likelihood class of your own that cannot be imported.
    :param device: where to put the posterior; by default the device of ``net``.
    :raises FileNotFoundError: when there is nothing at ``path``.
    :raises ValueError: when it is not a posterior, is damaged, was written by a newer version, or is for another
        network.
    """
    folder = Path(checks.path("path", path))
    if model is not None:
        return posteriors.load(folder, net, model=model, prior=prior, likelihood=likelihood, device=device)
    if is_run(folder):
        net = read_run(folder).network() if net is None else net
        folder = folder / "posterior"
    elif net is None:
        if folder.name in ("posterior", "deterministic") and is_run(folder.parent):
            net = read_run(folder.parent).network()
        elif not folder.exists():
            raise FileNotFoundError(f"there is no posterior at {folder}")
        else:
            raise ValueError(
                f"{folder} is not a run folder, which would know its network: give one of the same architecture, "
                "load(path, net); for draws of your own Pyro model, load(path, model=...)"
            )
    return posteriors.load(folder, net, prior=prior, likelihood=likelihood, device=device)


def predict(
    run: str | os.PathLike[str],
    new: str | os.PathLike[str],
    *,
    level: float = 0.95,
    num_samples: int | None = None,
    seed: int | None = None,
    drop: Sequence[str] = (),
    device: torch.device | str | None = None,
) -> pd.DataFrame:
    """Predicts the rows of a file without targets with the posterior of a run: one row for each, in the same order.

    For a regression the columns are, in the unit of the training file, ``mean``, ``std``, ``aleatoric_std`` (noise)
    and ``epistemic_std`` (weights), with ``std^2 = aleatoric_std^2 + epistemic_std^2``, and the bounds of the central
    interval, named by their quantiles. For a classification they are ``class`` (the most probable one), the probability
    of each class, ``p_NAME``, and in nats ``entropy`` and its parts ``aleatoric`` and ``epistemic``, which add up to
    it. For images the first column is ``file``.

    :param run: a run folder of `pyro-bnn fit`.
    :param new: a file of the same kind as that of training; see :func:`~pyro_bnn.data.load_inputs`.
    :param level: probability of the interval, in (0, 1).
    :param num_samples: draws of every member; by default the number used for the metrics of the run.
    :param seed: of the draws; by default the seed of the run.
    :param drop: columns of a table that are not inputs.
    :param device: where to predict.
    :raises FileNotFoundError: when there is no such run, or no such file.
    :raises ValueError: when the file cannot be read as the training data were, or ``level`` is out of range.
    """
    import pandas as pd  # takes time to import

    level = checks.share("level", level)
    checks.optional(checks.count, "num_samples", num_samples)
    checks.seed("seed", seed)
    known = read_run(Path(run))
    rows = load_inputs(Path(new), known.encoding, known.in_shape[-1], drop=drop)
    if tuple(rows.x.shape[1:]) != known.in_shape:
        raise ValueError(
            f"a row of {str(new)!r} has shape {tuple(rows.x.shape[1:])}, but the network of {str(run)!r} takes "
            f"{known.in_shape}"
        )
    posterior = load(run, device=device)
    asked = known.options.get("samples") if num_samples is None else num_samples
    seed = known.options.get("seed") if seed is None else seed
    # A file without rows gets the same columns as others.
    x = rows.x if len(rows.x) else torch.zeros(1, *known.in_shape)
    tables = [
        in_units(posterior.predict(piece, num_samples=asked, seed=seed), known.encoding, level)
        for piece in x.split(ROWS)
    ]
    table = pd.concat(tables, ignore_index=True).head(len(rows.x))
    if rows.names:
        table.insert(0, "file", rows.names)
    return table


def in_units(prediction: Prediction, encoding: Encoding, level: float = 0.95) -> pd.DataFrame:
    """The table of a prediction, in the unit of the raw target or with the names of the classes."""
    import pandas as pd

    table = prediction.to_dataframe(level)
    if encoding.classes:
        probabilities = {f"p_{name}": table[f"p_{i}"] for i, name in enumerate(encoding.classes)}
        parts = {"entropy": prediction.entropy, "aleatoric": prediction.aleatoric, "epistemic": prediction.epistemic}
        names = [encoding.classes[label] for label in table["class"]]
        numbers = {name: value.double().cpu().numpy() for name, value in parts.items()}
        return pd.DataFrame({"class": pd.Series(names, dtype=object)} | probabilities | numbers)
    table.columns = [name.removesuffix("[0]") for name in table.columns]
    spreads = {"std", "aleatoric_std", "epistemic_std"}
    return pd.DataFrame(
        {
            name: values * encoding.y_scale + (0.0 if name in spreads else encoding.y_mean)
            for name, values in table.items()
        }
    )
