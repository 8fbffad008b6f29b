"""Kernels for spike-and-slab sites.

``indicators`` is the state of such a site, with its E- and M-step; ``kernel`` what all kernels for them share, pruning
(:mod:`pyro_bnn.inference.sgmcmc.pruning`) included. ``em`` is SGHMC within EM, with the moves of whole groups of
``swaps``; ``ke_fan`` the update that Ke and Fan released.
"""
