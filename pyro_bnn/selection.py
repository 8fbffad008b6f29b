"""Selects parameters of a network, for the options ``select=``, ``head=``, ``affine=`` and ``coded=``.

Selecting a module selects all parameters below it, and a tied parameter can be selected by any of its names.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor, nn

Selector = str | type[nn.Module] | nn.Module | Callable[[str, Tensor], bool]
Select = Selector | Iterable[Selector]

#: lowest similarity of a suggested name: names are long, and the user may have given one part of a name
_LEAST_LIKENESS = 0.4
_MOST_SUGGESTIONS = 5


def select_parameters(
    select: Select,
    candidates: Mapping[str, Tensor],
    net: nn.Module,
    *,
    given: nn.Module | None = None,
    option: str = "select",
    what: str = "parameters",
) -> list[str]:
    """The names among ``candidates`` that a selection matches, in the order of the candidates.

    :param select: one of these, or several:

        - the name of a parameter, or of a module, ``"layer4"``. Names are literal: a name that the network has is
          never a regular expression;
        - a regular expression that matches the whole name of a parameter or of a module, ``r"layer[34]\\..*"``;
        - ``"all-linear"``: every ``nn.Linear``, and every ``Conv1D`` of the transformers library;
        - a type of modules, ``nn.Conv2d``;
        - a module of the network itself, ``net.layer4``;
        - a function ``(name, tensor) -> bool`` of a parameter.

    :param candidates: the parameters that may be picked, tied ones under their first name.
    :param net: the network that has them.
    :param given: the network that ``net`` is a copy of, whose modules may be selected too.
    :param option: the keyword by which a user gave the selection, for messages.
    :param what: a word for the candidates, for messages.
    :raises ValueError: when a selection, or one of several, picks nothing; for an invalid regular expression; for a
        module of another network. Messages suggest similar names.
    :raises TypeError: for a selection of any other kind.
    """
    names = _Names(net, candidates)
    chosen: set[str] = set()
    several = isinstance(select, Iterable) and not isinstance(select, (str, type, nn.Module, Tensor))
    for one in select if several else [select]:  # type: ignore[union-attr]
        if isinstance(one, nn.Module):
            picked = names.below(net.get_submodule(_name_of(one, given, net, option)))
        elif isinstance(one, str):
            picked = names.named(one, option)
        elif isinstance(one, type) and issubclass(one, nn.Module):
            picked = names.below(*(module for module in net.modules() if isinstance(module, one)))
        elif callable(one) and not isinstance(one, type):
            picked = {name for name, tensor in candidates.items() if one(name, tensor)}
        else:
            raise TypeError(
                f"{option} takes a name, a pattern, a module type or a function (name, tensor) -> bool, a module, or "
                f"several of these, not {type(one).__name__}"
            )
        if not picked:
            raise ValueError(f"{option}={one!r} matches none of the {what}{names.hint(one)}")
        chosen |= picked
    if not chosen:
        raise ValueError(
            f"{option}={select!r} is empty: give a name, a pattern, a module type or a function, or leave it out"
        )
    return [name for name in candidates if name in chosen]


def pattern_matches(pattern: str, name: str, option: str = "prior") -> bool:
    """Whether a pattern names a parameter or a module above it: literally, or as a regular expression of the full name.

    :param name: of a parameter, or of a site of it (``fc.weight.s``).
    :raises ValueError: for an invalid regular expression.
    """
    above = name.split(".")
    names = [".".join(above[: i + 1]) for i in range(len(above))]
    return pattern in names or any(map(_compiled(pattern, option).fullmatch, names))


def is_linear(module: nn.Module) -> bool:
    """``nn.Linear`` and the ``Conv1D`` of the transformers library."""
    return isinstance(module, nn.Linear) or (hasattr(module, "nf") and hasattr(module, "weight"))


class _Names:
    """All names of a network, and the candidates that each stands for."""

    def __init__(self, net: nn.Module, candidates: Mapping[str, Tensor]) -> None:
        self.net, self.candidates = net, candidates
        self.first = {id(p): name for name, p in net.named_parameters()}
        self.parameters = {name: self.first[id(p)] for name, p in net.named_parameters(remove_duplicate=False)}
        self.modules = {name: module for name, module in net.named_modules(remove_duplicate=False) if name}

    def below(self, *modules: nn.Module) -> set[str]:
        return {self.first[id(p)] for module in modules for p in module.parameters()} & self.candidates.keys()

    def named(self, name: str, option: str) -> set[str]:
        """The candidates that a string selects: a name first, then ``"all-linear"``, then a regular expression."""
        if name in self.parameters:
            return {self.parameters[name]} & self.candidates.keys()
        if name in self.modules:
            return self.below(self.modules[name])
        if name == "all-linear":
            return self.below(*filter(is_linear, self.net.modules()))
        matches = _compiled(name, option).fullmatch
        picked = {first for name, first in self.parameters.items() if matches(name)} & self.candidates.keys()
        return picked | self.below(*(module for name, module in self.modules.items() if matches(name)))

    def hint(self, one: Selector) -> str:
        """The end of an error message: why nothing matched, if that is known, and the nearest names."""
        if isinstance(one, type):
            kinds = {type(m).__name__ for m in self.modules.values() if self.below(m)} or {type(self.net).__name__}
            return _nearest(one.__name__, kinds, "types of modules that have some")
        if not isinstance(one, str):
            some = ", ".join(map(repr, list(self.candidates)[:_MOST_SUGGESTIONS]))
            return f"; some of them are {some}" if some else ": there are none"
        why = ""
        if one in self.modules:
            why = f": {one!r} is a {type(self.modules[one]).__name__} that has none"
        elif one in self.parameters:
            why = f": {one!r} is another parameter"
        known = [name for name, first in self.parameters.items() if first in self.candidates]
        known += [name for name, module in self.modules.items() if self.below(module)]
        if not why and any(name.endswith(f".{one}") for name in known):
            why = f": names are whole names, and a pattern of all that end so is {'.*' + one!r}"
        return why + _nearest(one, known, "names")


def _nearest(one: str, known: Iterable[str], what: str) -> str:
    names = sorted(set(known))
    found = difflib.get_close_matches(one, names, _MOST_SUGGESTIONS, _LEAST_LIKENESS)
    if found:
        return f"; the nearest {what} are {', '.join(map(repr, found))}"
    some, left = names[:_MOST_SUGGESTIONS], len(names) - _MOST_SUGGESTIONS
    more = f" and {left} more" if left > 0 else ""
    return f"; no {what} are like it" + (f": there are {', '.join(map(repr, some))}{more}" if some else "")


def _name_of(module: nn.Module, given: nn.Module | None, net: nn.Module, option: str) -> str:
    """The name of a module of the user's network, or of the model's copy of it."""
    for network in (given, net):
        for name, one in network.named_modules() if network is not None else ():
            if one is module:
                return name
    raise ValueError(
        f"{option}: the {type(module).__name__} that was given is not a module of this network. Modules are compared "
        "by identity, not by value: take it from the network the model was built from (net.layer4), or give its name"
    )


def _compiled(pattern: str, option: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{option}={pattern!r} is neither a name in the network nor a valid regular expression ({error}); to match "
            f"any text write '.*', as in {'.*' + re.sub('[^a-zA-Z0-9_.]', '', pattern)!r}"
        ) from None
