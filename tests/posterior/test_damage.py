"""Damaged posteriors of every method: nothing but the right predictions, or an error that names the file.

The posteriors are those of tests/saved, as they were written by the first version and as they are written now.
"""

from __future__ import annotations

import copy
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyro.distributions as dist
import pytest
import torch
from saved.networks import NETWORKS, inputs
from torch import Tensor

import pyro_bnn as pb

SAVED = Path(__file__).parents[1] / "saved"
EXPECTED: dict[str, Any] = json.loads((SAVED / "expected.json").read_text())["posteriors"]
FILES = ("posterior.json", "tensors.safetensors")
#: edits of each kind of one posterior, in the default tests and in the slow ones
QUICK, LONG = 2, 40


class Whole(NamedTuple):
    """A posterior: its files as the first version wrote them and as they are now, and what it predicts."""

    before: dict[str, bytes]
    now: dict[str, bytes]
    outputs: Tensor


def load(name: str, folder: Path) -> pb.Posterior:
    options: dict[str, Any] = {"prior": dist.Laplace(0.0, 0.5)} if name == "without_prior" else {}
    return pb.load(folder, NETWORKS[EXPECTED[name]["network"]](2), **options)


def predicted(name: str, posterior: pb.Posterior) -> Tensor:
    return posterior.predict(inputs(EXPECTED[name]["network"], 3, seed=3), num_samples=1, seed=0).outputs


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Whole]:
    folder = tmp_path_factory.mktemp("whole")
    with tarfile.open(SAVED / "files.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    found = {}
    for name in EXPECTED:
        old, new = folder / "posteriors" / name, folder / "now" / name
        posterior = load(name, old)
        posterior.save(new, prior=name != "without_prior")
        contents = [{file: (path / file).read_bytes() for file in FILES} for path in (old, new)]
        found[name] = Whole(contents[0], contents[1], predicted(name, posterior))
    return found


# ------------------------------------------------------------------------------------------------------- damage


def truncate(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def flip(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def leaves(node: Any) -> list[tuple[Any, Any]]:
    """Every place of a JSON document, as the container and the key in it."""
    keys: list[Any] = list(node) if isinstance(node, dict) else list(range(len(node))) if isinstance(node, list) else []
    return [(node, key) for key in keys] + [place for key in keys for place in leaves(node[key])]


def edit(content: bytes, rng: random.Random) -> bytes:
    """One value deleted, or replaced by one of another type or size."""
    document = json.loads(content)
    top = rng.choice(list(document))  # long lists of losses must not take all the edits
    places = [(document, top), *leaves(document[top])]
    container, key = rng.choice(places)
    others: list[Any] = [None, True, -1, 0, 10**9, 10**30, 2.5, "", "x", [], [3, 4], {}, {"class": "Normal"}, "nan"]
    if rng.random() < 0.3:
        del container[key]
    else:
        container[key] = rng.choice([other for other in others if other != container[key]])
    return json.dumps(document).encode()


def require_right_or_refused(name: str, folder: Path, files: dict[str, bytes], outputs: Tensor | None) -> bool:
    """Whether it was refused. Without outputs, as of files without digests, it need only load or be refused."""
    folder.mkdir(exist_ok=True)
    for file, content in files.items():
        (folder / file).write_bytes(content)
    try:
        posterior = load(name, folder)
        found = None if outputs is None else predicted(name, posterior)
    except (ValueError, OSError) as error:
        assert str(folder) in str(error), error
        return True
    assert found is None or outputs is None or torch.equal(found, outputs)
    return False


KINDS: dict[str, tuple[Callable[[bytes, random.Random], bytes], str]] = {
    "truncated JSON": (truncate, FILES[0]),
    "truncated tensors": (truncate, FILES[1]),
    "flipped JSON": (flip, FILES[0]),
    "flipped tensors": (flip, FILES[1]),
    "edited JSON": (edit, FILES[0]),
}


def damage(name: str, whole: dict[str, Whole], folder: Path, count: int) -> None:
    own, rng = whole[name], random.Random(f"{name} {count}")
    for change, file in KINDS.values():
        for _ in range(count):
            require_right_or_refused(name, folder, own.now | {file: change(own.now[file], rng)}, own.outputs)
            changed = own.before | {file: change(own.before[file], rng)}
            require_right_or_refused(name, folder, changed, None)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_damaged_posterior_is_right_or_refused_by_name(name: str, whole: dict[str, Whole], tmp_path: Path) -> None:
    damage(name, whole, tmp_path / "posterior", QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_many_damaged_posteriors_are_right_or_refused_by_name(
    name: str, whole: dict[str, Whole], tmp_path: Path
) -> None:
    damage(name, whole, tmp_path / "posterior", LONG)


@pytest.mark.parametrize("file", FILES)
def test_files_of_two_posteriors_do_not_mix(file: str, whole: dict[str, Whole], tmp_path: Path) -> None:
    """Proves that one file of any other posterior beside the file of the first is refused."""
    first, *others = EXPECTED
    own = whole[first]
    for other in others:
        mixed = own.now | {file: whole[other].now[file]}
        assert require_right_or_refused(first, tmp_path / "posterior", mixed, own.outputs), other


def test_every_flipped_bit_of_the_numbers_is_found(whole: dict[str, Whole], tmp_path: Path) -> None:
    """Proves it for 200 bits of one file, beyond the header in which names and shapes are."""
    name = next(iter(EXPECTED))
    own, rng = whole[name], random.Random(0)
    content = own.now[FILES[1]]
    start = int.from_bytes(content[:8], "little") + 8
    for _ in range(200):
        files = copy.copy(own.now) | {FILES[1]: content[:start] + flip(content[start:], rng)}
        assert require_right_or_refused(name, tmp_path / "posterior", files, own.outputs)
