"""Which libraries are compared, and their versions."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

#: module -> distribution
PEERS = {
    "bayesian_torch": "bayesian-torch",
    "blitz": "blitz-bayesian-pytorch",
    "ivon": "ivon-opt",
    "jax": "jax",
    "laplace": "laplace-torch",
    "numpyro": "numpyro",
    "peft": "peft",
    "posteriors": "posteriors",
    "torch_uncertainty": "torch-uncertainty",
    "torchbayesian": "torchbayesian",
    "torchbnn": "torchbnn",
}


def versions() -> dict[str, str]:
    """The version of each peer, or ``not installed``."""
    found = {}
    for name in PEERS.values():
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
