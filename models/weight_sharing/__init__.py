"""Stochastic weight sharing (Lin et al., AISTATS 2025, arXiv 2505.17856): all weights share K Gaussians.

``model`` and ``guide`` are the Pyro programs in which weights share Gaussians, and ``shared_weights`` is the model in
which they share values. A ``codebook`` says which weight shares which Gaussian, in ``labels``; ``from_weights`` makes
one by the stages of ``clustering``, in the ``plane`` of means and standard deviations. ``merging`` joins codes that are
close, ``merge_schedule`` does so in training. ``storage`` writes a codebook in the bits that it needs, and ``plots``
draws it.
"""

from pyro_bnn.models.weight_sharing.codebook import Codebook
from pyro_bnn.models.weight_sharing.guide import CodebookGuide
from pyro_bnn.models.weight_sharing.merge_schedule import MergeCodes
from pyro_bnn.models.weight_sharing.model import WeightSharing
from pyro_bnn.models.weight_sharing.shared_weights import SharedWeights

__all__ = ["Codebook", "CodebookGuide", "MergeCodes", "SharedWeights", "WeightSharing"]
