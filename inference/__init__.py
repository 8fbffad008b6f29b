"""Inference engines: each fits a Pyro model and returns a :class:`pyro_bnn.Posterior`."""

from pyro_bnn.distributed import alone
from pyro_bnn.inference.baselines.dropout import MCDropout
from pyro_bnn.inference.baselines.ensemble import DeepEnsemble
from pyro_bnn.inference.baselines.laplace import LastLayerLaplace
from pyro_bnn.inference.baselines.swag import SWAG
from pyro_bnn.inference.checkpoint import Checkpoint
from pyro_bnn.inference.schedules import cosine, multistep
from pyro_bnn.inference.sgmcmc import pruning
from pyro_bnn.inference.sgmcmc.draw_files import load_stream
from pyro_bnn.inference.sgmcmc.sampling import sample
from pyro_bnn.inference.sgmcmc.sghmc import SGHMC, SGLD
from pyro_bnn.inference.sgmcmc.spike_and_slab.em import SGHMCEM
from pyro_bnn.inference.sgmcmc.spike_and_slab.ke_fan import KeFanSGHMC
from pyro_bnn.inference.stein.annealing import cyclical_annealing
from pyro_bnn.inference.stein.autoparticles import AutoParticles
from pyro_bnn.inference.stein.kernels import IMQ, RBF, KernelSum, LinearKernel, ScaledMedian
from pyro_bnn.inference.stein.svgd import SVGD
from pyro_bnn.inference.svi.elbo import MixtureELBO, ScaleLatents
from pyro_bnn.inference.svi.fitting import fit
from pyro_bnn.inference.svi.objective import Objective
from pyro_bnn.inference.training.callbacks import Callback, FitState
from pyro_bnn.inference.training.logs import CSVLog
from pyro_bnn.inference.training.options import Training

__all__ = [
    "IMQ",
    "RBF",
    "SGHMC",
    "SGHMCEM",
    "SGLD",
    "SVGD",
    "SWAG",
    "AutoParticles",
    "CSVLog",
    "Callback",
    "Checkpoint",
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
    "Training",
    "alone",
    "cosine",
    "cyclical_annealing",
    "fit",
    "load_stream",
    "multistep",
    "pruning",
    "sample",
]
