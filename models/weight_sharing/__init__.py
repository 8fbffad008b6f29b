"""Stochastic weight sharing (Lin et al., AISTATS 2025, arXiv 2505.17856): all weights share K Gaussians.

``clustering`` makes a ``codebook`` of the weights' ``plane`` of means and standard deviations, ``model`` and ``guide``
are the Pyro programs, ``merge_codes`` and ``merging`` join codes in training, ``format``, ``packing`` and
``entropy_coding`` write labels in the bits that they need, and ``plots`` draws it all.
"""

from pyro_bnn.models.weight_sharing.codebook import Codebook
from pyro_bnn.models.weight_sharing.guide import CodebookGuide
from pyro_bnn.models.weight_sharing.merge_codes import MergeCodes
from pyro_bnn.models.weight_sharing.model import WeightSharing

__all__ = ["Codebook", "CodebookGuide", "MergeCodes", "WeightSharing"]
