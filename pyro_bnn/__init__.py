"""Bayesian neural networks in Pyro: any ``torch.nn.Module`` becomes a Pyro model with a guide and a posterior."""

from pyro_bnn import data, diagnostics, inference, likelihoods, models, perturb, priors
from pyro_bnn.data.run_folder import load, predict
from pyro_bnn.posterior import Posterior, Prediction
from pyro_bnn.registry import storable
from pyro_bnn.summary import Summary, summary

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
