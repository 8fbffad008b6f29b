"""The public names of the diagnostics stand in two lists, one for programs and one for tools that read types."""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path

import pytest

from pyro_bnn import diagnostics


def names_for_tools() -> dict[str, str]:
    """``{name: module}`` of the imports that only type checkers see."""
    tree = ast.parse(Path(diagnostics.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {str(alias.asname): str(node.module) for node in imports for alias in node.names}


def test_both_lists_of_public_names_agree() -> None:
    """Proves that what a type checker sees is what a program gets, name by name and from the same module."""
    names = names_for_tools()
    assert sorted(names) == diagnostics.__all__ and len(set(diagnostics.__all__)) == len(diagnostics.__all__)
    for name, module in names.items():
        assert getattr(diagnostics, name) is getattr(import_module(module), name)


def test_names_that_do_not_exist_are_refused_and_those_that_do_are_listed() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'compare'"):
        diagnostics.compare  # noqa: B018
    assert set(diagnostics.__all__) <= set(dir(diagnostics))


@pytest.mark.parametrize("folder", ["arviz", "checking", "pages", "plots", "recalibration", "scoring"])
def test_every_folder_says_what_each_of_its_files_is(folder: str) -> None:
    package = import_module(f"pyro_bnn.diagnostics.{folder}")
    files = {path.stem for path in Path(str(package.__file__)).parent.glob("*.py")} - {"__init__"}
    described = [line for line in str(package.__doc__).splitlines() if line.startswith("* ``")]
    assert files and files <= {line.split("``")[1] for line in described}
    assert f"``{folder}``" in str(diagnostics.__doc__)
