"""The classes that ``pb.load`` can rebuild, by the names that files use.

Models and guides are registered by :func:`storable`. Likelihoods and priors are values: every dataclass that is a
subclass of their base class is known, and files contain its name and its fields. Names of classes from outside this
package are preceded by the name of their module.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass
from typing import Any, TypeVar

#: where this package has its storable classes: a file may be loaded before anything else has imported them
_HOMES = ("pyro_bnn.models", "pyro_bnn.inference")
_CLASSES: dict[str, type] = {}
_Class = TypeVar("_Class", bound=type)
_Value = TypeVar("_Value")
_WANTED = (
    "A file has the name of the class and its fields: decorate the class with @dataclass(frozen=True), and keep all "
    "that it holds in fields that are numbers, strings, None or tuples of these"
)


def storable(cls: _Class) -> _Class:
    """Class decorator that makes a model or a guide of your own loadable: ``pb.load`` finds the class by its name.

    A model must define ``arguments()`` and ``tensors()``, and is rebuilt by ``from_arguments``; a guide must define
    ``arguments()`` and ``tensors()``, and is rebuilt by ``from_tensors``.

    :raises ValueError: when another class already has this name.
    """
    known = _CLASSES.get(cls.__name__)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(
            f"two storable classes are named {cls.__name__!r}: {known.__module__}.{known.__qualname__} and "
            f"{cls.__module__}.{cls.__qualname__}. Files know classes by their names: give one of them another"
        )
    _CLASSES[cls.__name__] = cls
    return cls


def find_class(name: str) -> type | None:
    """The storable class of this name; ``None`` when there is none."""
    if name not in _CLASSES:
        for home in _HOMES:
            importlib.import_module(home)
    return _CLASSES.get(name)


def is_storable(cls: type) -> bool:
    """Whether this class itself, and not only a base class, is registered."""
    return _CLASSES.get(cls.__name__) is cls


# ------------------------------------------------------------------------------------------------------- values


def describe_value(value: object, what: str) -> dict[str, Any]:
    """``{"class": name, **fields}`` of a dataclass object, as JSON from which :func:`build_value` rebuilds it.

    :param what: the word for it in messages, such as ``"likelihood"``.
    :raises TypeError: when the fields do not determine the object, or JSON cannot represent one of them.
    """
    problem = f"the {what} {type(value).__name__} cannot be written to JSON"
    if not is_dataclass(value) or isinstance(value, type):
        raise TypeError(f"{problem}, because it is not a dataclass. {_WANTED}")
    try:
        held = json.loads(json.dumps(asdict(value)))
        again = type(value)(**{field.name: _frozen(held[field.name]) for field in fields(value)})
        before, after = vars(value), vars(again)
        changed = [name for name in before if name not in after or _frozen(after[name]) != _frozen(before[name])]
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{problem} ({error}). {_WANTED}") from error
    if changed:
        raise TypeError(f"{problem}: an object made from its fields has another {changed[0]!r}. {_WANTED}")
    return {"class": _name_of(type(value)), **held}


def build_value(description: object, base: type[_Value], what: str) -> _Value:
    """The inverse of :func:`describe_value`, for subclasses of ``base``.

    :raises ValueError: when no subclass of this name is defined, or it has other fields.
    """
    if not isinstance(description, dict) or not isinstance(description.get("class"), str):
        description = {"class": "", "found": description}
    name = str(description["class"])
    cls = _find_subclass(base, name)
    known = ", ".join(dict.fromkeys(_name_of(one) for one in _subclasses(base)))
    if cls is None:
        raise ValueError(
            f"unknown {what} {description!r}; known are {known}. Import the module that defines your own class before "
            f"you load, or use load(path, net, {what}=...)"
        )
    arguments = {key: _frozen(held) for key, held in description.items() if key != "class"}
    if extra := set(arguments) - set(inspect.signature(cls).parameters):
        raise ValueError(f"unknown {what} {description!r}: it has no {', '.join(sorted(extra))}; known are {known}")
    try:
        return cls(**arguments)
    except TypeError as error:
        raise ValueError(f"the {what} {description!r} cannot be built ({error})") from error


def _frozen(value: object) -> object:
    """Turns the lists of JSON into the tuples that frozen dataclasses hold."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _subclasses(base: type[_Value]) -> Iterator[type[_Value]]:
    """The subclasses that a file may name."""
    for cls in base.__subclasses__():
        if is_dataclass(cls) and not cls.__name__.startswith("_"):
            yield cls
        yield from _subclasses(cls)


def _name_of(cls: type) -> str:
    is_ours = cls.__module__.partition(".")[0] == "pyro_bnn"
    return cls.__name__ if is_ours else f"{cls.__module__}.{cls.__qualname__}"


def _find_subclass(base: type[_Value], name: str) -> type[_Value] | None:
    """The class of this name, the latest one if a notebook has defined it several times.

    A class that has moved to another module since it was saved is found by its own name, if that is unambiguous.
    """
    found = {_name_of(cls): cls for cls in _subclasses(base)}
    if name in found:
        return found[name]
    alike = [cls for own, cls in found.items() if "." in own and cls.__name__ == name.rpartition(".")[2]]
    return alike[0] if len(alike) == 1 else None
