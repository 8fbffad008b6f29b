"""Priors for weights and for multiplicative factors, swapped through the keyword ``prior=``.

A prior is one of the classes here, a Pyro distribution, a callable ``(name, tensor) -> distribution``, or a mapping
``{pattern: prior}`` in which a pattern is the name of a parameter or of a module (all below it), or a regular
expression of such a name as a whole; the first that matches counts. ``loc=None`` means the centre that leaves the
network as it is: 1 for a factor that multiplies a weight (rank-1), 0 for a weight itself.

Hierarchical priors have parameters of their own as latent sites, named ``<site>_tau`` (a scale for a whole layer),
``<site>_lambda`` (a scale for each element) and ``<site>_inclusion`` (the share of the slab).
"""

from pyro_bnn.priors.choice import PriorLike, describe, from_description, resolve
from pyro_bnn.priors.families import (
    Cauchy,
    HierarchicalCauchy,
    HierarchicalNormal,
    Horseshoe,
    Laplace,
    Normal,
    Prior,
    StudentT,
)
from pyro_bnn.priors.gaussian_mixture import CodebookPrior, GaussianMixture
from pyro_bnn.priors.spike_and_slab import SpikeAndSlab, SpikeAndSlabDistribution

__all__ = [
    "Cauchy",
    "CodebookPrior",
    "GaussianMixture",
    "HierarchicalCauchy",
    "HierarchicalNormal",
    "Horseshoe",
    "Laplace",
    "Normal",
    "Prior",
    "PriorLike",
    "SpikeAndSlab",
    "SpikeAndSlabDistribution",
    "StudentT",
    "describe",
    "from_description",
    "resolve",
]
