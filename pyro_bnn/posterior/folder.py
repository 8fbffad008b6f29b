"""The two files of a saved posterior: written completely or not at all, and checked against their digests when read.

``posterior.json`` has a digest of itself and a digest of ``tensors.safetensors``. ``tensors.safetensors`` contains a
second copy of the description, and the digest of the description that it replaces. It is therefore a complete posterior
as soon as it replaces an older file: a save that is killed, even between the two files, leaves the old or the new
posterior.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pyro_bnn.files import alone_in, digest_of, read_json, replacing_folder, require_seal, sealed, write_tensors
from pyro_bnn.posterior import older

FORMAT = "pyro_bnn posterior"
VERSION = 3
_JSON, _TENSORS = "posterior.json", "tensors.safetensors"
#: keys of the metadata of the tensors: the description, and the digest of the description file that it replaces
_EMBEDDED, _REPLACES = "posterior", "replaces"
#: the first version with digests
_FIRST_SEALED = 3
#: the errors that inconsistent descriptions and tensors raise
MISFITS = (
    AttributeError,
    IndexError,
    KeyError,
    OverflowError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
)


def write_contents(path: str | os.PathLike[str], description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes the folder ``path``, which may hold an older posterior.

    :param description: values that JSON can represent.
    :param tensors: on the CPU, without shared memory.
    :raises FileExistsError: when ``path`` exists and is not a posterior.
    """
    head = {"format": FORMAT, "version": VERSION}
    content = sealed({**head, **description, "tensors": digest_of(tensors)})
    path = Path(path)
    if path.exists() and not (path / _JSON).is_file():
        raise FileExistsError(f"{path} exists and is not a posterior; choose another path or remove it")
    with alone_in(path), replacing_folder(path, last=_JSON) as temporary:
        written = {_EMBEDDED: json.dumps(content)}
        if (path / _JSON).is_file():
            written[_REPLACES] = _digest_of_file(path / _JSON)
        write_tensors(temporary / _TENSORS, tensors, written)
        (temporary / _JSON).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def contents(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The contents of the two files, converted to the current version, with all digests checked."""
    file = path / _JSON
    if not file.is_file():
        raise ValueError(f"{path} is not a posterior: it has no {_JSON}. Give the folder that posterior.save() wrote")
    content = read_json(file)
    version = _version(content, file)
    if version >= _FIRST_SEALED or "digest" in content:
        require_seal(content, file)
    tensors, metadata = _read_tensors(path / _TENSORS)
    if metadata.get(_REPLACES) == _digest_of_file(file):
        # a save was killed after its numbers had taken the place of older ones, and before its description had
        content = _embedded(metadata, path / _TENSORS)
        version = _version(content, path / _TENSORS)
    if version < _FIRST_SEALED:
        return _as_now(content, version, file), tensors
    if content["tensors"] != digest_of(tensors):
        raise ValueError(
            f"{path / _TENSORS} is damaged or belongs to another posterior: its digest differs from the one in "
            f"{_JSON}. Save the posterior again, or restore it from a copy"
        )
    return content, tensors


def _version(content: Mapping[str, Any], file: Path) -> int:
    if content.get("format") != FORMAT:
        raise ValueError(f"{file} is not a {FORMAT}")
    version = content.get("version")
    if not isinstance(version, int) or version < 1:
        raise ValueError(f"{file} is damaged: version={version!r}, expected a number from 1 to {VERSION}")
    if version > VERSION:
        raise ValueError(
            f"{file.parent} was written in format version {version}; this pyro_bnn reads versions up to {VERSION}. "
            "Install a newer pyro_bnn"
        )
    return version


def _as_now(content: dict[str, Any], version: int, file: Path) -> dict[str, Any]:
    try:
        return older.from_version_1(content) if version == 1 else content
    except MISFITS as error:
        raise ValueError(f"{file} is damaged ({type(error).__name__}: {error}); save the posterior again") from error


def _embedded(metadata: Mapping[str, str], file: Path) -> dict[str, Any]:
    try:
        content = json.loads(metadata[_EMBEDDED])
        require_seal(content, file)
    except MISFITS as error:
        raise ValueError(f"{file} is damaged ({error}); save the posterior again") from error
    return dict(content)


def _digest_of_file(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not file.is_file():
        raise ValueError(f"{file.parent} is incomplete: {file.name} is missing")
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
        # In the file a tensor lies where the header ends, and products round by how their factors lie in memory.
        return {name: value.clone() for name, value in safetensors.torch.load_file(file).items()}, metadata
    except (SafetensorError, OSError, *MISFITS) as error:
        raise ValueError(f"{file} is truncated or damaged ({error}); save the posterior again") from error
