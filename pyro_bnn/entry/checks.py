"""Checks of what a public function is given, with one form of message: ``name=value: expected ...``.

Checks of numbers return a plain ``int`` or ``float``. A value of another type, for numbers also a bool, is a TypeError,
and a number that is out of range a ValueError.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import Literal, TypeVar

Number = TypeVar("Number", int, float)
Callback = TypeVar("Callback", bound=Callable[..., object])

#: whether ``torch.compile`` makes machine code of a function, and whether CUDA graphs launch it
Compile = bool | Literal["reduce-overhead"]
#: the largest seed: some functions use the next as well, which is still one for torch
LARGEST_SEED = 2**63 - 1


def optional(check: Callable[[str, object], Number], name: str, value: object) -> Number | None:
    """``None``, or what the check says."""
    return None if value is None else check(name, value)


def count(name: str, value: object, least: int = 1) -> int:
    """A whole number of at least ``least``."""
    return _whole(name, value, least, None, f"expected a whole number, at least {least}")


def label(name: str, value: object) -> int:
    """A whole number that may stand among integer labels."""
    return _whole(name, value, -(2**63), 2**63 - 1, "expected a whole number that stands for a missing label, as -100")


def finite(name: str, value: object) -> float:
    """A number that is neither NaN nor infinite."""
    return _within(name, value, lambda number: True, "expected a finite number")


def positive(name: str, value: object) -> float:
    """A finite number above 0."""
    return _within(name, value, lambda number: number > 0, "expected a positive number")


def not_negative(name: str, value: object) -> float:
    """A finite number of at least 0."""
    return _within(name, value, lambda number: number >= 0, "expected a number of at least 0")


def limit(name: str, value: object) -> float:
    """A number of at least 0, or infinity for no limit."""
    expected = "expected a number of at least 0, or math.inf for no limit"
    number = _real(name, value, expected)
    return number if number == math.inf else _within(name, value, lambda n: n >= 0, expected)


def share(name: str, value: object) -> float:
    """A number between 0 and 1, neither of them included."""
    return _within(name, value, lambda number: 0 < number < 1, "expected a number in (0, 1)")


def share_or_none_of_it(name: str, value: object) -> float:
    """A number from 0 to below 1."""
    return _within(name, value, lambda number: 0 <= number < 1, "expected a number in [0, 1)")


def share_or_all_of_it(name: str, value: object) -> float:
    """A number above 0, up to 1."""
    return _within(name, value, lambda number: 0 < number <= 1, "expected a number in (0, 1]")


def fraction(name: str, value: object) -> float:
    """A number from 0 to 1, both included."""
    return _within(name, value, lambda number: 0 <= number <= 1, "expected a number in [0, 1]")


def seed(name: str, value: object) -> int | None:
    """``None``, or what torch's generators take as a seed."""
    if value is None:
        return None
    return _whole(name, value, 0, LARGEST_SEED, "expected None, or a whole number from 0 to 2**63 - 1")


def truth(name: str, value: object) -> bool:
    """``True`` or ``False``."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: expected True or False, not {type(value).__name__}")
    return value


def truth_or_auto(name: str, value: object) -> bool | Literal["auto"]:
    """``True``, ``False`` or ``"auto"``."""
    if value == "auto":
        return "auto"
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: expected True, False or 'auto', not {type(value).__name__}")
    return value


def compiling(name: str, value: object) -> Compile:
    """``True``, ``False`` or ``"reduce-overhead"``, the mode of ``torch.compile`` that uses CUDA graphs."""
    if value == "reduce-overhead":
        return "reduce-overhead"
    if not isinstance(value, bool):
        kind = ValueError if isinstance(value, str) else TypeError
        raise kind(f"{name}={value!r}: expected True, False or 'reduce-overhead', which uses CUDA graphs")
    return value


def choice(name: str, value: object, known: Iterable[str]) -> None:
    """One of some words."""
    if value not in (words := tuple(known)):
        kind = ValueError if isinstance(value, str) else TypeError
        raise kind(f"{name}={value!r}: expected one of {', '.join(map(repr, words))}")


def names(name: str, value: object) -> tuple[str, ...]:
    """One string, or several."""
    found = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else (None,)
    if not all(isinstance(one, str) for one in found):
        raise TypeError(f"{name}={value!r}: expected a string or a list of strings")
    return tuple(str(one) for one in found)


def function(name: str, value: object) -> None:
    """A function, or another object that can be called."""
    if not callable(value):
        raise TypeError(f"{name}={value!r}: expected a function, not {type(value).__name__}")


def text(name: str, value: object) -> str:
    """A string."""
    if not isinstance(value, str):
        raise TypeError(f"{name}={value!r}: expected a string, not {type(value).__name__}")
    return value


def path(name: str, value: object) -> str:
    """A path, as a string."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name}={value!r}: expected a path, not {type(value).__name__}")
    return str(os.fspath(value))


def functions(name: str, value: Iterable[Callback]) -> list[Callback]:
    """Several functions."""
    expected = f"{name}={value!r}: expected a list of functions"
    if not isinstance(value, Iterable) or isinstance(value, str):
        raise TypeError(f"{expected}, not {type(value).__name__}")
    found = list(value)
    if odd := [one for one in found if not callable(one)]:
        raise TypeError(f"{expected}; {odd[0]!r} cannot be called")
    return found


def _whole(name: str, value: object, least: int, most: int | None, expected: str) -> int:
    _require_number(name, value, expected)
    if not isinstance(value, Integral) or int(value) < least or most is not None and int(value) > most:
        raise ValueError(f"{name}={value!r}: {expected}")
    return int(value)


def _within(name: str, value: object, condition: Callable[[float], bool], expected: str) -> float:
    number = _real(name, value, expected)
    if not math.isfinite(number) or not condition(number):
        raise ValueError(f"{name}={value!r}: {expected}")
    return number


def _real(name: str, value: object, expected: str) -> float:
    number = _require_number(name, value, expected)
    try:
        return float(number)
    except OverflowError:
        raise ValueError(f"{name}={value!r}: {expected}; this one is too large for a float") from None


def _require_number(name: str, value: object, expected: str) -> Real:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}={value!r}: {expected}, not {type(value).__name__}")
    return value
