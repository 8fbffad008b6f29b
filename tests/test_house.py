"""The house is as the design says: no circle of imports, small folders, and public names that are written down."""

import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from types import ModuleType

import grimp
import pytest

ROOT = Path(__file__).parents[1]
#: python files of one folder, not counting `__init__.py` and `__main__.py`
LARGEST_FOLDER = 14
#: lines of a file; one that is longer than about 400 is two ideas
LONGEST_FILE = 440
#: packages whose names are public under their parent: a user writes `pb.inference.SGHMC`
SHELVES = {
    "pyro_bnn.inference.baselines": "pyro_bnn.inference",
    "pyro_bnn.inference.sgmcmc": "pyro_bnn.inference",
    "pyro_bnn.inference.stein": "pyro_bnn.inference",
    "pyro_bnn.inference.svi": "pyro_bnn.inference",
    "pyro_bnn.models.weight_sharing": "pyro_bnn.models",
}


def code_files() -> list[Path]:
    """Every python file of the package, by its path as it is imported: `models/` stands at the top."""
    return sorted(path for top in ("pyro_bnn", "models", "inference") for path in (ROOT / top).rglob("*.py"))


def package_of(folder: Path) -> str:
    parts = folder.relative_to(ROOT).parts
    return ".".join(parts if parts[0] == "pyro_bnn" else ("pyro_bnn", *parts))


def documented() -> dict[str, list[str]]:
    """The names in the tables of docs/api.md, by the package in the heading above."""
    found: dict[str, list[str]] = {}
    for line in (ROOT / "docs" / "api.md").read_text(encoding="utf-8").splitlines():
        if heading := re.fullmatch(r"## `([\w.]+)`", line):
            found[heading[1]] = names = []
        elif row := re.match(r"\| `(\w+)` \| \S", line):
            names.append(row[1])
    return found


def packages() -> list[str]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]


def test_no_file_imports_itself_through_others() -> None:
    """Proves that imports among all files of the package, lazy ones and those for types included, have an order."""
    graph = grimp.build_graph("pyro_bnn")
    files = {package_of(path.parent) + ("" if path.stem == "__init__" else f".{path.stem}") for path in code_files()}
    assert graph.modules == files, "the graph misses files: does this checkout have the links pyro_bnn/models, ...?"
    left = {module: set(graph.find_modules_directly_imported_by(module)) for module in graph.modules}
    while free := {module for module, imports in left.items() if not imports}:
        left = {module: imports - free for module, imports in left.items() if module not in free}
    assert not left, f"these files import each other in a circle, or a file of one: {sorted(left)}"


def test_no_folder_has_more_files_than_one_can_overlook() -> None:
    sizes: dict[Path, int] = {}
    for path in code_files():
        if not path.stem.startswith("__"):
            sizes[path.parent] = sizes.get(path.parent, 0) + 1
    assert {str(folder): size for folder, size in sizes.items() if size > LARGEST_FOLDER} == {}


def test_no_file_is_longer_than_one_idea() -> None:
    sizes = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in code_files()}
    assert {path: size for path, size in sizes.items() if size > LONGEST_FILE} == {}


def test_every_package_is_in_the_wheel() -> None:
    """Proves that `packages` of pyproject.toml lists every folder with code, each once, in order."""
    assert packages() == sorted({package_of(path.parent) for path in code_files()})


@pytest.mark.parametrize("name", documented())
def test_public_names_are_the_documented_ones(name: str) -> None:
    """Proves that docs/api.md and `__all__` have the same names, and that each of them can be imported."""
    module = import_module(name)
    assert sorted(module.__all__) == sorted(documented()[name])
    assert len(set(module.__all__)) == len(module.__all__)
    assert [public for public in module.__all__ if not hasattr(module, public)] == []


def test_names_of_the_package_are_there_without_an_import_of_their_own() -> None:
    """Proves, in a process of its own, that modules are attributes of the package, and that others are not."""
    code = (
        "import pyro_bnn as pb; "
        "print(pb.posterior.Posterior is pb.Posterior, pb.summary.__module__, hasattr(pb, 'nothing'))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.split() == ["True", "pyro_bnn.overview", "False"]


def test_every_package_with_public_names_is_documented() -> None:
    public = {name for name in packages() if hasattr(import_module(name), "__all__")}
    assert public - set(SHELVES) <= set(documented())


@pytest.mark.parametrize("name", packages())
def test_a_package_shows_no_name_that_is_not_public(name: str) -> None:
    """Proves that a class or function of ours that a package imports or defines is in its `__all__`."""
    module = import_module(name)
    own = {
        public
        for public, value in vars(module).items()
        if not public.startswith("_")
        and not isinstance(value, ModuleType)
        and getattr(value, "__module__", "").startswith("pyro_bnn")
    }
    assert own <= set(getattr(module, "__all__", ()))


@pytest.mark.parametrize(("shelf", "parent"), SHELVES.items())
def test_names_of_a_shelf_are_public_above(shelf: str, parent: str) -> None:
    assert set(import_module(shelf).__all__) <= set(import_module(parent).__all__)


@pytest.mark.parametrize("way", ["The way of a weight", "The way of an input"])
def test_a_way_enters_each_file_once(way: str) -> None:
    """Proves that the files on the two ways of CONTRIBUTING.md exist, each in one row."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text[text.index(f"## {way}") :].split("\n## ")[0]
    frame = re.findall(r"in `([\w/]+\.py)` is the frame", section)
    files = [row[1] for row in re.finditer(r"^\| [\w ]*\| `([\w/]+\.py)`", section, re.MULTILINE)]
    assert len(frame) == 1 and len(files) > 7
    assert len(set(frame + files)) == len(frame + files)
    assert [name for name in frame + files if not (ROOT / name).is_file()] == []


def test_contributing_names_files_that_are_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:pyro_bnn|models|inference|tests|docs)/[\w./]*\w)`", text)
    there = [name for name in named if not re.search("NAME|FAMILY", name)]
    assert len(there) > 20
    assert [name for name in there if not (ROOT / name).exists()] == []
