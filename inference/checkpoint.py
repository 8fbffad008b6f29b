"""The state of a training run on disk, so that it can be stopped and resumed with the same result."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

VERSION = 1


def write(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Writes tensors, numbers, strings and containers of them; the file appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        torch.save({"format": "pyro_bnn checkpoint", "version": VERSION, **state}, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What :func:`write` wrote, on the CPU; ``None`` when there is no file.

    :raises ValueError: when the file is damaged, no checkpoint, or of a newer version.
    """
    if not Path(path).exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is not a readable checkpoint ({error}); remove it to start afresh") from error
    if not isinstance(state, dict) or state.get("format") != "pyro_bnn checkpoint":
        raise ValueError(f"{path} is not a pyro_bnn checkpoint; choose another path or remove it")
    if state["version"] > VERSION:
        raise ValueError(f"{path} was written by a newer pyro_bnn (checkpoint version {state['version']})")
    return state
