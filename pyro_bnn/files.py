"""Files and folders that are written completely or not at all, and digests that detect damage.

New content is written to a separate folder, ``.NAME.TOKEN.partial``, on the same file system, and renamed from there.
The writer holds a lock in that folder. The next writer to the same place can therefore recognise what a killed process
left, and removes it.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

if sys.platform != "win32":
    import fcntl

_LOCK = "lock"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives the name of a file to write, which replaces ``path`` once it is complete.

    After an error ``path`` is as it was. The folders above it are made, a symbolic link stays one, and the permissions
    are those that the umask gives to a new file.

    :raises OSError: when it cannot be written; the message names ``path``.
    """
    place = Path(os.path.realpath(path))
    with _naming(path), _workspace(place.parent, place.name) as workspace:
        temporary = workspace / place.name
        yield temporary
        _permit(workspace)
        os.replace(temporary, place)


@contextlib.contextmanager
def replacing_folder(path: Path, last: str = "") -> Iterator[Path]:
    """Gives an empty folder to write to, whose files are moved to ``path`` once all are written.

    If ``path`` does not exist, it appears complete. If it exists, files of the same names are replaced one by one,
    ``last`` after all others, and everything else stays. After an error during writing ``path`` is as it was; after an
    error during replacement the files not yet replaced are as they were. The folders above it are made, a symbolic link
    stays one, and permissions are those that the umask gives.

    :raises OSError: when it cannot be written; the message names ``path``.
    """
    place = Path(os.path.realpath(path))
    with _naming(path):
        _sweep(place.parent, place.name)
        home = place if place.is_dir() else place.parent
        with _workspace(home, place.name) as workspace:
            temporary = workspace / place.name
            temporary.mkdir()
            yield temporary
            _permit(workspace)
            if not place.exists():
                try:
                    os.rename(temporary, place)
                    return
                except OSError:
                    if not place.is_dir():  # another process was faster, and has made the folder
                        raise
            written = sorted(temporary.rglob("*"), key=lambda file: file.name == last)
            for file in written:
                if not file.is_dir():
                    own = place / file.relative_to(temporary)
                    own.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(file, own)


@contextlib.contextmanager
def alone_in(path: Path) -> Iterator[None]:
    """Locks a folder, whether it exists or not: others that lock the same folder wait until this block ends.

    Has no effect on Windows, and on file systems without locks.
    """
    place = Path(os.path.realpath(path))
    if sys.platform == "win32":
        yield
        return
    with _naming(path):
        place.parent.mkdir(parents=True, exist_ok=True)
        while True:
            home = place if place.is_dir() else place.parent
            lock = os.open(home, os.O_RDONLY)
            _hold(lock, wait=True)
            if home == (place if place.is_dir() else place.parent):
                break
            os.close(lock)  # another process made the folder in the meantime
    try:
        yield
    finally:
        os.close(lock)


@contextlib.contextmanager
def _workspace(folder: Path, name: str) -> Iterator[Path]:
    """A temporary folder, locked while it is in use, for the content that will become ``name`` in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder, name)
    while True:
        workspace = folder / f".{name}.{uuid.uuid4().hex[:12]}.partial"
        workspace.mkdir()
        try:
            lock = os.open(workspace / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue  # another process removed the folder before it was locked
        _hold(lock, wait=True)
        if (workspace / _LOCK).exists():
            break
        os.close(lock)
    try:
        yield workspace
    finally:
        _remove(workspace)
        os.close(lock)


def _hold(lock: int, wait: bool) -> bool:
    """Whether this process got the lock; False on Windows and on file systems without locks, where leftovers stay."""
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _sweep(folder: Path, name: str) -> None:
    """Removes what killed processes left when they wrote ``name``. What cannot be removed is harmless, and stays."""
    for workspace in folder.glob(f".{glob.escape(name)}.*.partial"):
        try:
            lock = os.open(workspace / _LOCK, os.O_RDWR)
        except OSError:
            with contextlib.suppress(OSError):
                workspace.rmdir()  # its writer was killed before it took the lock, so it is empty
            continue
        if _hold(lock, wait=False):
            _remove(workspace)
        os.close(lock)


def _remove(workspace: Path) -> None:
    """Removes the folder, the lock last: if the process is killed meanwhile, the next sweep recognises the rest."""
    with contextlib.suppress(OSError):
        for child in workspace.iterdir():
            if child.is_dir():
                shutil.rmtree(child, ignore_errors=True)
            elif child.name != _LOCK:
                child.unlink(missing_ok=True)
    shutil.rmtree(workspace, ignore_errors=True)


def _permit(workspace: Path) -> None:
    """Gives all files the permissions of a new file; libraries that write through temporary files set others."""
    mode = (workspace / _LOCK).stat().st_mode & 0o777
    for file in workspace.rglob("*"):
        if not file.is_dir():
            file.chmod(mode)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Makes system errors name the path that was to be written instead of the temporary file."""
    try:
        yield
    except OSError as error:
        kept = "what was there before is as it was" if os.path.lexists(path) else "nothing is left of it"
        if error.errno is None:
            raise OSError(f"{str(path)!r} could not be written ({error}); {kept}") from error
        raise OSError(error.errno, f"could not be written ({error.strerror}); {kept}", str(path)) from error


# ------------------------------------------------------------------------------------------------------ content


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a file of safetensors.

    :raises OSError: when the disk refuses it.
    """
    try:
        safetensors.torch.save_file(dict(tensors), path, dict(metadata))
    except SafetensorError as error:
        raise OSError(str(error)) from error


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 digest of the names, dtypes, shapes and values of tensors."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        found.update(f"{len(name)} {name} {value.dtype} {list(value.shape)}\n".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content, as JSON represents it, with its own digest under ``digest``."""
    as_json: dict[str, Any] = json.loads(json.dumps(content))
    return {**as_json, "digest": _seal(as_json)}


def require_seal(content: Mapping[str, Any], path: Path) -> None:
    """
    :raises ValueError: unless the content is unchanged since :func:`sealed`.
    """
    own = {name: value for name, value in content.items() if name != "digest"}
    if content.get("digest") != _seal(own):
        raise ValueError(
            f"{str(path)!r} is damaged or was edited: its digest is not that of its content. Save it again, or restore "
            "it from a copy"
        )


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, content: Mapping[str, object]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Reads the object in a JSON file.

    :raises OSError: when the file cannot be read.
    :raises ValueError: when it is not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is not JSON ({error}): it is damaged, or no file of pyro_bnn") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} holds {type(content).__name__}, expected an object with names")
    return content
