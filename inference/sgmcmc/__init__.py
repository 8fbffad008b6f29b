"""Stochastic-gradient Markov chains: SGHMC and SGLD, SGHMC within EM with its pruning, and ``sample``."""

from pyro_bnn.inference.sgmcmc.em import SGHMCEM
from pyro_bnn.inference.sgmcmc.sampling import sample
from pyro_bnn.inference.sgmcmc.sghmc import SGHMC, SGLD

__all__ = ["SGHMC", "SGHMCEM", "SGLD", "sample"]
