"""Priors for weights and for multiplicative factors, chosen with the keyword ``prior=``.

A prior is an object of one of these classes, a Pyro distribution, a function ``(name, tensor) -> distribution``, or a
mapping ``{pattern: prior}``. A pattern is the name of a parameter, the name of a module (for all parameters below it),
or a regular expression that matches such a name completely; the first pattern that matches is used. ``loc=None`` means
the centre that the model sets: 1 for a factor that multiplies a weight (rank-1), 0 for a weight itself, and the given
value for a gain or bias of a normalisation layer (``affine_prior`` of ``Bella``). :func:`pretrained` is a prior around
the given values of weights.

Hierarchical priors add latent sites: ``<site>_tau`` (a scale for a whole layer), ``<site>_lambda`` (a scale for each
element) and ``<site>_inclusion`` (the share of the slab).
"""

from pyro_bnn.priors.choice import PriorLike, describe, from_description, resolve
from pyro_bnn.priors.families import (
    Cauchy,
    HierarchicalCauchy,
    HierarchicalNormal,
    Horseshoe,
    Laplace,
    Normal,
    Pretrained,
    Prior,
    StudentT,
    pretrained,
)
from pyro_bnn.priors.gaussian_mixture import CodebookPrior, GaussianMixture
from pyro_bnn.priors.spike_and_slab import SpikeAndSlab
from pyro_bnn.priors.spike_and_slab_density import SpikeAndSlabDistribution

__all__ = [
    "Cauchy",
    "CodebookPrior",
    "GaussianMixture",
    "HierarchicalCauchy",
    "HierarchicalNormal",
    "Horseshoe",
    "Laplace",
    "Normal",
    "Pretrained",
    "Prior",
    "PriorLike",
    "SpikeAndSlab",
    "SpikeAndSlabDistribution",
    "StudentT",
    "describe",
    "from_description",
    "pretrained",
    "resolve",
]
