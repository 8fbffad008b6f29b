"""Writes draws to disk during a run: one ``.npy`` file for every site, and a file with the number of complete draws.

The files have their full size from the start, so that a full disk is detected before sampling. After the last draw they
contain zeros; only ``draws.count``, which holds the number of draws that all chains have completed, distinguishes these
from draws. ``draws.json`` describes the sites and chains.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from torch import Tensor

from pyro_bnn import display
from pyro_bnn.files import read_json, require_seal, sealed, write_json
from pyro_bnn.posterior import Posterior

_FORMAT, _VERSION = "pyro_bnn streamed draws", 1
_JSON, _COUNT = "draws.json", "draws.count"
#: a character that no name of a site has in the name of its file
_STATISTICS = "statistics="


class DrawFiles:
    """The files of one run, with room for all its draws.

    :param folder: is made where there is none.
    :param chains, samples: number of chains, and of draws of each.
    :param values: a draw of every chain, ``{site: [chains, *event]}``.
    :param statistics: ``{buffer of the network: [*shape]}``, of which every draw has its own.
    :param resumed: whether to open the files that are there, of the same run before it was interrupted.
    :param anew: whether to remove files that are there, of the same run before it had a draw.
    :raises ValueError: when the folder holds draws of an earlier run; or if resumed, when it does not hold these.
    :raises OSError: when the disk has no room for them; nothing is left of them then.
    """

    def __init__(
        self,
        folder: Path,
        chains: int,
        samples: int,
        values: Mapping[str, Tensor],
        statistics: Mapping[str, Tensor],
        *,
        resumed: bool = False,
        anew: bool = False,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        shapes = {_file(folder, name): ((chains, samples, *v.shape[1:]), v.dtype) for name, v in values.items()}
        shapes |= {_file(folder, name, _STATISTICS): ((samples, *v.shape), v.dtype) for name, v in statistics.items()}
        content = {"format": _FORMAT, "version": _VERSION, "chains": chains, "samples": samples}
        content |= {"sites": list(values), "statistics": list(statistics)}
        if resumed:
            arrays = _reopened(folder, shapes, content)
            self._count = (folder / _COUNT).open("r+b", buffering=0)
        else:
            for path in (folder / _JSON, folder / _COUNT, *shapes) if anew else ():
                path.unlink(missing_ok=True)
            arrays = self._made(folder, shapes, content)
        #: ``{site: [chains, samples, *event]}`` and ``{buffer: [samples, *shape]}``, to be written to
        self.draws = {name: arrays[_file(folder, name)] for name in values}
        self.statistics = {name: arrays[_file(folder, name, _STATISTICS)] for name in statistics}

    def _made(self, folder: Path, shapes: Mapping[Path, Any], content: dict[str, Any]) -> dict[Path, Tensor]:
        require_no_draws(folder, shapes)
        made: list[Path] = []
        try:
            arrays = {path: _reserved(path, shape, dtype, made) for path, (shape, dtype) in shapes.items()}
            made += [folder / _JSON, folder / _COUNT]
            write_json(folder / _JSON, sealed(content))
            self._count = (folder / _COUNT).open("wb", buffering=0)
            self._set_count(0)
        except BaseException:
            for path in made:
                path.unlink(missing_ok=True)
            raise
        return arrays

    @contextmanager
    def adding(self, draw: int) -> Iterator[None]:
        """Inside, the draw of this number is written; it counts afterwards."""
        yield
        self._set_count(draw + 1)

    def close(self) -> None:
        self._count.close()

    def _set_count(self, count: int) -> None:
        self._count.seek(0)
        self._count.write(b"%12d\n" % count)  # one call of the system, which a kill does not divide


def require_no_draws(folder: Path, others: Iterable[Path] = ()) -> None:
    """Refuses a folder with draws of an earlier run.

    :param others: files that must not exist either.
    :raises ValueError: names the first file that does.
    """
    for path in (folder / _JSON, folder / _COUNT, *others):
        if path.exists():
            raise ValueError(
                f"{str(path)!r} exists: stream= takes a folder without draws of an earlier run. Read those with "
                "pyro_bnn.inference.load_stream(folder, model), then give another folder or remove this one"
            )


def load_stream(folder: str | os.PathLike[str], model: Callable[..., Any]) -> Posterior:
    """Loads the draws that ``sample(..., stream=folder)`` wrote, whether the run finished or was killed.

    :param folder: the folder that was given as ``stream=``.
    :param model: the model that was sampled.
    :return: a posterior with all draws that every chain has completed; they stay on disk until they are used.
    :raises FileNotFoundError: when there are no streamed draws in the folder.
    :raises ValueError: when the files are damaged, or contain no complete draw.
    """
    folder = Path(folder)
    path = folder / _JSON
    if not path.is_file():
        raise FileNotFoundError(f"{str(folder)!r} holds no streamed draws: it has no {_JSON}")
    content = read_json(path)
    if content.get("format") != _FORMAT:
        raise ValueError(f"{str(path)!r} is not a file of {_FORMAT}")
    require_seal(content, path)
    if content["version"] > _VERSION:
        raise ValueError(f"{str(path)!r} was written by a newer pyro_bnn (version {content['version']}): install that")
    chains, samples = content["chains"], content["samples"]
    count = _read_count(folder / _COUNT, samples)
    draws = {
        name: _opened(_file(folder, name), (chains, samples))[:, :count].flatten(0, 1) for name in content["sites"]
    }
    statistics = {name: _opened(_file(folder, name, _STATISTICS), (samples,))[:count] for name in content["statistics"]}
    return Posterior.from_draws(model, draws, chains, statistics)


def _read_count(path: Path, samples: int) -> int:
    try:
        count = int(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is damaged: it does not hold the number of draws") from error
    if not 0 <= count <= samples:
        raise ValueError(f"{str(path)!r} is damaged: it says {count} draws, and the files have room for {samples}")
    if count == 0:
        raise ValueError(f"{str(path.parent)!r} holds no draw yet: the run has not completed its first draw")
    return count


def _opened(path: Path, lead: tuple[int, ...]) -> Tensor:
    try:
        array = np.load(path, mmap_mode="c", allow_pickle=False)
        value = torch.from_numpy(array)
    except (OSError, TypeError, ValueError, EOFError) as error:
        raise ValueError(f"{str(path)!r} is damaged or missing ({error})") from error
    if value.shape[: len(lead)] != lead:
        raise ValueError(f"{str(path)!r} is damaged: it has shape {tuple(value.shape)}, expected {lead} and the event")
    return value


def _reopened(folder: Path, shapes: Mapping[Path, Any], content: dict[str, Any]) -> dict[Path, Tensor]:
    """The files of this run from before it was interrupted, to be written to."""
    path = folder / _JSON
    if not path.is_file():
        raise ValueError(f"{str(folder)!r} has lost the draws of the checkpoint: remove that to start afresh")
    there = read_json(path)
    require_seal(there, path)
    if any(there[name] != value for name, value in content.items()):
        raise ValueError(f"{str(folder)!r} holds the draws of another run: remove the checkpoint to start afresh")
    found = {}
    for file, (shape, _) in shapes.items():
        try:
            found[file] = torch.from_numpy(np.load(file, mmap_mode="r+", allow_pickle=False))
        except (OSError, TypeError, ValueError, EOFError) as error:
            raise ValueError(f"{str(file)!r} is damaged or missing ({error})") from error
        if tuple(found[file].shape) != tuple(shape):
            raise ValueError(f"{str(file)!r} is damaged: it has shape {tuple(found[file].shape)}, expected {shape}")
    return found


def _reserved(path: Path, shape: tuple[int, ...], dtype: torch.dtype, made: list[Path]) -> Tensor:
    """A file of this size that the disk has room for: to write to a mapped page without any ends the process."""
    made.append(path)
    array = np.lib.format.open_memmap(path, mode="w+", dtype=torch.empty((), dtype=dtype).numpy().dtype, shape=shape)
    size = path.stat().st_size
    try:
        with path.open("r+b") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                start = size - array.nbytes
                file.seek(start)
                for begin in range(start, size, 2**20):
                    file.write(bytes(min(2**20, size - begin)))
    except OSError as error:
        raise OSError(
            error.errno,
            f"no room for the draws, {display.size(size)} ({error.strerror}); nothing was sampled",
            str(path),
        ) from error
    return torch.from_numpy(array)


def _file(folder: Path, name: str, prefix: str = "") -> Path:
    return folder / f"{prefix}{quote(name, safe='')}.npy"
