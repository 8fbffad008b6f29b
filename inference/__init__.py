"""Engines: each takes a Pyro model and returns a :class:`pyro_bnn.Posterior`."""

from pyro_bnn.inference.elbo import MixtureELBO, ScaleLatents
from pyro_bnn.inference.schedules import cosine, warmup_steps
from pyro_bnn.inference.svi import FitState, fit

__all__ = ["FitState", "MixtureELBO", "ScaleLatents", "cosine", "fit", "warmup_steps"]
