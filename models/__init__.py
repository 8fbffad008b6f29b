"""Bayesian networks: each method is a Pyro model with its guides."""

from pyro_bnn.models.bella import Bella, ParticleGuide
from pyro_bnn.models.dense import Dense, MeanFieldGuide, PointGuide
from pyro_bnn.models.peft import load_adapters, save_adapters
from pyro_bnn.models.rank1 import Rank1, Rank1Guide
from pyro_bnn.models.spike_slab import SpikeSlab
from pyro_bnn.models.weight_sharing import Codebook, CodebookGuide, MergeCodes, SharedWeights, WeightSharing

__all__ = [
    "Bella",
    "Codebook",
    "CodebookGuide",
    "Dense",
    "MeanFieldGuide",
    "MergeCodes",
    "ParticleGuide",
    "PointGuide",
    "Rank1",
    "Rank1Guide",
    "SharedWeights",
    "SpikeSlab",
    "WeightSharing",
    "load_adapters",
    "save_adapters",
]
