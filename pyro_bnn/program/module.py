"""The base class of the Pyro programs of this package (models and guides), which tells them apart from networks."""

from __future__ import annotations

from collections.abc import Iterable

import pyro
import torch
from pyro.infer.autoguide import AutoGuide
from pyro.nn import PyroModule
from torch import nn

from pyro_bnn.program.statements import declares_parameters


def register_parameters(owner: PyroModule, named: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Makes ``pyro.param`` statements for parameters that a module owns, so that ``pyro.infer.SVI`` finds them.

    They replace whatever the parameter store holds under these names: an entry left by an earlier model would otherwise
    be optimised instead, silently.
    """
    if not declares_parameters():
        return
    store = pyro.get_param_store()
    for name, parameter in named:
        fullname = owner._pyro_get_fullname(name)
        if store._params.get(fullname) is not parameter:
            store._params[fullname] = parameter
            store._param_to_name[parameter] = fullname
            store._constraints[fullname] = torch.distributions.constraints.real
        pyro.param(fullname)


def picklable_state(module: nn.Module) -> dict[str, object]:
    """The state of a module without what Pyro's parameter store adds to parameters, the last plate, and caches."""
    for parameter in module.parameters():
        parameter.__dict__.pop("unconstrained", None)  # a weak reference, which the store recreates
    left_out = ("_members", "_given", "_outputs")
    return {k: v if k != "_constants" else {} for k, v in module.__dict__.items() if k not in left_out}


class ProgramModule(PyroModule):
    """A Pyro program of this package: a model or a guide, not a network."""

    #: advice for the error message when such a program is given where a network is expected
    in_place_of_network = ""

    def state_was_set(self) -> None:
        """Called after parameters and buffers were replaced one by one, for example from a checkpoint.

        A program that caches values derived from them recomputes these values here.
        """


def require_network(net: object) -> None:
    """Refuses anything but a plain network.

    :raises TypeError: for anything that is not a module, and for a model, a guide or a network that already has latent
        weights.
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"net must be a torch.nn.Module, got {type(net).__name__}")
    for name, part in net.named_modules():
        latent = isinstance(part, PyroModule) and part.__dict__.get("_pyro_samples")
        if isinstance(part, (ProgramModule, AutoGuide)) or latent:
            where = f"net has {type(part).__name__} as its part {name!r}" if name else f"net={type(part).__name__}"
            serves = part.in_place_of_network if isinstance(part, ProgramModule) else ""
            raise TypeError(f"{where}: expected a plain network, not a program that is already Bayesian{serves}")
