"""Stochastic-gradient Markov chains, and ``sample``, which runs them.

``kernel`` is what all kernels share, on ``streams`` of minibatches and the ``gradient`` of a potential, which is
recorded for small models (:mod:`pyro_bnn.recording`); ``sghmc`` is SGHMC and SGLD, with ``preconditioners`` and
``noise``. The folder ``tuned`` finds the settings of SGHMC in warm-up, and ``agreement`` says at the end whether chains
agree. The folder ``spike_and_slab`` has the kernels for spike-and-slab sites, SGHMC within EM and the update that Ke
and Fan released, with the rules of ``pruning``. ``draw_files`` has draws on disk as they come.
"""

from pyro_bnn.inference.sgmcmc.draw_files import load_stream
from pyro_bnn.inference.sgmcmc.sampling import sample
from pyro_bnn.inference.sgmcmc.sghmc import SGHMC, SGLD
from pyro_bnn.inference.sgmcmc.spike_and_slab.em import SGHMCEM
from pyro_bnn.inference.sgmcmc.spike_and_slab.ke_fan import KeFanSGHMC

__all__ = ["SGHMC", "SGHMCEM", "SGLD", "KeFanSGHMC", "load_stream", "sample"]
