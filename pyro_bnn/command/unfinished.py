"""The state of a run that is being made, in ``RUN/unfinished``, from which an interrupted command goes on.

- ``command.json``: what was asked;
- ``NAME.pt``: the checkpoint of the training of that name, and the draws of chains beside it.

The folder goes when the run is saved. Of several processes the first writes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from pyro_bnn.distributed import processes
from pyro_bnn.files import read_json, require_seal, sealed, write_json
from pyro_bnn.inference import Checkpoint

#: minutes from one checkpoint to the next
EVERY = 1.0


@dataclass(frozen=True)
class Unfinished:
    """What is kept of a run until it is saved.

    :param run: the run folder.
    :param again: the command that goes on, for the message.
    """

    run: Path
    again: str

    @property
    def folder(self) -> Path:
        return self.run / "unfinished"

    def begin(self, asked: dict[str, Any], overwrite: bool) -> bool:
        """Notes what was asked; whether a run with the same options is there to go on with.

        :raises FileExistsError: when there is one with other options and ``overwrite`` is not set.
        """
        together, goes_on = processes(), False
        asked = json.loads(json.dumps(asked))  # tuples are lists then, as in the file
        if together.is_first:
            path = self.folder / "command.json"
            goes_on = path.is_file() and not overwrite
            if goes_on:
                before = self.asked()
                other = [f"{k} {before.get(k)}, not {v}" for k, v in asked.items() if before.get(k) != v]
                if other:
                    raise FileExistsError(
                        f"{str(self.run)!r} holds an unfinished run with other options ({'; '.join(other)}): "
                        f"`pyro-bnn fit --resume {self.run}` continues it, and --overwrite starts afresh"
                    )
            else:
                shutil.rmtree(self.folder, ignore_errors=True)
                write_json(path, sealed(asked))
        return together.from_first(goes_on)

    def asked(self) -> dict[str, Any]:
        """What was asked.

        :raises FileNotFoundError: when there is no unfinished run.
        :raises ValueError: when the file is damaged.
        """
        path = self.folder / "command.json"
        if not path.is_file():
            finished = " (the run is finished)" if (self.run / "config.json").is_file() else ""
            raise FileNotFoundError(f"there is no unfinished run in {str(self.run)!r}{finished}")
        found = read_json(path)
        require_seal(found, path)
        found.pop("digest", None)
        return found

    def checkpoint(self, name: str) -> Checkpoint:
        """Where the training of this name keeps its state."""
        return Checkpoint(self.folder / f"{name}.pt", minutes=EVERY)

    def end(self) -> None:
        """The run is saved: its state goes."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def stopping(self) -> Iterator[None]:
        """Inside, Ctrl-C and SIGTERM end the command with a line that says how to go on."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit) as stopped:
            code = 130 if isinstance(stopped, KeyboardInterrupt) else stopped.code
            if processes().is_first:
                typer.echo(f"pyro-bnn: stopped, and saved in {self.folder}. `{self.again}` goes on", err=True)
            raise typer.Exit(code if isinstance(code, int) else 1) from stopped
