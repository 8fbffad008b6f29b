"""Engines: each takes a Pyro model and returns a :class:`pyro_bnn.Posterior`."""

from pyro_bnn.inference import pruning
from pyro_bnn.inference.autoparticles import AutoParticles
from pyro_bnn.inference.dropout import MCDropout
from pyro_bnn.inference.elbo import MixtureELBO, ScaleLatents
from pyro_bnn.inference.em import SGHMCEM
from pyro_bnn.inference.ensemble import DeepEnsemble
from pyro_bnn.inference.kernels import IMQ, RBF, Linear, Mixture, ScaledMedian
from pyro_bnn.inference.laplace import LastLayerLaplace
from pyro_bnn.inference.sampling import sample
from pyro_bnn.inference.schedules import cosine, warmup_steps
from pyro_bnn.inference.sghmc import SGHMC, SGLD
from pyro_bnn.inference.svgd import SVGD, cyclical_annealing
from pyro_bnn.inference.svi import FitState, fit
from pyro_bnn.inference.swag import SWAG

__all__ = [
    "IMQ",
    "RBF",
    "SGHMC",
    "SGHMCEM",
    "SGLD",
    "SVGD",
    "SWAG",
    "AutoParticles",
    "DeepEnsemble",
    "FitState",
    "LastLayerLaplace",
    "Linear",
    "MCDropout",
    "Mixture",
    "MixtureELBO",
    "ScaleLatents",
    "ScaledMedian",
    "cosine",
    "cyclical_annealing",
    "fit",
    "pruning",
    "sample",
    "warmup_steps",
]
