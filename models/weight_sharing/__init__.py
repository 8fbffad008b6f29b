"""Stochastic weight sharing (Lin et al., AISTATS 2025, arXiv 2505.17856): all weights share K Gaussians.

``model`` and ``guide`` are the Pyro programs in which weights share Gaussians; ``shared_weights`` is the model in which
they share values. A ``codebook`` assigns a Gaussian to every weight, through ``labels``; ``from_weights`` builds one in
the stages of ``clustering``, in the ``plane`` of means and standard deviations. ``merging`` joins codes that are close
together, and ``merge_schedule`` does so during training. ``storage`` writes a codebook compactly, and ``plots`` draws
it.
"""

from pyro_bnn.models.weight_sharing.codebook import Codebook
from pyro_bnn.models.weight_sharing.guide import CodebookGuide
from pyro_bnn.models.weight_sharing.merge_schedule import MergeCodes
from pyro_bnn.models.weight_sharing.model import WeightSharing
from pyro_bnn.models.weight_sharing.shared_weights import SharedWeights

__all__ = ["Codebook", "CodebookGuide", "MergeCodes", "SharedWeights", "WeightSharing"]
