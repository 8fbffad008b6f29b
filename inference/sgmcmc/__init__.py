"""Stochastic-gradient Markov chains, and ``sample``, which runs them.

``kernel`` is what all kernels share, on ``streams`` of minibatches and the ``gradient`` of a potential, which
``graphs`` records for small models; ``sghmc`` is SGHMC and SGLD, with ``preconditioners`` and ``noise``.
``spike_and_slab`` adds the state of spike-and-slab sites (``indicators``) and ``pruning``; ``em`` is SGHMC within EM on
them, ``ke_fan`` the update that Ke and Fan released. ``draw_files`` has draws on disk as they come.
"""

from pyro_bnn.inference.sgmcmc.draw_files import load_stream
from pyro_bnn.inference.sgmcmc.em import SGHMCEM
from pyro_bnn.inference.sgmcmc.ke_fan import KeFanSGHMC
from pyro_bnn.inference.sgmcmc.sampling import sample
from pyro_bnn.inference.sgmcmc.sghmc import SGHMC, SGLD

__all__ = ["SGHMC", "SGHMCEM", "SGLD", "KeFanSGHMC", "load_stream", "sample"]
