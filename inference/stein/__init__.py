"""Interacting particles: SVGD, repulsive and plain ensembles, and the kernels between particles."""

from pyro_bnn.inference.stein.annealing import cyclical_annealing
from pyro_bnn.inference.stein.autoparticles import AutoParticles
from pyro_bnn.inference.stein.kernels import IMQ, RBF, KernelSum, LinearKernel, ScaledMedian
from pyro_bnn.inference.stein.svgd import SVGD

__all__ = ["IMQ", "RBF", "SVGD", "AutoParticles", "KernelSum", "LinearKernel", "ScaledMedian", "cyclical_annealing"]
