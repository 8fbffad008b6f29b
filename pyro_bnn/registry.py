"""The classes that ``pb.load`` can build again, by the name under which a file knows them."""

from __future__ import annotations

from typing import TypeVar

_CLASSES: dict[str, type] = {}
_Class = TypeVar("_Class", bound=type)


def storable(cls: _Class) -> _Class:
    """Class decorator: files know the class by its name, and ``pb.load`` finds it there.

    :raises ValueError: when another class has this name already.
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
    return _CLASSES.get(name)


def is_storable(cls: type) -> bool:
    """Whether files know this very class."""
    return _CLASSES.get(cls.__name__) is cls
