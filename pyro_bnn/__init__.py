"""Bayesian neural networks in Pyro: any ``torch.nn.Module`` becomes a Pyro model with a guide and a posterior.

Its names are imported where they are first used: torch and Pyro take seconds, and ``pyro-bnn --help`` needs neither.
"""

import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyro_bnn import data, diagnostics, inference, likelihoods, models, perturb, priors
    from pyro_bnn.data.run_folder import load, predict
    from pyro_bnn.overview import Summary, summary
    from pyro_bnn.posterior import Posterior, Prediction
    from pyro_bnn.registry import storable

__version__ = "0.1.0"

__all__ = [
    "Posterior",
    "Prediction",
    "Summary",
    "data",
    "diagnostics",
    "inference",
    "likelihoods",
    "load",
    "models",
    "perturb",
    "predict",
    "priors",
    "storable",
    "summary",
]

#: where a name is that is not a module of this package
_HOMES = {
    "Posterior": "posterior",
    "Prediction": "posterior",
    "Summary": "overview",
    "load": "data.run_folder",
    "predict": "data.run_folder",
    "storable": "registry",
    "summary": "overview",
}


def __getattr__(name: str) -> Any:
    home = f"{__name__}.{_HOMES.get(name, name)}"
    if name.startswith("_") or importlib.util.find_spec(home) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(home)
    value = getattr(module, name) if name in _HOMES else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
