"""Inference engines: each fits a Pyro model and returns a :class:`pyro_bnn.Posterior`."""

from pyro_bnn.inference.baselines.dropout import MCDropout
from pyro_bnn.inference.baselines.ensemble import DeepEnsemble
from pyro_bnn.inference.baselines.laplace import LastLayerLaplace
from pyro_bnn.inference.baselines.swag import SWAG
from pyro_bnn.inference.schedules import cosine, multistep
from pyro_bnn.inference.sgmcmc import pruning
from pyro_bnn.inference.sgmcmc.draw_files import load_stream
from pyro_bnn.inference.sgmcmc.sampling import sample
from pyro_bnn.inference.sgmcmc.sghmc import SGHMC, SGLD
from pyro_bnn.inference.sgmcmc.spike_and_slab.em import SGHMCEM
from pyro_bnn.inference.sgmcmc.spike_and_slab.ke_fan import KeFanSGHMC
from pyro_bnn.inference.stein.autoparticles import AutoParticles
from pyro_bnn.inference.stein.kernels import IMQ, RBF, KernelSum, LinearKernel, ScaledMedian
from pyro_bnn.inference.stein.svgd import SVGD, cyclical_annealing
from pyro_bnn.inference.svi.elbo import MixtureELBO, ScaleLatents
from pyro_bnn.inference.svi.fitting import fit
from pyro_bnn.inference.svi.objective import Objective
from pyro_bnn.inference.training import FitState

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
    "KeFanSGHMC",
    "KernelSum",
    "LastLayerLaplace",
    "LinearKernel",
    "MCDropout",
    "MixtureELBO",
    "Objective",
    "ScaleLatents",
    "ScaledMedian",
    "cosine",
    "cyclical_annealing",
    "fit",
    "load_stream",
    "multistep",
    "pruning",
    "sample",
]
