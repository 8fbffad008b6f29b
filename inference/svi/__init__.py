"""Stochastic variational inference: the ELBO for mixtures of members, and ``fit``."""

from pyro_bnn.inference.svi.elbo import MixtureELBO, ScaleLatents
from pyro_bnn.inference.svi.fitting import fit
from pyro_bnn.inference.svi.objective import Objective

__all__ = ["MixtureELBO", "Objective", "ScaleLatents", "fit"]
