"""Checkpoints: files from which a run resumes, written completely or not at all, and found damaged when they are."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_bnn.entry import checks
from pyro_bnn.files import replacing

VERSION = 3
#: what stands behind the content: a digest of all before it, which readers of the content do not see
_TRAILER, _LENGTH = b"\nsha256 ", 73


@dataclass(frozen=True)
class Checkpoint:
    """Where a run keeps its state, and how often: ``fit(..., checkpoint=Checkpoint("run.pt", minutes=10, keep=3))``.

    A path alone stands for ``Checkpoint(path)``: after every epoch, and for chains once a minute. A run also writes at
    its end, and when Ctrl-C or SIGTERM stops it.

    :param path: of the file; a run whose file exists resumes from it.
    :param epochs: write after so many epochs; for chains, draws, those of warm-up counted.
    :param steps: write after so many steps, also within an epoch; for chains, after the draw with that step.
    :param minutes: write when so many minutes have passed since the last time, also within an epoch.
    :param keep: how many files to keep: the newest has the name ``path``, and the others before it have the number of
        their step, ``run-step-00001200.pt``.
    :raises ValueError: for numbers that are not positive.
    :raises TypeError: for a ``path`` that is none.
    """

    path: str | os.PathLike[str]
    epochs: int | None = None
    steps: int | None = None
    minutes: float | None = None
    keep: int = 1

    def __post_init__(self) -> None:
        checks.path("checkpoint", self.path)
        checks.optional(checks.count, "epochs", self.epochs)
        checks.optional(checks.count, "steps", self.steps)
        checks.optional(checks.positive, "minutes", self.minutes)
        checks.count("keep", self.keep)

    @classmethod
    def of(cls, given: str | os.PathLike[str] | Checkpoint | None) -> Checkpoint | None:
        """What a user gave as ``checkpoint=``."""
        return given if given is None or isinstance(given, Checkpoint) else cls(given)

    @property
    def has_interval(self) -> bool:
        """Whether it says when to write."""
        return (self.epochs, self.steps, self.minutes) != (None, None, None)

    @property
    def every_epochs(self) -> int | None:
        """Epochs from one file to the next: 1 where nothing else says when to write."""
        return self.epochs if self.has_interval else 1


class CheckpointFile:
    """The file of a run, written when it is due.

    :param checkpoint: where, and how often.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.path = checkpoint, Path(checkpoint.path)
        self._written_at = time.monotonic()
        self._step: int | None = None  # of the file that is there

    def read(self) -> dict[str, Any] | None:
        """The state that is there; ``None`` without one. See :func:`read`, also for the errors."""
        try:
            state = read(self.path)
        except ValueError as error:
            if older := self.older():
                error.add_note(f"{str(older[0])!r} is the one before it: rename that to resume from there")
            raise
        self._step = None if state is None else int(state["step"])
        return state

    def is_due_after_step(self, step: int) -> bool:
        """Whether to write within an epoch, after so many steps."""
        own = self.checkpoint
        return self._is_late() or own.steps is not None and step % own.steps == 0

    def is_due_after_epoch(self, epoch: int) -> bool:
        every = self.checkpoint.every_epochs
        return every is not None and epoch % every == 0

    def is_due_after_draw(self, draw: int, step: int) -> bool:
        """Whether a chain is to write after a draw, which ends at this step."""
        own = self.checkpoint
        passed = own.steps is not None and step // own.steps > (self._step or 0) // own.steps
        return self._is_late() or passed or own.epochs is not None and draw % own.epochs == 0

    def _is_late(self) -> bool:
        minutes = self.checkpoint.minutes
        return minutes is not None and time.monotonic() - self._written_at >= 60 * minutes

    def write(self, state: dict[str, Any]) -> None:
        """Writes a state with its ``step``, after the file that is there got the name of its own step.

        :raises OSError: when the disk refuses it; what was there then stays.
        """
        if self.checkpoint.keep > 1 and self._step not in (None, state["step"]) and self.path.exists():
            before = self._numbered(self._step)
            before.unlink(missing_ok=True)
            try:
                os.link(self.path, before)
            except OSError:  # a file system without links
                shutil.copy2(self.path, before)
        write(self.path, state)
        self._step, self._written_at = int(state["step"]), time.monotonic()
        for old in self.older()[self.checkpoint.keep - 1 :]:
            old.unlink(missing_ok=True)

    def older(self) -> list[Path]:
        """The files beside the newest, the latest first."""
        path = self.path
        pattern = re.compile(re.escape(f"{path.stem}-step-") + r"\d{8,}" + re.escape(path.suffix))
        found = [file for file in path.parent.glob("*") if pattern.fullmatch(file.name)] if path.parent.is_dir() else []
        return sorted(found, key=lambda file: int(file.stem.rpartition("-")[2]), reverse=True)

    def _numbered(self, step: int | None) -> Path:
        return self.path.with_name(f"{self.path.stem}-step-{step or 0:08d}{self.path.suffix}")


def write(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Writes tensors, numbers, strings and containers of them, tensors as those of the processor; whole or not at all.

    :raises OSError: when the disk refuses it.
    """
    state = pytree.tree_map(lambda leaf: leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf, state)
    with replacing(Path(path)) as temporary:
        try:
            with temporary.open("wb") as file:
                torch.save({"format": "pyro_bnn checkpoint", "version": VERSION, **state}, file)
        except RuntimeError as error:  # torch stumbles over what a full disk left out
            cause = error.__context__
            raise OSError(*(cause.args if isinstance(cause, OSError) else (str(error),))) from error
        with temporary.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        with temporary.open("ab") as file:
            file.write(_TRAILER + digest.encode() + b"\n")


def read(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What :func:`write` wrote, on the CPU; ``None`` when there is no file.

    :raises ValueError: when the file is damaged, no checkpoint, or of a newer version.
    """
    path = Path(path)
    if not path.exists():
        return None
    is_sealed = _require_digest(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is not a readable checkpoint ({error}); remove it to start afresh") from error
    if not isinstance(state, dict) or state.get("format") != "pyro_bnn checkpoint":
        raise ValueError(f"{path} is not a pyro_bnn checkpoint; choose another path or remove it")
    version = state.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise ValueError(f"{path} was written by a newer pyro_bnn (checkpoint version {version})")
    if version > 1 and not is_sealed:
        raise ValueError(f"{path} is a damaged checkpoint (its digest is missing); remove it to start afresh")
    return state


def _require_digest(path: Path) -> bool:
    """Whether the file has a digest, which is then right; the first version had none.

    :raises ValueError: when it is wrong.
    """
    length = path.stat().st_size - _LENGTH
    with path.open("rb") as file:
        file.seek(max(0, length))
        trailer = file.read()
        if not trailer.startswith(_TRAILER):
            return False
        file.seek(0)
        found = hashlib.sha256()
        while length > 0 and (part := file.read(min(length, 2**20))):
            found.update(part)
            length -= len(part)
    if trailer != _TRAILER + found.hexdigest().encode() + b"\n":
        raise ValueError(f"{path} is a damaged checkpoint (its digest is another); remove it to start afresh")
    return True
